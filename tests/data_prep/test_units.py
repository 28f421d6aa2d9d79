"""Units in parts: the same data set however small they are, a restart inside a unit, and memory that does not grow."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stages import Interrupted
from support import files_of
from texts import as_json_lines, write

from data_prep import build as build_module
from data_prep import units
from data_prep.build import WORK, build
from data_prep.corpus import find_sources, read_documents
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.parts import finished_parts, is_done, part_path
from data_prep.tokenizer import Tokenizer
from data_prep.units import UNIT, Part, read_counts

Build = Callable[..., bool]
CLEANED: dict[str, Any] = {
    "unicode_form": "NFKC", "min_document_characters": 60, "drop_duplicate_documents": True,
    "drop_duplicate_paragraphs": "line", "validation_fraction": 0.2,
}  # fmt: skip


def test_parts_of_a_unit_are_found_in_order(tmp_path: Path) -> None:
    assert not is_done([])
    paths = [part_path(tmp_path, "unit", 3, part, is_last=part == 11) for part in range(12)]
    for path in (*reversed(paths), part_path(tmp_path, "unit", 12, 0, is_last=False)):
        path.touch()
    for other in (".unit-00000003-000001.npz.partial", "plan.json", "units-00000001-000000.npz"):
        (tmp_path / other).touch()
    found = finished_parts(tmp_path, "unit")
    assert set(found) == {3, 12}
    assert found[3] == paths
    assert is_done(found[3])
    assert not is_done(found[12])


@pytest.mark.parametrize("part_bytes", [1, 2_000, 7_919, 2**30])
def test_parts_hold_all_documents_and_the_last_knows_it(
    chapters: list[Path], part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "PART_BYTES", part_bytes)
    documents = list(read_documents(find_sources(chapters[:6])))
    remaining, taken = iter(documents), []
    is_last = False
    while not is_last:
        part = Part(remaining)
        taken.append(list(part))
        assert part.num_documents == len(taken[-1])
        assert sum(len(document.utf8) for document in taken[-1][:-1]) < part_bytes
        is_last = part.is_last
    assert [document for of_part in taken for document in of_part] == documents
    assert next(remaining, None) is None


@pytest.fixture
def compressed(sample_corpus: Path, tmp_path: Path) -> Path:
    """The dictionary twice, as one compressed file, so one unit."""
    lines = (sample_corpus / "devils_dictionary.jsonl").read_bytes()
    return write(tmp_path / "corpus" / "a.jsonl.zst", lines + lines[: len(lines) // 2].rpartition(b"\n")[0])


@pytest.mark.parametrize("settings", [{"validation_fraction": 0.2}, CLEANED], ids=["as it is", "cleaned"])
def test_the_bytes_do_not_depend_on_parts(
    compressed: Path, tmp_path: Path, build_data: Build, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    for part_bytes in (2**25, 10_000):
        monkeypatch.setattr(units, "PART_BYTES", part_bytes)
        assert build_data([compressed], tmp_path / str(part_bytes), **settings)
    assert files_of(tmp_path / "10000") == files_of(tmp_path / str(2**25))


@pytest.mark.parametrize("settings", [{"validation_fraction": 0.2}, CLEANED], ids=["as it is", "cleaned"])
def test_a_build_goes_on_inside_a_compressed_file(
    compressed: Path, tmp_path: Path, build_data: Build, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """What is tokenized is not tokenized again, though its text has to be read again."""
    monkeypatch.setattr(units, "PART_BYTES", 20_000)
    assert build_data([compressed], tmp_path / "undisturbed", **settings)
    folder, num_parts = tmp_path / "data", []
    tokenize = build_module.tokenize

    def break_off_at(number: int) -> Callable[..., Any]:
        def tokenize_or_not(*words: Any) -> Any:
            num_parts.append(1)
            if len(num_parts) == number:
                raise KeyboardInterrupt
            return tokenize(*words)

        return tokenize_or_not

    for number in (4, 3):  # so after 3 parts, and after 2 more
        num_parts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "tokenize", break_off_at(number))
            with pytest.raises(KeyboardInterrupt):
                build_data([compressed], folder, **settings)
    of_unit = finished_parts(folder / WORK, UNIT)[0]
    assert len(of_unit) == 5
    num_parts.clear()
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "tokenize", break_off_at(0))
        assert build_data([compressed], folder, **settings)
    assert files_of(folder) == files_of(tmp_path / "undisturbed")
    assert len(num_parts) > 5


@pytest.mark.slow
def test_memory_does_not_grow_with_a_compressed_file(
    tokenizer: Tokenizer, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "PART_BYTES", 2**20)

    def peak_bytes(copies: int) -> int:
        corpus = write(tmp_path / str(copies) / "a.jsonl.zst", as_json_lines(lines) * copies)
        with Interrupted(0, "tokenize") as processes:
            tracemalloc.start()
            with pytest.raises(KeyboardInterrupt):
                build([Corpus([corpus])], tokenizer.path, tmp_path / f"data-{copies}", BuildParameters(), processes)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        parts = finished_parts(tmp_path / f"data-{copies}" / WORK, UNIT)[0]
        assert sum(read_counts(path)["documents"] for path in parts) == len(lines) * copies
        return peak

    few, many = peak_bytes(200), peak_bytes(800)
    assert many < few + 2**20
