"""The DeepSpeed JSON: what it must and may say, checked before anything expensive starts. Does not import DeepSpeed.

It alone decides batch sizes, precision, ZeRO, optimizer, learning-rate schedule, clipping and monitors. DeepSpeed
itself ignores keys it does not know, so a misspelt one would change a run without a word.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import read_json
from pretrain.device import Precision, Speeds

_ADAM_TYPES = ("adam", "adamw")
_HALF_PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")
_BATCH_SIZE_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_ANY: frozenset[str] | None = None  # DeepSpeed's own schema of the section refuses unknown keys

_SECTIONS: dict[str, frozenset[str] | None] = {
    "optimizer": frozenset({"type", "params"}),
    "optimizer.params": frozenset(
        {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "bias_correction"}
    ),
    "scheduler": frozenset({"type", "params"}),
    "scheduler.params": frozenset({
        "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps", "warmup_min_ratio",
        "cos_min_ratio",
    }),
    "zero_optimization": _ANY, "fp16": _ANY, "bf16": _ANY, "tensorboard": _ANY, "wandb": _ANY, "csv_monitor": _ANY,
    "comms_logger": _ANY,
    "flops_profiler": frozenset({"enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"}),
    "data_types": frozenset({"grad_accum_dtype"}),
}  # fmt: skip
_NUMBERS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "prescale_gradients", "gradient_predivide_factor", "communication_data_type", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
})  # fmt: skip
_TOP_LEVEL = _NUMBERS | {name for name in _SECTIONS if "." not in name}


@dataclass(frozen=True)
class BatchSizes:
    """train_batch = micro_batch x accumulation_steps x ranks."""

    train_batch: int
    micro_batch: int
    accumulation_steps: int


class DeepSpeedConfig:
    """A checked DeepSpeed JSON."""

    def __init__(self, path: Path, decided: Mapping[str, tuple[Any, str]] | None = None) -> None:
        """`decided`: of a program whose flags decide in the file's place, each key (`optimizer.params.lr`) with its value and
        flag; in the file it may be missing, "auto" or equal, and there is no scheduler. train_batch_size is then
        what the other two sizes make it.

        Raises FileNotFoundError, or ValueError that lists every fault of the file.
        """
        if not path.is_file():
            raise FileNotFoundError(
                2, "no such DeepSpeed configuration (this program's folder ds_configs has some)", str(path)
            )
        self.path = path
        self.values: dict[str, Any] = read_json(path)
        if not isinstance(self.values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(self.values).__name__}")
        faults = _faults(self.values) if decided is None else _decide(self.values, decided)
        if faults:
            raise ValueError(f"{path}: {'; '.join(faults)}")

    @property
    def total_steps(self) -> int | None:
        """Steps of the learning-rate schedule, where it has an end."""
        steps: int | None = self.values["scheduler"]["params"].get("total_num_steps")
        return steps

    @property
    def allowed_precisions(self) -> tuple[Precision, ...]:
        """The precisions that the file leaves to the device by `"enabled": "auto"`, else the one that it names."""
        enabled = {name: self.values.get(name, {}).get("enabled", False) for name in _HALF_PRECISIONS}
        for name, is_enabled in enabled.items():
            if is_enabled is True:
                return (name,)
        return (*(name for name, is_enabled in enabled.items() if is_enabled == "auto"), "fp32")

    @property
    def precision(self) -> Precision:
        """fp16, bf16 or fp32. Raises ValueError if it is still left to the device, see `with_precision`."""
        if len(self.allowed_precisions) > 1:
            raise ValueError(f"{self.path}: the precision is left to the device")
        return self.allowed_precisions[0]

    def with_precision(self, precision: Precision) -> DeepSpeedConfig:
        """Return a copy that enables this one of `allowed_precisions` and no other."""
        assert precision in self.allowed_precisions
        decided = copy.copy(self)
        decided.values = dict(self.values)
        for name in _HALF_PRECISIONS:
            if name in self.values:
                decided.values[name] = {**self.values[name], "enabled": name == precision}
        return decided

    def precision_fault(self, speeds: Speeds) -> str | None:
        """Return why a device cannot train in the precision that the file names, with the ways out, or None."""
        allowed = self.allowed_precisions
        fault = speeds.missing(allowed[0]) if len(allowed) == 1 else None
        return f"{self.path}: {allowed[0]}.enabled: {fault}" if fault else None

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state is kept in the host's memory, which takes DeepSpeed's own optimizer."""
        offload = self.values["zero_optimization"].get("offload_optimizer") or {}
        return bool(offload.get("device", "none") != "none")

    def batch_sizes(self, world_size: int) -> BatchSizes:
        """The three sizes from the one to three that are given. Raises ValueError where they do not fit the ranks.

        A micro batch given with the whole batch alone is the largest that is wanted: where it does not divide a rank's
        share, the next smaller one that does is taken, so that a run goes on at another number of ranks.
        """
        train, micro, accumulation = (self.values.get(key, 0) for key in _BATCH_SIZE_KEYS)
        if train and micro and not accumulation and train % world_size == 0:
            share = train // world_size
            micro = next(size for size in range(min(micro, share), 0, -1) if share % size == 0)
        train = train or micro * (accumulation or 1) * world_size
        micro = micro or train // ((accumulation or 1) * world_size)
        accumulation = accumulation or train // (max(1, micro) * world_size)
        if micro * accumulation * world_size != train:
            raise ValueError(
                f"{self.path}: train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {accumulation} x {world_size} ranks; change one of them or the number of ranks"
            )
        return BatchSizes(train, micro, accumulation)


def _faults(values: dict[str, Any]) -> list[str]:
    faults = _unknown_keys("", values, _TOP_LEVEL)
    for section, known in _SECTIONS.items():
        content = _section(values, section)
        if content is None:
            continue
        if not isinstance(content, dict):
            faults.append(f"{section}: expected an object, found {content!r}")
        elif known is not None:
            faults += _unknown_keys(f"{section}.", content, known)
    return faults or [*_batch_faults(values), *_recipe_faults(values), *_monitor_faults(values)]


def _decide(values: dict[str, Any], decided: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Fill in what the flags decide; returns the faults."""
    faults = []
    if "scheduler" in values:
        faults.append("scheduler: the learning rate is decided by the flags; leave the section out")
    params = values.get("optimizer", {}).get("params", {})
    for name in sorted(params.keys() - {key.rpartition(".")[2] for key in decided}):
        faults.append(f"optimizer.params.{name}: decided by the program; leave it out")
    for key, (value, flag) in decided.items():
        *sections, name = key.split(".")
        section = values
        for outer in sections:
            section = section.setdefault(outer, {})
            if not isinstance(section, dict):
                return [*faults, f"{outer}: expected an object, found {section!r}"]
        found = section.get(name, "auto")
        if found not in ("auto", value):
            faults.append(f"{key} is {found!r}, and {flag} makes it {value!r}; make them equal, or leave the key out")
        section[name] = value
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        faults.append(f"zero_optimization.stage: expected 1 or 2, found {stage!r}")
    del values["train_batch_size"]
    return faults or _faults(values | {"scheduler": {"type": "", "params": {}}})


def _section(values: dict[str, Any], name: str) -> Any:
    outer, _, inner = name.partition(".")
    section = values.get(outer)
    return section.get(inner) if inner and isinstance(section, dict) else None if inner else section


def _unknown_keys(prefix: str, content: dict[str, Any], known: frozenset[str]) -> list[str]:
    faults = []
    for key in sorted(content.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        faults.append(f"unknown key {prefix}{key}" + (f" (did you mean {prefix}{close[0]}?)" if close else ""))
    return faults


def _batch_faults(values: dict[str, Any]) -> list[str]:
    faults = [
        f"{key}: expected a whole number of at least 1, found {values[key]!r}"
        for key in _BATCH_SIZE_KEYS
        if key in values and not (type(values[key]) is int and values[key] > 0)
    ]
    if not values.keys() & set(_BATCH_SIZE_KEYS[:2]):
        faults.append(f"{' or '.join(_BATCH_SIZE_KEYS[:2])} is missing")
    return faults


def _monitor_faults(values: dict[str, Any]) -> list[str]:
    """DeepSpeed would end in a traceback."""
    return [
        f"{name}.enabled: the package {name} is not installed; pip install {name}"
        for name in ("wandb", "tensorboard")
        if values.get(name, {}).get("enabled") and importlib.util.find_spec(name) is None
    ]


def _recipe_faults(values: dict[str, Any]) -> list[str]:
    faults = []
    for section in ("optimizer", "scheduler"):
        content = values.get(section, {})
        if "type" not in content or not isinstance(content.get("params"), dict):
            faults.append(f"{section}: expected an object with type and params")
    if not faults and str(values["optimizer"]["type"]).lower() not in _ADAM_TYPES:
        faults.append(f"optimizer.type: expected Adam or AdamW, found {values['optimizer']['type']!r}")
    elif not faults and values["optimizer"]["params"].get("bias_correction", True) is not True:
        faults.append("optimizer.params.bias_correction: expected true or no such key; Adam is made with it only")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        faults.append(f"zero_optimization.stage: expected 1, 2 or 3, found {stage!r}")
    faults += _precision_faults(values, stage)
    if "gradient_clipping" not in values:
        faults.append(
            "gradient_clipping is missing, and DeepSpeed would clip at 1.0; state it (the paper's recipe: 0.0, off)"
        )
    return faults


def _precision_faults(values: dict[str, Any], stage: Any) -> list[str]:
    enabled = {name: values.get(name, {}).get("enabled", False) for name in _HALF_PRECISIONS}
    faults = [
        f'{name}.enabled: expected true, false or "auto", found {found!r}'
        for name, found in enabled.items()
        if found not in (True, False, "auto") or (isinstance(found, (int, float)) and not isinstance(found, bool))
    ]
    if all(found is True for found in enabled.values()):
        faults.append("fp16 and bf16 are both enabled; choose one")
    accumulation = values.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and enabled["bf16"] in (True, "auto") and accumulation == "fp32":
        faults.append(
            "zero_optimization.stage 1, bf16 and data_types.grad_accum_dtype fp32 do not go together: DeepSpeed would use "
            "another optimizer, whose checkpoints this program does not read; take stage 2, or leave grad_accum_dtype out"
        )
    return faults
