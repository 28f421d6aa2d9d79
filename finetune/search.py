"""Decoding: the likeliest targets of a source by beam search (greedy with one beam), or drawn ones.

Scores are sums of the model's own log-probabilities, whatever is forbidden. A hypothesis' score is its sum divided by
length ** length_penalty; the length counts all its tokens, [EOS] too. A step looks at the 2 x num_beams likeliest ways to go on:
those among the first num_beams that end a target are hypotheses, at the length limit all of those; the first num_beams that end none
are the next beams. A sentence is finished when no beam can come among the num_best any more, whatever follows; of a single beam,
where it ends. So the result is that of a search to the length limit, and depends on the length penalty in the ranking alone.

Shapes: B sentences, K beams, R = B x K, H hidden size, V vocabulary, C candidates, T tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_prep.draws import Decision, draw_words, unit_intervals
from finetune.search_memory import SearchMemory
from finetune.search_settings import Found, Hypothesis, Rules, SearchSettings, Trace, refuse_impossible
from pretrain.layout import next_token_layout
from pretrain.model import PMLM

_DECIMALS = 6  # of a log-probability: less than what rounding in another batch changes


def decode(
    model: PMLM, rules: Rules, sources: Sequence[Sequence[int]], settings: SearchSettings, *,
    samples: Sequence[int] | None = None, batch_size: int = 16, with_traces: bool = False,
) -> list[Found]:  # fmt: skip
    """Decode sources, given as tokens, special ones included; `batch_size` of similar length are computed together.

    `samples`: the sources' numbers among all, which sampling draws by; 0, 1, 2 ... by default. With traces, a search goes on to
    the length limit. Raises ValueError for an empty source; see also refuse_impossible.
    """
    numbers = range(len(sources)) if samples is None else samples
    order = sorted(range(len(sources)), key=lambda place: -len(sources[place]))
    found: list[Found | None] = [None] * len(sources)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        search = Search(
            model, rules, [sources[place] for place in batch], settings, [numbers[place] for place in batch], with_traces
        )  # fmt: skip
        while not search.is_done:
            search.step()
        for place, of_source in zip(batch, search.found, strict=True):
            found[place] = of_source
    return found  # type: ignore[return-value]


def stream(model: PMLM, rules: Rules, source: Sequence[int], settings: SearchSettings) -> Iterator[int]:
    """The tokens of a greedy search, or of one draw, as they come, without [EOS]."""
    search = Search(model, rules, [source], settings, [0])
    while not search.is_done:
        search.step()
        token = (
            int(search.last_BK[0, 0])
            if not search.is_done
            else (*search.found[0].hypotheses[0].tokens, -1)[search.num_steps - 1]
        )
        if token >= 0:
            yield token


class Search:
    """A batch's search, step by step."""

    def __init__(
        self, model: PMLM, rules: Rules, sources: Sequence[Sequence[int]], settings: SearchSettings, samples: Sequence[int],
        with_traces: bool = False,
    ) -> None:  # fmt: skip
        """Encodes the sources. Raises ValueError, see `decode`."""
        if not all(map(len, sources)):
            raise ValueError("expected sources of at least one token")
        refuse_impossible(model, settings, max(map(len, sources)))
        self._model, self._rules, self._settings = model, rules, settings
        self._device = model.bert.embeddings.word_embeddings.weight.device
        self._num_beams = settings.num_best if settings.sampling else settings.num_beams
        self.num_steps = 0
        self._places = list(range(len(sources)))  # of the sentences that are not finished
        self._ended: list[list[tuple[float, int, Hypothesis]]] = [[] for _ in sources]
        self._traces = [Trace() for _ in sources] if with_traces else None
        self.found: list[Found] = [Found([])] * len(sources)
        self._sample_keys = np.array([
            [draw_words(settings.seed, Decision.SAMPLED_TOKENS, sample, 1, 1, variant=draw)[0, 0] for draw in range(self._num_beams)]
            for sample in samples
        ]) if settings.sampling else None  # fmt: skip
        self._lengths_B = torch.tensor([*map(len, sources)], device=self._device)
        self._tokens_BKT = torch.zeros(len(sources), 1, 0, dtype=torch.int64, device=self._device)
        self._totals_BK = torch.zeros(len(sources), 1, dtype=torch.float64, device=self._device)
        self.last_BK = torch.zeros(len(sources), 1, dtype=torch.int64, device=self._device)
        self._memory = SearchMemory(model, sources, self._num_beams, settings.max_length_tokens)

    @property
    def is_done(self) -> bool:
        """Whether every sentence is finished."""
        return not self._places

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to every beam."""
        logits_RV = self._logits()
        log_probabilities_RV = torch.log_softmax(logits_RV.float(), dim=-1)
        self.num_steps += 1
        if self._settings.sampling:
            self._draw(logits_RV.float(), log_probabilities_RV)
        else:
            self._choose(log_probabilities_RV)

    def _logits(self) -> torch.Tensor:
        """Of the next token of each beam."""
        model, memory = self._model, self._memory
        if not self.num_steps:
            layout = memory.source_layout(self._rules.mask_id).to(self._device)
            hidden_RH = model.encode_predicted(layout, memory.of_sources(model.bert.encoder.attention_of(layout)))
        else:
            positions_BK = (self._lengths_B + self.num_steps - 1)[:, None].expand_as(self.last_BK)
            layout = next_token_layout(
                self.last_BK.flatten(), positions_BK.flatten(), self.num_steps, mask_id=self._rules.mask_id
            )
            hidden_RH = model.encode_predicted(layout, memory.of_next_tokens(layout))
        return model.predict(hidden_RH)

    # ---- beams

    def _choose(self, log_probabilities_RV: torch.Tensor) -> None:
        settings, rules, num_beams = self._settings, self._rules, self._num_beams
        self._forbid(log_probabilities_RV)
        num_sentences, num_before = self._totals_BK.shape
        num_tokens = min(2 * num_beams, log_probabilities_RV.shape[1])
        of_beams_RC, tokens_RC = log_probabilities_RV.topk(num_tokens)
        totals_BC = (self._totals_BK[:, :, None] + of_beams_RC.double().view(num_sentences, num_before, -1)).flatten(1)
        if (lacking := 2 * num_beams - totals_BC.shape[1]) > 0:  # a first step in a tiny vocabulary
            totals_BC = torch.nn.functional.pad(totals_BC, (0, lacking), value=-math.inf)
        totals_BC, places_BC = totals_BC.topk(2 * num_beams)
        tokens_BC = tokens_RC.view(num_sentences, -1)
        places_BC = places_BC.clamp(max=tokens_BC.shape[1] - 1)
        tokens_BC, parents_BC = tokens_BC.gather(1, places_BC), places_BC // num_tokens
        is_end_BC = tokens_BC == rules.eos_id
        goes_on_BK = is_end_BC.int().argsort(dim=1, stable=True)[:, :num_beams]
        tokens_BK, parents_BK, totals_BK = (x.gather(1, goes_on_BK) for x in (tokens_BC, parents_BC, totals_BC))
        totals_BK = totals_BK.masked_fill(is_end_BC.gather(1, goes_on_BK), -math.inf)

        is_last = self.num_steps == settings.max_length_tokens
        is_hypothesis_BK = ((is_end_BC | is_last) & totals_BC.isfinite())[:, :num_beams].cpu().numpy()
        ends: list[list[tuple[int, int, float]]] = [[] for _ in self._places]
        rows, ranks = np.nonzero(is_hypothesis_BK)
        if len(rows):
            parents, tokens, totals = (x[rows, ranks].tolist() for x in (parents_BC, tokens_BC, totals_BC))
            for row, parent, token, total in zip(rows.tolist(), parents, tokens, totals, strict=True):
                ends[row].append((parent, token, round(total, _DECIMALS)))
                self._end(row, *ends[row][-1])
        best_B = totals_BK.amax(dim=1).tolist()
        if self._traces is not None:
            for row, (parents, tokens) in enumerate(zip(parents_BK.tolist(), tokens_BK.tolist(), strict=True)):
                trace = self._traces[self._places[row]]
                trace.parents.append(parents)
                trace.tokens.append(tokens)
                trace.ends.append(ends[row])
        is_finished = [is_last or self._is_finished(row, best) for row, best in enumerate(best_B)]
        self._go_on(tokens_BK, parents_BK, totals_BK)
        if any(is_finished):
            self._leave([row for row, finished in enumerate(is_finished) if finished])

    def _end(self, row: int, parent: int, token: int, total: float) -> None:
        tokens = self._tokens_BKT[row, parent].tolist()
        tokens += [] if token == self._rules.eos_id else [token]
        score = self._settings.score(total, self.num_steps)
        ended = self._ended[self._places[row]]
        ended.append((score, -len(ended), Hypothesis(tuple(tokens), total, self.num_steps, score)))

    def _is_finished(self, row: int, best: float) -> bool:
        """Whether nothing that begins as a beam does can be better than the last of the results; `best`: log-probability."""
        ended, settings = self._ended[self._places[row]], self._settings
        if best == -math.inf or (ended and settings.num_beams == 1):
            return True
        if self._traces is not None or len(ended) < settings.num_best:
            return False
        worst = heapq.nlargest(settings.num_best, ended)[-1][0]
        return worst >= max(settings.score(best, length) for length in (self.num_steps + 1, settings.max_length_tokens))

    # ---- draws

    def _draw(self, logits_RV: torch.Tensor, log_probabilities_RV: torch.Tensor) -> None:
        settings, num_draws = self._settings, self._num_beams
        self._forbid(logits_RV)
        if not self.num_steps - 1:  # all draws begin in the same way
            logits_RV, log_probabilities_RV = (
                x.repeat_interleave(num_draws, dim=0) for x in (logits_RV, log_probabilities_RV)
            )
            self._totals_BK = self._totals_BK.expand(-1, num_draws)
        assert self._sample_keys is not None
        units = unit_intervals(self._sample_keys[self._places].flatten(), self.num_steps - 1)
        tokens_R1 = draw_tokens(logits_RV, settings, torch.from_numpy(units).to(self._device))[:, None]
        of_tokens_R1 = log_probabilities_RV.gather(1, tokens_R1).double()
        tokens_BK = tokens_R1.view_as(self._totals_BK)
        totals_BK = self._totals_BK + of_tokens_R1.view_as(self._totals_BK)
        # A draw that is done goes on, unseen, until the others of its source are.
        parents_BK = torch.arange(num_draws, device=self._device).expand_as(tokens_BK) * (self.num_steps > 1)
        is_last = self.num_steps == settings.max_length_tokens
        leaving = []
        for row, (tokens, totals) in enumerate(zip(tokens_BK.tolist(), totals_BK.tolist(), strict=True)):
            ended = self._ended[self._places[row]]
            done = {-draw for _, draw, _ in ended}
            for draw, (token, total) in enumerate(zip(tokens, totals, strict=True)):
                if draw not in done and (token == self._rules.eos_id or is_last):
                    so_far = [] if self.num_steps == 1 else self._tokens_BKT[row, draw].tolist()
                    so_far += [] if token == self._rules.eos_id else [token]
                    score = settings.score(total, self.num_steps)
                    ended.append((0.0, -draw, Hypothesis(tuple(so_far), total, self.num_steps, score)))
            if len(ended) == num_draws:
                leaving.append(row)
        self._go_on(tokens_BK, parents_BK, totals_BK)
        if leaving:
            self._leave(leaving)

    # ---- both

    def _forbid(self, scores_RV: torch.Tensor) -> None:
        """Make minus infinity of what may not come next; where nothing may, the target ends."""
        rules, settings = self._rules, self._settings
        of_ends_R = scores_RV[:, rules.eos_id].clone()
        scores_RV[:, rules.never] = -math.inf
        if self.num_steps <= settings.min_length_tokens:
            scores_RV[:, rules.eos_id] = -math.inf
        history_RT = self._tokens_BKT.flatten(0, 1)
        for word in rules.forbidden:
            if len(word) == 1:
                scores_RV[:, word[0]] = -math.inf
            elif history_RT.shape[1] >= len(word) - 1:
                begun_R = (history_RT[:, 1 - len(word) :] == history_RT.new_tensor(word[:-1])).all(dim=1)
                scores_RV[begun_R, word[-1]] = -math.inf
        size = settings.no_repeat_ngram
        if size and history_RT.shape[1] >= size:
            ngrams_RGn = history_RT.unfold(1, size, 1)
            begun_R1n = history_RT[:, None, history_RT.shape[1] - size + 1 :]
            is_repeat_RG = (ngrams_RGn[:, :, :-1] == begun_R1n).all(dim=2)
            if rules.may_repeat:
                is_repeat_RG &= ~torch.isin(ngrams_RGn, ngrams_RGn.new_tensor(rules.may_repeat)).any(dim=2)
            beams, places = is_repeat_RG.nonzero(as_tuple=True)
            scores_RV[beams, ngrams_RGn[beams, places, -1]] = -math.inf
        may_nothing_R = scores_RV.amax(dim=1) == -math.inf
        scores_RV[may_nothing_R, rules.eos_id] = of_ends_R[may_nothing_R]

    def _go_on(self, tokens_BK: torch.Tensor, parents_BK: torch.Tensor, totals_BK: torch.Tensor) -> None:
        history_BKT = self._tokens_BKT.gather(1, parents_BK[:, :, None].expand(-1, -1, self._tokens_BKT.shape[2]))
        self._tokens_BKT = torch.cat([history_BKT, tokens_BK[:, :, None]], dim=2)
        self._totals_BK, self.last_BK = totals_BK, tokens_BK
        self._memory.descend(parents_BK)

    def _leave(self, leaving: list[int]) -> None:
        for row in leaving:
            place = self._places[row]
            ended = self._ended[place]
            best = [
                hypothesis for *_, hypothesis in heapq.nlargest(self._settings.num_best, ended, key=lambda e: e[:2])
            ]
            self.found[place] = Found(best, self._traces[place] if self._traces is not None else None)
        order = self._memory.keep([row for row in range(len(self._places)) if row not in set(leaving)])
        self._places = [self._places[row] for row in order]
        self._lengths_B, self._tokens_BKT, self._totals_BK, self.last_BK = (
            x[order] for x in (self._lengths_B, self._tokens_BKT, self._totals_BK, self.last_BK)
        )


def draw_tokens(logits_RV: torch.Tensor, settings: SearchSettings, units_R: torch.Tensor) -> torch.Tensor:
    """A token of each row, for numbers of [0, 1) that are drawn already: temperature, then top_k, then top_p."""
    probabilities_RV, tokens_RV = torch.softmax(logits_RV / settings.temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    if settings.top_k:
        probabilities_RV = probabilities_RV[:, : settings.top_k]
    cumulated_RV = probabilities_RV.double().cumsum(dim=-1)
    whole_R = cumulated_RV[:, -1]
    if settings.top_p < 1:
        num_kept_R = (cumulated_RV < settings.top_p * whole_R[:, None]).sum(dim=-1)
        whole_R = cumulated_RV.gather(1, num_kept_R[:, None])[:, 0]
    places_R = torch.searchsorted(cumulated_RV, (units_R * whole_R)[:, None], right=True)[:, 0]
    return tokens_RV.gather(1, places_R.clamp(max=cumulated_RV.shape[1] - 1)[:, None])[:, 0]
