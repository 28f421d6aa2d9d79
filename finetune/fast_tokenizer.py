"""A tokenizer of ours as a file of the `tokenizers` library, the form of transformers' fast tokenizers, with the same ids.

WordPiece is in that form already. SentencePiece is made of the library's own parts, so that no code goes with the file:

- SentencePiece replaces, from left to right, the longest sequence for which its rules have a replacement. The library's
  `Precompiled` knows the rules but looks at grapheme clusters, and may take a shorter one. So each unit of what SentencePiece
  would see is set apart by a control character, which the rules remove and no cluster reaches over; rules for several characters
  are replaced one by one, and `Precompiled` sees single characters.
- Of those rules only such need an entry of their own as make a character that the vocabulary has; all others make the unknown.
- Where no entry spans a space, ids are those of the words, so that splitting at spaces changes nothing.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from data_prep.tokenizer import SentencePiece, Tokenizer

_SPACE = "▁"
_APART, _REST = "\x01", "\x02"  # removed by the rules nmt_nfkc and nmt_nfkc_cf
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_Trainer = sentencepiece_model_pb2.TrainerSpec


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer with special tokens around texts and pairs: [SOS] S1 [EOS] S2 [EOS], types 0 and 1.

    Names of special tokens are found in text, as transformers expects. Raises ValueError for a SentencePiece model that the
    library cannot be made to follow.
    """
    if isinstance(tokenizer, SentencePiece):
        fast = _sentence_piece(tokenizer)
    else:
        fast = tokenizers.Tokenizer.from_buffer(tokenizer.path.read_bytes())
        fast.no_padding()
        fast.no_truncation()
    special = [tokenizer.piece(token_id) for token_id in tokenizer.special_ids]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    sos, eos = tokenizer.piece(tokenizer.sos_id), tokenizer.piece(tokenizer.eos_id)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{sos}:0 $A:0 {eos}:0", pair=f"{sos}:0 $A:0 {eos}:0 $B:1 {eos}:1",
        special_tokens=[(sos, tokenizer.sos_id), (eos, tokenizer.eos_id)],
    )  # fmt: skip
    return fast


def tokenizer_config(tokenizer: Tokenizer, max_positions: int) -> dict[str, Any]:
    """What transformers' tokenizer_config.json says beside that file."""
    roles = {"pad": "pad_id", "unk": "unk_id", "cls": "sos_id", "sep": "eos_id", "mask": "mask_id"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False, "padding_side": "right", "truncation_side": "right",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": tokenizer.piece(getattr(tokenizer, name)) for role, name in roles.items()},
    }  # fmt: skip


def _sentence_piece(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    _refuse_unlike(tokenizer, model)
    entries = [(entry.piece, entry.score) for entry in model.pieces]
    unknown = model.pieces[tokenizer.unk_id].piece
    if model.trainer_spec.model_type == _Trainer.UNIGRAM:
        fast = tokenizers.Tokenizer(models.Unigram(entries, unk_id=tokenizer.unk_id, byte_fallback=False))
    else:
        ids = {piece: i for i, (piece, _) in enumerate(entries)}
        fast = tokenizers.Tokenizer(models.BPE(ids, _merges(model), unk_token=unknown, fuse_unk=True))
    letters = set("".join(entry.piece for entry in model.pieces if entry.type == _Piece.NORMAL))
    fast.normalizer = _normalizer(model.normalizer_spec.precompiled_charsmap, letters)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first")  # not behind a [MASK]
    fast.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    control = [entry.piece for entry in model.pieces if entry.type == _Piece.CONTROL]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return fast


def _refuse_unlike(tokenizer: SentencePiece, model: Any) -> None:
    odd = [entry.piece for entry in model.pieces if entry.type not in (_Piece.NORMAL, _Piece.CONTROL, _Piece.UNKNOWN)]
    faults = [
        fault for is_fault, fault in (
            (model.trainer_spec.model_type not in (_Trainer.UNIGRAM, _Trainer.BPE), "is neither unigram nor BPE"),
            (not tokenizer.is_by_word, "has entries or rules of normalisation that span words"),
            (bool(odd), f"has user-defined, unused or byte entries, as {odd[:1]}"),
        ) if is_fault
    ]  # fmt: skip
    if faults:
        raise ValueError(
            f"{tokenizer.path}: transformers cannot be made to give its ids, as it {' and '.join(faults)}; "
            "the model can be converted --to pmlm or --to unilm"
        )


def _merges(model: Any) -> list[tuple[str, str]]:
    """What BPE joins, the best first: every way to make an entry of two others, as SentencePiece knows no other order."""
    scores = {entry.piece: entry.score for entry in model.pieces if entry.type == _Piece.NORMAL}
    ways = [
        (-score, len(piece[:at]), piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(ways)]


def _normalizer(charsmap: bytes, letters: set[str]) -> normalizers.Normalizer:
    """What SentencePiece makes of a text, but for the ▁; `letters` are those of the entries."""
    rules = _rules(charsmap)
    sequences = {key: value for key, value in rules.items() if len(key) > 1}
    if any(
        ord(min(key[1:])) < 0x80 or any(character in rules for character in value) for key, value in sequences.items()
    ):
        raise ValueError("its rules of normalisation are not those of nmt_nfkc or nmt_nfkc_cf, whatever their name")
    known, unknown = defaultdict(list), []
    for key, value in sequences.items():
        if set(value) & letters:
            known[value].append(key)
        else:
            unknown.append(key)
    joined = [(keys, value) for value, keys in sorted(known.items())]
    if unknown:
        joined.append((unknown, sequences[unknown[0]]))
    ascii, other, sequence = r"[\x00-\x7F]", r"[^\x00-\x7F]", _pattern(sequences)
    return normalizers.Sequence([
        normalizers.Replace(Regex(rf"(?!{ascii}{{3}}|{ascii}{{1,2}}\z)(?:{sequence}|{ascii}(?={ascii}?{other})|{other})\K"), _APART),
        # First a sequence's first character is replaced, then the rest removed, so that offsets are those of the first.
        *(normalizers.Replace(Regex(_pattern(keys, of_first=True)), value + _REST) for keys, value in joined),
        normalizers.Replace(Regex(rf"{_REST}{other}+(?={_APART})"), ""),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(Regex(r" +\z"), ""),
        normalizers.Replace(Regex(" +"), " "),
    ])  # fmt: skip


def _rules(charsmap: bytes) -> dict[str, str]:
    """What is replaced by what: the size of a double array, the array (Darts, in which units hold 8 bits of label, a
    leaf's mark and an offset), then the replacements, each ended by a zero."""
    size = int(struct.unpack_from("<I", charsmap)[0])
    units, replacements = np.frombuffer(charsmap, "<u4", size // 4, 4), charsmap[4 + size :]
    bases = np.arange(len(units), dtype=np.uint32) ^ (units >> 10 << ((units & 0x200) >> 6))
    children = bases[:, None] ^ np.arange(1, 256, dtype=np.uint32)
    is_there = children < len(units)
    is_there &= units[np.where(is_there, children, 0)] & 0x800000FF == np.arange(1, 256)
    children, labels = children[is_there], (np.nonzero(is_there)[1] + 1).astype(np.uint8)
    num_children = is_there.sum(axis=1)
    first_child = np.cumsum(num_children) - num_children
    rules: dict[str, str] = {}
    nodes: np.ndarray = np.zeros(1, dtype=np.uint32)
    keys: np.ndarray = np.zeros((1, 0), dtype=np.uint8)
    while len(nodes):
        is_leaf = (units[nodes] >> 8 & 1).astype(bool)
        starts = (units[bases[nodes[is_leaf]]] & 0x7FFFFFFF).tolist()
        for key, start in zip(map(bytes, keys[is_leaf]), starts, strict=True):
            rules[key.decode()] = replacements[start : replacements.index(b"\0", start)].decode()
        counts = num_children[nodes]
        nth_child = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        of_nodes = np.repeat(first_child[nodes], counts) + nth_child
        keys = np.column_stack([np.repeat(keys, counts, axis=0), labels[of_nodes]])
        nodes = children[of_nodes]
    return rules


def _pattern(sequences: Iterable[str], *, of_first: bool = False) -> str:
    """A regular expression of any of them, the longest first, with what they share written once.

    `of_first`: of the first character of one that is set apart.
    """
    trie: dict[str, Any] = {}
    for sequence in sequences:
        node = trie
        for character in sequence:
            node = node.setdefault(character, {})
        node[""] = {}
    return rf"(?<![^{_APART}]){_branches(trie, '(?={}' + _APART + ')')}" if of_first else _branches(trie)


def _branches(trie: dict[str, Any], rest_format: str = "{}") -> str:
    by_rest: dict[str, list[str]] = defaultdict(list)
    for character, rest in trie.items():
        if character:
            by_rest[rest_format.format(_branches(rest))].append(character)
    if not by_rest:
        return ""
    parts = [
        (f"[{''.join(re.escape(c) for c in characters)}]" if len(characters) > 1 else re.escape(characters[0])) + rest
        for rest, characters in by_rest.items()
    ]
    return f"(?:{'|'.join(parts)})" + ("?" if "" in trie else "")


def is_lowercase(tokenizer: Tokenizer) -> bool:
    """Whether a WordPiece tokenizer makes text lower-case."""
    return bool(json.loads(tokenizer.path.read_bytes())["normalizer"]["lowercase"])
