from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_prep.masking import MaskSet, draw_mask_set, max_masked
from data_prep.packing import NUM_SPECIAL_TOKENS, Samples, cut_into_texts
from data_prep.shards import (
    CHUNK_SAMPLES,
    MANIFEST,
    DataSet,
    SampleBatch,
    ShardWriter,
    check_samples,
    find_faults,
    read_data_manifest,
    token_dtype,
    write_data_manifest,
)
from data_prep.tokenizer import Tokenizer, train_tokenizer

MAX_LENGTH = 64
SHARD_SAMPLES = 256
TOKENIZER = "tokenizer.model"


def write_shard(path: Path, samples: Samples, mask_sets: list[MaskSet], vocab_size: int) -> dict[str, Any]:
    """All samples of a shard, in blocks of two chunks."""
    writer = ShardWriter(path, *samples.tokens_BL.shape, len(mask_sets), mask_sets[0].positions_BP.shape[1], vocab_size)
    for start in range(0, len(samples.length_B), 256):
        rows = slice(start, start + 256)
        block = Samples(**{name: array[rows] for name, array in vars(samples).items()})
        writer.write(block, [MaskSet(**{name: a[rows] for name, a in vars(masks).items()}) for masks in mask_sets])
    return writer.finish()


@pytest.fixture(scope="module")
def samples(corpus_ids: np.ndarray, assemble_texts: Callable[..., Samples]) -> Samples:
    """One full shard of two chunks and 70 samples of the next; the last is a short one."""
    texts = cut_into_texts(corpus_ids[: 325 * 61], MAX_LENGTH)
    return assemble_texts([*texts, corpus_ids[-9:]], MAX_LENGTH, seed=1, first_sample=0)


@pytest.fixture(scope="module")
def mask_sets(samples: Samples, tokenizer: Tokenizer) -> list[MaskSet]:
    return [
        draw_mask_set(
            samples.tokens_BL, samples.length_B, special_ids=tokenizer.special_ids, normal_ids=tokenizer.normal_ids,
            mask_id=tokenizer.mask_id, max_masked_tokens=max_masked(MAX_LENGTH, NUM_SPECIAL_TOKENS), seed=1,
            first_sample=0, mask_set=mask_set,
        )
        for mask_set in range(3)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(
    samples: Samples, mask_sets: list[MaskSet], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The samples in two shards, all for training."""
    folder = tmp_path_factory.mktemp("written")
    entries = []
    for index, rows in enumerate([slice(0, SHARD_SAMPLES), slice(SHARD_SAMPLES, None)]):
        shard_samples = Samples(**{name: array[rows] for name, array in vars(samples).items()})
        shard_masks = [MaskSet(**{name: a[rows] for name, a in vars(masks).items()}) for masks in mask_sets]
        path = folder / f"train-{index:05d}.h5"
        entries.append(write_shard(path, shard_samples, shard_masks, tokenizer.vocab_size))
    shutil.copy(tokenizer.path, folder / TOKENIZER)
    write_data_manifest(
        folder,
        {
            "parameters": {"max_length_tokens": MAX_LENGTH, "mask_sets": 3, "shard_samples": SHARD_SAMPLES},
            "tokenizer": {"file": TOKENIZER, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
            "splits": {"train": entries, "validation": []},
        },
    )
    return folder


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """A copy of the built data set, to be changed."""
    return Path(shutil.copytree(data_folder, tmp_path / "pretrain"))


@pytest.fixture
def batch(data_folder: Path) -> SampleBatch:
    return DataSet(data_folder).read_chunk("train", 0, 0).as_int64()


@pytest.mark.parametrize("mask_set", [0, 1, 2])
def test_every_array_comes_back(written: Path, samples: Samples, mask_sets: list[MaskSet], mask_set: int) -> None:
    data = DataSet(written)
    assert data.num_samples("train") == len(samples.tokens_BL) == SHARD_SAMPLES + 70
    assert data.num_samples("validation") == 0
    for chunk in range(3):
        rows = slice(chunk * CHUNK_SAMPLES, (chunk + 1) * CHUNK_SAMPLES)
        stored, expected = vars(data.read_chunk("train", chunk, mask_set)), vars(samples) | vars(mask_sets[mask_set])
        assert stored.keys() == expected.keys()
        for name, array in stored.items():
            np.testing.assert_array_equal(array, expected[name][rows], err_msg=name)
            assert array.dtype == np.uint16


def test_samples_across_chunks_and_shards(written: Path, samples: Samples, mask_sets: list[MaskSet]) -> None:
    batch = DataSet(written).read_samples("train", 100, 300, mask_set=2)
    np.testing.assert_array_equal(batch.tokens_BL, samples.tokens_BL[100:300])
    np.testing.assert_array_equal(batch.positions_BP, mask_sets[2].positions_BP[100:300])


def test_manifest_entries_tell_the_size_of_each_shard(written: Path, samples: Samples) -> None:
    first, second = read_data_manifest(written)["splits"]["train"]
    assert (first["num_samples"], second["num_samples"]) == (SHARD_SAMPLES, 70)
    assert first["num_tokens"] + second["num_tokens"] == samples.length_B.sum()
    assert [e["size_bytes"] for e in (first, second)] == [(written / e["file"]).stat().st_size for e in (first, second)]


def test_a_large_vocabulary_takes_wider_tokens(samples: Samples, mask_sets: list[MaskSet], tmp_path: Path) -> None:
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == (np.uint16, np.uint32)
    wide = Samples(samples.tokens_BL + 2**16, samples.length_B, samples.segment_boundary_B)
    write_shard(tmp_path / "train-00000.h5", wide, mask_sets, 2**17)
    with h5py.File(tmp_path / "train-00000.h5") as file:
        np.testing.assert_array_equal(file["tokens"][:], wide.tokens_BL)
        assert file["tokens"].dtype == file["shown"].dtype == np.uint32
        assert file["turns"].dtype == np.uint16


def test_each_array_is_checksummed_in_chunks_of_one_mask_set(written: Path) -> None:
    with h5py.File(written / "train-00000.h5") as file:
        for name, dataset in file.items():
            assert dataset.fletcher32, name
            assert dataset.chunks[0] == CHUNK_SAMPLES
            assert dataset.ndim < 3 or dataset.chunks[1] == 1


def test_more_shards_than_files_held_open(written: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.shards._MAX_OPEN_FILES", 1)
    data = DataSet(written)
    for chunk in (0, 2, 1, 2):
        batch = data.read_chunk("train", chunk, 0)
        np.testing.assert_array_equal(batch.tokens_BL, samples.tokens_BL[chunk * 128 : chunk * 128 + 128])
    assert len(data._open_files) == 1


def test_a_written_and_a_built_data_set_are_sound(written: Path, data_folder: Path) -> None:
    assert list(find_faults(written)) == list(find_faults(data_folder)) == []


def test_a_folder_without_a_manifest_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: no data set there.*python -m data_prep build"):
        DataSet(tmp_path)


def test_a_manifest_of_another_version_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(ValueError, match=r"manifest\.json: format version 2; this code reads version 1: build it anew"):
        DataSet(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: not valid JSON"),
        (b'{"format": "pmlm-shards",\n "version": ', "line 2: not valid JSON"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"[1]", "not a manifest of this kind"),
        (b"{}", "not a manifest of this kind"),
        (b'{"format": "images", "version": 1}', "not a manifest of this kind"),
        (b'{"format": "pmlm-shards"}', "format version None"),
        (b'{"format": "pmlm-shards", "version": 1}', "damaged"),
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        DataSet(folder)


def test_a_shard_of_another_version_is_refused(folder: Path) -> None:
    with h5py.File(folder / "train-00001.h5", "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(ValueError, match=r"train-00001\.h5: not a pmlm-shards file of version 1; build the data anew"):
        DataSet(folder).read_chunk("train", 1, 0)


def test_an_hdf5_file_of_another_kind_is_refused(folder: Path) -> None:
    with h5py.File(folder / "train-00001.h5", "w") as file:
        file["tokens"] = np.zeros((128, 64))
    with pytest.raises(ValueError, match=r"train-00001\.h5: not a pmlm-shards file of version 1"):
        DataSet(folder).read_chunk("train", 1, 0)


def test_a_foreign_tokenizer_in_the_folder_is_refused(folder: Path, lines: list[str]) -> None:
    train_tokenizer(lines, folder / TOKENIZER, vocab_size=500)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not the tokenizer these shards were made with"):
        DataSet(folder)
    assert [fault.split(":")[0] for fault in find_faults(folder)] == [TOKENIZER]


IDS, EDGES = "every id is in the vocabulary", "[SOS] first, [EOS] last"
SEGMENTS, PADDING = "three special tokens, [EOS] before segment B", "[PAD] behind the text"
SHARE, SPECIAL = "15% are masked", "no special token is masked"
ONCE, TURNS, ANY_RULE = "no position is masked twice", "turns count up from 1", ""


def merge_turns(sample: SampleBatch, length_tokens: int) -> None:
    """Make the first turns one block of so many tokens, and what is left turns of their own."""
    num_masked = int(sample.num_masked_B[0])
    first = int(sample.positions_BP[0, 0])
    sample.positions_BP[0, :length_tokens] = np.arange(first, first + length_tokens)
    sample.turns_BP[0, :num_masked] = np.maximum(1, np.arange(1, num_masked + 1) - length_tokens + 1)


BREACHES: dict[str, tuple[str, Callable[[SampleBatch, Tokenizer], None]]] = {
    "token beyond the vocabulary": (IDS, lambda s, t: s.tokens_BL.put(7, t.vocab_size)),
    "shown id beyond the vocabulary": (IDS, lambda s, t: s.shown_BP.put(0, t.vocab_size)),
    "text begins without [SOS]": (EDGES, lambda s, t: s.tokens_BL.put(0, 100)),
    "text ends without [EOS]": (EDGES, lambda s, t: s.tokens_BL.put(s.length_B - 1, 100)),
    "length too small": (EDGES, lambda s, t: s.length_B.put(0, s.length_B - 1)),
    "no [EOS] between the segments": (SEGMENTS, lambda s, t: s.tokens_BL.put(s.segment_boundary_B - 1, 100)),
    "[EOS] inside a segment": (SEGMENTS, lambda s, t: s.tokens_BL.put(s.length_B - 2, t.eos_id)),
    "[SOS] inside a segment": (SEGMENTS, lambda s, t: s.tokens_BL.put(s.length_B - 2, t.sos_id)),
    "[MASK] inside a segment": (SEGMENTS, lambda s, t: s.tokens_BL.put(s.length_B - 2, t.mask_id)),
    "boundary too large": (SEGMENTS, lambda s, t: s.segment_boundary_B.put(0, s.segment_boundary_B + 1)),
    "boundary too small": (SEGMENTS, lambda s, t: s.segment_boundary_B.put(0, s.segment_boundary_B - 1)),
    "boundary behind the text": (SEGMENTS, lambda s, t: s.segment_boundary_B.put(0, s.length_B)),
    "boundary 0": (SEGMENTS, lambda s, t: s.segment_boundary_B.put(0, 0)),
    "boundary beyond the sample": (SEGMENTS, lambda s, t: s.segment_boundary_B.put(0, MAX_LENGTH + 1)),
    "[PAD] in the text": (PADDING, lambda s, t: s.tokens_BL.put(s.length_B - 2, t.pad_id)),
    "text behind the end": (PADDING, lambda s, t: s.tokens_BL.put(s.length_B, 100)),
    "too few masked": (SHARE, lambda s, t: s.num_masked_B.put(0, s.num_masked_B - 1)),
    "none masked": (SHARE, lambda s, t: s.num_masked_B.put(0, 0)),
    "last turn missing": (SHARE, lambda s, t: s.turns_BP.put(s.num_masked_B - 1, 0)),
    "first turn missing": (SHARE, lambda s, t: s.turns_BP.put(0, 0)),
    "[SOS] masked": (SPECIAL, lambda s, t: s.positions_BP.put(0, 0)),
    "[EOS] masked": (SPECIAL, lambda s, t: s.positions_BP.put(0, s.segment_boundary_B - 1)),
    "[PAD] masked": (SPECIAL, lambda s, t: s.positions_BP.put(0, s.length_B)),
    "a position masked twice": (ONCE, lambda s, t: s.positions_BP.put(0, s.positions_BP[0, s.num_masked_B - 1])),
    "turns from 2": (TURNS, lambda s, t: s.turns_BP.put(0, 2)),
    "turns leave one out": (TURNS, lambda s, t: s.turns_BP.put(s.num_masked_B - 1, s.turns_BP.max() + 2)),
    "turns count down": (TURNS, lambda s, t: s.turns_BP.put(s.num_masked_B - 1, 1)),
    "a turn in two places": (TURNS, lambda s, t: s.turns_BP.put(range(s.turns_BP.size), s.turns_BP > 0)),
    "a turn of seven tokens": ("a turn has at most 6", lambda s, t: merge_turns(s, 7)),
    "a special id shown": ("text token is shown", lambda s, t: s.shown_BP.put(0, t.eos_id)),
    "segment B empty": ("no segment is empty", lambda s, t: s.segment_boundary_B.put(0, s.length_B - 1)),
    "position beyond the sample": (ANY_RULE, lambda s, t: s.positions_BP.put(0, MAX_LENGTH)),
    "length beyond the sample": (ANY_RULE, lambda s, t: s.length_B.put(0, MAX_LENGTH + 1)),
    "length 0": (ANY_RULE, lambda s, t: s.length_B.put(0, 0)),
}


@pytest.mark.parametrize(("rule", "breach"), BREACHES.values(), ids=BREACHES)
def test_a_breach_of_a_rule_is_found_in_its_sample_alone(
    batch: SampleBatch, tokenizer: Tokenizer, rule: str, breach: Callable[[SampleBatch, Tokenizer], None]
) -> None:
    assert all(holds_B.all() for holds_B in check_samples(batch, tokenizer).values())
    is_short_B = (batch.length_B < MAX_LENGTH) & (batch.turns_BP.max(axis=1) > 3) & (batch.segment_boundary_B < 40)
    end_is_masked_B = (batch.positions_BP == batch.length_B[:, None] - 2).any(axis=1)
    row = int(np.flatnonzero(is_short_B & ~end_is_masked_B)[0])
    breach(batch[row : row + 1], tokenizer)
    holds = check_samples(batch, tokenizer)
    broken = [name for name in holds if not holds[name][row]]
    assert broken
    assert any(rule in name for name in broken), broken
    assert all(np.delete(holds_B, row).all() for holds_B in holds.values())


def test_a_shard_that_breaks_a_rule_is_found_though_its_hash_is_right(
    written: Path, samples: Samples, mask_sets: list[MaskSet], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "data"))
    rows = slice(SHARD_SAMPLES, None)
    shard_masks = [MaskSet(**{name: a[rows].copy() for name, a in vars(masks).items()}) for masks in mask_sets]
    shard_masks[1].turns_BP[4, 0] = 9
    shard_samples = Samples(**{name: array[rows] for name, array in vars(samples).items()})
    entry = write_shard(folder / "train-00001.h5", shard_samples, shard_masks, tokenizer.vocab_size)
    manifest = read_data_manifest(folder)
    manifest["splits"]["train"][1] = entry
    write_data_manifest(folder, {key: value for key, value in manifest.items() if key not in ("format", "version")})
    expected = f"train-00001.h5: sample {SHARD_SAMPLES + 4}, mask set 1: turns count up from 1 does not hold"
    assert list(find_faults(folder)) == [expected]
