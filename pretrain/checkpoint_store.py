"""Saving and restoring a run's checkpoints while it trains; see checkpoint.py for what a checkpoint is."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from data_prep.console import describe_error
from data_prep.files import read_json, read_manifest, sha256_of_file, sync_directory, write_manifest
from pretrain import distributed
from pretrain.checkpoint import FORMAT, MANIFEST, SHARDS, VERSION, Checkpoint, checkpoints_folder, newest_whole
from pretrain.engine import Engine
from pretrain.guard import FAULT, Window, faults_folder

_POLL_S = 0.05
_RANK_IN_NAME = re.compile(r"zero_pp_rank_(\d+)_")


@dataclass(frozen=True)
class Save:
    """What became of saving."""

    step: int
    size_bytes: int
    """Of all ranks' files."""
    stall_s: float
    """For which rank 0 did not train."""
    finishing_s: float
    """For which the files were flushed, hashed and declared whole while training went on."""
    failure: str | None


def find_checkpoint(run: Path, identity: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """Return, on all ranks, the newest whole checkpoint if there is any, and a line for each newer one that is not whole.

    Rank 0 reads and verifies it, and removes what unfinished saves left. Raises ValueError, on all ranks, if no
    checkpoint is whole or if `identity` is not that of the run that saved it.
    """
    found: tuple[Checkpoint | None, list[str]] | str = ""
    if distributed.rank() == 0:
        try:
            found = newest_whole(run)
            for folder in checkpoints_folder(run).glob(".tmp-step*"):
                shutil.rmtree(folder, ignore_errors=True)
            if found[0]:
                _check_identity(found[0], identity)
        except (ValueError, OSError) as error:
            found = describe_error(error)
    found = distributed.from_rank_0(found)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    saved = checkpoint.manifest["identity"]
    changes = [
        f"{key} was {saved.get(key)!r} and is now {value!r}"
        for key, value in identity.items()
        if saved.get(key) != value
    ]
    if changes:
        raise ValueError(
            f"{checkpoint.folder}: was saved by another kind of run: {'; '.join(changes)}; "
            "put that back, or begin anew with another --run"
        )


class CheckpointStore:
    """Saves and restores a run's checkpoints; every method is called by all ranks together."""

    def __init__(
        self, run: Path, engine: Engine, identity: dict[str, Any], keep_last: int, keep_every_steps: int
    ) -> None:
        """`identity` is what must be the same for a run to go on: model, objective, data, batch, ..."""
        self._run, self._engine, self._identity = run, engine, identity
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._exchange = distributed.ranks_store()
        self._saving: Thread | None = None
        self._num_saves, self._stall_s = 0, 0.0
        self._saves: deque[Save] = deque()
        self._failure: str | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the run as it was then. Raises ValueError, on all ranks, where one could not read its part."""
        self._engine.load_shards(checkpoint.folder, SHARDS)

    def record_skipped(self, skipped: list[Window]) -> None:
        """Let every checkpoint know of the windows, so that whichever is resumed from has the same samples behind it.

        Raises ValueError, on all ranks, where a manifest could not be written.
        """
        failure = None
        if self._engine.rank == 0:
            try:
                for folder in sorted(checkpoints_folder(self._run).glob("step*"), reverse=True):
                    self._rewrite_manifest(folder, {"skipped": [asdict(window) for window in skipped]})
            except OSError as error:
                failure = describe_error(error)
        if failure := distributed.from_rank_0(failure):
            raise ValueError(f"the skipped samples could not be recorded: {failure}")

    @staticmethod
    def _rewrite_manifest(folder: Path, changes: dict[str, Any]) -> None:
        try:
            manifest = read_manifest(folder / MANIFEST, FORMAT, VERSION)
        except (ValueError, FileNotFoundError):  # a damaged checkpoint, never to be resumed from
            return
        write_manifest(folder / MANIFEST, FORMAT, VERSION, {
            key: value for key, value in (manifest | changes).items() if key not in ("format", "version")
        })  # fmt: skip

    def save(self, place: dict[str, Any]) -> None:
        """Save the run as it is now: DeepSpeed's files are written, then a thread flushes and hashes them, declares the
        checkpoint whole and removes old ones, while training goes on.

        `place`, the run's place in its samples, goes to the manifest: samples_consumed, skipped windows, the guard's recent steps.
        What became of it, a failure too, is told by `saved` and `finish`; the checkpoints there were are still there.
        """
        self.finish()
        started = time.perf_counter()
        folder = checkpoints_folder(self._run) / f"step{self._engine.steps:08d}"
        unfinished = folder.with_name(f".tmp-{folder.name}")
        failure = distributed.from_rank_0(_made_anew(unfinished / SHARDS) if self._engine.rank == 0 else None)
        if not failure:
            failures = distributed.gather(self._engine.save_shards(unfinished, SHARDS))
            failure = next((failure for failure in failures if failure), None)
        self._num_saves += 1
        self._failure = f"{folder}: was not finished"
        self._stall_s = time.perf_counter() - started
        self._saving = Thread(
            target=self._finish_own, args=(folder, unfinished, self._engine.steps, place, failure),
            name="checkpoint", daemon=True,
        )  # fmt: skip
        self._saving.start()

    def saved(self) -> list[Save]:
        """On rank 0, and each once: what became of the saves of which that is known."""
        return [self._saves.popleft() for _ in range(len(self._saves))]

    def finish(self) -> str | None:
        """Wait for what `save` left to its thread; returns, on all ranks, why the last save failed, or None."""
        if self._saving:
            started = time.perf_counter()
            self._saving.join()
            self._saving = None
            if self._saves:
                self._saves[-1] = replace(
                    self._saves[-1], stall_s=self._saves[-1].stall_s + time.perf_counter() - started
                )
            self._failure = distributed.from_rank_0(self._failure)
        return self._failure

    # The thread's part: no collectives, as the main thread is in the middle of its own.

    def _finish_own(
        self, folder: Path, unfinished: Path, step: int, place: dict[str, Any], failure: str | None
    ) -> None:
        files: dict[str, Any] = {}
        started = time.perf_counter()
        if not failure:
            try:
                files = dict(self._flush_own_files(unfinished))
            except OSError as error:
                failure = describe_error(error)
        self._exchange.set(self._report_key(self._engine.rank), json.dumps([failure, files]))
        if self._engine.rank == 0:
            failure, files = self._all_reports()
            if not failure:
                try:
                    self._declare_whole(unfinished, folder, step, place, files)
                except OSError as error:
                    failure = describe_error(error)
            if failure:
                shutil.rmtree(unfinished, ignore_errors=True)
                failure = f"{folder}: could not be saved ({failure}; {_free(self._run)}); older ones are untouched"
            size_bytes = sum(file["size_bytes"] for file in files.values())
            self._failure = failure
            self._saves.append(Save(step, size_bytes, self._stall_s, time.perf_counter() - started, failure))

    def _all_reports(self) -> tuple[str | None, dict[str, Any]]:
        """The first failure, if there is any, and all ranks' files; waits for every rank, so that none still reads what a
        failed save leaves behind."""
        failure: str | None = None
        files: dict[str, Any] = {}
        for rank in range(self._engine.world_size):
            key = self._report_key(rank)
            while not self._exchange.check([key]):
                time.sleep(_POLL_S)
            failure_of_rank, files_of_rank = json.loads(self._exchange.get(key))
            self._exchange.delete_key(key)
            failure = failure or failure_of_rank
            files |= files_of_rank
        return failure, files

    def _report_key(self, rank: int) -> str:
        return f"checkpoint/{self._num_saves}/{rank}"

    def _flush_own_files(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in sorted(folder.rglob("*")):
            match = _RANK_IN_NAME.search(file.name)
            owner = int(match[1]) if match else 0
            if file.is_file() and owner == self._engine.rank:
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
                size = file.stat().st_size
                yield file.relative_to(folder).as_posix(), {"size_bytes": size, "sha256": sha256_of_file(file)}

    def _declare_whole(
        self, unfinished: Path, folder: Path, step: int, place: dict[str, Any], files: dict[str, Any]
    ) -> None:
        write_manifest(unfinished / MANIFEST, FORMAT, VERSION, {
            "step": step, **place, "identity": self._identity,
            "world_size": self._engine.world_size, "zero_stage": self._engine.zero_stage,
            "precision": self._engine.precision, "files": dict(sorted(files.items())),
        })  # fmt: skip
        sync_directory(unfinished / SHARDS)
        if folder.exists():
            self._remove(folder)
        os.rename(unfinished, folder)
        sync_directory(folder.parent)
        self._remove_old(folder)

    def _remove_old(self, newest: Path) -> None:
        """Of the newest one and those before it; later ones are the damaged that this run was not resumed from."""
        folders = sorted(f for f in checkpoints_folder(self._run).glob("step*") if f.name <= newest.name)
        for folder in folders[: -self._keep_last]:
            step = int(folder.name.removeprefix("step"))
            if step not in self._steps_to_replay() and not (
                self._keep_every_steps and step % self._keep_every_steps == 0
            ):
                self._remove(folder)

    def _steps_to_replay(self) -> set[int]:
        """Of the checkpoints from which faults are replayed: kept until the fault's folder is removed."""
        faults = faults_folder(self._run).glob(f"step*/{FAULT}")
        return {int(read_json(fault)["window"]["checkpoint_step"]) for fault in faults}

    def _remove(self, folder: Path) -> None:
        condemned = folder.with_name(f".tmp-{folder.name}-old")  # so that half of it is never taken for a damaged one
        os.rename(folder, condemned)
        shutil.rmtree(condemned, ignore_errors=True)


def _made_anew(folder: Path) -> str | None:
    """Make an empty folder; returns why that failed, or None."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return describe_error(error)
    return None


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free"
    except OSError as error:
        return describe_error(error)
