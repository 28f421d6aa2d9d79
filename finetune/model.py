"""A pre-trained Transformer with a task's output on it, and the folder that keeps the two.

    MODEL/config.json          kind, sizes, and what the task needs to know
    MODEL/model.safetensors    fp32 weights, named as BERT's for that task
    MODEL/tokenizer.model      or tokenizer.json

Shapes: N slots, R slots needed, B samples, C outputs, T target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.files import read_json, unfinished_file, write_json, write_whole
from data_prep.tokenizer import Tokenizer, load_tokenizer
from finetune.trainer import MODEL, seed_for
from pretrain.dropout import Dropout
from pretrain.export import CONFIG, WEIGHTS, read_safetensors, refuse_unfit
from pretrain.layout import Layout
from pretrain.model import PMLM, PMLMConfig

_VERSION = 1
SUMMARY = "summary.json"
"""In the folder of several runs: which is the best."""


class SequenceClassifier(nn.Module):
    """The vector of [SOS], a dense layer with tanh (the pooler), dropout, a linear layer: [B, C]. The last layer of the
    encoder computes [SOS] alone."""

    kind = "pmlm-classifier"

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
        _initialize([pooler.dense, self.classifier], self.config, seed)
        if pooler_weights:
            pooler.load_state_dict(pooler_weights)

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> SequenceClassifier:
        """The model that config.json's `task` is of, its weights not yet loaded."""
        return cls(pretrained, task["num_outputs"], seed=0)

    def forward(self, layout: Layout) -> torch.Tensor:
        """The layout's needed slots are the samples' [SOS]."""
        sos_BH = self.bert(layout, is_predicted_only=True)
        pooled_BH = self.bert.get_submodule("pooler")(sos_BH)
        logits_BC: torch.Tensor = self.classifier(self.dropout(pooled_BH))
        return logits_BC.float()


class SpanClassifier(nn.Module):
    """The score of each slot as the start and as the end of an answer, [N, 2]."""

    kind = "pmlm-question-answerer"

    def __init__(self, pretrained: PMLM, seed: int) -> None:
        super().__init__()
        self.config = pretrained.config
        self.bert = pretrained.bert
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        _initialize([self.qa_outputs], self.config, seed)

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> SpanClassifier:
        """See SequenceClassifier."""
        return cls(pretrained, seed=0)

    def forward(self, layout: Layout) -> torch.Tensor:
        """Of the layout's needed slots, [R, 2]."""
        scores_R2: torch.Tensor = self.qa_outputs(self.bert(layout, is_predicted_only=True))
        return scores_R2.float()


class Seq2SeqModel(PMLM):
    """A PMLM with its pre-trained output layer, all of it under the released names."""

    kind = "pmlm-seq2seq"

    def __init__(self, pretrained: PMLM) -> None:
        nn.Module.__init__(self)
        self.config, self.bert, self.cls = pretrained.config, pretrained.bert, pretrained.cls

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> Seq2SeqModel:
        """See SequenceClassifier."""
        return cls(pretrained)

    def target_losses(self, layout: Layout, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each target token of a `seq2seq_layout`, [T], and whether it is the likeliest."""
        return self.cls.predictions.losses(self.encode_predicted(layout), layout.targets_T, label_smoothing)


class _Pooler(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, vectors_BH: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(vectors_BH))


def _initialize(layers: list[nn.Linear], config: PMLMConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed_for("new weights", seed))
    for layer in layers:
        nn.init.normal_(layer.weight, std=config.initializer_range, generator=generator)
        nn.init.zeros_(layer.bias)


_M = TypeVar("_M", SequenceClassifier, SpanClassifier, Seq2SeqModel)


def save_model(
    folder: Path, model: SequenceClassifier | SpanClassifier | Seq2SeqModel, tokenizer: Tokenizer, task: dict[str, Any]
) -> None:
    """Write the folder's files, each whole, the weights last; `task`: what config.json is to say of the task."""
    write_whole(folder / tokenizer.file_name, tokenizer.path.read_bytes())
    write_json(folder / CONFIG, {
        "format": model.kind, "version": _VERSION, "model": asdict(model.config), "task": task,
        "tokenizer_file": tokenizer.file_name, "tokenizer_sha256": tokenizer.sha256,
    })  # fmt: skip
    with unfinished_file(folder / WEIGHTS) as partial:
        save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, partial)


def model_folder(folder: Path) -> Path:
    """Where the files are: the folder itself, a run's, or one of several runs', of which the best. Raises FileNotFoundError."""
    if (folder / SUMMARY).is_file():
        folder = folder / read_json(folder / SUMMARY)["best"]
    if (folder / MODEL).is_dir():
        folder = folder / MODEL
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(2, "no fine-tuned model there; train one first", str(folder))
    return folder


def load_model(folder: Path, cls: type[_M]) -> tuple[_M, Tokenizer, dict[str, Any]]:
    """What `save_model` wrote, in eval mode: in a model's folder, a run's, or one of several runs, of which the best.

    Raises ValueError or OSError, naming the file, for what is none, of another kind, or damaged.
    """
    folder = model_folder(folder)
    config = read_json(folder / CONFIG)
    found = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
    if found != (cls.kind, _VERSION):
        raise ValueError(f"{folder / CONFIG}: expected format {cls.kind} of version {_VERSION}, found {found}")
    tokenizer = load_tokenizer(folder / config["tokenizer_file"])
    if tokenizer.sha256 != config["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer.path}: not the tokenizer this model was trained with")
    with torch.random.fork_rng(devices=[]):
        model = cls.of_task(PMLM(PMLMConfig(**config["model"])), config["task"])
    weights = read_safetensors(folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    refuse_unfit(folder / WEIGHTS, weights, {name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model.eval(), tokenizer, config["task"]
