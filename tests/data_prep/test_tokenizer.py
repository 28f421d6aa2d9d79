from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_prep.tokenizer import EOS, MASK, PAD, SOS, UNK, Tokenizer, load_tokenizer, train_tokenizer

SPECIAL_SURFACES = [PAD, UNK, SOS, EOS, MASK]


@pytest.fixture(scope="module", params=[("unigram", False), ("unigram", True), ("bpe", False), ("bpe", True)], ids=str)
def trained(
    request: pytest.FixtureRequest, lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, bool]:
    """Each algorithm, uncased and cased, trained on a text with every character of "[MASK]" in it; and: is it cased?"""
    algorithm, cased = request.param
    text = [*lines, *["[BRACKETED] TOKENS: [MASKED], [PADDED], [UNKNOWN]"] * 50]
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    return train_tokenizer(text, path, vocab_size=700, algorithm=algorithm, cased=cased), cased


def sentencepiece_model(path: Path, lines: list[str], **settings: Any) -> Path:
    """A model trained by SentencePiece itself."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def test_text_survives_encode_and_decode(trained: tuple[Tokenizer, bool], lines: list[str]) -> None:
    tokenizer, cased = trained
    known = [line for line in lines if tokenizer.unk_id not in tokenizer.encode([line])]
    assert len(known) > 0.9 * len(lines)
    for line in known:
        text = " ".join(line.split())
        assert tokenizer.decode(tokenizer.encode([line])) == (text if cased else text.lower())


def test_case_matters_only_to_a_cased_tokenizer(trained: tuple[Tokenizer, bool]) -> None:
    tokenizer, cased = trained
    upper, lower = tokenizer.encode(["ELIZABETH Bennet"]), tokenizer.encode(["elizabeth bennet"])
    assert (upper.tolist() != lower.tolist()) == cased


def test_lines_are_encoded_one_behind_the_other(trained: tuple[Tokenizer, bool], lines: list[str]) -> None:
    tokenizer, _ = trained
    one_by_one = [tokenizer.encode([line]) for line in lines[:20]]
    np.testing.assert_array_equal(tokenizer.encode(lines[:20]), np.concatenate(one_by_one))
    assert tokenizer.encode([]).tolist() == tokenizer.encode(["", "  "]).tolist() == []


def test_a_special_token_written_in_the_text_is_plain_text(trained: tuple[Tokenizer, bool]) -> None:
    tokenizer, cased = trained
    for surface in SPECIAL_SURFACES:
        ids = tokenizer.encode([f"a {surface} b"])
        assert not np.isin(ids, tokenizer.special_ids).any(), surface
        assert tokenizer.decode(ids) == f"a {surface if cased else surface.lower()} b"


def test_special_ids(trained: tuple[Tokenizer, bool]) -> None:
    tokenizer, _ = trained
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id, tokenizer.mask_id]
    assert [tokenizer.piece(i) for i in ids] == SPECIAL_SURFACES
    assert sorted(ids) == tokenizer.special_ids.tolist()
    assert tokenizer.vocab_size == 700
    np.testing.assert_array_equal(tokenizer.normal_ids, np.setdiff1d(np.arange(700), ids))
    assert tokenizer.decode([tokenizer.sos_id, *tokenizer.encode(["tokens"]), tokenizer.eos_id]) == "tokens"


def test_characters_not_in_the_vocabulary_are_unknown(tokenizer: Tokenizer) -> None:
    assert tokenizer.unk_id in tokenizer.encode(["the 日本 of"])


def test_training_twice_gives_identical_bytes(lines: list[str], tmp_path: Path) -> None:
    first, second = (train_tokenizer(lines, tmp_path / name, vocab_size=500) for name in ("a.model", "b.model"))
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256


def test_training_on_one_endless_line_drops_nothing(lines: list[str], tmp_path: Path) -> None:
    """SentencePiece skips a sentence longer than it was told to expect."""
    assert train_tokenizer([" ".join(lines)], tmp_path / "t.model", vocab_size=500).vocab_size == 500


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_the_message_for_a_vocabulary_too_large_names_the_largest_one(
    lines: list[str], tmp_path: Path, algorithm: str
) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(ValueError, match=r"--vocab_size 50000: this text supports at most \d+ entries") as failure:
        train_tokenizer(lines, path, vocab_size=50_000, algorithm=algorithm)
    assert not list(tmp_path.iterdir())
    largest = int(re.search(r"at most (\d+)", str(failure.value))[1])  # type: ignore[index]
    assert train_tokenizer(lines, path, vocab_size=largest, algorithm=algorithm).vocab_size == largest


def test_the_message_for_a_vocabulary_too_small_names_the_smallest_one(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocab_size 20: the text's characters alone need \d+ entries") as failure:
        train_tokenizer(lines, tmp_path / "t.model", vocab_size=20)
    smallest = int(re.search(r"need (\d+)", str(failure.value))[1])  # type: ignore[index]
    assert train_tokenizer(lines, tmp_path / "t.model", vocab_size=smallest).vocab_size == smallest


@pytest.mark.parametrize("after_lines", [0, 1, 100])
def test_an_error_of_the_corpus_passes_through_training(lines: list[str], tmp_path: Path, after_lines: int) -> None:
    def broken() -> Iterator[str]:
        yield from lines[:after_lines]
        raise ValueError("novel.txt: not UTF-8 at byte 12")

    with pytest.raises(ValueError, match=r"^novel\.txt: not UTF-8 at byte 12$"):
        train_tokenizer(broken(), tmp_path / "t.model", vocab_size=100)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "user_defined_symbols": [MASK],
            "pad_id": 3,
            "unk_piece": UNK,
            "pad_piece": PAD,
            "bos_piece": SOS,
            "eos_piece": EOS,
        },
    ],
    ids=["usual symbols", "mask is ordinary text"],
)
def test_a_model_without_our_control_symbols_is_refused(
    lines: list[str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = sentencepiece_model(tmp_path / "foreign.model", lines, **settings)
    missing = r"MASK \(\[MASK\] or <mask>\); give it control symbols for them: `python -m data_prep import-tokenizer"
    with pytest.raises(ValueError, match=rf"foreign\.model: has no special token for (PAD .*, )?{missing}"):
        load_tokenizer(path)


def test_special_ids_are_read_from_the_model_and_bytes_are_no_normal_ids(lines: list[str], tmp_path: Path) -> None:
    path = sentencepiece_model(
        tmp_path / "other_order.model", lines, control_symbols=[MASK], unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        pad_piece=PAD, unk_piece=UNK, bos_piece=SOS, eos_piece=EOS, byte_fallback=True,
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    ids = [tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert ids == [0, 1, 2, 3, 4]
    assert not any(re.fullmatch("<0x..>", tokenizer.piece(i)) for i in tokenizer.normal_ids)
    assert len(tokenizer.normal_ids) == 400 - 5 - 256


@pytest.mark.parametrize("content", [b"", b"not a model\n" * 99, bytes(1000)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")


def test_half_a_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = tokenizer.path.read_bytes()
    (tmp_path / "t.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"t\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")


def test_no_such_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-tokenizer"):
        load_tokenizer(tmp_path / "missing.model")


def test_words_start_where_white_space_was(trained: tuple[Tokenizer, bool]) -> None:
    tokenizer, _ = trained
    ids = tokenizer.encode(["the truth universally acknowledged"]).tolist()
    starts = [position for position, token_id in enumerate(ids) if tokenizer.is_word_start(token_id)]
    words = ["".join(map(tokenizer.surface, ids[i:j])) for i, j in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert words == ["the", "truth", "universally", "acknowledged"]
    assert all(map(tokenizer.is_word_start, [tokenizer.pad_id, tokenizer.sos_id, tokenizer.eos_id, tokenizer.mask_id]))


@pytest.mark.parametrize("name", ["t.json", "vocab.txt"])
def test_a_model_is_not_written_under_another_kinds_name(lines: list[str], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: would hold a SentencePiece model; .* ends in \.model"):
        train_tokenizer(lines, tmp_path / name, vocab_size=500)
    assert not list(tmp_path.iterdir())
