"""How alike two documents are, by MinHash: the Jaccard similarity of their sets of 5-word shingles, estimated.

Of each of 128 random functions of a shingle a document's signature keeps the least value; two documents agree in about as
many of them as their similarity says. Documents that agree in all values of a band, some consecutive ones, are
candidates for a comparison (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
from datasketch import MinHash, MinHashLSH

from data_prep.corpus import Document

NUM_VALUES = 128
SHINGLE_WORDS = 5
_SEED = 1
_BLOCK_WORDS = 512  # in memory at a time, with their shingles: what a cache holds
# A character of a script that is written without spaces, or what stands between white space and punctuation.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PUNCTUATION = "!-/:-@\\[-`{-~\xa0-\xbf\u2000-\u206f\u3000-\u303f\uff00-\uff0f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_PUNCTUATION}{_UNSPACED}]+")
_EMPTY = MinHash(NUM_VALUES, _SEED, hashfunc=zlib.crc32, scheme="affine32")


def shingles(document: Document) -> Iterator[list[bytes]]:
    """The shingles, in blocks: every 5 consecutive words, lower-cased; fewer words are one shingle."""
    words = (word for line in document.lines for word in _WORD.findall(line.lower()))
    block = list(islice(words, _BLOCK_WORDS))
    if len(block) < SHINGLE_WORDS:
        yield [(" ".join(block) or "\n".join(document.lines)).encode()]
        return
    while len(block) >= SHINGLE_WORDS:
        yield [" ".join(shingle).encode() for shingle in zip(*(block[i:] for i in range(SHINGLE_WORDS)), strict=False)]
        block = block[1 - SHINGLE_WORDS :] + list(islice(words, _BLOCK_WORDS))


def signature(document: Document) -> np.ndarray:
    """uint32 [NUM_VALUES]."""
    minhash = _EMPTY.copy()
    for block in shingles(document):
        minhash.update_batch(block)
    return np.asarray(minhash.hashvalues)


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of signatures [N, NUM_VALUES], row by row."""
    return np.asarray((first == second).mean(axis=1))


def choose_bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many values find documents of this similarity.

    What is found is compared, so a wrong candidate costs only time: a missed one weighs nine times as much.
    """
    index = MinHashLSH(threshold, NUM_VALUES, weights=(0.1, 0.9))
    return index.b, index.r


def band_keys(signature: np.ndarray, num_bands: int, num_rows: int) -> Iterator[int]:
    """For each band a 64-bit hash of its number and its values."""
    for band, values in enumerate(signature[: num_bands * num_rows].reshape(num_bands, num_rows)):
        digest = hashlib.blake2b(bytes([band]) + values.astype("<u4").tobytes(), digest_size=8).digest()
        yield int.from_bytes(digest, "big")
