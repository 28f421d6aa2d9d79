"""Records of a run, on a disk that fills up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.metrics import METRICS, Metrics, read_records


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


@pytest.mark.parametrize(
    "damage", [b'{"kind": "tra\x00', b"\xff\xfe", b"", b"7", b'{"kind": "train", "stfp": 2, "time": 1}', b"\x0c"]
)
def test_a_damaged_line_is_skipped_named_and_kept(tmp_path: Path, damage: bytes) -> None:
    metrics = Metrics(tmp_path, resumed_step=0)
    assert metrics.damage is None
    for step in (1, 2, 3):
        metrics.record("train", step, {"ae_loss": 1 / step})
    metrics.close()
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(b"".join([lines[0], damage + b"\n", *lines[1:]]))
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]
    resumed = Metrics(tmp_path, resumed_step=2)
    assert resumed.damage == f"{tmp_path / METRICS}: 1 damaged line is skipped: 2"
    resumed.record("train", 3, {})
    resumed.close()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / METRICS).read_bytes().splitlines(keepends=True)[1] == damage + b"\n"
