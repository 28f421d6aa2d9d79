"""The parameters of a data set."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.mask_settings import MaskSettings
from data_prep.packing import MIN_DOCUMENT_TOKENS, NUM_SPECIAL_TOKENS
from data_prep.shards import CHUNK_SAMPLES, MAX_LENGTH_LIMIT_TOKENS

MAX_MASK_SETS = 1000
MAX_SHARD_SAMPLES = 2**24


@dataclass(frozen=True)
class BuildParameters:
    """Everything that decides the bytes of a data set, besides its texts and its tokenizer."""

    max_length_tokens: int = 512
    """Tokens of a sample, the three special ones included."""
    short_sample_probability: float = 0.0
    """Share of the samples that are cut shorter, at a length drawn uniformly; BERT's is 0.1."""
    mask_sets: int = 1
    """Pre-sampled mask sets of each sample; epoch e of the training uses set e mod K, see docs/data.md for falling rates."""
    mask_rate: str = "0.15"
    """Share of a sample's tokens that is masked; two rates as 0.30:0.15 are those of the first mask set and of the last, between
    which the rate changes in equal steps, over the epochs of the training."""
    block_share: float = 0.4
    """Share of the draws that are blocks of several tokens; the others are single tokens."""
    block_lengths: str = "2:6"
    """Tokens of the shortest and the longest block; each length is drawn as often."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that training never sees."""
    shard_samples: int = 16_384
    """Samples a shard; a multiple of 128, the samples of an HDF5 chunk."""
    seed: int = 0
    """Key of every random choice."""

    def __post_init__(self) -> None:
        faults = []
        shortest = MIN_DOCUMENT_TOKENS + NUM_SPECIAL_TOKENS
        if not shortest <= self.max_length_tokens <= MAX_LENGTH_LIMIT_TOKENS:
            faults.append(
                f"max_length_tokens is {self.max_length_tokens}, expected {shortest} to {MAX_LENGTH_LIMIT_TOKENS}"
            )
        if not 0 <= self.short_sample_probability <= 1:
            faults.append(f"short_sample_probability is {self.short_sample_probability}, expected 0 to 1")
        if not 1 <= self.mask_sets <= MAX_MASK_SETS:
            faults.append(f"mask_sets is {self.mask_sets}, expected 1 to {MAX_MASK_SETS}")
        if not 0 <= self.validation_fraction < 1:
            faults.append(f"validation_fraction is {self.validation_fraction}, expected 0 or more and less than 1")
        if not 1 <= self.shard_samples <= MAX_SHARD_SAMPLES or self.shard_samples % CHUNK_SAMPLES:
            faults.append(
                f"shard_samples is {self.shard_samples}, expected a multiple of {CHUNK_SAMPLES} up to {MAX_SHARD_SAMPLES}"
            )
        if not 0 <= self.seed < 2**63:
            faults.append(f"seed is {self.seed}, expected 0 to 2**63 - 1")
        try:
            masks = self.masks
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))

        # One way to write what is equal: a data set is compared by its parameters.
        rates = [masks.rates_K[0]] if masks.is_constant else [masks.rates_K[0], masks.rates_K[-1]]
        object.__setattr__(self, "mask_rate", ":".join(f"{rate:.6g}" for rate in rates))
        object.__setattr__(self, "block_lengths", ":".join(map(str, masks.block_lengths)))

    @property
    def masks(self) -> MaskSettings:
        """How masks are drawn. Raises ValueError that tells all that is wrong with the three parameters."""
        mask_sets = min(max(self.mask_sets, 1), MAX_MASK_SETS)  # of others `__post_init__` tells
        return MaskSettings.parse(self.mask_rate, mask_sets, self.block_share, self.block_lengths)

    @property
    def max_masked_tokens(self) -> int:
        """P: the most masked tokens of a sample."""
        return self.masks.max_masked(self.max_length_tokens, NUM_SPECIAL_TOKENS)
