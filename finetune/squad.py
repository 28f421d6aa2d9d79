"""SQuAD's JSON, versions 1.1 and 2.0, and its official metrics: exact match and F1, in percent."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import read_json


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
    num_unmatched: int
    """Questions none of whose answers is in the passage where it says."""


def read_squad(path: Path, needs_answers: bool = True) -> SquadFile:
    """Raises ValueError, naming file and place, for what is not SQuAD's JSON."""

    def member(value: Any, key: str, kind: type, where: str) -> Any:
        found = value.get(key) if isinstance(value, dict) else None
        if not isinstance(found, kind):
            raise ValueError(f"{path}: {where}: expected {key!r} to be {_KINDS[kind]}, found {type(found).__name__}")
        return found

    questions: list[Question] = []
    is_v2, num_unmatched = False, 0
    for a, article in enumerate(member(read_json(path), "data", list, "top")):
        for p, paragraph in enumerate(member(article, "paragraphs", list, f"data[{a}]")):
            place = f"data[{a}].paragraphs[{p}]"
            passage = member(paragraph, "context", str, place)
            for q, entry in enumerate(member(paragraph, "qas", list, place)):
                where = f"{place}.qas[{q}]"
                identifier, text = member(entry, "id", str, where), member(entry, "question", str, where)
                is_v2 |= "is_impossible" in entry
                given = member(entry, "answers", list, where) if needs_answers or "answers" in entry else []
                given = [] if entry.get("is_impossible") else given
                answers = [
                    (member(x, "text", str, f"{where}.answers"), member(x, "answer_start", int, f"{where}.answers"))
                    for x in given
                ]
                starts = [
                    start for answer, start in answers if start >= 0 and answer and passage.startswith(answer, start)
                ]
                num_unmatched += bool(answers and not starts)
                matching = [answer for answer, start in answers if start in starts[:1]]
                others = [answer for answer, _ in answers if answer not in matching]
                questions.append(
                    Question(identifier, text, passage, (*matching, *others), starts[0] if starts else None)
                )  # fmt: skip
    if not questions:
        raise ValueError(f"{path}: has no questions; expected at least one")
    return SquadFile(path, questions, is_v2, num_unmatched)


_KINDS = {list: "a list", str: "text", int: "a number"}


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
