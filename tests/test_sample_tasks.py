"""The sample tasks are what their script makes, and the commands of the docs find their files."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from support import REPOSITORY, files_of

from finetune.__main__ import parse
from finetune.squad import read_squad

TASKS = REPOSITORY / "sample_tasks"


def test_the_script_makes_the_files(tmp_path: Path) -> None:
    runpy.run_path(str(TASKS / "make.py"))["write"](tmp_path)
    made = files_of(tmp_path)
    assert {name: (TASKS / name).read_bytes() for name in made} == made
    assert len(made) == 5


def test_questions_have_their_answers_where_they_say() -> None:
    passages = {}
    for part in ("train", "validation"):
        file = read_squad(TASKS / "definitions" / f"{part}.json")
        assert file.is_v2
        assert file.num_unmatched == 0
        assert sum(not question.answers for question in file.questions) * 5 == len(file.questions)
        passages[part] = {question.passage for question in file.questions}
        for question in file.questions:
            word = question.text.removeprefix("How is ").removesuffix(" defined?").upper()
            assert (f"{word}, " in question.passage) == bool(question.answers)
    assert not passages["train"] & passages["validation"]


def test_summaries_are_shorter_and_in_one_part_only() -> None:
    seen: set[str] = set()
    for part in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (TASKS / "entries" / f"{part}.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) >= 38
        for row in rows:
            assert row["tgt"] in row["src"]
            assert 2 * len(row["tgt"]) < len(row["src"])
        assert not seen & {row["src"] for row in rows}
        seen |= {row["src"] for row in rows}


@pytest.mark.parametrize("page", ["README.md", "docs/finetuning.md", "docs/seq2seq.md", "docs/generation.md"])
def test_the_commands_of_the_docs_are_understood_and_find_their_files(page: str) -> None:
    text = (REPOSITORY / page).read_text("utf-8").replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if re.match(r" *python -m finetune [a-z]", line)]
    assert commands
    for command in commands:
        words = shlex.split(command.partition(" [")[0])[3:]
        args = parse(words)
        for name in ("train_file", "validation_file", "input", "references"):
            path = getattr(args, name, None)
            if isinstance(path, Path) and path.parts[0] not in ("runs", "data", "my_unilm", "my_hf"):
                assert (REPOSITORY / path).is_file(), command
