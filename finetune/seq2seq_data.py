"""Pairs of a source and a target: in files, and as the model takes them. Training and decoding share all of it.

A source is "[SOS] source [EOS]", for question generation "[SOS] paragraph [EOS] answer [EOS]"; a target is "target [EOS]".
Their slots are those of `pretrain.layout.seq2seq_layout`. A value in a file may be a list of the vocabulary's entries instead of
text. Files are JSON lines, TSV, CSV or Parquet, read by their columns' names, and SQuAD's JSON; texts are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import NotJSON, parse_json
from data_prep.tokenizer import Tokenizer
from finetune.search_settings import SearchSettings
from finetune.squad import read_squad
from finetune.tables import Column, TableFile, Text, as_text_or_tokens
from finetune.tokens import TokenLists, TokenListsBuilder, in_chunks, tokenize
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
class Seq2SeqSettings:
    """What a model is for; in its config.json under "task". The defaults are of no recipe."""

    max_source_tokens: int = 256
    """Tokens of a source, special ones included; longer ones are cut."""
    max_target_tokens: int = 64
    """Tokens of a target, its [EOS] included; longer ones are cut."""
    question_generation: bool = False
    """Sources are paragraphs with answers, targets questions."""
    num_beams: int = 5
    """Beams of a search, unless it is told otherwise."""
    length_penalty: float = 1.0
    """Of a search: hypotheses are ranked by their log-probability / (length ** this)."""
    released_length_penalty: bool = False
    """Of a search: rank as UniLM's released code does, for which the recipes' penalties are; see `generate`."""

    def __post_init__(self) -> None:
        least = {"max_source_tokens": 8, "max_target_tokens": 2, "num_beams": 1}
        faults = [f"{k} is {getattr(self, k)}, expected at least {v}" for k, v in least.items() if getattr(self, k) < v]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def max_positions(self) -> int:
        """That the position table must have."""
        return self.max_source_tokens + self.max_target_tokens

    def search(self) -> SearchSettings:
        """Return how targets are decoded unless it is told otherwise."""
        return SearchSettings(
            num_beams=self.num_beams, length_penalty=self.length_penalty, released_length_penalty=self.released_length_penalty,
            max_length_tokens=self.max_target_tokens,
        )  # fmt: skip


# ---- files


@dataclass(frozen=True)
class Pair:
    """A source, and a target if one was asked for."""

    where: Callable[[], str]
    """Its place in the file, for messages."""
    source: tuple[Text, ...]
    """One part, or paragraph and answer."""
    target: Text | None = None

    @property
    def is_filled(self) -> bool:
        """Whether no part of it is empty."""
        parts = self.source if self.target is None else (*self.source, self.target)
        return all(bool(part.strip() if isinstance(part, str) else part) for part in parts)


class Pairs:
    """The pairs of a file, which is read for each pass over them: `for pair in pairs`."""

    def __init__(
        self, path: Path, pairs: Callable[[], Iterable[Pair]], sha256: Callable[[], str], num_without_answer: int = 0
    ) -> None:
        self.path, self._pairs, self._sha256 = path, pairs, sha256
        self.num_without_answer = num_without_answer
        """Questions of SQuAD that have no answer, and are left out."""

    def __iter__(self) -> Iterator[Pair]:
        yield from self._pairs()

    @property
    def sha256(self) -> str:
        """Hash of the file; known after the first pass."""
        return self._sha256()


def read_pairs(
    path: Path, columns: PairColumns, *, question_generation: bool = False, needs_targets: bool = True
) -> Pairs:
    """Return the pairs in a file, or its sources only. Question generation reads the columns paragraph, answer and question, or SQuAD's
    JSON, of which the first answer.

    Raises ValueError or OSError, naming file and line, for what cannot be read, at the latest when the pairs are read.
    """
    if question_generation and path.suffix == ".json" and not is_lines(path):
        file = read_squad(path)
        asked = [question for question in file.questions if question.answers]
        if not asked:
            raise ValueError(f"{path}: none of its {len(file.questions)} questions has an answer; expected some")

        def questions() -> Iterator[Pair]:
            for q in asked:
                where = f"{path}: question {q.id}"
                yield Pair(lambda where=where: where, (q.passage, q.answers[0]), q.text if needs_targets else None)  # type: ignore[misc]

        return Pairs(path, questions, lambda: file.sha256, len(file.questions) - len(asked))
    wanted = (
        [(name, "") for name in QUESTION_SOURCE]
        if question_generation
        else [(columns.source_column, "--source_column")]
    )
    num_parts = len(wanted)
    if needs_targets:
        wanted.append((QUESTION_TARGET, "") if question_generation else (columns.target_column, "--target_column"))
    table = TableFile(path, [Column(name, as_text_or_tokens, flag) for name, flag in wanted])

    def rows() -> Iterator[Pair]:
        for row in table:
            where = lambda line=row.line: table.where(line)  # noqa: E731
            yield Pair(where, row.values[:num_parts], row.values[-1] if needs_targets else None)

    return Pairs(path, rows, lambda: table.sha256)


def is_lines(path: Path) -> bool:
    """Return whether a file's first line is an object of its own, and none of SQuAD's."""
    with open(path, "rb") as file:
        try:
            value = parse_json(file.readline().decode("utf-8-sig", errors="replace"))
        except NotJSON:
            return False
    return isinstance(value, dict) and "data" not in value


# ---- tokens


def source_ids(tokenizer: Tokenizer, parts: Sequence[Sequence[int]], max_source_tokens: int) -> tuple[list[int], int]:
    """Return a source's tokens, and how many of its own are cut: the ends of parts, of the longest
    until it is no longer than the others."""
    room, kept = max_source_tokens - len(parts) - 1, [0] * len(parts)
    for num_before, place in enumerate(sorted(range(len(parts)), key=lambda place: len(parts[place]))):
        kept[place] = min(len(parts[place]), room // (len(parts) - num_before))
        room -= kept[place]
    ids = [tokenizer.sos_id]
    for part, num_tokens in zip(parts, kept, strict=True):
        ids += [*part[:num_tokens], tokenizer.eos_id]
    return ids, sum(map(len, parts)) - sum(kept)


def target_ids(tokenizer: Tokenizer, ids: Sequence[int], max_target_tokens: int) -> tuple[list[int], int]:
    """Return a target's tokens, and how many of its own are cut."""
    kept = ids[: max_target_tokens - 1]
    return [*kept, tokenizer.eos_id], len(ids) - len(kept)


class TextEncoder:
    """Texts and lists of tokens to ids, chunk by chunk; what of the lists is not in the vocabulary is counted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._num_tokens = self._num_unknown = 0

    def ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Return the token ids of each text, or list of tokens."""
        tokenizer, known = self._tokenizer, self._known
        found: list[list[int]] = [[] for _ in texts]
        of_text = [place for place, text in enumerate(texts) if isinstance(text, str)]
        for place, ids in zip(of_text, tokenize(tokenizer, [str(texts[place]) for place in of_text]), strict=True):
            found[place] = ids.tolist()
        for place, tokens in enumerate(texts):
            if isinstance(tokens, str):
                continue
            for token in tokens:
                if token not in known:
                    known[token] = tokenizer.id_of_piece(token)
            found[place] = [known[token] for token in tokens]
            self._num_tokens += len(tokens)
            self._num_unknown += sum(
                known[token] == tokenizer.unk_id and tokenizer.piece(tokenizer.unk_id) != token for token in tokens
            )
        return found

    def refuse_unknown(self, source: object) -> None:
        """Raise ValueError if most of the lists' tokens are another tokenizer's."""
        if self._num_unknown > _MAX_UNKNOWN * self._num_tokens:
            raise ValueError(
                f"{source}: {self._num_unknown:,} of {self._num_tokens:,} tokens are no entries of the vocabulary {self._tokenizer.path}: "
                "they were made by another tokenizer; give texts instead, or the weights of that tokenizer"
            )


@dataclass(frozen=True)
class Examples:
    """Pairs as the model takes them."""

    sources: TokenLists
    targets: TokenLists
    """Empty lists where no targets were asked for."""
    is_filled: np.ndarray
    """Of each pair of the file, whether nothing of it is empty. Pairs with something empty are examples only in `make_sources`."""
    first_empty: str = ""
    """Place of the first pair with something empty."""
    num_cut_sources: int = 0
    num_cut_targets: int = 0
    num_cut_tokens: int = 0
    """Of sources."""

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> np.ndarray:
        """Slots of each."""
        lengths: np.ndarray = self.sources.lengths + 2 * self.targets.lengths - 1
        return lengths

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each target, [EOS] included."""
        return self.targets.lengths

    def layout(
        self, samples: Sequence[int], mask_id: int, turns: Sequence[Sequence[int]] | None = None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Layout:  # fmt: skip
        """Return the layout of some of them; see seq2seq_layout."""
        sources, targets = ([lists[i].tolist() for i in samples] for lists in (self.sources, self.targets))
        return seq2seq_layout(sources, targets, mask_id=mask_id, turns=turns, given=given)


def make_examples(tokenizer: Tokenizer, pairs: Pairs, settings: Seq2SeqSettings) -> Examples:
    """Tokenize pairs, cut them and add the special tokens; what has an empty part is left out.

    Raises ValueError for a file in which every pair has an empty part, and for lists of another tokenizer's tokens.
    """
    examples = _made(tokenizer, pairs, settings, keeps_empty=False)
    if not len(examples):
        raise ValueError(
            f"{pairs.path}: none of its {len(examples.is_filled):,} pairs has both a source and a target; expected some"
        )
    return examples


def make_sources(tokenizer: Tokenizer, pairs: Iterable[Pair], settings: Seq2SeqSettings) -> Examples:
    """Tokenize sources, cut them and add the special tokens; the empty ones stay, so that each has its place."""
    return _made(tokenizer, pairs, settings, keeps_empty=True)


def _made(tokenizer: Tokenizer, pairs: Iterable[Pair], settings: Seq2SeqSettings, keeps_empty: bool) -> Examples:
    of_targets = TextEncoder(tokenizer)
    of_parts: list[TextEncoder] = []
    sources, targets = (TokenListsBuilder(tokenizer.vocab_size) for _ in range(2))
    is_filled, first_empty, cut_sources, cut_targets = list[np.ndarray](), "", list[int](), 0
    for chunk in in_chunks(pairs):
        filled = [pair.is_filled for pair in chunk]
        if not all(filled) and not first_empty:
            first_empty = chunk[filled.index(False)].where()
        is_filled.append(np.array(filled))
        kept = chunk if keeps_empty else [pair for pair, is_one in zip(chunk, filled, strict=True) if is_one]
        texts = [*zip(*(pair.source for pair in kept), strict=True)]
        of_parts = of_parts or [TextEncoder(tokenizer) for _ in texts]
        parts = [encoder.ids(of_part) for encoder, of_part in zip(of_parts, texts, strict=False)]
        made = [source_ids(tokenizer, of_source, settings.max_source_tokens) for of_source in zip(*parts, strict=True)]
        sources.add([ids for ids, _ in made])
        cut_sources += [num_cut for _, num_cut in made if num_cut]
        written = [
            target_ids(tokenizer, ids, settings.max_target_tokens)
            for ids in of_targets.ids([pair.target for pair in kept if pair.target is not None])
        ]
        targets.add([ids for ids, _ in written])
        cut_targets += sum(bool(num_cut) for _, num_cut in written)
    for encoder in (*of_parts, of_targets):
        encoder.refuse_unknown(pairs.path if isinstance(pairs, Pairs) else "the sources")
    return Examples(
        sources.build(), targets.build(), np.concatenate([np.zeros(0, dtype=bool), *is_filled]), first_empty, len(cut_sources),
        cut_targets, sum(cut_sources),
    )  # fmt: skip
