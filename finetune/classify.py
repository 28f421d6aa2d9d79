"""python -m finetune.classify: texts, or pairs of texts, to classes or numbers.

train    fine-tune a pre-trained model on one of GLUE's tasks, or on any TSV, CSV or JSON-lines file
predict  the class or number of texts, given in the command line or in a file
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.console import add_flags, flag_values
from data_prep.files import write_whole
from finetune.classify_model import Classifier, Inputs, Target, make_inputs
from finetune.glue import BROKEN, GLUE, TRAIN, GlueTask, write_leaderboard_file
from finetune.metrics import classification_metrics, regression_metrics
from finetune.processes import Processes
from finetune.runs import (
    StartSettings,
    add_train_flags,
    command_parser,
    fingerprint,
    load_start,
    run_with_processes,
    say,
    settings_of,
    train_all,
)
from finetune.tables import Table, read_table
from finetune.trainer import TrainSettings, draw_figure
from pretrain.model import PMLM


@dataclass(frozen=True)
class ColumnSettings:
    """Which columns of a file are read."""

    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text, for pairs."""

    @property
    def texts(self) -> list[str]:
        """The columns of texts."""
        return [self.text_column] if self.pair_column is None else [self.text_column, self.pair_column]


@dataclass(frozen=True)
class DataSettings:
    """What is learnt: a task of GLUE, or the columns of files."""

    glue: str | None = None
    """Task of GLUE: cola, sst-2, mrpc, sts-b, qqp, mnli, qnli, rte or wnli; needs --data."""
    data: Path | None = None
    """With --glue: the task's folder, as GLUE has it: train.tsv, dev.tsv, test.tsv."""
    train_file: Path | None = None
    """Without --glue: what to train on, .tsv, .csv or .jsonl."""
    validation_file: Path | None = None
    """Without --glue: what the best weights are chosen by, .tsv, .csv or .jsonl."""
    label_column: str = "label"
    """Column of the class or number."""
    regression: bool = False
    """Labels are numbers, not classes."""


@dataclass(frozen=True)
class Labelled:
    """Texts with labels."""

    table: Table[str]
    num_texts: int

    @property
    def texts(self) -> list[str]:
        """The first text of each row."""
        return [row[0] for row in self.table.rows]

    @property
    def pairs(self) -> list[str] | None:
        """The second one."""
        return [row[1] for row in self.table.rows] if self.num_texts == 2 else None

    @property
    def labels(self) -> list[str]:
        """As they stand in the file."""
        return [row[-1] for row in self.table.rows]


@dataclass(frozen=True)
class Data:
    """What is learnt, read."""

    train: Labelled
    validation: dict[str, Labelled]
    """By the suffix of their metrics' names."""
    target: Target
    score: tuple[str, ...]
    """The metrics whose mean chooses the best weights."""
    glue: GlueTask | None = None
    folder: Path = Path()

    @property
    def files(self) -> list[Path]:
        """Where it is from."""
        return [labelled.table.path for labelled in (self.train, *self.validation.values())]


def read_data(settings: DataSettings, columns: ColumnSettings) -> Data:
    """Read and check what the flags name. Raises ValueError or OSError, naming flag, or file and line."""
    if settings.glue is None:
        if settings.train_file is None or settings.validation_file is None:
            raise ValueError("expected --train_file and --validation_file, or --glue and --data")
        names = [*columns.texts, settings.label_column]
        read = {file: Labelled(read_table(file, names), len(columns.texts)) for file in (settings.train_file, settings.validation_file)}  # fmt: skip
        target = make_target(read[settings.train_file], settings.regression)
        score = ("pearson", "spearman") if settings.regression else ("accuracy",)
        return Data(read[settings.train_file], {"": read[settings.validation_file]}, target, score)
    if settings.glue not in GLUE:
        raise ValueError(f"--glue {settings.glue}: expected one of {', '.join(GLUE)}")
    if settings.data is None or settings.train_file or settings.validation_file:
        raise ValueError(f"--glue {settings.glue}: needs --data FOLDER, and no --train_file or --validation_file")
    task, folder = GLUE[settings.glue], settings.data

    def labelled(name: str) -> Labelled:
        asked: list[str | int] = [*task.test_columns(""), task.label] if task.numbered is None else [*task.numbered]
        table = read_table(
            folder / name, asked, has_header=task.numbered is None, skip_short=settings.glue == BROKEN and name == TRAIN
        )
        return Labelled(table, 1 if task.pair is None else 2)

    train = labelled(TRAIN)
    validation = {suffix: labelled(name) for suffix, name in task.validation}
    return Data(train, validation, make_target(train, task.is_regression), task.metrics, task, folder)


def make_target(train: Labelled, is_regression: bool) -> Target:
    """Classes, or the mean and deviation of the numbers. Raises ValueError for what cannot be learnt."""
    if is_regression:
        numbers = numbers_of(train)
        deviation = float(np.std(numbers))
        if not deviation:
            raise ValueError(f"{train.table.path}: all labels are {numbers[0]}; expected different numbers")
        return Target(mean=float(np.mean(numbers)), scale=deviation)
    labels = sorted(set(train.labels), key=lambda label: (len(label), label) if label.isdecimal() else (0, label))
    if len(labels) < 2:
        raise ValueError(f"{train.table.path}: the only label is {labels[0]!r}; expected two or more")
    return Target(tuple(labels))


def numbers_of(labelled: Labelled) -> list[float]:
    """Labels as numbers. Raises ValueError, naming file and line, for one that is none."""
    numbers = []
    for row, label in enumerate(labelled.labels):
        try:
            numbers.append(float(label))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise ValueError(f"{labelled.table.where(row)}: label {label!r} is not a number, which regression needs")
    return numbers


def classes_of(labelled: Labelled, target: Target, train: Path) -> list[int]:
    """Labels as classes. Raises ValueError, naming file and line, for one that training knows nothing of."""
    known = {label: place for place, label in enumerate(target.labels)}
    for row, label in enumerate(labelled.labels):
        if label not in known:
            shown = ", ".join(target.labels[:20]) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"{labelled.table.where(row)}: label {label!r} is none of those in {train}: {shown}")
    return [known[label] for label in labelled.labels]


@dataclass(frozen=True)
class Part:
    """Inputs and their labels: classes, or numbers."""

    inputs: Inputs
    labels: Sequence[float]


class ClassifyTask:
    """See finetune.trainer.Task."""

    def __init__(self, classifier: Classifier, train: Part, validation: dict[str, Part], score: Sequence[str]) -> None:
        self._classifier, self._inputs, self._validation, self._score = classifier, train.inputs, validation, score
        self.lengths = train.inputs.lengths
        target = classifier.target
        self._targets = torch.tensor(train.labels)
        if target.is_regression:
            self._targets = ((torch.tensor(train.labels, dtype=torch.float64) - target.mean) / target.scale).float()

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """See Task."""
        return self._classifier.loss(self._inputs, self._targets, samples)

    def validate(self) -> dict[str, float]:
        """See Task."""
        values: dict[str, float] = {}
        for suffix, part in self._validation.items():
            outputs = self._classifier.outputs(part.inputs, "validating")
            values |= {f"{k}{suffix}": v for k, v in metrics_of(self._classifier, outputs, part.labels).items()}
        names = [f"{name}{suffix}" for suffix in self._validation for name in self._score]
        return {"score": float(np.mean([values[name] for name in names])), **values}

    def save(self, folder: Path) -> None:
        """See Task."""
        self._classifier.save(folder)


def metrics_of(classifier: Classifier, outputs: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """Of the model's outputs."""
    if classifier.target.is_regression:
        return regression_metrics(labels, classifier.values(outputs).tolist())
    predicted = outputs.argmax(axis=1).tolist()
    return classification_metrics([int(x) for x in labels], predicted, len(classifier.target.labels))


def train(
    start: StartSettings, settings: TrainSettings, data: Data, processes: Processes | None = None
) -> dict[str, Any]:
    """Fine-tune, draw the confusion matrix, and predict GLUE's test files where they are; returns the summary."""
    processes = processes or Processes()
    target, folder = data.target, start.output
    labels = {
        suffix: numbers_of(part) if target.is_regression else classes_of(part, target, data.train.table.path)
        for suffix, part in (("train", data.train), *data.validation.items())
    }
    pretrained = load_start(start, processes)

    def classifier_of(model: PMLM, seed: int) -> Classifier:
        return Classifier.make(
            model, pretrained.tokenizer, target, start.max_length_tokens, processes, seed, pretrained.pooler
        )

    parts = {}
    for suffix, part in (("train", data.train), *data.validation.items()):
        inputs = make_inputs(pretrained.tokenizer, part.texts, part.pairs, start.max_length_tokens)
        parts[suffix] = Part(inputs, labels[suffix])
        tell_counts(processes, part.table, inputs, start.max_length_tokens)

    def make_task(model: PMLM, chosen: TrainSettings) -> tuple[nn.Module, ClassifyTask]:
        classifier = classifier_of(model, chosen.seed)
        validation = {suffix: parts[suffix] for suffix in data.validation}
        return classifier.model, ClassifyTask(classifier, parts["train"], validation, data.score)

    of_start = fingerprint(pretrained.model.bert, data.files, pretrained.pooler)
    identity = {"max_length_tokens": start.max_length_tokens, **of_start}
    summary = train_all(start, settings, pretrained.model, identity, processes, make_task)
    best = Classifier.load(folder, processes)
    if not target.is_regression:
        for suffix in data.validation:
            predicted = best.outputs(parts[suffix].inputs).argmax(axis=1)
            if processes.is_first:
                name = folder / f"confusion_matrix{suffix}.png"
                draw_confusion_matrix(name, labels[suffix], predicted.tolist(), target.labels)
    if data.glue is not None:
        predict_glue_tests(best, data.glue, data.folder, folder / "test", processes)
    return summary


def tell_counts(processes: Processes, table: Table[str], inputs: Inputs, max_length_tokens: int) -> None:
    """What was read, and what was lost of it."""
    line = f"{table.path}: {len(table.rows):,} rows"
    if table.num_skipped:
        line += f"; {table.num_skipped:,} with too few fields are left out"
    if inputs.num_truncated:
        line += f"; {inputs.num_truncated:,} are cut to --max_length_tokens {max_length_tokens}"
    say(processes, line)


def predict_glue_tests(
    classifier: Classifier, task: GlueTask, folder: Path, output: Path, processes: Processes
) -> None:
    """The leaderboard's files, for those of the task's test files that are there."""
    for file, name in task.test:
        if not (folder / file).is_file():
            continue
        table = read_table(folder / file, task.test_columns(file))
        pairs = [row[1] for row in table.rows] if len(table.rows[0]) == 2 else None
        predictions = classifier.predict([row[0] for row in table.rows], pairs)
        if processes.is_first:
            write_leaderboard_file(output / name, predictions)
        say(processes, f"{output / name}: predictions for {folder / file}")


def draw_confusion_matrix(path: Path, labels: Sequence[float], predicted: Sequence[int], names: Sequence[str]) -> None:
    """How many of each class (a row) were taken for which (a column)."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix([int(x) for x in labels], predicted, labels=range(len(names)))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        for (row, column), count in np.ndenumerate(counts):
            is_dark = count > counts[row].sum() / 2
            axes.text(column, row, str(count), ha="center", va="center", color="white" if is_dark else "black")

    side = max(4.0, 1.5 + 0.6 * len(names))
    draw_figure(path, draw, (side, side))


def predict(args: Any, processes: Processes) -> None:
    """The command."""
    if (args.file is None) == (args.text is None):
        raise ValueError("expected either --text or --file")
    if args.file is not None and args.pair is not None:
        raise ValueError("--pair goes with --text; for a file, name --pair_column")
    classifier = Classifier.load(args.model, processes)
    texts, pairs = args.text, args.pair
    if args.file is not None:
        columns = ColumnSettings(args.text_column, args.pair_column)
        table = read_table(args.file, columns.texts)
        texts, pairs = [row[0] for row in table.rows], None
        if columns.pair_column is not None:
            pairs = [row[1] for row in table.rows]
    if classifier.target.is_regression:
        header, rows = "index\tprediction", [f"{value:.6g}" for value in classifier.predict(texts, pairs)]  # type: ignore[str-format]
    else:
        header, probabilities = "index\tprediction\tprobability", classifier.probabilities(texts, pairs)
        best = probabilities.argmax(axis=1)
        rows = [f"{classifier.target.labels[i]}\t{probabilities[row, i]:.4f}" for row, i in enumerate(best)]
    if not processes.is_first:
        return
    content = "".join(f"{line}\n" for line in (header, *(f"{index}\t{row}" for index, row in enumerate(rows))))
    if args.output is None:
        print(content, end="")
    else:
        write_whole(args.output, content.encode())
        say(processes, f"{args.output}: {len(rows):,} predictions")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = command_parser("python -m finetune.classify", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="fine-tune", description="Fine-tune a pre-trained model.")
    for cls in (DataSettings, ColumnSettings):
        add_flags(training, cls)
    add_train_flags(training, output=Path("runs/classify"))
    predicting = commands.add_parser("predict", help="predict", description="The class or number of texts, as TSV.")
    predicting.add_argument("--model", type=Path, default=Path("runs/classify"), help="what `train` wrote")
    predicting.add_argument("--text", nargs="+", metavar="TEXT", help="texts")
    predicting.add_argument("--pair", nargs="+", metavar="TEXT", help="the second text of each, for pairs")
    predicting.add_argument("--file", type=Path, metavar="PATH", help="a .tsv, .csv or .jsonl of texts")
    add_flags(predicting, ColumnSettings)
    predicting.add_argument("--output", type=Path, metavar="PATH", help="file to write instead of the screen")
    args = parser.parse_args()

    def command(processes: Processes) -> None:
        if args.command == "predict":
            predict(args, processes)
            return
        of = {cls: flag_values(args, [f.name for f in fields(cls)]) for cls in (DataSettings, ColumnSettings)}
        data = read_data(DataSettings(**of[DataSettings]), ColumnSettings(**of[ColumnSettings]))
        start, settings = settings_of(args)
        train(start, settings, data, processes)
        say(
            processes,
            f"{start.output}: predict with `python -m finetune.classify predict --model {start.output} --text ...`",
        )

    return run_with_processes(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
