from __future__ import annotations

from typing import Any

import pytest

from data_prep.differences import describe_differences


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ({"a": 1}, {"a": 1}, ""),
        ({"a": 1, "b": "x"}, {"a": 2, "b": "y"}, "a was 1, is 2; b was x, is y"),
        ({"p": {"a": 1, "b": None}}, {"p": {"a": 1, "b": False}}, "p b was null, is false"),
        ({"p": {"a": 1}}, {"p": {"c": 2}}, "p a was 1, is not there; p c was not there, is 2"),
        ({"p": None}, {"p": {"a": 1}}, 'p was null, is {"a": 1}'),
        ([{"name": "x", "n": 1}, {"name": "y"}], [{"name": "x", "n": 2}, {"name": "y"}], "x n was 1, is 2"),
        ({"s": [{"name": "x"}]}, {"s": [{"name": "x"}, {"name": "y"}]}, "s y was not there, is {}"),
        ({"s": [{"name": "x"}, {"name": "y"}]}, {"s": [{"name": "y"}, {"name": "x"}]}, "the order of the s is another"),
        ({"s": [1, 2]}, {"s": [1, 3]}, "s 1 was 2, is 3"),
        (
            {"s": [{"name": "x", "n": 1}] * 2},
            {"s": [{"name": "x", "n": 2}] * 2},
            "s 0 n was 1, is 2; s 1 n was 1, is 2",
        ),
        ({"sha256": "ab" * 32}, {"sha256": "cd" * 32}, "sha256 was abababababab, is cdcdcdcdcdcd"),
    ],
)
def test_what_differs_is_named(was: Any, now: Any, told: str) -> None:
    assert describe_differences(was, now) == told


def test_many_differences_are_counted() -> None:
    told = describe_differences({str(i): 0 for i in range(2000)}, {str(i): 1 for i in range(2000)})
    assert told.endswith("4 was 0, is 1; and 1,995 more")
