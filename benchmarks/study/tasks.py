"""python -m benchmarks.study.tasks: fine-tune a model for a task of the study, and test it; writes OUTPUT/study.json.

The data is benchmarks.corpora's. Of a training file the first samples of a permutation are used, of the rest as many as the test
file lacks to the wanted number are tested with too; nothing is both trained on and tested.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.console import ArgumentParser, run_command
from data_prep.files import read_json, write_json, write_whole
from finetune.answer import by_question, chosen
from finetune.answer import train as train_answerer
from finetune.answer_data import AnswerSettings
from finetune.answer_model import Answerer
from finetune.batches import epoch_order
from finetune.classify import train as train_classifier
from finetune.classify_data import ColumnSettings, DataSettings, read_data, read_labelled
from finetune.classify_model import Classifier
from finetune.generate import write_file
from finetune.metrics import classification_metrics
from finetune.runs import StartSettings
from finetune.score import read_lines, score_files, text_scores
from finetune.seq2seq import TargetSettings, ValidationSettings
from finetune.seq2seq import train as train_writer
from finetune.seq2seq_data import Seq2SeqSettings
from finetune.seq2seq_model import Writer
from finetune.squad import read_squad, squad_metrics
from finetune.tables import read_table
from finetune.trainer import TrainSettings
from finetune.weights import load_pretrained
from pretrain.export import StoredModel, is_export, write_export
from pretrain.model import PMLM

RESULT = "study.json"
_PERMUTATION_SEED = 0
_LABEL = "label"
WRITTEN = "test.jsonl"
"""What a model wrote for the test file, in its run."""


@dataclass(frozen=True)
class Files:
    """A task's samples, in files of their own."""

    train: Path
    validation: Path
    test: Path


@dataclass(frozen=True)
class Sizes:
    """How many samples of each are used, where there are as many."""

    train: int
    validation: int
    test: int


class Task(Protocol):
    """A task of the study."""

    @property
    def name(self) -> str:
        """Its folder in benchmarks.corpora's tasks."""

    @property
    def what(self) -> str:
        """For tables."""

    @property
    def metric(self) -> str:
        """Which of what `run` gives is the figure."""

    @property
    def sizes(self) -> Sizes:
        """How many samples are used."""

    def prepare(self, corpora: Path, folder: Path) -> Files:
        """Write the samples used, whole; what is there is left alone."""

    def run(self, files: Files, weights: Path, output: Path, seed: int) -> dict[str, float]:
        """Fine-tune in `output`, or go on there, and test the weights that were best in validation."""

    def floors(self, files: Files) -> dict[str, dict[str, float]]:
        """What needs no model, by name."""


@dataclass(frozen=True)
class Classification:
    """Texts, or pairs of them, to classes; accuracy in percent."""

    name: str
    what: str
    sizes: Sizes
    training: dict[str, Any]
    """Of TrainSettings."""
    columns: ColumnSettings
    max_length_tokens: int = 128
    metric: str = "accuracy"

    def prepare(self, corpora: Path, folder: Path) -> Files:
        """See Task."""

        def rows_of(path: Path) -> list[str]:
            return path.read_text(encoding="utf-8").splitlines()[1:]

        source = corpora / "tasks" / self.name
        header = (source / "train.tsv").read_text(encoding="utf-8").splitlines()[0]
        return _write_files(
            folder, ".tsv", {part: rows_of(source / f"{part}.tsv") for part in ("train", "validation", "test")}, self.sizes,
            lambda rows: "\n".join([header, *rows]) + "\n",
        )  # fmt: skip

    def run(self, files: Files, weights: Path, output: Path, seed: int) -> dict[str, float]:
        """See Task."""
        settings = DataSettings(train_file=files.train, validation_file=files.validation)
        data = read_data(settings, self.columns)
        train_classifier(
            StartSettings(weights, output, max_length_tokens=self.max_length_tokens),
            TrainSettings(seed=seed, **self.training),
            data,
        )
        test, _ = read_labelled(files.test, settings, self.columns, data.target)
        texts, pairs = (
            [*zip(*test.texts(), strict=True)] if test.num_texts == 2 else ([text for (text,) in test.texts()], None)
        )
        places = {label: place for place, label in enumerate(data.target.labels)}
        predicted = [places[str(label)] for label in Classifier.load(output).predict(texts, pairs)]
        values = classification_metrics(test.labels.tolist(), predicted, len(places))
        return {name: 100 * value for name, value in values.items()}

    def floors(self, files: Files) -> dict[str, dict[str, float]]:
        """See Task."""
        labels = [row[0] for row in read_table(files.test, [_LABEL]).rows]
        return {"most frequent class": {self.metric: 100 * max(map(labels.count, set(labels))) / len(labels)}}


@dataclass(frozen=True)
class QuestionAnswering:
    """Spans of passages that answer questions, or that none does; F1 and exact match in percent."""

    name: str
    what: str
    sizes: Sizes
    """Passages."""
    training: dict[str, Any]
    max_length_tokens: int = 256
    metric: str = "f1"

    def prepare(self, corpora: Path, folder: Path) -> Files:
        """See Task."""

        def passages_of(path: Path) -> list[dict[str, Any]]:
            return [passage for article in read_json(path)["data"] for passage in article["paragraphs"]]

        def as_squad(passages: Sequence[dict[str, Any]]) -> str:
            return json.dumps({"version": "v2.0", "data": [{"title": "", "paragraphs": [*passages]}]}) + "\n"

        source = corpora / "tasks" / self.name
        parts = {part: passages_of(source / f"{part}.json") for part in ("train", "validation", "test")}
        return _write_files(folder, ".json", parts, self.sizes, as_squad)

    def run(self, files: Files, weights: Path, output: Path, seed: int) -> dict[str, float]:
        """See Task."""
        train_answerer(
            StartSettings(weights, output, max_length_tokens=self.max_length_tokens),
            TrainSettings(seed=seed, **self.training), AnswerSettings(), files.train, files.validation,
        )  # fmt: skip
        answerer, file = Answerer.load(output), read_squad(files.test)
        answers = by_question(file.questions, answerer.answers(file.questions, answerer.windows(file.questions)))
        return squad_metrics(file.questions, chosen(answerer, answers), file.is_v2)

    def floors(self, files: Files) -> dict[str, dict[str, float]]:
        """See Task."""
        file = read_squad(files.test)
        nothing = {question.id: "" for question in file.questions}
        return {"never an answer": squad_metrics(file.questions, nothing, file.is_v2)}


@dataclass(frozen=True)
class Writing:
    """Sources to targets; ROUGE and others in percent."""

    name: str
    what: str
    sizes: Sizes
    training: dict[str, Any]
    limits: Seq2SeqSettings
    metric: str = "rouge_l"

    def prepare(self, corpora: Path, folder: Path) -> Files:
        """See Task."""
        source = corpora / "tasks" / self.name
        parts = {
            part: (source / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            for part in ("train", "validation", "test")
        }
        return _write_files(folder, ".jsonl", parts, self.sizes, lambda rows: "\n".join(rows) + "\n")

    def run(self, files: Files, weights: Path, output: Path, seed: int) -> dict[str, float]:
        """See Task."""
        train_writer(
            StartSettings(weights, output, max_length_tokens=self.limits.max_positions),
            TrainSettings(seed=seed, **self.training), self.limits, TargetSettings(),
            ValidationSettings(generated_pairs=0), files.train, files.validation,
        )  # fmt: skip
        write_file(output, Writer.load(output), files.test, "src", output / WRITTEN, batch_size=32)
        result = score_files(
            output / WRITTEN, [files.test], prediction_column="text", reference_column="tgt", ignore_case=True
        )
        write_json(output / "scores.json", result)
        scores: dict[str, float] = result["scores"]
        return scores

    def floors(self, files: Files) -> dict[str, dict[str, float]]:
        """What is written by copying the beginning of the source."""
        sources, targets = (read_lines(files.test, column) for column in ("src", "tgt"))
        num_words = round(statistics.fmean(len(text.split()) for text in read_lines(files.train, "tgt")))
        leads = {
            "lead: first sentence": [re.split(r"(?<=[.!?:])\s", text)[0] for text in sources],
            f"lead: {num_words} words": [" ".join(text.split()[:num_words]) for text in sources],
        }
        references = [[target] for target in targets]
        return {name: text_scores(texts, references, ignore_case=True)[0] for name, texts in leads.items()}


def random_twin(weights: Path, folder: Path, seed: int) -> Path:
    """An export of the same size and tokenizer, with initial weights."""
    if not is_export(folder):
        pretrained = load_pretrained(weights)
        torch.manual_seed(seed)
        model = PMLM(pretrained.model.config)
        named = {name: parameter.detach() for name, parameter in model.named_parameters()}
        write_export(folder, StoredModel(folder, model.config, named, pretrained.tokenizer))
    return folder


def _write_files(
    folder: Path, suffix: str, parts: dict[str, list[Any]], sizes: Sizes, as_text: Callable[[list[Any]], str]
) -> Files:
    order = epoch_order(_PERMUTATION_SEED, 0, len(parts["train"])).tolist()
    unused = [parts["train"][i] for i in order[sizes.train :]]
    chosen = {
        "train": [parts["train"][i] for i in order[: sizes.train]],
        "validation": random.Random(_PERMUTATION_SEED).sample(
            parts["validation"], min(sizes.validation, len(parts["validation"]))
        ),
        "test": [*parts["test"], *unused][: sizes.test],
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: folder / f"{part}{suffix}" for part in chosen}
    for part, rows in chosen.items():
        text = as_text(rows).encode()
        if not files[part].is_file() or files[part].read_bytes() != text:
            write_whole(files[part], text)
    return Files(**files)


def main() -> int:
    """Entry point; returns the exit status."""
    from benchmarks.study.plan import TASKS

    tasks = {task.name: task for task in TASKS}
    parser = ArgumentParser(prog="python -m benchmarks.study.tasks", description=__doc__)
    parser.add_argument("--task", choices=tasks, required=True, help="which")
    for part in ("train", "validation", "test"):
        parser.add_argument(
            f"--{part}_file", type=Path, required=True, metavar="PATH", help="as benchmarks.study wrote it"
        )
    parser.add_argument("--weights", type=Path, required=True, metavar="PATH", help="what is fine-tuned")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the run's folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of new weights, order and dropout")
    args = parser.parse_args()

    def command() -> None:
        torch.set_flush_denormal(True)
        files = Files(args.train_file, args.validation_file, args.test_file)
        scores = tasks[args.task].run(files, args.weights, args.output, args.seed)
        write_json(args.output / RESULT, {"scores": scores})

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
