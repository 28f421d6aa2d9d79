"""benchmarks.chaos: what it would find in the records of a run that was interrupted."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.chaos import ALL, BATCH, STARTING, TERM, Fault, differences, settle, table


def record(step: int, **changes: Any) -> dict[str, Any]:
    values = {"kind": "train", "step": step, "samples_consumed": BATCH * step, "ae_loss": 6 / step, "time": step}
    return values | changes


CURVE = [{"kind": "start", "step": 0}, *map(record, range(1, 6))]


def test_equal_bits_are_equal_whenever_they_were_recorded() -> None:
    resumed = [{"kind": "start", "step": 2}, *(record(step, time=100 + step) for step in range(1, 6))]
    assert differences(CURVE, resumed) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (CURVE[:3] + CURVE[4:], ["step 3 is lost"]),
        (CURVE[:-1], ["step 5 is lost"]),
        ([], [f"step {step} is lost" for step in range(1, 6)]),
        (CURVE[:4] + CURVE[3:], ["step 3 is recorded 2 times"]),
        ([*CURVE, record(6)], ["step 6 is not in the uninterrupted run"]),
        ([*CURVE[:-1], record(5, ae_loss=1.2000000000000002)], ["step 5: ae_loss is 1.2000000000000002, expected 1.2"]),
        ([*CURVE[:-1], record(5, loss_scale=2.0)], ["step 5: loss_scale is 2.0, expected None"]),
    ],
)
def test_what_is_lost_repeated_or_changed_is_found(found: list[dict[str, Any]], expected: list[str]) -> None:
    assert differences(CURVE, found) == expected


def test_samples_are_counted_even_where_both_runs_agree() -> None:
    wrong = [*CURVE[:-1], record(5, samples_consumed=4 * BATCH)]
    assert differences(wrong, wrong) == [f"step 5: {4 * BATCH} samples consumed, expected {5 * BATCH}"]


def test_rounding_is_for_fractions_alone() -> None:
    close = [*CURVE[:-1], record(5, ae_loss=1.2001)]
    assert differences(CURVE, close, rounding=1e-3) == []
    assert differences(CURVE, close, rounding=1e-5) == ["step 5: ae_loss is 1.2001, expected 1.2"]
    not_a_number = [*CURVE[:-1], record(5, ae_loss=float("nan"))]
    assert differences(CURVE, not_a_number, rounding=1e-3) == ["step 5: ae_loss is nan, expected 1.2"]
    skipped = [*CURVE[:-1], record(5, samples_consumed=5 * BATCH + 1)]
    assert len(differences(CURVE, skipped, rounding=0.5)) == 2


def test_the_table_counts_what_was_resumed() -> None:
    faults = [Fault(TERM, 8, 8, 1.0), Fault(ALL, 7, 4, 0.25), Fault(ALL, 5, 4, 0.75), Fault(ALL, 5, -1)]
    lines = table(faults)
    assert lines[2:] == [f"| {ALL} | 3 | 2 | 2.0 | 0.3 (0.8) |", f"| {TERM} | 1 | 1 | 0.0 | 1.0 (1.0) |"]


def test_a_start_that_was_killed_at_once_leaves_the_fault_before_it_to_the_next() -> None:
    faults = [Fault(ALL, 7, -1), Fault(STARTING, 7, -1), Fault(STARTING, 7, 4), Fault(ALL, 9, 8), Fault(ALL, 9, -1)]
    settle(faults)
    assert [(f.step, f.resumed_step) for f in faults] == [(7, 4), (4, 4), (4, 4), (9, 8), (9, -1)]
