"""What a data set is made of, counted: lengths, tokens, masks, texts that occur again.

V = vocabulary size, L = max_length_tokens, H = hashes. Both splits count.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.processes import Processes
from data_prep.progress import Stage, Work
from data_prep.recipe import Recipe
from data_prep.shards import CHUNK_SAMPLES, SPLITS, DataSet, SampleBatch, Split
from data_prep.text_counts import TextCounts

MAX_HASHES = 2**21
"""Different texts whose hashes are kept: 24 bytes each, some 50 MB."""


@dataclass
class Measured:
    """What the samples of a data set told."""

    data: DataSet
    recipe: Recipe | None
    token_counts_V: np.ndarray
    """Occurrences of each id that text is made of, the unknown one included; 0 for other special ids."""
    length_counts: np.ndarray
    """Samples of each length, 0 .. L, the three special tokens included."""
    turn_length_counts: np.ndarray
    """Turns of each length in mask set 0, from 0 tokens to the most of a block."""
    texts: TextCounts


def measure(
    data: DataSet,
    recipe: Recipe | None,
    processes: Processes,
    *,
    max_hashes: int = MAX_HASHES,
) -> Measured:
    """Read all samples, a shard a task.

    Raises ValueError for a damaged shard, or a data set made before data_prep counted its text.
    """
    if "text" not in data.manifest:
        raise ValueError(f"{data.folder}: made by an older version, which did not count its text; build it anew")
    num_ids, num_lengths = data.tokenizer.vocab_size, data.max_length_tokens + 1
    measured = Measured(
        data,
        recipe,
        np.zeros(num_ids, np.int64),
        np.zeros(num_lengths, np.int64),
        np.zeros(data.masks.block_lengths[1] + 1, np.int64),
        TextCounts(max_hashes),
    )
    processes.prepare(_set_up, data.folder)
    num_samples = sum(data.num_samples(split) for split in SPLITS)

    def add(work: Work) -> None:
        shard: _MeasuredShard = work.value
        measured.token_counts_V += shard.token_counts_V
        measured.length_counts += shard.length_counts
        measured.turn_length_counts += shard.turn_length_counts
        measured.texts.add(shard.split, shard.hashes_H, shard.counts_H)

    shards = [(split, index) for split in SPLITS for index in range(len(data.manifest["splits"][split]))]
    processes.run(_measure_shard, shards, Stage("measure", num_samples, "sample", is_lasting=False), add)
    measured.texts.settle()
    return measured


# ---- tasks


@dataclass(frozen=True)
class _MeasuredShard:
    split: Split
    token_counts_V: np.ndarray
    length_counts: np.ndarray
    turn_length_counts: np.ndarray
    hashes_H: np.ndarray
    counts_H: np.ndarray


_data: DataSet  # set once in each process


def _set_up(folder: Path) -> None:
    global _data
    _data = DataSet(folder)


def _measure_shard(split: Split, index: int) -> Work:
    tokenizer, parameters = _data.tokenizer, _data.parameters
    first, num_samples = index * parameters["shard_samples"], _data.manifest["splits"][split][index]["num_samples"]
    token_counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    length_counts = np.zeros(_data.max_length_tokens + 1, np.int64)
    turn_length_counts = np.zeros(_data.masks.block_lengths[1] + 1, np.int64)
    hashes = []
    for chunk in range(first // CHUNK_SAMPLES, -(-(first + num_samples) // CHUNK_SAMPLES)):
        batch = _data.read_chunk(split, chunk, 0)
        token_counts_V += np.bincount(batch.tokens_BL.ravel(), minlength=len(token_counts_V))
        length_counts += np.bincount(batch.length_B, minlength=len(length_counts))
        turn_length_counts += _turn_lengths(batch, len(turn_length_counts))
        places = zip(batch.tokens_BL, batch.segment_boundary_B.tolist(), batch.length_B.tolist(), strict=True)
        hashes += [_hash_of_text(tokens_L, boundary, length) for tokens_L, boundary, length in places]
    token_counts_V[[tokenizer.pad_id, tokenizer.sos_id, tokenizer.eos_id]] = 0
    hashes_H, counts_H = np.unique(np.frombuffer(b"".join(hashes), np.uint64), return_counts=True)
    measured = _MeasuredShard(split, token_counts_V, length_counts, turn_length_counts, hashes_H, counts_H)
    return Work(num_samples, tokens=int(token_counts_V.sum()), value=measured)


def _turn_lengths(batch: SampleBatch, num_lengths: int) -> np.ndarray:
    """Return how many turns of the samples have 0, 1, ... tokens."""
    num_samples, most_turns = batch.turns_BP.shape
    turns_BP = batch.turns_BP + (np.arange(num_samples) * (most_turns + 1))[:, None]
    tokens_of_turns = np.bincount(turns_BP[batch.turns_BP > 0])
    return np.bincount(tokens_of_turns[tokens_of_turns > 0], minlength=num_lengths)


def _hash_of_text(tokens_L: np.ndarray, boundary: int, length: int) -> bytes:
    """64 bits of the BLAKE2b of a sample's text, wherever it was split in two."""
    text = tokens_L[1 : boundary - 1].tobytes() + tokens_L[boundary : length - 1].tobytes()
    return hashlib.blake2b(text, digest_size=8).digest()
