"""Pre-training text: each function yields real documents (a chapter, an entry, a page), a line a paragraph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from benchmarks.corpora.containers import parse_description, read_dictd, read_rdb, read_stanzas, read_sword
from benchmarks.corpora.markup import (
    blocks,
    osis_paragraphs,
)
from benchmarks.corpora.packages import Debian, DebianLists, Shelf

Document = Iterable[str]

LISTS = DebianLists("bookworm", "12.15")
AUSTEN, TOKENIZERS = Debian("r-cran-janeaustenr", "1.0.0-1"), Debian("r-cran-tokenizers", "0.3.0-1")
WEB, KJV, MHCC = (
    Debian("sword-text-web", "426.0-1"),
    Debian("sword-text-kjv", "14.3-1"),
    Debian("sword-comm-mhcc", "2.0-1"),
)
FORTUNES = Debian("fortunes", "1:1.99.1-7.3")


def austen(shelf: Shelf) -> Iterator[Document]:
    """Chapters of six novels."""
    for content in shelf.read(AUSTEN, r".*/data/Rdata\.rdb").values():
        for lines in read_rdb(content):
            yield from _chapters("\n".join(lines))


def moby_dick(shelf: Shelf) -> Iterator[Document]:
    """Chapters of Moby-Dick, without Project Gutenberg's header and licence."""
    for content in shelf.read(TOKENIZERS, r".*/data/Rdata\.rdb").values():
        for (text,) in read_rdb(content):
            yield from _chapters(_without_gutenberg(text.replace("\r\n", "\n")))


def _chapters(text: str) -> list[list[str]]:
    return [blocks(chapter) for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter) [\dIVXLC]+\b)", text)]


def _without_gutenberg(text: str) -> str:
    text = re.split(r"\*\*\* ?START OF TH[^\n]*\*\*\*", text, maxsplit=1)[-1]
    return re.split(r"\n(?:\*\*\* ?END OF TH|End of (?:the )?Project Gutenberg)", text, maxsplit=1)[0]


def sword_chapters(package: Debian) -> Callable[[Shelf], Iterator[Document]]:
    """Chapters of a Bible."""

    def documents(shelf: Shelf) -> Iterator[Document]:
        for testament in testaments(shelf, package):
            chapters: dict[str, list[str]] = {}
            for verse in read_sword(*testament):
                chapters.setdefault(verse.chapter, []).append(verse.markup)
            for markups in chapters.values():
                yield osis_paragraphs(" ".join(markups))

    return documents


def sword_entries(package: Debian) -> Callable[[Shelf], Iterator[Document]]:
    """Entries of a commentary."""

    def documents(shelf: Shelf) -> Iterator[Document]:
        for testament in testaments(shelf, package):
            for verse in read_sword(*testament):
                yield osis_paragraphs(verse.markup)

    return documents


def testaments(shelf: Shelf, package: Debian) -> list[tuple[bytes, bytes, bytes]]:
    """Block index, verse index and texts of the Old Testament and of the New."""
    files = {path.rpartition("/")[2]: content for path, content in shelf.read(package, r".*/[on]t\.bz[svz]").items()}
    return [(files[f"{book}.bzs"], files[f"{book}.bzv"], files[f"{book}.bzz"]) for book in ("ot", "nt")]


def dictionary(package: Debian) -> Callable[[Shelf], Iterator[Document]]:
    """Entries of a dictd dictionary, without marks of cross-references, sources and dates."""

    def documents(shelf: Shelf) -> Iterator[Document]:
        files = shelf.read(package, r"usr/share/dictd/.*\.(?:index|dict\.dz)")
        index, text = (next(c for path, c in files.items() if path.endswith(end)) for end in (".index", ".dict.dz"))
        for entry in read_dictd(index, text):
            entry = re.sub(r"^\s*(?:\[[^\[\]\n]{1,40}\]|\(\d{4}-\d\d-\d\d\))\s*$", "\n", entry, flags=re.MULTILINE)
            yield blocks(re.sub(r"\{+([^{}]*)\}+", r"\1", entry))

    return documents


def debian_descriptions(shelf: Shelf) -> Iterator[Document]:
    """A description of a Debian package: its synopsis, then its paragraphs."""
    for stanza in read_stanzas(shelf.descriptions(LISTS)):
        if "Description-en" in stanza:
            synopsis, paragraphs = parse_description(stanza["Description-en"])
            yield [synopsis, *paragraphs]


def fortunes(shelf: Shelf) -> Iterator[Document]:
    """Fortune cookies; pictures made of letters left out."""
    for path, content in shelf.read(FORTUNES, r"usr/share/games/fortunes/[\w-]+").items():
        if not path.endswith("/ascii-art"):
            for cookie in re.split(r"^%\s*$", content.decode("utf-8", "replace"), flags=re.MULTILINE):
                yield blocks(re.sub(r"\n(\s*-- )", r"\n\n\1", re.sub(r".\x08", "", cookie)))
