"""A vocabulary from elsewhere as a tokenizer of this project: the five special tokens added, no id changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_prep.files import write_whole
from data_prep.tokenizer import ROLE_PIECES, UNK, Tokenizer, is_one_word, load_tokenizer

_Type = sentencepiece_model_pb2.ModelProto.SentencePiece
_SPECIAL = {UNK, *chain.from_iterable(ROLE_PIECES.values())}


def import_tokenizer(source: Path, path: Path, *, cased: bool = False, pieces: Mapping[str, str]) -> Tokenizer:
    """Write the tokenizer `path` (.json) of a BERT vocab.txt, or `path` (.model) of a SentencePiece model.

    `pieces` names, for a role of ROLE_PIECES, an unused entry that is to play it: it is renamed. Otherwise the role falls
    to an entry with a known name, or to a new one at the end. Raises ValueError for what cannot be.
    """
    if not source.is_file():
        raise FileNotFoundError(2, "no such vocabulary; --from takes a vocab.txt or a SentencePiece model", str(source))
    if source.suffix == ".json":
        raise ValueError(f"{source}: needs no import; pass it as --tokenizer, or import the vocab.txt it was made of")
    is_vocabulary = source.suffix == ".txt"
    suffix = ".json" if is_vocabulary else ".model"
    if path.suffix != suffix:
        kind = "WordPiece tokenizer" if is_vocabulary else "SentencePiece model"
        raise ValueError(f"{path}: would hold a {kind}; choose a name that ends in {suffix}")
    if cased and not is_vocabulary:
        raise ValueError(f"--cased: {source} has its own normalisation; --cased is for a vocab.txt")
    content = _word_piece(source, cased, pieces) if is_vocabulary else _sentence_piece(source, pieces)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return load_tokenizer(path)


def _sentence_piece(source: Path, pieces: Mapping[str, str]) -> bytes:
    content = source.read_bytes()
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)
    except RuntimeError:
        raise ValueError(f"{source}: not a SentencePiece model, nor named vocab.txt") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    entries = {entry.piece: entry for entry in model.pieces}
    may_serve = (_Type.CONTROL, _Type.USER_DEFINED, _Type.UNUSED)
    names = [entry.piece for entry in model.pieces]
    for role_id, name in _choose(source, names, lambda piece: entries[piece].type in may_serve, pieces):
        entry = model.pieces[role_id] if role_id < len(model.pieces) else model.pieces.add(score=0.0)
        entry.piece, entry.type = name, _Type.CONTROL
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString(deterministic=True))


def _word_piece(source: Path, cased: bool, pieces: Mapping[str, str]) -> bytes:
    entries = _read_vocabulary(source)
    special = [UNK]

    def may_serve(piece: str) -> bool:
        return piece != UNK and not is_one_word(piece.removeprefix("##"))

    for role_id, name in _choose(source, list(entries), may_serve, pieces):
        entries[role_id : role_id + 1] = [name]
        special.append(name)
    model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(entries)}, unk_token=UNK)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(sorted(special, key=entries.index))
    return str(tokenizer.to_str(pretty=True)).encode() + b"\n"


def _read_vocabulary(source: Path) -> list[str]:
    """Return the entries of a vocab.txt; an entry's index is its id.

    Like BERT's own reader this takes a byte order mark and white space around an entry for no part of it. Blank lines at
    the end are no entries. An entry that text cannot spell may be repeated, as one is in the vocabulary of UniLM v1.2: the
    repetition keeps its id, under a name of its own. Raises ValueError for anything else that is repeated.
    """
    try:
        lines = source.read_bytes().decode("utf-8-sig").rstrip("\r\n \t").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}; expected a BERT vocab.txt") from None
    entries = [line.strip("\r \t") for line in lines]
    if UNK not in entries:
        raise ValueError(f"{source}: has no line {UNK}; expected a BERT vocab.txt, an entry a line")
    first_line: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        if first_line.setdefault(entry, number) != number:
            if entry in _SPECIAL or is_one_word(entry.removeprefix("##")):
                raise ValueError(
                    f"{source}: line {number}: {entry!r} is line {first_line[entry]} too; an id is a line's number"
                )
            entries[number - 1] = f"[unused, line {number}]"
    return entries


def _choose(
    source: Path, names: list[str], may_serve: Callable[[str], bool], pieces: Mapping[str, str]
) -> list[tuple[int, str]]:
    """For each role the id of its entry and what that is called from now on; ids from len(names) on are new."""
    ids = {name: i for i, name in enumerate(names)}
    chosen: dict[int, str] = {}
    num_entries = len(names)
    for role, known in ROLE_PIECES.items():
        own_name = known[0]
        if role in pieces:
            piece, flag = pieces[role], f"--{role.lower()}_piece"
            if piece not in ids:
                raise ValueError(f"{flag} {piece}: {source} has no such entry; without {flag} a new one is added")
            if not may_serve(piece):
                raise ValueError(f"{flag} {piece}: is text in {source}; name an unused entry, or leave {flag} out")
            if own_name in ids and piece != own_name:
                raise ValueError(f"{flag} {piece}: {source} has {own_name} already; leave {flag} out")
            role_id, name = ids[piece], own_name
        elif serving := [piece for piece in known if piece in ids and may_serve(piece)]:
            role_id, name = ids[serving[0]], serving[0]
        elif own_name in ids:
            raise ValueError(f"{source}: its {own_name} is text; name another entry with --{role.lower()}_piece")
        else:
            role_id, name, num_entries = num_entries, own_name, num_entries + 1
        if role_id in chosen:
            raise ValueError(f"{source}: {names[role_id]} cannot be both {chosen[role_id]} and {name}")
        chosen[role_id] = name
    return list(chosen.items())
