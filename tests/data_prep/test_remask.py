"""New masks for old samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import WORK, is_made
from data_prep.processes import LocalProcesses
from data_prep.remask import remask
from data_prep.shards import SPLITS, DataSet, find_faults


def remasked(source: Path, folder: Path, workers: int = 1, seed: int = 7, mask_sets: int = 3) -> bool:
    with LocalProcesses(workers) as processes:
        return remask(source, folder, seed, mask_sets, processes)


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
    with pytest.raises(ValueError, match="new: holds a data set made from other parameters; remove it"):
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
    with pytest.raises(ValueError, match="new: holds an unfinished data set made from other remasked_from; remove it"):
        remasked(data_folder, tmp_path / "new")
