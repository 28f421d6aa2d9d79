"""The first stage of a build: what becomes of a unit of the input, and the files that hold it until the shards are written.

unit-00000012.npz     of each split, the ids of its texts, one behind the other, and where each text ends
unit-00000012.json    counts of documents and samples; written last: without it the unit is not done
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import Document
from data_prep.files import read_json, write_json, write_whole
from data_prep.packing import MIN_DOCUMENT_TOKENS, cut_into_texts
from data_prep.parameters import BuildParameters
from data_prep.shards import SPLITS, Split, token_dtype
from data_prep.tokenizer import Tokenizer

_LENGTH = "documents_of_tokens_"


@dataclass(frozen=True)
class Texts:
    """Texts of a unit: text i is ids[ends[i - 1] : ends[i]]."""

    ids: np.ndarray
    ends: np.ndarray

    def __getitem__(self, text: int) -> np.ndarray:
        return self.ids[self.ends[text - 1] if text else 0 : self.ends[text]]


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, parameters: BuildParameters
) -> tuple[dict[Split, Texts], Counter[str]]:
    """The documents as texts that fit a sample, and counts of what became of them."""
    texts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts: Counter[str] = Counter()
    for document in documents:
        document_hash = document.hash
        split: Split = "validation" if document_hash < parameters.validation_fraction * 2**64 else "train"
        ids = tokenizer.encode(document.lines)
        if len(ids) < MIN_DOCUMENT_TOKENS:
            counts["too_short"] += 1
            continue
        counts[split] += 1
        counts["text_bytes"] += document.size_bytes
        counts["text_tokens"] += len(ids)
        counts[f"{_LENGTH}{len(ids) - len(ids) % bin_width(len(ids))}"] += 1
        texts[split] += cut_into_texts(
            ids, parameters.max_length_tokens, short_sample_probability=parameters.short_sample_probability,
            seed=parameters.seed, document_hash=document_hash,
        )  # fmt: skip
    token = token_dtype(tokenizer.vocab_size)
    stored: dict[Split, Texts] = {}
    for split, of_split in texts.items():
        counts[f"{split}_samples"] = len(of_split)
        ids = np.concatenate([np.zeros(0, token), *of_split], dtype=token, casting="unsafe")
        stored[split] = Texts(ids, np.cumsum([len(text) for text in of_split], dtype=np.int64))
    return stored, counts


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
        return Texts(stored[f"{split}_ids"], stored[f"{split}_ends"])


def read_counts(work: Path, unit: int) -> dict[str, int]:
    """The counts of a unit."""
    counts: dict[str, int] = read_json(_file(work, unit, "json"))
    return counts
