"""The ids of words, each encoded once and remembered.

A corpus has few distinct words for its length, and looking one up in a table costs a tenth of encoding it. The table is
bounded: when it is full, it is begun anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np
import pyarrow as pa

from data_prep.draws import word_of

_REMEMBERED_WORDS = 1 << 20
_REMEMBERED_BYTES = 1 << 24
_LEAST_ROOM_BYTES = 1 << 21
_SPACE = 0x20
_CHUNK_BYTES = 8
_CHUNK = np.uint64(_CHUNK_BYTES)
_SHORT_BYTES = np.uint64(7)  # of a word in a 64-bit key, with its length
_LENGTH_SHIFT = np.uint64(56)
_LONG = np.uint64(0xFF << 56)


class IdsOfWords:
    """Ids of texts as those of what stands between their spaces and line ends."""

    def __init__(self, encode: Callable[[list[str]], tuple[np.ndarray, np.ndarray]]) -> None:
        """`encode`: of each word the ids, one behind the other, and how many of each."""
        self._encode = encode
        self.forget()

    def forget(self) -> None:
        """Let go of the table and its memory."""
        self._num_words, self._capacity = 0, -1
        self._keys, self._numbers = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int32)
        self._content, self._ids = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int32)
        self._edges, self._id_edges = (np.empty(0, dtype=np.int64) for _ in range(2))

    def __call__(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, in UTF-8, one behind the other, int32, and how many of each."""
        content = b" ".join([*texts, b""]).replace(b"\n", b" ")
        if not self._has_room(len(content)):
            self._begin_anew(len(content))
        chunks = np.frombuffer(
            content + bytes(_CHUNK_BYTES - len(content) % _CHUNK_BYTES + _CHUNK_BYTES), dtype=np.uint64
        )
        ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == _SPACE)
        text_ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64) - 1
        numbers = np.empty(len(ends), dtype=np.int32)
        words_before = np.zeros(len(texts) + 1, dtype=np.int64)
        num_known = self._num_words
        self._num_words = _number_words(
            chunks,
            ends,
            text_ends,
            self._keys,
            self._numbers,
            self._content,
            self._edges,
            num_known,
            numbers,
            words_before,
        )
        self._encode_from(num_known)
        numbers = numbers[: words_before[-1]]
        ids_before = np.zeros(len(texts) + 1, dtype=np.int64)
        num_ids = _count_ids(numbers, words_before, self._id_edges, ids_before)
        ids = np.empty(num_ids, dtype=np.int32)
        _look_up(numbers, self._ids, self._id_edges, ids)
        return ids, np.diff(ids_before)

    def _has_room(self, num_bytes: int) -> bool:
        """For a text of so many bytes, each second of them a new word; what is not touched takes no memory."""
        if (
            self._capacity < 0
            or self._num_words > _REMEMBERED_WORDS
            or self._edges[self._num_words] > _REMEMBERED_BYTES
        ):
            return False
        return self._capacity >= num_bytes

    def _begin_anew(self, num_bytes: int) -> None:
        capacity = max(num_bytes, self._capacity, _LEAST_ROOM_BYTES)
        self.forget()  # first: there is not room for two
        self._capacity = capacity
        num_words = _REMEMBERED_WORDS + self._capacity // 2 + 2
        num_slots = 1 << (num_words + num_words // 2).bit_length()  # a third to two thirds of them in use
        self._keys, self._numbers = np.zeros(num_slots, dtype=np.uint64), np.zeros(num_slots, dtype=np.int32)
        self._content = np.empty((_REMEMBERED_BYTES + self._capacity) // _CHUNK_BYTES + 2, dtype=np.uint64)
        self._edges, self._id_edges = (np.zeros(num_words + 1, dtype=np.int64) for _ in range(2))
        self._ids = np.empty(1 << 16, dtype=np.int32)

    def _encode_from(self, first: int) -> None:
        stop = self._num_words
        if first == stop:
            return
        start_byte, edges = self._edges[first], self._edges[first : stop + 1]
        words = pa.LargeStringArray.from_buffers(
            stop - first,
            pa.py_buffer(edges - start_byte),
            pa.py_buffer(self._content.view(np.uint8)[start_byte : edges[-1]]),
        )
        ids, num_ids = self._encode(words.to_pylist())
        np.cumsum(num_ids, out=self._id_edges[first + 1 : stop + 1])
        self._id_edges[first + 1 : stop + 1] += self._id_edges[first]
        if self._id_edges[stop] > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(self._id_edges[stop], dtype=np.int32)])
        self._ids[self._id_edges[first] : self._id_edges[stop]] = ids


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _number_words(
    chunks: np.ndarray, ends: np.ndarray, text_ends: np.ndarray, keys: np.ndarray, numbers_of_keys: np.ndarray,
    known: np.ndarray, edges: np.ndarray, num_words: int, numbers: np.ndarray, words_before: np.ndarray,
) -> int:  # fmt: skip
    """Write each word's number, and enter new words into the table; returns how many words are known now.

    `chunks` and `known`: texts, and the words known, eight bytes at a time; `ends`: of the words, as are `text_ends`.
    A slot holds a word's key and its number + 1, or 0; a word's slot is the first free one from where its key points. The
    key of a short word, as most are, is the word itself: nothing else need be looked at.
    """
    mask, place, text, start = np.uint64(len(keys) - 1), 0, 0, np.uint64(0)
    content, known_content = chunks.view(np.uint8), known.view(np.uint8)
    for word in range(len(ends)):
        end = np.uint64(ends[word])
        size = end - start
        if size:
            is_short = size <= _SHORT_BYTES
            if is_short:
                key = _bytes_at(chunks, start, size) | size << _LENGTH_SHIFT
            else:
                key, at = np.uint64(0), start
                while at < end:
                    key = (key ^ _bytes_at(chunks, at, min(end - at, _CHUNK))) * np.uint64(0x100000001B3)
                    key ^= key >> np.uint64(32)
                    at += _CHUNK
                key = word_of(key, int(size)) | _LONG
            slot = (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32) & mask
            while True:
                number = int(numbers_of_keys[slot]) - 1
                if number < 0 or (
                    keys[slot] == key
                    and (is_short or _is_equal(chunks, start, size, known, edges[number], edges[number + 1]))
                ):
                    break
                slot = (slot + np.uint64(1)) & mask
            if number < 0:
                number = num_words
                keys[slot], numbers_of_keys[slot] = key, number + 1
                first = edges[number]
                for byte in range(size):
                    known_content[np.uint64(first) + byte] = content[start + byte]
                edges[number + 1] = first + size
                num_words += 1
            numbers[place] = number
            place += 1
        if end == text_ends[text]:
            text += 1
            words_before[text] = place
        start = end + np.uint64(1)
    return num_words


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _bytes_at(chunks: np.ndarray, at: np.uint64, number: np.uint64) -> np.uint64:
    """At most eight, from place `at`; those behind `number` are zero."""
    place, shift = at >> np.uint64(3), (at & np.uint64(7)) << np.uint64(3)
    found: np.uint64 = chunks[place] >> shift | chunks[place + np.uint64(1)] << np.uint64(1) << (np.uint64(63) - shift)
    kept: np.uint64 = found & ~np.uint64(0) >> (_CHUNK - number << np.uint64(3))
    return kept


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _is_equal(chunks: np.ndarray, start: np.uint64, size: np.uint64, known: np.ndarray, first: int, last: int) -> bool:
    if size != np.uint64(last - first):
        return False
    done = np.uint64(0)
    while done < size:
        number = min(size - done, _CHUNK)
        if _bytes_at(chunks, start + done, number) != _bytes_at(known, np.uint64(first) + done, number):
            return False
        done += _CHUNK
    return True


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _count_ids(numbers: np.ndarray, words_before: np.ndarray, id_edges: np.ndarray, ids_before: np.ndarray) -> int:
    count = 0
    for text in range(len(words_before) - 1):
        for word in range(words_before[text], words_before[text + 1]):
            count += id_edges[numbers[word] + 1] - id_edges[numbers[word]]
        ids_before[text + 1] = count
    return count


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _look_up(numbers: np.ndarray, known: np.ndarray, id_edges: np.ndarray, ids: np.ndarray) -> None:
    place = 0
    for number in numbers:
        for index in range(id_edges[number], id_edges[number + 1]):
            ids[place] = known[index]
            place += 1
