"""A model of classes or numbers, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.console import progress_bar
from data_prep.tokenizer import Tokenizer
from finetune.batches import prediction_batches
from finetune.classify_data import Inputs, Target, make_inputs
from finetune.model import initialize, load_model, refuse_one_text, save_model
from finetune.processes import Processes
from pretrain.dropout import Dropout
from pretrain.layout import Layout
from pretrain.model import PMLM, PMLMConfig


class SequenceClassifier(nn.Module):
    """The vector of [SOS], a dense layer with tanh (the pooler), dropout, a linear layer: [B, C]. The last layer of the
    encoder computes [SOS] alone."""

    kind: ClassVar[str] = "pmlm-classifier"

    def __init__(
        self, pretrained: PMLM, num_outputs: int, seed: int, pooler_weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Without a pre-trained pooler's weights its own are new."""
        super().__init__()
        self.config = pretrained.config
        self.bert = pretrained.bert
        pooler = _Pooler(self.config)
        self.bert.add_module("pooler", pooler)
        self.classifier = nn.Linear(self.config.hidden_size, num_outputs)
        self.dropout = Dropout(self.config.dropout)
        initialize([pooler.dense, self.classifier], self.config, seed)
        if pooler_weights:
            pooler.load_state_dict(pooler_weights)

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> Self:
        """Return the model that config.json's `task` is of, its weights not yet loaded."""
        return cls(pretrained, task["num_outputs"], seed=0)

    def forward(self, layout: Layout) -> torch.Tensor:
        """Return the outputs [B, C]; the layout's needed slots are the samples' [SOS]."""
        sos_BH = self.bert(layout, is_predicted_only=True)
        pooled_BH = self.bert.get_submodule("pooler")(sos_BH)
        logits_BC: torch.Tensor = self.classifier(self.dropout(pooled_BH))
        return logits_BC.float()


class _Pooler(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, vectors_BH: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(vectors_BH))


class Classifier:
    """A model fine-tuned by `python -m finetune classify`, or on its way there.

    from finetune import Classifier
    classifier = Classifier.load("runs/classify")
    print(classifier.predict(["It is a truth universally acknowledged."]))
    """

    def __init__(
        self, model: SequenceClassifier, tokenizer: Tokenizer, target: Target, max_length_tokens: int, processes: Processes,
        is_of_pairs: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.target = model.to(processes.device), tokenizer, target
        self.max_length_tokens, self.is_of_pairs, self._processes = max_length_tokens, is_of_pairs, processes

    @classmethod
    def make(
        cls, pretrained: PMLM, tokenizer: Tokenizer, target: Target, max_length_tokens: int, processes: Processes, seed: int,
        pooler: Mapping[str, torch.Tensor] | None = None, is_of_pairs: bool = False,
    ) -> Classifier:  # fmt: skip
        """Return one with a new output; `pooler`: see SequenceClassifier."""
        model = SequenceClassifier(pretrained, target.num_outputs, seed, pooler)
        return cls(model, tokenizer, target, max_length_tokens, processes, is_of_pairs)

    @classmethod
    def load(cls, folder: Path | str, processes: Processes | None = None) -> Classifier:
        """Load one from a run's folder; raises ValueError or OSError for what holds none, or a damaged one."""
        model, tokenizer, task = load_model(Path(folder), SequenceClassifier)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = Target(**{**task["target"], "labels": tuple(task["target"]["labels"])})
        return cls(
            model, tokenizer, target, task["max_length_tokens"], processes or Processes(device=device), task["is_of_pairs"]
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write it so that `load` finds it."""
        task: dict[str, Any] = {
            "target": asdict(self.target), "num_outputs": self.target.num_outputs, "max_length_tokens": self.max_length_tokens,
            "is_of_pairs": self.is_of_pairs,
        }  # fmt: skip
        save_model(folder, self.model, self.tokenizer, task)

    def inputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Inputs:
        """Return the texts as this model takes them.

        Raises ValueError for one text instead of a list, for pairs where the model was trained on single texts or the other way
        round, and where there are not as many second texts as first ones.
        """
        for name, given in (("texts", texts), ("pairs", pairs)):
            refuse_one_text(name, given)
        if (pairs is not None) != self.is_of_pairs:
            trained, given_now = (
                ("pairs of texts", "no second texts") if self.is_of_pairs else ("single texts", "pairs")
            )
            raise ValueError(
                f"the model was trained on {trained} and is given {given_now}; expected what it was trained on"
            )
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} second texts, expected as many")
        rows = zip(texts, pairs, strict=True) if pairs is not None else ((text,) for text in texts)
        return make_inputs(self.tokenizer, rows, self.max_length_tokens)

    def loss(self, inputs: Inputs, targets: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Return cross-entropy or squared error of some of the inputs, added up. `targets`: of all, class or scaled number."""
        outputs = self.model(inputs.layout(samples).to(self._processes.device))
        wanted = targets[list(samples)].to(outputs.device)
        if self.target.is_regression:
            return F.mse_loss(outputs[:, 0], wanted, reduction="sum")
        return F.cross_entropy(outputs, wanted, reduction="sum")

    def outputs(self, inputs: Inputs, description: str = "predicting") -> np.ndarray:
        """Return the model's outputs, float32 [B, C], in whatever mode and precision is set; all processes take part."""
        processes, lengths = self._processes, inputs.lengths
        batches = list(prediction_batches(lengths))
        mine: list[tuple[np.ndarray, np.ndarray]] = []
        bar = progress_bar(description, len(lengths), "text", is_shown=processes.is_first, is_lasting=False)
        with bar, torch.no_grad():
            for place, batch in enumerate(batches):
                if place % processes.world_size == processes.rank:
                    outputs = self.model(inputs.layout(batch.tolist()).to(processes.device))
                    mine.append((batch, outputs.float().cpu().numpy()))
                bar.update(len(batch))
        found = np.empty((len(lengths), self.target.num_outputs), dtype=np.float32)
        for part in processes.gather(mine):
            for batch, values in part:
                found[batch] = values
        return found

    def values(self, outputs: np.ndarray) -> np.ndarray:
        """Return outputs as predicted numbers [B]."""
        return outputs[:, 0].astype(np.float64) * self.target.scale + self.target.mean

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Return the probability of each class, [B, C], in the order of `target.labels`. Raises ValueError, see `inputs`."""
        if self.target.is_regression:
            raise ValueError("the model predicts numbers, which have no probabilities; call predict")
        self.model.eval()
        return torch.softmax(torch.from_numpy(self.outputs(self.inputs(texts, pairs))), dim=1).numpy()

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[str] | list[float]:
        """Return each text's class, or number. Raises ValueError, see `inputs`."""
        if not self.target.is_regression:
            return [self.target.labels[i] for i in self.probabilities(texts, pairs).argmax(axis=1)]
        self.model.eval()
        return [float(value) for value in self.values(self.outputs(self.inputs(texts, pairs)))]
