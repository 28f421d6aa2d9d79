from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning import CleanSettings, clean, cleaned
from data_prep.corpus import Document, make_document

CODES = (range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xF0000))  # the planes that hold controls; no surrogates
EVERYTHING = "".join(chr(code) for codes in CODES for code in codes)
WHITE_SPACE_CONTROLS = "\v\f\r\x1c\x1d\x1e\x1f\x85"
INVISIBLE = [
    0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x2070), 0xFEFF,
    *range(0xFFF9, 0xFFFC), 0xE0001,
]  # fmt: skip
# Texts of characters that cleaning changes, or that normalisation composes, decomposes or turns into white space.
TEXT = st.text(st.sampled_from("ab \t\n\n\0\r\x85\u200b\ufeff\xad\xa0\u2028e\u0301\xe9ﬁ①\u0344\u1100\u1161\u200d¨") | st.characters(exclude_categories=["Cs"]))  # fmt: skip


def clean_lines(text: str, **settings: object) -> tuple[str, ...]:
    document = clean(make_document(text.split("\n")), CleanSettings(**settings), Counter())  # type: ignore[arg-type]
    return document.lines if document else ()


def test_which_of_all_characters_are_dropped() -> None:
    lines = clean_lines("\n".join(f"({c})" for c in EVERYTHING if c != "\n"), drop_control_characters=True)
    found = dict(zip((c for c in EVERYTHING if c != "\n"), lines, strict=True))
    dropped = {c for c, line in found.items() if line == "()"}
    spaces = {c for c, line in found.items() if line == "( )"} - {" "}
    controls = {c for c in EVERYTHING if unicodedata.category(c) == "Cc"} - {"\t", "\n"}
    assert spaces == set(WHITE_SPACE_CONTROLS)
    assert dropped == (controls - spaces) | {chr(code) for code in INVISIBLE}
    assert all(line == f"({c})" for c, line in found.items() if c not in dropped | spaces)


@pytest.mark.parametrize(
    "text",
    ["می‌خواهم", "क्‍ष", "👩‍👩‍👧‍👦", "❤️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "ᠮᠣᠩᠭᠣᠯ ᠤᠨ᠎ᠠ", "one\ttwo"],
    ids=["Persian", "Hindi", "family", "heart", "flag of Scotland", "Mongolian", "tab"],
)
def test_what_spelling_needs_stays(text: str) -> None:
    assert clean_lines(text, drop_control_characters=True) == (text,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffone", ("one",)),
        ("co\xadop", ("coop",)),
        ("one\0two", ("onetwo",)),
        ("one\rtwo\fthree", ("one two three",)),
        ("\u202bשלום\u202c", ("שלום",)),
        ("\u200b\u200b", ()),
        ("one\n\ufeff\ntwo", ("one", "two")),
    ],
    ids=["BOM", "soft hyphen", "NUL", "old line ends", "right to left", "nothing left", "line of nothing"],
)
def test_what_is_dropped(text: str, expected: tuple[str, ...]) -> None:
    assert clean_lines(text, drop_control_characters=True) == expected


def test_a_line_of_nothing_separates_paragraphs_as_a_blank_one() -> None:
    document = clean(Document(("one", "\ufeff", "two")), CleanSettings(drop_control_characters=True), Counter())
    assert document
    assert document.paragraphs("blank_line") == [("one",), ("two",)]


def test_forms() -> None:
    assert clean_lines("e\u0301 ﬁ①", unicode_form="NFC") == ("\xe9 ﬁ①",)
    assert clean_lines("e\u0301 ﬁ①\xa0", unicode_form="NFKC") == ("\xe9 fi1",)
    assert clean_lines("e\u0301 ﬁ①") == ("e\u0301 ﬁ①",)
    assert clean_lines("e\u200b\u0301", unicode_form="NFC", drop_control_characters=True) == ("\xe9",), "dropped first"


@given(TEXT, st.sampled_from(["none", "NFC", "NFKC"]), st.booleans())
def test_cleaning_again_changes_nothing(text: str, form: str, drop_control_characters: bool) -> None:
    settings = CleanSettings(form, drop_control_characters)  # type: ignore[arg-type]
    once = clean(make_document(text.split("\n")), settings, Counter())
    if once:
        counts: Counter[str] = Counter()
        assert clean(once, settings, counts) == once
        assert counts.total() == 0
        assert all(line == line.strip() and line for line in once.lines)
        assert form == "none" or all(unicodedata.is_normalized(form, line) for line in once.lines)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(["one", " two ", "", " \t"])))
def test_paragraphs_are_what_stands_between_blank_lines(lines: list[str]) -> None:
    expected: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            expected[-1].append(line.strip())
        else:
            expected.append([])
    document = make_document(lines)
    paragraphs = [tuple(paragraph) for paragraph in expected if paragraph]
    assert document.paragraphs("line") == [(line,) for paragraph in paragraphs for line in paragraph]
    if paragraphs:
        assert document.paragraphs("blank_line") == paragraphs
    assert make_document(document.text.split("\n")) == document
    assert document.num_characters == len("\n".join(document.lines))


def test_what_was_done_is_counted() -> None:
    texts = ["e\u0301\0\0", "plain text", "\xe9\r\0", "\0", "one\ntwo", "x" * 12, "long text long"]
    counts: Counter[str] = Counter()
    settings = CleanSettings("NFC", True, min_document_characters=2, max_document_characters=12)
    kept = list(cleaned((make_document(text.split("\n")) for text in texts), settings, counts))
    assert [document.lines for document in kept] == [("plain text",), ("one", "two"), ("x" * 12,)]
    assert counts == {
        "control_characters": 5, "normalised_documents": 1, "too_short_documents": 3, "too_long_documents": 1,
    }  # fmt: skip


def test_characters_are_those_of_the_lines_and_the_breaks_between_them() -> None:
    settings = CleanSettings(min_document_characters=7, max_document_characters=7)
    assert clean(Document(("one", "two")), settings, Counter())
    assert not clean(Document(("one", "t")), settings, Counter())
    assert not clean(Document(("one", "two2")), settings, Counter())


def test_without_settings_nothing_changes() -> None:
    document = Document(("e\u0301\0 \ufeff",))
    counts: Counter[str] = Counter()
    assert clean(document, CleanSettings(), counts) is document
    assert counts.total() == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_document_characters": -1}, "min_document_characters is -1, expected 0 or more"),
        ({"max_document_characters": 0}, "max_document_characters is 0, expected at least 1"),
        ({"min_document_characters": 9, "max_document_characters": 8}, "max_document_characters is 8, expected at least 9"),
    ],
)  # fmt: skip
def test_limits_that_leave_nothing_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanSettings(**limits)  # type: ignore[arg-type]
