"""Records of a run, on a disk that fills up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.metrics import Metrics, read_records


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's charts end there
def test_what_a_full_disk_does_not_take_is_written_later(small_disk: Path) -> None:
    metrics = Metrics(small_disk, resumed_step=0)
    for step in range(1, 4000):
        if step == 100:
            (small_disk / "other_data").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        if step == 3900:
            assert read_records(small_disk)[-1]["step"] < step - 1
            (small_disk / "other_data").unlink()
        metrics.record("train", step, {"ae_loss": 1 / step})
    metrics.close()
    assert [r["step"] for r in read_records(small_disk)] == list(range(1, 4000))
