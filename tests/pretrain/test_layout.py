"""The layout against the paper's grid, and against leaks of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MASK, random_batch

from data_prep.shards import SampleBatch
from pretrain.layout import CONTEXT, GIVEN, PSEUDO, Layout, Objective, pseudo_masked_layout, visible

GRID = """
    1 1 1 1 1 1   . . .   . . .
    1 1 1 1 1 1   . . .   . . .
    1 1 1 1 1 1   . . .   . . .
    1 1 1 1 1 1   . . .   . . .
    1 1 1 1 1 1   . . .   . . .
    1 1 1 1 1 1   . . .   . . .
    1 1 1 1 1 1   1 1 .   . . .
    1 1 1 1 1 1   1 1 .   . . .
    1 1 1 1 1 1   1 1 1   . . .
    1 1 1 1 1 1   . . .   1 1 .
    1 1 1 1 1 1   . . .   1 1 .
    1 1 1 1 1 1   1 1 .   . . 1
"""


def paper_example() -> SampleBatch:
    """x1 .. x6 with turns {4, 5} then {2} (positions from 0), c2 c4 c5 shown as the mask."""
    row = np.array
    return SampleBatch(
        row([[11, 12, 13, 14, 15, 16]]),
        row([6]),
        row([3]),
        row([3]),
        row([[3, 4, 1]]),
        row([[1, 1, 2]]),
        row([[MASK] * 3]),
    )


def sees(layout: Layout, sample: int = 0) -> np.ndarray:
    """Who may attend to whom, bool [S, S]."""
    roles, turns = layout.roles_S.numpy(), layout.turns_BS[sample].numpy()
    return np.asarray(visible(roles[:, None], turns[:, None], roles[None, :], turns[None, :]))


def test_grid_of_the_paper() -> None:
    layout = pseudo_masked_layout(paper_example(), Objective.AE_PAR, mask_id=MASK)
    expected = np.array([[cell == "1" for cell in line.split()] for line in GRID.strip().splitlines()])
    np.testing.assert_array_equal(sees(layout), expected)


def test_slots_of_the_paper() -> None:
    layout = pseudo_masked_layout(paper_example(), Objective.AE_PAR, mask_id=MASK)
    assert layout.ids_BS.tolist() == [[11, MASK, 13, MASK, MASK, 16, 14, 15, 12, MASK, MASK, MASK]]
    assert layout.positions_BS.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 1, 3, 4, 1]]
    assert layout.segments_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0]]
    assert layout.roles_S.tolist() == [CONTEXT] * 6 + [GIVEN] * 3 + [PSEUDO] * 3
    assert layout.turns_BS.tolist() == [[0] * 6 + [1, 1, 2] * 2]
    assert layout.targets_T.tolist() == [14, 15, 12]
    assert layout.ae_slots_T is not None
    assert layout.ae_slots_T.tolist() == [3, 4, 1]
    assert layout.par_slots_T is not None
    assert layout.par_slots_T.tolist() == [9, 10, 11]


@pytest.mark.parametrize("objective", list(Objective))
def test_what_each_objective_appends_and_predicts(objective: Objective) -> None:
    layout = pseudo_masked_layout(paper_example(), objective, mask_id=MASK)
    assert (layout.ae_slots_T is not None) == ("ae" in objective.value.split("+"))
    assert (layout.par_slots_T is not None) == (objective is not Objective.AE)
    assert layout.ids_BS.shape[1] == (6 if objective is Objective.AE else 12)
    if objective in (Objective.AR, Objective.AE_AR):
        assert layout.turns_BS[0, 6:].tolist() == [1, 2, 3, 1, 2, 3]


@given(seed=st.integers(0, 10**6), objective=st.sampled_from([o for o in Objective if o.has_par]))
@settings(max_examples=60, deadline=None)
def test_no_path_leads_from_an_original_to_the_pseudo_mask_that_predicts_it(seed: int, objective: Objective) -> None:
    batch = random_batch(3, seed=seed)
    layout = pseudo_masked_layout(batch, objective, mask_id=MASK)
    roles, length = layout.roles_S.numpy(), layout.num_context
    for sample in range(3):
        turns = layout.turns_BS[sample].numpy()
        reaches = sees(layout, sample).T  # [from, to] over one layer
        for _ in range(len(turns).bit_length()):
            reaches = reaches | (reaches.astype(np.float32) @ reaches.astype(np.float32) > 0)
        originals = np.flatnonzero((roles == GIVEN) & (turns > 0))
        pseudo = np.flatnonzero((roles == PSEUDO) & (turns > 0))
        for original in originals:
            assert not reaches[original, :length].any()
            not_later = pseudo[turns[pseudo] <= turns[original]]
            assert not reaches[original, not_later].any()
            assert reaches[original, pseudo[turns[pseudo] > turns[original]]].all()


@pytest.mark.parametrize("objective", list(Objective))
def test_padding_is_seen_by_nobody_and_everybody_sees_something(objective: Objective) -> None:
    layout = pseudo_masked_layout(random_batch(8), objective, mask_id=MASK)
    for sample in range(8):
        seen = sees(layout, sample)
        assert not seen[:, layout.turns_BS[sample].numpy() < 0].any()
        assert seen.any(axis=1).all()


def test_context_shows_what_was_drawn_and_the_originals_are_the_targets() -> None:
    batch = random_batch(8)
    layout = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK)
    target = iter(layout.targets_T.tolist())
    for sample in range(8):
        context = batch.tokens_BL[sample, : batch.length_B[sample]].copy()
        for place in range(batch.num_masked_B[sample]):
            position = batch.positions_BP[sample, place]
            assert next(target) == batch.tokens_BL[sample, position]
            context[position] = batch.shown_BP[sample, place]
        assert layout.ids_BS[sample, : len(context)].tolist() == context.tolist()
    assert next(target, None) is None


def test_the_rule_is_the_same_for_numpy_and_torch() -> None:
    grid = np.array([(r, t) for r in (CONTEXT, GIVEN, PSEUDO) for t in (-1, 0, 1, 2, 3)])
    roles, turns = grid[:, 0], grid[:, 1]
    as_numpy = visible(roles[:, None], turns[:, None], roles, turns)
    r, t = torch.from_numpy(roles), torch.from_numpy(turns)
    np.testing.assert_array_equal(visible(r[:, None], t[:, None], r, t).numpy(), as_numpy)
