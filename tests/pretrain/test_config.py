"""The flags of a run: numbers that no run can have are refused in words."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pretrain.config import RunConfig
from pretrain.model import PMLMConfig


def numbers_of(cls: type) -> list[tuple[str, type]]:
    hints = get_type_hints(cls)
    kinds = {field.name: (float if hints[field.name] is float else int) for field in fields(cls)}  # type: ignore[arg-type]
    return [(name, kind) for name, kind in kinds.items() if hints[name] in (int, float, int | None)]


@pytest.mark.parametrize(("name", "kind"), numbers_of(RunConfig))
def test_impossible_numbers_of_a_run_are_refused(name: str, kind: type) -> None:
    values: list[Any] = [-1, 10**20] + ([math.nan, math.inf, -math.inf] if kind is float else [])
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least"):
            RunConfig(Path("ds.json"), **{name: value})


@pytest.mark.parametrize(("name", "kind"), numbers_of(PMLMConfig))
def test_impossible_numbers_of_a_model_are_refused(name: str, kind: type) -> None:
    values: list[Any] = [-1, 10**20] + ([math.nan, math.inf, -math.inf] if kind is float else [])
    for value in values:
        with pytest.raises(ValueError, match=f"{name} (is )?{value}"):
            PMLMConfig(**{"vocab_size": 50, name: value})


def test_the_greatest_seed_is_one_of_torchs_and_numpys() -> None:
    assert RunConfig(Path("ds.json"), seed=2**63 - 1).seed == 2**63 - 1
