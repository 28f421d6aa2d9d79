"""The tokenizers: SentencePiece and WordPiece behind one interface, their special ids, and training one."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_prep.files import sha256_of_file, write_whole
from data_prep.words import IdsOfWords

PAD, UNK, SOS, EOS, MASK = "[PAD]", "[UNK]", "[SOS]", "[EOS]", "[MASK]"
ROLE_PIECES = {
    "PAD": (PAD, "<pad>"),
    "SOS": (SOS, "[CLS]", "<s>"),
    "EOS": (EOS, "[SEP]", "</s>"),
    "MASK": (MASK, "<mask>"),
}
"""The names under which known vocabularies have each special token; the first one that is a special token counts."""
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = len(ROLE_PIECES) + 2, 2**24
"""Entries of a tokenizer that is trained: the special tokens, the unknown one and one for text; what no text supports."""
_REMEDY_JSON = "make it of a vocab.txt: `python -m data_prep import-tokenizer --from vocab.txt --tokenizer OUT.json`"
_WORD_START = "▁"  # of a SentencePiece entry: what it writes for a space
_TEXTS_PER_CALL = 2**14  # SentencePiece holds what it makes of them several times over
_TRAINING_LINE_BYTES = 16_384  # SentencePiece silently drops longer sentences than it was told to expect
_TRAINING_THREADS = 2  # fixed: sums over threads would make the model depend on the machine


class Tokenizer(ABC):
    """Text to token ids and back. Text can never produce a special id besides `unk_id`.

    Special ids are read from the file, never assumed. `normal_ids` are the ids that text can be made of: those that
    may stand in for a masked token.
    """

    file_name: ClassVar[str]
    """What the file is called in a data set, a run or an export."""

    path: Path
    sha256: str
    vocab_size: int
    pad_id: int
    unk_id: int
    sos_id: int
    eos_id: int
    mask_id: int
    special_ids: np.ndarray
    normal_ids: np.ndarray

    def _set_ids(self, special_id: Callable[[str], int | None], is_text: Sequence[bool], remedy: str) -> None:
        """`special_id` gives the id of a special token's name, None where text could spell it or there is none."""
        found = {
            role: [i for name in names if (i := special_id(name)) is not None] for role, names in ROLE_PIECES.items()
        }
        if missing := [f"{role} ({' or '.join(ROLE_PIECES[role])})" for role, ids in found.items() if not ids]:
            raise ValueError(f"{self.path}: has no special token for {', '.join(missing)}; {remedy}")
        self.pad_id, self.sos_id, self.eos_id, self.mask_id = (found[role][0] for role in ("PAD", "SOS", "EOS", "MASK"))
        self.special_ids = np.array(sorted({self.pad_id, self.unk_id, self.sos_id, self.eos_id, self.mask_id}))
        self.normal_ids = np.setdiff1d(np.flatnonzero(is_text), self.special_ids)

    def encode(self, lines: Sequence[str]) -> np.ndarray:
        """Token ids of the lines one behind the other, int32 [num_tokens]; without special tokens."""
        return self.encode_texts(["\n".join(lines).encode()])[0]

    @abstractmethod
    def encode_texts(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the lines of all texts, in UTF-8, one behind the other, as of `encode`, and how many of each text.

        One call for many texts is faster: millions of characters are many.
        """

    def forget_words(self) -> None:
        """Let go of what is remembered for encoding faster."""
        return

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and which characters of the text each stands for, from the first to behind the last."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out, an unknown one is what the vocabulary writes, here " [UNK] "."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """The vocabulary entry itself, with its mark of a word's start (`▁`) or inside (`##`)."""

    @abstractmethod
    def id_of_piece(self, piece: str) -> int:
        """The id of a vocabulary entry, special ones included; `unk_id` for what is none."""

    @abstractmethod
    def surface(self, token_id: int) -> str:
        """The vocabulary entry without that mark."""

    @abstractmethod
    def is_word_start(self, token_id: int) -> bool:
        """Whether a word begins here, as with special tokens; the unknown one may stand inside a word of SentencePiece's."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file: WordPiece in a .json, else SentencePiece.

    Raises FileNotFoundError, or ValueError if `path` is neither or lacks a special token.
    """
    if not path.is_file():
        raise FileNotFoundError(
            2, "no such tokenizer; make one with `python -m data_prep train-tokenizer` or `import-tokenizer`", str(path)
        )
    if path.suffix == ".txt":
        raise ValueError(
            f"{path}: a vocabulary alone does not say how text is normalised; make a tokenizer of it with "
            f"`python -m data_prep import-tokenizer --from {path} --tokenizer OUT.json`"
        )
    return WordPiece(path) if path.suffix == ".json" else SentencePiece(path)


class SentencePiece(Tokenizer):
    """A SentencePiece model, unigram or BPE, whose special tokens are control symbols.

    Where no entry spans a space, a text's ids are those of its words one behind the other, each encoded by itself. The
    library, given a whole line, adds up scores over all of it, so rounding may decide otherwise between two segmentations
    of a word that are equally good.
    """

    file_name = "tokenizer.model"
    is_by_word: bool
    """Whether no entry spans a space, and ids are those of the words."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.is_by_word = _is_by_word(sentencepiece_model_pb2.ModelProto.FromString(content))
        self._ids_of_words = IdsOfWords(self._encode_each)
        self.sha256 = sha256_of_file(path)
        self.vocab_size = self._model.vocab_size()
        self.unk_id = self._model.unk_id()
        is_text = [
            not (self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i) or self._model.is_byte(i))
            for i in range(self.vocab_size)
        ]  # fmt: skip
        remedy = f"give it control symbols for them: `python -m data_prep import-tokenizer --from {path} --tokenizer OUT.model`"
        self._set_ids(self._control_id, is_text, remedy)

    def _control_id(self, piece: str) -> int | None:
        token_id = int(self._model.piece_to_id(piece))
        return token_id if self._model.is_control(token_id) else None

    def encode_texts(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if self.is_by_word:
            return self._ids_of_words(texts)
        lines_of_texts = [text.decode().split("\n") for text in texts]
        ids, num_ids = self._encode_each(list(chain.from_iterable(lines_of_texts)))
        lines_before = np.cumsum([0, *map(len, lines_of_texts)])
        return ids, np.diff(np.concatenate([[0], np.cumsum(num_ids)])[lines_before])

    def forget_words(self) -> None:
        self._ids_of_words.forget()

    def _encode_each(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the texts one behind the other, and how many of each."""
        # What `encode(texts, out_type="numpy")` calls, without the array that it makes of each text.
        encode = self._model._processor._EncodeAsBufferBatch  # type: ignore[attr-defined]
        encoded: list[bytes] = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            some = texts[start : start + _TEXTS_PER_CALL]
            encoded += map(bytes, encode(some, 1, None, False, -1, 0.1, False, False, False))
        ids = np.frombuffer(b"".join(encoded), dtype=np.int32)
        return ids, np.array([len(of_text) // ids.itemsize for of_text in encoded], dtype=np.int64)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for part in re.finditer("[^ ]+" if self.is_by_word else "(?s).+", text):
            encoded, start = self._model.encode(part[0], out_type="offset_mapping"), part.start()
            ids += encoded["ids"]
            spans += [(start + first, start + end) for first, end in encoded["offsets"]]
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._model.decode([int(i) for i in ids]))

    def piece(self, token_id: int) -> str:
        return str(self._model.id_to_piece(int(token_id)))

    def id_of_piece(self, piece: str) -> int:
        return int(self._model.piece_to_id(piece))

    def surface(self, token_id: int) -> str:
        return self.piece(token_id).removeprefix(_WORD_START)

    def is_word_start(self, token_id: int) -> bool:
        return bool(self._model.is_control(int(token_id))) or self.piece(token_id).startswith(_WORD_START)


def _is_by_word(model: Any) -> bool:
    """Whether the ids of a text are those of what stands between its spaces.

    So it is if every space begins an entry and neither an entry, a rule of normalisation nor a run of unknown characters,
    which becomes one id, goes on behind one.
    """
    kind, rules = sentencepiece_model_pb2.ModelProto.SentencePiece, model.normalizer_spec
    entries = {entry.piece: entry.type for entry in model.pieces}
    in_text = {piece for piece, of in entries.items() if of not in (kind.CONTROL, kind.UNKNOWN)}
    return (
        model.trainer_spec.model_type != model.trainer_spec.WORD
        and not model.trainer_spec.treat_whitespace_as_suffix
        and rules.name in ("nmt_nfkc", "nmt_nfkc_cf")  # no rule of theirs has a space in what it replaces
        and rules.add_dummy_prefix
        and rules.remove_extra_whitespaces
        and rules.escape_whitespaces
        and entries.get(_WORD_START) == kind.NORMAL
        and not any(_WORD_START in piece[1:] or " " in piece for piece in in_text)
    )


class WordPiece(Tokenizer):
    """BERT's tokenizer, in the `tokenizers` library's own format.

    A special token's name has punctuation in it, at which BERT splits text: so text cannot spell it, and the library's
    own search for such names, which would find them, is not used.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            stored = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not a file of the `tokenizers` library ({error}); {_REMEDY_JSON}") from None
        _refuse_unlike_bert(path, stored)
        self._model = tokenizers.Tokenizer(stored.model)
        self._model.normalizer, self._model.pre_tokenizer = stored.normalizer, stored.pre_tokenizer
        self._prefix: str = stored.model.continuing_subword_prefix
        self._model.decoder = tokenizers.decoders.WordPiece(prefix=self._prefix)
        self.sha256 = sha256_of_file(path)
        vocabulary = self._model.get_vocab()
        self.vocab_size = len(vocabulary)
        self._pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        self.unk_id = vocabulary[stored.model.unk_token]
        is_text = [is_one_word(piece.removeprefix(self._prefix)) for piece in self._pieces]

        def special_id(piece: str) -> int | None:
            token_id = vocabulary.get(piece)
            return None if token_id is None or is_text[token_id] else token_id

        self._set_ids(special_id, is_text, _REMEDY_JSON)
        self._not_decoded = set(self.special_ids.tolist()) - {self.unk_id}

    def encode_texts(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [
            [i for line in text.decode().split("\n") for i in self._model.encode(line, add_special_tokens=False).ids]
            for text in texts
        ]
        return np.fromiter(chain.from_iterable(encoded), dtype=np.int32), np.array([*map(len, encoded)], dtype=np.int64)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._model.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if int(i) not in self._not_decoded]
        return str(self._model.decode(kept, skip_special_tokens=False))

    def piece(self, token_id: int) -> str:
        return self._pieces[token_id]

    def id_of_piece(self, piece: str) -> int:
        token_id = self._model.token_to_id(piece)
        return self.unk_id if token_id is None else int(token_id)

    def surface(self, token_id: int) -> str:
        return self._pieces[token_id].removeprefix(self._prefix)

    def is_word_start(self, token_id: int) -> bool:
        return not self._pieces[token_id].startswith(self._prefix)


def is_one_word(text: str) -> bool:
    """Whether BERT leaves `text` in one piece, so that WordPiece may find it in a text."""
    return len(tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


def _refuse_unlike_bert(path: Path, stored: tokenizers.Tokenizer) -> None:
    """A tokenizer.json may describe anything; what is not BERT's would be taken for it, and give other ids."""
    for part, expected in (
        (stored.model, tokenizers.models.WordPiece),
        (stored.normalizer, tokenizers.normalizers.BertNormalizer),
        (stored.pre_tokenizer, tokenizers.pre_tokenizers.BertPreTokenizer),
    ):
        if not isinstance(part, expected):
            raise ValueError(f"{path}: has {type(part).__name__}, expected {expected.__name__}; {_REMEDY_JSON}")
    vocabulary = stored.get_vocab(with_added_tokens=False)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"{path}: ids of its {len(vocabulary)} entries are not 0, 1, 2, ...; {_REMEDY_JSON}")
    if stored.model.unk_token not in vocabulary:
        raise ValueError(f"{path}: {stored.model.unk_token} for the unknown is not in its vocabulary; {_REMEDY_JSON}")
    for token_id, token in stored.get_added_tokens_decoder().items():
        if vocabulary.get(token.content) != token_id or not token.special:
            raise ValueError(
                f"{path}: its added token {token.content} is no special token of its vocabulary; {_REMEDY_JSON}"
            )


def train_tokenizer(
    lines: Iterable[str], path: Path, *, vocab_size: int, algorithm: str = "unigram", cased: bool = False
) -> Tokenizer:
    """Train a SentencePiece model on `lines` and write it, whole, to `path`.

    Uncased is a matter of normalisation (nmt_nfkc_cf), so raw text can be given to the finished model.
    Raises ValueError if the text cannot support `vocab_size` entries, or `path` is named like another kind's file.
    """
    if path.suffix in (".json", ".txt"):
        raise ValueError(f"{path}: would hold a SentencePiece model; choose a name that ends in .model")
    model = io.BytesIO()
    guarded = _Guarded(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded.bounded_lines(), model_writer=model, vocab_size=vocab_size, model_type=algorithm,
            normalization_rule_name="nmt_nfkc" if cased else "nmt_nfkc_cf", character_coverage=0.9995,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=[MASK],
            pad_piece=PAD, unk_piece=UNK, bos_piece=SOS, eos_piece=EOS, unk_surface=f" {UNK} ",
            max_sentence_length=_TRAINING_LINE_BYTES, num_threads=_TRAINING_THREADS, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if guarded.error:
            raise guarded.error from None
        raise ValueError(_why_training_failed(str(error), vocab_size)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, model.getvalue())
    return SentencePiece(path)


class _Guarded:
    """Lines for SentencePiece, which would bury an exception of theirs in one of its own."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.error: Exception | None = None

    def bounded_lines(self) -> Iterator[str]:
        step = _TRAINING_LINE_BYTES // 4  # a character is at most 4 bytes
        try:
            for line in self._lines:
                for start in range(0, len(line), step):
                    yield line[start : start + step]
        except Exception as error:
            self.error = error
            raise


def _why_training_failed(message: str, vocab_size: int) -> str:
    if match := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"--vocab_size {vocab_size}: this text supports at most {match[1]} entries; ask for fewer or give more text"
        )
    if match := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return f"--vocab_size {vocab_size}: the text's characters alone need {match[1]} entries; ask for more"
    return f"--vocab_size {vocab_size}: SentencePiece could not train on this text: {message}"
