"""A source to a target: the tokens of both, and the model in its folder. Training and decoding share all of it.

A source is "[SOS] source [EOS]", for question generation "[SOS] paragraph [EOS] answer [EOS]"; a target is "target [EOS]".
Their slots are those of `pretrain.layout.seq2seq_layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.tokenizer import Tokenizer
from finetune.model import Seq2SeqModel, load_model, save_model
from finetune.search import SearchSettings


@dataclass(frozen=True)
class Seq2SeqSettings:
    """What a model is for; in its config.json under "task". The defaults are of no recipe."""

    max_source_tokens: int = 256
    """Tokens of a source, special ones included; longer ones are cut."""
    max_target_tokens: int = 64
    """Tokens of a target, its [EOS] included; longer ones are cut."""
    question_generation: bool = False
    """Sources are paragraphs with answers, targets questions."""
    num_beams: int = 5
    """Beams of a search, unless it is told otherwise."""
    length_penalty: float = 1.0
    """Of a search: hypotheses are ranked by their log-probability / (length ** this)."""
    released_length_penalty: bool = False
    """Of a search: rank as UniLM's released code does, for which the recipes' penalties are; see finetune.generate."""

    def __post_init__(self) -> None:
        least = {"max_source_tokens": 8, "max_target_tokens": 2, "num_beams": 1}
        faults = [f"{k} is {getattr(self, k)}, expected at least {v}" for k, v in least.items() if getattr(self, k) < v]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def max_positions(self) -> int:
        """That the position table must have."""
        return self.max_source_tokens + self.max_target_tokens

    def search(self) -> SearchSettings:
        """How targets are decoded unless it is told otherwise."""
        return SearchSettings(
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            released_length_penalty=self.released_length_penalty,
            max_length_tokens=self.max_target_tokens,
        )


def source_ids(tokenizer: Tokenizer, parts: Sequence[Sequence[int]], max_source_tokens: int) -> tuple[list[int], int]:
    """A source's tokens, and how many of its own are cut: the ends of parts, of the longest
    until it is no longer than the others."""
    room, kept = max_source_tokens - len(parts) - 1, [0] * len(parts)
    for num_before, place in enumerate(sorted(range(len(parts)), key=lambda place: len(parts[place]))):
        kept[place] = min(len(parts[place]), room // (len(parts) - num_before))
        room -= kept[place]
    ids = [tokenizer.sos_id]
    for part, num_tokens in zip(parts, kept, strict=True):
        ids += [*part[:num_tokens], tokenizer.eos_id]
    return ids, sum(map(len, parts)) - sum(kept)


def target_ids(tokenizer: Tokenizer, ids: Sequence[int], max_target_tokens: int) -> tuple[list[int], int]:
    """A target's tokens, and how many of its own are cut."""
    kept = ids[: max_target_tokens - 1]
    return [*kept, tokenizer.eos_id], len(ids) - len(kept)


def save_seq2seq(folder: Path, model: Seq2SeqModel, tokenizer: Tokenizer, settings: Seq2SeqSettings) -> None:
    """See save_model."""
    save_model(folder, model, tokenizer, asdict(settings))


def load_seq2seq(folder: Path) -> tuple[Seq2SeqModel, Tokenizer, Seq2SeqSettings]:
    """In eval mode, what `python -m finetune.seq2seq` wrote; see load_model."""
    model, tokenizer, task = load_model(folder, Seq2SeqModel)
    return model, tokenizer, Seq2SeqSettings(**task)
