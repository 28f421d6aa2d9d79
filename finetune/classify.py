"""Fine-tune a pre-trained model to classes or numbers of texts or pairs: on GLUE's tasks, or on any TSV, CSV, JSON-lines or Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.console import ArgumentParser, add_flags
from data_prep.files import write_whole
from finetune.classify_data import ColumnSettings, Data, DataSettings, Inputs, Labelled, make_inputs, read_data
from finetune.classify_model import Classifier
from finetune.figures import draw_confusion_matrix
from finetune.glue import GlueTask, write_leaderboard_file
from finetune.identity import training_identity
from finetune.metrics import classification_metrics, regression_metrics
from finetune.processes import Processes
from finetune.runs import StartSettings, add_train_flags, from_flags, load_start, say, settings_of, train_all
from finetune.tables import read_table
from finetune.trainer import TrainSettings
from pretrain.model import PMLM


@dataclass(frozen=True)
class Part:
    """Inputs and their labels: classes, or numbers."""

    inputs: Inputs
    labels: Sequence[float] | np.ndarray


class ClassifyTask:
    """See finetune.trainer.Task."""

    score_sign = 1.0

    def __init__(self, classifier: Classifier, train: Part, validation: dict[str, Part], score: Sequence[str]) -> None:
        self._classifier, self._inputs, self._validation, self._score = classifier, train.inputs, validation, score
        self.lengths = train.inputs.lengths
        target = classifier.target
        self._targets = torch.as_tensor(train.labels)
        if target.is_regression:
            self._targets = ((torch.as_tensor(train.labels, dtype=torch.float64) - target.mean) / target.scale).float()
        self._names = [f"{name}{suffix}" for suffix in validation for name in score]
        self.score_name = self._names[0] if len(self._names) == 1 else f"mean of {' and '.join(self._names)}"

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """See Task."""
        return self._classifier.loss(self._inputs, self._targets, samples)

    def validate(self) -> dict[str, float]:
        """See Task."""
        values: dict[str, float] = {}
        for suffix, part in self._validation.items():
            outputs = self._classifier.outputs(part.inputs, "validating")
            values |= {f"{k}{suffix}": v for k, v in metrics_of(self._classifier, outputs, part.labels).items()}
        return {"score": float(np.mean([values[name] for name in self._names])), **values}

    def save(self, folder: Path) -> None:
        """See Task."""
        self._classifier.save(folder)


def metrics_of(classifier: Classifier, outputs: np.ndarray, labels: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return the metrics of the model's outputs."""
    if classifier.target.is_regression:
        return regression_metrics([float(x) for x in labels], classifier.values(outputs).tolist())
    predicted = outputs.argmax(axis=1).tolist()
    return classification_metrics([int(x) for x in labels], predicted, len(classifier.target.labels))


def train(
    start: StartSettings, settings: TrainSettings, data: Data, processes: Processes | None = None
) -> dict[str, Any]:
    """Fine-tune, draw the confusion matrix, and predict GLUE's test files if they are there; returns the summary."""
    processes = processes or Processes()
    target, folder = data.target, start.output
    pretrained = load_start(start, processes)
    parts = {}
    for role, labelled in data.parts.items():
        inputs = make_inputs(pretrained.tokenizer, labelled.texts(), start.max_length_tokens)
        parts[role] = Part(inputs, labelled.labels)
        say(processes, _in_words(labelled, data, inputs, start.max_length_tokens))
    of_validation = {suffix: parts[f"validation{suffix}"] for suffix in data.validation}

    def make_task(model: PMLM, chosen: TrainSettings) -> tuple[nn.Module, ClassifyTask]:
        classifier = Classifier.make(
            model, pretrained.tokenizer, target, start.max_length_tokens, processes, chosen.seed, pretrained.pooler,
            data.is_of_pairs,
        )  # fmt: skip
        return classifier.model, ClassifyTask(classifier, parts["train"], of_validation, data.score)

    identity = training_identity(
        pretrained.model, pretrained.pooler, pretrained.tokenizer, {role: labelled.table.sha256 for role, labelled in data.parts.items()},
        {**data.identity(), "max_length_tokens": start.max_length_tokens},
    )  # fmt: skip
    summary = train_all(start, settings, pretrained.model, identity, processes, make_task)
    best = Classifier.load(folder, processes)
    if not target.is_regression:
        for suffix, part in of_validation.items():
            predicted = best.outputs(part.inputs).argmax(axis=1)
            if processes.is_first:
                name = folder / f"confusion_matrix{suffix}.png"
                draw_confusion_matrix(name, [float(x) for x in part.labels], predicted.tolist(), target.labels)
    if data.glue is not None and (source := data.asked[0].data) is not None:
        predict_glue_tests(best, data.glue, source, folder / "test", processes)
    return summary


def _in_words(labelled: Labelled, data: Data, inputs: Inputs, max_length_tokens: int) -> str:
    words = labelled.in_words(data.target)
    if inputs.num_truncated:
        words += f"; {inputs.num_truncated:,} are cut to --max_length_tokens {max_length_tokens}"
    return words


def predict_glue_tests(
    classifier: Classifier, task: GlueTask, folder: Path, output: Path, processes: Processes
) -> None:
    """Write the leaderboard's files, for those of the task's test files that are there."""
    for file, name in task.test:
        if not (folder / file).is_file():
            continue
        table = read_table(folder / file, task.test_columns(file))
        pairs = [row[1] for row in table.rows] if len(table.rows[0]) == 2 else None
        predictions = classifier.predict([row[0] for row in table.rows], pairs)
        if processes.is_first:
            write_leaderboard_file(output / name, predictions)
        say(processes, f"{output / name}: predictions for {folder / file}")


def predict(args: Any, processes: Processes) -> None:
    """Run `python -m finetune predict` with a classifier."""
    if (args.input is None) == (args.text is None):
        raise ValueError("expected either --text or --input, of which a classifier predicts")
    if args.input is not None and args.pair is not None:
        raise ValueError("--pair goes with --text; for a file, name --pair_column")
    classifier = Classifier.load(args.model, processes)
    texts, pairs = args.text, args.pair
    if args.input is not None:
        columns = ColumnSettings(args.text_column or ColumnSettings.text_column, args.pair_column)
        table = read_table(args.input, [str(c.name) for c in columns.texts], [c.flag for c in columns.texts])
        texts, pairs = [row[0] for row in table.rows], None
        if columns.pair_column is not None:
            pairs = [row[1] for row in table.rows]
    elif args.text_column or args.pair_column:
        raise ValueError("--text_column and --pair_column go with --input")
    if classifier.target.is_regression:
        header, rows = "index\tprediction", [f"{float(value):.6g}" for value in classifier.predict(texts, pairs)]
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
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.output, content.encode())
        say(processes, f"{args.output}: {len(rows):,} predictions")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `python -m finetune classify`."""
    for cls in (DataSettings, ColumnSettings):
        add_flags(parser, cls)
    add_train_flags(parser, output=Path("runs/classify"))


def run(args: Any, processes: Processes) -> None:
    """Run `python -m finetune classify`."""
    start, settings = settings_of(args)
    data = read_data(from_flags(args, DataSettings), from_flags(args, ColumnSettings))
    train(start, settings, data, processes)
    say(processes, f"{start.output}: predict with `python -m finetune predict --model {start.output} --text ...`")
