from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import cut_document

from data_prep.mask_settings import PAPER_MASKS, MaskSettings
from data_prep.masking import Masks, draw_masks, place_dtype
from data_prep.packing import Samples
from data_prep.shards import (
    CHUNK_SAMPLES,
    MANIFEST,
    DataSet,
    SampleBatch,
    batch_of,
    check_samples,
    find_faults,
    read_data_manifest,
    token_dtype,
    write_data_manifest,
    write_shard,
)
from data_prep.tokenizer import Tokenizer, train_tokenizer

MAX_LENGTH = 64
SHARD_SAMPLES = 256
TOKENIZER = "tokenizer.model"
FALLING = "0.3:0.15"


@dataclass(frozen=True)
class Drawn:
    """Samples and their masks."""

    samples: Samples
    masks: Masks
    mask_rate: str = "0.15"

    def shard(self, first: int, stop: int) -> Drawn:
        """Samples first .. stop - 1."""
        samples, rows = self.samples, slice(first, stop)
        tokens, *places = (
            slice(*np.cumsum(np.concatenate([[0], counts]))[[first, stop]])
            for counts in (samples.length_B, *self.masks.num_masked_KB)
        )
        return Drawn(
            Samples(samples.tokens_T[tokens], samples.length_B[rows], samples.segment_boundary_B[rows]),
            Masks(
                self.masks.num_masked_KB[:, rows],
                [of_set[here].copy() for of_set, here in zip(self.masks.places_K, places, strict=True)],
            ),
            self.mask_rate,
        )

    @property
    def max_masked_tokens(self) -> int:
        return 18 if self.mask_rate == FALLING else 9

    def write(self, path: Path) -> dict[str, Any]:
        return write_shard(path, self.samples, self.masks, MAX_LENGTH, self.max_masked_tokens)

    def batch(self, mask_set: int, pad_id: int) -> SampleBatch:
        masks = self.masks.num_masked_KB[mask_set], self.masks.places_K[mask_set]
        return batch_of(self.samples, *masks, MAX_LENGTH, self.max_masked_tokens, pad_id)


@pytest.fixture(scope="module", params=["0.15", FALLING])
def drawn(
    corpus_ids: np.ndarray,
    assemble_texts: Callable[..., Samples],
    tokenizer: Tokenizer,
    request: pytest.FixtureRequest,
) -> Drawn:
    """One full shard of two chunks and 70 samples of the next, the last a short one; three mask sets."""
    texts = cut_document(corpus_ids[: 325 * 61].astype(np.uint16), MAX_LENGTH)
    samples = assemble_texts([*texts, corpus_ids[-9:].astype(np.uint16)], seed=1, first_sample=0)
    masks = draw_masks(
        samples,
        MaskSettings.parse(request.param, 3, 0.4, "2:6"),
        special_ids=tokenizer.special_ids,
        normal_ids=tokenizer.normal_ids,
        mask_id=tokenizer.mask_id,
        seed=1,
        first_sample=0,
    )
    return Drawn(samples, masks, request.param)


@pytest.fixture(scope="module")
def written(drawn: Drawn, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples in two shards, all for training."""
    folder = tmp_path_factory.mktemp("written")
    shards = [drawn.shard(0, SHARD_SAMPLES), drawn.shard(SHARD_SAMPLES, SHARD_SAMPLES + 70)]
    entries = [shard.write(folder / f"train-{index:05d}.h5") for index, shard in enumerate(shards)]
    shutil.copy(tokenizer.path, folder / TOKENIZER)
    write_data_manifest(
        folder,
        {
            "parameters": {
                "max_length_tokens": MAX_LENGTH,
                "mask_sets": 3,
                "shard_samples": SHARD_SAMPLES,
                # A data set of one rate as it was made before there was a choice.
                **({"mask_rate": FALLING} if drawn.mask_rate == FALLING else {}),
            },
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
def test_every_array_comes_back(written: Path, drawn: Drawn, tokenizer: Tokenizer, mask_set: int) -> None:
    data = DataSet(written)
    assert data.num_samples("train") == len(drawn.samples.length_B) == SHARD_SAMPLES + 70
    assert data.num_samples("validation") == 0
    expected = vars(drawn.batch(mask_set, tokenizer.pad_id))
    for chunk in range(3):
        rows = slice(chunk * CHUNK_SAMPLES, (chunk + 1) * CHUNK_SAMPLES)
        stored = vars(data.read_chunk("train", chunk, mask_set))
        assert stored.keys() == expected.keys()
        for name, array in stored.items():
            np.testing.assert_array_equal(array, expected[name][rows], err_msg=name)
            assert array.dtype == np.uint16


def test_rows_are_filled_behind_their_ends(drawn: Drawn) -> None:
    batch, pad_id = drawn.batch(1, pad_id=599), 599
    tokens, places = iter(drawn.samples.tokens_T.tolist()), iter(drawn.masks.places_K[1].tolist())
    unused = [(0, 0, 0)] * drawn.max_masked_tokens
    for row, (length, num_masked) in enumerate(zip(drawn.samples.length_B, drawn.masks.num_masked_KB[1], strict=True)):
        assert batch.tokens_BL[row].tolist() == [*islice(tokens, length), *[pad_id] * (MAX_LENGTH - length)]
        masked = [*islice(places, num_masked), *unused[num_masked:]]
        assert list(zip(batch.positions_BP[row], batch.turns_BP[row], batch.shown_BP[row], strict=True)) == masked


def test_samples_across_chunks_and_shards(written: Path, drawn: Drawn, tokenizer: Tokenizer) -> None:
    batch, expected = DataSet(written).read_samples("train", 100, 300, mask_set=2), drawn.batch(2, tokenizer.pad_id)
    np.testing.assert_array_equal(batch.tokens_BL, expected.tokens_BL[100:300])
    np.testing.assert_array_equal(batch.positions_BP, expected.positions_BP[100:300])


def test_a_whole_shard_without_its_masks(written: Path, drawn: Drawn) -> None:
    for name, array in vars(DataSet(written).read_shard("train", 1)).items():
        np.testing.assert_array_equal(array, vars(drawn.shard(SHARD_SAMPLES, SHARD_SAMPLES + 70).samples)[name])


def test_manifest_entries_tell_the_size_of_each_shard(written: Path, drawn: Drawn) -> None:
    first, second = read_data_manifest(written)["splits"]["train"]
    assert (first["num_samples"], second["num_samples"]) == (SHARD_SAMPLES, 70)
    assert first["num_tokens"] + second["num_tokens"] == drawn.samples.length_B.sum()
    num_masked_K = drawn.masks.num_masked_KB.sum(axis=1).tolist()
    assert first["num_masked"] + second["num_masked"] == num_masked_K[0]
    if drawn.mask_rate == FALLING:
        assert num_masked_K[0] / num_masked_K[1] > 1.25 < num_masked_K[1] / num_masked_K[2]
        of_sets = zip(first["num_masked_of_sets"], second["num_masked_of_sets"], strict=True)
        assert [sum(of_set) for of_set in of_sets] == num_masked_K
    else:
        assert "num_masked_of_sets" not in first
    assert [e["size_bytes"] for e in (first, second)] == [(written / e["file"]).stat().st_size for e in (first, second)]


@pytest.mark.slow
def test_a_large_vocabulary_takes_wider_tokens(drawn: Drawn, tmp_path: Path) -> None:
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == (np.uint16, np.uint32)
    samples = replace(drawn.samples, tokens_T=drawn.samples.tokens_T.astype(np.uint32) + 2**16)
    masks = draw_masks(
        samples, MaskSettings((0.15, 0.15)), special_ids=np.arange(4) + 2**16, mask_id=2**16 + 3,
        normal_ids=np.arange(2**16 + 4, 2**16 + 600), seed=0, first_sample=0,
    )  # fmt: skip
    write_shard(tmp_path / "train-00000.h5", samples, masks, MAX_LENGTH, 9)
    with h5py.File(tmp_path / "train-00000.h5") as file:
        np.testing.assert_array_equal(file["tokens"][:], samples.tokens_T)
        np.testing.assert_array_equal(file["masks"][:], np.stack(masks.places_K))
        assert file["tokens"].dtype == file["masks"].dtype["shown"] == np.uint32
        assert file["masks"].dtype["turn"] == np.uint16
        assert file["masks"]["shown"].min() >= 2**16


def test_samples_without_a_maskable_token(tokenizer: Tokenizer, tmp_path: Path, written: Path, drawn: Drawn) -> None:
    """All of it is unknown: the array of the masks has no place, and is no damage."""
    ids = [tokenizer.sos_id, *[tokenizer.unk_id] * 5, tokenizer.eos_id, *[tokenizer.unk_id] * 5, tokenizer.eos_id]
    samples = Samples(np.array(ids * 3, dtype=np.uint16), np.full(3, len(ids)), np.full(3, 7))
    masks = Masks(np.zeros((3, 3), np.int64), [np.zeros(0, place_dtype(samples.tokens_T.dtype))] * 3)
    folder = Path(shutil.copytree(written, tmp_path / "data"))
    entry = write_shard(folder / "train-00000.h5", samples, masks, MAX_LENGTH, drawn.max_masked_tokens)
    manifest = {key: value for key, value in read_data_manifest(folder).items() if key not in ("format", "version")}
    write_data_manifest(folder, {**manifest, "splits": {"train": [entry], "validation": []}})
    batch = DataSet(folder).read_chunk("train", 0, 2)
    assert not batch.turns_BP.any()
    assert batch.turns_BP.shape == (3, drawn.max_masked_tokens)
    assert list(find_faults(folder)) == []


def test_each_array_is_checksummed_in_chunks_of_one_mask_set(written: Path) -> None:
    with h5py.File(written / "train-00000.h5") as file:
        assert set(file) == {"samples", "tokens", "masks"}
        for name, dataset in file.items():
            assert dataset.fletcher32, name
        assert file["masks"].chunks[0] == 1


def test_what_a_set_with_fewer_masked_tokens_does_not_use_takes_little_room(written: Path, drawn: Drawn) -> None:
    """Of 512 tokens a row of a set has many chunks; here it has four, of 64 full samples each."""
    with h5py.File(written / "train-00000.h5") as file:
        stored, (_, chunk) = file["masks"], file["masks"].chunks
        num_masked_K = drawn.shard(0, SHARD_SAMPLES).masks.num_masked_KB.sum(axis=1)
        assert stored.shape == (3, num_masked_K.max())
        assert stored.id.get_num_chunks() == sum(-(-num_masked_K // chunk))


def test_more_shards_than_files_held_open(
    written: Path, drawn: Drawn, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.shards._MAX_OPEN_FILES", 1)
    data, expected = DataSet(written), drawn.batch(0, tokenizer.pad_id)
    for chunk in (0, 2, 1, 2):
        batch = data.read_chunk("train", chunk, 0)
        np.testing.assert_array_equal(batch.tokens_BL, expected.tokens_BL[chunk * 128 : chunk * 128 + 128])
    assert len(data._open_shards) == 1


def test_a_written_and_a_built_data_set_are_sound(written: Path, data_folder: Path) -> None:
    assert list(find_faults(written)) == list(find_faults(data_folder)) == []


def test_a_folder_without_a_manifest_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: no data set there.*python -m data_prep build"):
        DataSet(tmp_path)


def test_a_manifest_of_another_version_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b'"version": 2', b'"version": 3'))
    with pytest.raises(ValueError, match=r"manifest\.json: format version 3; this code reads version 2: build it anew"):
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
        (b'{"format": "pmlm-shards", "version": 2}', "damaged"),
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        DataSet(folder)


def test_a_shard_of_another_version_is_refused(folder: Path) -> None:
    with h5py.File(folder / "train-00001.h5", "r+") as file:
        file.attrs["version"] = 1
    with pytest.raises(ValueError, match=r"train-00001\.h5: not a pmlm-shards file of version 2; build the data anew"):
        DataSet(folder).read_chunk("train", 1, 0)


def test_an_hdf5_file_of_another_kind_is_refused(folder: Path) -> None:
    with h5py.File(folder / "train-00001.h5", "w") as file:
        file["tokens"] = np.zeros((128, 64))
    with pytest.raises(ValueError, match=r"train-00001\.h5: not a pmlm-shards file of version 2"):
        DataSet(folder).read_chunk("train", 1, 0)


def test_a_foreign_tokenizer_in_the_folder_is_refused(folder: Path, lines: list[str]) -> None:
    train_tokenizer(lines, folder / TOKENIZER, vocab_size=500)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not the tokenizer these shards were made with"):
        DataSet(folder)
    assert [fault.split(":")[0] for fault in find_faults(folder)] == [TOKENIZER]


IDS, EDGES = "every id is in the vocabulary", "[SOS] first, [EOS] last"
SEGMENTS, PADDING = "three special tokens, [EOS] before segment B", "[PAD] behind the text"
SHARE, SPECIAL = "0.15 of the tokens are masked", "no special token is masked"
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
    "a special id shown": ("the original is shown", lambda s, t: s.shown_BP.put(0, t.eos_id)),
    "segment B empty": ("no segment is empty", lambda s, t: s.segment_boundary_B.put(0, s.length_B - 1)),
    "position beyond the sample": (ANY_RULE, lambda s, t: s.positions_BP.put(0, MAX_LENGTH)),
    "length beyond the sample": (ANY_RULE, lambda s, t: s.length_B.put(0, MAX_LENGTH + 1)),
    "length 0": (ANY_RULE, lambda s, t: s.length_B.put(0, 0)),
}


@pytest.mark.parametrize(("rule", "breach"), BREACHES.values(), ids=BREACHES)
def test_a_breach_of_a_rule_is_found_in_its_sample_alone(
    batch: SampleBatch, tokenizer: Tokenizer, rule: str, breach: Callable[[SampleBatch, Tokenizer], None]
) -> None:
    assert all(holds_B.all() for holds_B in check_samples(batch, tokenizer, PAPER_MASKS, 0).values())
    is_short_B = (batch.length_B < MAX_LENGTH) & (batch.turns_BP.max(axis=1) > 3) & (batch.segment_boundary_B < 40)
    end_is_masked_B = (batch.positions_BP == batch.length_B[:, None] - 2).any(axis=1)
    row = int(np.flatnonzero(is_short_B & ~end_is_masked_B)[0])
    breach(batch[row : row + 1], tokenizer)
    holds = check_samples(batch, tokenizer, PAPER_MASKS, 0)
    broken = [name for name in holds if not holds[name][row]]
    assert broken
    assert any(rule in name for name in broken), broken
    assert all(np.delete(holds_B, row).all() for holds_B in holds.values())


def test_a_shard_that_breaks_a_rule_is_found_though_its_hash_is_right(
    written: Path, drawn: Drawn, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "data"))
    shard = drawn.shard(SHARD_SAMPLES, SHARD_SAMPLES + 70)
    shard.masks.places_K[1]["turn"][shard.masks.num_masked_KB[1, :4].sum()] = 9
    manifest = read_data_manifest(folder)
    manifest["splits"]["train"][1] = shard.write(folder / "train-00001.h5")
    write_data_manifest(folder, {key: value for key, value in manifest.items() if key not in ("format", "version")})
    expected = f"train-00001.h5: sample {SHARD_SAMPLES + 4}, mask set 1: turns count up from 1 does not hold"
    assert list(find_faults(folder)) == [expected]


@pytest.mark.parametrize(("name", "value"), [("length", MAX_LENGTH + 1), ("length", 5), ("num_masked", 19)])
def test_lengths_that_fit_neither_each_other_nor_the_data_set_are_damage(
    written: Path, tmp_path: Path, name: str, value: int
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "data"))
    with h5py.File(folder / "train-00000.h5", "r+") as file:
        facts = file["samples"][:]
        facts[name][0] = value
        file["samples"][:] = facts
    with pytest.raises(ValueError, match=r"train-00000\.h5: damaged \(the lengths of its samples are wrong\)"):
        DataSet(folder).read_chunk("train", 1, 0)
