"""What a data set is made of, measured: lengths, vocabulary, unknown tokens, duplicates, and a recipe's epochs of it.

V = vocabulary size, L = max_length_tokens, H = hashes. Both splits count, but for the epochs: those are train's.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import inspect
from data_prep.files import read_json, write_whole
from data_prep.packing import NUM_SPECIAL_TOKENS
from data_prep.processes import Processes
from data_prep.progress import Stage, Work
from data_prep.shards import CHUNK_SAMPLES, SPLITS, DataSet, SampleBatch, Split
from data_prep.units import bin_width

FREQUENT = 100
"""Occurrences from which on an entry of the vocabulary counts as frequent."""
MAX_HASHES = 2**21
"""Different texts whose hashes are kept: 24 bytes each, some 50 MB."""
_PENDING_SAMPLES = 2**20
_NUM_EXAMPLES = 10
_MAX_BARS = 64


@dataclass(frozen=True)
class Recipe:
    """What a DeepSpeed JSON says about how much is read."""

    path: Path
    train_batch_size: int
    total_steps: int


def read_recipe(path: Path) -> Recipe:
    """Batch size and steps of a DeepSpeed JSON. Raises FileNotFoundError, or ValueError for a key that is missing or bad."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such DeepSpeed configuration; ds_configs/ has some", str(path))
    values = read_json(path)
    faults = []

    def number(*keys: str) -> int:
        value = values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            faults.append(f"{'.'.join(keys)} is missing: without it there is no telling how many samples are read")
        elif type(value) is not int or value < 1:
            faults.append(f"{'.'.join(keys)}: expected a whole number of at least 1, found {value!r}")
        return value  # type: ignore[no-any-return]

    recipe = Recipe(path, number("train_batch_size"), number("scheduler", "params", "total_num_steps"))
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return recipe


class TextCounts:
    """How often each text occurs in each split: of all texts, or, where there are too many, of those with small hashes.

    Which ones are kept depends on the texts alone, not on the order in which they come.
    """

    def __init__(self, max_hashes: int) -> None:
        self._max_hashes = max_hashes
        self._halvings = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self.hashes_H = np.zeros(0, np.uint64)
        self.counts_HS = np.zeros((0, len(SPLITS)), np.int64)
        """S: the splits, in the order of SPLITS."""

    @property
    def share(self) -> float:
        """The part of the hash space that is kept."""
        return 0.5**self._halvings

    def add(self, split: Split, hashes_H: np.ndarray, counts_H: np.ndarray) -> None:
        """Count texts by their 64-bit hashes; no hash twice in one call."""
        counts_HS = np.zeros((len(hashes_H), len(SPLITS)), np.int64)
        counts_HS[:, SPLITS.index(split)] = counts_H
        self._pending.append(self._kept(hashes_H, counts_HS))
        self._num_pending += len(self._pending[-1][0])
        if self._num_pending > _PENDING_SAMPLES:
            self.settle()

    def settle(self) -> None:
        """Sum up what was added."""
        hashes, counts = zip((self.hashes_H, self.counts_HS), *self._pending, strict=True)
        self.hashes_H, places = np.unique(np.concatenate(hashes), return_inverse=True)
        columns = np.concatenate(counts).T
        self.counts_HS = np.stack(
            [np.bincount(places, column, minlength=len(self.hashes_H)) for column in columns], axis=1
        ).astype(np.int64)
        self._pending, self._num_pending = [], 0
        while len(self.hashes_H) > self._max_hashes:
            self._halvings += 1
            self.hashes_H, self.counts_HS = self._kept(self.hashes_H, self.counts_HS)

    def _kept(self, hashes_H: np.ndarray, counts_HS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_kept_H = hashes_H <= np.uint64(2 ** (64 - self._halvings) - 1)
        return hashes_H[is_kept_H], counts_HS[is_kept_H]

    def summarize(self) -> dict[str, Any]:
        """Shares of samples; None where there is nothing to compare."""
        count_H = self.counts_HS.sum(axis=1)
        of_train_H, of_validation_H = (self.counts_HS[:, SPLITS.index(split)] for split in ("train", "validation"))
        return {
            "repeated_share": _ratio(count_H[count_H > 1].sum(), count_H.sum()),
            "surplus_share": _ratio((count_H - 1).sum(), count_H.sum()),
            "validation_in_train_share": _ratio(of_validation_H[of_train_H > 0].sum(), of_validation_H.sum()),
            "measured_on_share_of_texts": self.share,
        }


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


@dataclass
class Measured:
    """What the samples of a data set told."""

    data: DataSet
    recipe: Recipe | None
    token_counts_V: np.ndarray
    """Occurrences of each id that text is made of, the unknown one included; 0 for other special ids."""
    length_counts: np.ndarray
    """Samples of each length, 0 .. L, the three special tokens included."""
    turn_length_counts: np.ndarray
    """Turns of each length in mask set 0, from 0 tokens to the most of a block."""
    texts: TextCounts


def measure(
    data: DataSet,
    recipe: Recipe | None,
    processes: Processes,
    *,
    max_hashes: int = MAX_HASHES,
) -> Measured:
    """Read all samples, a shard a task.

    Raises ValueError for a damaged shard, or a data set made before data_prep counted its text.
    """
    if "text" not in data.manifest:
        raise ValueError(f"{data.folder}: made by an older version, which did not count its text; build it anew")
    num_ids, num_lengths = data.tokenizer.vocab_size, data.max_length_tokens + 1
    measured = Measured(
        data,
        recipe,
        np.zeros(num_ids, np.int64),
        np.zeros(num_lengths, np.int64),
        np.zeros(data.masks.block_lengths[1] + 1, np.int64),
        TextCounts(max_hashes),
    )
    processes.prepare(_set_up, data.folder)
    num_samples = sum(data.num_samples(split) for split in SPLITS)

    def add(work: Work) -> None:
        shard: _MeasuredShard = work.value
        measured.token_counts_V += shard.token_counts_V
        measured.length_counts += shard.length_counts
        measured.turn_length_counts += shard.turn_length_counts
        measured.texts.add(shard.split, shard.hashes_H, shard.counts_H)

    shards = [(split, index) for split in SPLITS for index in range(len(data.manifest["splits"][split]))]
    processes.run(_measure_shard, shards, Stage("measure", num_samples, "sample", is_lasting=False), add)
    measured.texts.settle()
    return measured


# ---- tasks


@dataclass(frozen=True)
class _MeasuredShard:
    split: Split
    token_counts_V: np.ndarray
    length_counts: np.ndarray
    turn_length_counts: np.ndarray
    hashes_H: np.ndarray
    counts_H: np.ndarray


_data: DataSet  # set once in each process


def _set_up(folder: Path) -> None:
    global _data
    _data = DataSet(folder)


def _measure_shard(split: Split, index: int) -> Work:
    tokenizer, parameters = _data.tokenizer, _data.parameters
    first, num_samples = index * parameters["shard_samples"], _data.manifest["splits"][split][index]["num_samples"]
    token_counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    length_counts = np.zeros(_data.max_length_tokens + 1, np.int64)
    turn_length_counts = np.zeros(_data.masks.block_lengths[1] + 1, np.int64)
    hashes = []
    for chunk in range(first // CHUNK_SAMPLES, -(-(first + num_samples) // CHUNK_SAMPLES)):
        batch = _data.read_chunk(split, chunk, 0)
        token_counts_V += np.bincount(batch.tokens_BL.ravel(), minlength=len(token_counts_V))
        length_counts += np.bincount(batch.length_B, minlength=len(length_counts))
        turn_length_counts += _turn_lengths(batch, len(turn_length_counts))
        places = zip(batch.tokens_BL, batch.segment_boundary_B.tolist(), batch.length_B.tolist(), strict=True)
        hashes += [_hash_of_text(tokens_L, boundary, length) for tokens_L, boundary, length in places]
    token_counts_V[[tokenizer.pad_id, tokenizer.sos_id, tokenizer.eos_id]] = 0
    hashes_H, counts_H = np.unique(np.frombuffer(b"".join(hashes), np.uint64), return_counts=True)
    measured = _MeasuredShard(split, token_counts_V, length_counts, turn_length_counts, hashes_H, counts_H)
    return Work(num_samples, tokens=int(token_counts_V.sum()), value=measured)


def _turn_lengths(batch: SampleBatch, num_lengths: int) -> np.ndarray:
    """Return how many turns of the samples have 0, 1, ... tokens."""
    num_samples, most_turns = batch.turns_BP.shape
    turns_BP = batch.turns_BP + (np.arange(num_samples) * (most_turns + 1))[:, None]
    tokens_of_turns = np.bincount(turns_BP[batch.turns_BP > 0])
    return np.bincount(tokens_of_turns[tokens_of_turns > 0], minlength=num_lengths)


def _hash_of_text(tokens_L: np.ndarray, boundary: int, length: int) -> bytes:
    """64 bits of the BLAKE2b of a sample's text, wherever it was split in two."""
    text = tokens_L[1 : boundary - 1].tobytes() + tokens_L[boundary : length - 1].tobytes()
    return hashlib.blake2b(text, digest_size=8).digest()


# ---- numbers and words


def summarize(measured: Measured) -> dict[str, Any]:
    """The numbers, as a script would want them."""
    data, counts_V = measured.data, measured.token_counts_V
    text = data.manifest["text"]
    num_text, num_unknown = int(counts_V.sum()), int(counts_V[data.tokenizer.unk_id])
    num_samples = int(measured.length_counts.sum())
    return {
        **inspect.summarize(data),
        "text": {
            "num_bytes": text["num_bytes"],
            "num_tokens": text["num_tokens"],
            "bytes_per_token": text["num_bytes"] / text["num_tokens"],
        },
        "tokens": {
            "text": num_text,
            "special": NUM_SPECIAL_TOKENS * num_samples,
            "unknown": num_unknown,
            "unknown_share": num_unknown / num_text,
        },
        "vocabulary": _summarize_vocabulary(measured),
        "masks": _summarize_masks(measured, num_text - num_unknown),
        "sample_lengths_tokens": {str(n): int(c) for n, c in enumerate(measured.length_counts) if c},
        "document_lengths_tokens": text["document_lengths_tokens"],
        "duplicates": measured.texts.summarize(),
        "recipe": _summarize_recipe(measured.recipe, data) if measured.recipe else None,
    }


def _summarize_masks(measured: Measured, num_maskable: int) -> dict[str, Any]:
    data, counts = measured.data, measured.turn_length_counts
    masked_K = np.sum([inspect.num_masked_of_sets(data, split) for split in SPLITS], axis=0)
    tokens = counts * np.arange(len(counts))
    return {
        "rates": list(data.masks.rates_K),
        "masked_shares": [_ratio(of_set, num_maskable) for of_set in masked_K.tolist()],
        "turn_lengths_tokens": {str(length): int(count) for length, count in enumerate(counts) if count},
        "block_share_of_turns": _ratio(counts[2:].sum(), counts.sum()),
        "block_share_of_tokens": _ratio(tokens[2:].sum(), tokens.sum()),
    }


def _summarize_vocabulary(measured: Measured) -> dict[str, Any]:
    tokenizer = measured.data.tokenizer
    ids = tokenizer.normal_ids
    counts = measured.token_counts_V[ids]
    order = np.argsort(-counts, kind="stable")
    num_seen = int((counts > 0).sum())

    def named(chosen: np.ndarray) -> dict[str, int]:
        return {tokenizer.piece(int(ids[i])): int(counts[i]) for i in chosen}

    return {
        "entries": len(ids),
        "seen": num_seen,
        "seen_share": num_seen / len(ids),
        "frequent": int((counts >= FREQUENT).sum()),
        "frequent_share": float((counts >= FREQUENT).mean()),
        "never_seen": len(ids) - num_seen,
        "most_frequent": named(order[:_NUM_EXAMPLES]),
        "rarest": named(order[:num_seen][::-1][:_NUM_EXAMPLES]),
        "never_seen_examples": list(named(order[num_seen:][:_NUM_EXAMPLES])),
    }


def _summarize_recipe(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    num_samples = data.num_samples("train")
    num_text = sum(shard["num_tokens"] for shard in data.manifest["splits"]["train"]) - NUM_SPECIAL_TOKENS * num_samples
    seen_samples = recipe.train_batch_size * recipe.total_steps
    whole_epochs, rest_samples = divmod(seen_samples, num_samples)
    mask_set_epochs = [
        float(count) for count in data.masks.epochs_of_sets(whole_epochs, -(-seen_samples // num_samples))
    ]
    if rest_samples:
        last = data.masks.sets_of_epochs(np.array(whole_epochs), whole_epochs + 1)
        mask_set_epochs[int(last)] += rest_samples / num_samples
    return {
        "deepspeed_config": str(recipe.path),
        "train_batch_size": recipe.train_batch_size,
        "total_num_steps": recipe.total_steps,
        "samples": seen_samples,
        "text_tokens": round(num_text * seen_samples / num_samples),
        "epochs": seen_samples / num_samples,
        "epochs_of_each_mask_set": mask_set_epochs,
    }


def describe(measured: Measured) -> Iterator[str]:
    """The summary as lines of text."""
    summary = summarize(measured)
    text, tokens, vocabulary, duplicates = (summary[k] for k in ("text", "tokens", "vocabulary", "duplicates"))
    yield from inspect.describe(measured.data)
    yield f"text: {text['num_bytes'] / 1e6:,.1f} MB of UTF-8, {text['bytes_per_token']:.2f} bytes a token"
    yield (
        f"tokens: {tokens['text']:,} of text, of which {tokens['unknown']:,} unknown ({tokens['unknown_share']:.3%}); "
        f"{tokens['special']:,} special ones beside them"
    )
    yield (
        f"vocabulary: of {vocabulary['entries']:,} entries for text {vocabulary['seen_share']:.2%} occur, "
        f"{vocabulary['frequent_share']:.2%} at least {FREQUENT} times; {vocabulary['never_seen']:,} never"
    )
    yield "  most frequent: " + ", ".join(
        f"{piece} {count / tokens['text']:.2%}" for piece, count in vocabulary["most_frequent"].items()
    )
    yield "  rarest: " + ", ".join(f"{piece} {count:,}" for piece, count in vocabulary["rarest"].items())
    if vocabulary["never_seen"]:
        more = ", ..." if vocabulary["never_seen"] > len(vocabulary["never_seen_examples"]) else ""
        yield "  never: " + ", ".join(vocabulary["never_seen_examples"]) + more
    yield _describe_masks(summary["masks"])
    yield _describe_duplicates(duplicates)
    if summary["recipe"]:
        yield _describe_recipe(summary["recipe"])
    yield from _describe_lengths(summary["document_lengths_tokens"], summary["sample_lengths_tokens"])


def _describe_masks(masks: dict[str, Any]) -> str:
    shares = [f"{share or 0:.2%}" for share in masks["masked_shares"]]
    of_sets = shares[0] if len(set(masks["rates"])) == 1 else f"{', '.join(shares)} (by mask set)"
    return (
        f"masks: {of_sets} of the tokens of text; {masks['block_share_of_turns'] or 0:.1%} of the turns are blocks, with "
        f"{masks['block_share_of_tokens'] or 0:.1%} of the masked tokens"
    )


def _describe_duplicates(duplicates: dict[str, Any]) -> str:
    share = duplicates["measured_on_share_of_texts"]
    how = "all texts compared" if share == 1 else f"estimated from {share:.2%} of the texts, chosen"
    in_train = duplicates["validation_in_train_share"]
    leak = "" if in_train is None else f"; {in_train:.2%} of validation's are in train"
    return (
        f"duplicates: {duplicates['repeated_share']:.2%} of the samples have a text that occurs more than once, "
        f"{duplicates['surplus_share']:.2%} would go if each were kept once{leak} ({how} by 64-bit hashes)"
    )


def _describe_recipe(recipe: dict[str, Any]) -> str:
    uses = recipe["epochs_of_each_mask_set"]
    most = int(np.ceil(max(uses)))
    masks = (
        "no sample twice with the same masks" if most == 1 else f"each sample up to {most:,} times with the same masks"
    )
    return (
        f"{recipe['deepspeed_config']}: {recipe['total_num_steps']:,} steps of {recipe['train_batch_size']:,} samples are "
        f"{recipe['epochs']:,.2f} epochs of train, {recipe['text_tokens']:,} tokens of text; {masks} (mask sets: {len(uses)})"
    )


def _describe_lengths(documents: dict[str, int], samples: dict[str, int]) -> Iterator[str]:
    columns = []
    for lengths in (documents, samples):
        octaves: dict[int, int] = {}
        for length, count in lengths.items():
            octave = int(length).bit_length() - 1
            octaves[octave] = octaves.get(octave, 0) + count
        columns.append(octaves)
    yield f"{'length in tokens':>23}  {'documents':>20}  {'samples':>20}"
    octaves_in_use = set(chain(*columns))
    for octave in range(min(octaves_in_use), max(octaves_in_use) + 1):
        cells = (f"{c.get(octave, 0):>12,} {c.get(octave, 0) / sum(c.values()):>7.1%}" for c in columns)
        yield f"{2**octave:>10,} - {2 ** (octave + 1) - 1:>10,}  " + "  ".join(cells)


# ---- the figure


def draw(measured: Measured, path: Path) -> None:
    """Write the figure, whole, as PNG: lengths of samples and of documents, and how often each vocabulary entry occurs."""
    from matplotlib.figure import Figure  # here, because it takes a second
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    data = measured.data
    figure = Figure(figsize=(15, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    num_samples = ", ".join(f"{data.num_samples(split):,} samples for {split}" for split in SPLITS)
    figure.suptitle(f"{data.folder.resolve().name}: {num_samples}", fontweight="bold")
    samples, documents, vocabulary = figure.subplots(1, 3)

    lengths = np.arange(data.max_length_tokens + 1)
    width = -(-len(lengths) // _MAX_BARS)
    edges = np.arange(0, len(lengths) + width, width)
    per_bar, _ = np.histogram(lengths, edges, weights=measured.length_counts)
    samples.stairs(per_bar, edges, fill=True)
    samples.set(
        title="Lengths of samples", xlabel="tokens, special ones included", ylabel=f"samples per {width} tokens"
    )

    of_length = {int(length): count for length, count in data.manifest["text"]["document_lengths_tokens"].items()}
    ends = [min(of_length)]
    while ends[-1] <= max(of_length):
        ends.append(ends[-1] + bin_width(ends[-1]))
    per_octave = [of_length.get(low, 0) / np.log2(high / low) for low, high in pairwise(ends)]
    documents.stairs(per_octave, ends, fill=True)
    documents.set(
        title="Lengths of documents", xlabel="tokens", ylabel="documents per doubling of the length", xscale="log"
    )

    ids = data.tokenizer.normal_ids
    occurrences = np.sort(measured.token_counts_V[ids])[::-1]
    seen = occurrences[occurrences > 0]
    vocabulary.plot(np.arange(1, len(seen) + 1), seen)
    vocabulary.axhline(FREQUENT, color="grey", linestyle="--", linewidth=1)
    vocabulary.set(
        title=f"Vocabulary: {len(seen):,} of {len(ids):,} entries occur", xlabel="rank of the entry", ylabel="occurrences",
        xscale="log", yscale="log",
    )  # fmt: skip
    for axes in (samples, documents, vocabulary):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, image.getvalue())
