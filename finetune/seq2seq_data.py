"""Pairs of a source and a target in files: JSON lines, TSV, CSV or Parquet by their columns' names, and SQuAD's JSON.

What is empty is left out and counted. A value may be a list of the vocabulary's entries instead of text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from data_prep.tokenizer import Tokenizer
from finetune.classify_model import tokenize
from finetune.seq2seq_model import Seq2SeqSettings, source_ids, target_ids
from finetune.squad import read_squad
from finetune.tables import Text, read_texts
from pretrain.layout import Layout, seq2seq_layout

QUESTION_SOURCE, QUESTION_TARGET = ("paragraph", "answer"), "question"
_MAX_UNKNOWN = 0.5
"""A larger share of unknown entries in lists of tokens means that they are another tokenizer's."""


@dataclass(frozen=True)
class PairColumns:
    """Which columns of a file are read."""

    source_column: str = "src"
    """Column of the source; a list there is taken for tokens of the vocabulary."""
    target_column: str = "tgt"
    """Column of the target."""


@dataclass(frozen=True)
class Pairs:
    """Texts of a file."""

    path: Path
    sources: list[tuple[Text, ...]]
    """Each of one part, or of paragraph and answer."""
    targets: list[Text]
    """None, where only sources were asked for."""
    where: Callable[[int], str]
    """A pair's place in the file, for messages."""
    num_without_answer: int = 0
    """Questions of SQuAD that have no answer, and are left out."""

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, kept: Sequence[bool]) -> Pairs:
        """Some of them."""
        places = [*compress(range(len(self)), kept)]
        targets = [self.targets[place] for place in places] if self.targets else []
        return Pairs(
            self.path, [self.sources[place] for place in places], targets, lambda i: self.where(places[i]), self.num_without_answer
        )  # fmt: skip


def read_pairs(
    path: Path, columns: PairColumns, *, question_generation: bool = False, needs_targets: bool = True
) -> Pairs:
    """The pairs in a file, or its sources alone. Question generation reads the columns paragraph, answer and question, or SQuAD's
    JSON, of which the first answer.

    Raises ValueError or OSError, naming file and line, for what cannot be read.
    """
    if question_generation and path.suffix == ".json" and not is_lines(path):
        file = read_squad(path)
        asked = [question for question in file.questions if question.answers]
        if not asked:
            raise ValueError(f"{path}: none of its {len(file.questions)} questions has an answer; expected some")
        return Pairs(
            path, [(question.passage, question.answers[0]) for question in asked],
            [question.text for question in asked] if needs_targets else [],
            lambda i: f"{path}: question {asked[i].id}", len(file.questions) - len(asked),
        )  # fmt: skip
    names = list(QUESTION_SOURCE) if question_generation else [columns.source_column]
    num_parts = len(names)
    if needs_targets:
        names.append(QUESTION_TARGET if question_generation else columns.target_column)
    table = read_texts(path, names)
    targets = [row[-1] for row in table.rows] if needs_targets else []
    return Pairs(path, [row[:num_parts] for row in table.rows], targets, table.where)


def is_lines(path: Path) -> bool:
    """Whether its first line is an object of its own, and none of SQuAD's."""
    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            value = json.loads(file.readline())
        except json.JSONDecodeError:
            return False
    return isinstance(value, dict) and "data" not in value


def token_ids(tokenizer: Tokenizer, texts: Sequence[Text]) -> list[list[int]]:
    """Token ids of each text, or list of tokens. Raises ValueError for lists of another tokenizer's tokens."""
    found: list[list[int]] = [[] for _ in texts]
    of_text = [place for place, text in enumerate(texts) if isinstance(text, str)]
    for place, ids in zip(of_text, tokenize(tokenizer, [str(texts[place]) for place in of_text]), strict=True):
        found[place] = ids
    num_tokens = num_unknown = 0
    known: dict[str, int] = {}
    for place, tokens in enumerate(texts):
        if isinstance(tokens, str):
            continue
        for token in tokens:
            if token not in known:
                known[token] = tokenizer.id_of_piece(token)
        found[place] = [known[token] for token in tokens]
        num_tokens += len(tokens)
        num_unknown += sum(
            known[token] == tokenizer.unk_id and tokenizer.piece(tokenizer.unk_id) != token for token in tokens
        )
    if num_unknown > _MAX_UNKNOWN * num_tokens:
        raise ValueError(
            f"{num_unknown:,} of {num_tokens:,} tokens are no entries of the vocabulary {tokenizer.path}: they were made by "
            "another tokenizer; give texts instead, or the weights of that tokenizer"
        )
    return found


def are_filled(pairs: Pairs) -> list[bool]:
    """Whether nothing of each is empty."""
    return [
        all(_has_text(part) for part in (*source, *pairs.targets[i : i + 1])) for i, source in enumerate(pairs.sources)
    ]


def _has_text(text: Text) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


@dataclass(frozen=True)
class Examples:
    """Pairs as the model takes them."""

    sources: list[list[int]]
    targets: list[list[int]]
    num_cut_sources: int
    num_cut_targets: int
    num_cut_tokens: int
    """Of sources."""

    @property
    def lengths(self) -> np.ndarray:
        """Slots of each."""
        return np.array(
            [len(s) + 2 * len(t) - 1 for s, t in zip(self.sources, self.targets, strict=True)], dtype=np.int64
        )

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each target, [EOS] included."""
        return np.array([*map(len, self.targets)], dtype=np.int64)

    def layout(
        self, samples: Sequence[int], mask_id: int, turns: Sequence[Sequence[int]] | None = None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Layout:  # fmt: skip
        """Of some of them; see seq2seq_layout."""
        return seq2seq_layout(
            [self.sources[i] for i in samples], [self.targets[i] for i in samples], mask_id=mask_id, turns=turns, given=given
        )  # fmt: skip


def make_sources(
    tokenizer: Tokenizer, sources: Sequence[tuple[Text, ...]], settings: Seq2SeqSettings
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each source as the model takes it, and how many of its tokens are cut."""
    parts = [token_ids(tokenizer, of_part) for of_part in zip(*sources, strict=True)]
    made = [source_ids(tokenizer, of_source, settings.max_source_tokens) for of_source in zip(*parts, strict=True)]
    return [ids for ids, _ in made], [num_cut for _, num_cut in made]


def make_examples(tokenizer: Tokenizer, pairs: Pairs, settings: Seq2SeqSettings) -> Examples:
    """Tokenize, cut and add the special tokens. Raises ValueError, naming the file."""
    try:
        sources, num_cut = make_sources(tokenizer, pairs.sources, settings)
        targets = [
            target_ids(tokenizer, ids, settings.max_target_tokens) for ids in token_ids(tokenizer, pairs.targets)
        ]
    except ValueError as error:
        raise ValueError(f"{pairs.path}: {error}") from None
    return Examples(
        sources, [ids for ids, _ in targets], sum(map(bool, num_cut)), sum(bool(n) for _, n in targets), sum(num_cut)
    )
