"""The table of words against the plain definition."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import words
from data_prep.words import IdsOfWords


def make(calls: list[list[str]]) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """An encoder that gives a word its characters' numbers, and notes what it was asked."""

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        calls.append(texts)
        return np.array([ord(c) for text in texts for c in text], np.int32), np.array([*map(len, texts)])

    return encode


TEXTS = st.lists(
    st.text(alphabet="ab é日\n", max_size=12) | st.text("ab ", max_size=40) | st.text(max_size=5), max_size=6
)


@settings(deadline=None)
@given(batches=st.lists(TEXTS, max_size=5), remembered=st.sampled_from([(0, 0), (2, 8), (1 << 20, 1 << 24)]))
def test_ids_are_those_of_the_words_and_each_is_encoded_once_while_it_is_remembered(
    batches: list[list[str]], remembered: tuple[int, int]
) -> None:
    calls: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_REMEMBERED_WORDS", remembered[0])
        patch.setattr(words, "_REMEMBERED_BYTES", remembered[1])
        ids_of_words = IdsOfWords(make(calls))
        for texts in batches:
            ids, num_ids = ids_of_words([text.encode() for text in texts])
            expected = [[ord(c) for c in text if c not in " \n"] for text in texts]
            assert ids.tolist() == [i for of_text in expected for i in of_text]
            assert num_ids.tolist() == [*map(len, expected)]
    for encoded in calls:
        assert len(set(encoded)) == len(encoded)
    if remembered[0] > 2:
        assert sum(map(len, calls)) == len(
            {word for texts in batches for text in texts for word in re.split("[ \n]", text) if word}
        )


def test_a_word_longer_than_the_table_and_many_words() -> None:
    ids_of_words = IdsOfWords(make(calls := []))
    long = "x" * (words._REMEMBERED_BYTES + 10)
    assert ids_of_words([f"a {long} a".encode()])[1].tolist() == [len(long) + 2]
    many = [str(i) for i in range(200_000)]
    for _ in range(2):
        assert ids_of_words([" ".join(many).encode()])[1].tolist() == [sum(map(len, many))]
    assert [len(c) for c in calls] == [2, 200_000]


def test_forgotten_words_are_encoded_again() -> None:
    ids_of_words = IdsOfWords(make(calls := []))
    before = ids_of_words([b"a b", b"b"])[0].tolist()
    ids_of_words.forget()
    assert ids_of_words([b"a b", b"b"])[0].tolist() == before
    assert [sorted(words) for words in calls] == [["a", "b"]] * 2
