"""SQuAD's JSON, versions 1.1 and 2.0, and its official metrics: exact match and F1, in percent."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data_prep.files import read_json, sha256_of_file
from finetune.tables import as_text, described


@dataclass(frozen=True)
class Question:
    """A question about a passage."""

    id: str
    text: str
    passage: str
    answers: tuple[str, ...]
    """None: the passage has no answer."""
    start: int | None
    """Character of the passage at which the first answer begins; None without one that does."""


@dataclass(frozen=True)
class SquadFile:
    """The questions of a file."""

    path: Path
    questions: list[Question]
    is_v2: bool
    """Whether there may be no answer."""
    is_labelled: bool
    """Whether every question has answers, or is said to be impossible."""
    num_unmatched: int
    """Questions none of whose answers is in the passage where it says."""
    sha256: str
    """Hash of the file."""


def read_squad(path: Path, needs_answers: bool = True) -> SquadFile:
    """Read a file of SQuAD's JSON, version 1.1 or 2.0. Without `needs_answers`, questions may lack them.

    Raises ValueError, naming file and place, for what is not SQuAD's JSON: ids are unique, `is_impossible` is true or false and
    agrees with the answers, and each answer is a text with a whole number as its start in the passage.
    """
    reader = _Reader(path, needs_answers)
    sha256 = sha256_of_file(path)
    for a, article in enumerate(reader.member(read_json(path), "data", list, "top")):
        for p, paragraph in enumerate(reader.member(article, "paragraphs", list, f"data[{a}]")):
            reader.add_paragraph(paragraph, f"data[{a}].paragraphs[{p}]")
    if not reader.questions:
        raise ValueError(f"{path}: has no questions; expected at least one")
    return SquadFile(path, reader.questions, reader.is_v2, reader.is_labelled, reader.num_unmatched, sha256)


_KINDS = {list: "a list", str: "text", int: "a whole number", bool: "true or false"}


class _Reader:
    """Collects the questions of a file."""

    def __init__(self, path: Path, needs_answers: bool) -> None:
        self._path, self._needs_answers = path, needs_answers
        self.questions: list[Question] = []
        self.is_v2, self.is_labelled, self.num_unmatched = False, True, 0
        self._places: dict[str, str] = {}
        """Of each id, where its question is."""

    def _refuse(self, where: str, reason: str) -> NoReturn:
        raise ValueError(f"{self._path}: {where}: {reason}")

    def member(self, value: Any, key: str, kind: type, where: str) -> Any:
        """Return an object's value under `key`, of that kind."""
        if not isinstance(value, dict):
            self._refuse(where, f"found {described(value)}, expected an object with {key!r}, as SQuAD's JSON has")
        if key not in value:
            self._refuse(where, f"has no {key!r}, expected {_KINDS[kind]}, as SQuAD's JSON has")
        found = value[key]
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            self._refuse(where, f"{key!r} is {described(found)}, expected {_KINDS[kind]}")
        if kind is str:
            try:
                as_text(found)
            except ValueError as error:
                self._refuse(where, f"{key!r} {error}")
        return found

    def add_paragraph(self, paragraph: Any, place: str) -> None:
        """Read a passage and its questions."""
        passage = self.member(paragraph, "context", str, place)
        for q, entry in enumerate(self.member(paragraph, "qas", list, place)):
            where = f"{place}.qas[{q}]"
            identifier, text = self.member(entry, "id", str, where), self.member(entry, "question", str, where)
            if self._places.setdefault(identifier, where) != where:
                self._refuse(
                    where, f"'id' is {described(identifier)}, as in {self._places[identifier]}; expected every question to have "
                    "its own, by which it is scored"
                )  # fmt: skip
            answers = self._answers(entry, passage, where)
            starts = [start for answer, start in answers if passage.startswith(answer, start)]
            self.num_unmatched += bool(answers and not starts)
            matching = [answer for answer, start in answers if start in starts[:1]]
            others = [answer for answer, _ in answers if answer not in matching]
            self.questions.append(
                Question(identifier, text, passage, (*matching, *others), starts[0] if starts else None)
            )

    def _answers(self, entry: dict[str, Any], passage: str, where: str) -> list[tuple[str, int]]:
        is_impossible = "is_impossible" in entry and self.member(entry, "is_impossible", bool, where)
        self.is_v2 |= "is_impossible" in entry
        given = self.member(entry, "answers", list, where) if self._needs_answers or "answers" in entry else []
        if is_impossible and given:
            self._refuse(
                where, f"'is_impossible' is true and there are {len(given)} answers; expected one or the other"
            )
        if not is_impossible and not given:
            self.is_labelled = False
            if self._needs_answers:
                self._refuse(
                    where, "has no answers; expected at least one, or 'is_impossible': true where the passage has none"
                )  # fmt: skip
        answers = []
        for number, one in enumerate(given):
            of_answer = f"{where}.answers[{number}]"
            answer, start = self.member(one, "text", str, of_answer), self.member(one, "answer_start", int, of_answer)
            if not answer.strip():
                self._refuse(of_answer, "'text' is empty, expected the answer; questions without one have no answers")
            if not 0 <= start < len(passage):
                self._refuse(
                    of_answer, f"'answer_start' is {start}, expected a character of the passage, 0 to {len(passage) - 1}"
                )  # fmt: skip
            answers.append((answer, start))
        return answers


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, predicted: str) -> float:
    """1 or 0."""
    return float(normalize_answer(answer) == normalize_answer(predicted))


def f1(answer: str, predicted: str, is_v2: bool) -> float:
    """Of the words in common. Where one has none left, version 2.0 asks whether both are equal; 1.1 gives 0."""
    words, found = normalize_answer(answer).split(), normalize_answer(predicted).split()
    if is_v2 and not (words and found):
        return float(words == found)
    common = (Counter(words) & Counter(found)).total()
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(words)
    return 2 * precision * recall / (precision + recall)


def question_scores(question: Question, predicted: str, is_v2: bool) -> tuple[float, float]:
    """Exact match and F1, each with the answer that suits it best."""
    answers: Sequence[str] = question.answers
    if is_v2:
        answers = [answer for answer in answers if normalize_answer(answer)] or [""]
    return (
        max((exact_match(answer, predicted) for answer in answers), default=0.0),
        max((f1(answer, predicted, is_v2) for answer in answers), default=0.0),
    )


def squad_metrics(questions: Sequence[Question], predicted: Mapping[str, str], is_v2: bool) -> dict[str, float]:
    """Exact match and F1 in percent, of version 2.0 also of those with and without an answer. What is not predicted is wrong."""
    groups: dict[str, list[tuple[float, float]]] = {"": []}
    for question in questions:
        scores = question_scores(question, predicted[question.id], is_v2) if question.id in predicted else (0.0, 0.0)
        groups[""].append(scores)
        if is_v2:
            groups.setdefault("_answerable" if question.answers else "_impossible", []).append(scores)
    return {
        f"{name}{suffix}": 100 * sum(scores[i] for scores in group) / len(group)
        for suffix, group in groups.items()
        for i, name in enumerate(("exact_match", "f1"))
    }


def best_threshold(
    questions: Sequence[Question], predicted: Mapping[str, str], no_answer: Mapping[str, float]
) -> float:
    """The threshold with the best F1: a question whose `no_answer` number is above it has none.

    As the official script: from no answer anywhere, questions are given their answer in the order of that number.
    """
    best = total = sum(float(not question.answers) for question in questions)
    threshold = min(no_answer.values()) - 1.0
    ordered = sorted(questions, key=lambda question: no_answer[question.id])
    for place, question in enumerate(ordered):
        if question.answers:
            total += question_scores(question, predicted[question.id], is_v2=True)[1]
        elif predicted[question.id]:
            total -= 1.0
        is_last_of_tie = place + 1 == len(ordered) or no_answer[ordered[place + 1].id] > no_answer[question.id]
        if is_last_of_tie and total > best:
            best, threshold = total, no_answer[question.id]
    return threshold
