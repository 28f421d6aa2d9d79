"""New masks for old samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.build import WORK, is_made
from data_prep.processes import LocalProcesses
from data_prep.remask import remask
from data_prep.shards import MANIFEST, SPLITS, DataSet, find_faults, read_data_manifest, write_data_manifest


def remasked(source: Path, folder: Path, workers: int = 1, **changes: Any) -> bool:
    with LocalProcesses(workers) as processes:
        return remask(source, folder, {"seed": 7, "mask_sets": 3, **changes}, processes)


def test_the_samples_stay_and_the_masks_are_those_of_a_build_with_that_seed(
    data_folder: Path, chapters: list[Path], tmp_path: Path, build_data: Callable[..., bool]
) -> None:
    assert remasked(data_folder, tmp_path / "new")
    assert list(find_faults(tmp_path / "new")) == []
    old, new = DataSet(data_folder), DataSet(tmp_path / "new")
    assert (new.num_mask_sets, new.parameters["seed"]) == (3, 7)
    for split in SPLITS:
        before, after = (data.read_samples(split, 0, data.num_samples(split), 1) for data in (old, new))
        np.testing.assert_array_equal(before.tokens_BL, after.tokens_BL)
        np.testing.assert_array_equal(before.num_masked_B, after.num_masked_B)
        assert (before.positions_BP != after.positions_BP).any(axis=1).mean() > 0.9


@pytest.mark.slow
def test_the_same_seed_gives_the_same_shards(data_folder: Path, tmp_path: Path) -> None:
    """Masks depend on (seed, sample number, set) alone: drawn again they are the stored ones."""
    assert remasked(data_folder, tmp_path / "new", seed=0, mask_sets=2, workers=2)
    for path in data_folder.glob("*.h5"):
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()


def test_done_once_it_is_not_done_again_and_nothing_else_is_overwritten(data_folder: Path, tmp_path: Path) -> None:
    assert remasked(data_folder, tmp_path / "new")
    assert not remasked(data_folder, tmp_path / "new")
    with pytest.raises(
        ValueError, match="new: holds a data set made from other parameters \(parameters seed was 7, is 8\); remove it"
    ):
        remasked(data_folder, tmp_path / "new", seed=8)
    with pytest.raises(ValueError, match="holds a data set made from other parameters and remasked_from"):
        remasked(data_folder, data_folder)


def test_begun_from_another_data_set_it_is_refused(data_folder: Path, tmp_path: Path) -> None:
    """Shards of both would be in one data set."""
    made_from = {
        "parameters": DataSet(data_folder).parameters | {"seed": 7, "mask_sets": 3},
        "remasked_from": {"sha256": ""},
    }
    assert not is_made(tmp_path / "new", made_from)
    (tmp_path / "new" / WORK / "train-00000.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"new: holds an unfinished data set made from other remasked_from \(remasked_from sha256 was .*\); remove it",
    ):
        remasked(data_folder, tmp_path / "new")


MASKS = {"mask_rate": "0.3:0.15", "block_share": 0.6, "block_lengths": "3:4"}


def test_other_rates_and_blocks_are_those_of_a_build_with_them(
    data_folder: Path, chapters: list[Path], tmp_path: Path, build_data: Callable[..., bool]
) -> None:
    assert remasked(data_folder, tmp_path / "new", **MASKS)
    assert list(find_faults(tmp_path / "new")) == []
    assert build_data(chapters[:9], tmp_path / "built", mask_sets=3, validation_fraction=0.2, seed=0, **MASKS)
    assert remasked(data_folder, tmp_path / "same seed", seed=0, **MASKS)
    for built in (tmp_path / "built").glob("*.h5"):
        assert (tmp_path / "same seed" / built.name).read_bytes() == built.read_bytes()
    built, same = (json.loads((tmp_path / name / MANIFEST).read_bytes()) for name in ("built", "same seed"))
    for key in ("parameters", "masking", "max_masked_tokens", "splits"):
        assert same[key] == built[key]
    assert built["masking"]["mask_rates"] == [0.3, 0.225, 0.15]


def test_what_is_not_given_stays_as_it_is(data_folder: Path, tmp_path: Path) -> None:
    assert remasked(data_folder, tmp_path / "first", **MASKS)
    assert remasked(tmp_path / "first", tmp_path / "second", seed=8, mask_rate=None, block_share=None)
    assert DataSet(tmp_path / "second").parameters == DataSet(tmp_path / "first").parameters | {"seed": 8}
    with pytest.raises(ValueError, match=r"mask_rate is 0\.3:0\.15, which takes at least 2 mask sets: mask_sets is 1"):
        remasked(tmp_path / "first", tmp_path / "third", mask_sets=1)
    assert not (tmp_path / "third").exists()


def test_a_data_set_from_before_there_was_a_choice_is_as_good(
    data_folder: Path, chapters: list[Path], tmp_path: Path, build_data: Callable[..., bool]
) -> None:
    old = Path(shutil.copytree(data_folder, tmp_path / "old"))
    manifest = read_data_manifest(old)
    for name in ("mask_rate", "block_share", "block_lengths"):
        del manifest["parameters"][name]
    write_data_manifest(old, {key: value for key, value in manifest.items() if key not in ("format", "version")})
    assert list(find_faults(old)) == []
    assert not build_data(chapters[:9], old, mask_sets=2, validation_fraction=0.2)
    with pytest.raises(ValueError, match=r"parameters mask_rate was 0\.15, is 0\.2\)"):
        build_data(chapters[:9], old, mask_sets=2, validation_fraction=0.2, mask_rate="0.2")
    assert remasked(old, tmp_path / "new", seed=0, mask_sets=2)
    for path in data_folder.glob("*.h5"):
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()
