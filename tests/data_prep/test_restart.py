"""Killed at any moment, out of disk space, with an input that cannot be read: what is left is whole, and the same command
goes on with it, to the bytes of an undisturbed build."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import pytest
from held_build import Hold, on_changes
from stages import Disturbed
from support import PATIENCE_S, REPOSITORY, environment, files_of

from data_prep import build as build_module
from data_prep import units
from data_prep.build import WORK, build
from data_prep.console import describe_error
from data_prep.corpus import plan_units
from data_prep.duplicates import DuplicateSettings
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.remask import remask
from data_prep.shards import MANIFEST, find_faults
from data_prep.tokenizer import Tokenizer

Build = Callable[..., bool]
Make = Callable[[Path], bool]


def assert_left_is_whole(folder: Path) -> None:
    """No data set, or all of it; under a shard's name nothing but a whole HDF5 file."""
    if (folder / MANIFEST).exists():
        assert list(find_faults(folder)) == []
    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            assert all(len(dataset[:]) for dataset in file.values())


def finished_tasks(folder: Path) -> set[str]:
    """Files that no later run may write again: their task left its last file."""
    finished = {part.name for part in (folder / WORK).glob("*.npz")}
    for done in (folder / WORK).glob("*.json"):
        if done.stem != "plan":
            finished |= {done.name, f"{done.stem}.h5"}
    return finished


# ---- killed before each of its changes to the disk


def in_child(function: Callable[[], Any]) -> int:
    """Run it in a fork of this process; returns the status it exits with, or minus the signal that killed it."""
    if not (child := os.fork()):
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_and_be_killed(make: Make, folder: Path, change: int) -> None:
    changes = count(1)

    def kill(event: str, path: str) -> None:
        if next(changes) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    on_changes(kill)
    make(folder)


def make_the_rest(make: Make, folder: Path) -> None:
    finished = finished_tasks(folder)

    def refuse(event: str, path: str) -> None:
        if event == "os.rename" and Path(path).name in finished:
            raise AssertionError(f"{path} was finished, and is written again")

    on_changes(refuse)
    make(folder)


CLEANED = {
    "drop_duplicate_documents": True, "near_duplicate_jaccard": 0.8, "drop_duplicate_paragraphs": "line",
}  # fmt: skip


@pytest.fixture(scope="module")
def build_small(chapters: list[Path], build_data: Build) -> Build:
    """Two units, one of them of several parts, a shard to train and one to validate."""

    def make(folder: Path, **settings: Any) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=12_000))
            patch.setattr(units, "PART_BYTES", 5_000)
            return build_data(chapters[3:6], folder, validation_fraction=0.4, **settings)

    return make


@pytest.fixture(scope="module")
def undisturbed(build_small: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    assert build_small(folder)
    assert len(list(folder.glob("*.h5"))) == 2
    return folder


def assert_killed_anywhere_it_goes_on(make: Make, tmp_path: Path, *, min_changes: int, step: int = 1) -> None:
    assert make(tmp_path / "undisturbed")
    expected = files_of(tmp_path / "undisturbed")
    for change in count(1, step):
        folder = tmp_path / str(change)
        status = in_child(partial(make_and_be_killed, make, folder, change))
        assert_left_is_whole(folder)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert in_child(partial(make_the_rest, make, folder)) == 0, f"killed before change {change}"
        assert files_of(folder) == expected, f"killed before change {change}"
    assert change > min_changes


@pytest.mark.slow
def test_killed_before_any_change_to_the_disk(build_small: Build, tmp_path: Path) -> None:
    assert_killed_anywhere_it_goes_on(build_small, tmp_path, min_changes=30)


@pytest.mark.heavy
def test_killed_before_every_fifth_change_while_duplicates_are_dropped(build_small: Build, tmp_path: Path) -> None:
    assert_killed_anywhere_it_goes_on(partial(build_small, **CLEANED), tmp_path, min_changes=90, step=5)


@pytest.mark.heavy
def test_remask_killed_before_any_change_to_the_disk(undisturbed: Path, tmp_path: Path) -> None:
    def make(folder: Path) -> bool:
        with LocalProcesses(1) as processes:
            return remask(undisturbed, folder, {"seed": 7, "mask_sets": 1}, processes)

    assert_killed_anywhere_it_goes_on(make, tmp_path, min_changes=16)


# ---- a disk that is full at any moment


_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 32, 16384, 1 << 18
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000


class SmallDisk:
    """A tmpfs that only this process sees, in a mount namespace of its own."""

    def __init__(self, mount_point: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.geteuid(), os.getegid()
        self._check(self._libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)))
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        self._check(self._libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
        self._mount_point = mount_point
        self._check(self._libc.mount(b"tmpfs", bytes(mount_point), b"tmpfs", 0, b"size=4096"))

    def resize(self, num_pages: int) -> None:
        self._check(
            self._libc.mount(None, bytes(self._mount_point), None, _MS_REMOUNT, f"size={num_pages * 4096}".encode())
        )

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def error_of(make: Make, folder: Path) -> OSError | None:
    try:
        make(folder)
    except OSError as error:
        return error
    return None


def make_on_ever_larger_disks(make: Make, mount_point: Path, expected: dict[str, bytes]) -> None:
    """Each size that is too small is told, and is enough to go on from when there is more."""
    disk, folder = SmallDisk(mount_point), mount_point / "data"
    failed_on = set()
    for num_pages in count(1):
        disk.resize(num_pages)
        before = files_of(folder)
        failure = error_of(make, folder)
        if not failure:
            break
        assert failure.errno == errno.ENOSPC
        assert Path(failure.filename).is_relative_to(folder)
        failed_on.add(Path(failure.filename).suffix)
        assert before.items() <= files_of(folder).items()
        assert_left_is_whole(folder)
        if num_pages % 4 == 0:
            disk.resize(1000)
            assert make(folder)
            assert files_of(folder) == expected
            shutil.rmtree(folder)
    assert files_of(folder) == expected
    assert failed_on >= {".npz", ".h5"}


@pytest.mark.slow
def test_the_disk_is_full(build_small: Build, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    assert in_child(partial(make_on_ever_larger_disks, build_small, tmp_path / "disk", files_of(undisturbed))) == 0


# ---- inputs that cannot be read, or change


def test_what_another_version_has_begun_is_not_gone_on_with(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        with LocalProcesses(1) as processes:
            build([Corpus(chapters[3:4])], tokenizer.path, tmp_path / "data", BuildParameters(), processes)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_WORK_VERSION", 1)
        patch.setattr(build_module, "write_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin()
    with pytest.raises(ValueError, match=r"begun by another version of this program \(its work_version is 1, expected"):
        begin()


@pytest.fixture
def corpus(chapters: list[Path], tmp_path: Path) -> list[Path]:
    """A unit for each."""
    return [Path(shutil.copy2(chapter, tmp_path)) for chapter in chapters[3:6]]


@pytest.mark.parametrize("stage", ["hash texts", "tokenize"])
@pytest.mark.parametrize(
    ("disturb", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "No such file"),
        (lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")), OSError, "Input/output error"),
        (lambda path: os.truncate(path, 4000), ValueError, "has changed since"),
        (lambda path: path.write_bytes(b"caf\xe9"), ValueError, "has changed since"),
        (lambda path: os.utime(path), ValueError, "has changed since"),
    ],
    ids=["is away", "cannot be read", "is cut", "is written", "is touched"],
)
def test_an_input_that_is_lost_or_changes_midway(
    stage: str, disturb: Callable[[Path], object], error: type[Exception], message: str, corpus: list[Path],
    tokenizer: Tokenizer, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """When it is back, the same command goes on with what is done."""
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=4_000))
    parameters = BuildParameters(max_length_tokens=64, shard_samples=128, validation_fraction=0.4)
    dropped = DuplicateSettings(drop_duplicate_documents=stage == "hash texts")
    folder = tmp_path / "data"
    shutil.copy2(corpus[1], tmp_path / "kept")
    with pytest.raises(error) as failure, Disturbed(stage, lambda: disturb(corpus[1])) as processes:
        build([Corpus(corpus)], tokenizer.path, folder, parameters, processes, duplicates=dropped)
    assert describe_error(failure.value).startswith(f"{corpus[1]}: ")
    assert message in describe_error(failure.value)
    assert "Traceback" in (folder / "logs" / "main.log").read_text()
    assert ("unit-00000000-000000-end.npz" in finished_tasks(folder)) == (stage == "tokenize")
    corpus[1].unlink(missing_ok=True)
    (tmp_path / "kept").rename(corpus[1])
    with LocalProcesses(1) as processes:
        assert build([Corpus(corpus)], tokenizer.path, folder, parameters, processes, duplicates=dropped)
    expected = files_of(undisturbed)
    assert {name: bytes for name, bytes in files_of(folder).items() if name != MANIFEST} == {
        name: bytes for name, bytes in expected.items() if name != MANIFEST
    }


# ---- processes killed at random moments


class RunningBuild:
    """`python -m data_prep build` with two workers, in a session of its own, held at an event."""

    def __init__(self, corpus: list[Path], tokenizer: Tokenizer, folder: Path, num_events: int) -> None:
        self.folder = folder
        self.hold = Hold(folder.with_name("hold"), num_events)
        command = self.hold.command(
            "build", "--corpus", *corpus, "--tokenizer", tokenizer.path, "--data", folder, "--max_length_tokens", 11,
            "--mask_sets", 4, "--shard_samples", 128, "--workers", 2,
        )  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_until_held(self) -> None:
        assert until(self.hold.is_reached)
        assert self.process.poll() is None

    def members(self) -> list[int]:
        """Processes of the build that are alive."""
        alive = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = status.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.process.pid and state != "Z":
                alive.append(int(status.parent.name))
        return alive

    def workers(self) -> list[int]:
        return [member for member in self.members() if member != self.process.pid]

    def wait(self) -> list[str]:
        """Lines on stderr, without those of the progress bar."""
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        bars = ("read input:", "tokenize:", "draw masks:")
        return [line for line in errors.splitlines() if not line.startswith(bars)]

    def stop(self) -> None:
        if self.members():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.hold.release()


def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def assert_a_killed_worker_ends_it(running: RunningBuild) -> None:
    os.kill(random.Random(0).choice(running.workers()), signal.SIGKILL)
    lines = running.wait()
    assert running.process.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("python -m data_prep build: error: a worker process was killed")
    assert f"{running.folder}/logs/*.log" in lines[0]


def assert_workers_do_not_outlive_it(running: RunningBuild) -> None:
    assert len(running.workers()) == 2
    os.kill(running.process.pid, signal.SIGKILL)


def assert_all_can_be_killed(running: RunningBuild) -> None:
    os.killpg(running.process.pid, signal.SIGKILL)


def assert_ctrl_c_ends_it(running: RunningBuild) -> None:
    os.killpg(running.process.pid, signal.SIGINT)
    running.hold.release()  # the workers end their tasks
    assert running.wait() == ["python -m data_prep build: interrupted"]
    assert running.process.returncode == 130
    assert not list(running.folder.glob(".*.partial"))


@pytest.mark.slow
def test_a_build_killed_again_and_again(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path, build_data: Build
) -> None:
    """At moments drawn by chance, the first while the workers start; one build for all that it is ended by."""
    folder, corpus = tmp_path / "data", chapters
    settings: dict[str, Any] = {"max_length_tokens": 11, "mask_sets": 4}
    draw = random.Random(1)
    finished: dict[Path, int] = {}
    for end, num_events in [
        (assert_a_killed_worker_ends_it, 1),
        (assert_workers_do_not_outlive_it, draw.randrange(20, 80)),
        (assert_all_can_be_killed, draw.randrange(20, 80)),
        (assert_a_killed_worker_ends_it, draw.randrange(20, 80)),
        (assert_ctrl_c_ends_it, draw.randrange(20, 80)),
    ]:
        running = RunningBuild(corpus, tokenizer, folder, num_events)
        try:
            running.wait_until_held()
            end(running)
            assert until(lambda: not running.members())  # noqa: B023
        finally:
            running.stop()
        assert not (folder / MANIFEST).exists()
        assert_left_is_whole(folder)
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
        names = finished_tasks(folder)
        finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name in names}
    assert len([path for path in finished if path.suffix == ".h5"]) > 10
    with pytest.raises(ValueError, match="holds an unfinished data set made from other parameters"):
        build_data(corpus, folder, max_length_tokens=11, mask_sets=3)
    (folder / ".train-00149.h5.partial").write_bytes(b"half a shard")
    assert in_child(partial(make_the_rest, partial(build_data, corpus, **settings), folder)) == 0
    assert build_data(corpus, tmp_path / "undisturbed", **settings)
    assert files_of(folder) == files_of(tmp_path / "undisturbed")
