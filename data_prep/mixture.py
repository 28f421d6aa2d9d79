"""Several corpora as one: how often training sees each, and which text each sample is made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from data_prep.corpus import DEFAULT_READING, DocumentPer, ReadSettings, Source, find_sources
from data_prep.storage import Location, Url, location

MAX_EPOCHS = 10_000
MAX_SAMPLES = 2**48
"""What numbers of samples have room for."""


@dataclass(frozen=True)
class Corpus:
    """Texts that are read in one way, and how often training sees them."""

    paths: Sequence[Location]
    reading: ReadSettings = DEFAULT_READING
    name: str = "corpus"
    epochs: Fraction = Fraction(1)
    """How often its training texts go into the data set; what is behind the point, by a part of them."""
    weight: Fraction | None = None
    """Its share of the training samples, up to a factor that all corpora have in common; the epochs follow from it."""

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    def settings(self) -> dict[str, Any]:
        """What the manifest tells of it: no path, as that is another on every machine."""
        often = {"epochs": float(self.epochs)} if self.weight is None else {"weight": float(self.weight)}
        return {"name": self.name, **vars(self.reading), **often}


Mixture = Sequence[Corpus]


def sources_of(mixture: Mixture) -> list[Source]:
    """The files of all corpora, in order. Raises what `find_sources` raises."""
    return [
        source
        for number, corpus in enumerate(mixture)
        for source in find_sources(corpus.paths, corpus.reading, number)
    ]  # fmt: skip


def epochs_of(mixture: Mixture, sizes: Sequence[int]) -> list[Fraction]:
    """How often each corpus is gone through, given the sizes of all, in training samples or bytes.

    With weights the share of each is its weight, and the corpus that is gone through least often is so once: no text is
    left out. Raises ValueError for a corpus without text.
    """
    for corpus, size in zip(mixture, sizes, strict=True):
        if not size:
            raise ValueError(f"{corpus}: the corpus is empty: no text in it")
    weights = [corpus.weight for corpus in mixture if corpus.weight is not None]
    if not weights:
        return [corpus.epochs for corpus in mixture]
    densities = [weight / size for weight, size in zip(weights, sizes, strict=True)]
    return [density / min(densities) for density in densities]


class TextOrder:
    """Which text of which unit is sample number 0, 1, ... of a split.

    Corpus follows corpus. Each is gone through floor(epochs) times in the order of its texts, then once more by the part
    of them that `epochs` has behind its point, evenly spaced: text j belongs to a part f iff floor((j + 1) f) > floor(j f).
    """

    def __init__(self, num_texts: Sequence[int], corpora: Sequence[int], epochs: Sequence[Fraction]) -> None:
        """`num_texts` and `corpora`: of each unit, its texts and which corpus it is of, those of a corpus together.

        Raises ValueError for more samples than can be numbered, which weights can ask for.
        """
        self._unit_ends = np.cumsum(num_texts, dtype=np.int64)
        self._num_texts = np.zeros(len(epochs), dtype=np.int64)
        np.add.at(self._num_texts, np.array(corpora, dtype=np.int64), num_texts)
        self.epochs = list(epochs)
        self.num_samples = [math.floor(n * e) for n, e in zip(self._num_texts.tolist(), epochs, strict=True)]
        """Of each corpus."""
        if (total := sum(self.num_samples)) > MAX_SAMPLES:
            often = ", ".join(f"{float(epoch):.3g}" for epoch in epochs)
            raise ValueError(
                f"epochs or weights make {total:.3g} samples, epochs of the corpora: {often}; choose smaller ones"
            )

    def texts(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of samples first .. stop - 1: the unit, and the text's number in it."""
        ends = np.cumsum(self.num_samples, dtype=np.int64)
        texts_before = np.cumsum(self._num_texts) - self._num_texts
        numbers = []
        for corpus in range(len(self.epochs)):
            start = ends[corpus] - self.num_samples[corpus]
            samples = np.arange(max(first, start), min(stop, ends[corpus])) - start
            numbers.append(texts_before[corpus] + self._texts_of(corpus, samples))
        number = np.concatenate(numbers)
        units = np.searchsorted(self._unit_ends, number, side="right")
        return units, number - np.concatenate([[0], self._unit_ends])[units]

    def _texts_of(self, corpus: int, samples: np.ndarray) -> np.ndarray:
        """The number in the corpus of the text of each of its samples."""
        whole, part = divmod(self.epochs[corpus], 1)
        passes, texts = np.divmod(samples, max(1, self._num_texts[corpus]))
        in_part = passes == whole
        texts[in_part] = [math.ceil((place + 1) / part) - 1 for place in texts[in_part].tolist()]
        return texts


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as `safe_load` takes it, but for a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a text"),
    "paths": (lambda v: _is_text(v) or (isinstance(v, list) and v != [] and all(map(_is_text, v))), "a path or several"),
    "document_per": (lambda value: value in get_args(DocumentPer), " or ".join(get_args(DocumentPer))),
    "text_field": (_is_text, "a text"),
    "epochs": (lambda value: _is_positive(value) and value <= MAX_EPOCHS, f"a number above 0 and up to {MAX_EPOCHS:,}"),
    "weight": (_is_positive, "a number above 0"),
}  # fmt: skip


def read_mixture(path: Path, reading: ReadSettings = DEFAULT_READING) -> list[Corpus]:
    """The corpora of a YAML file; `reading` is for what a corpus does not say itself.

        corpora:
          - name: wikipedia
            paths: [wiki/*.jsonl.gz, more/]   # from the folder of this file
            epochs: 2
          - name: books
            paths: books/
            document_per: blank_line          # of ReadSettings
            epochs: 0.5                       # 1 where it is left out; or, in all corpora, `weight`

    Raises ValueError that tells all that is wrong with the file.
    """
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    entries = content.get("corpora") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path}: expected one key, "corpora": a list, each entry with the keys {", ".join(_KEYS)}')
    if faults := list(_faults(entries)):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return [_corpus(entry, path.parent, reading) for entry in entries]


def _corpus(entry: dict[str, Any], folder: Path, reading: ReadSettings) -> Corpus:
    paths = [entry["paths"]] if isinstance(entry["paths"], str) else entry["paths"]
    own = {field.name: entry[field.name] for field in fields(ReadSettings) if field.name in entry}
    often = {key: Fraction(str(entry[key])) for key in ("epochs", "weight") if key in entry}
    places = [place if isinstance(place, Url) else folder / place for place in map(location, paths)]
    return Corpus(places, replace(reading, **own), entry["name"], **often)


def _faults(entries: list[dict[str, Any]]) -> Iterator[str]:
    names = Counter(str(entry.get("name")) for entry in entries)
    has_weights = any("weight" in entry for entry in entries)
    for number, entry in enumerate(entries, start=1):
        label = f"corpus {entry['name']}" if _is_text(entry.get("name")) else f"corpus number {number}"
        for key in entry:
            if key not in _KEYS:
                yield f"{label}: unknown key {key}, expected {', '.join(_KEYS)}"
        for key, (is_right, expected) in _KEYS.items():
            if key not in entry and key in ("name", "paths"):
                yield f"{label}: has no {key}"
            elif key in entry and not is_right(entry[key]):
                yield f"{label}: {key} is {entry[key]!r}, expected {expected}"
        if has_weights and "epochs" in entry:
            yield f"{label}: has epochs where there are weights: give every corpus a weight, or none"
        elif has_weights and "weight" not in entry:
            yield f"{label}: has no weight as others have: give every corpus one, or none"
        if "name" in entry and names.pop(str(entry["name"]), 1) > 1:
            yield f"{label}: there are several of this name"
