"""What fine-tuning keeps of its data, for each token."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import REPOSITORY

from data_prep.tokenizer import Tokenizer, train_tokenizer
from finetune.answer_data import AnswerSettings, make_windows
from finetune.classify_data import ColumnSettings, DataSettings, make_inputs, read_data
from finetune.seq2seq_data import PairColumns, Seq2SeqSettings, make_examples, read_pairs
from finetune.squad import Question
from finetune.tokens import TokenLists, TokenListsBuilder

NUM_SAMPLES, MOST_BYTES = 4000, 8


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    """Paragraphs of more than a hundred words."""
    chapters = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("*.txt"))[:8]
    words = " ".join(path.read_text("utf-8") for path in chapters).split()
    return [" ".join(words[start : start + 120]) for start in range(0, 12_000, 120)]


@pytest.fixture(scope="module")
def spm(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of 1,000 entries."""
    return train_tokenizer(paragraphs, tmp_path_factory.mktemp("spm") / "t.model", vocab_size=1000)


def measured(make: Callable[[], Any]) -> tuple[Any, int, int]:
    """What is made, and the bytes that it takes and took at most."""
    tracemalloc.start()
    try:
        made = make()
        return made, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_classes_and_pairs(paragraphs: list[str], spm: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    rows = (f"{i % 3}\t{paragraphs[i % 100]}" for i in range(NUM_SAMPLES))
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")
    data = read_data(DataSettings(train_file=path, validation_file=path), ColumnSettings())
    make_inputs(spm, [("the first words are remembered",)], 512)
    made, kept, peak = measured(lambda: make_inputs(spm, data.train.texts(), 512))
    num_tokens = int(made.lengths.sum())
    assert num_tokens > 400_000
    assert made.ids.num_bytes < 2.1 * num_tokens
    assert kept < 3 * num_tokens
    assert peak < MOST_BYTES * num_tokens


def test_sources_and_targets(paragraphs: list[str], spm: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = ({"src": paragraphs[i % 100], "tgt": paragraphs[i % 100][:100]} for i in range(NUM_SAMPLES))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, settings = read_pairs(path, PairColumns()), Seq2SeqSettings(512, 64)
    made, kept, peak = measured(lambda: make_examples(spm, pairs, settings))
    num_tokens = int(made.sources.lengths.sum() + made.targets.lengths.sum())
    assert num_tokens > 400_000
    assert kept < 3 * num_tokens
    assert peak < MOST_BYTES * num_tokens


def test_questions_and_passages(paragraphs: list[str], spm: Tokenizer) -> None:
    questions = [
        Question(str(i), "Who is it that knew?", f"{paragraphs[i % 100]} {i // 4}", (paragraphs[i % 100][10:20],), 10) for i in range(1000)
    ]  # fmt: skip
    made, kept, peak = measured(lambda: make_windows(spm, questions, 96, AnswerSettings(max_question_tokens=16)))
    num_tokens = int(made.lengths.sum())
    assert num_tokens > 200_000
    assert kept < MOST_BYTES / 2 * num_tokens
    assert peak < 2 * MOST_BYTES * num_tokens  # a passage's ids and characters, and a row for each window


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_lists_are_what_was_added(vocab_size: int, num_bytes: int) -> None:
    lists = [[], [0, 1, vocab_size - 1], [5], []]
    builder = TokenListsBuilder(vocab_size)
    builder.add(lists[:2])
    builder.add(lists[2:])
    assert len(builder) == 4
    made = builder.build()
    assert [ids.tolist() for ids in made] == lists
    assert made.lengths.tolist() == [0, 3, 1, 0]
    assert made[1].dtype.itemsize == num_bytes
    assert len(TokenListsBuilder(9).build()) == 0
    assert isinstance(made, TokenLists)
    assert np.shares_memory(made[1], made[1])
