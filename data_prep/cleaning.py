"""What is done to each document by itself before it is used: characters put in order, too short and too long ones left out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from data_prep.corpus import Document, make_document

CLEANING_COUNTS = ("normalised_documents", "control_characters", "too_short_documents", "too_long_documents")
"""What cleaning counts."""

_WHITE_SPACE_CONTROLS = re.compile("[\\x0b\\x0c\\r\\x1c-\\x1f\\x85]")
# Kept: tab and line feed; the joiners U+200C and U+200D, which spell words of Persian and Indic scripts and make emoji; the
# format characters that are seen (Arabic number signs); variation selectors and the tags of flags.
_OTHER_CONTROLS = re.compile(
    "[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\xad\\u061c\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u2064\\u2066-\\u206f"
    "\\ufeff\\ufff9-\\ufffb\\U000e0001]"
)


@dataclass(frozen=True)
class CleanSettings:
    """What is done to a document by itself."""

    unicode_form: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalisation: NFC writes equal characters in one way, NFKC also full-width letters, ligatures and the like."""
    drop_control_characters: bool = False
    """Drop control characters and what is not seen: byte order marks, zero-width spaces, soft hyphens, marks of direction."""
    min_document_characters: int = 0
    """Leave out documents of fewer characters."""
    max_document_characters: int | None = None
    """Leave out documents of more characters (default: none is too long)."""

    def __post_init__(self) -> None:
        if self.min_document_characters < 0:
            raise ValueError(f"min_document_characters is {self.min_document_characters}, expected 0 or more")
        if self.max_document_characters is not None and (
            self.max_document_characters < max(1, self.min_document_characters)
        ):
            raise ValueError(
                f"max_document_characters is {self.max_document_characters}, expected at least "
                f"{max(1, self.min_document_characters)}, as many as the shortest document has"
            )


NO_CLEANING = CleanSettings()


def cleaned(documents: Iterable[Document], settings: CleanSettings, counts: Counter[str]) -> Iterator[Document]:
    """What `clean` leaves of the documents."""
    for document in documents:
        kept = clean(document, settings, counts)
        if kept:
            yield kept


def clean(document: Document, settings: CleanSettings, counts: Counter[str]) -> Document | None:
    """The cleaned document, None for one that is left out; `counts` gets what was done.

    A line of which nothing is left is a blank one. Cleaning a cleaned document changes nothing.
    """
    if settings.drop_control_characters and not all(map(str.isprintable, document.lines)):
        document = _without_control_characters(document, counts)
    if settings.unicode_form != "none":
        document = _normalised(document, settings.unicode_form, counts)
    if settings.max_document_characters is not None and document.num_characters > settings.max_document_characters:
        counts["too_long_documents"] += 1
        return None
    return None if is_too_short(document, settings, counts) else document


def is_too_short(document: Document, settings: CleanSettings, counts: Counter[str]) -> bool:
    """Whether the document is to be left out, as one without any text always is; counted."""
    fewest = settings.min_document_characters
    found = not document.lines or (fewest > 1 and document.num_characters < fewest)
    counts["too_short_documents"] += found
    return found


def _without_control_characters(document: Document, counts: Counter[str]) -> Document:
    text, num_spaces = _WHITE_SPACE_CONTROLS.subn(" ", document.text)
    text, num_others = _OTHER_CONTROLS.subn("", text)
    counts["control_characters"] += num_spaces + num_others
    return make_document(text.split("\n")) if num_spaces + num_others else document


def _normalised(document: Document, form: Literal["NFC", "NFKC"], counts: Counter[str]) -> Document:
    text = document.text
    normalised = unicodedata.normalize(form, text)
    if normalised == text:
        return document
    counts["normalised_documents"] += 1
    return make_document(normalised.split("\n"))
