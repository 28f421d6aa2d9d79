"""The SentencePiece tokenizer: training it, loading it, and its special ids."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.files import sha256_of_file, write_whole

PAD, UNK, SOS, EOS, MASK = "[PAD]", "[UNK]", "[SOS]", "[EOS]", "[MASK]"
_TRAINING_LINE_BYTES = 16_384  # SentencePiece silently drops longer sentences than it was told to expect
_TRAINING_THREADS = 2  # fixed: sums over threads would make the model depend on the machine


class Tokenizer:
    """A SentencePiece model with the five special tokens of this project.

    Special ids are read from the model, never assumed. `normal_ids` are the ids that text can be made of: those that
    may stand in for a masked token.
    """

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, or ValueError if `path` is no SentencePiece model with [PAD] [SOS] [EOS] [MASK]."""
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(
                2, "no such tokenizer; make one with `python -m data_prep train-tokenizer`", str(path)
            )
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.vocab_size: int = self._model.vocab_size()
        self.unk_id: int = self._model.unk_id()
        self.pad_id, self.sos_id, self.eos_id, self.mask_id = (self._special_id(p) for p in (PAD, SOS, EOS, MASK))
        self.special_ids = np.array(sorted({self.pad_id, self.unk_id, self.sos_id, self.eos_id, self.mask_id}))
        is_text = [
            not (self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i) or self._model.is_byte(i))
            for i in range(self.vocab_size)
        ]  # fmt: skip
        self.normal_ids = np.flatnonzero(is_text)
        self.sha256 = sha256_of_file(path)

    def _special_id(self, piece: str) -> int:
        token_id = self._model.piece_to_id(piece)
        if token_id == self.unk_id or not self._model.is_control(token_id):
            raise ValueError(
                f"{self.path}: has no control symbol {piece}; expected a model made by `python -m data_prep train-tokenizer`"
            )
        return int(token_id)

    def encode(self, lines: Sequence[str]) -> np.ndarray:
        """Token ids of the lines one behind the other, int32 [num_tokens]; without special tokens."""
        encoded = self._model.encode(list(lines))
        return np.fromiter((i for ids in encoded for i in ids), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out, an unknown one is " [UNK] "."""
        return str(self._model.decode([int(i) for i in ids]))

    def piece(self, token_id: int) -> str:
        """The vocabulary entry itself, `▁` at the start of a word."""
        return str(self._model.id_to_piece(int(token_id)))


def train_tokenizer(
    lines: Iterable[str], path: Path, *, vocab_size: int, algorithm: str = "unigram", cased: bool = False
) -> Tokenizer:
    """Train a SentencePiece model on `lines` and write it, whole, to `path`.

    Uncased is a matter of normalisation (nmt_nfkc_cf), so raw text can be given to the finished model.
    Raises ValueError if the text cannot support `vocab_size` entries.
    """
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
    return Tokenizer(path)


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
