"""Which checkpoint is taken: the newest whole one, whatever is wrong with the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from support import VOCAB_SIZE, deepspeed_json, make_checkpoint
from torch import distributed

from data_prep.files import read_manifest, write_manifest
from pretrain.checkpoint import FORMAT, Checkpoint, checkpoints_by_step, newest_whole
from pretrain.checkpoint_store import CheckpointStore, _check_identity
from pretrain.model import PMLM, PMLMConfig
from pretrain.order import Cursor


@pytest.mark.parametrize("file", ["manifest.json", "shards/mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    make_checkpoint(tmp_path, 100)
    victim = make_checkpoint(tmp_path, 200) / file
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0x04
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"flipped": content, "cut": content[:-9], "empty": b""}[damage])
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.states["cursor"]["samples_consumed"]) == (100, 3200)
    assert len(passed_over) == 1
    assert passed_over[0].startswith("passed over checkpoint step00000200: ")


def test_any_flipped_bit_of_a_manifest_is_found_or_means_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 100)
    whole = newest_whole(tmp_path)[0]
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        manifest.write_bytes(flipped)
        try:
            assert newest_whole(tmp_path)[0] == whole
        except ValueError as error:
            assert "none of 1 checkpoints is whole" in str(error)  # noqa: PT017


def test_what_was_never_finished_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, [])
    (tmp_path / "checkpoints" / ".tmp-step00000300" / "shards").mkdir(parents=True)
    assert newest_whole(tmp_path) == (None, [])
    make_checkpoint(tmp_path, 9)
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 9
    assert not passed_over


def test_none_whole_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (make_checkpoint(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of 2 checkpoints is whole .*step00000001.*another --run"):
        newest_whole(tmp_path)


def test_a_foreign_folder_is_no_checkpoint_and_never_the_newest(tmp_path: Path) -> None:
    """Whatever somebody put there: copies, other names, a file."""
    whole = make_checkpoint(tmp_path, 2)
    for name in ("step00000002-keep", "step2", "step00000009.old", "stepping_stones", "step٠٠٠٠٠٠٠٩"):
        shutil.copytree(whole, whole.with_name(name))
    whole.with_name("step.txt").write_text("notes")
    checkpoint, told = newest_whole(tmp_path)
    assert checkpoint
    assert checkpoint.folder == whole
    assert len(told) == 6
    assert all("not named as a checkpoint" in line for line in told)
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match=r"none of 0 checkpoints is whole .*step00000002-keep: not named as"):
        newest_whole(tmp_path)  # to begin anew would be to lose what they are copies of


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 7):
        make_checkpoint(tmp_path, step)
    assert list(checkpoints_by_step(tmp_path)) == [7, 99_999_999, 100_000_000]
    newest = newest_whole(tmp_path)[0]
    assert newest
    assert newest.step == 100_000_000


def test_a_checkpoint_of_the_older_version_is_read(tmp_path: Path) -> None:
    manifest = make_checkpoint(tmp_path, 3) / "manifest.json"
    values = read_manifest(manifest, FORMAT, 2)
    del values["states"], values["format"], values["version"]
    window = {"first_sample": 32, "stop_sample": 64, "checkpoint_step": 1, "fault": "step00000002"}
    older = {"samples_consumed": 128, "skipped": [window], "recent_steps": [[3, 6.5, 1.25]]}
    write_manifest(manifest, FORMAT, 1, values | older)
    checkpoint = newest_whole(tmp_path)[0]
    assert checkpoint
    assert Cursor(32, checkpoint.states["cursor"]).state_dict() == {"samples_consumed": 128, "skipped": [[32, 64]]}
    assert checkpoint.states["guard"] == {"recent_steps": [[3, 6.5, 1.25]]}
    CheckpointStore._rewrite_state(manifest.parent, "cursor", lambda state: state | {"samples_consumed": 5})
    checkpoint = newest_whole(tmp_path)[0]
    assert checkpoint
    assert checkpoint.manifest["version"] == 2
    assert checkpoint.states["cursor"] == {"samples_consumed": 5, "skipped": [[32, 64]]}
    assert checkpoint.states["guard"] == {"recent_steps": [[3, 6.5, 1.25]]}
    assert not older.keys() & checkpoint.manifest.keys()


def test_what_differs_from_the_run_that_saved_is_named_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"identity": {"model": {"hidden_size": 32, "dropout": 0.1}, "seed": 0}})
    _check_identity(checkpoint, {"model": {"hidden_size": 32, "dropout": 0.1}, "seed": 0})
    with pytest.raises(ValueError, match=r"another kind of run: model\.hidden_size was 32 and is now 64; put") as error:
        _check_identity(checkpoint, {"model": {"hidden_size": 64, "dropout": 0.1}, "seed": 0})
    assert "dropout" not in str(error.value)


# ---- saving, on two ranks


def _store(run: Path, keep_last: int = 1) -> Any:
    """Weights and moments of 3 MB."""
    from pretrain.ds_config import DeepSpeedConfig
    from pretrain.engine import Engine

    config = DeepSpeedConfig(deepspeed_json(run.with_suffix(f".{os.getpid()}.json"), train_batch_size=16, fp16=None))
    model = PMLM(PMLMConfig.of_size("tiny", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64))
    return CheckpointStore(run, Engine(model, config), {}, keep_last, 0)


def _save_on_a_disk_that_is_filled_and_freed(rank: int, run: Path) -> None:
    store = _store(run)
    for step, is_full in enumerate([False, True, False], start=1):
        store._engine._engine.global_steps = step
        if rank == 0 and is_full:
            (run / "other_data").write_bytes(bytes(shutil.disk_usage(run).free - 500_000))
        distributed.barrier()
        store.save({"samples_consumed": 32 * step})
        failure = store.finish()
        assert bool(failure) == is_full
        saved = store.saved()
        if rank == 0:
            assert [(save.step, save.failure) for save in saved] == [(step, failure)]
            newest, passed_over = newest_whole(run)
            assert newest
            assert (newest.step, passed_over) == (1 if is_full else step, [])
            assert len(list((run / "checkpoints").iterdir())) == 1
            if is_full:
                assert "0 MB free" in failure
                (run / "other_data").unlink()
        else:
            assert not saved


@pytest.mark.slow
def test_a_save_that_fails_leaves_the_older_checkpoint_and_the_next_succeeds(
    two_ranks: Ranks, small_disk: Path
) -> None:
    two_ranks(_save_on_a_disk_that_is_filled_and_freed, small_disk / "run")


def _save_and_be_slow(rank: int, run: Path) -> None:
    """In the second save rank 1 has a file that takes minutes to hash, as on a slow disk."""
    store = _store(run)
    save_shards = store._engine.save_shards

    def save_a_long_file(folder: Path, tag: str) -> str | None:
        with open(folder / tag / "zero_pp_rank_1_of_many_gigabytes.pt", "wb") as file:
            file.truncate(200 << 30)
        return save_shards(folder, tag)  # type: ignore[no-any-return]

    for step in (1, 2):
        store._engine._engine.global_steps = step
        if rank == 1 and step == 2:
            store._engine.save_shards = save_a_long_file
        store.save({"samples_consumed": 32 * step})
        if step == 1:
            assert store.finish() is None
    assert store._saving.is_alive()
    time.sleep(0.5)


def test_killed_while_a_thread_finishes_a_checkpoint_the_one_before_is_the_newest(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    two_ranks(_save_and_be_slow, run)
    two_ranks.end()  # kill -9
    newest, passed_over = newest_whole(run)
    assert newest
    assert (newest.step, passed_over) == (1, [])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [".tmp-step00000002", "step00000001"]


@pytest.mark.slow
def test_what_is_damaged_and_newer_does_not_push_out_what_is_whole(two_ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_checkpoint(run, 7)
    (make_checkpoint(run, 9) / "manifest.json").unlink()
    two_ranks(_save_step_8, run)
    newest, passed_over = newest_whole(run)
    assert newest
    assert (newest.step, len(passed_over)) == (8, 1)
    assert not (run / "checkpoints" / "step00000007").exists()


def _save_step_8(rank: int, run: Path) -> None:
    store = _store(run)
    store._engine._engine.global_steps = 8
    store.save({"samples_consumed": 0})
    assert store.finish() is None


def _save_where_old_ones_cannot_go(rank: int, run: Path) -> None:
    """Of the checkpoints of three saves, the first is a mount point, which cannot be renamed; beside them is a copy."""
    store = _store(run)
    told: list[str] = []
    for step in (1, 2, 3, 4):
        store._engine._engine.global_steps = step
        if rank == 0 and step == 2:
            shutil.copytree(run / "checkpoints" / "step00000001", run / "checkpoints" / "step00000001-keep")
            pinned = str(run / "checkpoints" / "step00000001")
            subprocess.run(["mount", "--bind", pinned, pinned], check=True)
        distributed.barrier()
        store.save({})
        assert store.finish() is None
        told += [line for save in store.saved() for line in save.not_removed]
    if rank == 0:
        subprocess.run(["umount", pinned], check=True)
        assert len(told) == 1, "each is told once"
        assert "step00000001: an old checkpoint, could not be removed: " in told[0]
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["step00000001", "step00000001-keep", "step00000004"]


@pytest.mark.slow
def test_an_old_checkpoint_that_stays_is_told_and_no_failure(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks(_save_where_old_ones_cannot_go, tmp_path / "run")


def _fail_in_the_thread(rank: int, run: Path) -> None:
    """Errors of our own in the thread do not end saving: one while files are hashed, one while old checkpoints are removed."""
    store = _store(run)
    flush = store._flush_own_files
    for step in (1, 2, 3):
        store._engine._engine.global_steps = step
        store._flush_own_files = (lambda folder: {}["a defect"]) if step == 1 and rank == 1 else flush
        store._steps_to_keep = (lambda: {}["a defect"]) if step == 2 else set
        store.save({})
        failure, saved = store.finish(), store.saved()
        assert bool(failure) == (step == 1)
        if rank == 0:
            words = f"{failure} {saved[0].not_removed}"
            assert ("KeyError: 'a defect'" in words) == (step < 3)
    if rank == 0:
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step00000003"]


@pytest.mark.slow
def test_a_defect_in_the_thread_is_told_and_the_next_save_succeeds(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks(_fail_in_the_thread, tmp_path / "run")
