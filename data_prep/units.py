"""The first stage of a build: what becomes of a unit of the input, and the files that hold it until the shards are written.

A unit is tokenized part by part, so that memory does not grow with its text: a compressed file is one unit, however large.

unit-00000012-000000-end.npz    of a part, for each split, the ids of its texts, one after the other, and how many of each;
                                and counts of documents and samples, as JSON; in the last part the digests of the unit's input
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import Document
from data_prep.files import unfinished_file
from data_prep.packing import MIN_DOCUMENT_TOKENS, Texts, cut_into_texts
from data_prep.parameters import BuildParameters
from data_prep.shards import SPLITS, Split, token_dtype
from data_prep.tokenizer import Tokenizer

_LENGTH = "documents_of_tokens_"
_GROUP_BYTES = 2**20  # encoded in one call
PART_BYTES = 2**25
"""Of text in a part, which has about half as many bytes of ids; most units have less."""
UNIT = "unit"


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, parameters: BuildParameters
) -> tuple[dict[Split, Texts], Counter[str]]:
    """The documents as texts that fit a sample, and counts of what became of them."""
    token = token_dtype(tokenizer.vocab_size)
    ids, num_ids = [np.zeros(0, token)], [np.zeros(0, np.int64)]
    hashes: list[int] = []
    sizes: list[int] = []
    counts: Counter[str] = Counter()
    for group_texts, group_hashes in _groups(documents):
        group_ids, group_num_ids = tokenizer.encode_texts(group_texts)
        ids.append(group_ids.astype(token))
        num_ids.append(group_num_ids)
        hashes += group_hashes
        sizes += map(len, group_texts)
    ids_N, num_ids_D, hash_D = np.concatenate(ids), np.concatenate(num_ids), np.array(hashes, dtype=np.uint64)
    is_long_D = num_ids_D >= MIN_DOCUMENT_TOKENS
    is_held_out_D = hash_D < np.uint64(ceil(parameters.validation_fraction * 2**64))
    texts: dict[Split, Texts] = {}
    for split in SPLITS:
        is_chosen_D = is_long_D & (is_held_out_D == (split == "validation"))
        num_ids_B = cut_into_texts(
            num_ids_D[is_chosen_D], hash_D[is_chosen_D], parameters.max_length_tokens,
            short_sample_probability=parameters.short_sample_probability, seed=parameters.seed,
        )  # fmt: skip
        texts[split] = Texts(ids_N[np.repeat(is_chosen_D, num_ids_D)], num_ids_B)
        counts[split], counts[f"{split}_samples"] = int(np.count_nonzero(is_chosen_D)), len(num_ids_B)
    counts["too_short"] = int(np.count_nonzero(~is_long_D))
    counts["text_bytes"] = int(np.array(sizes, dtype=np.int64)[is_long_D].sum())
    counts["text_tokens"] = int(num_ids_D[is_long_D].sum())
    for length, count in zip(*np.unique(num_ids_D[is_long_D], return_counts=True), strict=True):
        counts[f"{_LENGTH}{length - length % bin_width(int(length))}"] += int(count)
    return texts, counts


def _groups(documents: Iterable[Document]) -> Iterator[tuple[list[bytes], list[int]]]:
    """The texts of documents, and their hashes."""
    texts: list[bytes] = []
    hashes: list[int] = []
    num_bytes = 0
    for document in documents:
        text = document.utf8
        texts.append(text)
        hashes.append(document.hash)
        num_bytes += len(text)
        if num_bytes >= _GROUP_BYTES:
            yield texts, hashes
            texts, hashes, num_bytes = [], [], 0
    if texts:
        yield texts, hashes


def bin_width(length: int) -> int:
    """Lengths are counted in bins: `length` in that of all with the same three leading binary digits."""
    return 1 << max(0, length.bit_length() - 3)


def describe_text(counts: Counter[str]) -> dict[str, Any]:
    """What the manifest tells of the text of the documents kept; their lengths are the lower ends of bins."""
    lengths = sorted(int(name.removeprefix(_LENGTH)) for name in counts if name.startswith(_LENGTH))
    return {
        "num_bytes": counts["text_bytes"],
        "num_tokens": counts["text_tokens"],
        "document_lengths_tokens": {str(length): counts[f"{_LENGTH}{length}"] for length in lengths},
    }


@dataclass
class Part:
    """Documents of a unit until their text reaches `PART_BYTES`. Read to its end, it knows whether it is the last one."""

    documents: Iterator[Document]
    num_documents: int = 0
    num_bytes: int = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            yield document
            self.num_documents += 1
            self.num_bytes += len(document.utf8)
            if self.num_bytes >= PART_BYTES:
                return

    @property
    def is_last(self) -> bool:
        """Whether the documents came to their end before the part was full."""
        return self.num_bytes < PART_BYTES


def write_part(path: Path, texts: dict[Split, Texts], counts: Counter[str], digests: bytes | bytearray) -> None:
    """Leave what became of a part of a unit in its file, and, in the last part, what the unit's input was."""
    arrays = {f"{split}_{name}": array for split in texts for name, array in vars(texts[split]).items()}
    arrays["counts"] = np.frombuffer(json.dumps(dict(sorted(counts.items()))).encode(), np.uint8)
    arrays["digests"] = np.frombuffer(digests, np.uint8)
    with unfinished_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its signature has a flag beside the arrays


def read_texts(path: Path, split: Split) -> Texts:
    """Return the texts of a part."""
    with np.load(path, allow_pickle=False) as stored:
        return Texts(stored[f"{split}_ids"], stored[f"{split}_num_ids_B"])


def read_digests(path: Path) -> bytes:
    """Return the digests of the blocks of a unit's input, from its last part."""
    with np.load(path, allow_pickle=False) as stored:
        digests: bytes = stored["digests"].tobytes()
    return digests


def read_counts(path: Path) -> dict[str, int]:
    """Return the counts of a part."""
    with np.load(path, allow_pickle=False) as stored:
        counts: dict[str, int] = json.loads(stored["counts"].tobytes())
    return counts
