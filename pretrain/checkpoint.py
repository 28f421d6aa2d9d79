"""Checkpoints that are whole or do not exist.

    RUN/checkpoints/step00000200/
        manifest.json       written last: step, states of the run's components, what the run is, size and SHA-256 of each file
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

if TYPE_CHECKING:  # `pretrain.status` has no need of torch
    from pretrain.device import Precision

FORMAT = "pmlm-checkpoint"
VERSION = 2
_OLDER_VERSION = 1
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
    def states(self) -> dict[str, Any]:
        """The states of the run's components, each by its name and known to the component only."""
        if self.manifest["version"] == _OLDER_VERSION:
            return _states_of_version_1(self.manifest)
        states: dict[str, Any] = self.manifest["states"]
        return states

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


def _states_of_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    skipped = [[window["first_sample"], window["stop_sample"]] for window in manifest.get("skipped", [])]
    return {
        "cursor": {"samples_consumed": manifest["samples_consumed"], "skipped": skipped},
        "guard": {"recent_steps": manifest.get("recent_steps", [])},
    }


def checkpoints_folder(run: Path) -> Path:
    """Return the folder in which a run keeps its checkpoints."""
    return run / "checkpoints"


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step{step:08d}"


def checkpoints_by_step(run: Path) -> dict[int, Path]:
    """Return the folders of a run's checkpoints, whole or not, by their steps in ascending order.

    A folder of another name, as a copy that somebody put there, is none.
    """
    found = {}
    for folder in checkpoints_folder(run).glob("step*"):
        digits = folder.name.removeprefix("step")
        if digits.isdecimal() and folder.name == folder_name(int(digits)):
            found[int(digits)] = folder
    return dict(sorted(found.items()))


def newest_whole(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and a line for each newer one that is not and each foreign folder.

    Raises ValueError if there are checkpoints and none is whole: to begin anew over them would lose a run.
    """
    folders = [*checkpoints_by_step(run).values()][::-1]
    foreign = sorted(set(checkpoints_folder(run).glob("step*")) - set(folders))
    passed_over = [f"{path}: not named as a checkpoint, so it is neither used nor removed" for path in foreign]
    for folder in folders:
        try:
            return read_checkpoint(folder), passed_over
        except (ValueError, OSError) as error:
            passed_over.append(f"passed over checkpoint {folder.name}: {describe_error(error)}")
    if passed_over:
        raise ValueError(
            f"{checkpoints_folder(run)}: none of {len(folders)} checkpoints is whole ({'; '.join(passed_over)}); "
            "restore one, or begin anew with another --run"
        )
    return None, []


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, every file of which has been read and compared. Raises ValueError or OSError where it is not whole."""
    return Checkpoint(folder, _checked_manifest(folder))


def read_checkpoint_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises OSError, or ValueError where it does not hold."""
    return read_manifest(folder / MANIFEST, FORMAT, VERSION, _OLDER_VERSION)


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, every file of which has been read and compared."""
    manifest = read_checkpoint_manifest(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: is missing")
        if (size := file.stat().st_size) != expected["size_bytes"]:
            raise ValueError(f"{file}: has {size} bytes, expected {expected['size_bytes']}")
        if sha256_of_file(file) != expected["sha256"]:
            raise ValueError(f"{file}: is damaged (its SHA-256 is not the manifest's)")
    return manifest
