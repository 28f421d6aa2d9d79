"""Texts, or pairs of texts, with classes or numbers: read from files, and as the model takes them.

A text is "[SOS] text [EOS]", a pair "[SOS] a [EOS] b [EOS]" with segment 1 from b on. What is too long loses tokens at the
end, of a pair the longer of the two until they are even.

Texts are not kept: a file is read once for its labels, and again when its texts are tokenized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokenizer import Tokenizer
from finetune.glue import GLUE, SKIPPING, TRAIN, GlueTask
from finetune.tables import Column, TableFile, as_label, as_number, as_text
from finetune.tokens import TokenLists, TokenListsBuilder, in_chunks, tokenize
from pretrain.layout import Layout, encoder_layout

_SHOWN_CLASSES = 20


@dataclass(frozen=True)
class ColumnSettings:
    """Which columns of a file are read."""

    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text, for pairs."""

    @property
    def texts(self) -> list[Column[str]]:
        """The columns of texts."""
        columns = [Column(self.text_column, as_text, "--text_column")]
        return columns if self.pair_column is None else [*columns, Column(self.pair_column, as_text, "--pair_column")]


@dataclass(frozen=True)
class DataSettings:
    """What is learnt: a task of GLUE, or the columns of files."""

    glue: str | None = None
    """Task of GLUE: cola, sst-2, mrpc, sts-b, qqp, mnli, qnli, rte or wnli; needs --data."""
    data: Path | None = None
    """With --glue: the task's folder, as GLUE has it: train.tsv, dev.tsv, test.tsv."""
    train_file: Path | None = None
    """Without --glue: what to train on, .tsv, .csv, .jsonl or .parquet."""
    validation_file: Path | None = None
    """Without --glue: what the best weights are chosen by, .tsv, .csv, .jsonl or .parquet."""
    label_column: str = "label"
    """Column of the class or number."""
    regression: bool = False
    """Labels are numbers, not classes."""


@dataclass(frozen=True)
class Target:
    """What is predicted."""

    labels: tuple[str, ...] = ()
    """The classes; none for a number."""
    mean: float = 0.0
    scale: float = 1.0
    """A number is the model's output x scale + mean."""

    @property
    def is_regression(self) -> bool:
        """Whether it is a number."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Of the model."""
        return max(1, len(self.labels))


@dataclass(frozen=True)
class Labelled:
    """Texts with labels, in a file."""

    table: TableFile
    num_texts: int
    """1, or 2 for pairs."""
    labels: np.ndarray
    """Classes, int64, or numbers, float64: one of each row."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.table.path

    def texts(self) -> Iterator[tuple[str, ...]]:
        """Read the texts of each row."""
        return (row.values[: self.num_texts] for row in self.table)

    def names(self, target: Target) -> list[str]:
        """Return each row's class by its name."""
        return [target.labels[place] for place in self.labels.tolist()]

    def in_words(self, target: Target) -> str:
        """Return what was read, for the user: rows, classes and how many rows each has, or the range of the numbers."""
        words = f"{self.path}: {len(self.labels):,} rows"
        if target.is_regression:
            words += f"; numbers from {self.labels.min():g} to {self.labels.max():g}, mean {self.labels.mean():.4g}"
        else:
            counts = np.bincount(self.labels, minlength=len(target.labels)).tolist()
            shown = [f"{label} {n:,}" for label, n in zip(target.labels, counts, strict=True)][:_SHOWN_CLASSES]
            more = len(target.labels) - len(shown)
            words += f" of {len(target.labels)} classes: {', '.join(shown)}" + (f" and {more} more" if more else "")
        if self.table.num_skipped:
            words += (
                f"; {self.table.num_skipped:,} rows with too few or too many fields are left out (the first: line "
                f"{self.table.first_skipped})"
            )
        return words


@dataclass(frozen=True)
class Data:
    """What is learnt, read."""

    train: Labelled
    validation: dict[str, Labelled]
    """By the suffix of their metrics' names."""
    target: Target
    score: tuple[str, ...]
    """The metrics whose mean chooses the best weights."""
    asked: tuple[DataSettings, ColumnSettings]
    """What it was read by."""
    glue: GlueTask | None = None

    @property
    def parts(self) -> dict[str, Labelled]:
        """Everything that is read, by its role in the training."""
        return {"train": self.train, **{f"validation{suffix}": part for suffix, part in self.validation.items()}}

    @property
    def is_of_pairs(self) -> bool:
        """Whether a sample is two texts."""
        return self.train.num_texts == 2

    def identity(self) -> dict[str, Any]:
        """What of the task, besides the files' contents, a training's result depends on."""
        settings, columns = self.asked
        own = {
            "name": "classify",
            "glue": settings.glue,
            "labels": list(self.target.labels),
            "regression": self.target.is_regression,
        }
        if settings.glue is not None:
            return own
        return {**own, "label_column": settings.label_column, **vars(columns)}


def read_data(settings: DataSettings, columns: ColumnSettings) -> Data:
    """Read and check what the flags name. Raises ValueError or OSError, naming flag, or file and line."""
    if settings.glue is not None:
        return _read_glue(settings, columns)
    if settings.train_file is None or settings.validation_file is None or settings.data is not None:
        raise ValueError("expected --train_file and --validation_file, or --glue and --data")
    train, target = read_labelled(settings.train_file, settings, columns)
    validation, _ = read_labelled(settings.validation_file, settings, columns, target)
    score = ("pearson", "spearman") if settings.regression else ("accuracy",)
    return Data(train, {"": validation}, target, score, (settings, columns))


def read_labelled(
    path: Path, settings: DataSettings, columns: ColumnSettings, target: Target | None = None
) -> tuple[Labelled, Target]:
    """Return what a file holds, and the target: the given one, or that of the file's labels. Raises ValueError, see `read_data`."""
    reads: Callable[[Any], Any] = as_number if settings.regression else as_label
    wanted = [*columns.texts, Column(settings.label_column, reads, "--label_column")]
    return _labelled(TableFile(path, wanted), settings.regression, target, settings.train_file)


def _read_glue(settings: DataSettings, columns: ColumnSettings) -> Data:
    flag = f"--glue {settings.glue}"
    if settings.glue not in GLUE:
        raise ValueError(f"{flag}: expected one of {', '.join(GLUE)}")
    if settings.data is None or settings.train_file or settings.validation_file:
        raise ValueError(f"{flag}: needs --data FOLDER, and no --train_file or --validation_file")
    if settings.regression or settings.label_column != DataSettings().label_column or columns != ColumnSettings():
        raise ValueError(f"{flag}: knows its columns and labels; leave out --regression and the --..._column flags")
    task, folder = GLUE[settings.glue], settings.data
    known = Target(task.labels) if task.labels else None
    reads: Callable[[Any], Any] = _as_similarity if task.is_regression else as_label

    def labelled(name: str, target: Target | None) -> tuple[Labelled, Target]:
        names: Sequence[str | int] = task.numbered or [*task.test_columns(""), task.label]
        wanted = [*(Column[Any](of_text, as_text) for of_text in names[:-1]), Column(names[-1], reads)]
        table = TableFile(
            folder / name, wanted, has_header=task.numbered is None, skips_broken=settings.glue == SKIPPING and name == TRAIN
        )  # fmt: skip
        return _labelled(table, task.is_regression, target, f"GLUE's {settings.glue}")

    train, target = labelled(TRAIN, known)
    validation = {suffix: labelled(name, target)[0] for suffix, name in task.validation}
    return Data(train, validation, target, task.metrics, (settings, columns), task)


def _as_similarity(value: Any) -> float:
    number = as_number(value)
    if not 0 <= number <= 5:
        raise ValueError(f"is {number:g}, expected 0 to 5, as STS-B's scores are")
    return number


def _labelled(
    table: TableFile, is_regression: bool, target: Target | None, source: Path | str | None
) -> tuple[Labelled, Target]:
    """Read the labels of a file; of a training file without known classes they make the target.

    Raises ValueError for a label that the target, which is that of `source`, does not have, and for what cannot be learnt.
    """
    num_texts = len(table.columns) - 1
    if is_regression:
        numbers = np.array([row.values[-1] for row in table])
        if target is None:
            deviation = float(np.std(numbers))
            if not deviation:
                raise ValueError(f"{table.path}: all labels are {numbers[0]:g}; expected different numbers")
            target = Target(mean=float(np.mean(numbers)), scale=deviation)
        return Labelled(table, num_texts, numbers), target
    classes = {label: place for place, label in enumerate(target.labels)} if target is not None else {}
    found = []
    for row in table:
        label = row.values[-1]
        if target is not None and label not in classes:
            shown = ", ".join(target.labels[:_SHOWN_CLASSES]) + (", ..." if len(classes) > _SHOWN_CLASSES else "")
            raise ValueError(
                f"{table.where(row.line)}: label {label!r} is none of those of {source}: {shown}; correct it, or remove the row"
            )
        found.append(classes.setdefault(label, len(classes)))
    labels = np.array(found, dtype=np.int64)
    if target is not None:
        return Labelled(table, num_texts, labels), target
    if len(classes) < 2:
        raise ValueError(f"{table.path}: the only label is {next(iter(classes))!r}; expected two or more")
    names = sorted(classes, key=lambda label: (len(label), label) if label.isdecimal() else (0, label))
    places = np.empty(len(names), dtype=np.int64)
    places[[classes[name] for name in names]] = np.arange(len(names))
    return Labelled(table, num_texts, places[labels]), Target(tuple(names))


@dataclass(frozen=True)
class Inputs:
    """Texts as the model takes them."""

    ids: TokenLists
    num_first: np.ndarray
    """Tokens of segment 0 of each."""
    num_truncated: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return self.ids.lengths

    def segments(self, sample: int) -> list[int]:
        """Return the segment of each token of a sample."""
        first = int(self.num_first[sample])
        return [0] * first + [1] * (len(self.ids[sample]) - first)

    def layout(self, samples: Sequence[int]) -> Layout:
        """Return the layout of some of them, in which [SOS] is needed."""
        ids = [self.ids[i].tolist() for i in samples]
        return encoder_layout(ids, [self.segments(i) for i in samples], [[0]] * len(samples))


def make_inputs(tokenizer: Tokenizer, rows: Iterable[tuple[str, ...]], max_length_tokens: int) -> Inputs:
    """Tokenize rows of one text or of two, truncate them and add the special tokens."""
    sos, eos = (np.array([i], dtype=np.int32) for i in (tokenizer.sos_id, tokenizer.eos_id))
    made, num_first, num_truncated = TokenListsBuilder(tokenizer.vocab_size), list[np.ndarray](), 0
    for chunk in in_chunks(rows):
        ids, firsts = [], []
        for parts in zip(*(tokenize(tokenizer, texts) for texts in zip(*chunk, strict=True)), strict=True):
            a, b = parts[0], parts[1] if len(parts) == 2 else parts[0][:0]
            room = max_length_tokens - len(parts) - 1
            if len(a) + len(b) > room:
                num_truncated += 1
                kept_b = min(len(b), max(room // 2, room - len(a)))
                a, b = a[: room - kept_b], b[:kept_b]
            ids.append(np.concatenate([sos, a, eos, *([b, eos] if len(parts) == 2 else [])]))
            firsts.append(len(a) + 2)
        made.add(ids)
        num_first.append(np.array(firsts, dtype=np.int32))
    return Inputs(made.build(), np.concatenate([np.zeros(0, dtype=np.int32), *num_first]), num_truncated)
