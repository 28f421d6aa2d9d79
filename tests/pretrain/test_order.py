"""The cursor: every position once, in order, but for what is skipped, whatever the interruptions."""

from __future__ import annotations

import json
import random

from pretrain.order import Cursor


def test_steps_follow_each_other() -> None:
    cursor = Cursor(batch_samples=8)
    assert [cursor.next() for _ in range(3)] == [range(0, 8), range(8, 16), range(16, 24)]
    assert cursor.samples_consumed == 24


def test_skipped_ranges_are_passed_also_one_after_another() -> None:
    cursor = Cursor(batch_samples=10)
    for positions in (range(10, 30), range(50, 60), range(30, 40)):
        cursor.skip(positions)
    assert [cursor.next().start for _ in range(4)] == [0, 40, 60, 70]


def test_a_copy_moves_by_itself() -> None:
    cursor = Cursor(batch_samples=8)
    cursor.copy().next()
    assert cursor.samples_consumed == 0


def test_interrupted_and_rewound_at_random_it_goes_where_its_rule_says() -> None:
    """Against the plain definition: the positions are those of no skipped range, in order, cut into steps."""
    draw = random.Random(0)
    for _ in range(200):
        batch = draw.randint(1, 5)
        cursor = Cursor(batch)
        saved, taken_at_save, taken = cursor.state_dict(), 0, []
        for _ in range(40):
            taken.append(cursor.next())
            match draw.randrange(8):
                case 0:
                    saved, taken_at_save = json.loads(json.dumps(cursor.state_dict())), len(taken)
                case 1:
                    cursor = Cursor(batch, json.loads(json.dumps(cursor.state_dict())))
                case 2:  # a step at fault
                    stop = cursor.samples_consumed
                    cursor.rewind(Cursor(batch, saved))
                    del taken[taken_at_save:]
                    cursor.skip(range(cursor.copy().next().start, stop))
        skipped = {position for positions in cursor.skipped for position in positions}
        allowed = [position for position in range(cursor.samples_consumed) if position not in skipped]
        found = [position for positions in taken for position in positions]
        assert found == allowed[: len(found)]
        assert len(allowed) == len(found)
