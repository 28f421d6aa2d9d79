"""Documents cut into samples: "[SOS] S1 [EOS] S2 [EOS]", S1 and S2 contiguous text of one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from data_prep.draws import Decision, draw_words, scale_high_bits, unit_interval, word_of

NUM_SPECIAL_TOKENS = 3  # [SOS], and [EOS] behind each segment
MIN_DOCUMENT_TOKENS = 8  # shorter documents teach nothing; they are counted and left out


@dataclass(frozen=True)
class Texts:
    """B texts that fit a sample, one behind the other."""

    ids: np.ndarray
    num_ids_B: np.ndarray
    """int64; ids of each text."""

    def __getitem__(self, numbers: np.ndarray | slice) -> Texts:
        """The texts of these numbers, in their order; one may come several times."""
        num_ids_B = self.num_ids_B[numbers]
        ids = np.empty(num_ids_B.sum(), dtype=self.ids.dtype)
        _gather(self.ids, (np.cumsum(self.num_ids_B) - self.num_ids_B)[numbers], num_ids_B, ids)
        return Texts(ids, num_ids_B)

    @staticmethod
    def concatenate(parts: Sequence[Texts]) -> Texts:
        """The texts of all parts; at least one part."""
        return Texts(np.concatenate([part.ids for part in parts]), np.concatenate([part.num_ids_B for part in parts]))


@dataclass(frozen=True)
class Samples:
    """Samples without their masks. B samples; T = the tokens of all of them, one sample behind the other."""

    tokens_T: np.ndarray
    length_B: np.ndarray
    """int64; tokens including the three special ones."""
    segment_boundary_B: np.ndarray
    """int64; the slot at which segment B (S2) begins; what is before it, the first [EOS] included, is segment A."""


def cut_into_texts(
    num_ids_D: np.ndarray,
    hash_D: np.ndarray,
    max_length_tokens: int,
    *,
    short_sample_probability: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """The sizes of the pieces into which documents are cut to fit a sample: as few as possible, those of a document equal
    within one id.

    Equal pieces instead of full ones and a rest: the number of samples is the same and none is a stub of three tokens.

    With `short_sample_probability` each piece in turn may become a short one, its size drawn uniformly from
    MIN_DOCUMENT_TOKENS to what fits; what is between short ones is cut as above. No piece is cut off so late that fewer
    than MIN_DOCUMENT_TOKENS remain. The draws of a document depend on (seed, its hash) alone.
    """
    keys_D = draw_words(seed, Decision.SHORT_SAMPLES, 0, 1, 1)[0] ^ hash_D.astype(np.uint64)
    return _cut(num_ids_D, keys_D, max_length_tokens - NUM_SPECIAL_TOKENS, short_sample_probability)  # type: ignore[no-any-return]


def assemble(texts: Texts, *, seed: int, first_sample: int, sos_id: int, eos_id: int) -> Samples:
    """Samples number first_sample .. from their texts (at least 2 ids each); where S2 begins is drawn uniformly."""
    words = draw_words(seed, Decision.SEGMENT_BOUNDARY, first_sample, len(texts.num_ids_B), 1)[:, 0]
    first_part_B = 1 + scale_high_bits(words, texts.num_ids_B - 1).astype(np.int64)
    tokens_T = np.empty(len(texts.ids) + NUM_SPECIAL_TOKENS * len(texts.num_ids_B), dtype=texts.ids.dtype)
    _lay_out(texts.ids, texts.num_ids_B, first_part_B, sos_id, eos_id, tokens_T)
    return Samples(tokens_T, texts.num_ids_B + NUM_SPECIAL_TOKENS, first_part_B + 2)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _cut(num_ids_D: np.ndarray, keys_D: np.ndarray, largest: int, short_sample_probability: float) -> np.ndarray:
    sizes = np.empty((num_ids_D // (MIN_DOCUMENT_TOKENS // 2) + 1).sum(), dtype=np.int64)
    num_pieces = 0
    for num_ids, key in zip(num_ids_D, keys_D):  # noqa: B905
        done = at = num_words = 0  # what is before `done` is cut
        while True:
            is_short, size = False, largest
            if short_sample_probability > 0:
                is_short = unit_interval(word_of(key, num_words)) < short_sample_probability
                num_words += 1
            if is_short:
                sizes_left = np.uint64(largest - MIN_DOCUMENT_TOKENS + 1)
                size = MIN_DOCUMENT_TOKENS + int(
                    ((word_of(key, num_words) >> np.uint64(32)) * sizes_left) >> np.uint64(32)
                )
                num_words += 1
            is_last = short_sample_probability == 0 or at + size > num_ids - MIN_DOCUMENT_TOKENS
            if is_last or is_short:
                to_cut = (num_ids if is_last else at) - done
                equal_pieces = -(-to_cut // largest)
                for piece in range(equal_pieces):
                    sizes[num_pieces] = to_cut // equal_pieces + (piece < to_cut % equal_pieces)
                    num_pieces += 1
            if is_last:
                break
            at += size
            if is_short:
                sizes[num_pieces] = size
                num_pieces += 1
                done = at
    return sizes[:num_pieces].copy()


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _gather(ids: np.ndarray, starts_B: np.ndarray, num_ids_B: np.ndarray, gathered: np.ndarray) -> None:
    stop = 0
    for start, num_ids in zip(starts_B, num_ids_B):  # noqa: B905
        gathered[stop : stop + num_ids] = ids[start : start + num_ids]
        stop += num_ids


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _lay_out(
    ids: np.ndarray, num_ids_B: np.ndarray, first_part_B: np.ndarray, sos_id: int, eos_id: int, tokens_T: np.ndarray
) -> None:
    read = write = 0
    for num_ids, first_part in zip(num_ids_B, first_part_B):  # noqa: B905
        tokens_T[write] = sos_id
        write += 1
        for part in (first_part, num_ids - first_part):
            tokens_T[write : write + part] = ids[read : read + part]
            read += part
            write += part
            tokens_T[write] = eos_id
            write += 1
