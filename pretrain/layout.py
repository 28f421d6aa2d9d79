"""Who sits in which slot, at which position, and who may attend to whom. No other file decides any of it.

A pseudo-masked language model predicts the masked tokens of a text twice in one pass (UniLMv2, sections 3.1 to 3.3):
autoencoding (AE) at the conventional masks in the context, partially autoregressive (PAR) at pseudo masks behind it.
The masked tokens are split into ordered turns (factorization steps). Behind the context come, for every masked token,
its original (GIVEN) and a pseudo mask (PSEUDO), both with the masked token's own position:

    slots     | context, [M] or other stand-ins at masked positions | originals | pseudo masks |
    role      | CONTEXT                                             | GIVEN     | PSEUDO       |
    turn      | 0                                                   | 1 .. k    | 1 .. k       |   -1 = padding

Example, x1 .. x6 with turns {4, 5} then {2}; a row is who looks, a column who is seen:

              c1 c2 c3 c4 c5 c6   o4 o5 o2   p4 p5 p2
    c1 .. c6   1  1  1  1  1  1    .  .  .    .  .  .
    o4, o5     1  1  1  1  1  1    1  1  .    .  .  .
    o2         1  1  1  1  1  1    1  1  1    .  .  .
    p4, p5     1  1  1  1  1  1    .  .  .    1  1  .
    p2         1  1  1  1  1  1    1  1  .    .  .  1

So a pseudo mask sees the originals of earlier turns alone, an original those of earlier turns and of its own, context
slots see context only, and nobody else sees a pseudo mask: no path of any length leads from an original to a pseudo
mask that predicts it. `visible` is the rule; the grid is what it says.

Sequence-to-sequence fine-tuning is the same rule: the source is the context, with nothing masked in it, and every target token
a turn of its own; the target's positions go on behind the source, its segment is 1.

A batch's samples lie one behind the other, without padding: first a sample's context, then what is appended to it. Nobody
sees another sample.

Shapes: N slots of a batch, R of them predicted from, T targets, B samples; inside `pseudo_masked_layout` L context slots,
P masked tokens and S = L + 2P slots of the longest sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.shards import SampleBatch

CONTEXT, GIVEN, PSEUDO = 0, 1, 2
PADDING_TURN = -1
SOURCE_SEGMENT, TARGET_SEGMENT = 0, 1


def few_sizes(number: int) -> int:
    """The next of numbers that lie a sixteenth apart or less, so that shapes repeat: from 2^n to 2^(n + 1), 16 of them."""
    step = max(1, 1 << (max(number, 1) - 1).bit_length() >> 5)
    return -(-number // step) * step


class Objective(str, Enum):
    """What is trained (the ablation of the paper's table 6). AR is PAR with every masked token a turn of its own."""

    AE = "ae"
    AR = "ar"
    PAR = "par"
    AE_AR = "ae+ar"
    AE_PAR = "ae+par"

    @property
    def has_ae(self) -> bool:
        """Whether masked tokens are predicted at their place in the context."""
        return self in (Objective.AE, Objective.AE_AR, Objective.AE_PAR)

    @property
    def has_par(self) -> bool:
        """Whether they are predicted at pseudo masks (in blocks, or for AR token by token)."""
        return self is not Objective.AE

    @property
    def one_token_turns(self) -> bool:
        """Whether every masked token is a turn of its own."""
        return self in (Objective.AR, Objective.AE_AR)


def visible(query_role: Any, query_turn: Any, key_role: Any, key_turn: Any) -> Any:
    """Whether the query slot may attend to the key slot of its sample; for NumPy arrays, torch tensors and kernels alike."""
    given_earlier = (key_role == GIVEN) & (key_turn > 0) & (key_turn < query_turn)
    own_turn = (key_role == query_role) & (key_turn > 0) & (key_turn == query_turn)
    return (key_turn == 0) | given_earlier | own_turn


@dataclass(frozen=True)
class Layout:
    """A model input: what is in each slot, and which slots are predicted from."""

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    segments_N: torch.Tensor
    roles_N: torch.Tensor
    turns_N: torch.Tensor
    samples_N: torch.Tensor
    """Which sample of the batch a slot is of."""
    edges: tuple[int, ...]
    """Sample b has the slots edges[b] to edges[b + 1]; behind the last there may be filler, for one shape."""
    context_lengths: tuple[int, ...]
    """L of each sample: its first slots, at positions 0 to L - 1."""
    num_tokens: int
    """Tokens of text in the batch, appended slots not counted."""
    predicted_R: torch.Tensor
    """The slots whose last vectors the loss needs, in ascending order; filler is slot 0."""
    predicted_edges: tuple[int, ...]
    """Sample b has the places predicted_edges[b] to predicted_edges[b + 1] of predicted_R."""
    targets_T: torch.Tensor
    """The masked tokens' original ids."""
    ae_places_T: torch.Tensor | None
    """Where in predicted_R AE predicts each target; None if the objective has no AE."""
    par_places_T: torch.Tensor | None
    """Where PAR predicts each target; None if the objective has no PAR."""

    @property
    def num_targets(self) -> int:
        """T: masked tokens."""
        return len(self.targets_T)

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.context_lengths)

    @property
    def longest(self) -> int:
        """Slots of the sample that has the most."""
        return max(stop - start for start, stop in pairwise(self.edges))

    def filled(self, num_slots: int, num_predicted: int) -> Layout:
        """The same layout with filler up to N slots, seen by nobody, and R predicted places, the first slot's."""
        more = num_slots - len(self.ids_N)
        filler = {name: 0 for name in ("ids_N", "positions_N", "segments_N")}
        filler |= {"roles_N": CONTEXT, "turns_N": PADDING_TURN, "samples_N": self.num_samples}
        return replace(
            self,
            predicted_R=F.pad(self.predicted_R, (0, num_predicted - len(self.predicted_R))),
            **{name: F.pad(getattr(self, name), (0, more), value=value) for name, value in filler.items()},  # type: ignore[arg-type]
        )

    def to(self, device: torch.device) -> Layout:
        """The same layout on a device; from pinned memory, the copy goes on while the host does."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Layout:
        """The same layout in pinned memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Layout:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)  # type: ignore[arg-type]


def pseudo_masked_layout(batch: SampleBatch, objective: Objective, *, mask_id: int, one_shape: bool = False) -> Layout:
    """The layout of pre-training. A pseudo mask is the mask id (as in the released models): its row sets it apart.

    `one_shape` fills up to the slots that so many samples of the data set may have at most.
    """
    batch = batch.as_int64()
    num_context, num_masked = batch.tokens_BL.shape[1], batch.positions_BP.shape[1]
    is_masked_BP = np.arange(num_masked) < batch.num_masked_B[:, None]
    sample_T, place_T = np.nonzero(is_masked_BP)
    position_T = batch.positions_BP[sample_T, place_T]
    context_ids_BL = batch.tokens_BL.copy()
    context_ids_BL[sample_T, position_T] = batch.shown_BP[sample_T, place_T]
    slot_L = np.arange(num_context)
    segments_BL = slot_L >= batch.segment_boundary_B[:, None]

    is_slot = [slot_L < batch.length_B[:, None]]
    ids, positions = [context_ids_BL], [np.broadcast_to(slot_L, context_ids_BL.shape)]
    segments, turns, roles = [segments_BL], [np.zeros_like(context_ids_BL)], [np.full_like(context_ids_BL, CONTEXT)]
    if objective.has_par:
        turns_BP = batch.turns_BP
        if objective.one_token_turns:
            turns_BP = np.broadcast_to(np.arange(1, num_masked + 1), turns_BP.shape)
        originals_BP = np.take_along_axis(batch.tokens_BL, batch.positions_BP, axis=1)
        segments_BP = np.take_along_axis(segments_BL, batch.positions_BP, axis=1)
        for role, ids_BP in ((GIVEN, originals_BP), (PSEUDO, np.full_like(originals_BP, mask_id))):
            is_slot.append(is_masked_BP)
            ids.append(ids_BP)
            positions.append(batch.positions_BP)
            segments.append(segments_BP)
            turns.append(turns_BP)
            roles.append(np.full_like(ids_BP, role))
    is_slot_BS = np.concatenate(is_slot, axis=1)
    slot_BS = (np.cumsum(is_slot_BS) - 1).reshape(is_slot_BS.shape)

    def in_a_row(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts, axis=1)[is_slot_BS].astype(np.int64))

    predicted_from: dict[str, np.ndarray | None] = {
        "ae": slot_BS[sample_T, position_T] if objective.has_ae else None,
        "par": slot_BS[sample_T, num_context + num_masked + place_T] if objective.has_par else None,
    }
    slots = np.concatenate([s for s in predicted_from.values() if s is not None])
    is_predicted_N = np.zeros(is_slot_BS.sum(), dtype=bool)
    is_predicted_N[slots] = True
    places_N = np.cumsum(is_predicted_N) - 1
    per_target = len(slots) // len(sample_T)
    places = {
        name: None if slots_T is None else torch.from_numpy(places_N[slots_T])
        for name, slots_T in predicted_from.items()
    }
    layout = Layout(
        ids_N=in_a_row(ids),
        positions_N=in_a_row(positions),
        segments_N=in_a_row(segments),
        roles_N=in_a_row(roles),
        turns_N=in_a_row(turns),
        samples_N=torch.from_numpy(np.nonzero(is_slot_BS)[0]),
        edges=_edges(is_slot_BS.sum(axis=1)),
        context_lengths=tuple(batch.length_B.tolist()),
        num_tokens=int(batch.length_B.sum()),
        predicted_R=torch.from_numpy(np.flatnonzero(is_predicted_N)),
        predicted_edges=_edges(batch.num_masked_B * per_target),
        targets_T=torch.from_numpy(batch.tokens_BL[sample_T, position_T]),
        ae_places_T=places["ae"],
        par_places_T=places["par"],
    )
    return layout.filled(is_slot_BS.size, is_masked_BP.size * per_target) if one_shape else layout


def encoder_layout(
    ids: Sequence[Sequence[int]], segments: Sequence[Sequence[int]], needed: Sequence[Sequence[int]] | None = None
) -> Layout:
    """The layout of texts that are only read: context alone, nothing masked and nothing to predict.

    `ids` and `segments` are the samples' tokens, special ones included; `needed` the positions of each, in ascending order,
    whose last vectors `encode_predicted` is to give, all by default. Raises ValueError for lists that do not fit together.
    """
    lengths = np.array([*map(len, ids)], dtype=np.int64)
    if not len(ids) or not lengths.all() or lengths.tolist() != [*map(len, segments)]:
        raise ValueError("expected at least one sample, none of them empty, each with a segment id a token")
    edges = _edges(lengths)
    samples = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(samples)) - np.array(edges)[samples]
    predicted, num_predicted = np.arange(len(samples)), lengths
    if needed is not None:
        num_predicted = np.array([*map(len, needed)], dtype=np.int64)
        places = np.array([*chain.from_iterable(needed)], dtype=np.int64)
        if len(needed) != len(ids) or (places < 0).any() or (places >= np.repeat(lengths, num_predicted)).any():
            raise ValueError("expected needed positions for each sample, all of them in it")
        predicted = places + np.repeat(edges[:-1], num_predicted)
        if (np.diff(predicted) <= 0).any():
            raise ValueError("expected a sample's needed positions in ascending order")
    context_N = torch.zeros(len(positions), dtype=torch.int64)
    return Layout(
        ids_N=torch.from_numpy(np.array([*chain.from_iterable(ids)], dtype=np.int64)),
        positions_N=torch.from_numpy(positions),
        segments_N=torch.from_numpy(np.array([*chain.from_iterable(segments)], dtype=np.int64)),
        roles_N=context_N + CONTEXT,
        turns_N=context_N,
        samples_N=torch.from_numpy(samples),
        edges=edges,
        context_lengths=tuple(lengths.tolist()),
        num_tokens=len(positions),
        predicted_R=torch.from_numpy(predicted),
        predicted_edges=_edges(num_predicted),
        targets_T=torch.zeros(0, dtype=torch.int64),
        ae_places_T=None,
        par_places_T=None,
    )


def seq2seq_layout(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    mask_id: int,
    turns: Sequence[Sequence[int]] | None = None,
    given: Sequence[Sequence[int]] | None = None,
) -> Layout:
    """The layout of targets that are written behind sources: a pseudo mask predicts each target token.

    `sources` and `targets` are the samples' tokens, special ones included. `turns`: that of each target token, from 1 and
    from left to right; by default every token has its own. `given`: what later turns see in the originals' place, by
    default the target. The last turn's originals are left out, as nobody sees them. Raises ValueError for lists that do not
    fit together.
    """
    turns = [range(1, len(target) + 1) for target in targets] if turns is None else turns
    given = targets if given is None else given
    lengths = [[*map(len, lists)] for lists in (sources, targets, turns, given)]
    if not sources or not all(map(all, lengths)) or len(sources) != len(targets) or lengths[1:] != lengths[1:2] * 3:
        raise ValueError("expected sources, each with a target, none of them empty, and of each target token its turn")
    slots: list[np.ndarray] = []
    for source, target, turns_T, shown in zip(sources, targets, map(np.asarray, turns), given, strict=True):
        if turns_T[0] != 1 or not np.isin(np.diff(turns_T), (0, 1)).all():
            raise ValueError(f"expected turns 1, 2, ... from left to right, found {turns_T.tolist()}")
        num_context, num_given, num_targets = len(source), int((turns_T < turns_T[-1]).sum()), len(target)
        positions_T = num_context + np.arange(num_targets)
        roles = np.repeat([CONTEXT, GIVEN, PSEUDO], [num_context, num_given, num_targets])
        slots.append(np.stack([
            np.array([*source, *shown[:num_given], *[mask_id] * num_targets], dtype=np.int64),
            np.concatenate([np.arange(num_context), positions_T[:num_given], positions_T]),
            np.where(roles == CONTEXT, SOURCE_SEGMENT, TARGET_SEGMENT),
            roles,
            np.concatenate([np.zeros(num_context, dtype=np.int64), turns_T[:num_given], turns_T]),
        ]))  # fmt: skip
    ids_N, positions_N, segments_N, roles_N, turns_N = map(torch.from_numpy, np.concatenate(slots, axis=1))
    num_slots = np.array([of_sample.shape[1] for of_sample in slots])
    targets_T = torch.from_numpy(np.array([*chain.from_iterable(targets)], dtype=np.int64))
    return Layout(
        ids_N=ids_N, positions_N=positions_N, segments_N=segments_N, roles_N=roles_N, turns_N=turns_N,
        samples_N=torch.from_numpy(np.repeat(np.arange(len(slots)), num_slots)),
        edges=_edges(num_slots),
        context_lengths=tuple(lengths[0]),
        num_tokens=sum(lengths[0]) + len(targets_T),
        predicted_R=torch.nonzero(roles_N == PSEUDO)[:, 0],
        predicted_edges=_edges(np.array(lengths[1])),
        targets_T=targets_T,
        ae_places_T=None,
        par_places_T=torch.arange(len(targets_T)),
    )  # fmt: skip


def next_token_layout(last_R: torch.Tensor, positions_R: torch.Tensor, turn: int, *, mask_id: int) -> Layout:
    """The two slots that a target's next token needs where all before it is remembered: the last token as an original,
    and behind it the pseudo mask that predicts the next. R targets, each a sample without context.

    `positions_R` and `turn` are those of the last token in `seq2seq_layout`. The attention is to be one that remembers
    (finetune/search.py).
    """
    ids_R2 = torch.stack([last_R, torch.full_like(last_R, mask_id)], dim=1)
    slots_N = torch.arange(2 * len(last_R), device=last_R.device)
    is_pseudo_N = slots_N % 2
    return Layout(
        ids_N=ids_R2.flatten(),
        positions_N=torch.stack([positions_R, positions_R + 1], dim=1).flatten(),
        segments_N=torch.full_like(slots_N, TARGET_SEGMENT),
        roles_N=torch.where(is_pseudo_N == 1, PSEUDO, GIVEN),
        turns_N=turn + is_pseudo_N,
        samples_N=slots_N // 2,
        edges=tuple(range(0, len(slots_N) + 1, 2)),
        context_lengths=(0,) * len(last_R),
        num_tokens=0,
        predicted_R=slots_N[1::2],
        predicted_edges=tuple(range(len(last_R) + 1)),
        targets_T=slots_N[:0],
        ae_places_T=None,
        par_places_T=None,
    )


def _edges(lengths: np.ndarray) -> tuple[int, ...]:
    return (0, *np.cumsum(lengths).tolist())
