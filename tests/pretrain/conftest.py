"""What the tests of pre-training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.shards import DataSet

torch.set_num_threads(1)


@pytest.fixture
def data_set(data_folder: Path) -> DataSet:
    """The small real data set, opened."""
    return DataSet(data_folder)
