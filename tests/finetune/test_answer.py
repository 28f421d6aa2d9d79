"""Extractive question answering: SQuAD's files and metrics, windows, and a model that learns."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY
from torchmetrics.functional.text import squad as published_squad

from data_prep.tokenizer import Tokenizer, train_tokenizer
from finetune import Answerer
from finetune.answer_data import AnswerSettings, encode_passage, make_windows
from finetune.answer_model import Answer, best_answers
from finetune.squad import Question, best_threshold, f1, normalize_answer, read_squad, squad_metrics
from pretrain.export import StoredModel, write_export
from pretrain.model import PMLM, PMLMConfig

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def entries() -> list[tuple[str, str]]:
    """(word, definition) of the Devil's Dictionary."""
    lines = (REPOSITORY / "sample_corpus" / "devils_dictionary.jsonl").read_text("utf-8").splitlines()
    texts = (json.loads(line)["text"] for line in lines)
    matches = (re.match(r"([A-Z]+), n\. ([^.]{20,120}\.)", text) for text in texts)
    return [(match[1], match[2]) for match in matches if match][:120]


def squad_json(path: Path, entries: list[tuple[str, str]], *, is_v2: bool, shift: int = 0) -> Path:
    """Which word is explained? It stands at the beginning; impossible where it does not."""
    paragraphs = []
    for number, (word, text) in enumerate(entries):
        is_impossible = is_v2 and number % 3 == 0
        passage = f"{text} {text}" if is_impossible else f"{word}, n. {text} {text}"
        start = shift
        answers = [] if is_impossible else [{"text": word, "answer_start": start}]
        question = {"id": str(number), "question": "Which word?", "answers": answers}
        paragraphs.append({"context": passage, "qas": [{**question, **({"is_impossible": is_impossible} if is_v2 else {})}]})  # fmt: skip
    path.write_text(json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]}), "utf-8")
    return path


@pytest.fixture(scope="session")
def folder(entries: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ of a tiny model."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = train_tokenizer([text for entry in entries for text in entry], folder / "t.model", vocab_size=300)
    config = PMLMConfig.of_size(
        "tiny", dropout=0.1, vocab_size=300, hidden_size=48, num_heads=4, intermediate_size=96, max_positions=96
    )
    torch.manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in PMLM(config).named_parameters()}
    write_export(folder / "weights", StoredModel(folder, config, weights, tokenizer))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("is_v2", [False, True])
def test_train_and_predict(
    is_v2: bool, folder: Path, entries: list[tuple[str, str]], command: Command, tmp_path: Path
) -> None:
    train = squad_json(tmp_path / "train.json", entries[: 90 if is_v2 else 30], is_v2=is_v2)
    dev = squad_json(tmp_path / "dev.json", entries[90:], is_v2=is_v2)
    run = tmp_path / "run"
    status, _, err = command(
        "answer", "--weights", folder / "weights", "--train_file", train, "--validation_file", dev, "--output", run,
        "--max_length_tokens", 64, "--max_question_tokens", 8, "--stride_tokens", 24, "--epochs", 12, "--learning_rate", 3e-3,
        "--batch_size", 8,
    )  # fmt: skip
    assert status == 0, err
    file = read_squad(dev)
    predictions = json.loads((run / "validation" / "predictions.json").read_text())
    assert predictions.keys() == {question.id for question in file.questions}
    assert (run / "validation" / "na_prob.json").exists() == is_v2
    values = squad_metrics(file.questions, predictions, is_v2)
    summary = json.loads((run / "summary.json").read_text())["validation"]
    assert summary["f1"] == pytest.approx(values["f1"])
    if is_v2:
        assert values["f1"] > 40  # no answer everywhere has 33
    best = json.loads((run / "validation" / "nbest_predictions.json").read_text())
    for question in file.questions:
        kept = best[question.id]
        assert [a["score"] for a in kept] == sorted((a["score"] for a in kept), reverse=True)
        assert sum(a["probability"] for a in kept) == pytest.approx(1)
        assert all(question.passage.startswith(a["text"], a["start"]) for a in kept)
    status, out, _ = command("predict", "--model", run, "--question", file.questions[0].text, "--passage", file.questions[0].passage)  # fmt: skip
    assert status == 0
    assert json.loads(out)["text"] == predictions[file.questions[0].id]
    assert command("predict", "--model", run, "--input", dev, "--output", tmp_path / "p")[0] == 0
    assert json.loads((tmp_path / "p" / "predictions.json").read_text()) == predictions
    assert Answerer.load(run).threshold is None or is_v2


def test_every_answer_is_in_a_window(entries: list[tuple[str, str]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    questions = read_squad(squad_json(tmp_path / "x.json", entries, is_v2=False)).questions
    settings = AnswerSettings(stride_tokens=20, max_question_tokens=6, max_answer_tokens=12)
    found = make_windows(tokenizer, questions, 48, settings)
    seen: dict[int, set[int]] = {number: set() for number in range(len(questions))}
    is_found = set()
    all_spans = [encode_passage(tokenizer, question.passage)[1] for question in questions]
    for window, number in enumerate(found.question_of_W.tolist()):
        first_token, num_tokens, spans = int(found.first_W[window]), int(found.num_tokens_W[window]), all_spans[number]
        assert len(found.ids(window)) == len(found.segments(window)) == found.lengths[window] <= 48
        assert len(found.needed(window)) == num_tokens + 1
        seen[number] |= {*range(first_token, first_token + num_tokens)}
        if found.targets_W2[window].any():
            is_found.add(number)
            first, last = (first_token + place - 1 for place in found.targets_W2[window].tolist())
            assert questions[number].answers[0] in questions[number].passage[spans[first][0] : spans[last][1]]
    assert is_found == {*range(len(questions))}
    assert not found.answerless
    assert all(tokens == {*range(len(all_spans[number]))} for number, tokens in seen.items())


@pytest.mark.parametrize(
    ("max_length_tokens", "settings", "expected"),
    [
        (384, AnswerSettings(), 128), (128, AnswerSettings(), 32), (97, AnswerSettings(), 1),
        (128, AnswerSettings(max_answer_tokens=1), 61), (128, AnswerSettings(stride_tokens=32), 32), (384, AnswerSettings(stride_tokens=288), 288),
    ],
)  # fmt: skip
def test_the_default_stride_leaves_every_answer_in_a_window(
    max_length_tokens: int, settings: AnswerSettings, expected: int
) -> None:
    assert settings.stride(max_length_tokens) == expected


@pytest.mark.parametrize(
    ("max_length_tokens", "settings", "words"),
    [
        (128, AnswerSettings(stride_tokens=128), "--stride_tokens 128: --max_length_tokens 128 leaves 61 tokens for a passage .* expected at most 32"),
        (384, AnswerSettings(stride_tokens=289), "--stride_tokens 289: .* expected at most 288, so that each is in a window"),
        (96, AnswerSettings(), "--max_length_tokens 96 leaves 29 tokens .* expected at least --max_answer_tokens 30"),
        (40, AnswerSettings(), "--max_length_tokens 40 leaves 0 tokens"),
    ],
)  # fmt: skip
def test_a_stride_that_loses_answers_is_refused(max_length_tokens: int, settings: AnswerSettings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings.stride(max_length_tokens)


@pytest.mark.parametrize("stride_tokens", [None, 7])
def test_no_token_of_a_passage_and_no_answer_is_lost(stride_tokens: int | None, sentence_piece: Tokenizer) -> None:
    """Every span of up to `max_answer_tokens` tokens of a long passage, as an answer."""
    passage = " ".join(f"word{number} of the man" for number in range(40))
    _, spans = encode_passage(sentence_piece, passage)
    settings = AnswerSettings(stride_tokens=stride_tokens, max_question_tokens=4, max_answer_tokens=6)
    answers = [
        (spans[first][0], spans[min(first + length, len(spans)) - 1][1])
        for first in range(0, len(spans), 3)
        for length in (1, 3, 6)
    ]
    answers = [(start, stop) for start, stop in answers if start < stop]
    questions = [
        Question(str(number), "which word of the man is it?", passage, (passage[start:stop],), start)
        for number, (start, stop) in enumerate(answers)
    ]
    found = make_windows(sentence_piece, questions, 24, settings)
    assert found.num_cut_questions == len(questions)
    assert len(found.passages) == 1
    assert found.answerless == frozenset()
    is_there = found.targets_W2.any(axis=1)
    assert {*found.question_of_W[is_there].tolist()} == {*range(len(questions))}
    for window in found.question_of_W.nonzero()[0][:50].tolist():
        ids = found.passages[0][found.first_W[window] :][: found.num_tokens_W[window]].tolist()
        assert found.ids(window)[-len(ids) - 1 : -1] == ids


def test_an_answer_in_no_window_is_left_out_and_counted(
    folder: Path, entries: list[tuple[str, str]], command: Command, tmp_path: Path
) -> None:
    file = json.loads(squad_json(tmp_path / "x.json", entries[:3], is_v2=False).read_text())
    for paragraph in file["data"][0]["paragraphs"][:2]:  # of many windows, and of as many as an answer has tokens
        paragraph["context"] = paragraph["context"] * 3
        paragraph["qas"][0]["answers"][0]["text"] = paragraph["context"]
    (tmp_path / "x.json").write_text(json.dumps(file))
    status, _, err = command(
        "answer", "--weights", folder / "weights", "--epochs", 1, "--max_length_tokens", 64, "--max_question_tokens", 8, "--output",
        tmp_path / "run", "--train_file", tmp_path / "x.json", "--validation_file", tmp_path / "x.json",
    )  # fmt: skip
    assert status == 0, err
    assert "x.json: 2 of 3 questions are left out: their answer has more tokens than fit in a window" in err
    assert "x.json: 1 questions in " in err


def test_the_best_answers_are_those_of_their_definition() -> None:
    """Of all windows: spans by start + end, the smallest score of no answer, probabilities among those kept."""
    draw = np.random.default_rng(0)
    passage = "abcdefgh"
    spans = [(place, place + 1) for place in range(8)]
    settings = AnswerSettings(max_answer_tokens=3, num_best=64)
    windows = [(0, draw.normal(size=(6, 2))), (3, draw.normal(size=(6, 2)))]
    best, none = best_answers(passage, spans, windows, settings)
    assert none == pytest.approx(min(scores[0].sum() for _, scores in windows))
    assert none != pytest.approx(max(scores[0].sum() for _, scores in windows))
    expected: dict[tuple[int, int], float] = {}
    for first, scores in windows:
        for start in range(5):
            for end in range(start, min(5, start + 3)):
                key, score = (first + start, first + end + 1), scores[1 + start, 0] + scores[1 + end, 1]
                expected[key] = max(score, expected.get(key, -math.inf))
    ordered = sorted(expected.items(), key=lambda item: -item[1])
    assert [(a.text, a.start) for a in best] == [(passage[a:b], a) for (a, b), _ in ordered]
    assert [a.score for a in best] == pytest.approx([score for _, score in ordered])
    odds = np.exp([a.score for a in best])
    assert [a.probability for a in best] == pytest.approx(odds / odds.sum())


def test_no_answer_is_above_the_threshold_only() -> None:
    answerer = Answerer.__new__(Answerer)
    best = [Answer("x", 1.0)]
    for threshold, none, expected in (
        (None, 9.0, "x"),
        (2.0, 3.0, "x"),
        (2.0, 3.1, ""),
        (-1.0, 0.0, "x"),
        (-1.0, 0.1, ""),
    ):
        answerer.threshold = threshold
        assert answerer.choose(best, none).text == expected


def test_offsets_are_of_the_text(tokenizer: Tokenizer) -> None:
    text = "  The GOOD man’s wife—a “truth”, in want of é.\n"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode([text]).tolist()
    assert all(0 <= a <= b <= len(text) for a, b in spans)
    place = text.index("GOOD")
    inside = [(a, b) for a, b in spans if a < place + 4 and b > place]
    assert text[inside[0][0] : inside[-1][1]].strip() == "GOOD"


def some_questions(number: int) -> tuple[list[Question], dict[str, str]]:
    """With answers and predictions of a few words, articles and punctuation among them."""
    draw = random.Random(number)
    words = ["the", "a", "Truth,", "truth", "man", "good-man", "An", "U.S.", "wife.", "  in", "é", "of"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 5)))

    questions = [Question(str(i), "?", "", tuple(text() for _ in range(draw.randint(1, 3))), 0) for i in range(40)]
    return questions, {q.id: draw.choice([text(), *q.answers]) for q in questions}


@pytest.mark.parametrize("number", range(5))
def test_metrics_are_the_published_ones(number: int) -> None:
    questions, predictions = some_questions(number)
    questions = [q for q in questions if all(normalize_answer(a) for a in q.answers)]
    expected = published_squad(
        [{"prediction_text": predictions[q.id], "id": q.id} for q in questions],
        [{"answers": {"answer_start": [0], "text": list(q.answers)}, "id": q.id} for q in questions],
    )
    found = squad_metrics(questions, predictions, is_v2=False)
    assert found["exact_match"] == pytest.approx(float(expected["exact_match"]), abs=1e-4)
    assert found["f1"] == pytest.approx(float(expected["f1"]), abs=1e-4)


def test_no_answer_in_version_2() -> None:
    assert (f1("", "", True), f1("", "man", True), f1("the", "a", True), f1("the", "a", False)) == (1, 0, 1, 0)
    questions = [
        Question("a", "?", "", (), None),
        Question("b", "?", "", ("the man",), 0),
        Question("c", "?", "", (), None),
    ]
    found = squad_metrics(questions, {"a": "", "b": "man of truth", "c": "x"}, is_v2=True)
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx((100 + 50 + 0) / 3)
    assert (found["exact_match_impossible"], found["f1_answerable"]) == (50, 50)
    assert squad_metrics(questions, {"b": "man"}, is_v2=True)["f1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("number", range(5))
def test_the_threshold_is_the_best_of_all(number: int) -> None:
    questions, predictions = some_questions(number)
    draw = random.Random(number)
    questions = [q for q in questions if all(map(normalize_answer, (*q.answers, predictions[q.id])))]
    questions = [q if draw.random() < 0.6 else Question(q.id, "?", "", (), None) for q in questions]
    scores = {q.id: float(draw.randint(-5, 5)) for q in questions}

    def f1_at(threshold: float) -> float:
        chosen = {key: "" if scores[key] > threshold else text for key, text in predictions.items() if key in scores}
        return squad_metrics(questions, chosen, is_v2=True)["f1"]

    found = best_threshold(questions, predictions, scores)
    assert f1_at(found) == pytest.approx(max(f1_at(threshold) for threshold in range(-7, 7)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"data": [\n', ["line 2: not valid JSON"]),
        ("[]", ["top: found [] (a list), expected an object with 'data'"]),
        ('{"data": []}', ["has no questions"]),
        ('{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 3}]}]}]}',
         ["data[0].paragraphs[0].qas[0]: 'id' is 3 (a number), expected text"]),
        ('{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": "3", "question": "?"}]}]}]}',
         ["qas[0]: has no 'answers', expected a list"]),
    ],
)  # fmt: skip
def test_bad_files(content: str, words: list[Any], folder: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    files = ("--train_file", tmp_path / "bad.json", "--validation_file", tmp_path / "bad.json")
    status, _, err = command("answer", "--weights", folder / "weights", *files, "--output", tmp_path / "run")
    assert status == 2
    assert err.count("error:") == 1
    assert all(word in err for word in ["bad.json: ", *words]), err


def test_answers_elsewhere_are_counted(
    folder: Path, entries: list[tuple[str, str]], command: Command, tmp_path: Path
) -> None:
    wrong = squad_json(tmp_path / "wrong.json", entries[:5], is_v2=False, shift=1)
    some = json.loads(squad_json(tmp_path / "some.json", entries[5:9], is_v2=False).read_text())
    some["data"] += json.loads(wrong.read_text())["data"]
    for number, paragraph in enumerate(p for article in some["data"] for p in article["paragraphs"]):
        paragraph["qas"][0]["id"] = str(number)
    (tmp_path / "some.json").write_text(json.dumps(some))
    words = (
        "answer",
        "--weights",
        folder / "weights",
        "--epochs",
        1,
        "--max_length_tokens",
        80,
        "--max_question_tokens",
        8,
    )
    files = ("--train_file", tmp_path / "some.json", "--validation_file", tmp_path / "some.json")
    status, _, err = command(*words, *files, "--output", tmp_path / "some")
    assert status == 0, err
    assert "some.json: 5 of 9 questions are left out" in err
    assert "some.json: 5 questions have answers that are not in the passage at answer_start" in err
    assert "some.json: 4 questions in " in err  # what is trained on
    status, _, err = command(*words, "--train_file", wrong, "--validation_file", wrong, "--output", tmp_path / "run")
    assert status == 2
    assert "none of its 5 questions has an answer at answer_start" in err
