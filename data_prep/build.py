"""From text files to a data set: the whole way, on several processes, with the same bytes whatever their number."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.corpus import Document, DocumentPer, describe_sources, find_sources, read_documents
from data_prep.files import write_whole
from data_prep.masking import (
    BLOCK_PROBABILITY,
    MASK_PERCENT,
    MAX_BLOCK_TOKENS,
    MIN_BLOCK_TOKENS,
    SHOW_MASK_PROBABILITY,
    SHOW_RANDOM_PROBABILITY,
    draw_mask_set,
    max_masked,
)  # fmt: skip
from data_prep.packing import MIN_DOCUMENT_TOKENS, NUM_SPECIAL_TOKENS, assemble, cut_into_texts
from data_prep.shards import (
    CHUNK_SAMPLES,
    MAX_LENGTH_LIMIT_TOKENS,
    SPLITS,
    Split,
    manifest_path,
    read_data_manifest,
    shard_name,
    write_data_manifest,
    write_shard,
)  # fmt: skip
from data_prep.tokenizer import Tokenizer, load_tokenizer

_T = TypeVar("_T")
_BATCH_CHARACTERS = 2**20  # text handed to a worker at a time


@dataclass(frozen=True)
class BuildParameters:
    """Everything that decides the bytes of a data set, besides its texts and its tokenizer."""

    max_length_tokens: int = 512
    """Tokens of a sample, the three special ones included."""
    mask_sets: int = 1
    """Pre-sampled mask sets of each sample; epoch e of the training uses set e mod K."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that training never sees."""
    document_per: DocumentPer = "file"
    """What is a document in a .txt file: the file, or what stands between blank lines."""
    shard_samples: int = 16_384
    """Samples a shard; a multiple of 128, the samples of an HDF5 chunk."""
    seed: int = 0
    """Key of every random choice."""

    def __post_init__(self) -> None:
        faults = []
        shortest = MIN_DOCUMENT_TOKENS + NUM_SPECIAL_TOKENS
        if not shortest <= self.max_length_tokens <= MAX_LENGTH_LIMIT_TOKENS:
            faults.append(
                f"max_length_tokens is {self.max_length_tokens}, expected {shortest} to {MAX_LENGTH_LIMIT_TOKENS}"
            )
        if self.mask_sets < 1:
            faults.append(f"mask_sets is {self.mask_sets}, expected at least 1")
        if not 0 <= self.validation_fraction < 1:
            faults.append(f"validation_fraction is {self.validation_fraction}, expected 0 or more and less than 1")
        if self.shard_samples < 1 or self.shard_samples % CHUNK_SAMPLES:
            faults.append(f"shard_samples is {self.shard_samples}, expected a multiple of {CHUNK_SAMPLES}")
        if not 0 <= self.seed < 2**63:
            faults.append(f"seed is {self.seed}, expected 0 to 2**63 - 1")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def max_masked_tokens(self) -> int:
        """P: the most masked tokens of a sample."""
        return max_masked(self.max_length_tokens, NUM_SPECIAL_TOKENS)


Bar = Callable[[str, int], Any]
"""Makes a progress bar from a description and a total in bytes."""


def build(
    corpus: list[Path], tokenizer_path: Path, folder: Path, parameters: BuildParameters, *, workers: int, bar: Bar
) -> bool:
    """Make the data set `folder`; returns False, having done nothing, if it is there already, made from the same.

    Raises ValueError for bad input, and where `folder` holds a data set made from something else.
    """
    sources = find_sources(corpus)
    tokenizer = load_tokenizer(tokenizer_path)
    made_from = {
        "parameters": asdict(parameters),
        "tokenizer": {"file": tokenizer.file_name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "sources": describe_sources(sources),
    }
    if manifest_path(folder).exists():
        manifest = read_data_manifest(folder)
        changed = [key for key, value in made_from.items() if manifest[key] != value]
        if changed:
            raise ValueError(
                f"{folder}: holds a data set made from other {' and '.join(changed)}; remove it or choose another --data"
            )
        return False
    _make_empty(folder)
    total_bytes = sum(s.size_bytes for s in sources)
    counts: Counter[str] = Counter()
    splits: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with (
        bar("tokenize and mask", total_bytes) as progress,
        _Workers(workers, tokenizer_path, folder, parameters) as pool,
    ):
        documents = read_documents(sources, parameters.document_per, progress.update)
        for split, entry in _write_shards(pool, _tokenize(pool, documents, counts), parameters):
            splits[split].append(entry)
    if not splits["train"]:
        raise ValueError(f"{', '.join(map(str, corpus))}: {_why_no_training_text(counts)}")
    write_whole(folder / tokenizer.file_name, tokenizer_path.read_bytes())
    write_data_manifest(folder, {
        **made_from,
        "masking": {
            "mask_percent": MASK_PERCENT, "block_probability": BLOCK_PROBABILITY,
            "block_tokens": [MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS], "show_mask_probability": SHOW_MASK_PROBABILITY,
            "show_random_probability": SHOW_RANDOM_PROBABILITY,
        },
        "max_masked_tokens": parameters.max_masked_tokens,
        "documents": {name: counts[name] for name in (*SPLITS, "too_short")},
        "splits": splits,
    })  # fmt: skip
    return True


def _make_empty(folder: Path) -> None:
    """Make the folder, without what an interrupted build may have left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [f"{split}-{'[0-9]' * 5}.h5" for split in SPLITS]
    for pattern in (*shards, *(f".{name}.partial" for name in (*shards, "tokenizer.*"))):
        for leftover in folder.glob(pattern):
            leftover.unlink()


def _why_no_training_text(counts: Counter[str]) -> str:
    if counts["validation"]:
        return (
            f"all {counts['validation']} documents fell to validation; give more documents, a smaller "
            "--validation_fraction, or --document_per blank_line if blank lines separate them"
        )
    if counts["too_short"]:
        return f"nothing to train on: each of the {counts['too_short']} documents has fewer than {MIN_DOCUMENT_TOKENS} tokens"
    return "the corpus is empty: no text in it"


class _Workers:
    """A process pool whose results come in the order of the tasks, with a bounded number of tasks under way."""

    def __init__(self, num_workers: int, *settings: Any) -> None:
        self._pool = ProcessPoolExecutor(
            num_workers, get_context("spawn"), initializer=_set_up_worker, initargs=settings
        )
        self._max_pending = 2 * num_workers

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, task: Callable[..., _T], *words: Any) -> Future[_T]:
        """Submit a task; a process started for it inherits that Ctrl-C, which ends them all, is for the parent."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(task, *words)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def run(self, task: Callable[..., _T], arguments: Iterator[tuple[Any, ...]]) -> Iterator[_T]:
        pending: deque[Future[_T]] = deque()
        try:
            for words in arguments:
                pending.append(self._submit(task, *words))
                if len(pending) >= self._max_pending:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, for example for want of memory; try fewer --workers"
            ) from None


@dataclass(frozen=True)
class _Worker:
    tokenizer: Tokenizer
    folder: Path
    parameters: BuildParameters


_worker: _Worker  # set once in each worker process, so that tasks carry text and not the tokenizer


def _set_up_worker(tokenizer_path: Path, folder: Path, parameters: BuildParameters) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(load_tokenizer(tokenizer_path), folder, parameters)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _tokenize(
    pool: _Workers, documents: Iterator[Document], counts: Counter[str]
) -> Iterator[tuple[Split, list[np.ndarray]]]:
    """The texts of each document's samples, in the order of the documents."""
    for results in pool.run(_tokenize_batch, ((batch,) for batch in _batches(documents))):
        for split, texts in results:
            counts[split if texts else "too_short"] += 1
            if texts:
                yield split, texts


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += sum(map(len, document.lines))
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _tokenize_batch(documents: list[Document]) -> list[tuple[Split, list[np.ndarray]]]:
    parameters = _worker.parameters
    results: list[tuple[Split, list[np.ndarray]]] = []
    for document in documents:
        split: Split = "validation" if document.hash < parameters.validation_fraction * 2**64 else "train"
        ids = _worker.tokenizer.encode(document.lines)
        long_enough = len(ids) >= MIN_DOCUMENT_TOKENS
        results.append((split, cut_into_texts(ids, parameters.max_length_tokens) if long_enough else []))
    return results


def _write_shards(
    pool: _Workers, tokenized: Iterator[tuple[Split, list[np.ndarray]]], parameters: BuildParameters
) -> Iterator[tuple[Split, dict[str, Any]]]:
    def full_shards() -> Iterator[tuple[Split, int, list[np.ndarray]]]:
        waiting: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        num_written: Counter[Split] = Counter()
        for split, texts in tokenized:
            waiting[split] += texts
            while len(waiting[split]) >= parameters.shard_samples:
                yield split, num_written[split], waiting[split][: parameters.shard_samples]
                num_written[split] += 1
                del waiting[split][: parameters.shard_samples]
        for split in SPLITS:
            if waiting[split]:
                yield split, num_written[split], waiting[split]

    yield from pool.run(_write_one_shard, full_shards())


def _write_one_shard(split: Split, index: int, texts: list[np.ndarray]) -> tuple[Split, dict[str, Any]]:
    parameters, tokenizer = _worker.parameters, _worker.tokenizer
    # Validation samples are numbered from the top, so that no two samples of a data set share their draws.
    first_sample = index * parameters.shard_samples + (2**48 if split == "validation" else 0)
    samples = assemble(
        texts, parameters.max_length_tokens, seed=parameters.seed, first_sample=first_sample,
        sos_id=tokenizer.sos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
    )  # fmt: skip
    mask_sets = [
        draw_mask_set(
            samples.tokens_BL, samples.length_B, special_ids=tokenizer.special_ids, normal_ids=tokenizer.normal_ids,
            mask_id=tokenizer.mask_id, max_masked_tokens=parameters.max_masked_tokens, seed=parameters.seed,
            first_sample=first_sample, mask_set=mask_set,
        )
        for mask_set in range(parameters.mask_sets)
    ]  # fmt: skip
    return split, write_shard(_worker.folder / shard_name(split, index), samples, mask_sets, tokenizer.vocab_size)
