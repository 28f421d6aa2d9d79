"""The global order of samples, and each rank's share of a step.

One order for the whole run: a seeded permutation an epoch, in constant memory. Step t takes the next `train_batch_size`
samples of it, whoever computes them, so the data seen up to a step depends on neither the number of ranks, nor the
micro batch, nor restarts, and the only state is the number of samples consumed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np

from data_prep.draws import Decision, draw_words, word_of
from data_prep.errors import UserError
from data_prep.shards import CHUNK_SAMPLES, DataSet, SampleBatch, Split, concatenate
from pretrain.layout import Layout, Objective, pseudo_masked_layout

WINDOW_CHUNKS = 64
_FEISTEL_ROUNDS = 6
_STEPS_AHEAD = 2
_T = TypeVar("_T")


class SampleOrder:
    """A permutation of the samples for each epoch, on two levels.

    Chunks of 128 samples are permuted over the whole data set; the samples of 64 consecutive chunks of that order, a
    window of 8,192, are shuffled. So disks read in sequence and every chunk is verified once an epoch, and a batch mixes
    samples of 64 places of the corpus. What is not random: samples of one chunk, neighbours in the corpus, stay
    within one window. The incomplete last chunk of the data set belongs to the last window.
    """

    def __init__(self, num_samples: int, seed: int, window_chunks: int = WINDOW_CHUNKS) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._window_samples = window_chunks * CHUNK_SAMPLES
        self._window_chunks = window_chunks
        self._num_whole_chunks = num_samples // CHUNK_SAMPLES
        self._num_windows = max(1, -(-self._num_whole_chunks // window_chunks))
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def samples(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample number of each of the run's places first .. stop - 1, counted from the run's start."""
        parts = []
        place = first
        while place < stop:
            epoch, place_in_epoch = divmod(place, self.num_samples)
            window = min(place_in_epoch // self._window_samples, self._num_windows - 1)
            place_in_window = place_in_epoch - window * self._window_samples
            parts.append(self._window(epoch, window)[place_in_window : place_in_window + stop - place])
            place += len(parts[-1])
        return np.arange(first, stop) // self.num_samples, np.concatenate([np.zeros(0, np.int64), *parts])

    def _window(self, epoch: int, window: int) -> np.ndarray:
        key = (epoch, window)
        if key not in self._windows:
            while len(self._windows) >= 2:
                self._windows.popitem(last=False)
            self._windows[key] = self._shuffled_window(epoch, window)
        return self._windows[key]

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        first = window * self._window_chunks
        places = np.arange(first, min(first + self._window_chunks, self._num_whole_chunks))
        chunks = permuted(places, self._num_whole_chunks, self._seed, epoch)
        samples = (chunks[:, None] * CHUNK_SAMPLES + np.arange(CHUNK_SAMPLES)).ravel()
        if window == self._num_windows - 1:
            samples = np.concatenate([samples, np.arange(self._num_whole_chunks * CHUNK_SAMPLES, self.num_samples)])
        words = draw_words(self._seed, Decision.ORDER_IN_WINDOW, window, 1, self._window_samples + CHUNK_SAMPLES, epoch)
        shuffled: np.ndarray = samples[_order_of(words[0, : len(samples)])]
        return shuffled


def _order_of(words: np.ndarray) -> np.ndarray:
    """A permutation by sorting random words, each with its place in its low bits: no two are equal, so that every way of
    sorting gives the same."""
    bits = np.uint64(len(words).bit_length())
    places = np.arange(len(words), dtype=np.uint64)
    return np.sort(words << bits | places) & ((np.uint64(1) << bits) - np.uint64(1))


def permuted(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `places` under the epoch's permutation of range(size), int64, in constant memory.

    A Feistel network over the next power of four; what falls outside the range walks on until it is inside.
    """
    keys = draw_words(seed, Decision.CHUNK_ORDER, epoch, 1, _FEISTEL_ROUNDS)[0]
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    images = np.empty(len(places), dtype=np.int64)
    _walk(places.astype(np.int64), size, keys, half_bits, images)
    return images


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _walk(places: np.ndarray, size: int, keys: np.ndarray, half_bits: int, images: np.ndarray) -> None:
    half_mask = (1 << half_bits) - 1
    for index, place in enumerate(places):
        image = place
        while True:
            left, right = image >> half_bits, image & half_mask
            for key in keys:
                left, right = right, left ^ (int(word_of(key, right)) & half_mask)
            image = (left << half_bits) | right
            if image < size:
                break
        images[index] = image


class RecentChunks:
    """The samples of a split; chunks read lately are kept: those of two windows, so that a chunk is read and verified once a window."""

    def __init__(self, data: DataSet, split: Split) -> None:
        self._data, self._split = data, split
        self._recent: OrderedDict[tuple[int, int], SampleBatch] = OrderedDict()

    def read(self, samples: np.ndarray, mask_sets: np.ndarray) -> SampleBatch:
        """The samples of these numbers, in their order, each with its mask set."""
        chunks = samples // CHUNK_SAMPLES
        keys = sorted(set(zip(chunks.tolist(), mask_sets.tolist(), strict=True)))
        parts, rows = [], []
        for chunk, mask_set in keys:
            here = np.flatnonzero((chunks == chunk) & (mask_sets == mask_set))
            parts.append(self._chunk(chunk, mask_set)[samples[here] - chunk * CHUNK_SAMPLES])
            rows.append(here)
        return concatenate(parts)[np.argsort(np.concatenate(rows))]

    def _chunk(self, chunk: int, mask_set: int) -> SampleBatch:
        key = (chunk, mask_set)
        if key not in self._recent:
            while len(self._recent) >= 2 * WINDOW_CHUNKS:
                self._recent.popitem(last=False)
            self._recent[key] = self._data.read_chunk(self._split, chunk, mask_set)
        self._recent.move_to_end(key)
        return self._recent[key]


@dataclass(frozen=True)
class Share:
    """Which part of each step a rank computes."""

    rank: int
    world_size: int
    micro_batch: int
    """Samples of a micro batch on one rank."""
    accumulation_steps: int
    """Micro batches of a step on one rank."""

    @property
    def train_batch(self) -> int:
        """Samples of a step on all ranks."""
        return self.micro_batch * self.accumulation_steps * self.world_size


class TrainingBatches:
    """The micro batches of any step of the run, for one rank."""

    def __init__(
        self,
        data: DataSet,
        objective: Objective,
        share: Share,
        seed: int,
        *,
        total_samples: int | None = None,
        one_shape: bool = False,
    ) -> None:
        """`total_samples`: of the schedule, after which its last epoch ends; a data set whose mask rate differs between mask sets
        needs it. `one_shape` as in `pseudo_masked_layout`. Raises ValueError if the data set has no training samples."""
        num_samples = data.num_samples("train")
        if not num_samples:
            raise UserError(f"{data.folder}: has no training samples")
        if total_samples is None and not data.masks.is_constant:
            raise UserError(f"{data.folder}: its mask rate changes over a run, and the length of this one is not known")
        self._order = SampleOrder(num_samples, seed)
        self._chunks = RecentChunks(data, "train")
        self._masks = data.masks
        self._num_epochs = -(-(total_samples or 1) // num_samples)
        self._mask_id = data.tokenizer.mask_id
        self._objective, self._share, self._one_shape = objective, share, one_shape

    def step(self, samples_consumed: int) -> list[Layout]:
        """The rank's micro batches of the step that begins after `samples_consumed` samples of the run."""
        layouts = []
        for micro_step in range(self._share.accumulation_steps):
            first = (
                samples_consumed + (micro_step * self._share.world_size + self._share.rank) * self._share.micro_batch
            )
            epochs, samples = self._order.samples(first, first + self._share.micro_batch)
            batch = self._chunks.read(samples, self._masks.sets_of_epochs(epochs, self._num_epochs))
            layouts.append(
                pseudo_masked_layout(batch, self._objective, mask_id=self._mask_id, one_shape=self._one_shape)
            )
        return layouts


class BatchesAhead:
    """Builds the coming steps' micro batches in a thread while a step is computed.

    What a step gets is TrainingBatches' alone to decide, so this changes nothing but when it is there. The thread is the
    only one that reads the data set, as HDF5 files are no place for two: validation reads through `call`.
    """

    def __init__(self, batches: TrainingBatches, starts: Iterable[int], *, is_pinned: bool) -> None:
        """For each step, how many samples of the run come before it; `is_pinned`: for copies to a GPU."""
        self._batches, self._is_pinned = batches, is_pinned
        self._starts = iter(starts)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: deque[Future[list[Layout]]] = deque()
        for _ in range(_STEPS_AHEAD):
            self._build_another()

    def next_step(self) -> list[Layout]:
        """The rank's micro batches of the next step; raises what reading them raised."""
        coming = self._coming.popleft()
        self._build_another()
        return coming.result()

    def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """The result of a function that reads the data set."""
        return self._thread.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _build_another(self) -> None:
        start = next(self._starts, None)
        if start is not None:
            self._coming.append(self._thread.submit(self._build, start))

    def _build(self, samples_consumed: int) -> list[Layout]:
        layouts = self._batches.step(samples_consumed)
        return [layout.pinned() for layout in layouts] if self._is_pinned else layouts


class ValidationBatch(NamedTuple):
    """A micro batch of held-out samples."""

    corpus: str | None
    """Which all of them are of; None for what is computed because other ranks compute, and is not to be counted."""
    layout: Layout


def validation_samples(data: DataSet, max_samples: int) -> dict[str, range]:
    """The held-out samples that a validation uses: of each corpus as many as is its part of the split, evenly spaced, as a
    corpus's samples lie in the order of its files."""
    num_samples = data.num_samples("validation")
    if not num_samples:
        return {}
    part = Fraction(min(max_samples, num_samples), num_samples)
    chosen = {}
    for corpus, samples in data.samples_of_corpora("validation").items():
        num_chosen = floor(samples.stop * part) - floor(samples.start * part)
        if num_chosen:
            chosen[corpus] = samples[:: len(samples) // num_chosen][:num_chosen]
    return chosen


def validation_batches(
    data: DataSet, objective: Objective, share: Share, max_samples: int, *, one_shape: bool = False
) -> list[ValidationBatch]:
    """The rank's micro batches of `validation_samples`, with mask set 0; as many on every rank, maybe none."""
    places = [
        (corpus, np.array(samples[first : first + share.micro_batch]))
        for corpus, samples in validation_samples(data, max_samples).items()
        for first in range(0, len(samples), share.micro_batch)
    ]
    chunks = RecentChunks(data, "validation")
    batches = []
    rounds = -(-len(places) // share.world_size)
    for number in range(share.rank, rounds * share.world_size, share.world_size):
        corpus, samples = places[number] if number < len(places) else (None, places[0][1])
        batch = chunks.read(samples, np.zeros_like(samples))
        layout = pseudo_masked_layout(batch, objective, mask_id=data.tokenizer.mask_id, one_shape=one_shape)
        batches.append(ValidationBatch(corpus, layout))
    return batches
