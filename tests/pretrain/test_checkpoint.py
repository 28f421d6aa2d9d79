"""Which checkpoint is taken: the newest whole one, whatever is wrong with the others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_prep.files import write_manifest
from pretrain.checkpoint import FORMAT, VERSION, newest_whole

CONTENT = bytes(range(256)) * 8


def make_checkpoint(run: Path, step: int) -> Path:
    """A whole checkpoint as `CheckpointStore.save` leaves it; what is in the shards does not matter here."""
    folder = run / "checkpoints" / f"step{step:08d}"
    (folder / "shards").mkdir(parents=True)
    files = {}
    for name in ("shards/mp_rank_00_model_states.pt", "shards/zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes(CONTENT)
        files[name] = {"size_bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    content = {"step": step, "samples_consumed": 32 * step, "files": files}
    write_manifest(folder / "manifest.json", FORMAT, VERSION, content)
    return folder


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
    assert (checkpoint.step, checkpoint.samples_consumed) == (100, 3200)
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
