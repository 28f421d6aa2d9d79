"""Make the sample tasks `definitions` and `entries` of sample_corpus/devils_dictionary.jsonl: python sample_tasks/make.py

definitions/    questions in SQuAD's JSON: how a word is defined, in passages of four entries; a fifth question has no answer
entries/        pairs of an entry and its first sentence, the definition, for learning to summarise
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
CORPUS = FOLDER.parent / "sample_corpus" / "devils_dictionary.jsonl"
ENTRIES_OF_PASSAGE = 4
PASSAGES = {"train": 80, "validation": 20}
PAIRS = {"train": 200, "validation": 40, "test": 40}
_ENTRY = re.compile(r"([A-Z][A-Z' -]+), ((?:n|adj|v|adv)\.(?:[a-z. ]*\.)?) (.+?[a-z]{2}[.?!])(?= |\n|$)(.*)", re.DOTALL)


def read_entries(path: Path) -> list[tuple[str, str, str]]:
    """Return (word, definition, complete text) of each entry; the definition is its first sentence."""
    entries = []
    for line in path.read_text("utf-8").splitlines():
        text = " ".join(json.loads(line)["text"].split())
        if (found := _ENTRY.fullmatch(text)) and len(found[3]) <= 150:
            entries.append((found[1], found[3], text))
    return [*dict.fromkeys(entries)]  # one is there twice


def paragraph(entries: Sequence[tuple[str, str, str]], other: str, number: int) -> dict[str, Any]:
    """Return a paragraph of SQuAD 2.0: a question for each entry, and one for the word `other`, which is not there."""
    passage, questions = "", list[dict[str, Any]]()
    for place, (word, definition, text) in enumerate(entries):
        passage += " " * bool(passage) + text[: text.index(definition)]
        answer = {"text": definition, "answer_start": len(passage)}
        passage += definition
        questions.append({"id": f"{number}-{place}", "question": f"How is {word.lower()} defined?", "answers": [answer], "is_impossible": False})  # fmt: skip
    none = {
        "id": f"{number}-none",
        "question": f"How is {other.lower()} defined?",
        "answers": [],
        "is_impossible": True,
    }
    return {"context": passage, "qas": [*questions, none]}


def write(output: Path) -> None:
    """Write both tasks to folders of `output`."""
    entries = read_entries(CORPUS)
    # every fifth group of entries is for validation, so that both have words from A to Z
    groups = [entries[first : first + ENTRIES_OF_PASSAGE] for first in range(0, len(entries) - ENTRIES_OF_PASSAGE + 1, ENTRIES_OF_PASSAGE)]  # fmt: skip
    of_part: dict[str, list[dict[str, Any]]] = {part: [] for part in PASSAGES}
    for number, group in enumerate(groups):
        other = groups[(number + len(groups) // 2) % len(groups)][0][0]
        of_part["validation" if number % 5 == 4 else "train"].append(paragraph(group, other, number))
    (output / "definitions").mkdir(parents=True, exist_ok=True)
    for part, count in PASSAGES.items():
        content = {
            "version": "v2.0",
            "data": [{"title": "The Devil's Dictionary", "paragraphs": of_part[part][:count]}],
        }
        (output / "definitions" / f"{part}.json").write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )
    (output / "entries").mkdir(parents=True, exist_ok=True)
    long = [(definition, text) for _, definition, text in entries if 2 * len(definition) < len(text) <= 700]
    step = sum(PAIRS.values()) // min(PAIRS.values())
    rows = {"validation": long[3::step], "test": long[5::step]}
    rows["train"] = [pair for place, pair in enumerate(long) if place % step not in (3, 5)]
    for part, count in PAIRS.items():
        lines = [json.dumps({"src": text, "tgt": definition}, ensure_ascii=False) for definition, text in rows[part][:count]]  # fmt: skip
        (output / "entries" / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write the two folders to")
    write(parser.parse_args().output)
