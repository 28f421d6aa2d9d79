"""What the result of a command depends on, and the refusal to go on with that of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer import Tokenizer
from pretrain.model import PMLM


def training_identity(
    model: PMLM,
    pooler: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    files: Mapping[str, str],
    task: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything besides TrainSettings that a training's result depends on.

    `model` and `pooler` are what training begins from. `files`: of each role ("train", "validation", ...) the SHA-256 of what was read. A file's name and folder do not count: the same
    file may be moved, and another file may have its name. `task`: the task's name and all its settings, columns included.
    """
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **pooler}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return {
        "task": dict(task), "files": dict(files), "model": asdict(model.config), "weights_sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
    }  # fmt: skip


def refuse_other(path: Path, found: Any, expected: Mapping[str, Any], what: str) -> None:
    """Raise ValueError that names every difference between what `path` is of and what is asked for; `what` is asked for."""
    if found == expected:
        return
    if not isinstance(found, dict):
        raise ValueError(f"{path}: exists, and does not say what made it; choose another --output or remove it")
    theirs, ours = (dict(_flat(value)) for value in (found, expected))
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    differences = ", ".join(_difference(name, theirs.get(name), ours.get(name)) for name in names)
    raise ValueError(f"{path}: is of another {what} ({differences}); give the same, or another --output")


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if name.startswith("files."):
        return f"the {name.removeprefix('files.')} file has another content"
    if name.endswith("sha256"):
        return f"{name.removesuffix('_sha256').removesuffix('.sha256')}: another content"
    return f"{name.removeprefix('task.')} {theirs!r}, now {ours!r}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        if isinstance(one, dict):
            yield from _flat(one, f"{prefix}{name}.")
        else:
            yield prefix + name, one
