"""A text's ids are those of its words, for every SentencePiece model of which that is true, and for no other."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceNormalizer, sentencepiece_model_pb2
from support import assert_ids_of_library

from data_prep.tokenizer import EOS, MASK, PAD, SOS, UNK, Tokenizer, load_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"normalization_rule_name": "nmt_nfkc_cf"},
    "unigram with bytes and symbols": {"byte_fallback": True, "user_defined_symbols": ["<extra_id_0>", "(", ")"]},
    "bpe": {"model_type": "bpe"},
    "bpe with symbols": {"model_type": "bpe", "user_defined_symbols": ["<extra_id_0>", "(", ")"]},
    "char": {"model_type": "char", "normalization_rule_name": "nmt_nfkc_cf"},
}
SPACES = [chr(c) for c in (*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2010), 0x2028, 0x2029)]
SPACES += list("\u202f\u205f\u2060\u3000\u2581\ufeff\ufffd\u180e")
ODD = [
    "\0",
    "\x01",
    "\x7f",
    "\xad",
    "\u0301",
    "\u0308\u0342",
    "a\u0308",
    "\xa8",
    "\ufdfa",
    "\ufdfb",
    "\u200d",
    "ﬁ",
    "Ⅷ",
    "①",
]
WORDS = [
    "truth",
    "universally",
    "the",
    "of",
    "日本",
    "カ\u3099",
    "가각",
    "שלום",
    "مرحبا",
    "naïve",
    "🙂",
    "👩\u200d👧",
    "======",
    "iii",
    "1500),",
]
SYMBOLS = ["<extra_id_0>", "<s>", "[MASK]", "<0x41>", "(", ")", "▁of", "▁▁"]
LINES = st.lists(
    st.one_of(
        st.just(" "), st.sampled_from(SPACES), st.sampled_from(WORDS), st.sampled_from(ODD), st.sampled_from(SYMBOLS),
        st.text(max_size=8),
    ),
    max_size=12,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = io.BytesIO()
    text = [*lines[:300], *["日本 カナ 가각 שלום مرحبا ======== iiii ----"] * 3]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, minloglevel=2, num_threads=1, vocab_size=420,
        hard_vocab_limit=False, control_symbols=[MASK], pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece=PAD,
        unk_piece=UNK, bos_piece=SOS, eos_piece=EOS, **KINDS[request.param],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("kind") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@cache
def library(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def by_word(model: sentencepiece.SentencePieceProcessor, line: str) -> list[int]:
    """The plain definition."""
    return [i for word in line.split(" ") for i in model.encode(word)]


@given(line=LINES)
@settings(max_examples=150, deadline=None)
def test_a_lines_ids_are_those_of_its_words_and_of_the_library(kind: Tokenizer, line: str) -> None:
    model, ids = library(kind.path), kind.encode([line]).tolist()
    assert ids == by_word(model, line)
    assert_ids_of_library(ids, model, line)
    with_offsets, spans = kind.encode_with_offsets(line)
    assert with_offsets == ids
    assert all(0 <= first <= end <= len(line) for first, end in spans)
    assert spans == sorted(spans)


def test_real_text(kind: Tokenizer, lines: list[str]) -> None:
    model = library(kind.path)
    ids, num_ids = kind.encode_texts([line.encode() for line in lines])
    assert ids.dtype == np.int32
    for line, of_line in zip(lines, np.split(ids, np.cumsum(num_ids)[:-1]), strict=True):
        assert_ids_of_library(of_line.tolist(), model, line)


def test_documents_without_lines_and_lines_without_words(kind: Tokenizer) -> None:
    ids, num_ids = kind.encode_texts([b"", b"of the", b"\n", b"\n  \n\x01", b"of\nthe", b""])
    of_the = kind.encode(["of the"])
    np.testing.assert_array_equal(ids, np.tile(of_the, 2))
    assert num_ids.tolist() == [0, len(of_the), 0, 0, len(of_the), 0]
    assert [of.tolist() for of in kind.encode_texts([])] == [[], []]


def _rules(model: Any, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(model.normalizer_spec, name, value)


def _entry(model: Any, piece: str, new: str, **changes: Any) -> None:
    entry = next(entry for entry in model.pieces if entry.piece == piece)
    entry.piece = new
    for name, value in changes.items():
        setattr(entry, name, value)


def _custom_rules(model: Any) -> None:
    rules = SentencePieceNormalizer(norm_map=[("f t", "t")]).serialized_normalizer_spec()
    model.normalizer_spec.MergeFromString(rules)
    model.normalizer_spec.name = "user_defined"  # as training calls it


def test_a_tie_does_not_depend_on_what_is_before(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The library, which adds up the scores of a line in 32 bits, segments a word otherwise behind some others."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    _entry(model, "▁mr", "語", score=-2.3)
    _entry(model, "▁the", "語語", score=-1.1)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    changed = load_tokenizer(path)
    alone = changed.encode(["語語語"]).tolist()
    before = [" ".join(["acknowledged"] * num_words) for num_words in range(1, 200, 7)]
    ends = [changed.encode([f"{text} 語語語"]).tolist()[-3:] for text in before]
    with_offsets = [changed.encode_with_offsets(f"{text} 語語語") for text in before]
    assert [ids[-3:] for ids, _ in with_offsets] == ends
    assert [spans[-1][1] for _, spans in with_offsets] == [len(text) + 4 for text in before]
    ends_in_library = [ids[-3:] for ids in library(path).encode([f"{text} 語語語" for text in before])]
    assert ends == [alone] * len(before)
    assert ends_in_library != ends
    assert all(sorted(ids) == sorted(alone) for ids in ends_in_library)


_USER = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "an entry with a space inside": (lambda model: _entry(model, "▁mr", "▁of▁the", score=0.0), "of the"),
    "an entry with a space at its end": (lambda model: _entry(model, "▁mr", "語▁", score=0.0), "語 the"),
    "a symbol with a space": (lambda model: _entry(model, "▁mr", "F T", type=_USER), "oF The"),
    "a symbol with the sign of a space": (lambda model: _entry(model, "▁mr", "▁▁", type=_USER), "of ▁▁ the"),
    "no entry for a space": (lambda model: _entry(model, "▁", "<none>"), "日 日"),
    "the space is a symbol": (lambda model: _entry(model, "▁", "▁", type=_USER), "of ▁ the"),
    "no space before the first word": (lambda model: _rules(model, add_dummy_prefix=False), "of the"),
    "all spaces kept": (lambda model: _rules(model, remove_extra_whitespaces=False), "of  the"),
    "spaces not written as a sign": (lambda model: _rules(model, escape_whitespaces=False), "日 日"),
    "space behind the word": (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), "of the"),
    "the sign of a space is no space": (lambda model: _rules(model, name="identity", precompiled_charsmap=b""), "of▁ the"),
    "custom rules": (_custom_rules, "of the"),
    "words only": (lambda model: setattr(model.trainer_spec, "model_type", model.trainer_spec.WORD), "xqxq qxqx"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_for_which_it_is_not_true_gets_whole_lines(tokenizer: Tokenizer, tmp_path: Path, change: str) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    alter, line = CHANGES[change]
    alter(model)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    whole = library(path).encode(line)
    assert whole != by_word(library(path), line)
    ids, num_ids = load_tokenizer(path).encode_texts([f"{line}\nof".encode(), b"", line.encode()])
    of = library(path).encode("of")
    assert ids.tolist() == [*whole, *of, *whole]
    assert num_ids.tolist() == [len(whole) + len(of), 0, len(whole)]
