"""What tests of data_prep start from: real text, a tokenizer trained on it, and a data set built from it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tokenizers
from support import REPOSITORY, run_command, texts_of

from data_prep.__main__ import main
from data_prep.build import build
from data_prep.cleaning import CleanSettings
from data_prep.corpus import ReadSettings, find_sources, read_documents
from data_prep.duplicates import DuplicateSettings
from data_prep.import_tokenizer import import_tokenizer
from data_prep.mixture import Corpus, read_mixture
from data_prep.packing import Samples, assemble
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.tokenizer import Tokenizer, WordPiece, train_tokenizer


@pytest.fixture(scope="session")
def sample_corpus() -> Path:
    return REPOSITORY / "sample_corpus"


@pytest.fixture(scope="session")
def chapters(sample_corpus: Path) -> list[Path]:
    """The chapters of one novel, in their order, a file each."""
    return sorted((sample_corpus / "pride_and_prejudice").glob("*.txt"))


@pytest.fixture(scope="session")
def lines(chapters: list[Path]) -> list[str]:
    """The lines of the first five chapters."""
    return [line for document in read_documents(find_sources(chapters[:5])) for line in document.lines]


@pytest.fixture(scope="session")
def tokenizer(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Unigram, uncased, 600 entries."""
    return train_tokenizer(lines, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=600)


@pytest.fixture(scope="session")
def bert_vocabulary(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt like BERT's, cased, with unused entries before its special ones and letters of several scripts."""
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    trained.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    text = [
        *lines,
        *(line.lower() for line in lines),
        "naïve café ÅÇÑÜ èàéêîôû",
        "пример слова",
        "日本語文字",
        "mask pad cls [#]",
    ]
    trained.train_from_iterator(text, trainer)
    vocabulary = trained.get_vocab()
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("".join(f"{entry}\n" for entry in sorted(vocabulary, key=vocabulary.__getitem__)), "utf-8")
    return path


@pytest.fixture(scope="session", params=["uncased", "cased"])
def word_piece(
    bert_vocabulary: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WordPiece:
    """The same as a tokenizer, uncased and cased."""
    path = tmp_path_factory.mktemp("word_piece") / "imported.json"
    tokenizer = import_tokenizer(bert_vocabulary, path, cased=request.param == "cased", pieces={})
    assert isinstance(tokenizer, WordPiece)
    return tokenizer


@pytest.fixture(scope="session")
def corpus_ids(sample_corpus: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of the whole sample corpus, its rare characters as [UNK]."""
    return np.concatenate([tokenizer.encode(d.lines) for d in read_documents(find_sources([sample_corpus]))])


@pytest.fixture(scope="session")
def assemble_texts(tokenizer: Tokenizer) -> Callable[..., Samples]:
    """`assemble` of texts given one by one, with the special ids of the tokenizer."""
    return lambda texts, **key: assemble(texts_of(texts), sos_id=tokenizer.sos_id, eos_id=tokenizer.eos_id, **key)


@pytest.fixture(scope="session")
def build_data(tokenizer: Tokenizer) -> Callable[..., bool]:
    """`build` of paths or a mixture's file; `settings`: of all classes that have flags.

    Samples have 64 tokens and shards 128 samples, where `settings` does not say otherwise.
    """

    def run(
        corpus: list[Path] | Path,
        folder: Path,
        *,
        workers: int = 1,
        tokenizer_path: Path = tokenizer.path,
        **settings: Any,
    ) -> bool:
        def of(cls: Any) -> Any:
            return cls(**{field.name: settings.pop(field.name) for field in fields(cls) if field.name in settings})

        reading, cleaning, duplicates = of(ReadSettings), of(CleanSettings), of(DuplicateSettings)
        parameters = BuildParameters(**{"max_length_tokens": 64, "shard_samples": 128, **settings})
        with LocalProcesses(workers) as processes:
            mixture = read_mixture(corpus, reading) if isinstance(corpus, Path) else [Corpus(corpus, reading)]
            return build(
                mixture, tokenizer_path, folder, parameters, processes, cleaning=cleaning, duplicates=duplicates
            )

    return run


@pytest.fixture(scope="session")
def data_folder(
    chapters: list[Path], build_data: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A data set of nine chapters: 64 tokens, 2 mask sets, 3 shards to train and 1 to validate. Not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "pretrain"
    assert build_data(chapters[:9], folder, mask_sets=2, validation_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def data_prep_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m data_prep` with the given words, in a process of its own, from the root of the repository."""
    return lambda *words: run_command([sys.executable, "-m", "data_prep", *map(str, words)])


@pytest.fixture(scope="session")
def data_prep_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in this process, which saves the second that a new one takes to start."""

    def run(*given: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in given]
        stdout, stderr = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["data_prep", *words]),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            try:
                status = main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
        return subprocess.CompletedProcess(words, status, stdout.getvalue(), stderr.getvalue())

    return run
