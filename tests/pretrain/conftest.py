"""A small real data set for the tests of pre-training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import REPOSITORY

from data_prep.build import build
from data_prep.corpus import find_sources, read_documents
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.shards import DataSet
from data_prep.tokenizer import train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chapters of the sample corpus as a data set: samples of 64 tokens, two mask sets."""
    folder = tmp_path_factory.mktemp("data")
    corpus = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0*.txt"))
    corpus.append(REPOSITORY / "sample_corpus" / "devils_dictionary.jsonl")
    lines = (line for document in read_documents(find_sources(corpus)) for line in document.lines)
    train_tokenizer(lines, folder / "tokenizer.model", vocab_size=1000)
    parameters = BuildParameters(max_length_tokens=64, mask_sets=2, validation_fraction=0.1, shard_samples=512)
    with LocalProcesses(1) as processes:
        build([Corpus(corpus)], folder / "tokenizer.model", folder / "set", parameters, processes)
    return folder / "set"


@pytest.fixture
def data_set(data_folder: Path) -> DataSet:
    """The same, opened."""
    return DataSet(data_folder)
