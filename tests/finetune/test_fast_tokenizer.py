"""transformers' fast tokenizer gives the ids that ours gives, for any text."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from support import REPOSITORY

from data_prep.corpus import find_sources, read_documents
from data_prep.import_tokenizer import import_tokenizer
from data_prep.tokenizer import SentencePiece, Tokenizer, train_tokenizer
from finetune.fast_tokenizer import fast_tokenizer

CORPUS = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0[1-2].txt"))
ODD = "naïve café Ærøskøbing 각 한글 ½ пример 日本語 E\u0301"
# What normalisation joins, removes or takes for spaces, and what grapheme clusters are made of.
DIFFICULT = [
    *"aenoAENO12. \t\r\n\x00\x01\x7f", *map(chr, range(0x300, 0x330)), *"éÅąﬁＡａ①½⁄İẞσς", *"ᄀ각가ᅡᆨᄂㄱﾡ한글",
    *"\u00a0\u3000\u200b\u200d\u2581\u2581\u0600\u0e33\u0958\u212b\ufe0f\ufffd", "🇩", "👩", "𝟘",
]  # fmt: skip
TEXTS = st.text() | st.text(st.sampled_from(DIFFICULT)) | st.text(st.characters(max_codepoint=0x500))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return [line for document in read_documents(find_sources(CORPUS)) for line in document.lines]


@pytest.fixture(
    scope="module", params=["unigram uncased", "unigram cased", "bpe uncased", "uncased.json", "cased.json"]
)
def pair(
    request: pytest.FixtureRequest, lines: list[str], vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours, and the same as transformers gets it, through its file."""
    folder = tmp_path_factory.mktemp("fast")
    ours: Tokenizer
    if request.param.endswith(".json"):
        cased = request.param == "cased.json"
        ours = import_tokenizer(vocabulary, folder / request.param, cased=cased, pieces={})
    else:
        algorithm, case = request.param.split()
        ours = train_tokenizer(
            [*lines, ODD], folder / "t.model", vocab_size=500, algorithm=algorithm, cased=case == "cased"
        )
    return ours, tokenizers.Tokenizer.from_str(fast_tokenizer(ours).to_str())


def assert_same_ids(ours: Tokenizer, fast: tokenizers.Tokenizer, text: str) -> None:
    """Or, of SentencePiece, segmentations that are equally good but for rounding, of which it chooses in 32 bits."""
    expected, found = ours.encode([text]).tolist(), fast.encode(text, add_special_tokens=False).ids
    if expected != found:
        assert isinstance(ours, SentencePiece), ascii(text)
        model = sentencepiece_model_pb2.ModelProto.FromString(ours.path.read_bytes())
        sums = [sum(model.pieces[i].score for i in ids) for ids in (expected, found)]
        assert "".join(map(ours.piece, expected)) == "".join(map(ours.piece, found)), ascii(text)
        assert sums[0] == pytest.approx(sums[1], rel=1e-5), ascii(text)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example("e\u0301 E\u0301 q\u0301x\u0301\u0327A\u030a\u0301")
@example("\u2581a \u2581 b\u2581\t c\u2581")
@example("a\r\nb\x01e\x01\u0301\u200b\u2581")
@example("각 각 ﾡ각 1\u20442 ①\u20442 ａ\u0301 🇩🇪👩\u200d👧")
def test_any_text_gives_the_same_ids(pair: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    assume(not any(pair[0].piece(i) in text for i in pair[0].special_ids))  # which are found there, and not by ours
    assert_same_ids(*pair, text)


def test_every_character_gives_the_same_ids(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    """Each beside an ASCII one and beside itself; of the many with nothing to normalise a sample."""
    codes = chain(range(0x3400), range(0x3400, 0x110000, 97), range(0xF900, 0xFFFF))
    texts = [f"a{chr(code)}b {chr(code)}{chr(code)}" for code in codes if not 0xD800 <= code < 0xE000]
    ours, fast = pair
    ids, counts = ours.encode_texts([text.encode() for text in texts])
    expected = np.split(ids, np.cumsum(counts)[:-1])
    for text, ids_of_ours, encoded in zip(
        texts, expected, fast.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if ids_of_ours.tolist() != encoded.ids:
            assert_same_ids(ours, fast, text)


def test_real_lines_give_the_very_same_ids(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], lines: list[str], tmp_path: Path
) -> None:
    ours, fast = pair
    expected, counts = ours.encode_texts([line.encode() for line in lines])
    found = [encoded.ids for encoded in fast.encode_batch(lines, add_special_tokens=False)]
    assert [len(ids) for ids in found] == counts.tolist()
    assert [i for ids in found for i in ids] == expected.tolist()
    assert fast.decode(found[3], skip_special_tokens=False) == ours.decode(found[3])


def test_special_tokens_stand_around_texts_and_are_found_in_them(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, fast = pair
    sos, eos, mask = ours.sos_id, ours.eos_id, ours.mask_id
    first, second = ours.encode(["a man"]).tolist(), ours.encode(["of good"]).tolist()
    encoded = fast.encode("a man", "of good")
    assert encoded.ids == [sos, *first, eos, *second, eos]
    assert encoded.type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    comma = ours.encode(["man,"]).tolist()[-1]  # inside a word, also behind a mask
    text = f"a man {ours.piece(mask)} of good {ours.piece(mask)},"
    assert fast.encode(text).ids == [sos, *first, mask, *second, mask, comma, eos]


def test_what_the_library_cannot_follow_is_refused(sentence_piece: Tokenizer, tmp_path: Path) -> None:
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    for name, type_of, fault in (("▁of▁the", kind.NORMAL, "span words"), ("<sep>", kind.USER_DEFINED, "user-defined")):
        model = sentencepiece_model_pb2.ModelProto.FromString(sentence_piece.path.read_bytes())
        model.pieces.add(piece=name, score=-5.0, type=type_of)
        (tmp_path / "t.model").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=fault):
            fast_tokenizer(SentencePiece(tmp_path / "t.model"))
