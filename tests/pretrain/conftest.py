"""What the tests of pre-training share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_prep.shards import DataSet

torch.set_num_threads(1)


@pytest.fixture
def data_set(data_folder: Path) -> DataSet:
    """The small real data set, opened."""
    return DataSet(data_folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB (needs root, as in CI)."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
