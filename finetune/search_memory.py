"""Keys and values that a search remembers, and who sees which.

A step feeds two slots for each beam (pretrain/layout.py, `next_token_layout`): the last token, as an original, and a
pseudo mask that predicts the next. All before is remembered as keys and values, a column for each slot:

    columns of a sentence   | its source | originals, one for each token that a beam chose  | last tokens | pseudo masks |
    seen by a beam          | all        | those of its own line                            | its own     | its own      |

The source is encoded once and its columns are shared by the beams. Originals are nodes of a tree: beams of one history
share them too, and that beams change places moves no key and no value, as a beam's line is a row of a mask. Nodes that no beam
descends from are dropped from time to time. Sentences that are finished leave the batch.

Shapes: B sentences, K beams, S slots of the longest source, M columns, N slots fed, R = B x K, H heads, D = size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pretrain.attention import Attention
from pretrain.layout import CONTEXT, GIVEN, PADDING_TURN, PSEUDO, Layout, seq2seq_layout, visible
from pretrain.model import PMLM


class SearchMemory:
    """Keys and values of a batch's columns, for all layers; who sees which."""

    def __init__(self, model: PMLM, sources: Sequence[Sequence[int]], num_beams: int, max_length_tokens: int) -> None:
        config, weight = model.config, model.bert.embeddings.word_embeddings.weight
        self._sources, self._num_beams = sources, num_beams
        self._relative_bias = model.bert.encoder.rel_pos_bias
        if self._relative_bias is not None:
            farthest = self._relative_bias.max_distance
            self._by_distance_MH = self._relative_bias.by_distance(farthest).detach().T.contiguous().to(weight.dtype)
        num_sentences, longest = len(sources), max(map(len, sources))
        num_columns = longest + num_beams * (max_length_tokens + 1)
        size = config.hidden_size // config.num_heads
        # Keys lie with columns last, as the product with queries is faster so. What is not used is not touched: on CPU
        # it takes no memory.
        self._keys = [
            weight.new_empty(num_sentences, config.num_heads, size, num_columns) for _ in range(config.num_layers)
        ]
        self._values = [
            weight.new_empty(num_sentences, config.num_heads, num_columns, size) for _ in range(config.num_layers)
        ]
        self._num_source_columns = self._num_columns = longest
        lengths_B1 = torch.tensor([[len(source)] for source in sources], device=weight.device)
        self._positions_BM = torch.arange(longest, device=weight.device).repeat(num_sentences, 1)
        self._turns_BM = torch.where(self._positions_BM < lengths_B1, 0, PADDING_TURN)
        self._lines_BKM = torch.ones(num_sentences, 1, longest, dtype=torch.bool, device=weight.device)

    def source_layout(self, mask_id: int) -> Layout:
        """The sources, each with the pseudo mask that predicts its target's first token."""
        return seq2seq_layout(self._sources, [[mask_id]] * len(self._sources), mask_id=mask_id)

    def of_sources(self, attention: Attention) -> Attention:
        """The attention of `source_layout`, whose keys and values of context are remembered."""
        return _OfSources(self, attention)

    def of_next_tokens(self, layout: Layout) -> Attention:
        """The attention of a `next_token_layout`, whose originals are remembered."""
        num_sentences, num_beams = self._lines_BKM.shape[:2]
        if self._num_columns - self._num_source_columns > 8 * num_beams:
            self._drop_dead_columns()
        positions_B2, turns_B2 = (
            x.view(num_sentences, num_beams, 2)[:, 0] for x in (layout.positions_N, layout.turns_N)
        )
        own = torch.eye(num_beams, dtype=torch.bool, device=layout.ids_N.device).expand(num_sentences, -1, -1)
        positions_BM = torch.cat([self._positions_BM, positions_B2.repeat_interleave(num_beams, dim=1)], dim=1)
        turns_BM = torch.cat([self._turns_BM, turns_B2.repeat_interleave(num_beams, dim=1)], dim=1)
        lines_BKM = torch.cat([self._lines_BKM, own, own], dim=2)
        roles_M = torch.full(turns_BM.shape[1:], GIVEN, device=layout.ids_N.device)
        roles_M[: self._num_source_columns] = CONTEXT
        roles_M[-num_beams:] = PSEUDO
        roles_21 = torch.tensor([[GIVEN], [PSEUDO]], device=layout.ids_N.device)
        is_visible_B2M = visible(roles_21, turns_B2[:, :, None], roles_M, turns_BM[:, None])
        is_visible_BK2M = is_visible_B2M[:, None] & lines_BKM[:, :, None]
        bias_BH12M = torch.zeros((), device=layout.ids_N.device)
        if self._relative_bias is not None:
            distances_B2M = positions_BM[:, None] - positions_B2[:, :, None]
            far = self._relative_bias.max_distance
            bias_BH12M = self._by_distance_MH[distances_B2M.clamp(-far, far) + far].permute(0, 3, 1, 2)[:, :, None]
        bias_BHK2M = torch.where(is_visible_BK2M[:, None], bias_BH12M, -math.inf)
        first = self._num_columns
        self._num_columns += num_beams  # the originals; pseudo masks are forgotten
        self._positions_BM, self._turns_BM = (x[:, : self._num_columns] for x in (positions_BM, turns_BM))
        self._lines_BKM = lines_BKM[:, :, : self._num_columns]
        return _OfNextTokens(self, bias_BHK2M, first)

    def descend(self, parents_BK: torch.Tensor) -> None:
        """Beams go on from others."""
        self._lines_BKM = self._lines_BKM.gather(1, parents_BK[:, :, None].expand(-1, -1, self._lines_BKM.shape[2]))

    def _drop_dead_columns(self) -> None:
        """If they are more than those that a beam descends from."""
        first = self._num_source_columns
        is_alive_BM = self._lines_BKM[:, :, first:].any(dim=1)
        num_kept = int(is_alive_BM.sum(dim=1).max())
        if 2 * num_kept > is_alive_BM.shape[1]:
            return
        kept_BM = is_alive_BM.int().argsort(dim=1, descending=True, stable=True)[:, :num_kept]
        for keys, values in zip(self._keys, self._values, strict=True):
            for row, kept in enumerate(kept_BM + first):
                keys[row, :, :, first : first + num_kept] = keys[row].index_select(2, kept)
                values[row, :, first : first + num_kept] = values[row].index_select(1, kept)
        self._num_columns = first + num_kept

        def taken(of_columns: torch.Tensor) -> torch.Tensor:
            index = kept_BM.view(len(kept_BM), *[1] * (of_columns.dim() - 2), -1).expand(*of_columns.shape[:-1], -1)
            return torch.cat([of_columns[..., :first], of_columns[..., first:].gather(-1, index)], dim=-1)

        is_alive_BM = is_alive_BM.gather(1, kept_BM)
        self._positions_BM, self._lines_BKM = taken(self._positions_BM), taken(self._lines_BKM)
        self._turns_BM = taken(self._turns_BM)
        self._turns_BM[:, first:].masked_fill_(~is_alive_BM, PADDING_TURN)

    def keep(self, rows: list[int]) -> list[int]:
        """Forget all sentences but these; returns their new order: the last ones fill the places of those that leave."""
        num_kept = len(rows)
        order = list(range(num_kept))
        moved = [row for row in rows if row >= num_kept]
        for place in sorted(set(order) - set(rows)):
            order[place] = moved.pop()
            for keys, values in zip(self._keys, self._values, strict=True):
                keys[place, ..., : self._num_columns] = keys[order[place], ..., : self._num_columns]
                values[place, :, : self._num_columns] = values[order[place], :, : self._num_columns]
        self._positions_BM, self._turns_BM, self._lines_BKM = (
            x[order] for x in (self._positions_BM, self._turns_BM, self._lines_BKM)
        )
        return order


class _OfSources:
    """See Attention: that of a whole layout, which calls it layer by layer."""

    def __init__(self, memory: SearchMemory, attention: Attention) -> None:
        self._memory, self._attention, self._layers = memory, attention, iter(range(len(memory._keys)))
        lengths = [len(source) for source in memory._sources]
        edges = np.cumsum([0, *(length + 1 for length in lengths)])
        slots_BS = np.minimum(edges[:-1, None] + np.arange(max(lengths)), edges[1:, None] - 1)
        self._slots_BS = torch.from_numpy(slots_BS).to(memory._positions_BM.device)

    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        self._remember(qkv_N3HD[:, 1:])
        return self._attention(qkv_N3HD)

    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        self._remember(keys_values_N2HD)
        return self._attention.of_predicted(queries_RHD, keys_values_N2HD)

    def _remember(self, keys_values_N2HD: torch.Tensor) -> None:
        layer, length = next(self._layers), self._slots_BS.shape[1]
        keys_BSHD, values_BSHD = keys_values_N2HD[self._slots_BS].unbind(2)
        self._memory._keys[layer][..., :length] = keys_BSHD.permute(0, 2, 3, 1)
        self._memory._values[layer][:, :, :length] = values_BSHD.transpose(1, 2)


class _OfNextTokens:
    """See Attention."""

    def __init__(self, memory: SearchMemory, bias_BHK2M: torch.Tensor, first: int) -> None:
        """`first`: the column of the first original; the pseudo masks follow the originals."""
        self._memory, self._bias_BHK2M, self._first = memory, bias_BHK2M, first
        self._layers = iter(range(len(memory._keys)))

    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        return self._attend(qkv_N3HD[:, 0], qkv_N3HD[:, 1], qkv_N3HD[:, 2], self._bias_BHK2M.flatten(2, 3))

    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        return self._attend(queries_RHD, keys_values_N2HD[:, 0], keys_values_N2HD[:, 1], self._bias_BHK2M[:, :, :, 1])

    def _attend(
        self, queries: torch.Tensor, keys_NHD: torch.Tensor, values_NHD: torch.Tensor, bias_BHQM: torch.Tensor
    ) -> torch.Tensor:
        layer, first = next(self._layers), self._first
        num_sentences, _, num_beams, _, num_columns = self._bias_BHK2M.shape
        keys_BHDM = self._memory._keys[layer][:num_sentences, ..., :num_columns]
        values_BHMD = self._memory._values[layer][:num_sentences, :, :num_columns]
        own = num_sentences, num_beams, 2, *keys_NHD.shape[1:]
        keys_BHDM[..., first:].unflatten(3, (2, num_beams)).copy_(keys_NHD.view(own).permute(0, 3, 4, 2, 1))
        values_BHMD[:, :, first:].unflatten(2, (2, num_beams)).copy_(values_NHD.view(own).permute(0, 3, 2, 1, 4))
        queries_BHQD = queries.view(num_sentences, -1, *queries.shape[1:]).transpose(1, 2)
        attended_BHQD = _attend(queries_BHQD, keys_BHDM, values_BHMD, bias_BHQM)
        return attended_BHQD.transpose(1, 2).reshape(queries.shape)


def _attend(
    queries_BHQD: torch.Tensor, keys_BHDM: torch.Tensor, values_BHMD: torch.Tensor, bias_BHQM: torch.Tensor
) -> torch.Tensor:
    scale = queries_BHQD.shape[-1] ** -0.5
    bias = bias_BHQM.expand(*queries_BHQD.shape[:3], -1).flatten(0, 1)
    scores = torch.baddbmm(bias, queries_BHQD.flatten(0, 1), keys_BHDM.flatten(0, 1), alpha=scale)
    attended = torch.bmm(torch.softmax(scores, dim=-1), values_BHMD.flatten(0, 1))
    return attended.view(queries_BHQD.shape)
