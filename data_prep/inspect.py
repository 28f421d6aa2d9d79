"""A data set for human eyes: what is in it, and samples with their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from data_prep.shards import SPLITS, DataSet, SampleBatch, Split
from data_prep.tokenizer import Tokenizer

Shown = Literal["mask", "replaced", "kept"]
Paint = Callable[[str, int], str]


def summarize(data: DataSet) -> dict[str, Any]:
    """Sizes and parameters, as a script would want them."""
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        shards = data.manifest["splits"][split]
        splits[split] = {"shards": len(shards)} | {
            key: sum(s[key] for s in shards) for key in ("num_samples", "num_tokens", "num_masked", "size_bytes")
        }
        if not data.masks.is_constant:
            splits[split]["num_masked_of_sets"] = num_masked_of_sets(data, split)
    return {
        "data": str(data.folder),
        "parameters": data.parameters,
        "vocab_size": data.tokenizer.vocab_size,
        "documents": data.manifest["documents"],
        "mixture": data.manifest.get("mixture", []),
        "cleaning": data.manifest.get("cleaning", {}),
        "splits": splits,
    }


def num_masked_of_sets(data: DataSet, split: Split) -> list[int]:
    """Return the masked tokens of each mask set of a split."""
    of_shards = [
        shard.get("num_masked_of_sets", [shard["num_masked"]] * data.num_mask_sets)
        for shard in data.manifest["splits"][split]
    ]
    return [sum(of_set) for of_set in zip(*of_shards, strict=True)] or [0] * data.num_mask_sets


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
        of_sets = num_masked_of_sets(data, split)
        masked = f"{of_sets[0]:,}" + ("" if data.masks.is_constant else f" to {of_sets[-1]:,}")
        fill = sizes["num_tokens"] / max(1, sizes["num_samples"] * data.max_length_tokens)
        yield (
            f"{split}: {sizes['num_samples']:,} samples, {sizes['num_tokens']:,} tokens ({fill:.0%} of the places filled), "
            f"{masked} masked, {sizes['shards']} shards, {sizes['size_bytes'] / 1e6:.1f} MB"
        )


def read_for_show(data: DataSet, split: Split, first: int, count: int, mask_set: int) -> SampleBatch:
    """At most `count` samples from number `first` on. Raises ValueError that names the flag for what is not there."""
    if count < 1:
        raise ValueError(f"--count {count}: expected at least 1")
    if not data.num_samples(split):
        raise ValueError(f"{data.folder}: {split} has no samples")
    stop = min(first + count, data.num_samples(split))
    if not 0 <= first < stop:
        raise ValueError(f"--sample {first}: {split} has samples 0 to {data.num_samples(split) - 1}")
    if not 0 <= mask_set < data.num_mask_sets:
        raise ValueError(f"--mask_set {mask_set}: the data set has mask sets 0 to {data.num_mask_sets - 1}")
    return data.read_samples(split, first, stop, mask_set).as_int64()


def show_samples(
    data: DataSet, split: Split, first: int, count: int, mask_set: int, paint: Paint = lambda text, turn: text
) -> Iterator[str]:
    """Each sample's text with its masks in place, and its turns in factorization order; `paint` colours what is of a turn."""
    batch = read_for_show(data, split, first, count, mask_set)
    yield "In the text: {turn:original>shown}, [M] = the mask. Below it: the turns in the order in which they are predicted."
    for row in range(len(batch.length_B)):
        yield ""
        yield f"--- {split} sample {first + row}, {batch.length_B[row]} tokens, {batch.num_masked_B[row]} masked ---"
        yield from _show(data.tokenizer, batch, row, paint)


def _show(tokenizer: Tokenizer, batch: SampleBatch, row: int, paint: Paint) -> Iterator[str]:
    num_masked = batch.num_masked_B[row]
    positions, turns, shown = (a[row, :num_masked] for a in (batch.positions_BP, batch.turns_BP, batch.shown_BP))
    turn_at = dict(zip(positions.tolist(), zip(turns.tolist(), shown.tolist(), strict=True), strict=True))
    words: list[str] = []
    for position, token_id in enumerate(batch.tokens_BL[row, : batch.length_B[row]].tolist()):
        space = " " if tokenizer.is_word_start(token_id) else ""
        surface = tokenizer.surface(token_id)
        if position in turn_at:
            turn, shown_id = turn_at[position]
            masked = f"{{{turn}:{surface}>{_name_shown(tokenizer, token_id, shown_id)}}}"
            words.append(space + paint(masked, turn))
        else:
            words.append(f" {surface} " if token_id in tokenizer.special_ids else space + surface)
    yield " ".join("".join(words).split())
    yield "turns: " + "  ".join(
        paint(
            f"{turn}:{'|'.join(tokenizer.piece(t) for t in batch.tokens_BL[row, positions[turns == turn]])}"
            f"@{positions[turns == turn][0]}",
            turn,
        )
        for turn in np.unique(turns).tolist()
    )


def what_is_shown(tokenizer: Tokenizer, original_id: int, shown_id: int) -> Shown:
    """What the context has in a masked token's place."""
    if shown_id == tokenizer.mask_id:
        return "mask"
    return "kept" if shown_id == original_id else "replaced"


def _name_shown(tokenizer: Tokenizer, original_id: int, shown_id: int) -> str:
    what = what_is_shown(tokenizer, original_id, shown_id)
    return tokenizer.surface(shown_id) if what == "replaced" else {"mask": "[M]", "kept": "kept"}[what]
