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

Sequence-to-sequence fine-tuning is the same rule: the source is the context, and every target token a turn of its own.

Shapes: B samples, L context slots, P masked tokens, S = L + 2P slots (S = L where nothing is appended), T predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch

from data_prep.shards import SampleBatch

CONTEXT, GIVEN, PSEUDO = 0, 1, 2
PADDING_TURN = -1
_CONTEXT_MULTIPLE = 8  # context slots are padded up to a multiple of this


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
    """Whether the query slot may attend to the key slot; for NumPy arrays, torch tensors and kernels alike."""
    given_earlier = (key_role == GIVEN) & (key_turn > 0) & (key_turn < query_turn)
    own_turn = (key_role == query_role) & (key_turn > 0) & (key_turn == query_turn)
    return (key_turn == 0) | given_earlier | own_turn


@dataclass(frozen=True)
class Layout:
    """A model input: what is in each slot, and which slots are predicted."""

    ids_BS: torch.Tensor
    positions_BS: torch.Tensor
    segments_BS: torch.Tensor
    roles_S: torch.Tensor
    turns_BS: torch.Tensor
    num_context: int
    """L: slots [0, L) are the context, slots [L, S) are appended."""
    num_tokens: int
    """Tokens of text in the batch, padding and appended slots not counted."""
    targets_T: torch.Tensor
    """The masked tokens' original ids."""
    ae_slots_T: torch.Tensor | None
    """Where AE predicts each target: indices into the B * S slots; None if the objective has no AE."""
    par_slots_T: torch.Tensor | None
    """Where PAR predicts each target; None if the objective has no PAR."""

    @property
    def num_targets(self) -> int:
        """T: masked tokens."""
        return len(self.targets_T)

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

    `one_shape` pads to the longest sample that the data set may hold, not to that of the batch.
    """
    batch = batch.as_int64()
    num_context = -(-int(batch.length_B.max()) // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
    num_context = min(num_context, batch.tokens_BL.shape[1])
    num_masked = int(batch.num_masked_B.max())
    if one_shape:
        num_context, num_masked = batch.tokens_BL.shape[1], batch.positions_BP.shape[1]
    tokens_BL = batch.tokens_BL[:, :num_context]
    positions_BP, turns_BP = batch.positions_BP[:, :num_masked], batch.turns_BP[:, :num_masked]
    is_masked_BP = np.arange(num_masked) < batch.num_masked_B[:, None]
    if objective.one_token_turns:
        turns_BP = np.broadcast_to(np.arange(1, num_masked + 1), positions_BP.shape)
    turns_BP = np.where(is_masked_BP, turns_BP, PADDING_TURN)
    originals_BP = np.take_along_axis(tokens_BL, positions_BP, axis=1)

    row, place = np.nonzero(is_masked_BP)
    context_ids_BL = tokens_BL.copy()
    context_ids_BL[row, positions_BP[row, place]] = batch.shown_BP[row, place]
    slot_L = np.arange(num_context)
    context_turns_BL = np.where(slot_L < batch.length_B[:, None], 0, PADDING_TURN)
    segments_BL = (slot_L >= batch.segment_boundary_B[:, None]).astype(np.int64)

    ids, turns = [context_ids_BL], [context_turns_BL]
    positions, segments = [np.broadcast_to(slot_L, tokens_BL.shape)], [segments_BL]
    roles = [np.full(num_context, CONTEXT)]
    if objective.has_par:
        segments_BP = np.take_along_axis(segments_BL, positions_BP, axis=1)
        for role, ids_BP in ((GIVEN, originals_BP), (PSEUDO, np.full_like(originals_BP, mask_id))):
            ids.append(ids_BP)
            positions.append(positions_BP)
            segments.append(segments_BP)
            turns.append(turns_BP)
            roles.append(np.full(num_masked, role))
    num_slots = num_context + (2 * num_masked if objective.has_par else 0)
    return Layout(
        ids_BS=_joined(ids),
        positions_BS=_joined(positions),
        segments_BS=_joined(segments),
        roles_S=torch.from_numpy(np.concatenate(roles)),
        turns_BS=_joined(turns),
        num_context=num_context,
        num_tokens=int(batch.length_B.sum()),
        targets_T=torch.from_numpy(originals_BP[row, place]),
        ae_slots_T=torch.from_numpy(row * num_slots + positions_BP[row, place]) if objective.has_ae else None,
        par_slots_T=torch.from_numpy(row * num_slots + num_context + num_masked + place) if objective.has_par else None,
    )


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts, axis=1))
