"""Documents cut into samples: "[SOS] S1 [EOS] S2 [EOS]", S1 and S2 contiguous text of one document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.draws import Decision, draw_one_by_one, draw_words, scale_high_bits

NUM_SPECIAL_TOKENS = 3  # [SOS], and [EOS] behind each segment
MIN_DOCUMENT_TOKENS = 8  # shorter documents teach nothing; they are counted and left out


@dataclass(frozen=True)
class Samples:
    """Samples without their masks. B samples, L = the data set's max_length_tokens."""

    tokens_BL: np.ndarray
    """int32; behind `length` the [PAD] id."""
    length_B: np.ndarray
    """int32; tokens including the three special ones."""
    segment_boundary_B: np.ndarray
    """int32; the slot at which segment B (S2) begins; what is before it, the first [EOS] included, is segment A."""


def cut_into_texts(
    document_ids: np.ndarray,
    max_length_tokens: int,
    *,
    short_sample_probability: float = 0.0,
    seed: int = 0,
    document_hash: int = 0,
) -> list[np.ndarray]:
    """A document's ids as pieces that fit a sample: as few as possible, their sizes equal within one token.

    Equal pieces instead of full ones and a rest: the number of samples is the same and none is a stub of three tokens.

    With `short_sample_probability` each piece in turn may become a short one, its size drawn uniformly from
    MIN_DOCUMENT_TOKENS to what fits; what is between short ones is cut as above. No piece is cut off so late that fewer
    than MIN_DOCUMENT_TOKENS remain. The draws depend on (seed, document_hash) alone.
    """
    largest = max_length_tokens - NUM_SPECIAL_TOKENS
    if not short_sample_probability:
        return _equal_pieces(document_ids, largest)
    words = draw_one_by_one(seed, Decision.SHORT_SAMPLES, document_hash)
    texts: list[np.ndarray] = []
    done = at = 0  # what is before `done` is in `texts`
    while True:
        is_short = next(words) < short_sample_probability * 2**64
        size = MIN_DOCUMENT_TOKENS + (next(words) * (largest - MIN_DOCUMENT_TOKENS + 1) >> 64) if is_short else largest
        if at + size > len(document_ids) - MIN_DOCUMENT_TOKENS:
            return texts + _equal_pieces(document_ids[done:], largest)
        if is_short:
            texts += [*_equal_pieces(document_ids[done:at], largest), document_ids[at : at + size]]
            done = at + size
        at += size


def _equal_pieces(ids: np.ndarray, largest: int) -> list[np.ndarray]:
    num_pieces = -(-len(ids) // largest)
    return np.array_split(ids, num_pieces) if num_pieces else []


def assemble(
    texts: list[np.ndarray],
    max_length_tokens: int,
    *,
    seed: int,
    first_sample: int,
    sos_id: int,
    eos_id: int,
    pad_id: int,
) -> Samples:
    """Samples number first_sample .. from their texts (at least 2 ids each); where S2 begins is drawn uniformly."""
    num_ids = np.array([len(t) for t in texts], dtype=np.int32)
    words = draw_words(seed, Decision.SEGMENT_BOUNDARY, first_sample, len(texts), 1)[:, 0]
    first_part = 1 + scale_high_bits(words, num_ids - 1).astype(np.int32)
    tokens = np.full((len(texts), max_length_tokens), pad_id, dtype=np.int32)
    for row, ids, split in zip(tokens, texts, first_part, strict=True):
        row[0] = sos_id
        row[1 : 1 + split] = ids[:split]
        row[1 + split] = eos_id
        row[2 + split : 2 + len(ids)] = ids[split:]
        row[2 + len(ids)] = eos_id
    return Samples(tokens, num_ids + NUM_SPECIAL_TOKENS, first_part + 2)
