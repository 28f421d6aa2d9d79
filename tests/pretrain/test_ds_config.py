"""The DeepSpeed JSON: every fault is found, all in one message."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support import RECIPES, REPOSITORY, deepspeed_json

from pretrain.device import Speeds
from pretrain.ds_config import BatchSizes, DeepSpeedConfig


def schedule(type: Any = "WarmupDecayLR", **changes: Any) -> dict[str, Any]:
    return {"scheduler": {"type": type, "params": {"total_num_steps": 40, **changes}}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_configurations_are_sound(path: Path) -> None:
    config = DeepSpeedConfig(path)
    assert config.total_steps
    assert config.allowed_precisions == (("fp16",) if path.stem == "zero2" else ("fp16", "bf16", "fp32"))
    assert config.values["zero_optimization"]["stage"] == 2


def test_zero2_is_the_papers_recipe() -> None:
    config = DeepSpeedConfig(REPOSITORY / "ds_configs" / "zero2.json")
    assert config.batch_sizes(64) == BatchSizes(7680, 30, 4)
    assert config.values["optimizer"]["params"] == {"lr": 6e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}
    schedule = config.values["scheduler"]["params"]
    assert (schedule["warmup_max_lr"], schedule["warmup_num_steps"], schedule["total_num_steps"]) == (
        6e-4,
        24_000,
        500_000,
    )
    assert schedule["warmup_type"] == "linear"
    assert config.values["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"gradient_cliping": 1.0}, ["unknown key gradient_cliping (did you mean gradient_clipping?)"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, ["unknown key scheduler.params.warmup_steps"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1, "beta": 2}}}, ["unknown key optimizer.params.beta"]),
        ({"optimizer": {"type": "SGD", "params": {"lr": 1}}}, ["optimizer.type: expected Adam or AdamW, found 'SGD'"]),
        ({"optimizer": None, "gradient_clipping": None}, ["optimizer is missing", "gradient_clipping is missing"]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16 and bf16 are both enabled"]),
        ({"fp16": {"enabled": "yes"}}, ["fp16.enabled: expected true, false or \"auto\", found 'yes'"]),
        ({"bf16": {"enabled": 1}}, ["bf16.enabled: expected true, false or \"auto\", found 1"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1, "bias_correction": False}}}, ["optimizer.params.bias_correction"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1, "torch_adam": True}}}, ["unknown key optimizer.params.torch_adam"]),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
         ["zero_optimization.stage 1, bf16 and data_types.grad_accum_dtype fp32 do not go together"]),
        ({"train_batch_size": 0}, ["train_batch_size: expected a whole number of at least 1, found 0"]),
        ({"train_batch_size": "auto"}, ["train_batch_size: expected a whole number of at least 1, found 'auto'"]),
        ({"train_batch_size": None, "train_micro_batch_size_per_gpu": None}, ["train_batch_size or train_micro"]),
        ({"fp16": True}, ["fp16: expected an object, found True"]),
        ({"a": 1, "b": 2}, ["unknown key a", "unknown key b"]),
        (schedule(type="WarmupDecayLr"), ["scheduler.type: expected WarmupLR, ", "found 'WarmupDecayLr' (did you mean WarmupDecayLR?)"]),
        (schedule(type=3), ["scheduler.type: expected WarmupLR, "]),
        ({"scheduler": {"params": {}}}, ["scheduler.type: expected WarmupLR, "]),
        (schedule(total_num_steps="40"), ["scheduler.params.total_num_steps: expected a whole number of at least 1, found '40'"]),
        (schedule(total_num_steps=1.5), ["scheduler.params.total_num_steps: expected a whole number of at least 1, found 1.5"]),
        (schedule(total_num_steps=True), ["scheduler.params.total_num_steps: expected a whole"]),
        (schedule(total_num_steps=math.inf), ["scheduler.params.total_num_steps: expected a whole"]),
        (schedule(warmup_num_steps=0, warmup_max_lr="1e-3"), ["warmup_num_steps: expected a whole", "warmup_max_lr: expected a valid number"]),
        (schedule(warmup_max_lr=math.nan), ["scheduler.params.warmup_max_lr: expected a finite number, found nan"]),
        (schedule(warmup_type="square"), ["scheduler.params.warmup_type: expected 'log' or 'linear', found 'square'"]),
        (schedule(type="WarmupLR"), ["unknown key scheduler.params.total_num_steps"]),
        (schedule(total_steps=3), ["unknown key scheduler.params.total_steps (did you mean scheduler.params.total_num_steps?)"]),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {}}}, ["scheduler.params.total_num_steps is missing"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": "6e-4", "betas": [0.9]}}}, ["optimizer.params.lr: ", "optimizer.params.betas: "]),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, ["zero_optimization.elastic_checkpoint: leave it out"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage: expected 1, 2 or 3, found True"]),
        ({"gradient_clipping": "off"}, ["gradient_clipping: expected a valid number, found 'off'"]),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, changes: dict[str, Any], faults: list[str]) -> None:
    path = deepspeed_json(tmp_path / "ds.json", **changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        DeepSpeedConfig(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    for fault in faults:
        assert fault in str(error.value)


@pytest.mark.parametrize(
    "section",
    ["scheduler", "optimizer", "fp16", "bf16", "zero_optimization", "data_types", "tensorboard", "flops_profiler"],
)
@pytest.mark.parametrize("value", ["null", "3", "[]", '"auto"'])
def test_a_section_that_is_no_object_is_refused(tmp_path: Path, section: str, value: str) -> None:
    values = json.loads(deepspeed_json(tmp_path / "ds.json").read_text()) | {section: json.loads(value)}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{section}: expected an object"):
        DeepSpeedConfig(tmp_path / "ds.json")


def test_a_number_of_steps_may_be_written_as_5e5(tmp_path: Path) -> None:
    path = deepspeed_json(tmp_path / "ds.json", **schedule(total_num_steps=5e5, warmup_num_steps=2.4e4))
    config = DeepSpeedConfig(path)
    assert (config.total_steps, type(config.total_steps)) == (500_000, int)
    assert type(config.values["scheduler"]["params"]["warmup_num_steps"]) is int


def test_what_is_not_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n "a": 1,\n}')
    with pytest.raises(ValueError, match=r"ds.json: line 3: not valid JSON"):
        DeepSpeedConfig(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        DeepSpeedConfig(path)
    with pytest.raises(FileNotFoundError):
        DeepSpeedConfig(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [
        ((32, 16, None), 2, (32, 16, 1)),
        ((32, 4, None), 2, (32, 4, 4)),
        ((32, None, 4), 2, (32, 4, 4)),
        ((32, None, None), 4, (32, 8, 1)),
        ((None, 8, None), 3, (24, 8, 1)),
        ((None, 8, 2), 3, (48, 8, 2)),
    ],
)
def test_batch_arithmetic(
    tmp_path: Path, sizes: tuple[int | None, ...], world_size: int, expected: tuple[int, int, int]
) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    path = deepspeed_json(tmp_path / "ds.json", **dict(zip(keys, sizes, strict=True)))
    assert DeepSpeedConfig(path).batch_sizes(world_size) == BatchSizes(*expected)


@pytest.mark.parametrize("world_size", [3, 5, 64])
def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path: Path, world_size: int) -> None:
    config = DeepSpeedConfig(deepspeed_json(tmp_path / "ds.json"))
    with pytest.raises(ValueError, match=rf"train_batch_size 32 is not .* x {world_size} ranks"):
        config.batch_sizes(world_size)


def test_the_precision_can_be_left_to_the_device(tmp_path: Path) -> None:
    auto = {"enabled": "auto"}
    for changes, allowed in [
        ({"fp16": auto, "bf16": auto}, ("fp16", "bf16", "fp32")),
        ({"bf16": auto}, ("bf16", "fp32")),
        ({"fp16": auto, "bf16": {"enabled": True}}, ("bf16",)),
        ({"fp16": {"enabled": True}, "bf16": auto}, ("fp16",)),
        ({"fp16": None}, ("fp32",)),
    ]:
        config = DeepSpeedConfig(deepspeed_json(tmp_path / "ds.json", **changes))
        assert config.allowed_precisions == allowed
        for precision in allowed:
            decided = config.with_precision(precision)
            assert decided.precision == precision
            assert all(decided.values[name]["enabled"] == (name == precision) for name in changes if changes[name])
        if len(allowed) > 1:
            with pytest.raises(ValueError, match="left to the device"):
                print(config.precision)


def test_a_precision_that_the_device_lacks_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    old = Speeds(("fp32",), "an old CPU")
    demanding = DeepSpeedConfig(deepspeed_json(tmp_path / "ds.json", fp16={"enabled": True}))
    fault = demanding.precision_fault(old)
    assert fault == (
        f"{tmp_path / 'ds.json'}: fp16.enabled: fp16 has no fast arithmetic on this device (an old CPU); it has fp32: "
        'choose one of them, or "auto" for the fastest'
    )
    assert demanding.precision_fault(Speeds(("bf16", "fp16", "fp32"), "a new CPU")) is None
    assert DeepSpeedConfig(deepspeed_json(tmp_path / "ds.json")).precision_fault(old) is None
