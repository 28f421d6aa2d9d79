"""What the models of all tasks share: new layers, and the folder that keeps a model.

MODEL/config.json          kind, sizes, and what the task needs to know
MODEL/model.safetensors    fp32 weights, named as BERT's for that task
MODEL/tokenizer.model      or tokenizer.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.files import read_json, unfinished_file, write_json, write_whole
from data_prep.tokenizer import Tokenizer, load_tokenizer
from finetune.trainer import MODEL, seed_for
from pretrain.export import CONFIG, WEIGHTS, read_safetensors, refuse_unfit
from pretrain.model import PMLM, PMLMConfig

_VERSION = 2
SUMMARY = "summary.json"
"""In the folder of several runs: which is the best."""


class TaskModel(Protocol):
    """A Transformer with a task's output on it."""

    kind: ClassVar[str]
    """Names the task in config.json."""
    config: PMLMConfig

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> Self:
        """Return the model that config.json's `task` is of, its weights not yet loaded."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by their names."""

    def eval(self) -> Self:
        """Leave training mode."""


def initialize(layers: list[nn.Linear], config: PMLMConfig, seed: int) -> None:
    """Give new layers their initial weights, a function of the seed."""
    generator = torch.Generator().manual_seed(seed_for("new weights", seed))
    for layer in layers:
        nn.init.normal_(layer.weight, std=config.initializer_range, generator=generator)
        nn.init.zeros_(layer.bias)


def refuse_one_text(name: str, texts: object) -> None:
    """Raise ValueError for a text where a list of texts is expected: each of its characters would be taken for one."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"{name} is one text, expected a list of texts; write [text]")


_M = TypeVar("_M", bound=TaskModel)


def save_model(folder: Path, model: TaskModel, tokenizer: Tokenizer, task: dict[str, Any]) -> None:
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


KINDS = {
    "pmlm": "a pre-trained model; fine-tune it, or pass it as --weights",
    "pmlm-classifier": "what `python -m finetune classify` writes",
    "pmlm-question-answerer": "what `python -m finetune answer` writes",
    "pmlm-seq2seq": "what `python -m finetune seq2seq` writes",
}
"""What each `format` in a config.json is."""


def model_kind(folder: Path) -> str:
    """Return which kind of model is in a model's folder, a run's, or one of several runs'. Raises ValueError or OSError."""
    return str(_read_config(model_folder(folder)).get("format"))


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") not in KINDS:
        raise ValueError(
            f"{folder / CONFIG}: no fine-tuned model's; expected the folder of a run of `python -m finetune`"
        )
    return config


def load_model(folder: Path, cls: type[_M]) -> tuple[_M, Tokenizer, dict[str, Any]]:
    """Load what `save_model` wrote, in eval mode: in a model's folder, a run's, or one of several runs, of which the best.

    Raises ValueError or OSError, naming the file, for what is none, of another kind, or damaged.
    """
    folder = model_folder(folder)
    config = _read_config(folder)
    if config["format"] != cls.kind:
        raise ValueError(f"{folder / CONFIG}: is {KINDS[config['format']]}; expected {KINDS[cls.kind]}")
    if config.get("version") != _VERSION:
        raise ValueError(
            f"{folder / CONFIG}: is of version {config.get('version')} of its format, and this program reads version {_VERSION}; train "
            "it again, or use the program that wrote it"
        )
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
