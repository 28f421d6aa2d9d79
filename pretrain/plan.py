"""python -m pretrain.plan: what a run will need, before there is a GPU.

Parameters, memory of a GPU under ZeRO 0 to 3, the largest micro batch that fits, operations and communication of a step,
days, tokens, epochs, disk and cost; with --output, the DeepSpeed JSON and the sbatch line for it. Batch, steps and
precision are those of --deepspeed_config.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.console import ArgumentParser, add_flags, flag_values, run_command
from data_prep.files import write_whole
from data_prep.mask_settings import PAPER_MASKS, MaskSettings
from data_prep.packing import NUM_SPECIAL_TOKENS
from data_prep.shards import CHUNK_SAMPLES, DataSet, SampleBatch, concatenate
from pretrain.attention import AttentionBackend, choose_backend
from pretrain.communication import Network, Traffic
from pretrain.config import MODEL_NUMBERS, RunConfig, model_faults, model_of
from pretrain.device import Precision
from pretrain.ds_config import DeepSpeedConfig
from pretrain.flops import step_flops
from pretrain.gpus import GPUS, Gpu
from pretrain.layout import Layout, Objective, pseudo_masked_layout
from pretrain.memory import Memory, checkpoint_bytes, num_parameters, number_bytes, passing, states
from pretrain.model import PMLMConfig

_PAPERS_RECIPE = Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json"
STAGES = (0, 1, 2, 3)
SCALING_GPUS = tuple(2**power for power in range(11))
_RUN_FLAGS = (
    "model", "objective", "attention", "activation_checkpointing", "max_steps", "save_every_steps", "keep_last",
    "keep_every_steps",
)  # fmt: skip
_CUDA_BYTES = 2**30  # CUDA's context, NCCL's buffers, libraries
_USABLE_SHARE = 0.95  # the allocator's blocks never fit quite
_MEASURED_CHUNKS = 8
_DEFAULT_DATA_LENGTH_TOKENS, _DEFAULT_VOCAB_SIZE = 512, 30_522
_STAGE_3_GATHERED = 50_000_000  # parameters: DeepSpeed's stage3_prefetch_bucket_size
_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
_T = TypeVar("_T")


@dataclass(frozen=True)
class Machines:
    """Who is to compute."""

    nodes: int = 8
    """Hosts."""
    gpus: int = 8
    """GPUs of a host, a rank each."""
    gpu: str = "V100-32GB"
    """Kind of GPU; the numbers below replace single ones of its."""
    gpu_memory_gb: float | None = None
    """Memory of a GPU, 10^9 bytes."""
    gpu_tflops: float | None = None
    """Largest rate of dense matrix products in the recipe's precision, 10^12 operations per second."""
    network_gb_per_s: float = 12.5
    """Bandwidth of a host to the others, one way, 10^9 bytes per second; the default is 100 Gbit/s."""
    efficiency: float = 0.11
    """Share of --gpu_tflops at which a GPU computes the operations that a step needs, without communication. The default is
    what the paper's run came to; well-tuned BERT training reaches 0.3 and more."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU for an hour, in any currency."""

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "gpu" and value is not None}
        faults = [f"--{name} is {value:g}, expected more than 0" for name, value in numbers.items() if value <= 0]
        if self.gpu not in GPUS:
            faults.append(
                f"--gpu {self.gpu}: not in the table ({', '.join(GPUS)}); for another kind take the nearest and give "
                "--gpu_memory_gb and --gpu_tflops"
            )
        if self.efficiency > 1:
            faults.append(f"--efficiency is {self.efficiency:g}, expected at most 1")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus

    @property
    def kind(self) -> Gpu:
        """The table's entry."""
        return GPUS[self.gpu]

    @property
    def memory_bytes(self) -> int:
        """Of a GPU."""
        return round(self.gpu_memory_gb * 1e9) if self.gpu_memory_gb else self.kind.memory_mib * 2**20

    @property
    def usable_bytes(self) -> int:
        """What tensors may take of it."""
        return round(self.memory_bytes * _USABLE_SHARE) - _CUDA_BYTES

    @property
    def network(self) -> Network:
        """For the model of communication."""
        return Network(self.gpus, self.kind.link_gb_per_s * 1e9, self.network_gb_per_s * 1e9)

    def choose_precision(self, allowed: Sequence[Precision]) -> Precision:
        """Return the precision that the GPU takes of those that the recipe leaves open."""
        return next((p for p in allowed if self.gpu_tflops or p in self.kind.tflops), allowed[0])

    def flops_per_s(self, precision: str) -> float:
        """Of a GPU computing. Raises ValueError where it has no such precision."""
        if not self.gpu_tflops and precision not in self.kind.tflops:
            raise ValueError(
                f"--gpu {self.gpu} has no {precision}; take a DeepSpeed JSON with {' or '.join(self.kind.tflops)}"
            )
        return (self.gpu_tflops or self.kind.tflops[precision]) * 1e12 * self.efficiency


@dataclass(frozen=True)
class Samples:
    """What is read: of a data set, or samples that are all full."""

    data: DataSet | None
    max_length_tokens: int
    vocab_size: int
    mask_id: int
    typical: SampleBatch
    """Samples of which a step's operations and tokens are the mean."""

    @property
    def masks(self) -> MaskSettings:
        """How the masks of the data set are drawn; the paper's where there is no data set."""
        return self.data.masks if self.data else PAPER_MASKS

    @classmethod
    def of(cls, data: Path | None, max_length_tokens: int | None, vocab_size: int | None) -> Samples:
        """Raises ValueError for a data set that is not there, or together with numbers that it decides."""
        if data is None:
            length, vocabulary = max_length_tokens or _DEFAULT_DATA_LENGTH_TOKENS, vocab_size or _DEFAULT_VOCAB_SIZE
            return cls(None, length, vocabulary, 0, full_samples(1, length))
        for name, value in (("max_length_tokens", max_length_tokens), ("vocab_size", vocab_size)):
            if value is not None:
                raise ValueError(f"--{name} {value}: the data set {data} decides it; leave the flag out")
        found = DataSet(data)
        if not (num_samples := found.num_samples("train")):
            raise ValueError(f"{data}: has no training samples")
        num_chunks = -(-num_samples // CHUNK_SAMPLES)
        chunks = np.unique(np.linspace(0, num_chunks - 1, _MEASURED_CHUNKS).astype(int)).tolist()
        sets = np.arange(len(chunks)) * found.num_mask_sets // len(chunks)  # where their rates differ, all count
        typical = concatenate(
            [found.read_chunk("train", *c) for c in zip(chunks, sets.tolist(), strict=True)]
        ).as_int64()
        return cls(found, found.max_length_tokens, found.tokenizer.vocab_size, found.tokenizer.mask_id, typical)


def full_samples(number: int, length_tokens: int, masks: MaskSettings = PAPER_MASKS) -> SampleBatch:
    """The longest samples there can be, with most masked tokens, of no meaning."""
    num_masked = masks.max_masked(length_tokens, NUM_SPECIAL_TOKENS)
    places_BP = np.tile(np.arange(1, num_masked + 1), (number, 1))
    zeros_BP, all_B = np.zeros_like(places_BP), np.ones(number, np.int64)
    return SampleBatch(
        tokens_BL=np.zeros((number, length_tokens), np.int64), length_B=all_B * length_tokens,
        segment_boundary_B=all_B * (length_tokens // 2), num_masked_B=all_B * num_masked, positions_BP=places_BP,
        turns_BP=places_BP, shown_BP=zeros_BP,
    )  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """Of a step on so many GPUs, the work of each being the same."""

    gpus: int
    train_batch_size: int
    step_s: float
    samples_per_s: float
    efficiency: float
    """Samples a second and GPU, against those of one GPU."""


@dataclass(frozen=True)
class Plan:
    """What a run needs; its fields are the keys of --json."""

    model: str
    objective: str
    precision: str
    zero_stage: int
    attention: AttentionBackend
    gpus: int
    num_parameters: int
    usable_memory_bytes: int
    memory: dict[int, Memory]
    """Of a GPU, by ZeRO stage."""
    train_batch_size: int
    largest_micro_batch: int
    """That fits."""
    micro_batch: int
    """The largest that also divides a GPU's share of the batch."""
    accumulation_steps: int
    step_flops: int
    """That a step needs, on all GPUs."""
    recomputed_flops: int
    """What --activation_checkpointing adds to them."""
    sent_bytes: int
    """By a GPU in a step."""
    compute_s: float
    exposed_communication_s: float
    """In which nothing is computed."""
    step_s: float
    total_steps: int
    days: float
    samples: int
    tokens: int
    epochs: float | None
    mask_sets: int | None
    checkpoint_bytes: int
    num_checkpoints: int
    """On disk at the end, and one more while it is written."""
    price: float | None
    weak_scaling: list[StepTime]
    deepspeed_config: dict[str, Any]
    command: str


def make_plan(args: Any) -> Plan:
    """The plan for a parsed command line. Raises ValueError or OSError that lists what is wrong."""
    machines = Machines(**flag_values(args, [field.name for field in fields(Machines)]))
    recipe = DeepSpeedConfig(args.deepspeed_config)
    samples = Samples.of(args.data, args.max_length_tokens, args.vocab_size)
    config = model_of(args, samples.vocab_size)
    faults = model_faults(config, args.attention, args.data, samples.max_length_tokens)
    if args.attention == "cpu":
        faults.append("--attention cpu cannot run on a GPU; pass --attention auto")
    if recipe.total_steps is None and args.max_steps is None:
        faults.append(f"{args.deepspeed_config}: its schedule has no total_num_steps; pass --max_steps")
    if faults:
        raise ValueError("; ".join(faults))
    recipe = recipe.with_precision(machines.choose_precision(recipe.allowed_precisions))
    backend = choose_backend(True, config.dropout) if args.attention == "auto" else args.attention
    planner = _Planner(args, machines, recipe, samples, config, backend)
    return planner.plan()


class _Planner:
    def __init__(
        self, args: Any, machines: Machines, recipe: DeepSpeedConfig, samples: Samples, config: PMLMConfig,
        backend: AttentionBackend,
    ) -> None:  # fmt: skip
        self._args, self._machines, self._recipe, self._samples = args, machines, recipe, samples
        self._config, self._backend = config, backend
        self._num_parameters = num_parameters(config)
        zero = recipe.values["zero_optimization"]
        self._stage, self._bucket = zero["stage"], int(zero.get("reduce_bucket_size", _BUCKET))
        self._overlaps = bool(zero.get("overlap_comm", self._stage == 3))  # DeepSpeed's default

    def plan(self) -> Plan:
        args, machines, recipe, samples = self._args, self._machines, self._recipe, self._samples
        world_size, precision = machines.world_size, recipe.precision
        train_batch = recipe.batch_sizes(world_size).train_batch
        share = train_batch // world_size
        largest = self._largest_micro_batch(share)
        micro_batch = max(size for size in range(1, largest + 1) if share % size == 0)
        accumulation = share // micro_batch
        needed, recomputed = self._flops_per_sample()
        compute_s = share * (needed + recomputed) / machines.flops_per_s(precision)
        traffic = Traffic(
            self._num_parameters * number_bytes(precision), self._stage,
            -(-self._num_parameters // self._bucket), self._overlaps, accumulation,
        )  # fmt: skip

        def exposed_s(ranks: int) -> float:
            return traffic.exposed_s(ranks, machines.network, compute_s / accumulation)

        step_s = compute_s + exposed_s(world_size)
        total_steps = int(args.max_steps or recipe.total_steps or 0)
        num_samples = train_batch * total_steps
        hours = total_steps * step_s / 3600
        data, price = samples.data, machines.price_per_gpu_hour
        kept = min(args.keep_last, -(-total_steps // args.save_every_steps))
        kept += total_steps // args.keep_every_steps if args.keep_every_steps else 0
        values = _with_micro_batch(recipe.values, micro_batch, accumulation)
        return Plan(
            model=args.model, objective=args.objective.value, precision=precision, zero_stage=self._stage,
            attention=self._backend, gpus=world_size, num_parameters=self._num_parameters,
            usable_memory_bytes=machines.usable_bytes,
            memory={stage: self.memory(micro_batch, stage) for stage in STAGES},
            train_batch_size=train_batch, largest_micro_batch=largest, micro_batch=micro_batch,
            accumulation_steps=accumulation, step_flops=round(train_batch * needed),
            recomputed_flops=round(train_batch * recomputed), sent_bytes=traffic.sent_bytes(world_size),
            compute_s=compute_s, exposed_communication_s=exposed_s(world_size), step_s=step_s, total_steps=total_steps,
            days=hours / 24, samples=num_samples, tokens=round(num_samples * samples.typical.length_B.mean()),
            epochs=num_samples / data.num_samples("train") if data else None,
            mask_sets=data.num_mask_sets if data else None,
            checkpoint_bytes=checkpoint_bytes(self._num_parameters, precision), num_checkpoints=kept,
            price=hours * world_size * price if price else None,
            weak_scaling=[
                StepTime(
                    ranks, share * ranks, compute_s + exposed_s(ranks), share * ranks / (compute_s + exposed_s(ranks)),
                    compute_s / (compute_s + exposed_s(ranks)),
                )
                for ranks in SCALING_GPUS
            ],
            deepspeed_config=values, command=self._command(),
        )  # fmt: skip

    def memory(self, micro_batch: int, stage: int) -> Memory:
        """Of a GPU at the moment that needs most: at the head or in a layer of the backward pass, or in the update."""
        config, precision = self._config, self._recipe.precision
        world_size, e, samples = self._machines.world_size, number_bytes(precision), self._samples
        weights, gradients, optimizer = states(self._num_parameters, precision, stage, world_size)
        of_pass = passing(
            config, self._layout(full_samples(micro_batch, samples.max_length_tokens, samples.masks)), precision,
            self._backend, is_cuda=True, activation_checkpointing=self._args.activation_checkpointing,
        )  # fmt: skip
        buckets = self._bucket * e * (3 if self._overlaps else 2)  # one or two that fill, and the one that is sent
        buckets += min(self._num_parameters, _STAGE_3_GATHERED) * e if stage == 3 else 0
        update = self._num_parameters * (e + 4) // (world_size if stage else 1)  # its gradients in a row, and in fp32
        in_hand = of_pass.buffers + buckets
        missing = max(0, update - of_pass.activations - of_pass.logits - in_hand)
        return Memory(weights, gradients, optimizer, of_pass.activations, of_pass.logits, in_hand + missing)

    def _largest_micro_batch(self, share: int) -> int:
        usable = self._machines.usable_bytes

        def fits(micro_batch: int) -> bool:
            return self.memory(micro_batch, self._stage).total <= usable

        if not fits(1):
            total = self.memory(1, self._stage).total
            raise ValueError(
                f"--model {self._args.model} does not fit: with a micro batch of 1 it needs {total / 1e9:.1f} GB of the "
                f"{usable / 1e9:.1f} GB that a GPU has to give; more GPUs, ZeRO 3, --activation_checkpointing, a smaller "
                "reduce_bucket_size or a smaller model may"
            )
        doublings = [2**power for power in range(1, share.bit_length() + 1)]
        fitting = [1, *takewhile(fits, (size for size in doublings if size <= share))]
        return _last_true(fits, fitting[-1], min(2 * fitting[-1], share + 1))

    def _layout(self, batch: SampleBatch) -> Layout:
        is_filled = self._backend == "flex" and self._config.dropout == 0  # as pretrain/train.py does on CUDA
        objective: Objective = self._args.objective
        return pseudo_masked_layout(batch, objective, mask_id=self._samples.mask_id, one_shape=is_filled)

    def _flops_per_sample(self) -> tuple[float, float]:
        """Needed, and what checkpointing computes again: the layers' forward pass."""
        number = len(self._samples.typical.length_B)
        flops = step_flops(self._config, self._layout(self._samples.typical))
        again = (flops.layers + flops.attention) / 3 if self._args.activation_checkpointing else 0.0
        return flops.needed / number, again / number

    def _command(self) -> str:
        args, machines = self._args, self._machines
        words = ["sbatch", f"--nodes={machines.nodes}", "run_pretrain.sh", "--ranks", str(machines.gpus)]
        words += ["--deepspeed_config", str(args.output / self._file_name if args.output else args.deepspeed_config)]
        words += ["--data", str(args.data)] if args.data else []
        given = {"model": args.model} | {
            name: getattr(args, name)
            for name in (*_RUN_FLAGS[1:], *MODEL_NUMBERS)
            if not any(getattr(args, name) is default for default in (None, False, getattr(RunConfig, name, None)))
        }
        for name, value in given.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(getattr(value, "value", value))]
        return shlex.join(words)

    @property
    def _file_name(self) -> str:
        return config_name(self._stage)


def config_name(stage: int) -> str:
    """`zero2.json`."""
    return f"zero{stage}.json"


def _last_true(is_true: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from `low`, of which it is true, below `high`; monotonous."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_true(middle) else (low, middle)
    return low


def _with_micro_batch(values: dict[str, Any], micro_batch: int, accumulation_steps: int) -> dict[str, Any]:
    """The recipe with these sizes, its keys in their order."""
    sizes = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation_steps}
    if "train_batch_size" in values:  # the accumulation then follows
        first = {"train_batch_size": values["train_batch_size"], "train_micro_batch_size_per_gpu": micro_batch}
        return {**first, **values, **{key: size for key, size in sizes.items() if key in values}}
    return {**sizes, **values, **sizes}


# ---- numbers and words


def describe(plan: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    yield (
        f"{plan.model}, {plan.objective}: {plan.num_parameters:,} parameters, {plan.precision}, attention {plan.attention}, "
        f"ZeRO {plan.zero_stage}, {plan.gpus:,} GPUs"
    )
    more = (
        ""
        if plan.largest_micro_batch == plan.micro_batch
        else f", the largest part of a GPU's share; {plan.largest_micro_batch} fit"
    )
    yield (
        f"batch {plan.train_batch_size:,} = micro batch {plan.micro_batch} x {plan.accumulation_steps} accumulation steps x "
        f"{plan.gpus:,} GPUs{more}"
    )
    yield ""
    names = [field.name for field in fields(Memory)]
    yield f"memory of a GPU, GB; {plan.usable_memory_bytes / 1e9:.1f} may be used"
    yield "  ZeRO" + "".join(f"{name:>13}" for name in (*names, "total"))
    for stage, memory in plan.memory.items():
        numbers = (*(getattr(memory, name) for name in names), memory.total)
        mark = "*" if stage == plan.zero_stage else " "
        yield f"{mark} {stage:4}" + "".join(f"{number / 1e9:13.2f}" for number in numbers)
    yield ""
    again = f" and {plan.recomputed_flops / 1e12:,.0f} again" if plan.recomputed_flops else ""
    yield (
        f"step: {plan.step_flops / 1e12:,.0f} TFLOP{again}, {plan.sent_bytes / 1e9:.2f} GB sent by each GPU; {plan.step_s:.2f} s "
        f"= {plan.compute_s:.2f} s of computing + {plan.exposed_communication_s:.2f} s of waiting for others"
    )
    yield (
        f"run: {plan.total_steps:,} steps in {plan.days:.1f} days, {plan.samples / 1e6:,.0f} million samples, "
        f"{plan.tokens / 1e9:,.1f} billion tokens"
    )
    if plan.epochs is not None and plan.mask_sets is not None:
        masks = f"; masks repeat: there are {plan.mask_sets} mask sets" if plan.epochs > plan.mask_sets else ""
        yield f"data: {plan.epochs:,.1f} epochs{masks}"
    yield (
        f"disk: {plan.num_checkpoints} checkpoints and one being written, {plan.checkpoint_bytes / 1e9:.2f} GB each: "
        f"{(plan.num_checkpoints + 1) * plan.checkpoint_bytes / 1e9:.1f} GB"
    )
    if plan.price is not None:
        yield f"price: {plan.price:,.0f}"
    yield ""
    yield "weak scaling, the same work for each GPU"
    yield f"{'GPUs':>6}{'batch':>12}{'s a step':>10}{'samples/s':>12}{'efficiency':>12}"
    for row in plan.weak_scaling:
        yield f"{row.gpus:6,}{row.train_batch_size:12,}{row.step_s:10.2f}{row.samples_per_s:12,.0f}{row.efficiency:12.1%}"
    yield ""
    yield plan.command


def write(plan: Plan, folder: Path) -> tuple[Path, Path]:
    """The DeepSpeed JSON and a script with the sbatch line. Raises ValueError where there are such files already."""
    config, script = folder / config_name(plan.zero_stage), folder / "submit.sh"
    for path in (config, script):
        if path.exists():
            raise ValueError(f"{path}: exists already; remove it or choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan.deepspeed_config, indent=2)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    write_whole(config, f"{text}\n".encode())
    write_whole(script, f"#!/bin/sh\n# From the repository's folder.\n{plan.command}\n".encode())
    script.chmod(0o755)
    return config, script


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m pretrain.plan", description=__doc__)
    shipped, here = _PAPERS_RECIPE, Path.cwd()
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=shipped.relative_to(here) if shipped.is_relative_to(here) else shipped,
        metavar="JSON",
        help="the recipe: batch, steps, precision, ZeRO stage",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="data set: its lengths, vocabulary and epochs; without one, full samples",
    )
    parser.add_argument("--max_length_tokens", type=int, metavar="N",
                        help=f"tokens of a sample, without --data (default: {_DEFAULT_DATA_LENGTH_TOKENS})")  # fmt: skip
    parser.add_argument("--vocab_size", type=int, metavar="N",
                        help=f"entries of the vocabulary, without --data (default: {_DEFAULT_VOCAB_SIZE})")  # fmt: skip
    add_flags(parser.add_argument_group("machines"), Machines)
    add_flags(parser.add_argument_group("run", "as in run_pretrain.py"), RunConfig, only=_RUN_FLAGS)
    add_flags(parser.add_argument_group("model", "single numbers of the model, in place of those of its --model size"),
              PMLMConfig, only=MODEL_NUMBERS, optional=True)  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the DeepSpeed JSON and submit.sh there")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, memory in bytes")
    return parser


def main() -> int:
    """Entry point; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args()

    def command() -> None:
        plan = make_plan(args)
        if args.output:
            written = write(plan, args.output)
        print(json.dumps(asdict(plan), indent=1) if args.json else "\n".join(describe(plan)))
        if args.output and not args.json:
            print(f"written: {', '.join(map(str, written))}")

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
