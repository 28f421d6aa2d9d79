"""A data set for human eyes: what is in it, and samples with their masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.shards import SPLITS, DataSet, SampleBatch, Split
from data_prep.tokenizer import Tokenizer


def summarize(data: DataSet) -> dict[str, Any]:
    """Sizes and parameters, as a script would want them."""
    splits = {}
    for split in SPLITS:
        shards = data.manifest["splits"][split]
        splits[split] = {"shards": len(shards)} | {
            key: sum(s[key] for s in shards) for key in ("num_samples", "num_tokens", "num_masked", "size_bytes")
        }
    return {
        "data": str(data.folder),
        "parameters": data.parameters,
        "vocab_size": data.tokenizer.vocab_size,
        "documents": data.manifest["documents"],
        "mixture": data.manifest.get("mixture", []),
        "cleaning": data.manifest.get("cleaning", {}),
        "splits": splits,
    }


def describe(data: DataSet) -> Iterator[str]:
    """The summary as lines of text."""
    summary = summarize(data)
    given = (item for item in summary["parameters"].items() if str(item[1]) not in ("None", "none", "False"))
    parameters = ", ".join(f"{key} {value}" for key, value in given)
    yield f"{summary['data']}: vocabulary {summary['vocab_size']:,}, {parameters}"
    documents = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in summary["documents"].items())
    yield f"documents: {documents}"
    for corpus in summary["mixture"] if len(summary["mixture"]) > 1 else ():
        share = corpus["train_samples"] / summary["splits"]["train"]["num_samples"]
        yield (
            f"corpus {corpus['corpus']}: {corpus['epochs']:.4g} epochs of {corpus['documents']['train']:,} documents to train "
            f"on, {corpus['train_samples']:,} samples ({share:.1%} of train)"
        )
    if cleaned := [f"{count:,} {name.replace('_', ' ')}" for name, count in summary["cleaning"].items() if count]:
        yield f"cleaning: {', '.join(cleaned)}"
    for split, sizes in summary["splits"].items():
        fill = sizes["num_tokens"] / max(1, sizes["num_samples"] * data.max_length_tokens)
        yield (
            f"{split}: {sizes['num_samples']:,} samples, {sizes['num_tokens']:,} tokens ({fill:.0%} of the places filled), "
            f"{sizes['num_masked']:,} masked, {sizes['shards']} shards, {sizes['size_bytes'] / 1e6:.1f} MB"
        )


def show_samples(data: DataSet, split: Split, first: int, count: int, mask_set: int) -> Iterator[str]:
    """Each sample's text with its masks in place, and its turns in factorization order."""
    if count < 1:
        raise ValueError(f"--count {count}: expected at least 1")
    if not data.num_samples(split):
        raise ValueError(f"{data.folder}: {split} has no samples")
    stop = min(first + count, data.num_samples(split))
    if not 0 <= first < stop:
        raise ValueError(f"--sample {first}: {split} has samples 0 to {data.num_samples(split) - 1}")
    if not 0 <= mask_set < data.num_mask_sets:
        raise ValueError(f"--mask_set {mask_set}: the data set has mask sets 0 to {data.num_mask_sets - 1}")
    yield "In the text: {turn:original>shown}, [M] = the mask. Below it: the turns in the order in which they are predicted."
    batch = data.read_samples(split, first, stop, mask_set).as_int64()
    for row in range(stop - first):
        yield ""
        yield f"--- {split} sample {first + row}, {batch.length_B[row]} tokens, {batch.num_masked_B[row]} masked ---"
        yield from _show(data.tokenizer, batch, row)


def _show(tokenizer: Tokenizer, batch: SampleBatch, row: int) -> Iterator[str]:
    num_masked = batch.num_masked_B[row]
    positions, turns, shown = (a[row, :num_masked] for a in (batch.positions_BP, batch.turns_BP, batch.shown_BP))
    turn_at = dict(zip(positions.tolist(), zip(turns.tolist(), shown.tolist(), strict=True), strict=True))
    words: list[str] = []
    for position, token_id in enumerate(batch.tokens_BL[row, : batch.length_B[row]].tolist()):
        space = " " if tokenizer.is_word_start(token_id) else ""
        surface = tokenizer.surface(token_id)
        if position in turn_at:
            turn, shown_id = turn_at[position]
            words.append(f"{space}{{{turn}:{surface}>{_name_shown(tokenizer, token_id, shown_id)}}}")
        else:
            words.append(f" {surface} " if token_id in tokenizer.special_ids else space + surface)
    yield " ".join("".join(words).split())
    yield "turns: " + "  ".join(
        f"{turn}:{'|'.join(tokenizer.piece(t) for t in batch.tokens_BL[row, positions[turns == turn]])}@{positions[turns == turn][0]}"
        for turn in np.unique(turns)
    )


def _name_shown(tokenizer: Tokenizer, original_id: int, shown_id: int) -> str:
    if shown_id == tokenizer.mask_id:
        return "[M]"
    return "kept" if shown_id == original_id else tokenizer.surface(shown_id)
