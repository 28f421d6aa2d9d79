"""How targets are searched for, and what a search finds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.tokenizer import Tokenizer
from pretrain.model import PMLM

_WORD_SEPARATOR = "|"


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
            f"{config.max_positions - max_source_tokens} positions of {config.max_positions}; expected at most that many"
        )
