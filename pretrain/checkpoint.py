"""Checkpoints that are whole or do not exist.

    RUN/checkpoints/step00000200/
        manifest.json       written last: step, samples consumed, what the run is, size and SHA-256 of each file
        shards/*.pt         DeepSpeed's files, one set of optimizer states a rank

A checkpoint is written as `.tmp-step00000200` and renamed, by a thread of rank 0, when every rank's files are flushed and
hashed, each by a thread of its rank; the hashes come through the store in which the ranks met. A checkpoint is resumed
from only if its manifest and every file hold. DeepSpeed's own `latest` file is never written nor read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.console import describe_error
from data_prep.files import read_manifest, sha256_of_file
from pretrain.guard import Window

if TYPE_CHECKING:  # `pretrain.status` has no need of torch
    from pretrain.device import Precision

FORMAT = "pmlm-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.manifest["step"])

    @property
    def samples_consumed(self) -> int:
        """The place in the global order of samples."""
        return int(self.manifest["samples_consumed"])

    @property
    def skipped(self) -> list[Window]:
        """The samples that the run leaves out, before this checkpoint and behind it."""
        return [Window(**window) for window in self.manifest.get("skipped", [])]

    @property
    def precision(self) -> Precision:
        """The precision of the run when it was saved. Its weights and moments are stored in fp32 in any case."""
        found: Precision = self.manifest.get("precision") or self.manifest["identity"]["precision"]
        return found

    @property
    def written_by(self) -> str:
        """The ranks, the ZeRO stage and the precision that its shards were written with, in words."""
        return describe_layout(self.manifest["world_size"], self.manifest["zero_stage"], self.precision)


class SaveFailed(Exception):
    """The run ends, and what was trained since its last whole checkpoint is lost."""


def describe_layout(world_size: int, zero_stage: int, precision: str) -> str:
    """Return in words what a resume may change: the ranks, the ZeRO stage and the precision."""
    return f"{world_size} {'rank' if world_size == 1 else 'ranks'} at ZeRO stage {zero_stage} in {precision}"


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def newest_whole(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    Raises ValueError if there are checkpoints and none is whole: to begin anew over them would lose a run.
    """
    folders = sorted(checkpoints_folder(run).glob("step*"), reverse=True)
    passed_over: list[str] = []
    for folder in folders:
        try:
            return read_checkpoint(folder), passed_over
        except (ValueError, OSError) as error:
            passed_over.append(f"passed over checkpoint {folder.name}: {describe_error(error)}")
    if folders:
        raise ValueError(
            f"{checkpoints_folder(run)}: none of {len(folders)} checkpoints is whole ({'; '.join(passed_over)}); "
            "restore one, or begin anew with another --run"
        )
    return None, []


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, every file of which has been read and compared. Raises ValueError or OSError where it is not whole."""
    return Checkpoint(folder, _checked_manifest(folder))


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, every file of which has been read and compared."""
    manifest = read_manifest(folder / MANIFEST, FORMAT, VERSION)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: is missing")
        if (size := file.stat().st_size) != expected["size_bytes"]:
            raise ValueError(f"{file}: has {size} bytes, expected {expected['size_bytes']}")
        if sha256_of_file(file) != expected["sha256"]:
            raise ValueError(f"{file}: is damaged (its SHA-256 is not the manifest's)")
    return manifest
