"""What was counted of a data set as numbers for a script, and as lines for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from data_prep import inspect
from data_prep.packing import NUM_SPECIAL_TOKENS
from data_prep.recipe import Recipe
from data_prep.shards import SPLITS, DataSet
from data_prep.stats import Measured
from data_prep.text_counts import ratio

FREQUENT = 100
"""Occurrences from which on an entry of the vocabulary counts as frequent."""
_NUM_EXAMPLES = 10


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
        "masked_shares": [ratio(of_set, num_maskable) for of_set in masked_K.tolist()],
        "turn_lengths_tokens": {str(length): int(count) for length, count in enumerate(counts) if count},
        "block_share_of_turns": ratio(counts[2:].sum(), counts.sum()),
        "block_share_of_tokens": ratio(tokens[2:].sum(), tokens.sum()),
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
