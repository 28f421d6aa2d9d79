"""Attention on CPU: context rows against context keys, appended rows against all keys, samples of like shape together.

What attention costs on a CPU is passes over score matrices, so there are few: the bias comes in with the product, what
is hidden has a bias of minus infinity. The backward pass computes the probabilities again from queries and keys: that
is one product more, and no score matrix outlives its group. The gradient of the bias is summed by distance, not kept
for pairs.

Beside that, every product has its price, and in 16 bits oneDNN compiles code for each new shape. So a sample's rows and
keys are padded to a multiple; 1, 2, 4 .. samples that then have one shape make a group, computed together as long as its
scores are few: no more exist at a time than `_GROUP_SCORES`, or one sample's.

Shapes: as in attention.py; Q rows (query slots) against K keys, G samples of a group, S = all their keys, M the farthest
distance, X vectors: one head's of a row or slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

from pretrain.attention import RelativePositionBias
from pretrain.cpu_threads import for_each
from pretrain.dropout import draw_seed, kept_scale, zero_dropped_
from pretrain.layout import CONTEXT, PADDING_TURN, Layout, visible

_MULTIPLE = 16
_GROUP_SCORES = 1 << 18
_CALLS_SCORES = 1 << 16
"""As long as a group's calls take, whatever is in it, so many scores take to compute."""


@dataclass(frozen=True)
class _Padded:
    """Rows of some samples, as many of each; what is padding is some row again."""

    rows_GQ: np.ndarray
    is_real_GQ: np.ndarray

    @classmethod
    def of(cls, starts_G: np.ndarray, stops_G: np.ndarray) -> _Padded:
        """Of each sample the rows from its start to its stop, then padding."""
        rows_GQ = starts_G[:, None] + np.arange(_rounded(int((stops_G - starts_G).max())))
        return cls(np.clip(rows_GQ, 0, np.maximum(stops_G - 1, 0)[:, None]), rows_GQ < stops_G[:, None])

    def __add__(self, other: _Padded) -> _Padded:
        """Of each sample these rows, then those."""
        return _Padded(
            *(np.concatenate(pair, axis=1) for pair in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def length(self) -> int:
        """Q."""
        return int(self.rows_GQ.shape[1])

    def vectors(self, num_heads: int, num_packed: int = 1, which: int = 0) -> np.ndarray:
        """[G, H, Q] among those of [R, packed, H]."""
        return (self.rows_GQ[:, None] * num_packed + which) * num_heads + np.arange(num_heads)[:, None]

    def note(self, first: int, places_RH: np.ndarray) -> None:
        """Write to `places_RH` where the rows are if they, as [G, H, Q], begin at `first`."""
        num_heads = places_RH.shape[1]
        shape = (len(self.rows_GQ), num_heads, self.length)
        places_GQH = first + np.arange(math.prod(shape)).reshape(shape).swapaxes(1, 2)
        places_RH[self.rows_GQ[self.is_real_GQ]] = places_GQH[self.is_real_GQ]


@dataclass(frozen=True)
class _Part:
    """A group's context rows, or its appended ones, which make one product with its first keys."""

    is_context: bool
    queries: slice
    """Of the group's, G x H x Q vectors."""
    bias_GHQK: torch.Tensor | None
    """A dimension that makes no difference has size 1."""
    hidden_GHQK: torch.Tensor | None
    """Minus infinity where nothing is visible, if the bias does not have it."""
    query_positions_GQ: np.ndarray
    key_positions_GK: np.ndarray
    num_context_keys: int
    """The first keys, at positions 0, 1, 2 .."""
    first_random: int
    """Place of its first probability in the dropout's random numbers."""


@dataclass(frozen=True)
class _Group:
    """Samples padded to one shape."""

    num_samples: int
    parts: list[_Part]
    queries_X: torch.Tensor
    """Which vectors its queries are, part by part."""
    attended_X: torch.Tensor
    """The same among the attended vectors."""
    padding_X: torch.Tensor
    """Which of its queries are padding."""
    keys_values_X: torch.Tensor
    """Which vectors its keys are, and then its values."""
    query_places: slice
    """Where its queries are among those of all groups."""
    key_places: slice
    """Where its keys are, and then its values."""


@dataclass(frozen=True)
class _Groups:
    """All groups, and the way back: where among all their queries, and behind them keys and values, a vector is.

    The first query is no row's, but zero, which is what filler gets.
    """

    groups: list[_Group]
    num_queries: int
    num_keys_values: int
    query_places_RH: torch.Tensor
    key_places_N2H: torch.Tensor


class CpuAttention:
    """See `attention.Attention`. Filler gets zeros."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float) -> None:
        """Raises ValueError for a layout that is not on a CPU."""
        if layout.ids_N.device.type != "cpu":
            raise ValueError(f"cpu attention cannot run on {layout.ids_N.device.type}; pass --attention auto")
        self._layout, self._rate = layout, dropout_rate
        self._by_distance_HM: torch.Tensor | None = None
        self._context_bias_1HLL: torch.Tensor | None = None
        if relative_bias is not None:
            self._dtype = relative_bias.weight.dtype
            self._by_distance_HM = relative_bias.by_distance(_rounded(int(layout.positions_N.max()) + 1))
            positions_1L = np.arange(_rounded(max(layout.context_lengths)))[None]
            self._context_bias_1HLL = self._bias(self._by_distance_HM, positions_1L, positions_1L)
        self._of_all: _Groups | None = None
        self._of_predicted: _Groups | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop over groups, with numba in it
    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        layout = self._layout
        if self._of_all is None:
            self._of_all = self._groups(None, layout.edges, layout.context_lengths, qkv_N3HD.shape[2])
        attended_NHD: torch.Tensor = _Attend.apply(None, qkv_N3HD, self._by_distance_HM, self._of_all, self._rate)
        return attended_NHD

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        layout = self._layout
        if self._of_predicted is None:
            in_context = (layout.roles_N[layout.predicted_R] == CONTEXT).numpy()
            num_context = tuple(int(in_context[start:stop].sum()) for start, stop in pairwise(layout.predicted_edges))
            self._of_predicted = self._groups(
                layout.predicted_R.numpy(), layout.predicted_edges, num_context, queries_RHD.shape[1]
            )
        attended_RHD: torch.Tensor = _Attend.apply(
            queries_RHD, keys_values_N2HD, self._by_distance_HM, self._of_predicted, self._rate
        )
        return attended_RHD

    def _groups(
        self, slots_R: np.ndarray | None, edges: tuple[int, ...], num_context_rows: tuple[int, ...], num_heads: int
    ) -> _Groups:
        """Of rows that are all slots, or those of `slots_R`; each sample's first rows are of its context."""
        num_slots = len(self._layout.ids_N)
        rows, keys = _bounds(edges, num_context_rows), _bounds(self._layout.edges, self._layout.context_lengths)
        packed_row, packed_slot = (
            (3, 3) if slots_R is None else (1, 2)
        )  # vectors of a head: query, key, value; or query alone
        query_places_RH = np.zeros((num_slots if slots_R is None else len(slots_R), num_heads), dtype=np.int64)
        key_places_2NH = np.full((2, num_slots, num_heads), -1)
        groups: list[_Group] = []
        next_query, next_key, next_random = 1, 0, [0, 0]  # random numbers of context and of appended rows
        num_context_B, num_appended_B = (stops - starts for starts, stops in keys)
        for samples in cheapest_groups(num_context_B, num_appended_B, num_heads):
            context, appended = (_Padded.of(starts[samples], stops[samples]) for starts, stops in keys)
            all_keys = context + appended
            parts, padded, first_query = [], [], next_query
            for is_context, (starts, stops) in zip((True, False), rows, strict=True):
                queries = _Padded.of(starts[samples], stops[samples])
                if not queries.length:
                    continue
                slots_GQ = queries.rows_GQ if slots_R is None else slots_R[queries.rows_GQ]
                size = len(samples) * num_heads * queries.length
                place = slice(next_query - first_query, next_query - first_query + size)
                parts.append(
                    self._part(slots_GQ, context, None if is_context else all_keys, slots_R is None, place, next_random)
                )
                queries.note(next_query, query_places_RH)
                padded.append(queries)
                next_query += size
                next_random[not is_context] += size * parts[-1].key_positions_GK.shape[1]
            if not parts:
                continue
            first_key, size = next_key, len(samples) * num_heads * all_keys.length
            for places_NH in key_places_2NH:
                all_keys.note(next_key, places_NH)
                next_key += size
            groups.append(_Group(
                len(samples), parts,
                _in_a_row([queries.vectors(num_heads, packed_row) for queries in padded]),
                _in_a_row([queries.vectors(num_heads) for queries in padded]),
                _in_a_row([np.repeat(~queries.is_real_GQ, num_heads, axis=0) for queries in padded]).nonzero()[:, 0],
                _in_a_row([all_keys.vectors(num_heads, packed_slot, packed_slot - 2 + value) for value in (0, 1)]),
                slice(first_query, next_query), slice(first_key, next_key),
            ))  # fmt: skip
        key_places_2NH = np.where(key_places_2NH < 0, 0, next_query + key_places_2NH)
        return _Groups(
            groups, next_query, next_key, torch.from_numpy(query_places_RH),
            torch.from_numpy(key_places_2NH.swapaxes(0, 1).copy()),
        )  # fmt: skip

    def _part(
        self, slots_GQ: np.ndarray, context: _Padded, all_keys: _Padded | None, is_of_all: bool, place: slice,
        next_random: list[int],
    ) -> _Part:  # fmt: skip
        """Of context rows, where there are no keys but the context's, or of appended ones."""
        layout, is_context, keys = self._layout, all_keys is None, all_keys or context
        roles_N, turns_N, positions_N = layout.roles_N.numpy(), layout.turns_N.numpy(), layout.positions_N.numpy()
        positions_GQ, positions_GK = positions_N[slots_GQ], positions_N[keys.rows_GQ]
        if is_context and is_of_all:
            bias, hidden = self._context_bias_1HLL, None
            if bias is not None:
                bias = bias[:, :, : context.length, : context.length]
            if not context.is_real_GQ.all():
                hidden = _minus_infinity(~context.is_real_GQ[:, None, None])
        else:
            turns_GK = np.where(keys.is_real_GQ, turns_N[keys.rows_GQ], PADDING_TURN)[:, None]
            is_visible_GQK = visible(
                roles_N[slots_GQ][:, :, None], turns_N[slots_GQ][:, :, None], roles_N[keys.rows_GQ][:, None], turns_GK
            )
            bias, hidden = None, None
            if self._by_distance_HM is not None:
                bias = self._bias(self._by_distance_HM, positions_GQ, positions_GK)
                bias.masked_fill_(torch.from_numpy(~is_visible_GQK[:, None]), -math.inf)
            else:
                hidden = _minus_infinity(~is_visible_GQK[:, None])
        return _Part(
            is_context, place, bias, hidden, positions_GQ, positions_GK, context.length, next_random[not is_context]
        )

    def _bias(self, by_distance_HM: torch.Tensor, positions_GQ: np.ndarray, positions_GK: np.ndarray) -> torch.Tensor:
        """[G, H, Q, K]."""
        by_distance_HM = by_distance_HM.detach()
        shape = (len(positions_GQ), len(by_distance_HM), positions_GQ.shape[1], positions_GK.shape[1])
        bias_GHQK = by_distance_HM.new_empty(shape)
        _look_up(by_distance_HM.numpy(), positions_GQ, positions_GK, bias_GHQK.numpy())
        return bias_GHQK.to(self._dtype)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_RHD: torch.Tensor | None, packed: torch.Tensor, by_distance_HM: torch.Tensor | None,
        groups: _Groups, rate: float,
    ) -> torch.Tensor:  # fmt: skip
        """`packed`: keys and values [N, 2, H, D], before them the queries where they are of all slots."""
        seeds = [draw_seed(), draw_seed()] if rate else []  # of context and appended rows
        num_heads, size = packed.shape[2:]
        attended_XD = packed.new_empty(groups.num_queries, size)
        attended_XD[0] = 0
        for group in groups.groups:
            num_products = group.num_samples * num_heads
            queries_XD, (keys_GSD, values_GSD) = _vectors(queries_RHD, packed, group)
            if rate:
                values_GSD.mul_(kept_scale(rate))
            for part in group.parts:
                num_keys = part.key_positions_GK.shape[1]
                probabilities_GQK = _probabilities(queries_XD, keys_GSD, part)
                if rate:
                    zero_dropped_(probabilities_GQK, seeds[not part.is_context], rate, part.first_random)
                attended_GQD = attended_XD[group.query_places][part.queries].view(num_products, -1, size)
                torch.bmm(probabilities_GQK, values_GSD[:, :num_keys], out=attended_GQD)
        ctx.save_for_backward(queries_RHD, packed, by_distance_HM)
        ctx.groups, ctx.rate, ctx.seeds = groups, rate, seeds
        return _at(attended_XD, groups.query_places_RH)

    @staticmethod
    def backward(ctx: Any, d_attended_RHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        queries_RHD, packed, by_distance_HM = ctx.saved_tensors
        groups, rate = ctx.groups, ctx.rate
        num_heads, size = packed.shape[2:]
        scale = size**-0.5
        d_vectors_XD = packed.new_empty(groups.num_queries + groups.num_keys_values, size)
        d_vectors_XD[0] = 0
        d_queries_XD, d_keys_values_XD = d_vectors_XD.split([groups.num_queries, groups.num_keys_values])
        d_by_distance_HM = torch.zeros_like(by_distance_HM) if ctx.needs_input_grad[2] else None
        for group in groups.groups:
            num_products = group.num_samples * num_heads
            queries_XD, (keys_GSD, values_GSD) = _vectors(queries_RHD, packed, group)
            d_attended_XD = d_attended_RHD.reshape(-1, size).index_select(0, group.attended_X)
            d_attended_XD.index_fill_(0, group.padding_X, 0)
            if rate:
                d_attended_XD.mul_(kept_scale(rate))
            d_keys_GSD, d_values_GSD = d_keys_values_XD[group.key_places].view(2, num_products, -1, size)
            is_first = True
            for part in reversed(group.parts):
                num_keys = part.key_positions_GK.shape[1]
                queries_GQD, d_attended_GQD, d_queries_GQD = (
                    vectors_XD[part.queries].view(num_products, -1, size)
                    for vectors_XD in (queries_XD, d_attended_XD, d_queries_XD[group.query_places])
                )
                probabilities_GQK = _probabilities(queries_XD, keys_GSD, part)
                d_probabilities_GQK = d_attended_GQD @ values_GSD[:, :num_keys].mT
                if rate:
                    zero_dropped_(d_probabilities_GQK, ctx.seeds[not part.is_context], rate, part.first_random)
                d_scores_GQK = torch._softmax_backward_data(d_probabilities_GQK, probabilities_GQK, -1, packed.dtype)
                if rate:  # only now, as the softmax's gradient takes what was dropped, too
                    zero_dropped_(probabilities_GQK, ctx.seeds[not part.is_context], rate, part.first_random)
                _add_product(d_values_GSD, probabilities_GQK.mT, d_attended_GQD, 1.0, is_first)
                keys_GKD = keys_GSD[:, :num_keys]
                torch.baddbmm(d_queries_GQD, d_scores_GQK, keys_GKD, beta=0, alpha=scale, out=d_queries_GQD)
                _add_product(d_keys_GSD, d_scores_GQK.mT, queries_GQD, scale, is_first)
                is_first = False
                if d_by_distance_HM is not None:
                    _add_by_distance(d_scores_GQK.unflatten(0, (-1, num_heads)), part, d_by_distance_HM)
        if queries_RHD is None:
            places_N3H = torch.cat([groups.query_places_RH[:, None], groups.key_places_N2H], dim=1)
            return None, _at(d_vectors_XD, places_N3H), d_by_distance_HM, None, None
        d_queries_RHD = _at(d_vectors_XD, groups.query_places_RH)
        return d_queries_RHD, _at(d_vectors_XD, groups.key_places_N2H), d_by_distance_HM, None, None


def _at(vectors_XD: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[.., D]."""
    return vectors_XD.index_select(0, places.flatten()).view(*places.shape, vectors_XD.shape[1])


def _vectors(
    queries_RHD: torch.Tensor | None, packed: torch.Tensor, group: _Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """A group's queries [X, D], and its keys and values [2, GH, S, D]."""
    num_heads, size = packed.shape[2:]
    packed_XD = packed.reshape(-1, size)
    queries_XD = packed_XD if queries_RHD is None else queries_RHD.reshape(-1, size)
    keys_values_XD = packed_XD.index_select(0, group.keys_values_X)
    return (
        queries_XD.index_select(0, group.queries_X),
        keys_values_XD.view(2, group.num_samples * num_heads, -1, size),
    )


def _probabilities(queries_XD: torch.Tensor, keys_GSD: torch.Tensor, part: _Part) -> torch.Tensor:
    """[GH, Q, K]."""
    num_products, _, size = keys_GSD.shape
    queries_GQD = queries_XD[part.queries].view(num_products, -1, size)
    num_samples, num_keys = part.key_positions_GK.shape
    scores_GQK = queries_XD.new_empty(num_products, queries_GQD.shape[1], num_keys)
    scores_GHQK = scores_GQK.unflatten(0, (num_samples, -1))
    added = [x for x in (part.bias_GHQK, part.hidden_GHQK) if x is not None]
    if len(added) == 2:
        torch.add(*added, out=scores_GHQK)
    elif added:
        scores_GHQK.copy_(added[0])
    keys_GDK = keys_GSD[:, :num_keys].mT
    torch.baddbmm(scores_GQK, queries_GQD, keys_GDK, beta=bool(added), alpha=size**-0.5, out=scores_GQK)
    return torch.softmax(scores_GQK, dim=-1)


def _add_product(sums_GSD: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, is_first: bool) -> None:
    """Add scale x `a` x `b` to the first rows of `sums_GSD`, or set all of them, where it is the first."""
    num_rows = a.shape[1]
    if is_first and num_rows == sums_GSD.shape[1]:
        torch.baddbmm(sums_GSD, a, b, beta=0, alpha=scale, out=sums_GSD)
        return
    if is_first:
        sums_GSD[:, num_rows:] = 0
        sums_GSD[:, :num_rows] = 0
    sums_GSD[:, :num_rows].add_(a @ b, alpha=scale)


def _rounded(number: int) -> int:
    return -(-number // _MULTIPLE) * _MULTIPLE


def _bounds(edges: tuple[int, ...], num_context: tuple[int, ...]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Of context and of appended rows: where those of each sample begin and end."""
    starts_B, stops_B = np.array(edges[:-1]), np.array(edges[1:])
    middles_B = starts_B + np.array(num_context)
    return (starts_B, middles_B), (middles_B, stops_B)


def cheapest_groups(num_context_B: np.ndarray, num_appended_B: np.ndarray, num_heads: int) -> list[np.ndarray]:
    """Samples of so many context and appended slots in groups that together have the least `cost_of_group`.

    Groups are runs of the samples in the order of their lengths; the cheapest way to divide the first n of them into groups
    is known for each n from those before. A group's size is a power of two, for few shapes.
    """
    order = np.lexsort((num_appended_B, num_context_B))
    context, appended = ([*map(_rounded, lengths[order].tolist())] for lengths in (num_context_B, num_appended_B))
    costs, sizes = [0.0], [0]
    for stop in range(1, len(order) + 1):
        options = list[tuple[float, int]]()
        for size in (1 << power for power in range(stop.bit_length())):
            group = slice(stop - size, stop)
            cost = cost_of_group(context[group], appended[group], num_heads)
            if cost == math.inf:
                break
            options.append((costs[stop - size] + cost, size))
        cost, size = min(options)
        costs.append(cost)
        sizes.append(size)
    stops = [len(order)]
    while stops[-1]:
        stops.append(stops[-1] - sizes[stops[-1]])
    return [order[start:stop] for start, stop in pairwise(reversed(stops))]


def cost_of_group(num_context: Sequence[int], num_appended: Sequence[int], num_heads: int) -> float:
    """Its scores when all its samples are as long as the longest, and what its calls are worth in scores; infinite if there
    would be too many scores at a time."""
    num_samples, context, appended = len(num_context), max(num_context), max(num_appended)
    of_parts = context**2, appended * (context + appended)
    if num_samples > 1 and num_samples * num_heads * max(of_parts) > _GROUP_SCORES:
        return math.inf
    return _CALLS_SCORES + num_samples * num_heads * sum(of_parts)


def _in_a_row(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))


def _minus_infinity(where: np.ndarray) -> torch.Tensor:
    return torch.zeros(where.shape).masked_fill(torch.from_numpy(where), -math.inf)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _look_up(by_distance: np.ndarray, query_positions: np.ndarray, key_positions: np.ndarray, bias: np.ndarray) -> None:
    farthest = by_distance.shape[1] // 2
    for sample in range(bias.shape[0]):
        positions = key_positions[sample]
        for head in range(bias.shape[1]):
            table = by_distance[head]
            for query in range(bias.shape[2]):
                row, zero = bias[sample, head, query], farthest - query_positions[sample, query]
                for key in range(len(row)):
                    row[key] = table[zero + positions[key]]


def _add_by_distance(d_scores_GHQK: torch.Tensor, part: _Part, d_by_distance_HM: torch.Tensor) -> None:
    """Add the gradient of `_look_up`."""
    is_bf16, sums_HM = d_scores_GHQK.dtype == torch.bfloat16, d_by_distance_HM.numpy()
    # NumPy does not know bf16.
    d_scores = d_scores_GHQK.view(torch.uint16) if is_bf16 else d_scores_GHQK.to(d_by_distance_HM.dtype)
    scores_and_places = d_scores.numpy(), part.query_positions_GQ, part.key_positions_GK, part.num_context_keys

    def of_head(head: int) -> None:
        (_add_sums_of_bf16 if is_bf16 else _add_sums)(*scores_and_places, head, sums_HM[head])

    for_each(of_head, range(len(sums_HM)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_sums(
    d_scores: np.ndarray, query_positions: np.ndarray, key_positions: np.ndarray, num_context_keys: int, head: int,
    sums: np.ndarray,
) -> None:  # fmt: skip
    for sample in range(d_scores.shape[0]):
        for query in range(d_scores.shape[2]):
            row, zero = d_scores[sample, head, query], len(sums) // 2 - query_positions[sample, query]
            _add_row(row, zero, key_positions[sample], num_context_keys, sums)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_sums_of_bf16(
    bits: np.ndarray, query_positions: np.ndarray, key_positions: np.ndarray, num_context_keys: int, head: int,
    sums: np.ndarray,
) -> None:  # fmt: skip
    """bf16 is the upper half of fp32."""
    words = np.empty(bits.shape[3], np.uint32)
    row = words.view(np.float32)
    for sample in range(bits.shape[0]):
        for query in range(bits.shape[2]):
            for key in range(len(words)):
                words[key] = np.uint32(bits[sample, head, query, key]) << np.uint32(16)
            zero = len(sums) // 2 - query_positions[sample, query]
            _add_row(row, zero, key_positions[sample], num_context_keys, sums)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_row(row: np.ndarray, zero: int, key_positions: np.ndarray, num_context_keys: int, sums: np.ndarray) -> None:
    """For the context's keys without asking their positions; the gradient of padding is zero."""
    of_context = sums[zero : zero + num_context_keys]
    for key in range(num_context_keys):
        of_context[key] += row[key]
    for key in range(num_context_keys, len(row)):
        sums[zero + key_positions[key]] += row[key]
