"""The global order of samples: each once an epoch, whoever computes them."""

from __future__ import annotations

import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.processes import LocalProcesses
from data_prep.remask import remask
from data_prep.shards import CHUNK_SAMPLES, DataSet
from pretrain import batches as batches_module
from pretrain.batches import BatchesAhead, SampleOrder, Share, TrainingBatches, permuted, validation_batches
from pretrain.layout import Layout, Objective


@pytest.mark.parametrize("num_samples", [1, 5, 127, 128, 129, 128 * 3 + 7, 128 * 9, 128 * 9 + 1])
def test_each_sample_once_an_epoch(num_samples: int) -> None:
    order = SampleOrder(num_samples, seed=3, window_chunks=4)
    orders = []
    for epoch in range(3):
        epochs, samples = order.samples(epoch * num_samples, (epoch + 1) * num_samples)
        assert set(epochs.tolist()) == {epoch}
        assert sorted(samples.tolist()) == list(range(num_samples))
        orders.append(samples.tolist())
    if num_samples > 100:
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != list(range(num_samples))


@given(cuts=st.lists(st.integers(0, 3000), max_size=12))
@settings(max_examples=30, deadline=None)
def test_the_order_does_not_depend_on_how_it_is_asked_for(cuts: list[int]) -> None:
    whole = SampleOrder(1000, seed=1, window_chunks=2).samples(0, 3000)[1]
    edges = [0, *sorted(cuts), 3000]
    order = SampleOrder(1000, seed=1, window_chunks=2)
    pieces = [order.samples(a, b)[1] for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permuted_is_a_permutation(size: int) -> None:
    images = [permuted(np.arange(size), size, seed=7, epoch=epoch).tolist() for epoch in range(3)]
    assert all(sorted(image) == list(range(size)) for image in images)
    assert size < 10 or images[0] != images[1] != images[2]


def test_chunks_are_spread_over_the_data_and_samples_over_their_window() -> None:
    num_samples = 128 * 2048
    samples = SampleOrder(num_samples, seed=0).samples(0, num_samples)[1]
    chunks_of_a_window = np.unique(samples[:8192] // CHUNK_SAMPLES)
    assert len(chunks_of_a_window) == 64
    assert 0.35 < chunks_of_a_window.mean() / 2048 < 0.65
    neighbours = np.corrcoef(samples[:-1], samples[1:])[0, 1]  # windows share their 64 chunks, so a little remains
    assert abs(neighbours) < 0.1
    within = samples[:8192] % CHUNK_SAMPLES
    assert abs(np.corrcoef(within, np.arange(8192))[0, 1]) < 0.05


def test_corpora_stored_one_behind_the_other_keep_their_shares_all_along() -> None:
    """In each hundredth of an epoch a corpus has its share, within what drawing whole chunks at random gives."""
    shares, part = np.array([0.66, 0.3, 0.04]), 2 * 8192
    samples = SampleOrder(100 * part, seed=5).samples(0, 100 * part)[1]
    corpora = np.searchsorted(np.cumsum(shares) * 100 * part, samples, side="right").reshape(100, part)
    for corpus, share in enumerate(shares):
        found = (corpora == corpus).mean(axis=1)
        deviation = np.sqrt(share * (1 - share) * CHUNK_SAMPLES / part * (1 - 0.01))
        assert np.abs(found - share).max() < 5 * deviation
        assert 0.6 < ((found - share) ** 2).mean() / deviation**2 < 1.5
        assert abs(np.corrcoef(found, np.arange(100))[0, 1]) < 0.4


def test_a_billion_samples_in_constant_memory() -> None:
    order = SampleOrder(10**9, seed=0)
    tracemalloc.start()
    seen = [order.samples(first, first + 4096)[1] for first in (0, 10**8, 10**9 - 4096, 3 * 10**9 + 5)]
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert all(len(np.unique(s)) == 4096 and s.max() < 10**9 for s in seen)


def consumed(data: DataSet, share: tuple[int, int, int], steps: range, batch: int) -> list[list[list[int]]]:
    """Per step, the samples' tokens in the order of the run, put together from all ranks."""
    world_size, micro_batch, accumulation = share
    ranks = [
        TrainingBatches(data, Objective.AE_PAR, Share(r, world_size, micro_batch, accumulation), seed=5)
        for r in range(world_size)
    ]  # fmt: skip
    result = []
    for step in steps:
        layouts = [r.step(step * batch) for r in ranks]
        in_order = [layouts[r][m] for m in range(accumulation) for r in range(world_size)]
        contexts = [context for layout in in_order for context in contexts_of(layout)]
        result.append(contexts)
    return result


def contexts_of(layout: Layout) -> list[list[int]]:
    """Each sample's context."""
    bounds = zip(layout.edges[:-1], layout.context_lengths, strict=True)
    return [layout.ids_N[start : start + length].tolist() for start, length in bounds]


def test_the_samples_of_a_step_depend_on_neither_ranks_nor_micro_batch_nor_restarts(data_set: DataSet) -> None:
    whole = consumed(data_set, (1, 12, 1), range(40), 12)
    for share in [(1, 3, 4), (2, 6, 1), (2, 3, 2), (3, 2, 2), (4, 1, 3), (12, 1, 1)]:
        assert consumed(data_set, share, range(17, 25), 12) == whole[17:25]


def test_batches_ahead_are_those_of_each_step_and_are_built_while_a_step_is_computed(data_set: DataSet) -> None:
    share, first, stop = Share(0, 1, 4, 2), 5 * 8, 11 * 8
    batches = TrainingBatches(data_set, Objective.AE_PAR, share, seed=5)
    expected = [batches.step(start) for start in range(first, stop, 8)]
    built: list[int] = []

    class Recording(TrainingBatches):
        def step(self, samples_consumed: int) -> list[Layout]:
            built.append(samples_consumed)
            return super().step(samples_consumed)

    ahead = BatchesAhead(
        Recording(data_set, Objective.AE_PAR, share, seed=5), range(first, stop, share.train_batch), is_pinned=False
    )  # fmt: skip
    found = [ahead.next_step()]
    held_out = ahead.call(validation_batches, data_set, Objective.AE, share, max_samples=4)  # behind what was asked for
    assert len(held_out) == 1
    assert built == [40, 48, 56]
    found += [ahead.next_step() for _ in range(5)]
    ahead.close()
    for a, b in zip(found, expected, strict=True):
        assert [layout.ids_N.tolist() for layout in a] == [layout.ids_N.tolist() for layout in b]


def test_what_the_reading_thread_meets_is_raised_in_the_step_that_needs_it(data_set: DataSet) -> None:
    class Damaged(TrainingBatches):
        def step(self, samples_consumed: int) -> list[Layout]:
            if samples_consumed == 8:
                raise ValueError("train-00000.h5: damaged")
            return super().step(samples_consumed)

    batches = Damaged(data_set, Objective.AE, Share(0, 1, 8, 1), seed=5)
    ahead = BatchesAhead(batches, range(0, 80, 8), is_pinned=False)
    assert len(ahead.next_step()) == 1
    with pytest.raises(ValueError, match="damaged"):
        ahead.next_step()
    ahead.close()


def test_an_epoch_uses_its_mask_set(data_set: DataSet) -> None:
    """Epoch e shows set e mod K: two epochs of one sample differ in their masks, epochs 0 and K do not."""
    num_samples = data_set.num_samples("train")
    order = SampleOrder(num_samples, seed=5)
    batches = TrainingBatches(data_set, Objective.AE_PAR, Share(0, 1, num_samples, 1), seed=5)
    by_epoch = []
    for epoch in range(3):
        samples = order.samples(epoch * num_samples, (epoch + 1) * num_samples)[1]
        layout = batches.step(epoch * num_samples)[0]
        contexts = contexts_of(layout)
        by_epoch.append([contexts[i] for i in np.argsort(samples)])
    assert data_set.num_mask_sets == 2
    assert np.mean([a != b for a, b in zip(*by_epoch[:2], strict=True)]) > 0.9
    assert by_epoch[0] == by_epoch[2]


@pytest.fixture(scope="module")
def falling(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """The same samples in four mask sets, of which 40% to 10% are masked."""
    folder = tmp_path_factory.mktemp("falling")
    with LocalProcesses(1) as processes:
        remask(data_folder, folder, {"mask_sets": 4, "mask_rate": "0.4:0.1"}, processes)
    return DataSet(folder)


@pytest.mark.parametrize("num_epochs", [1, 3, 4, 6, 9])
def test_where_the_rate_falls_an_epoch_uses_the_set_of_its_part_of_the_run(falling: DataSet, num_epochs: int) -> None:
    """Epoch e of E uses set floor(e K / E), whichever part of it the run still sees; past the end the last rate stays."""
    num_samples = falling.num_samples("train")
    total_samples = num_epochs * num_samples - num_samples // 2
    share = Share(0, 1, num_samples, 1)
    batches = TrainingBatches(falling, Objective.AE_PAR, share, seed=5, total_samples=total_samples)
    num_masked = [falling.read_samples("train", 0, num_samples, k).num_masked_B.sum() for k in range(4)]
    assert num_masked == sorted(num_masked, reverse=True)
    found = [batches.step(epoch * num_samples)[0].num_targets for epoch in range(num_epochs + 2)]
    expected = [num_masked[epoch * 4 // num_epochs] for epoch in range(num_epochs)]
    assert found == [*expected, num_masked[3], num_masked[3]]


def test_a_falling_rate_needs_the_length_of_the_run(falling: DataSet) -> None:
    with pytest.raises(ValueError, match="its mask rate changes over a run, and the length of this one is not known"):
        TrainingBatches(falling, Objective.AE_PAR, Share(0, 1, 8, 1), seed=5)


def test_memory_does_not_grow_with_the_mask_sets(
    data_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "WINDOW_CHUNKS", 2)  # of a data set of as many chunks as there are here
    with LocalProcesses(1) as processes:
        remask(data_set.folder, tmp_path, {"seed": 1, "mask_sets": 6}, processes)

    def peak_bytes(data: DataSet) -> int:
        batches = TrainingBatches(data, Objective.AE_PAR, Share(0, 1, 64, 1), seed=0)
        tracemalloc.start()
        for first in range(0, 6 * data.num_samples("train"), 64):
            batches.step(first)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(data_set)  # what is made at first use
    few, many = peak_bytes(data_set), peak_bytes(DataSet(tmp_path))
    assert data_set.num_samples("train") > 8 * CHUNK_SAMPLES
    assert many < 1.3 * few  # twice as much if all sets were kept


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_takes_each_held_out_sample_once(data_set: DataSet, world_size: int) -> None:
    of_ranks = [
        validation_batches(data_set, Objective.AE, Share(rank, world_size, 4, 1), max_samples=10**6)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1, "ZeRO stage 3 computes on all ranks together"
    layouts = [batch.layout for batches in of_ranks for batch in batches if batch.corpus is not None]
    num_samples = data_set.num_samples("validation")
    assert sum(layout.num_samples for layout in layouts) == num_samples
    expected = data_set.read_samples("validation", 0, num_samples)
    assert sum(layout.num_targets for layout in layouts) == expected.num_masked_B.sum()
    assert sum(layout.num_tokens for layout in layouts) == expected.length_B.sum()


def test_a_flipped_byte_is_found_when_training_reads_it(data_set: DataSet, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data_set.folder, folder)
    shard = folder / "train-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    batches = TrainingBatches(DataSet(folder), Objective.AE_PAR, Share(0, 1, 128, 1), seed=0)
    two_epochs = range(0, 2 * data_set.num_samples("train"), 128)
    with pytest.raises(ValueError, match=r"train-00000.h5: damaged .*data_prep verify"):
        [batches.step(first) for first in two_epochs]
