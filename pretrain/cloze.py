"""Texts with [MASK] that a run fills in at every validation: what it has learnt, for people to read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer import MASK, Tokenizer
from pretrain.history import filled_text
from pretrain.layout import Layout, encoder_layout

SHIPPED_PROMPTS = Path(__file__).with_name("cloze_prompts.txt")
_STAND_IN = "the"  # a word whose tokens a mask takes the place of
_NUM_PREDICTIONS = 5


@dataclass(frozen=True)
class ClozePrompts:
    """Texts, and the model input that they are together: each a sample of one segment, predicted by AE."""

    texts: tuple[str, ...]
    num_masks: tuple[int, ...]
    """Of each text."""
    layout: Layout


def read_prompts(path: Path | None, tokenizer: Tokenizer, max_length_tokens: int) -> ClozePrompts | None:
    """The prompts of a file, a text a line, or of the shipped one; None where the file is empty.

    Raises FileNotFoundError, or ValueError for a line without [MASK] or too long for the model; of the shipped ones those
    are left out.
    """
    file = path or SHIPPED_PROMPTS
    texts, ids, faults = [], [], []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not (text := line.strip()):
            continue
        encoded = _encode(text, tokenizer)
        if tokenizer.mask_id not in encoded:
            faults.append(f"line {number} has no {MASK}")
        elif len(encoded) > max_length_tokens:
            faults.append(f"line {number} has {len(encoded)} tokens, expected at most {max_length_tokens}")
        else:
            texts.append(text)
            ids.append(encoded)
    if faults and path:
        raise ValueError(
            f"{path}: {'; '.join(faults)}; expected a text a line, with {MASK} where a word is to be guessed"
        )
    if not texts:
        return None
    masks = [[place for place, i in enumerate(of_text) if i == tokenizer.mask_id] for of_text in ids]
    layout = encoder_layout(ids, [[0] * len(of_text) for of_text in ids], masks)
    return ClozePrompts(tuple(texts), tuple(map(len, masks)), layout)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """ "[SOS] text [EOS]"; a mask stands for a word, so that what comes behind it is cut as it is behind a word."""
    places, written = [], ""
    for part in re.split(f"({re.escape(MASK)})", text):
        if part == MASK:
            places.append((len(written), len(written) + len(_STAND_IN)))
        written += _STAND_IN if part == MASK else part
    ids, offsets = tokenizer.encode_with_offsets(written)
    encoded, filled = [tokenizer.sos_id], set()
    for token_id, (start, stop) in zip(ids, offsets, strict=True):
        mask = next((n for n, (first, end) in enumerate(places) if start < end and first < stop), None)
        if mask is None:
            encoded.append(token_id)
        elif mask not in filled:
            encoded.append(tokenizer.mask_id)
            filled.add(mask)
    return [*encoded, tokenizer.eos_id]


def fill_in(prompts: ClozePrompts, logits_TV: torch.Tensor, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Of each prompt its text and, of each of its masks, the likeliest entries of the vocabulary with their probabilities.

    `logits_TV`: of all masks, in their order.
    """
    best = logits_TV.float().softmax(dim=1).topk(_NUM_PREDICTIONS)
    predictions = [
        [[tokenizer.surface(i), round(p, 4)] for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    of_masks = iter(predictions)
    return [
        {"text": text, "masks": [next(of_masks) for _ in range(count)]}
        for text, count in zip(prompts.texts, prompts.num_masks, strict=True)
    ]


def in_markdown(prompts: list[dict[str, Any]]) -> str:
    """For TensorBoard."""
    lines = []
    for prompt in prompts:
        odds = "; ".join(", ".join(f"{word} {p:.0%}" for word, p in mask) for mask in prompt["masks"])
        lines.append(f"{filled_text(prompt, '**')}  ({odds})")
    return "\n\n".join(lines)
