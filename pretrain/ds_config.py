"""The DeepSpeed JSON: what it must and may say, checked before anything expensive starts. Does not import DeepSpeed.

It alone decides batch sizes, precision, ZeRO, optimizer, learning-rate schedule, clipping and monitors. DeepSpeed
itself ignores keys it does not know, so a misspelt one would change a run without a word.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data_prep.files import read_json
from pretrain.device import Precision, Speeds

_ADAM_TYPES = ("adam", "adamw")
_HALF_PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")
_BATCH_SIZE_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or not 1 <= value <= 10**9:
        raise ValueError("expected a whole number of at least 1")
    return int(value)  # 5e5 is one, too


def _adam(value: str) -> str:
    if value.lower() not in _ADAM_TYPES:
        raise ValueError("expected Adam or AdamW")
    return value


_Count = Annotated[int, BeforeValidator(_whole_number)]
_Number = Annotated[float, Field(ge=0)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Checked = dict[str, Any]  # an object whose keys DeepSpeed's own schema knows, and checks


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _AdamParams(_Section):
    lr: _Number = 0.0
    betas: Annotated[list[_Fraction], Field(min_length=2, max_length=2)] = []
    eps: _Number = 0.0
    weight_decay: _Number = 0.0
    adam_w_mode: bool = True
    bias_correction: Literal[True] = True


class _Optimizer(_Section):
    type: Annotated[str, AfterValidator(_adam)]
    params: _AdamParams


class _Warmup(_Section):
    warmup_min_lr: _Number = 0.0
    warmup_max_lr: _Number = 0.0
    warmup_num_steps: _Count = 1
    warmup_type: Literal["log", "linear"] = "log"


class _WarmupDecay(_Warmup):
    total_num_steps: _Count


class _WarmupCosine(_Section):
    total_num_steps: _Count
    warmup_min_ratio: _Number = 0.0
    warmup_num_steps: _Count = 1
    cos_min_ratio: _Number = 0.0
    warmup_type: Literal["log", "linear"] = "log"


class _WarmupSchedule(_Section):
    type: Literal["WarmupLR"]
    params: _Warmup


class _WarmupDecaySchedule(_Section):
    type: Literal["WarmupDecayLR"]
    params: _WarmupDecay


class _WarmupCosineSchedule(_Section):
    type: Literal["WarmupCosineLR"]
    params: _WarmupCosine


class _FlopsProfiler(_Section):
    enabled: bool = False
    profile_step: _Count = 1
    module_depth: int = -1
    top_modules: _Count = 1
    detailed: bool = True
    output_file: str | None = None


class _DataTypes(_Section):
    grad_accum_dtype: str | None = None


class _WithoutSchedule(_Section):
    """The file of a program that decides the learning rate by itself."""

    optimizer: _Optimizer
    zero_optimization: _Checked = {}
    fp16: _Checked = {}
    bf16: _Checked = {}
    gradient_clipping: _Number
    train_batch_size: _Count = 1
    train_micro_batch_size_per_gpu: _Count = 1
    gradient_accumulation_steps: _Count = 1
    tensorboard: _Checked = {}
    wandb: _Checked = {}
    csv_monitor: _Checked = {}
    comms_logger: _Checked = {}
    flops_profiler: _FlopsProfiler = _FlopsProfiler()
    data_types: _DataTypes = _DataTypes()
    prescale_gradients: bool = False
    gradient_predivide_factor: _Number = 1.0
    communication_data_type: str | None = None
    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True


class _Recipe(_WithoutSchedule):
    """What the file may say, as far as it is read here."""

    scheduler: Annotated[_WarmupSchedule | _WarmupDecaySchedule | _WarmupCosineSchedule, Field(discriminator="type")]


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


def _faults(values: dict[str, Any], recipe: type[_WithoutSchedule] = _Recipe) -> list[str]:
    """Return what is wrong with the file; steps that it gives as 5e5 become whole numbers."""
    try:
        checked = recipe.model_validate(values)
    except ValidationError as error:
        return [_in_words(fault, recipe) for fault in error.errors()]
    if isinstance(checked, _Recipe):
        given = values["scheduler"]["params"]
        given |= {key: value for key, value in checked.scheduler.params if key in given and key.endswith("_steps")}
    values |= {key: getattr(checked, key) for key in _BATCH_SIZE_KEYS if key in values}
    return [*_batch_faults(values), *_zero_faults(values), *_monitor_faults(values)]


def _in_words(fault: Any, recipe: type[BaseModel]) -> str:
    """Return a fault that pydantic found, with its key."""
    schedules = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    path = [str(part) for part in fault["loc"] if part not in schedules]
    key, found = ".".join(path), fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            known = _keys(recipe, [str(part) for part in fault["loc"][:-1]])
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f" (did you mean {'.'.join([*path[:-1], close[0]])}?)" if close else ""
            return f"unknown key {key}{hint}"
        case "missing" if key == "gradient_clipping":
            return (
                "gradient_clipping is missing, and DeepSpeed would clip at 1.0; state it (the paper's recipe: 0.0, off)"
            )
        case "missing":
            return f"{key} is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            type_found = found.get("type")
            close = difflib.get_close_matches(str(type_found), schedules, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            return f"{key}.type: expected {', '.join(schedules)}, found {type_found!r}{hint}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{key}: expected an object, found {found!r}"
    text = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return f"{key}: {text}, found {found!r}"


def _keys(recipe: type[BaseModel], path: list[str]) -> Iterator[str]:
    """Return the keys of a section."""
    for schedule in (_Warmup, _WarmupDecay, _WarmupCosine):
        if path[:1] == ["scheduler"] and path[1:2] == [f"{schedule.__name__.removeprefix('_')}LR"]:
            return iter(schedule.model_fields if path[2:] else _WarmupSchedule.model_fields)
    section: Any = recipe
    for name in path:
        section = section.model_fields[name].annotation
    return iter(section.model_fields)


def _decide(values: dict[str, Any], decided: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Fill in what the flags decide; returns the faults."""
    faults = []
    if "scheduler" in values:
        faults.append("scheduler: the learning rate is decided by the flags; leave the section out")
    for outer in ("optimizer", "zero_optimization"):
        if not isinstance(values.get(outer, {}), dict):
            return [*faults, f"{outer}: expected an object, found {values[outer]!r}"]
    params = values.get("optimizer", {}).get("params", {})
    if not isinstance(params, dict):
        return [*faults, f"optimizer.params: expected an object, found {params!r}"]
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
    return faults or _faults(values, _WithoutSchedule)


def _batch_faults(values: dict[str, Any]) -> list[str]:
    if values.keys() & set(_BATCH_SIZE_KEYS[:2]):
        return []
    return [f"{' or '.join(_BATCH_SIZE_KEYS[:2])} is missing"]


def _monitor_faults(values: dict[str, Any]) -> list[str]:
    """DeepSpeed would end in a traceback."""
    return [
        f"{name}.enabled: the package {name} is not installed; pip install {name}"
        for name in ("wandb", "tensorboard")
        if values.get(name, {}).get("enabled") and importlib.util.find_spec(name) is None
    ]


def _zero_faults(values: dict[str, Any]) -> list[str]:
    zero, faults = values.get("zero_optimization", {}), []
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3) or isinstance(stage, (bool, float)):
        faults.append(f"zero_optimization.stage: expected 1, 2 or 3, found {stage!r}")
    if zero.get("elastic_checkpoint"):
        faults.append(
            "zero_optimization.elastic_checkpoint: leave it out; a run goes on at any number of ranks without it, and its "
            "files could not be read"
        )
    return faults + _precision_faults(values, stage)


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
