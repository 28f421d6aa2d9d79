"""Texts, or pairs of texts, to a class or a number.

A text is "[SOS] text [EOS]", a pair "[SOS] a [EOS] b [EOS]" with segment 1 from b on. What is too long loses tokens at the
end, of a pair the longer of the two until they are even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.console import progress_bar
from data_prep.tokenizer import Tokenizer
from finetune.batches import prediction_batches
from finetune.model import SequenceClassifier, load_model, save_model
from finetune.processes import Processes
from pretrain.layout import Layout, encoder_layout
from pretrain.model import PMLM


@dataclass(frozen=True)
class Target:
    """What is predicted."""

    labels: tuple[str, ...] = ()
    """The classes; none for a number."""
    mean: float = 0.0
    scale: float = 1.0
    """A number is the model's output x scale + mean."""

    @property
    def is_regression(self) -> bool:
        """Whether it is a number."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Of the model."""
        return max(1, len(self.labels))


@dataclass(frozen=True)
class Inputs:
    """Texts as the model takes them."""

    ids: list[list[int]]
    segments: list[list[int]]
    num_truncated: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.array([*map(len, self.ids)], dtype=np.int64)

    def layout(self, samples: Sequence[int]) -> Layout:
        """Of some of them; needed is [SOS]."""
        return encoder_layout([self.ids[i] for i in samples], [self.segments[i] for i in samples], [[0]] * len(samples))


def make_inputs(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length_tokens: int
) -> Inputs:
    """Tokenize, truncate and add the special tokens."""
    first = tokenize(tokenizer, texts)
    second = tokenize(tokenizer, pairs) if pairs is not None else None
    sos, eos = tokenizer.sos_id, tokenizer.eos_id
    ids, segments, num_truncated = [], [], 0
    for sample, a in enumerate(first):
        b = second[sample] if second is not None else []
        room = max_length_tokens - (2 if second is None else 3)
        if len(a) + len(b) > room:
            num_truncated += 1
            kept_b = min(len(b), max(room // 2, room - len(a)))
            a, b = a[: room - kept_b], b[:kept_b]
        tail = [*b, eos] if second is not None else []
        ids.append([sos, *a, eos, *tail])
        segments.append([0] * (len(a) + 2) + [1] * len(tail))
    return Inputs(ids, segments, num_truncated)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], texts_at_once: int = 1024) -> list[list[int]]:
    """Token ids of each text."""
    found: list[list[int]] = []
    for start in range(0, len(texts), texts_at_once):
        ids, num_ids = tokenizer.encode_texts([text.encode() for text in texts[start : start + texts_at_once]])
        found += [part.tolist() for part in np.split(ids, np.cumsum(num_ids)[:-1])]
    return found


class Classifier:
    """A model fine-tuned by `python -m finetune.classify`, or on its way there.

    from finetune import Classifier
    classifier = Classifier.load("runs/classify")
    print(classifier.predict(["It is a truth universally acknowledged."]))
    """

    def __init__(
        self, model: SequenceClassifier, tokenizer: Tokenizer, target: Target, max_length_tokens: int, processes: Processes
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.target = model.to(processes.device), tokenizer, target
        self.max_length_tokens, self._processes = max_length_tokens, processes

    @classmethod
    def make(
        cls, pretrained: PMLM, tokenizer: Tokenizer, target: Target, max_length_tokens: int, processes: Processes, seed: int,
        pooler: Mapping[str, torch.Tensor] | None = None,
    ) -> Classifier:  # fmt: skip
        """With a new output; `pooler`: see SequenceClassifier."""
        model = SequenceClassifier(pretrained, target.num_outputs, seed, pooler)
        return cls(model, tokenizer, target, max_length_tokens, processes)

    @classmethod
    def load(cls, folder: Path | str, processes: Processes | None = None) -> Classifier:
        """From a run's folder; raises ValueError or OSError for what holds none, or a damaged one."""
        model, tokenizer, task = load_model(Path(folder), SequenceClassifier)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = Target(**{**task["target"], "labels": tuple(task["target"]["labels"])})
        return cls(model, tokenizer, target, task["max_length_tokens"], processes or Processes(device=device))

    def save(self, folder: Path) -> None:
        """So that `load` finds it."""
        task: dict[str, Any] = {
            "target": asdict(self.target), "num_outputs": self.target.num_outputs, "max_length_tokens": self.max_length_tokens,
        }  # fmt: skip
        save_model(folder, self.model, self.tokenizer, task)

    def inputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Inputs:
        """The texts as this model takes them. Raises ValueError if there are not as many pairs."""
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} second texts, expected as many")
        return make_inputs(self.tokenizer, texts, pairs, self.max_length_tokens)

    def loss(self, inputs: Inputs, targets: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Cross-entropy or squared error of some of the inputs, added up. `targets`: of all, class or scaled number."""
        outputs = self.model(inputs.layout(samples).to(self._processes.device))
        wanted = targets[list(samples)].to(outputs.device)
        if self.target.is_regression:
            return F.mse_loss(outputs[:, 0], wanted, reduction="sum")
        return F.cross_entropy(outputs, wanted, reduction="sum")

    def outputs(self, inputs: Inputs, description: str = "predicting") -> np.ndarray:
        """The model's outputs, float32 [B, C], in whatever mode and precision is set; all processes take part."""
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
        """Outputs as predicted numbers [B]."""
        return outputs[:, 0].astype(np.float64) * self.target.scale + self.target.mean

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Of each class, [B, C]; the order is that of `target.labels`."""
        self.model.eval()
        return torch.softmax(torch.from_numpy(self.outputs(self.inputs(texts, pairs))), dim=1).numpy()

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[str] | list[float]:
        """Each text's class, or number. Raises ValueError if there are not as many pairs."""
        if not self.target.is_regression:
            return [self.target.labels[i] for i in self.probabilities(texts, pairs).argmax(axis=1)]
        self.model.eval()
        return [float(value) for value in self.values(self.outputs(self.inputs(texts, pairs)))]
