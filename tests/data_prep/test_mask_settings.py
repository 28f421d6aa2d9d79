"""The rate of each mask set, the blocks, and which set an epoch uses."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from data_prep.mask_settings import PAPER_MASKS, MaskSettings, num_masked


@pytest.mark.parametrize(
    ("maskable", "masked"),
    [(0, 0), (1, 1), (3, 1), (8, 1), (9, 1), (10, 2), (16, 2), (17, 3), (30, 5), (100, 15), (509, 76)],
)
def test_fifteen_percent_halves_up_at_least_one(maskable: int, masked: int) -> None:
    assert num_masked(maskable, 0.15) == masked


@pytest.mark.parametrize("rate", ["0.000001", "0.1", "0.225", "0.3", "0.333333", "0.5", "0.999999"])
def test_any_rate_halves_up_at_least_one(rate: str) -> None:
    expected = [max(1, floor(Fraction(rate) * n + Fraction(1, 2))) if n else 0 for n in range(2000)]
    assert num_masked(np.arange(2000), float(rate)).tolist() == expected


@pytest.mark.parametrize(
    ("rate", "mask_sets", "rates"),
    [
        ("0.15", 1, (0.15,)),
        ("0.15", 3, (0.15,) * 3),
        ("0.30:0.15", 2, (0.3, 0.15)),
        ("0.30:0.15", 4, (0.3, 0.25, 0.2, 0.15)),
        ("0.2:0.3", 3, (0.2, 0.25, 0.3)),
        ("0.30:0.15", 8, (0.3, 0.278571, 0.257143, 0.235714, 0.214286, 0.192857, 0.171429, 0.15)),
        ("0.4:0.4", 1, (0.4,)),
    ],
)
def test_rates_go_in_equal_steps_from_the_first_set_to_the_last(
    rate: str, mask_sets: int, rates: tuple[float, ...]
) -> None:
    masks = MaskSettings.parse(rate, mask_sets, 0.4, "2:6")
    assert masks == MaskSettings(rates, 0.4, (2, 6))
    assert masks.is_constant == (len(set(rates)) == 1)
    assert masks.max_masked(512, 3) == round(max(rates) * 509)


@pytest.mark.parametrize(
    ("lengths", "expected"), [("2:6", (2, 6)), ("3", (3, 3)), ("1:1", (1, 1)), ("1:255", (1, 255))]
)
def test_lengths_of_blocks(lengths: str, expected: tuple[int, int]) -> None:
    assert MaskSettings.parse("0.15", 1, 0.0, lengths).block_lengths == expected


@pytest.mark.parametrize(
    "rate", ["0", "1", "-0.1", "nan", "inf", "1e-9", "1e400", "", ":", "0.3:", "a", "0.1:0.2:0.3", "0.2:nan"]
)
def test_a_rate_that_cannot_be(rate: str) -> None:
    with pytest.raises(ValueError, match=r"^mask_rate is .*, expected a number from 0\.000001 to 0\.999999, or two"):
        MaskSettings.parse(rate, 2, 0.4, "2:6")


def test_two_rates_take_two_sets() -> None:
    with pytest.raises(ValueError, match=r"mask_rate is 0\.3:0\.15, which takes at least 2 mask sets: mask_sets is 1"):
        MaskSettings.parse("0.3:0.15", 1, 0.4, "2:6")


@pytest.mark.parametrize("lengths", ["0", "0:3", "6:2", "2:256", "", ":", "2:", "x", "-1:4", "1.5", "2:6:8", "10" * 50])
def test_lengths_that_cannot_be(lengths: str) -> None:
    with pytest.raises(
        ValueError, match=r"^block_lengths is .*, expected tokens of the shortest and the longest block"
    ):
        MaskSettings.parse("0.15", 1, 0.4, lengths)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_that_cannot_be(share: float) -> None:
    with pytest.raises(ValueError, match=r"^block_share is .*, expected 0 to 1$"):
        MaskSettings.parse("0.15", 1, share, "2:6")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"mask_rate is 2, .*; block_share is 7, .*; block_lengths is 0, "):
        MaskSettings.parse("2", 1, 7, "0")


def test_a_data_set_from_before_there_was_a_choice_has_the_papers_masks() -> None:
    assert MaskSettings.of_data_set({"mask_sets": 1}) == PAPER_MASKS == MaskSettings((0.15,), 0.4, (2, 6))
    parameters = {"mask_sets": 2, "mask_rate": "0.3:0.15", "block_share": 0.2, "block_lengths": "3:4"}
    assert MaskSettings.of_data_set(parameters) == MaskSettings((0.3, 0.15), 0.2, (3, 4))


@pytest.mark.parametrize("num_sets", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_epochs", [1, 2, 3, 4, 5, 8, 20, 41])
def test_which_set_an_epoch_uses(num_sets: int, num_epochs: int) -> None:
    epochs = np.arange(num_epochs + 5)
    constant = MaskSettings((0.2,) * num_sets)
    assert constant.sets_of_epochs(epochs, num_epochs).tolist() == [e % num_sets for e in range(num_epochs + 5)]
    if num_sets > 1:
        falling = MaskSettings.parse("0.3:0.15", num_sets, 0.4, "2:6")
        sets = falling.sets_of_epochs(epochs, num_epochs).tolist()
        assert sets[:num_epochs] == [floor(Fraction(e * num_sets, num_epochs)) for e in range(num_epochs)]
        assert sets[num_epochs:] == [num_sets - 1] * 5, "a run that goes on behind its schedule stays at the last rate"
        assert sets == sorted(sets), "the rate never rises again"
        for done in range(num_epochs + 1):
            expected = np.bincount(sets[:done], minlength=num_sets).tolist()
            assert falling.epochs_of_sets(done, num_epochs) == expected
    for done in (0, 1, num_epochs):
        expected = np.bincount(epochs[:done] % num_sets, minlength=num_sets).tolist()
        assert constant.epochs_of_sets(done, num_epochs) == expected
