"""Flipped bytes, cut and missing files: `find_faults` reports every one, and reading never gives other data silently."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
import sentencepiece

from data_prep.shards import CHUNK_SAMPLES, MANIFEST, SPLITS, DataSet, find_faults

SHARD = "train-00000.h5"
TOKENIZER = "tokenizer.model"
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def sound(chapters: list[Path], build_data: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short samples: a shard of three chunks, the last one partly filled, and one to validate."""
    folder = tmp_path_factory.mktemp("sound") / "pretrain"
    build_data(chapters[:6], folder, max_length_tokens=32, mask_sets=2, shard_samples=512, validation_fraction=0.2)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "pretrain"))


@pytest.fixture(scope="module")
def sound_arrays(sound: Path) -> list[np.ndarray]:
    return read_everything(sound)


def read_everything(folder: Path) -> list[np.ndarray]:
    data = DataSet(folder)
    try:
        return [
            array
            for split in SPLITS
            for chunk in range(-(-data.num_samples(split) // CHUNK_SAMPLES))
            for mask_set in range(data.num_mask_sets)
            for array in vars(data.read_chunk(split, chunk, mask_set)).values()
        ]
    finally:
        data.close()


def why_unsafe(folder: Path, damaged: Path, sound_arrays: list[np.ndarray], *, must_be_found: bool = True) -> str:
    """What is wrong with how the damage is treated; nothing if all is well."""
    try:
        if must_be_found and not list(find_faults(folder)):
            return "find_faults reports nothing"
    except ValueError as error:
        if str(damaged) not in str(error):
            return f"find_faults does not name the file: {error}"
    except Exception as error:
        return f"find_faults fails: {error!r}"
    try:
        found = read_everything(folder)
    except (ValueError, FileNotFoundError) as error:
        return "" if str(damaged) in str(error) else f"reading does not name the file: {error}"
    except Exception as error:
        return f"reading fails: {error!r}"
    is_same = len(found) == len(sound_arrays) and all(map(np.array_equal, found, sound_arrays))
    return "" if is_same else "reading gives other data, silently"


def _says_the_same(content: bytes, flipped: bytes | bytearray) -> bool:
    try:
        return bool(json.loads(content) == json.loads(flipped))
    except ValueError:
        return False


def assert_flips_are_safe(
    folder: Path, name: str, offsets: list[int], sound_arrays: list[np.ndarray], *, must_be_found: bool = True
) -> None:
    """Flip bits of one byte at a time. In a process of its own: damage may make a library hang or crash."""
    path, content = folder / name, (folder / name).read_bytes()
    random = np.random.default_rng(len(offsets))

    def flip_each() -> None:
        for offset in offsets:
            flipped = bytearray(content)
            flipped[offset] ^= int(random.integers(1, 256))
            while name == MANIFEST and _says_the_same(content, flipped):  # as 1E-05 for 1e-05 does
                flipped[offset] = content[offset] ^ int(random.integers(1, 256))
            path.write_bytes(flipped)
            sender.send(why_unsafe(folder, path, sound_arrays, must_be_found=must_be_found))

    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=flip_each)
    process.start()
    sender.close()
    unsafe = {}
    try:
        for offset in offsets:
            if not receiver.poll(PATIENCE_S):
                unsafe[offset] = "a library hangs"
                break
            if verdict := receiver.recv():
                unsafe[offset] = verdict
    except EOFError:
        unsafe[offset] = "a library crashes"
    finally:
        process.kill()
        process.join()
    assert not unsafe, f"{len(unsafe)} of {len(offsets)} flips in {name}: {dict(list(unsafe.items())[:5])}"


def chunk_extents(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and byte behind the end of every stored chunk, its checksum included."""
    with h5py.File(path) as file:
        for dataset in file.values():
            for index in range(dataset.id.get_num_chunks()):
                chunk = dataset.id.get_chunk_info(index)
                yield chunk.byte_offset, chunk.byte_offset + chunk.size


def structured_offsets(path: Path) -> list[int]:
    """The first, a middle and the last data byte, and the checksum, of every chunk of every array."""
    return sorted(
        offset for start, stop in chunk_extents(path) for offset in (start, (start + stop) // 2, stop - 5, stop - 1)
    )


def metadata_offsets(path: Path) -> list[int]:
    """Every byte that is in no chunk."""
    in_chunks = {offset for start, stop in chunk_extents(path) for offset in range(start, stop)}
    return [offset for offset in range(path.stat().st_size) if offset not in in_chunks]


def random_offsets(path: Path, count: int) -> list[int]:
    return np.random.default_rng(0).integers(path.stat().st_size, size=count).tolist()


def test_the_data_set_has_several_chunks_in_a_shard(sound: Path) -> None:
    with h5py.File(sound / SHARD) as file:
        num_chunks = {name: dataset.id.get_num_chunks() for name, dataset in file.items()}
    assert num_chunks["tokens"] > 3
    assert num_chunks["masks"] > 2 * 3, "of two mask sets"
    assert len(structured_offsets(sound / SHARD)) == 4 * sum(num_chunks.values())


def test_no_metadata_are_without_a_checksum(sound: Path) -> None:
    """HDF5 keeps strings of variable length on a heap that has none; damaged, it may loop for ever."""
    assert b"GCOL" not in (sound / SHARD).read_bytes()


def test_a_flipped_byte_in_a_shard(folder: Path, sound_arrays: list[np.ndarray]) -> None:
    path = folder / SHARD
    offsets = structured_offsets(path)[::10] + metadata_offsets(path)[::150] + random_offsets(path, 10)
    assert_flips_are_safe(folder, SHARD, offsets, sound_arrays)


@pytest.mark.slow
@pytest.mark.parametrize("choose", [structured_offsets, lambda path: random_offsets(path, 250)], ids=["chunks", "any"])
def test_many_flipped_bytes_in_a_shard(
    folder: Path, sound_arrays: list[np.ndarray], choose: Callable[[Path], list[int]]
) -> None:
    assert_flips_are_safe(folder, SHARD, choose(folder / SHARD), sound_arrays)


@pytest.mark.slow
def test_every_flipped_byte_of_the_metadata(folder: Path, sound_arrays: list[np.ndarray]) -> None:
    """Every byte that is not 0, and some of the zeros, most of which are empty space.

    `find_faults`, which is a hash of the whole file, is left to the other tests.
    """
    content, offsets = (folder / SHARD).read_bytes(), metadata_offsets(folder / SHARD)
    chosen = [o for o in offsets if content[o]] + [o for o in offsets if not content[o]][::10]
    assert_flips_are_safe(folder, SHARD, chosen, sound_arrays, must_be_found=False)


def test_a_chunk_lost_to_zeros(folder: Path, sound_arrays: list[np.ndarray]) -> None:
    """What a file system may leave after a crash; the checksum of zeros is zero, so that it holds."""
    path, content = folder / SHARD, (folder / SHARD).read_bytes()
    for start, stop in list(chunk_extents(path)):
        path.write_bytes(content[:start] + bytes(stop - start) + content[stop:])
        assert why_unsafe(folder, path, sound_arrays) == ""
        path.write_bytes(content)


@pytest.mark.parametrize("role", ["unk", "bos", "eos"])
def test_a_chunk_lost_to_zeros_where_zero_is_a_token_of_samples(
    role: str, lines: list[str], chapters: list[Path], tmp_path: Path, build_data: Callable[..., bool]
) -> None:
    """Other vocabularies than ours begin with [UNK], [SOS] or [EOS], so that zeros are no sign of damage by themselves."""
    ids = {role: 0} | dict(zip([name for name in ("unk", "bos", "eos") if name != role], (1, 2), strict=True))
    model = tmp_path / "other.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=200, pad_id=3, control_symbols=["[MASK]"],
            minloglevel=2, hard_vocab_limit=False, **{f"{name}_id": token_id for name, token_id in ids.items()},
        )  # fmt: skip
    folder = tmp_path / "pretrain"
    build_data(
        chapters[:1], folder, tokenizer_path=model, max_length_tokens=32, shard_samples=1024, validation_fraction=0
    )
    path, content, sound_arrays = folder / SHARD, (folder / SHARD).read_bytes(), read_everything(folder)
    assert (sound_arrays[0] == 0).any()
    for start, stop in chunk_extents(path):
        path.write_bytes(content[:start] + bytes(stop - start) + content[stop:])
        assert why_unsafe(folder, path, sound_arrays) == ""
        path.write_bytes(content)


def test_a_flipped_byte_in_the_tokenizer(folder: Path, sound_arrays: list[np.ndarray]) -> None:
    assert_flips_are_safe(folder, TOKENIZER, [0, 1, 2, *random_offsets(folder / TOKENIZER, 40)], sound_arrays)


def test_a_flipped_byte_in_the_manifest(folder: Path, sound_arrays: list[np.ndarray]) -> None:
    """All but the white space between its words."""
    content = (folder / MANIFEST).read_bytes()
    words = [offset for offset in range(len(content)) if not content[offset : offset + 1].isspace()]
    assert_flips_are_safe(folder, MANIFEST, words[:: len(words) // 150], sound_arrays)


@pytest.mark.parametrize("name", [SHARD, "validation-00000.h5", TOKENIZER, MANIFEST])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-2],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: None,
    ],
    ids=["empty", "one byte", "half", "two bytes short", "longer", "zeros", "missing"],
)
def test_a_damaged_file(
    folder: Path, sound_arrays: list[np.ndarray], name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    path = folder / name
    content = damage(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    named = folder if name == MANIFEST and content is None else path
    assert why_unsafe(folder, named, sound_arrays) == ""


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), r"is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"has \d+ bytes, expected \d+"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), r"is damaged: SHA-256 is \w+, expected \w+"),
    ],
)
def test_every_damaged_file_is_listed(folder: Path, damage: Callable[[Path], object], fault: str) -> None:
    names = [SHARD, "validation-00000.h5"]
    for name in names:
        damage(folder / name)
    faults = list(find_faults(folder))
    assert len(faults) == 2
    for name, line in zip(names, faults, strict=True):
        assert re.fullmatch(f"{name}: {fault}", line)


def test_a_missing_tokenizer_is_a_fault(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    assert list(find_faults(folder)) == [f"{TOKENIZER}: is missing"]


def test_shards_exchanged_with_each_other_are_found(data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "pretrain"))
    first, second = folder / "train-00000.h5", folder / "train-00001.h5"
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    assert [fault.split(":")[0] for fault in find_faults(folder)] == [first.name, second.name]


def test_a_manifest_of_other_shards_is_found(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["splits"]["train"][0]["num_samples"] += 1
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: is damaged"):
        list(find_faults(folder))
