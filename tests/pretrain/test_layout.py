"""The layout against the paper's grid, and against leaks of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MASK, random_batch

from data_prep.shards import SampleBatch
from pretrain.layout import (
    CONTEXT,
    GIVEN,
    PSEUDO,
    Layout,
    Objective,
    encoder_layout,
    few_sizes,
    pseudo_masked_layout,
    seq2seq_layout,
    visible,
)

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


def sees(layout: Layout) -> np.ndarray:
    """Who may attend to whom, bool [N, N]."""
    roles, turns, samples = layout.roles_N.numpy(), layout.turns_N.numpy(), layout.samples_N.numpy()
    is_visible = visible(roles[:, None], turns[:, None], roles[None, :], turns[None, :])
    return np.asarray(is_visible & (samples[:, None] == samples))


def test_grid_of_the_paper() -> None:
    layout = pseudo_masked_layout(paper_example(), Objective.AE_PAR, mask_id=MASK)
    expected = np.array([[cell == "1" for cell in line.split()] for line in GRID.strip().splitlines()])
    np.testing.assert_array_equal(sees(layout), expected)


def test_slots_of_the_paper() -> None:
    layout = pseudo_masked_layout(paper_example(), Objective.AE_PAR, mask_id=MASK)
    assert layout.ids_N.tolist() == [11, MASK, 13, MASK, MASK, 16, 14, 15, 12, MASK, MASK, MASK]
    assert layout.positions_N.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 1, 3, 4, 1]
    assert layout.segments_N.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0]
    assert layout.roles_N.tolist() == [CONTEXT] * 6 + [GIVEN] * 3 + [PSEUDO] * 3
    assert layout.turns_N.tolist() == [0] * 6 + [1, 1, 2] * 2
    assert (layout.edges, layout.context_lengths, layout.predicted_edges) == ((0, 12), (6,), (0, 6))
    assert layout.targets_T.tolist() == [14, 15, 12]
    assert layout.ae_places_T is not None
    assert layout.predicted_R[layout.ae_places_T].tolist() == [3, 4, 1]
    assert layout.par_places_T is not None
    assert layout.predicted_R[layout.par_places_T].tolist() == [9, 10, 11]
    assert layout.predicted_R.tolist() == [1, 3, 4, 9, 10, 11]


def test_samples_lie_one_behind_the_other() -> None:
    """A batch's layout is its samples' layouts, the numbers of slots and places moved on."""
    batch = random_batch(5)
    together = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK)
    alone = [pseudo_masked_layout(batch[[row]], Objective.AE_PAR, mask_id=MASK) for row in range(5)]
    assert len(set(together.context_lengths)) > 2
    for name in ("ids_N", "positions_N", "segments_N", "roles_N", "turns_N", "targets_T"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(layout, name) for layout in alone])), name
    for sample, layout in enumerate(alone):
        start, stop = together.edges[sample : sample + 2]
        first, last = together.predicted_edges[sample : sample + 2]
        assert together.samples_N[start:stop].tolist() == [sample] * len(layout.ids_N)
        assert torch.equal(together.predicted_R[first:last], layout.predicted_R + start)
    for name in ("ae_places_T", "par_places_T"):
        moved = [getattr(layout, name) + first for layout, first in zip(alone, together.predicted_edges, strict=False)]
        assert torch.equal(getattr(together, name), torch.cat(moved)), name


def test_one_shape_is_filled_behind_the_samples() -> None:
    shapes = set()
    for seed in range(3):
        batch = random_batch(4, seed=seed)
        plain, filled = (
            pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK, one_shape=o) for o in (False, True)
        )
        shapes.add((len(filled.ids_N), len(filled.predicted_R)))
        assert torch.equal(filled.ids_N[: len(plain.ids_N)], plain.ids_N)
        assert torch.equal(filled.predicted_R[: len(plain.predicted_R)], plain.predicted_R)
        filler = slice(len(plain.ids_N), None)
        assert not sees(filled)[:, filler].any()
        assert not sees(filled)[filler].any()
        assert plain.edges == filled.edges
    assert len(shapes) == 1


@pytest.mark.parametrize("objective", list(Objective))
def test_what_each_objective_appends_and_predicts(objective: Objective) -> None:
    layout = pseudo_masked_layout(paper_example(), objective, mask_id=MASK)
    assert (layout.ae_places_T is not None) == ("ae" in objective.value.split("+"))
    assert (layout.par_places_T is not None) == (objective is not Objective.AE)
    assert len(layout.ids_N) == (6 if objective is Objective.AE else 12)
    assert len(layout.predicted_R) == (6 if objective in (Objective.AE_PAR, Objective.AE_AR) else 3)
    if objective in (Objective.AR, Objective.AE_AR):
        assert layout.turns_N[6:].tolist() == [1, 2, 3, 1, 2, 3]


@given(seed=st.integers(0, 10**6), objective=st.sampled_from([o for o in Objective if o.has_par]))
@settings(max_examples=60, deadline=None)
def test_no_path_leads_from_an_original_to_the_pseudo_mask_that_predicts_it(seed: int, objective: Objective) -> None:
    batch = random_batch(3, seed=seed)
    layout = pseudo_masked_layout(batch, objective, mask_id=MASK)
    roles, turns, samples = (x.numpy() for x in (layout.roles_N, layout.turns_N, layout.samples_N))
    reaches = sees(layout).T  # [from, to] over one layer
    for _ in range(len(turns).bit_length()):
        reaches = reaches | (reaches.astype(np.float32) @ reaches.astype(np.float32) > 0)
    assert not reaches[samples[:, None] != samples].any()
    for original in np.flatnonzero(roles == GIVEN):
        assert not reaches[original, roles == CONTEXT].any()
        is_own_pseudo = (roles == PSEUDO) & (samples == samples[original])
        assert not reaches[original, is_own_pseudo & (turns <= turns[original])].any()
        assert reaches[original, is_own_pseudo & (turns > turns[original])].all()


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
        start = layout.edges[sample]
        assert layout.ids_N[start : start + len(context)].tolist() == context.tolist()
    assert next(target, None) is None


def test_the_rule_is_the_same_for_numpy_and_torch() -> None:
    grid = np.array([(r, t) for r in (CONTEXT, GIVEN, PSEUDO) for t in (-1, 0, 1, 2, 3)])
    roles, turns = grid[:, 0], grid[:, 1]
    as_numpy = visible(roles[:, None], turns[:, None], roles, turns)
    r, t = torch.from_numpy(roles), torch.from_numpy(turns)
    np.testing.assert_array_equal(visible(r[:, None], t[:, None], r, t).numpy(), as_numpy)


@pytest.mark.parametrize("needed", [None, [[0], [0, 2], []]])
def test_a_text_that_is_only_read_is_context_alone(needed: list[list[int]] | None) -> None:
    layout = encoder_layout([[9, 8], [7, 6, 5, 4], [3]], [[0, 1], [0, 0, 1, 1], [0]], needed)
    assert layout.ids_N.tolist() == [9, 8, 7, 6, 5, 4, 3]
    assert layout.positions_N.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert layout.segments_N.tolist() == [0, 1, 0, 0, 1, 1, 0]
    assert layout.roles_N.tolist() == [CONTEXT] * 7
    assert (layout.edges, layout.context_lengths, layout.num_tokens) == ((0, 2, 6, 7), (2, 4, 1), 7)
    assert layout.predicted_R.tolist() == (list(range(7)) if needed is None else [0, 2, 4])
    assert layout.predicted_edges == ((0, 2, 6, 7) if needed is None else (0, 1, 3, 3))
    assert layout.num_targets == 0
    expected = np.equal.outer(*[np.repeat([0, 1, 2], [2, 4, 1])] * 2)
    np.testing.assert_array_equal(sees(layout), expected)


@pytest.mark.parametrize(
    ("ids", "segments", "needed"),
    [
        ([], [], None), ([[]], [[]], None), ([[1, 2]], [[0]], None), ([[1]], [[0], [0]], None), ([[1]], [[0]], [[0], []]),
        ([[1, 2]], [[0, 0]], [[1, 0]]), ([[1, 2]], [[0, 0]], [[1, 1]]), ([[1, 2], [3]], [[0, 0], [0]], [[2], []]),
        ([[1, 2]], [[0, 0]], [[2]]), ([[1, 2]], [[0, 0]], [[-1]]),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_together_make_no_layout(
    ids: list[list[int]], segments: list[list[int]], needed: list[list[int]] | None
) -> None:
    with pytest.raises(ValueError, match="expected"):
        encoder_layout(ids, segments, needed)


@pytest.mark.parametrize("turns", [[1, 2, 3, 4], [1, 1, 2, 3], [1, 2, 2, 2], [1, 1, 1, 1]])
def test_seq2seq_is_the_rule_of_the_paper(turns: list[int]) -> None:
    """Who attends to whom by PAPER's words, of one sample between others."""
    source, target, shown = [11, 12, 13], [21, 22, 23, 24], [21, MASK, 23, 24]
    layout = seq2seq_layout(
        [[9], source, [8, 7]],
        [[5], target, [6, 6]],
        mask_id=MASK,
        turns=[[1], turns, [1, 2]],
        given=[[5], shown, [6, 6]],
    )
    originals = [i for i in range(4) if turns[i] < turns[-1]]  # nobody sees those of the last turn
    slots = [*(("context", i, 0) for i in range(3)), *(("original", i, turns[i]) for i in originals),
             *(("pseudo", i, turns[i]) for i in range(4))]  # fmt: skip
    here = slice(layout.edges[1], layout.edges[2])
    assert layout.edges[2] - layout.edges[1] == len(slots)
    ids = {"context": lambda i: source[i], "original": lambda i: shown[i], "pseudo": lambda i: MASK}
    assert layout.ids_N[here].tolist() == [ids[kind](i) for kind, i, _ in slots]
    assert layout.positions_N[here].tolist() == [i if kind == "context" else 3 + i for kind, i, _ in slots]
    assert layout.segments_N[here].tolist() == [int(kind != "context") for kind, _, _ in slots]

    def may(query: tuple[str, int, int], key: tuple[str, int, int]) -> bool:
        if key[0] == "context":
            return True
        if key[0] == "original":
            return key[2] <= query[2] if query[0] == "original" else query[0] == "pseudo" and key[2] < query[2]
        return query[0] == "pseudo" and key[2] == query[2]

    seen = sees(layout)
    np.testing.assert_array_equal(seen[here, here], [[may(query, key) for key in slots] for query in slots])
    assert not seen[here, : here.start].any()
    assert not seen[here, here.stop :].any()
    assert layout.predicted_R[1:5].tolist() == [here.stop - 4 + i for i in range(4)]
    assert layout.predicted_edges == (0, 1, 5, 7)
    assert layout.targets_T.tolist() == [5, *target, 6, 6]
    assert (layout.context_lengths, layout.num_tokens) == ((1, 3, 2), 13)


@pytest.mark.parametrize(
    ("sources", "targets", "more"),
    [
        ([], [], {}), ([[]], [[1]], {}), ([[1]], [[]], {}), ([[1], [2]], [[1]], {}), ([[1]], [[1, 2]], {"turns": [[1]]}),
        ([[1]], [[1, 2]], {"turns": [[2, 1]]}), ([[1]], [[1, 2]], {"turns": [[1, 3]]}), ([[1]], [[1]], {"given": [[1, 2]]}),
    ],
)  # fmt: skip
def test_sources_and_targets_that_do_not_fit_together_make_no_layout(
    sources: list[list[int]], targets: list[list[int]], more: dict[str, list[list[int]]]
) -> None:
    with pytest.raises(ValueError, match="expected"):
        seq2seq_layout(sources, targets, mask_id=MASK, **more)


def test_numbers_are_rounded_up_to_few_sizes() -> None:
    rounded = [few_sizes(number) for number in range(4097)]
    assert all(number <= size <= number * 17 / 16 for number, size in enumerate(rounded))
    assert [few_sizes(size) for size in rounded] == rounded
    assert len(set(rounded[1025:2049])) == len(set(rounded[2049:4097])) == 16
