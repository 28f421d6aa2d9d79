"""Partitions are read back as they were cut, and nothing but what ZeRO writes is loaded.

`tests/end_to_end/test_elastic.py` reads what DeepSpeed itself has written.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from pretrain.partitions import MOMENTS, WEIGHT, Partitions

GROUPS = [{"a": (3, 5), "b": (4,)}, {"c": (7, 2, 1), "d": (1,)}]


def write(folder: Path, stage: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint as the docstring of `pretrain.partitions` draws it; returns what is in it, by kind and name."""
    folder.mkdir()
    torch.manual_seed(0)
    values = {k: {n: torch.randn(s) for g in GROUPS for n, s in g.items()} for k in (WEIGHT, *MOMENTS)}
    rows = {kind: [_cut([whole[name].flatten() for name in group], stage, world_size) for group in GROUPS]
            for kind, whole in values.items()}  # fmt: skip
    for rank in range(world_size):
        state = {
            group: {kind: rows[kind][group][rank] for kind in MOMENTS}
            | {"step": 3 if world_size == 2 else torch.tensor(3.0)}
            for group in range(len(GROUPS))  # DeepSpeed's Adam counts in a number, torch's in a tensor
        }
        weights = [row[rank] for row in rows[WEIGHT]]
        names = ("fp32_flat_groups", "optimizer_state_dict")
        names = names if stage == 3 else ("single_partition_of_fp32_groups", "base_optimizer_state")
        torch.save({"optimizer_state_dict": {
            "zero_stage": ZeroStageEnum(stage), "loss_scaler": LossScaler(8), "partition_count": world_size,
            names[0]: weights, names[1]: {"state": state},
        }}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # fmt: skip
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in GROUPS]
    torch.save({"param_shapes": shapes, "shared_params": {"tied": "b"}}, folder / "mp_rank_00_model_states.pt")
    return values


def _cut(weights: list[torch.Tensor], stage: int, world_size: int) -> list[torch.Tensor]:
    """A group's row of each rank."""
    pieces = weights if stage == 3 else [torch.cat(weights)]
    parts: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    for piece in pieces:
        size = -(-len(piece) // world_size)
        padded = torch.nn.functional.pad(piece, (0, size * world_size - len(piece)), value=9.0)
        for rank in range(world_size):
            parts[rank].append(padded[rank * size : (rank + 1) * size])
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
def test_every_stretch_of_every_weight_is_read_back(tmp_path: Path, stage: int, world_size: int) -> None:
    expected = write(tmp_path / "shards", stage, world_size)
    saved = Partitions(tmp_path / "shards")
    assert (saved.stage, saved.world_size, saved.num_updates) == (stage, world_size, 3)
    assert saved.loss_scaler["cur_scale"] == 8
    for kind, weights in expected.items():
        for name, weight in weights.items():
            for start in range(weight.numel() + 1):
                for stop in range(start, weight.numel() + 1):
                    assert torch.equal(saved.read(name, kind, start, stop), weight.flatten()[start:stop])
    weights = saved.weights()
    assert torch.equal(weights.pop("tied"), expected[WEIGHT]["b"])
    assert all(torch.equal(weights[name], weight) for name, weight in expected[WEIGHT].items())


@pytest.mark.parametrize("foreign", [datetime.timedelta(1), print])
def test_what_zero_does_not_write_is_not_loaded(tmp_path: Path, foreign: Any) -> None:
    write(tmp_path / "shards", 2, 2)
    victim = tmp_path / "shards" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": foreign}, victim)
    with pytest.raises(ValueError, match=rf"{victim.name}: is not a file of ZeRO's"):
        Partitions(tmp_path / "shards")
    victim.unlink()
    with pytest.raises(ValueError, match="was written by 2 ranks and holds the states of 1"):
        Partitions(tmp_path / "shards")
