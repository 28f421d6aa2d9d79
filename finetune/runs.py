"""What the commands share: where a model comes from, one training or many, and which was best."""

from __future__ import annotations

import copy
import itertools
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from data_prep.console import USER_ERROR_STATUS, ArgumentParser, add_flags, flag_values, run_command, tell_error
from data_prep.files import write_json
from finetune.model import SUMMARY
from finetune.optimizer import check_precision
from finetune.processes import Processes, have_told, is_told, join_processes, leave_processes
from finetune.trainer import MODEL, Task, Trainer, TrainSettings
from finetune.weights import Pretrained, load_pretrained
from pretrain.model import PMLM

GRID: dict[str, tuple[Any, ...]] = {
    "learning_rate": (5e-6, 1e-5, 2e-5, 3e-5), "batch_size": (16, 32), "warmup": (0.1, 0.2), "weight_decay": (0.01, 0.1),
    "epochs": (10, 15),
}  # fmt: skip
"""The paper's search for GLUE (PAPER.md): 64 trainings."""


@dataclass(frozen=True)
class StartSettings:
    """What is fine-tuned, and where to."""

    weights: Path
    """Pre-trained model: an export, a run, a checkpoint, or a folder or file of UniLM's or BERT's weights."""
    output: Path = Path("runs/finetune")
    """Folder for the fine-tuned model, metrics and figures; an interrupted training there goes on."""
    tokenizer: Path | None = None
    """Tokenizer of weights that have none beside them: .model, .json or BERT's vocab.txt."""
    max_length_tokens: int = 128
    """Tokens of an input, special ones included; the position table is repeated where it is shorter."""
    dropout: float | None = None
    """On hidden vectors and attention probabilities, and before new layers; by default what the weights were trained with."""
    grid: bool = False
    """Search the paper's grid: batch size 16 and 32, learning rate 5e-6 to 3e-5, warm-up, weight decay, 10 and 15 epochs."""
    seeds: int = 1
    """Trainings with as many seeds, --seed first; after --grid, with what was best in it."""

    def __post_init__(self) -> None:
        if self.max_length_tokens < 8:
            raise ValueError(f"--max_length_tokens {self.max_length_tokens}: expected at least 8")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: expected 0 or more and less than 1")
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: expected at least 1")


_S = TypeVar("_S")


def from_flags(args: Any, cls: type[_S]) -> _S:
    """Return the settings that the flags of a dataclass's fields say. Raises ValueError for what they may not be."""
    names = [field.name for field in fields(cls) if field.name in args]  # type: ignore[arg-type]
    return cls(**flag_values(args, names))


def add_train_flags(parser: ArgumentParser, without: Sequence[str] = (), **defaults: Any) -> None:
    """Flags of StartSettings and TrainSettings."""
    add_flags(parser, StartSettings, only=[field.name for field in fields(StartSettings) if field.name not in without])
    add_flags(parser, TrainSettings)
    parser.set_defaults(**defaults)


def settings_of(args: Any) -> tuple[StartSettings, TrainSettings]:
    """What the flags say. Raises ValueError for what they may not be."""
    start, train = from_flags(args, StartSettings), from_flags(args, TrainSettings)
    check_precision(train.precision)
    if start.grid:
        for name, values in GRID.items():
            default = next(field.default for field in fields(TrainSettings) if field.name == name)
            if getattr(train, name) not in (default, *values):
                raise ValueError(f"--{name} and --grid exclude each other: the grid has {', '.join(map(str, values))}")
    return start, train


def say(processes: Processes, *lines: str) -> None:
    """To the user, once."""
    if processes.is_first:
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def load_start(start: StartSettings, processes: Processes) -> Pretrained:
    """The pre-trained model, with its notes told. Raises ValueError or OSError, see load_pretrained."""
    pretrained = load_pretrained(
        start.weights, tokenizer=start.tokenizer, max_positions=start.max_length_tokens, dropout=start.dropout
    )
    say(processes, *pretrained.notes)
    return pretrained


def train_all(
    start: StartSettings, settings: TrainSettings, pretrained: PMLM, identity: dict[str, Any], processes: Processes,
    make_task: Callable[[PMLM, TrainSettings], tuple[nn.Module, Task]],
) -> dict[str, Any]:  # fmt: skip
    """One training in `output`, or many in folders of it; returns what is in summary.json, with `best` the folder.

    `make_task` gets a model of its own each time. Of a grid, only the best model is kept.
    """
    output, runs = start.output, list[dict[str, Any]]()

    def train(name: str, chosen: TrainSettings) -> dict[str, Any]:
        model, task = make_task(copy.deepcopy(pretrained), chosen)
        found = Trainer(model, task, chosen, output / name, processes, identity).train()
        run = {"name": name, **{key: getattr(chosen, key) for key in (*GRID, "seed")}, "validation": found}
        shown = ", ".join(f"{key} {value:.4f}" for key, value in found.items() if key not in ("step", "epoch", "score"))
        say(processes, f"{output / name}: {shown} (best of step {found['step']})")
        return run

    best: dict[str, Any] | None = None
    if start.grid:
        combinations = list(itertools.product(*GRID.values()))
        for number, values in enumerate(combinations, start=1):
            chosen = replace(settings, **dict(zip(GRID, values, strict=True)))
            name = "grid/" + "_".join(f"{key}-{value:g}" for key, value in zip(GRID, values, strict=True))
            say(processes, f"grid {number} of {len(combinations)}: {name.removeprefix('grid/')}")
            runs.append(train(name, chosen))
            worse: dict[str, Any] | None = runs[-1]
            if best is None or runs[-1]["validation"]["score"] > best["validation"]["score"]:
                worse, best = best, runs[-1]
            if worse is not None and processes.is_first:
                shutil.rmtree(output / worse["name"] / MODEL, ignore_errors=True)
        assert best is not None
        settings = replace(settings, **{key: best[key] for key in GRID})
    of_seeds = [] if best is None else [best]
    for seed in range(settings.seed + len(of_seeds), settings.seed + start.seeds):
        name = f"seed-{seed}" if start.seeds > 1 or start.grid else ""
        of_seeds.append(train(name, replace(settings, seed=seed)))
        runs.append(of_seeds[-1])
    winner = max(of_seeds, key=lambda run: run["validation"]["score"])
    summary = {"best": winner["name"] or ".", "validation": winner["validation"], "runs": runs}
    if len(of_seeds) > 1:
        names = [name for name in winner["validation"] if name not in ("step", "epoch")]
        columns = {name: [run["validation"][name] for run in of_seeds] for name in names}
        summary["mean"] = {name: statistics.fmean(values) for name, values in columns.items()}
        summary["standard_deviation"] = {name: statistics.stdev(values) for name, values in columns.items()}
        say(processes, *(
            f"{name}: mean {summary['mean'][name]:.4f}, standard deviation {summary['standard_deviation'][name]:.4f} "
            f"of {len(of_seeds)} seeds" for name in names if name != "score"
        ))  # fmt: skip
    if processes.is_first:
        write_json(output / SUMMARY, summary)
    processes.wait()
    return summary


def run_with_processes(command: Callable[[Processes], None], prog: str) -> int:
    """`run_command` of something that several processes may do together."""

    def joined() -> None:
        processes = join_processes()
        try:
            command(processes)
        except Exception as error:
            if processes.world_size == 1:
                raise
            if processes.is_first and isinstance(error, (ValueError, OSError)):
                tell_error(error, prog)
                have_told(processes)
                sys.exit(USER_ERROR_STATUS)
            if not processes.is_first and is_told():
                sys.exit(USER_ERROR_STATUS)
            raise
        finally:
            leave_processes()

    return run_command(joined, prog)
