"""The shard format: schema, version, writer, reader. No other file knows it.

A data set is a folder:

    manifest.json            written last; without it there is no data set
    tokenizer.model          the tokenizer the ids belong to: a SentencePiece model, or tokenizer.json: WordPiece
    train-00000.h5 ...       shards of `shard_samples` samples, the last one of a split shorter
    validation-00000.h5 ...

A shard holds facts about N samples, never slots, padding or masks of L x L. T = the tokens of all of them and M = the
masked ones, concatenated; K = mask sets; token = uint16 where the vocabulary fits and uint32 where not:

    samples  [N]     length             uint16   tokens, special ones included
                     segment_boundary   uint16   where segment B begins
                     num_masked         uint16   in every mask set; uint16 [K] where the mask rate differs between sets
    tokens   [T]     token              "[SOS] S1 [EOS] S2 [EOS]"
    masks    [K, M]  position           uint16   in factorization order
                     turn               uint16   the factorization step of each, from 1
                     shown              token    what the context shows there

Where the rate differs, M is that of the set with most masked tokens; the rows of the others are not used to the end, and HDF5
chunks without anything in them take no room.

Every array is checksummed (fletcher32) in HDF5 chunks, of the masks of one set; the file is written in HDF5's newest
layout, whose metadata carry checksums as well. So a flipped byte is an error when it is read, not another token.
The manifest holds the SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from data_prep.errors import UserError
from data_prep.files import read_manifest, sha256_of_file, write_manifest, write_whole
from data_prep.mask_settings import MaskSettings, num_masked
from data_prep.masking import Masks
from data_prep.packing import NUM_SPECIAL_TOKENS, Samples
from data_prep.tokenizer import Tokenizer, load_tokenizer

FORMAT = "pmlm-shards"
VERSION = 2
MANIFEST = "manifest.json"
CHUNK_SAMPLES = 128  # read at a time
MAX_LENGTH_LIMIT_TOKENS = 2**16 - 1
_MAX_OPEN_FILES = 32
_FULL_SAMPLES_PER_CHUNK = 64  # of HDF5; more are read in vain, fewer take longer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


def shard_name(split: Split, index: int) -> str:
    """`train-00017.h5`."""
    return f"{split}-{index:05d}.h5"


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(
    path: Path, samples: Samples, masks: Masks, max_length_tokens: int, max_masked_tokens: int
) -> dict[str, Any]:
    """Write a shard, whole or not at all; returns its entry of the manifest.

    The file is built in memory: what HDF5 would write piece by piece to a full disk is one plain write.
    """
    num_masked_KB, num_samples = masks.num_masked_KB, len(samples.length_B)
    is_constant = bool((num_masked_KB == num_masked_KB[0]).all())
    of_masks = () if is_constant else (len(num_masked_KB),)
    facts = np.empty(
        num_samples, dtype=[("length", np.uint16), ("segment_boundary", np.uint16), ("num_masked", np.uint16, of_masks)]
    )
    facts["length"], facts["segment_boundary"] = samples.length_B, samples.segment_boundary_B
    facts["num_masked"] = num_masked_KB[0] if is_constant else num_masked_KB.T
    num_masked_K = num_masked_KB.sum(axis=1).tolist()
    masks_shape = len(num_masked_K), max(num_masked_K)
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="latest", rdcc_nbytes=0) as file:
        file.attrs["format"] = np.bytes_(FORMAT)  # of fixed size: HDF5 keeps others where it has no checksum
        file.attrs["version"] = VERSION
        for name, rows, shape, chunk in (
            ("samples", [facts], facts.shape, facts.shape),
            ("tokens", [samples.tokens_T], samples.tokens_T.shape, (_FULL_SAMPLES_PER_CHUNK * max_length_tokens,)),
            ("masks", masks.places_K, masks_shape, (1, _FULL_SAMPLES_PER_CHUNK * max_masked_tokens)),
        ):
            settings = {"chunks": tuple(map(min, chunk, shape)), "fletcher32": True} if all(shape) else {}
            stored = file.create_dataset(name, shape, rows[0].dtype, **settings)
            for index, row in enumerate(rows):
                stored[slice(len(row)) if stored.ndim == 1 else (index, slice(len(row)))] = row
        file.flush()
        image = file.id.get_file_image()
    write_whole(path, image)
    entry = {
        "file": path.name,
        "num_samples": num_samples,
        "num_tokens": len(samples.tokens_T),
        "num_masked": num_masked_K[0],
        "size_bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    return entry if is_constant else entry | {"num_masked_of_sets": num_masked_K}


@dataclass(frozen=True)
class SampleBatch:
    """B samples with one mask set each. L = the data set's max_length_tokens, P = the most masked tokens of a sample."""

    tokens_BL: np.ndarray
    """Behind a sample's end the [PAD] id."""
    length_B: np.ndarray
    segment_boundary_B: np.ndarray
    num_masked_B: np.ndarray
    positions_BP: np.ndarray
    """In factorization order; unused places of the three arrays are 0."""
    turns_BP: np.ndarray
    shown_BP: np.ndarray

    def __getitem__(self, rows: Any) -> SampleBatch:
        return SampleBatch(**{name: array[rows] for name, array in vars(self).items()})

    def as_int64(self) -> SampleBatch:
        """The same for arithmetic, in which small unsigned integers would wrap."""
        return SampleBatch(**{name: array.astype(np.int64) for name, array in vars(self).items()})


def batch_of(
    samples: Samples,
    num_masked_B: np.ndarray,
    places_M: np.ndarray,
    max_length_tokens: int,
    max_masked_tokens: int,
    pad_id: int,
) -> SampleBatch:
    """The samples with one of their mask sets, a row each."""
    masks = (_in_rows(places_M[name], num_masked_B, max_masked_tokens, 0) for name in ("position", "turn", "shown"))
    tokens_BL = _in_rows(samples.tokens_T, samples.length_B, max_length_tokens, pad_id)
    return SampleBatch(tokens_BL, samples.length_B, samples.segment_boundary_B, num_masked_B, *masks)


def _in_rows(values: np.ndarray, count_B: np.ndarray, width: int, unused: int) -> np.ndarray:
    rows = np.full((len(count_B), width), unused, dtype=values.dtype)
    rows[np.arange(width, dtype=np.uint16) < count_B[:, None]] = values
    return rows


class _Shard:
    """An open shard file. Raises OSError, KeyError or RuntimeError where what is read is damaged."""

    def __init__(self, path: Path, max_length_tokens: int, max_masked_tokens: int) -> None:
        self._file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)  # no cache: little is read twice
        if self._file.attrs.get("format") != np.bytes_(FORMAT) or self._file.attrs.get("version") != VERSION:
            raise UserError(f"{path}: not a {FORMAT} file of version {VERSION}; build the data anew")
        self._tokens, self._masks, self._samples = (self._file[name] for name in ("tokens", "masks", "samples"))
        self._samples = self._samples[:]
        num_masked_N = self._samples["num_masked"]
        self._num_masked_KN = np.broadcast_to(num_masked_N.T, (self._masks.shape[0], len(num_masked_N)))
        self._token_edges = _edges(self._samples["length"])
        # Of each set where they differ, else of all.
        self._mask_edges = [_edges(num_masked) for num_masked in np.atleast_2d(num_masked_N.T)]
        if (
            (self._token_edges[-1], max(edges[-1] for edges in self._mask_edges))
            != (len(self._tokens), self._masks.shape[1])
            or self._samples["length"].max() > max_length_tokens
            or num_masked_N.max() > max_masked_tokens
        ):
            raise OSError("the lengths of its samples are wrong")

    def read_samples(self, rows: slice, tokenizer: Tokenizer) -> Samples:
        """Samples without their masks."""
        facts = self._samples[rows]
        tokens = self._tokens[self._token_edges[rows.start] : self._token_edges[rows.start + len(facts)]]
        # A chunk that a crash has left as zeros has a right checksum: fletcher32 of zeros is zero.
        for token_id, expected in ((tokenizer.sos_id, len(facts)), (tokenizer.eos_id, 2 * len(facts))):
            if (found := np.count_nonzero(tokens == token_id)) != expected:
                raise OSError(f"{found} of {expected} {tokenizer.piece(token_id)} in {len(facts)} samples")
        return Samples(tokens, facts["length"], facts["segment_boundary"])

    def read_masks(self, rows: slice, mask_set: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of masked tokens of each sample, and their places, one sample behind the other."""
        num_masked_B = self._num_masked_KN[mask_set, rows]
        edges = self._mask_edges[min(mask_set, len(self._mask_edges) - 1)]
        places = self._masks[mask_set, edges[rows.start] : edges[rows.start + len(num_masked_B)]]
        if not places["position"].all():
            raise OSError("zeros in place of masks")
        return num_masked_B, places

    def close(self) -> None:
        self._file.close()


def _edges(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class DataSet:
    """A finished data set: its manifest, tokenizer and samples.

    Raises ValueError that names the folder and the cure where there is no data set, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_data_manifest(folder)
        self.parameters: dict[str, Any] = self.manifest["parameters"]
        self.max_length_tokens: int = self.parameters["max_length_tokens"]
        self.num_mask_sets: int = self.parameters["mask_sets"]
        self.masks = MaskSettings.of_data_set(self.parameters)
        self.max_masked_tokens = self.masks.max_masked(self.max_length_tokens, NUM_SPECIAL_TOKENS)
        path = folder / self.manifest["tokenizer"]["file"]
        if not path.is_file():
            raise UserError(f"{path}: is missing; put it back or build the data anew")
        if (found := sha256_of_file(path)) != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{path}: not the tokenizer these shards were made with (SHA-256 {found[:12]}, "
                f"expected {self.manifest['tokenizer']['sha256'][:12]}); put the right file back or build the data anew"
            )
        self.tokenizer = load_tokenizer(path)
        self._open_shards: OrderedDict[Path, _Shard] = OrderedDict()

    def num_samples(self, split: Split) -> int:
        """Samples in a split."""
        return sum(shard["num_samples"] for shard in self.manifest["splits"][split])

    def samples_of_corpora(self, split: Split) -> dict[str, range]:
        """Which samples of a split are of each corpus. A data set of several corpora that was made before manifests told
        counts as one."""
        mixture, name = self.manifest.get("mixture", []), f"{split}_samples"
        if not mixture or any(name not in share for share in mixture):
            return {"corpus": range(self.num_samples(split))}
        ends = np.cumsum([share[name] for share in mixture]).tolist()
        return {share["corpus"]: range(end - share[name], end) for share, end in zip(mixture, ends, strict=True)}

    def read_chunk(self, split: Split, chunk: int, mask_set: int) -> SampleBatch:
        """Samples chunk * CHUNK_SAMPLES .. (the last chunk of a split may be shorter) with one of the mask sets.

        Every shard but the last holds a whole number of chunks, so chunks are numbered through the split.
        Raises ValueError, naming the file, where a checksum does not hold.
        """
        index, row = divmod(chunk * CHUNK_SAMPLES, self.parameters["shard_samples"])
        rows = slice(row, row + CHUNK_SAMPLES)
        with self._shard(split, index) as shard:
            samples, masks = shard.read_samples(rows, self.tokenizer), shard.read_masks(rows, mask_set)
        return batch_of(samples, *masks, self.max_length_tokens, self.max_masked_tokens, self.tokenizer.pad_id)

    def read_shard(self, split: Split, index: int) -> Samples:
        """All samples of a shard, without their masks. Raises ValueError, naming the file, where a checksum does not hold."""
        with self._shard(split, index) as shard:
            return shard.read_samples(slice(0, None), self.tokenizer)

    def read_samples(self, split: Split, first: int, stop: int, mask_set: int = 0) -> SampleBatch:
        """Consecutive samples first .. stop - 1, for looking at them."""
        chunks = range(first // CHUNK_SAMPLES, -(-stop // CHUNK_SAMPLES))
        start = chunks.start * CHUNK_SAMPLES
        return concatenate([self.read_chunk(split, c, mask_set) for c in chunks])[first - start : stop - start]

    @contextmanager
    def _shard(self, split: Split, index: int) -> Iterator[_Shard]:
        path = self.folder / self.manifest["splits"][split][index]["file"]
        try:
            if path not in self._open_shards:
                if len(self._open_shards) >= _MAX_OPEN_FILES:
                    self._open_shards.popitem(last=False)[1].close()
                self._open_shards[path] = _Shard(path, self.max_length_tokens, self.max_masked_tokens)
            self._open_shards.move_to_end(path)
            yield self._open_shards[path]
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(_damaged(path, error)) from None

    def close(self) -> None:
        """Close the open shard files."""
        while self._open_shards:
            self._open_shards.popitem()[1].close()


def concatenate(batches: list[SampleBatch]) -> SampleBatch:
    """The samples of all batches, one behind the other."""
    return SampleBatch(**{name: np.concatenate([vars(b)[name] for b in batches]) for name in vars(batches[0])})


def _damaged(path: Path, error: BaseException) -> str:
    return f"{path}: damaged ({str(error).splitlines()[0]}); `python -m data_prep verify` tells what is wrong, then build it anew"


def manifest_path(folder: Path) -> Path:
    """Where a data set's manifest is."""
    return folder / MANIFEST


def write_data_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Declare the data set whole."""
    write_manifest(manifest_path(folder), FORMAT, VERSION, content)


def read_data_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; ValueError where there is none, or it is damaged or another version's."""
    if not manifest_path(folder).is_file():
        raise UserError(
            f"{folder}: no data set there (no {MANIFEST}). Make one with: python -m data_prep train-tokenizer "
            f"--corpus TEXTS --tokenizer tokenizer.model && python -m data_prep build --corpus TEXTS "
            f"--tokenizer tokenizer.model --data {folder}"
        )
    return read_manifest(manifest_path(folder), FORMAT, VERSION)


def find_faults(folder: Path, advance: Any = lambda num_bytes: None) -> Iterator[str]:
    """Read every byte of a data set; one line for each thing that is wrong, nothing for a sound one."""
    manifest = read_data_manifest(folder)
    name = manifest["tokenizer"]["file"]
    if not (folder / name).is_file():
        yield f"{name}: is missing"
        return
    if (found := sha256_of_file(folder / name)) != manifest["tokenizer"]["sha256"]:
        yield f"{name}: SHA-256 is {found[:12]}, expected {manifest['tokenizer']['sha256'][:12]}"
        return
    data = DataSet(folder)
    for split in SPLITS:
        for index, entry in enumerate(manifest["splits"][split]):
            faults = list(_file_faults(folder, entry))
            if not faults:
                faults = list(_sample_faults(data, split, index, entry["num_samples"]))
            yield from (f"{entry['file']}: {fault}" for fault in faults)
            advance(entry["size_bytes"])
    data.close()


def _file_faults(folder: Path, entry: dict[str, Any]) -> Iterator[str]:
    path = folder / entry["file"]
    if not path.is_file():
        yield "is missing"
    elif (size := path.stat().st_size) != entry["size_bytes"]:
        yield f"has {size} bytes, expected {entry['size_bytes']}"
    elif (found := sha256_of_file(path)) != entry["sha256"]:
        yield f"is damaged: SHA-256 is {found[:12]}, expected {entry['sha256'][:12]}"


def _sample_faults(data: DataSet, split: Split, shard: int, num_samples: int) -> Iterator[str]:
    """What a right hash cannot tell: whether the samples keep the format's rules."""
    first = shard * data.parameters["shard_samples"]
    for mask_set in range(data.num_mask_sets):
        for chunk in range(first // CHUNK_SAMPLES, -(-(first + num_samples) // CHUNK_SAMPLES)):
            try:
                batch = data.read_chunk(split, chunk, mask_set).as_int64()
            except ValueError as error:
                yield str(error)
                return
            for rule, holds_B in check_samples(batch, data.tokenizer, data.masks, mask_set).items():
                for row in np.flatnonzero(~holds_B)[:1]:
                    yield f"sample {chunk * CHUNK_SAMPLES + row}, mask set {mask_set}: {rule} does not hold"


def check_samples(
    batch: SampleBatch, tokenizer: Tokenizer, masks: MaskSettings, mask_set: int
) -> dict[str, np.ndarray]:
    """Return the rules of the format, and for each of the B samples whether it keeps them."""
    rate, (_, longest) = masks.rates_K[mask_set], masks.block_lengths
    max_length = batch.tokens_BL.shape[1]
    rows = np.arange(len(batch.length_B))
    used_BP = batch.turns_BP > 0
    is_inside = (batch.length_B >= NUM_SPECIAL_TOKENS) & (batch.length_B <= max_length)
    is_inside &= (batch.segment_boundary_B >= NUM_SPECIAL_TOKENS) & (batch.segment_boundary_B <= batch.length_B - 2)
    is_inside &= (batch.positions_BP < max_length).all(axis=1)
    length_B = np.clip(batch.length_B, 1, max_length)
    boundary_B = np.clip(batch.segment_boundary_B, 1, max_length)
    positions_BP = np.minimum(batch.positions_BP, max_length - 1)

    is_text_BL = np.arange(max_length) < length_B[:, None]
    is_special_BL = is_text_BL & np.isin(batch.tokens_BL, tokenizer.special_ids)
    is_structure_BL = is_special_BL & (batch.tokens_BL != tokenizer.unk_id)
    maskable_B = (is_text_BL & ~is_special_BL).sum(axis=1)
    times_masked = np.zeros(batch.tokens_BL.shape, dtype=np.int64)
    np.add.at(times_masked, (np.broadcast_to(rows[:, None], used_BP.shape)[used_BP], positions_BP[used_BP]), 1)
    turn_step_BP = np.diff(batch.turns_BP, axis=1, prepend=0)
    position_step_BP = np.diff(batch.positions_BP, axis=1, prepend=-2)
    goes_on_BP = (turn_step_BP == 1) | ((turn_step_BP == 0) & (position_step_BP == 1))
    original_BP = batch.tokens_BL[rows[:, None], positions_BP]
    is_mask_or_text_BP = np.isin(batch.shown_BP, np.append(tokenizer.normal_ids, tokenizer.mask_id))
    block_tokens = np.stack([(batch.turns_BP == turn).sum(axis=1) for turn in range(1, used_BP.shape[1] + 1)])
    in_vocabulary = [(ids < tokenizer.vocab_size).all(axis=1) for ids in (batch.tokens_BL, batch.shown_BP)]
    is_masked_special_BP = ~(is_text_BL & ~is_special_BL)[rows[:, None], positions_BP] & used_BP
    return {
        "every id is in the vocabulary": in_vocabulary[0] & in_vocabulary[1],
        "length, boundary and positions are inside the sample, no segment is empty": is_inside,
        "[SOS] first, [EOS] last": (batch.tokens_BL[:, 0] == tokenizer.sos_id)
        & (batch.tokens_BL[rows, length_B - 1] == tokenizer.eos_id),
        "three special tokens, [EOS] before segment B": (is_structure_BL.sum(axis=1) == NUM_SPECIAL_TOKENS)
        & (batch.tokens_BL[rows, boundary_B - 1] == tokenizer.eos_id)
        & (boundary_B < length_B),
        "[PAD] behind the text": ((batch.tokens_BL == tokenizer.pad_id) == ~is_text_BL).all(axis=1),
        f"{rate:.6g} of the tokens are masked": (batch.num_masked_B == num_masked(maskable_B, rate))
        & (used_BP.sum(axis=1) == batch.num_masked_B),
        "no special token is masked": ~is_masked_special_BP.any(axis=1),
        "no position is masked twice": (times_masked <= 1).all(axis=1),
        "turns count up from 1": (~used_BP | goes_on_BP).all(axis=1),
        f"a turn has at most {longest} tokens": (block_tokens <= longest).all(axis=0),
        "[MASK], a text token or the original is shown": (
            ~used_BP | is_mask_or_text_BP | (batch.shown_BP == original_BP)
        ).all(axis=1),
    }
