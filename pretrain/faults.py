"""Records of steps at fault, kept for `python -m pretrain.replay`.

    RUN/faults/step00000123/fault.json       the reason, the skipped samples, recent values, what the run is
    RUN/faults/step00000123/samples.jsonl    a line a step: the training samples' numbers and epochs
    RUN/faults/step00000123/deepspeed.json   the DeepSpeed JSON

The steps of a fault are those from the checkpoint, or the initial weights, that the run went back to.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.files import read_json, sync_directory, write_json, write_whole

FORMAT = "pmlm-fault"
VERSION = 2
FAULT = "fault.json"
SAMPLES = "samples.jsonl"
DEEPSPEED = "deepspeed.json"


def faults_folder(run: Path) -> Path:
    """Return the folder in which a run keeps the records of its faults."""
    return run / "faults"


def new_fault_name(run: Path, step: int) -> str:
    """Return a folder's name that is free: a step may be at fault again after a rewind."""
    names = [f"step{step:08d}", *(f"step{step:08d}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not (faults_folder(run) / name).exists())


def write_fault(folder: Path, about: dict[str, Any], deepspeed: dict[str, Any], samples: Iterable[str]) -> None:
    """Write the record of a fault, whole or not at all."""
    unfinished = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_whole(unfinished / SAMPLES, "".join(f"{line}\n" for line in samples).encode())
        write_json(unfinished / DEEPSPEED, deepspeed)
        write_json(unfinished / FAULT, {"format": FORMAT, "version": VERSION, **about})
        os.rename(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_directory(folder.parent)


def read_fault(folder: Path) -> dict[str, Any]:
    """Return what `write_fault` wrote. Raises OSError, or ValueError for a record of another version."""
    about: dict[str, Any] = read_json(folder / FAULT)
    if about.get("version") != VERSION:
        raise ValueError(
            f"{folder / FAULT}: format version {about.get('version')}; this code replays version {VERSION}: take the code "
            "that recorded it"
        )
    return about


def steps_to_replay(run: Path) -> set[int]:
    """Return the steps of the checkpoints from which faults are replayed: kept until the fault's folder is removed."""
    steps = set()
    for fault in faults_folder(run).glob(f"step*/{FAULT}"):
        try:
            steps.add(int(read_json(fault)["window"]["checkpoint_step"]))
        except (ValueError, OSError, KeyError, TypeError):  # damaged, so that nobody can replay it
            continue
    return steps
