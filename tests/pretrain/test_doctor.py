"""What the doctor says of a run's samples; tests/end_to_end/test_doctor.py has the rest."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import pytest
from support import deepspeed_json

from data_prep.processes import LocalProcesses
from data_prep.remask import remask
from data_prep.shards import DataSet
from pretrain.config import check_inputs, make_parser
from pretrain.doctor import _of_run


@pytest.fixture(scope="module")
def falling(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falling")
    with LocalProcesses(1) as processes:
        remask(data_folder, folder, {"mask_sets": 4, "mask_rate": "0.30:0.15"}, processes)
    return folder


@pytest.mark.parametrize(
    ("num_epochs", "told"),
    [
        (1, "the mask rate ends at 0.3, not 0.15: 1 epochs do not use all 4 mask sets"),
        (3, "ends at 0.2, not 0.15: 3 epochs do not use all 4 mask sets; `python -m data_prep remask --mask_sets 3`"),
        (4, ""),
        (6, "masks repeat: there are 4 mask sets"),
    ],
)
def test_a_run_too_short_for_the_mask_rate_to_fall_to_its_end_is_told(
    falling: Path, tmp_path: Path, num_epochs: int, told: str
) -> None:
    num_samples = DataSet(falling).num_samples("train")
    steps = ceil(num_epochs * num_samples / 8) - 1
    schedule = {"warmup_max_lr": 1e-2, "warmup_num_steps": 1, "warmup_type": "linear", "total_num_steps": steps}
    config = deepspeed_json(
        tmp_path / "ds.json", train_batch_size=8, scheduler={"type": "WarmupDecayLR", "params": schedule}
    )
    words = ["--deepspeed_config", config, "--data", falling, "--run", tmp_path, "--model", "tiny"]
    args = make_parser("run", "").parse_args([str(word) for word in words])
    check = next(check for check in _of_run(check_inputs(args, 2, device=None), args) if check.name == "samples")
    assert check.status == ("warning" if told else "ok")
    assert told in check.remedy
