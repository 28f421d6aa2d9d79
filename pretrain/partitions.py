"""The optimizer's partitions in a checkpoint, read by the names of the weights, whatever the number of ranks that wrote them.

Each rank of ZeRO saves its part of the fp32 weights and of Adam's moments, flattened. In stages 1 and 2 a group's
weights stand one behind the other and the ranks cut that row into equal parts; in stage 3 the ranks cut each weight:

    stage 1, 2    rank 0 [ a a a a b b ]   rank 1 [ b b b c c c ]
    stage 3       rank 0 [ a a b b b c ]   rank 1 [ a a b b . c c ]    (. = padding; parts of a weight are equal)

Files are memory-mapped, so only what is asked for is read. Nothing is loaded by plain pickle: DeepSpeed's own classes
among the values are replaced by `_Values`, and any other class is refused.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch

WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Values:
    """Stands in for an object of DeepSpeed's: its attributes, without its code."""


_STAND_INS = [
    (_Values, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Values, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Values, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


class Partitions:
    """A checkpoint of ZeRO stage 1, 2 or 3."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, or ValueError where a file is missing or is not what DeepSpeed writes."""
        states = [_load(path)["optimizer_state_dict"] for path in _in_order_of_ranks(folder, "*_optim_states.pt")]
        self.model_states = _load(_in_order_of_ranks(folder, "*_model_states.pt")[0])
        """DeepSpeed's file about the rest of the run: steps, schedule, shapes."""
        self.stage: int = states[0]["zero_stage"]
        self.loss_scaler: dict[str, Any] = vars(states[0]["loss_scaler"])
        count = states[0]["partition_count"]
        self.world_size = max(count) if isinstance(count, list) else count
        if self.world_size != len(states):
            raise ValueError(f"{folder}: was written by {self.world_size} ranks and holds the states of {len(states)}")
        is_cut_by_weight = self.stage == 3
        weights = [s["fp32_flat_groups" if is_cut_by_weight else "single_partition_of_fp32_groups"] for s in states]
        adam = [s["optimizer_state_dict" if is_cut_by_weight else "base_optimizer_state"]["state"] for s in states]
        self._rows: dict[str, list[list[torch.Tensor]]] = {WEIGHT: weights}
        """By kind: a row of tensors of each rank."""
        self.num_updates = 0
        """Steps that Adam had made."""
        if adam[0]:
            in_order = [[state for _, state in sorted(a.items())] for a in adam]
            for kind in MOMENTS:
                self._rows[kind] = [[state[kind] for state in rank] for rank in in_order]
            self.num_updates = int(in_order[0][0]["step"])  # a number of DeepSpeed's Adam, a tensor of torch's
        self.aliases: dict[str, str] = dict(self.model_states["shared_params"])
        """Names of weights that are others' too."""
        self.shapes: dict[str, torch.Size] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._place_weights(states[0].get("param_alignment_paddings"))

    def _place_weights(self, paddings: list[list[int]] | None) -> None:
        """A weight's group, and its place in the group's row (stage 3: in each rank's row of all groups)."""
        place = 0
        for group, shapes in enumerate(self.model_states["param_shapes"]):
            place = place if self.stage == 3 else 0
            for index, (name, shape) in enumerate(shapes.items()):
                self.shapes[name] = torch.Size(shape)
                self._places[name] = (group, place)
                place += self._part(name) if self.stage == 3 else math.prod(shape)
                place += paddings[group][index] if paddings and self.stage != 3 else 0

    def _part(self, name: str) -> int:
        """Elements of a weight on each rank in stage 3."""
        part: int = math.ceil(self.shapes[name].numel() / self.world_size)
        return part

    @property
    def has_moments(self) -> bool:
        """Whether Adam had made a step."""
        return MOMENTS[0] in self._rows

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements start .. stop - 1 of the flattened weight, or of a moment of it, in fp32."""
        rows, (group, place) = self._rows[kind], self._places[name]
        if self.stage != 3:
            return _elements([rank[group] for rank in rows], place + start, place + stop)
        part, found = self._part(name), []
        for rank in range(start // part, -(-stop // part)):
            first, last = max(start - rank * part, 0), min(stop - rank * part, part)
            found.append(_elements(rows[rank], place + first, place + last))
        return torch.cat(found) if found else torch.zeros(0)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights in fp32, by name."""
        whole = {name: self.read(name, WEIGHT, 0, math.prod(s)).view(s) for name, s in self.shapes.items()}
        return whole | {alias: whole[name] for alias, name in self.aliases.items()}


def _elements(row: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Elements start .. stop - 1 of tensors laid one behind the other."""
    found, place = [], 0
    for tensor in row:
        first, last = max(start - place, 0), min(stop - place, tensor.numel())
        if first < last:
            found.append(tensor[first:last])
        place += tensor.numel()
    elements = torch.cat(found) if found else torch.zeros(0)
    assert len(elements) == stop - start
    return elements


def _in_order_of_ranks(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    if not files:
        raise ValueError(f"{folder}: has no {pattern}")
    return files


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
        try:
            values: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"{path}: is not a file of ZeRO's ({str(error).splitlines()[0]})") from None
    return values
