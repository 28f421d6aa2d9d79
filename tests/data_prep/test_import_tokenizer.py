"""SentencePiece models like those of T5, ALBERT and XLM-R: every id and every segmentation stays what it was."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_ids_of_library

from data_prep.import_tokenizer import import_tokenizer
from data_prep.shards import DataSet, find_faults
from data_prep.tokenizer import ROLE_PIECES, Tokenizer, load_tokenizer

EXTRA_IDS = [f"<extra_id_{i}>" for i in range(3)]
STYLES: dict[str, dict[str, Any]] = {
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "user_defined_symbols": EXTRA_IDS, "pad_piece": "<pad>"},
    "albert": {
        "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "<pad>",
        "control_symbols": ["[CLS]", "[SEP]", "[MASK]"], "user_defined_symbols": ["(", ")"],
        "normalization_rule_name": "nmt_nfkc_cf",
    },
    "xlm-r": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "pad_piece": "<pad>"},
    "xlm-r file": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "bytes": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True, "model_type": "bpe"},
}  # fmt: skip
NUM_ENTRIES = 500


@dataclass(frozen=True)
class Imported:
    style: str
    source: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def models(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each style, trained by SentencePiece itself."""
    folder = tmp_path_factory.mktemp("models")
    for style, pieces in STYLES.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=NUM_ENTRIES, minloglevel=2, num_threads=1, **pieces
        )  # fmt: skip
        (folder / f"{style}.model").write_bytes(model.getvalue())
    return {style: folder / f"{style}.model" for style in STYLES}


@pytest.fixture(scope="session", params=STYLES)
def imported(
    models: dict[str, Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Imported:
    source = models[request.param]
    path = tmp_path_factory.mktemp("imported") / "new" / "own.model"
    return Imported(request.param, source, import_tokenizer(source, path, pieces={}))


@cache
def original(source: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(source))


def roles(tokenizer: Tokenizer) -> dict[str, int]:
    return {role: getattr(tokenizer, f"{role.lower()}_id") for role in ("PAD", "UNK", "SOS", "EOS", "MASK")}


def test_special_ids_come_from_the_model(imported: Imported) -> None:
    new = NUM_ENTRIES
    assert (
        roles(imported.tokenizer)
        == {
            "t5": {"PAD": 0, "UNK": 2, "SOS": new, "EOS": 1, "MASK": new + 1},
            "albert": {"PAD": 0, "UNK": 1, "SOS": 2, "EOS": 3, "MASK": 4},
            "xlm-r": {"PAD": 3, "UNK": 0, "SOS": 1, "EOS": 2, "MASK": new},
            "xlm-r file": {"PAD": new, "UNK": 0, "SOS": 1, "EOS": 2, "MASK": new + 1},
            "bytes": {"PAD": new, "UNK": 0, "SOS": 1, "EOS": 2, "MASK": new + 1},
        }[imported.style]
    )


def test_no_entry_moves(imported: Imported) -> None:
    before, tokenizer = original(imported.source), imported.tokenizer
    assert [tokenizer.piece(i) for i in range(NUM_ENTRIES)] == [before.id_to_piece(i) for i in range(NUM_ENTRIES)]
    after = original(tokenizer.path)
    assert [after.get_score(i) for i in range(NUM_ENTRIES)] == [before.get_score(i) for i in range(NUM_ENTRIES)]
    assert tokenizer.vocab_size == NUM_ENTRIES + sum(i >= NUM_ENTRIES for i in roles(tokenizer).values())
    if imported.style == "bytes":
        assert len(tokenizer.normal_ids) == NUM_ENTRIES - 3 - 256


def test_real_text_has_the_ids_it_had(imported: Imported, lines: list[str]) -> None:
    for line in lines:
        assert_ids_of_library(imported.tokenizer.encode([line]).tolist(), original(imported.source), line)


@given(
    text=st.lists(
        st.one_of(st.text(max_size=20), st.sampled_from(["<s>", "[MASK]", "<pad>", "truth", " ", "▁"])), max_size=9
    )
)
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_ids_it_had_and_no_special_one(imported: Imported, text: list[str]) -> None:
    line = "".join(text)
    ids = imported.tokenizer.encode([line]).tolist()
    assert_ids_of_library(ids, original(imported.source), line)
    assert not set(ids) & (set(imported.tokenizer.special_ids.tolist()) - {imported.tokenizer.unk_id})


def test_special_tokens_written_in_text_are_text(imported: Imported) -> None:
    for names in ROLE_PIECES.values():
        for name in names:
            ids = imported.tokenizer.encode([f"a {name} b"])
            assert not np.isin(ids, np.setdiff1d(imported.tokenizer.special_ids, imported.tokenizer.unk_id)).any(), name


def test_a_data_set_of_any_style_is_sound(imported: Imported, build_data: Callable[..., bool], tmp_path: Path) -> None:
    """Of characters that the vocabulary does not have; with byte fallback they are byte entries, which text is made of too."""
    text = " ".join(f"a truth {chr(0x4E00 + i)}{chr(0x1F600 + i % 64)} acknowledged" for i in range(500))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    folder = tmp_path / "data"
    assert build_data([tmp_path / "a.txt"], folder, tokenizer_path=imported.tokenizer.path, validation_fraction=0)
    assert list(find_faults(folder)) == []
    data = DataSet(folder)
    batch = data.read_samples("train", 0, data.num_samples("train"))
    used = batch.turns_BP > 0
    originals = np.take_along_axis(batch.tokens_BL, batch.positions_BP.astype(np.int64), axis=1)[used]
    is_kept_byte = ~np.isin(originals, data.tokenizer.normal_ids) & (originals == batch.shown_BP[used])
    assert is_kept_byte.any() == (imported.style == "bytes"), "else nothing is shown here but text entries"


def test_what_has_all_special_tokens_needs_no_import(models: dict[str, Path], imported: Imported) -> None:
    if imported.style == "albert":
        assert roles(load_tokenizer(imported.source)) == roles(imported.tokenizer)
    else:
        missing = {"t5": "SOS .*, MASK", "xlm-r": "MASK"}.get(imported.style, "PAD .*, MASK")
        with pytest.raises(
            ValueError, match=rf"has no special token for {missing} .*import-tokenizer --from .*\.model"
        ):
            load_tokenizer(imported.source)


def test_importing_again_changes_nothing(imported: Imported, tmp_path: Path) -> None:
    again = import_tokenizer(imported.tokenizer.path, tmp_path / "again.model", pieces={})
    assert again.path.read_bytes() == imported.tokenizer.path.read_bytes()


def test_a_sentinel_serves_where_the_user_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    pieces = {"MASK": "<extra_id_0>", "SOS": "<extra_id_1>"}
    tokenizer = import_tokenizer(models["t5"], tmp_path / "t5.model", pieces=pieces)
    before = original(models["t5"])
    assert tokenizer.vocab_size == NUM_ENTRIES
    assert tokenizer.mask_id == before.piece_to_id("<extra_id_0>")
    assert tokenizer.sos_id == before.piece_to_id("<extra_id_1>")
    assert tokenizer.piece(tokenizer.mask_id) == "[MASK]"
    assert before.piece_to_id("<extra_id_0>") in before.encode("a <extra_id_0> b"), "it was spelled by text"
    assert tokenizer.mask_id not in tokenizer.encode(["a <extra_id_0> [MASK] b"])
    third = before.piece_to_id("<extra_id_2>")
    assert third in tokenizer.encode(["a <extra_id_2> b"])
    assert load_tokenizer(tokenizer.path).mask_id == tokenizer.mask_id, "the file alone knows the roles"


def test_a_known_name_that_text_could_spell_becomes_a_control_symbol(lines: list[str], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=NUM_ENTRIES, minloglevel=2,
        user_defined_symbols=["<mask>"], pad_id=3, num_threads=1,
    )  # fmt: skip
    (tmp_path / "m.model").write_bytes(model.getvalue())
    tokenizer = import_tokenizer(tmp_path / "m.model", tmp_path / "own.model", pieces={})
    assert tokenizer.mask_id == original(tmp_path / "m.model").piece_to_id("<mask>")
    assert tokenizer.vocab_size == NUM_ENTRIES
    assert tokenizer.mask_id not in tokenizer.encode(["a <mask> b"])


@pytest.mark.parametrize(
    ("pieces", "fault"),
    [
        (
            {"MASK": "<extra_id0>"},
            r"--mask_piece <extra_id0>: .*t5\.model has no such entry; without --mask_piece a new one",
        ),
        ({"MASK": "▁the"}, r"--mask_piece ▁the: is text in .*t5\.model"),
        ({"MASK": "<unk>"}, r"--mask_piece <unk>: is text"),
        ({"MASK": "<extra_id_0>", "SOS": "<extra_id_0>"}, r"<extra_id_0> cannot be both \[SOS\] and \[MASK\]"),
    ],
)
def test_a_piece_that_cannot_serve(models: dict[str, Path], tmp_path: Path, pieces: dict[str, str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        import_tokenizer(models["t5"], tmp_path / "t5.model", pieces=pieces)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "settings", "fault"),
    [
        ("own.json", {}, r"own\.json: would hold a SentencePiece model; .* ends in \.model"),
        ("own.model", {"cased": True}, r"--cased: .*t5\.model has its own normalisation"),
    ],
)
def test_flags_that_do_not_fit(
    models: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        import_tokenizer(models["t5"], tmp_path / name, pieces={}, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:1000], lambda c: b"[UNK]\n" * 99], ids=["empty", "cut", "text"]
)
def test_what_is_no_model_is_refused(models: dict[str, Path], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "broken.model").write_bytes(damage(models["t5"].read_bytes()))
    with pytest.raises(ValueError, match=r"broken\.model: not a SentencePiece model"):
        import_tokenizer(tmp_path / "broken.model", tmp_path / "own.model", pieces={})
    assert not (tmp_path / "own.model").exists()
