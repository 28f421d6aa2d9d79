"""The WordPiece tokenizer against transformers' BertTokenizerFast, made of the same vocab.txt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from data_prep.import_tokenizer import import_tokenizer
from data_prep.shards import DataSet, find_faults
from data_prep.tokenizer import Tokenizer, WordPiece, load_tokenizer

SPECIAL_SURFACES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "[MASK]",
    "[CLS]",
    "[unused0]",
    "##ing",
    "Elizabeth",
    "CAFÉ",
    "e\u0301",
    "日本",
    "don't",
    "ſ",
    "\u00ad",
    "\u200d",
    "\x00",
]
TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*WORDS, " ", "\t", "\u3000"])), max_size=12).map(
    "".join
)


def is_cased(tokenizer: WordPiece) -> bool:
    return not json.loads(tokenizer.path.read_text("utf-8"))["normalizer"]["lowercase"]


@pytest.fixture(scope="session")
def bert(word_piece: WordPiece, bert_vocabulary: Path) -> BertTokenizerFast:
    """It splits the names of special tokens like other text, as in training data nobody means them."""
    bert = BertTokenizerFast(
        vocab=str(bert_vocabulary), do_lower_case=not is_cased(word_piece), split_special_tokens=True
    )
    assert len(bert) == word_piece.vocab_size
    return bert


@given(text=TEXT)
@settings(max_examples=400, deadline=None)
def test_ids_are_berts_on_any_text(word_piece: WordPiece, bert: BertTokenizerFast, text: str) -> None:
    ids = word_piece.encode([text])
    assert ids.tolist() == bert.encode(text, add_special_tokens=False)
    special = set(word_piece.special_ids.tolist()) - {word_piece.unk_id}
    assert not special & set(ids.tolist())
    assert set(ids.tolist()) <= {*word_piece.normal_ids.tolist(), word_piece.unk_id}


def test_ids_are_berts_on_real_text(word_piece: WordPiece, bert: BertTokenizerFast, lines: list[str]) -> None:
    expected = [i for line in lines for i in bert.encode(line, add_special_tokens=False)]
    ids = word_piece.encode(lines)
    assert ids.dtype == np.int32
    assert ids.tolist() == expected
    assert len(set(expected)) > 400
    assert word_piece.encode([]).tolist() == word_piece.encode(["", " "]).tolist() == []


def test_each_id_is_its_line(word_piece: WordPiece, bert_vocabulary: Path) -> None:
    entries = bert_vocabulary.read_text("utf-8").splitlines()
    assert [word_piece.piece(i) for i in range(word_piece.vocab_size)] == entries
    ids = [word_piece.pad_id, word_piece.unk_id, word_piece.sos_id, word_piece.eos_id, word_piece.mask_id]
    assert ids == [entries.index(surface) for surface in SPECIAL_SURFACES] == [0, 3, 4, 5, 6]
    assert word_piece.special_ids.tolist() == sorted(ids)
    assert not {*ids, 1, 2} & set(word_piece.normal_ids.tolist()), "text makes neither special nor unused entries"
    assert {entries.index("##s"), entries.index("the"), entries.index("!")} <= set(word_piece.normal_ids.tolist())


def test_case_matters_only_to_a_cased_tokenizer(word_piece: WordPiece) -> None:
    upper, lower = word_piece.encode(["ELIZABETH Bennet"]), word_piece.encode(["elizabeth bennet"])
    assert (upper.tolist() != lower.tolist()) == is_cased(word_piece)


def test_a_special_token_written_in_the_text_is_plain_text(word_piece: WordPiece) -> None:
    """In it the library's own tokenizer finds the special token."""
    library = tokenizers.Tokenizer.from_file(str(word_piece.path))
    for surface in SPECIAL_SURFACES:
        assert library.encode(f"a {surface} b").tokens == ["a", surface, "b"]
        ids = word_piece.encode([f"a {surface} b"])
        assert [word_piece.piece(ids[i]) for i in (0, 1, -2, -1)] == ["a", "[", "]", "b"]
    assert not np.isin(
        word_piece.encode(["[MASK][CLS]##[SEP]"]), np.setdiff1d(word_piece.special_ids, word_piece.unk_id)
    ).any()


def test_decode_leaves_out_special_tokens_but_the_unknown(word_piece: WordPiece) -> None:
    ids = word_piece.encode(["the acknowledged ☃ truth"]).tolist()
    framed = [word_piece.sos_id, *ids, word_piece.mask_id, word_piece.eos_id, word_piece.pad_id]
    assert word_piece.decode(framed) == word_piece.decode(np.array(framed)) == "the acknowledged [UNK] truth"


def test_words_start_without_the_prefix(word_piece: WordPiece) -> None:
    ids = word_piece.encode(["the acknowledged zzz"]).tolist()
    assert len(ids) > 3
    starts = [i for i, token_id in enumerate(ids) if word_piece.is_word_start(token_id)]
    words = ["".join(map(word_piece.surface, ids[i:j])) for i, j in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert words == ["the", "acknowledged", "zzz"]
    assert all(map(word_piece.is_word_start, word_piece.special_ids))


def test_a_saved_bert_is_opened_with_the_same_ids(
    word_piece: WordPiece, bert: BertTokenizerFast, tmp_path: Path
) -> None:
    """Its tokenizer.json also says to add [CLS] and [SEP], and here to cut and pad: none of it reaches `encode`."""
    bert.backend_tokenizer.enable_padding(length=16)
    bert.backend_tokenizer.enable_truncation(max_length=16)
    bert.save_pretrained(tmp_path)
    bert.backend_tokenizer.no_padding()
    bert.backend_tokenizer.no_truncation()
    opened = load_tokenizer(tmp_path / "tokenizer.json")
    text = ["It is a truth universally acknowledged [MASK] that a single man in possession", "Hm!"]
    assert opened.encode(text).tolist() == word_piece.encode(text).tolist()
    assert opened.special_ids.tolist() == word_piece.special_ids.tolist()


Content = dict[str, Any]


def with_vocabulary(vocabulary: dict[str, int], content: Content) -> Content:
    return {**content, "model": {**content["model"], "vocab": vocabulary}, "added_tokens": []}


def without_entry(entry: str) -> Callable[[Content], Content]:
    """The ids behind the entry move up."""

    def change(content: Content) -> Content:
        entries = [e for e in content["model"]["vocab"] if e != entry]
        return with_vocabulary({e: i for i, e in enumerate(entries)}, content)

    return change


def with_token(entry: str, **changes: Any) -> Callable[[Content], Content]:
    """One more added token, of an entry of the vocabulary or behind it."""

    def change(content: Content) -> Content:
        vocabulary = content["model"]["vocab"]
        token = {"id": vocabulary.get(entry, len(vocabulary)), "content": entry, **changes}
        return {**content, "added_tokens": [*content["added_tokens"], {**content["added_tokens"][0], **token}]}

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda content: [], r"not a file of the `tokenizers` library"),
        (lambda content: {**content, "normalizer": None}, r"has NoneType, expected BertNormalizer"),
        (
            lambda content: {**content, "pre_tokenizer": {"type": "Whitespace"}},
            r"has Whitespace, expected BertPreTokenizer",
        ),
        (
            lambda content: {**content, "model": {"type": "BPE", "vocab": {}, "merges": []}},
            r"has BPE, expected WordPiece",
        ),
        (partial(with_vocabulary, {"[UNK]": 0, "a": 2}), r"ids of its 2 entries are not 0, 1, 2"),
        (
            lambda content: {**content, "model": {**content["model"], "unk_token": "<unk>"}},
            r"<unk> for the unknown is not in its vocabulary",
        ),
        (without_entry("[MASK]"), r"has no special token for MASK \(\[MASK\] or <mask>\)"),
        (without_entry("[CLS]"), r"has no special token for SOS \(\[SOS\] or \[CLS\] or <s>\)"),
        (with_token("<new>"), r"added token <new> is no special token"),
        (with_token("the", special=False), r"added token the is no special token"),
    ],
)
def test_what_is_not_berts_is_refused(
    word_piece: WordPiece, tmp_path: Path, change: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    content = change(json.loads(word_piece.path.read_text("utf-8")))
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=rf"odd\.json: .*{fault}.*import-tokenizer --from vocab\.txt"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json", bytes(100)], ids=str)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.json: not a file of the `tokenizers` library"):
        load_tokenizer(tmp_path / "t.json")


def test_a_vocabulary_is_no_tokenizer(bert_vocabulary: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab\.txt: a vocabulary alone .* import-tokenizer --from .*vocab\.txt"):
        load_tokenizer(bert_vocabulary)


def test_a_data_set_keeps_the_file(
    word_piece: WordPiece, chapters: list[Path], build_data: Callable[..., bool], tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    assert build_data(chapters[:3], folder, tokenizer_path=word_piece.path)
    assert not build_data(chapters[:3], folder, tokenizer_path=word_piece.path)
    data = DataSet(folder)
    assert data.manifest["tokenizer"]["file"] == data.tokenizer.path.name == "tokenizer.json"
    assert not (folder / "tokenizer.model").exists()
    assert data.tokenizer.path.read_bytes() == word_piece.path.read_bytes()
    assert list(find_faults(folder)) == []
    rows = data.read_samples("train", 0, data.num_samples("train")).tokens_BL
    text = [line for chapter in chapters[:3] for line in chapter.read_text("utf-8").split("\n")]
    stored = rows[~np.isin(rows, [word_piece.sos_id, word_piece.eos_id, word_piece.pad_id])]
    assert stored.tolist() == word_piece.encode(text).tolist()

    content = data.tokenizer.path.read_bytes()
    data.close()
    for damaged in (content[:-9], content.replace(b'"the"', b'"teh"'), b""):
        (folder / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not the tokenizer these shards were made with"):
            DataSet(folder)
        assert [fault.partition(":")[0] for fault in find_faults(folder)] == ["tokenizer.json"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: is missing"):
        DataSet(folder)
    assert list(find_faults(folder)) == ["tokenizer.json: is missing"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Callable[..., Path]:
    def write(*entries: str, end: str = "\n", begin: str = "") -> Path:
        (tmp_path / "vocab.txt").write_bytes((begin + "".join(entry + end for entry in entries)).encode())
        return tmp_path / "vocab.txt"

    return write


def imported(source: Path, **pieces: str) -> Tokenizer:
    return import_tokenizer(source, source.with_name("made.json"), pieces=pieces)


def test_missing_special_tokens_are_new_entries_at_the_end(vocabulary: Callable[..., Path]) -> None:
    entries = ["the", "##s", "[UNK]", "[SEP]", "<s>"]
    tokenizer = imported(vocabulary(*entries))
    assert [tokenizer.piece(i) for i in range(tokenizer.vocab_size)] == [*entries, "[PAD]", "[MASK]"]
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id, tokenizer.mask_id] == [
        5,
        2,
        4,
        3,
        6,
    ]
    assert tokenizer.encode(["thes <s> [MASK]"]).tolist() == [0, 1, *[2] * 6]


def test_a_named_entry_takes_the_role_and_keeps_its_id(vocabulary: Callable[..., Path]) -> None:
    entries = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "the"]
    tokenizer = imported(vocabulary(*entries, end="\r\n"), MASK="[unused1]", SOS="[unused0]")
    assert [tokenizer.mask_id, tokenizer.sos_id, tokenizer.eos_id, tokenizer.vocab_size] == [2, 1, 5, 7]
    assert tokenizer.piece(2) == "[MASK]"
    assert tokenizer.normal_ids.tolist() == [6]


@pytest.mark.parametrize(
    ("end", "more"),
    [("\n", {}), ("\r\n", {}), ("\n", {"begin": "\ufeff"}), ("\r\n", {"begin": "\ufeff"}), (" \n", {}), ("\t\r\n", {})],
)
@pytest.mark.parametrize("blank_lines_at_the_end", [0, 1, 3])
def test_how_an_editor_saved_the_vocabulary_changes_nothing(
    vocabulary: Callable[..., Path], end: str, more: dict[str, str], blank_lines_at_the_end: int
) -> None:
    entries = ["[PAD]", "the", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s"]
    tokenizer = imported(vocabulary(*entries, *[""] * blank_lines_at_the_end, end=end, **more))
    assert [tokenizer.piece(i) for i in range(tokenizer.vocab_size)] == entries
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id] == [0, 3, 6]
    assert tokenizer.encode(["thes"]).tolist() == [1, 7]


def test_a_repeated_entry_that_text_cannot_spell_keeps_its_ids(vocabulary: Callable[..., Path]) -> None:
    """As in the vocabulary of UniLM v1.2."""
    entries = ["[PAD]", "[unused0]", "[unused0]", "", "", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "[unused0]"]
    tokenizer = imported(vocabulary(*entries))
    assert tokenizer.vocab_size == len(entries)
    named = {3: "[unused, line 3]", 5: "[unused, line 5]", 11: "[unused, line 11]"}
    expected = [named.get(line, entry) for line, entry in enumerate(entries, start=1)]
    assert [tokenizer.piece(i) for i in range(tokenizer.vocab_size)] == expected
    assert [tokenizer.unk_id, tokenizer.mask_id] == [5, 8]
    assert tokenizer.normal_ids.tolist() == [9]
    assert tokenizer.encode(["the [unused, line 3] [unused0]"]).tolist() == [9, *[5] * 9]


@pytest.mark.parametrize(
    ("entries", "pieces", "fault"),
    [
        (["the", "[PAD]"], {}, r"vocab\.txt: has no line \[UNK\]; expected a BERT vocab\.txt"),
        (["[UNK]", "a", "b", "a"], {}, r"vocab\.txt: line 4: 'a' is line 2 too"),
        (["[UNK]", "##a", "##a"], {}, r"vocab\.txt: line 3: '##a' is line 2 too"),
        (["[UNK]", "[PAD]", "[PAD]"], {}, r"vocab\.txt: line 3: '\[PAD\]' is line 2 too"),
        (["[UNK]", "the"], {"MASK": "the"}, r"--mask_piece the: is text in .*vocab\.txt"),
        (["[UNK]", "##the"], {"SOS": "##the"}, r"--sos_piece ##the: is text in"),
        (["[UNK]"], {"MASK": "[unused7]"}, r"--mask_piece \[unused7\]: .*vocab\.txt has no such entry"),
        (["[UNK]", "[X]", "[MASK]"], {"MASK": "[X]"}, r"--mask_piece \[X\]: .* has \[MASK\] already"),
        (["[UNK]", "[X]"], {"MASK": "[X]", "SOS": "[X]"}, r"\[X\] cannot be both \[SOS\] and \[MASK\]"),
        (["[UNK]", "[PAD]"], {"EOS": "[UNK]"}, r"--eos_piece \[UNK\]: is text"),
    ],
)
def test_what_cannot_be_imported(
    vocabulary: Callable[..., Path], entries: list[str], pieces: dict[str, str], fault: str
) -> None:
    source = vocabulary(*entries)
    with pytest.raises(ValueError, match=fault):
        imported(source, **pieces)
    assert list(source.parent.iterdir()) == [source]


def test_an_import_is_the_same_each_time(bert_vocabulary: Path, tmp_path: Path) -> None:
    first, second = (import_tokenizer(bert_vocabulary, tmp_path / name, pieces={}) for name in ("a.json", "b.json"))
    assert first.sha256 == second.sha256
    assert first.sha256 != import_tokenizer(bert_vocabulary, tmp_path / "c.json", cased=True, pieces={}).sha256


def test_an_import_needs_a_fitting_name_and_source(bert_vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.model: would hold a WordPiece tokenizer; .* ends in \.json"):
        import_tokenizer(bert_vocabulary, tmp_path / "t.model", pieces={})
    (tmp_path / "bad.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8 at byte 6"):
        import_tokenizer(tmp_path / "bad.txt", tmp_path / "t.json", pieces={})
    with pytest.raises(FileNotFoundError, match="no such vocabulary"):
        import_tokenizer(tmp_path / "missing.txt", tmp_path / "t.json", pieces={})
    (tmp_path / "u.json").write_text("{}")
    with pytest.raises(ValueError, match=r"u\.json: needs no import"):
        import_tokenizer(tmp_path / "u.json", tmp_path / "t.json", pieces={})
    assert not (tmp_path / "t.json").exists()
