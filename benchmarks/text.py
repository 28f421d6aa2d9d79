"""Data sets of real text to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.build import build
from data_prep.console import available_cores
from data_prep.corpus import find_sources, read_documents
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.shards import DataSet, SampleBatch
from data_prep.tokenizer import Tokenizer, train_tokenizer

_TOKENIZER_ENTRIES = 8000  # of the sample corpus, which is small; the models have more


def make_tokenizer(corpus: Sequence[Path], path: Path, vocab_size: int) -> Tokenizer:
    """A SentencePiece tokenizer trained on all of the corpus."""
    lines = (line for document in read_documents(find_sources(corpus)) for line in document.lines)
    return train_tokenizer(lines, path, vocab_size=vocab_size)


def make_data(corpus: Sequence[Path], tokenizer: Path, folder: Path, parameters: BuildParameters) -> Path:
    """The corpus as a data set in `folder`, as `python -m data_prep build` makes it."""
    with LocalProcesses(available_cores()) as processes:
        build([Corpus(corpus)], tokenizer, folder, parameters, processes)
    return folder


class Text:
    """Samples of real text, of any length."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus, self._folder = corpus, folder
        self._tokenizer = make_tokenizer([corpus], folder / "tokenizer.model", _TOKENIZER_ENTRIES)
        self.mask_id = self._tokenizer.mask_id
        self._batches: dict[int, SampleBatch] = {}

    def batch(self, length_tokens: int, num_samples: int) -> SampleBatch:
        """The longest samples of at most `length_tokens`."""
        if length_tokens not in self._batches:
            folder = self._folder / str(length_tokens)
            data = DataSet(make_data([self._corpus], self._tokenizer.path, folder, BuildParameters(length_tokens)))
            self._batches[length_tokens] = data.read_samples("train", 0, data.num_samples("train")).as_int64()
            data.close()
        batch = self._batches[length_tokens]
        return batch[batch.length_B.argsort()[::-1][:num_samples]]
