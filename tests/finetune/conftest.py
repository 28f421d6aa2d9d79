"""Tiny models of every kind, with tokenizers of both kinds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import stored
from support import REPOSITORY

from data_prep.import_tokenizer import import_tokenizer
from data_prep.tokenizer import Tokenizer, train_tokenizer
from finetune.__main__ import main
from finetune.tables import read_table
from pretrain.export import StoredModel, write_export
from pretrain.model import PMLM, PMLMConfig

torch.set_num_threads(1)
Command = Callable[..., tuple[int, str, str]]

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-()éü"
SPECIAL = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "of", "and", "man", "woman", "##ing", "##ed", "truth", "good", "for", "##tune", "in", "want", "wife")


@pytest.fixture(scope="session")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Unigram, uncased, 300 entries."""
    lines = (REPOSITORY / "sample_corpus" / "pride_and_prejudice" / "chapter_01.txt").read_text("utf-8").splitlines()
    return train_tokenizer(
        [*lines, "naïve café Ærøskøbing"], tmp_path_factory.mktemp("spm") / "t.model", vocab_size=300
    )


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt like BERT's, uncased."""
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    entries = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    path.write_text("".join(f"{entry}\n" for entry in entries), "utf-8")
    return path


@pytest.fixture(scope="session")
def word_piece(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same as a tokenizer."""
    return import_tokenizer(vocabulary, tmp_path_factory.mktemp("word_piece") / "t.json", pieces={})


@pytest.fixture(scope="session", params=["sentence_piece", "word_piece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Either of them."""
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="session")
def export(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export. Not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "export"
    write_export(folder, stored(tokenizer))
    return folder


@pytest.fixture(scope="session")
def sentences() -> list[tuple[str, str]]:
    """(author, sentence) of sample_tasks/authors."""
    files = (REPOSITORY / "sample_tasks" / "authors" / name for name in ("train.tsv", "validation.tsv"))
    return [(row[0], row[1]) for file in files for row in read_table(file, ["label", "text"]).rows]


@pytest.fixture(scope="session")
def classify_folder(sentences: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/, train.tsv and dev.tsv with the columns label, text, next and length. Not to be changed."""
    folder = tmp_path_factory.mktemp("classify")
    tokenizer = train_tokenizer([text for _, text in sentences], folder / "tokenizer.model", vocab_size=500)
    config = PMLMConfig.of_size(
        "tiny", dropout=0.1, vocab_size=500, hidden_size=48, num_heads=4, intermediate_size=96, max_positions=32
    )
    torch.manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in PMLM(config).named_parameters()}
    write_export(folder / "weights", StoredModel(folder, config, weights, tokenizer))
    for name, rows in (("train.tsv", sentences[:240]), ("dev.tsv", sentences[240:])):
        lines = [f"{label}\t{text}\t{text[::-1]}\t{len(text)}" for label, text in rows]
        (folder / name).write_text("\n".join(["label\ttext\tnext\tlength", *lines]) + "\n", "utf-8")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m finetune COMMAND ...` in this process: status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
        status = main()
        return status, *capsys.readouterr()

    return run
