"""Scores against their plain definitions, and the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.files import sha256_of_file
from finetune.score import made_by_file, text_scores

Command = Callable[..., tuple[int, str, str]]
WRITTEN = ["the cat sat on the mat", "a man of good fortune wants a wife", "nothing at all"]
WANTED = ["the cat sits on a mat", "a man of good fortune must want a wife", "something else"]


def f1(common: int, a: int, b: int) -> float:
    return 200 * common / (a + b)


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return longest_common(a[:-1], b[:-1]) + 1
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


def test_rouge_is_its_definition() -> None:
    """Of words that the stemmer leaves alone, and of some that it does not."""
    pairs = [("a b c d", "a c b d e"), ("x y x", "x x x y"), ("q", "r")]
    scores, options = text_scores([a for a, _ in pairs], [[b] for _, b in pairs])
    expected: dict[str, list[float]] = {"rouge_1": [], "rouge_2": [], "rouge_l": []}
    for a, b in ((a.split(), b.split()) for a, b in pairs):
        for n in (1, 2):
            grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (a, b)]
            total = grams[0].total() + grams[1].total()
            common = (grams[0] & grams[1]).total()
            expected[f"rouge_{n}"].append(200 * common / total if total else 0.0)
        expected["rouge_l"].append(f1(longest_common(a, b), len(a), len(b)))
    for name, values in expected.items():
        assert scores[name] == pytest.approx(sum(values) / 3), name
    assert "stemmer:porter" in options["rouge"]
    assert text_scores(["Wanted - fortunes!"], [["wants fortune"]])[0]["rouge_2"] == 100


def test_bleu_is_its_definition() -> None:
    """Of a corpus: clipped n-grams of all texts together, the geometric mean, the brevity penalty."""
    written, wanted = [[text.split() for text in texts] for texts in (WRITTEN[:2], WANTED[:2])]
    logs = []
    for n in range(1, 5):
        matches = total = 0
        for a, b in zip(written, wanted, strict=True):
            grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (a, b)]
            matches, total = matches + (grams[0] & grams[1]).total(), total + grams[0].total()
        logs.append(math.log(matches / total))
    a, b = (sum(map(len, texts)) for texts in (written, wanted))
    expected = 100 * math.exp(min(0, 1 - b / a) + sum(logs) / 4)
    scores, options = text_scores(WRITTEN[:2], [[text] for text in WANTED[:2]])
    assert scores["bleu"] == pytest.approx(expected)
    assert "tok:13a" in options["bleu"]


def test_several_references_and_case() -> None:
    texts, references = ["The Cat", "a  dog"], [["the cat", "x y"], ["z", "a dog"]]
    scores, options = text_scores(texts, references)
    assert (scores["rouge_1"], scores["exact_match"]) == (100, 50)
    assert scores["chrf"] < 100
    scores, ignoring = text_scores(texts, references, ignore_case=True)
    assert (scores["exact_match"], scores["chrf"]) == (100, 100)
    assert options["bleu"] != ignoring["bleu"]
    assert "nrefs:2" in options["bleu"]
    for one in (("a", [["a"]]), (["a"], "a"), (["a"], ["a"])):
        with pytest.raises(ValueError, match="is one text, expected a list of texts"):
            text_scores(*one)
    for written, wanted in (([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"], ["a", "b"]])):
        with pytest.raises(ValueError, match="references"):
            text_scores(written, wanted)


def test_command(command: Command, tmp_path: Path) -> None:
    predictions, references = tmp_path / "p.txt", tmp_path / "r.jsonl"
    predictions.write_text("".join(f"{text}\n" for text in [*WRITTEN, ""]), "utf-8")
    references.write_text("".join(json.dumps({"src": "x", "tgt": text}) + "\n" for text in [*WANTED, "y"]), "utf-8")
    made_by_file(predictions).write_text(json.dumps({"num_beams": 3}), "utf-8")
    status, out, err = command(
        "score",
        "--predictions",
        predictions,
        "--references",
        references,
        "--output",
        tmp_path / "new" / "dir" / "s.json",
    )
    assert status == 0, err
    result = json.loads((tmp_path / "new" / "dir" / "s.json").read_text())
    expected, options = text_scores([*WRITTEN, ""], [[text] for text in [*WANTED, "y"]])
    assert result["scores"] == expected
    assert (result["options"], result["num_texts"], result["num_empty"]) == (options, 4, 1)
    assert result["decoding"] == {"num_beams": 3}
    assert result["predictions"] == {"file": "p.txt", "sha256": sha256_of_file(predictions)}
    for name, value in expected.items():
        (line,) = [line for line in out.splitlines() if line.split()[0] == name]
        assert f"{value:.2f}" in line
        assert options.get(name, options["rouge"]) in line


def test_questions_of_squad_are_references(command: Command, tmp_path: Path) -> None:
    qas = [{"id": str(i), "question": q, "answers": [{"text": "a", "answer_start": 0}] * (i != 1), "is_impossible": i == 1} for i, q in enumerate(("who?", "no?", "what?"))]  # fmt: skip
    (tmp_path / "squad.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "a", "qas": qas}]}]}), "utf-8"
    )
    (tmp_path / "p.txt").write_text("who?\nwhat?\n", "utf-8")
    status, out, err = command("score", "--predictions", tmp_path / "p.txt", "--references", tmp_path / "squad.json")
    assert status == 0, err
    assert "exact_match  100.00" in out


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ("a\nb\n", '{"tgt": "x"}\n', ["r.jsonl: has 1 texts", "p.txt 2"]),
        ("a\n", '{"target": "x"}\n', ["r.jsonl: line 1: has no column 'tgt'"]),
        ("a\n", '{"tgt": "x"\n', ["r.jsonl: line 1: not valid JSON"]),
        ("", '{"tgt": "x"}\n', ["has 1 texts", "p.txt 0"]),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_told(
    predictions: str, references: str, words: list[str], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text(predictions, "utf-8")
    (tmp_path / "r.jsonl").write_text(references, "utf-8")
    status, _, err = command("score", "--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.jsonl")
    assert status == 2
    assert all(word in err for word in words), err
