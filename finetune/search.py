"""Decoding: the likeliest targets of a source by beam search (greedy with one beam), or drawn ones.

A step feeds two slots for each beam (pretrain/layout.py, `next_token_layout`): the last token, as an original, and a
pseudo mask that predicts the next. All before is remembered as keys and values, a column for each slot:

    columns of a sentence   | its source | originals, one for each token that a beam chose  | last tokens | pseudo masks |
    seen by a beam          | all        | those of its own line                            | its own     | its own      |

The source is encoded once and its columns are shared by the beams. Originals are nodes of a tree: beams of one history
share them too, and that beams change places moves no key and no value, as a beam's line is a row of a mask. Nodes that no beam
descends from are dropped from time to time. Sentences that are finished leave the batch.

Scores are sums of the model's own log-probabilities, whatever is forbidden. A hypothesis' score is its sum divided by
length ** length_penalty; the length counts all its tokens, [EOS] too. A step looks at the 2 x num_beams likeliest ways to go on:
those among the first num_beams that end a target are hypotheses, at the length limit all of those; the first num_beams that end none
are the next beams. A sentence is finished when no beam can come among the num_best any more, whatever follows; of a single beam,
where it ends. So the result is that of a search to the length limit, and depends on the length penalty in the ranking alone.

Shapes: B sentences, K beams, S slots of the longest source, M columns, N slots fed, R = B x K, H heads, D = size of a head,
V vocabulary, C candidates, T tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data_prep.draws import Decision, draw_words, unit_intervals
from data_prep.tokenizer import Tokenizer
from pretrain.attention import Attention
from pretrain.layout import CONTEXT, GIVEN, PADDING_TURN, PSEUDO, Layout, next_token_layout, seq2seq_layout, visible
from pretrain.model import PMLM

_WORD_SEPARATOR = "|"
_DECIMALS = 6  # of a log-probability: less than what rounding in another batch changes


@dataclass(frozen=True)
class SearchSettings:
    """How targets are decoded."""

    num_beams: int = 5
    """Hypotheses followed at a time; 1 = greedy."""
    num_best: int = 1
    """Results of each source, best first; with --sampling, draws."""
    length_penalty: float = 1.0
    """Results are ranked by log-probability / (tokens ** this), [EOS] counted; more favours longer ones."""
    released_length_penalty: bool = False
    """Rank by log-probability / (((5 + tokens) / 6) ** length_penalty), as UniLM's released code does: the paper's values are for it."""
    min_length_tokens: int = 0
    """Fewest tokens of a result, [EOS] not counted."""
    max_length_tokens: int = 64
    """Most tokens of a result, [EOS] counted."""
    no_repeat_ngram: int = 0
    """No result has the same so many tokens in a row twice; 0 = it may."""
    may_repeat: str = ""
    """Words that --no_repeat_ngram does not count, as "the|of|.": what has one of them in it may come twice."""
    forbidden_words: str = ""
    """Words that no result has, also at the beginning of longer ones, as "this|that"."""
    sampling: bool = False
    """Draw tokens by their probabilities, instead of searching for the likeliest."""
    temperature: float = 1.0
    """With --sampling: logits are divided by this; less makes likely tokens likelier."""
    top_k: int = 0
    """With --sampling: only so many tokens, the likeliest, may be drawn; 0 = all."""
    top_p: float = 1.0
    """With --sampling: only the likeliest tokens that together have this probability may be drawn."""
    seed: int = 0
    """Key of the draws."""

    def __post_init__(self) -> None:
        least = {
            "num_beams": 1, "num_best": 1, "min_length_tokens": 0, "max_length_tokens": 1, "no_repeat_ngram": 0, "top_k": 0,
            "seed": 0,
        }  # fmt: skip
        faults = [f"{k} is {getattr(self, k)}, expected at least {v}" for k, v in least.items() if getattr(self, k) < v]
        if not self.sampling and self.num_best > self.num_beams:
            faults.append(f"num_best is {self.num_best}, expected at most num_beams, which is {self.num_beams}")
        if self.min_length_tokens >= self.max_length_tokens:
            faults.append(f"min_length_tokens is {self.min_length_tokens}, expected less than max_length_tokens, which is "
                          f"{self.max_length_tokens}")  # fmt: skip
        if not math.isfinite(self.length_penalty):
            faults.append(f"length_penalty is {self.length_penalty}, expected a number")
        if not 0 < self.temperature < math.inf:
            faults.append(f"temperature is {self.temperature}, expected more than 0")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not self.sampling and (self.temperature, self.top_k, self.top_p) != (1, 0, 1):
            faults.append("temperature, top_k and top_p are for sampling; pass --sampling")
        if self.may_repeat and not self.no_repeat_ngram:
            faults.append("may_repeat is for no_repeat_ngram; pass --no_repeat_ngram")
        if faults:
            raise ValueError("; ".join(faults))

    def score(self, log_probability: float, num_tokens: int) -> float:
        """That hypotheses are ranked by."""
        length = (5 + num_tokens) / 6 if self.released_length_penalty else num_tokens
        return float(log_probability / length**self.length_penalty)


@dataclass(frozen=True)
class Rules:
    """A vocabulary's special ids, and the settings' words as tokens."""

    eos_id: int
    mask_id: int
    never: tuple[int, ...]
    """Tokens that are in no target."""
    forbidden: tuple[tuple[int, ...], ...] = ()
    may_repeat: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, settings: SearchSettings) -> Rules:
        """Raises ValueError for words that the vocabulary does not have."""
        forbidden, exempt = (
            tuple(_tokens_of_words(tokenizer, name, getattr(settings, name))) for name in ("forbidden_words", "may_repeat")
        )  # fmt: skip
        never = {tokenizer.pad_id, tokenizer.sos_id, tokenizer.mask_id} - {tokenizer.eos_id}
        return cls(
            tokenizer.eos_id, tokenizer.mask_id, tuple(sorted(never)), forbidden, tuple(sorted({i for w in exempt for i in w}))
        )  # fmt: skip


def _tokens_of_words(tokenizer: Tokenizer, flag: str, words: str) -> Iterator[tuple[int, ...]]:
    for word in filter(None, (word.strip() for word in words.split(_WORD_SEPARATOR))):
        ids = tuple(int(i) for i in tokenizer.encode([word]))
        if not ids or tokenizer.unk_id in ids:
            raise ValueError(f"--{flag} {word!r}: the vocabulary cannot write it")
        yield ids


@dataclass(frozen=True)
class Hypothesis:
    """A target."""

    tokens: tuple[int, ...]
    """Without [EOS]."""
    log_probability: float
    num_tokens: int
    """With [EOS], if it ends."""
    score: float


@dataclass
class Trace:
    """Every beam and every end of a search, so that another length penalty needs no search. A list for each step."""

    parents: list[list[int]] = field(default_factory=list)
    """For each beam, which of the step before it goes on."""
    tokens: list[list[int]] = field(default_factory=list)
    """For each beam, its last token."""
    ends: list[list[tuple[int, int, float]]] = field(default_factory=list)
    """Hypotheses: beam of the step before, last token, log-probability."""

    def hypotheses(self, settings: SearchSettings, eos_id: int) -> list[Hypothesis]:
        """The best."""
        found = [(settings.score(end[2], step + 1), step, end) for step, ends in enumerate(self.ends) for end in ends]
        best = heapq.nsmallest(settings.num_best, found, key=lambda item: (-item[0], item[1]))
        return [self._hypothesis(score, step, *end, eos_id) for score, step, end in best]

    def _hypothesis(
        self, score: float, step: int, beam: int, token: int, log_probability: float, eos_id: int
    ) -> Hypothesis:
        tokens = [] if token == eos_id else [token]
        for before in range(step - 1, -1, -1):
            tokens.append(self.tokens[before][beam])
            beam = self.parents[before][beam]
        return Hypothesis(tuple(reversed(tokens)), log_probability, step + 1, score)


@dataclass(frozen=True)
class Found:
    """What a source became."""

    hypotheses: list[Hypothesis]
    """The num_best best, or the draws in their order."""
    trace: Trace | None = None


def refuse_impossible(model: PMLM, settings: SearchSettings, max_source_tokens: int) -> None:
    """Raises ValueError for beams that are more than the vocabulary, and targets that go on behind the position table."""
    config = model.config
    if settings.num_beams > config.vocab_size:
        raise ValueError(
            f"--num_beams {settings.num_beams}: more than the {config.vocab_size} entries of the vocabulary"
        )
    if settings.top_k > config.vocab_size:
        raise ValueError(f"--top_k {settings.top_k}: more than the {config.vocab_size} entries of the vocabulary")
    if max_source_tokens + settings.max_length_tokens > config.max_positions:
        raise ValueError(
            f"--max_length_tokens {settings.max_length_tokens}: behind a source of {max_source_tokens} tokens there are "
            f"{config.max_positions - max_source_tokens} positions of {config.max_positions}; expected at most so many"
        )


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
        self._memory = _Memory(model, sources, self._num_beams, settings.max_length_tokens)

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


class _Memory:
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

    def __init__(self, memory: _Memory, attention: Attention) -> None:
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

    def __init__(self, memory: _Memory, bias_BHK2M: torch.Tensor, first: int) -> None:
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
