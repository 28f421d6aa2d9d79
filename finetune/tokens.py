"""Texts as token ids: thousands of lists in one array, two bytes a token where the vocabulary allows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from data_prep.tokenizer import Tokenizer

TEXTS_AT_ONCE = 256
"""Texts that are tokenized in one call: many enough to be fast, few enough to take no memory worth counting."""
_T = TypeVar("_T")


class TokenLists:
    """Lists of token ids, read only: `lists[i]` is an array of the ids of list i."""

    def __init__(self, ids: np.ndarray, edges: np.ndarray) -> None:
        """`ids`: all lists concatenated; `edges`: where each begins, and where the last ends, int64 [N + 1]."""
        self._ids, self._edges = ids, edges

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, place: int) -> np.ndarray:
        return self._ids[self._edges[place] : self._edges[place + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[place] for place in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each list, int64 [N]."""
        return np.diff(self._edges)

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return self._ids.nbytes + self._edges.nbytes


class TokenListsBuilder:
    """Token lists that grow."""

    def __init__(self, vocab_size: int) -> None:
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        self._ids = bytearray()  # grows in place, unlike an array
        self._lengths: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._lengths))

    def add(self, lists: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Append lists."""
        for ids in lists:
            self._ids += np.asarray(ids, dtype=self._dtype).tobytes()
        self._lengths.append(np.array([*map(len, lists)], dtype=np.int32))

    def build(self) -> TokenLists:
        """Return what was added; nothing can be added afterwards."""
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *self._lengths])
        return TokenLists(np.frombuffer(self._ids, dtype=self._dtype), np.cumsum(lengths))


def in_chunks(items: Iterable[_T], size: int = TEXTS_AT_ONCE) -> Iterator[list[_T]]:
    """Yield the items in lists of `size`, the last of which may be shorter."""
    iterator = iter(items)
    while chunk := [*islice(iterator, size)]:
        yield chunk


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids of each text, int32, without special tokens; to be called with at most TEXTS_AT_ONCE texts."""
    if not texts:
        return []
    ids, num_ids = tokenizer.encode_texts([text.encode() for text in texts])
    return np.split(ids, np.cumsum(num_ids)[:-1])
