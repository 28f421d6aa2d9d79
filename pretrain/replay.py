"""python -m pretrain.replay: a fault's steps once more, from the checkpoint they began at, without touching the run.

Prints each step's loss and gradient norm, and the samples with the largest losses. Alone it takes one process; started as
several ranks, by torchrun say, they share the work. At the number of ranks of the run it repeats the steps to the bit.
A sample's loss is that before its step, without dropout.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from data_prep.console import USER_ERROR_STATUS, ArgumentParser, describe_error
from data_prep.files import sha256_of_file
from data_prep.shards import DataSet, manifest_path
from pretrain import distributed
from pretrain.batches import SampleOrder, Share, TrainingBatches
from pretrain.checkpoint import SHARDS, Checkpoint, checkpoints_folder, folder_name, read_checkpoint
from pretrain.ds_config import DeepSpeedConfig
from pretrain.faults import DEEPSPEED, FAULT, faults_folder, read_fault
from pretrain.layout import Objective
from pretrain.model import PMLM, PMLMConfig
from pretrain.order import Cursor

_EXCERPT_CHARACTERS = 160
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comms_logger", "flops_profiler")


@dataclass(frozen=True)
class SampleLoss:
    """Mean loss of a sample's predictions."""

    loss: float
    sample: int
    """Its number in the training split."""
    excerpt: str


def replay(run: Path, fault: str, data: Path | None, num_samples: int, console: IO[str]) -> None:
    """Do a fault's steps again; rank 0 prints to `console`.

    Raises ValueError or OSError where the fault, its checkpoint or its data are not there.
    """
    folder = faults_folder(run) / _folder_name(fault)
    if not (folder / FAULT).is_file():
        known = sorted(path.name for path in faults_folder(run).glob("step*"))
        raise ValueError(f"{folder}: no such fault; --fault takes the step of one of: {', '.join(known) or 'none'}")
    about = read_fault(folder)
    step = about["window"]["checkpoint_step"]
    checkpoint = read_checkpoint(checkpoints_folder(run) / folder_name(step)) if step else None
    samples = DataSet(data or Path(about["data"]))
    if sha256_of_file(manifest_path(samples.folder)) != about["identity"]["data_sha256"]:
        raise ValueError(f"{samples.folder}: is not the data set of this run; name its folder by --data")
    _replay(about, checkpoint, samples, DeepSpeedConfig(folder / DEEPSPEED), num_samples, console)


def _folder_name(fault: str) -> str:
    step, dash, number = fault.partition("-")
    return f"step{int(step):08d}{dash}{number}" if step.isdecimal() else fault


def _replay(
    about: dict[str, Any],
    checkpoint: Checkpoint | None,
    data: DataSet,
    config: DeepSpeedConfig,
    num_samples: int,
    console: IO[str],
) -> None:
    from pretrain.engine import Engine
    from pretrain.train import train_step

    distributed.join_ranks()
    identity, batch = about["identity"], about["identity"]["train_batch_size"]
    config.values = {key: value for key, value in config.values.items() if key not in _MONITORS}
    config.values.pop("gradient_accumulation_steps", None)
    config.values |= {"train_batch_size": batch, "train_micro_batch_size_per_gpu": about["batch_sizes"]["micro_batch"]}
    torch.manual_seed(identity["seed"])  # of the initial weights, where there was no checkpoint to begin at
    model = PMLM(PMLMConfig(**identity["model"]), about["attention"], about["activation_checkpointing"])
    engine = Engine(model, config)
    if checkpoint:
        engine.load_shards(checkpoint.folder, SHARDS)
    sizes, objective = engine.batch_sizes, Objective(identity["objective"])
    share = Share(engine.rank, engine.world_size, sizes.micro_batch, sizes.accumulation_steps)
    one_each = Share(engine.rank, engine.world_size, 1, batch // engine.world_size)
    batches, singles = (
        TrainingBatches(data, objective, of_rank, identity["seed"], total_samples=about["schedule_samples"])
        for of_rank in (share, one_each)
    )
    order = SampleOrder(data.num_samples("train"), identity["seed"])
    cursor = Cursor(batch, about["cursor"])

    def say(line: str) -> None:
        if engine.rank == 0:
            print(line, file=console, flush=True)

    say(f"step {about['step']}: {about['reason']}")
    while engine.steps < about["step"]:
        positions = cursor.next()
        samples = order.samples(positions.start, positions.stop)[1]
        losses = _sample_losses(engine, singles.step(positions.start), samples, data)
        micro_batches = batches.step(positions.start)
        num_targets = distributed.sum_over_ranks(torch.tensor([sum(m.num_targets for m in micro_batches)]))
        sums = distributed.sum_over_ranks(train_step(engine, micro_batches, num_targets, identity["seed"]))
        loss = float(sums[0] + sums[1]) / float(num_targets[0])
        say(f"step {engine.steps}  loss {loss:.6f}  gradient norm {engine.gradient_norm:.6g}")
        for worst in sorted(losses, key=lambda sample: (sample.loss == sample.loss, -sample.loss))[:num_samples]:
            say(f"    sample {worst.sample}  loss {worst.loss:.4f}  {worst.excerpt}")
    data.close()
    engine.close()


def _sample_losses(engine: Any, layouts: list[Any], samples: Any, data: DataSet) -> list[SampleLoss]:
    """Of all ranks' samples; `layouts` are this rank's, each of one sample."""
    engine.train(False)
    own = []
    with torch.no_grad():
        for index, layout in enumerate(layouts):
            losses = engine(layout)
            sample = int(samples[index * engine.world_size + engine.rank])
            content = data.read_samples("train", sample, sample + 1)
            text = data.tokenizer.decode(content.tokens_BL[0, : int(content.length_B[0])].tolist())
            loss = float(losses.ae_sum + losses.par_sum) / layout.num_targets
            own.append(SampleLoss(loss, sample, " ".join(text.split())[:_EXCERPT_CHARACTERS]))
    return [sample for of_rank in distributed.gather(own) for sample in of_rank]


def main() -> int:
    """Entry point of one rank; returns the exit status."""
    parser = ArgumentParser(prog="python -m pretrain.replay", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    parser.add_argument("--fault", required=True, help="step of the fault, or its folder's name in RUN/faults")
    parser.add_argument("--data", type=Path, help="folder of the data set, where it is no longer where it was")
    parser.add_argument("--samples", type=int, default=5, help="samples shown for a step, those of the largest losses")
    args = parser.parse_args()
    try:
        replay(args.run, args.fault, args.data, args.samples, sys.stdout)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
