"""Saving and restoring a run's checkpoints while it trains; see checkpoint.py for what a checkpoint is."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from data_prep.console import describe_error
from data_prep.errors import UserError
from data_prep.files import sha256_of_file, sync_directory, write_manifest
from pretrain import distributed
from pretrain.checkpoint import (
    FORMAT,
    MANIFEST,
    SHARDS,
    VERSION,
    Checkpoint,
    checkpoints_by_step,
    checkpoints_folder,
    folder_name,
    newest_whole,
    read_checkpoint_manifest,
)
from pretrain.engine import Engine

_POLL_S = 0.05
_KEYS_OF_VERSION_1 = ("samples_consumed", "skipped", "recent_steps")
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
    not_removed: tuple[str, ...] = ()
    """Why older checkpoints could not be removed; each is told once."""


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
        raise UserError(found)
    return found


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    changes = list(_differences(checkpoint.manifest["identity"], identity, ""))
    if changes:
        raise UserError(
            f"{checkpoint.folder}: was saved by another kind of run: {'; '.join(changes)}; "
            "put that back, or begin anew with another --run"
        )


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in now.items():
        before = saved.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            yield from _differences(before, value, f"{prefix}{key}.")
        elif before != value:
            yield f"{prefix}{key} was {before!r} and is now {value!r}"


class CheckpointStore:
    """Saves and restores a run's checkpoints; every method is called by all ranks together."""

    def __init__(
        self,
        run: Path,
        engine: Engine,
        identity: dict[str, Any],
        keep_last: int,
        keep_every_steps: int,
        steps_to_keep: Callable[[], set[int]] = set,
    ) -> None:
        """`identity`: what must be the same for a run to go on: model, objective, data, batch, ...; `steps_to_keep`: steps
        whose checkpoints are not to be removed now."""
        self._run, self._engine, self._identity = run, engine, identity
        self._keep_last, self._keep_every_steps, self._steps_to_keep = keep_last, keep_every_steps, steps_to_keep
        self._exchange = distributed.ranks_store()
        self._saving: Thread | None = None
        self._num_saves, self._stall_s = 0, 0.0
        self._saves: deque[Save] = deque()
        self._failure: str | None = None
        self._not_removed: set[Path] = set()

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the run as it was then. Raises ValueError, on all ranks, where one could not read its part."""
        self._engine.load_shards(checkpoint.folder, SHARDS)

    def update_states(self, name: str, change: Callable[[Any], Any]) -> None:
        """Replace the state of one component in every checkpoint by what `change` makes of it.

        Raises ValueError, on all ranks, where a manifest could not be written.
        """
        failure = None
        if self._engine.rank == 0:
            try:
                for folder in reversed(checkpoints_by_step(self._run).values()):
                    self._rewrite_state(folder, name, change)
            except OSError as error:
                failure = describe_error(error)
        if failure := distributed.from_rank_0(failure):
            raise UserError(f"the state of the {name} could not be written: {failure}")

    @staticmethod
    def _rewrite_state(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
        try:
            checkpoint = Checkpoint(folder, read_checkpoint_manifest(folder))
        except (ValueError, FileNotFoundError):  # a damaged checkpoint, never to be resumed from
            return
        states = checkpoint.states
        of_format = {"format", "version", "states", *_KEYS_OF_VERSION_1}
        content = {key: value for key, value in checkpoint.manifest.items() if key not in of_format}
        changed = {**states, name: change(states[name])}
        write_manifest(folder / MANIFEST, FORMAT, VERSION, {**content, "states": changed})

    def save(self, states: dict[str, Any]) -> None:
        """Save the run as it is now: DeepSpeed's files are written, then a thread flushes and hashes them, declares the
        checkpoint whole and removes old ones, while training goes on.

        `states`, of the run's components by their names and in JSON's types, go to the manifest. What became of it, a
        failure too, is told by `saved` and `finish`; the checkpoints there were are still there.
        """
        self.finish()
        started = time.perf_counter()
        folder = checkpoints_folder(self._run) / folder_name(self._engine.steps)
        unfinished = folder.with_name(f".tmp-{folder.name}")
        failure = distributed.from_rank_0(_made_anew(unfinished / SHARDS) if self._engine.rank == 0 else None)
        if not failure:
            failures = distributed.gather(self._engine.save_shards(unfinished, SHARDS))
            failure = next((failure for failure in failures if failure), None)
        self._num_saves += 1
        self._failure = f"{folder}: was not finished"
        self._stall_s = time.perf_counter() - started
        self._saving = Thread(
            target=self._finish_own, args=(folder, unfinished, self._engine.steps, states, failure),
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
        self, folder: Path, unfinished: Path, step: int, states: dict[str, Any], failure: str | None
    ) -> None:
        files: dict[str, Any] = {}
        started = time.perf_counter()
        if not failure:
            try:
                files = dict(self._flush_own_files(unfinished))
            except Exception as error:
                failure = _described(error)
        self._exchange.set(self._report_key(self._engine.rank), json.dumps([failure, files]))
        if self._engine.rank == 0:
            failure, files = self._all_reports()
            not_removed: tuple[str, ...] = ()
            if not failure:
                try:
                    self._declare_whole(unfinished, folder, step, states, files)
                except Exception as error:
                    failure = _described(error)
            if not failure:
                try:
                    not_removed = tuple(self._remove_old(step))
                except Exception as error:
                    not_removed = (f"{folder.parent}: old checkpoints could not be removed: {_described(error)}",)
            if failure:
                shutil.rmtree(unfinished, ignore_errors=True)
                failure = f"{folder}: could not be saved ({failure}; {_free(self._run)}); older ones are untouched"
            size_bytes = sum(file["size_bytes"] for file in files.values())
            self._failure = failure
            finishing_s = time.perf_counter() - started
            self._saves.append(Save(step, size_bytes, self._stall_s, finishing_s, failure, not_removed))

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
        self, unfinished: Path, folder: Path, step: int, states: dict[str, Any], files: dict[str, Any]
    ) -> None:
        content = {
            "step": step,
            "states": states,
            "identity": self._identity,
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.zero_stage,
            "precision": self._engine.precision,
            "files": dict(sorted(files.items())),
        }
        write_manifest(unfinished / MANIFEST, FORMAT, VERSION, content)
        sync_directory(unfinished / SHARDS)
        if folder.exists():
            _remove(folder)
        os.rename(unfinished, folder)
        sync_directory(folder.parent)

    def _remove_old(self, newest: int) -> Iterator[str]:
        """Remove what --keep_last leaves over; yields why a checkpoint could not be removed, once for each.

        Checkpoints later than `newest` are the damaged ones that this run was not resumed from, and do not count.
        """
        folders = [(step, f) for step, f in checkpoints_by_step(self._run).items() if step <= newest]
        to_keep = self._steps_to_keep()
        for step, folder in folders[: -self._keep_last]:
            if step in to_keep or (self._keep_every_steps and step % self._keep_every_steps == 0):
                continue
            try:
                _remove(folder)
            except OSError as error:
                if folder not in self._not_removed:
                    yield f"{folder}: an old checkpoint, could not be removed: {describe_error(error)}"
                self._not_removed.add(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, so that half of it is never taken for a damaged one. Raises OSError where it is untouched."""
    condemned = folder.with_name(f".tmp-{folder.name}-old")
    shutil.rmtree(condemned, ignore_errors=True)
    os.rename(folder, condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def _described(error: Exception) -> str:
    """Return an error of the thread in one line; the traceback of one that is not the disk's goes to the log."""
    if isinstance(error, OSError):
        return describe_error(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


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
