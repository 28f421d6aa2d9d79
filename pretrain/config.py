"""A run's settings, from the command line, and everything they name, checked together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from data_prep.console import ArgumentParser, add_flags, describe_error, flag_values
from data_prep.shards import DataSet
from pretrain.attention import AttentionBackend
from pretrain.cloze import ClozePrompts, read_prompts
from pretrain.compiler import compiler_fault
from pretrain.device import Speeds
from pretrain.ds_config import BatchSizes, DeepSpeedConfig
from pretrain.layout import Objective
from pretrain.model import ModelSize, PMLMConfig

_GREATEST = 10**9  # of steps, samples, hours and all else that is counted
_GREATEST_SEED = 2**63 - 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class RunConfig:
    """What the DeepSpeed JSON does not say."""

    deepspeed_config: Path
    """DeepSpeed JSON: batch sizes, precision, ZeRO, optimizer, learning-rate schedule, clipping, monitors."""
    data: Path = Path("data/pretrain")
    """Folder of the data set made by `python -m data_prep build`."""
    run: Path = Path("runs/pretrain")
    """Folder of the run: checkpoints, metrics and logs; a run found there is resumed."""
    model: ModelSize = "base"
    """Size of the model; the numbers below replace single ones of its."""
    objective: Objective = Objective.AE_PAR
    """What is trained: autoencoding, (partially) autoregressive prediction, or both."""
    attention: AttentionBackend = "auto"
    """How attention is computed, with the same result: auto is cpu on a CPU; on CUDA flex where --dropout is 0 (it cannot
    drop attention probabilities), else reference."""
    activation_checkpointing: bool = False
    """Keep each layer's input alone and compute the rest again in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the layers with torch.compile: minutes at the start; batches are filled up to one shape."""
    max_steps: int | None = None
    """Stop after this optimizer step, counted from the run's start; by default the schedule's total_num_steps."""
    seed: int = 0
    """Of initial weights, sample order and dropout."""
    log_every_steps: int = 10
    """Steps between records in RUN/metrics.jsonl and TensorBoard; also of the first and the last step."""
    validate_every_steps: int = 1000
    """Steps between validations; also at the start and the end; 0 = never."""
    validation_samples: int = 2048
    """Held-out samples used in a validation, at most."""
    cloze_prompts: Path | None = None
    """Texts that are filled in at every validation, one a line with [MASK] in it, for RUN/metrics.jsonl, TensorBoard and the
    report; by default pretrain/cloze_prompts.txt, in English; an empty file for none."""
    save_every_steps: int = 1000
    """Steps between checkpoints; also at the end."""
    keep_last: int = 3
    """Newest checkpoints kept."""
    keep_every_steps: int = 0
    """Checkpoints of steps divisible by this are kept for good; 0 = none."""
    spike_deviations: float = 10.0
    """Go back to the last checkpoint, and on behind the samples seen since, when a step's loss or gradient norm is so many
    deviations above the recent median, in logarithms; 0 = only when not finite, or when fp16's loss scale is spent."""
    spike_window_steps: int = 100
    """Steps that --spike_deviations judges by."""
    max_rewinds: int = 5
    """Windows of samples that may be skipped in the whole run; one more fault ends it."""
    max_hours: float = 0.0
    """Save and end after this time from the process's start, to be started again; leave time for a step and a save; 0 = no
    limit."""
    watchdog_minutes: float = 30.0
    """End, for a new start, when there is no progress for so long, or of a process no sign of life; 0 = never."""

    def __post_init__(self) -> None:
        at_least = {
            "max_steps": 1, "seed": 0, "log_every_steps": 1, "validate_every_steps": 0, "validation_samples": 1,
            "save_every_steps": 1, "keep_last": 1, "keep_every_steps": 0, "max_hours": 0, "spike_deviations": 0,
            "spike_window_steps": 2, "max_rewinds": 0, "watchdog_minutes": 0,
        }  # fmt: skip
        faults = [
            f"{name} is {value}, expected at least {least} and at most {greatest}"
            for name, least in at_least.items()
            for greatest in [_GREATEST_SEED if name == "seed" else _GREATEST]
            if (value := getattr(self, name)) is not None and not least <= value <= greatest  # nan is not, either
        ]
        if faults:
            raise ValueError("; ".join(faults))


MODEL_NUMBERS = tuple(field.name for field in fields(PMLMConfig) if field.name != "vocab_size")
"""What the command line may replace of a model's size."""


@dataclass(frozen=True)
class Inputs:
    """What a run is made of, found sound and fitting together."""

    config: RunConfig
    deepspeed: DeepSpeedConfig
    batch_sizes: BatchSizes
    data: DataSet
    model: PMLMConfig
    total_steps: int
    cloze: ClozePrompts | None

    @property
    def schedule_samples(self) -> int:
        """Samples of the learning-rate schedule, or of the run where the schedule has no end."""
        return (self.deepspeed.total_steps or self.total_steps) * self.batch_sizes.train_batch


def make_parser(prog: str, description: str) -> ArgumentParser:
    """The command line of run_pretrain.py."""
    parser = ArgumentParser(prog=prog, description=description)
    add_flags(parser.add_argument_group("run"), RunConfig)
    numbers = parser.add_argument_group("model", "single numbers of the model, in place of those of its --model size")
    add_flags(numbers, PMLMConfig, only=MODEL_NUMBERS, optional=True)
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher, not used")
    parser.add_argument(
        "--check_for_ranks",
        type=int,
        metavar="N",
        help="only check the flags and the DeepSpeed JSON for N ranks on this machine, before there are data, and end",
    )
    parser.add_argument(
        "--check_for_tokens",
        type=int,
        default=0,
        metavar="N",
        help="with --check_for_ranks: samples will have up to N tokens",
    )
    return parser


def model_of(args: Any, vocab_size: int) -> PMLMConfig:
    """The model of --model and of the numbers that replace some of its size's. Raises ValueError that lists what is wrong."""
    numbers = {name: value for name, value in flag_values(args, MODEL_NUMBERS).items() if value is not None}
    return PMLMConfig.of_size(args.model, vocab_size=vocab_size, **numbers)


def model_faults(
    model: PMLMConfig, attention: AttentionBackend, data: Path | None, max_length_tokens: int
) -> list[str]:
    """What of a model cannot be trained so, or not on such samples."""
    faults = []
    if model.max_positions < max_length_tokens:
        faults.append(
            f"{data or '--max_length_tokens'}: samples have up to {max_length_tokens} tokens and the model "
            f"{model.max_positions} positions; pass --max_positions {max_length_tokens}"
        )
    if attention == "flex" and model.dropout:
        faults.append(
            f"--attention flex cannot drop attention probabilities, and dropout is {model.dropout}; "
            "pass --dropout 0 or another --attention"
        )
    return faults


def check_inputs(args: Any, world_size: int, device: Speeds | None) -> Inputs:
    """Return everything that a run needs. Raises ValueError that lists all that is wrong.

    `device`: the precisions that the run's device has, or None if the run will not be on this host.
    """
    checks = _Checks(args, world_size, device)
    data = checks.attempt(lambda: DataSet(args.data))
    vocab_size = data.tokenizer.vocab_size if data else 1
    model = checks.attempt(lambda: model_of(args, vocab_size))
    if model:
        checks.faults += model_faults(model, args.attention, args.data, data.max_length_tokens if data else 0)
    config, cloze = checks.config, None
    if config and data and model and config.objective.has_ae:
        cloze = checks.attempt(lambda: read_prompts(config.cloze_prompts, data.tokenizer, model.max_positions))
    if checks.faults or not (data and model and checks.sizes and checks.total_steps):
        raise ValueError("; ".join(checks.faults))
    return Inputs(config, checks.deepspeed, checks.sizes, data, model, checks.total_steps, cloze)


def check_flags(args: Any, world_size: int, device: Speeds | None) -> None:
    """Check what can be checked before there is a data set. Raises ValueError that lists all that is wrong."""
    if world_size < 1:
        raise ValueError(f"--check_for_ranks is {world_size}, expected at least 1")
    checks = _Checks(args, world_size, device)
    if model := checks.attempt(lambda: model_of(args, vocab_size=1)):
        checks.faults += model_faults(model, args.attention, None, args.check_for_tokens)
    if checks.faults:
        raise ValueError("; ".join(checks.faults))


class _Checks:
    """The settings that need no data, and the faults found so far."""

    def __init__(self, args: Any, world_size: int, device: Speeds | None) -> None:
        self.faults: list[str] = []
        self.config: Any = self.attempt(
            lambda: RunConfig(**flag_values(args, [field.name for field in fields(RunConfig)]))
        )
        self.deepspeed: Any = self.attempt(lambda: DeepSpeedConfig(args.deepspeed_config))
        self.sizes = self.attempt(lambda: self.deepspeed.batch_sizes(world_size)) if self.deepspeed else None
        self.total_steps: int | None = None
        if self.config and self.config.cloze_prompts and not self.config.objective.has_ae:
            self.faults.append(
                "--cloze_prompts needs an objective with AE, which fills in masks, and --objective is "
                f"{self.config.objective.value}"
            )
        if self.config and self.config.compile and (fault := compiler_fault()):
            self.faults.append(f"--compile: {fault}")
        if self.deepspeed:
            self._check_recipe(args, device)

    def attempt(self, make: Callable[[], _T]) -> _T | None:
        """Return what `make` returns, or None after noting what is wrong."""
        try:
            return make()
        except (ValueError, OSError) as error:
            self.faults.append(describe_error(error))
            return None

    def _check_recipe(self, args: Any, device: Speeds | None) -> None:
        recipe: DeepSpeedConfig = self.deepspeed
        if device and (fault := recipe.precision_fault(device)):
            self.faults.append(fault)
        if recipe.offloads_optimizer and (fault := compiler_fault("ninja")):
            self.faults.append(f"{recipe.path}: zero_optimization.offload_optimizer: {fault}")
        self.total_steps = args.max_steps or recipe.total_steps
        if self.total_steps is None:
            self.faults.append(f"{args.deepspeed_config}: its schedule has no total_num_steps; pass --max_steps")
        elif recipe.total_steps and self.total_steps > recipe.total_steps:
            self.faults.append(
                f"--max_steps {self.total_steps}: the schedule in {args.deepspeed_config} ends at total_num_steps "
                f"{recipe.total_steps}, with a learning rate of 0; raise it there"
            )
