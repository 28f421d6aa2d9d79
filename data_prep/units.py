"""The first stage of a build: what becomes of a unit of the input, and the files that hold it until the shards are written.

unit-00000012.npz     of each split, the ids of its texts, one behind the other, and how many of each
unit-00000012.json    counts of documents and samples; written last: without it the unit is not done
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import Document
from data_prep.files import read_json, write_json, write_whole
from data_prep.packing import MIN_DOCUMENT_TOKENS, Texts, cut_into_texts
from data_prep.parameters import BuildParameters
from data_prep.shards import SPLITS, Split, token_dtype
from data_prep.tokenizer import Tokenizer

_LENGTH = "documents_of_tokens_"
_GROUP_BYTES = 2**20  # encoded in one call


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, parameters: BuildParameters
) -> tuple[dict[Split, Texts], Counter[str]]:
    """The documents as texts that fit a sample, and counts of what became of them."""
    token = token_dtype(tokenizer.vocab_size)
    ids, num_ids, hashes, sizes = [np.zeros(0, token)], [np.zeros(0, np.int64)], [], []
    counts: Counter[str] = Counter()
    for group in _groups(documents):
        group_ids, group_num_ids = tokenizer.encode_texts([document.utf8 for document in group])
        ids.append(group_ids.astype(token))
        num_ids.append(group_num_ids)
        hashes += [document.hash for document in group]
        sizes += [len(document.utf8) for document in group]
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


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    num_bytes = 0
    for document in documents:
        group.append(document)
        num_bytes += len(document.utf8)
        if num_bytes >= _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


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


def _file(work: Path, unit: int, suffix: str) -> Path:
    return work / f"unit-{unit:08d}.{suffix}"


def is_done(work: Path, unit: int) -> bool:
    """Whether the unit's files are whole."""
    return _file(work, unit, "json").exists()


def write_unit(work: Path, unit: int, texts: dict[Split, Texts], counts: Counter[str]) -> None:
    """Leave what became of a unit in its files."""
    arrays = {f"{split}_{name}": array for split in texts for name, array in vars(texts[split]).items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(_file(work, unit, "npz"), content.getvalue())
    write_json(_file(work, unit, "json"), dict(sorted(counts.items())))


def read_texts(work: Path, unit: int, split: Split) -> Texts:
    """The texts of a unit."""
    with np.load(_file(work, unit, "npz"), allow_pickle=False) as stored:
        return Texts(stored[f"{split}_ids"], stored[f"{split}_num_ids_B"])


def read_counts(work: Path, unit: int) -> dict[str, int]:
    """The counts of a unit."""
    counts: dict[str, int] = read_json(_file(work, unit, "json"))
    return counts
