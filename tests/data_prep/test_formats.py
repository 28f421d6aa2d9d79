"""Every format and compression gives the documents of plain text, and so does every way to split it into units."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import COMPRESS, as_json_lines, write, write_table

from data_prep import corpus, formats
from data_prep.corpus import DocumentPer, ReadSettings, Source, find_sources, plan_units, read_documents, read_unit
from data_prep.tokenizer import Tokenizer

TEXTS = [
    "Call me Ishmael.\nSome years ago", "naïve", "שלום עולם\nمرحبا بالعالم", "日本語の文章。\n\u3000第二段落。", "a\x00b\n\x00",
    "lone\rreturn", "𝄞 clef and 🙂",
]  # fmt: skip
COMPRESSED = [".gz", ".xz", ".zst"]
BLANK_LINE = ReadSettings("blank_line")
WHOLE = 2**40
NUM_EXAMPLES = 150


def read(path: Path, reading: ReadSettings = BLANK_LINE, unit_bytes: int = WHOLE) -> list[tuple[str, ...]]:
    """The lines of each document of each unit."""
    sources = find_sources([path], reading)
    units = plan_units(sources, unit_bytes)
    assert sum(unit.size_bytes for unit in units) == sum(source.size_bytes for source in sources)
    return [document.lines for unit in units for document in read_unit(unit)]


def as_documents(texts: Sequence[str | None]) -> list[tuple[str, ...]]:
    lines = [tuple(line.strip() for line in (text or "").split("\n") if line.strip()) for text in texts]
    return [document for document in lines if document]


TABLES = ["a.parquet", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_is_the_same_in_every_compression(tmp_path: Path, suffix: str) -> None:
    expected = as_documents(TEXTS)
    between_blank_lines = write(tmp_path / f"a.txt{suffix}", "\n\n".join(TEXTS).encode())
    assert read(between_blank_lines) == expected
    assert read(between_blank_lines, ReadSettings("file")) == [
        tuple(line for document in expected for line in document)
    ]
    assert read(write(tmp_path / f"a.jsonl{suffix}", as_json_lines(TEXTS))) == expected


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_are_the_same_in_every_table(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    texts = [*TEXTS[:3], None, *TEXTS[3:], "", TEXTS[0]]
    path = write_table(tmp_path / name, texts, kind=kind)
    assert read(path) == read(path, ReadSettings("file")) == as_documents(texts)
    assert [document.lines for document in read_documents(find_sources([path]))] == as_documents(texts)


def test_a_long_row_group_is_read_in_order(tmp_path: Path) -> None:
    texts = [f"text {number}" if number % 7 else None for number in range(3000)]
    assert read(write_table(tmp_path / "a.parquet", texts, part_rows=2000)) == as_documents(texts)


@pytest.mark.parametrize("name", ["a.jsonl", *TABLES])
def test_the_text_field_is_chosen(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.jsonl":
        write(path, as_json_lines(["one", None, "two"], "content"))
    else:
        write_table(path, ["one", None, "two"])
        renamed = (pq.read_table(path) if name == "a.parquet" else _read_arrow(path)).rename_columns(
            ["id", "content", "text"]
        )
        path.unlink()
        if name == "a.parquet":
            pq.write_table(renamed, path)
        else:
            with (pa.ipc.new_stream if "stream" in name else pa.ipc.new_file)(str(path), renamed.schema) as writer:
                writer.write_table(renamed)
    assert read(path, ReadSettings(text_field="content")) == [("one",), ("two",)]
    with pytest.raises(ValueError, match=rf"{name}: .*text.*--text_field"):
        read(path)


def _read_arrow(path: Path) -> pa.Table:
    content = path.read_bytes()
    return (pa.ipc.open_stream if "stream" in path.name else pa.ipc.open_file)(content).read_all()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("field", "found"), [("body", "no such column"), ("id", "int64"), ("Text", "no such column")]
)  # fmt: skip
def test_a_wrong_column_is_named_before_anything_is_read(tmp_path: Path, name: str, field: str, found: str) -> None:
    sources = find_sources([write_table(tmp_path / name, TEXTS)], ReadSettings(text_field=field))
    message = rf'{name}: expected strings in a column "{field}", found {found}; .* id, text, score: .*--text_field'
    with pytest.raises(ValueError, match=message):
        plan_units(sources)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, ["one", None, "two", "three", "four", "fXve", "six"])
    content = path.read_bytes()
    assert b"fXve" in content
    path.write_bytes(content.replace(b"fXve", b"f\xe9ve"))
    with pytest.raises(ValueError, match=rf"{name}: row 6: not UTF-8 at byte 1 of its text \(found 0xe9\)"):
        read(path)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    assert len(read(write_table(tmp_path / "allowed" / name, ["x", "y" * 100, "z"]))) == 3
    with pytest.raises(ValueError, match=rf"{name}: row 4: a text of over 100 bytes"):
        read(write_table(tmp_path / "large" / name, ["x", "y", "z", "ö" * 51]))


LINES = st.lists(
    st.sampled_from(["", "", " ", "\t", "\r", "\u3000", "a", "bc d", "日本", "é\ralone", "\ufeff", "\x00", "x" * 30]), max_size=25
)  # fmt: skip
LINE_ENDS = st.sampled_from(["\n", "\r\n"])
UNIT_BYTES = st.integers(1, 60)


@st.composite
def text_files(draw: st.DrawFn) -> bytes:
    """Lines with mixed ends, the last one perhaps without, perhaps behind a BOM."""
    text = "".join(line + draw(LINE_ENDS) for line in draw(LINES)) + draw(st.sampled_from(["", "end", " "]))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(content=text_files(), unit_bytes=UNIT_BYTES)
def test_documents_between_blank_lines_do_not_depend_on_the_units(
    scratch: Path, content: bytes, unit_bytes: int
) -> None:
    path = write(scratch / "a.txt", content)
    documents: list[list[str]] = [[]]
    for line in content.decode().removeprefix("\ufeff").split("\n"):
        if line.strip():
            documents[-1].append(line.strip())
        else:
            documents.append([])
    expected = [tuple(lines) for lines in documents if lines]
    assert read(path) == expected
    assert read(path, unit_bytes=unit_bytes) == expected


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["", "a", "b\n\nc", "日本", "x" * 30, None])), data=st.data(), unit_bytes=UNIT_BYTES
)
def test_json_lines_do_not_depend_on_the_units(
    scratch: Path, texts: list[str | None], data: st.DataObject, unit_bytes: int
) -> None:
    between = st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"])
    lines = [json.dumps({"text": text}, ensure_ascii=False) + data.draw(between) for text in texts]
    path = write(scratch / "a.jsonl", (data.draw(st.sampled_from(["", "\ufeff"])) + "".join(lines)).rstrip().encode())
    assert read(path) == as_documents(texts)
    assert read(path, unit_bytes=unit_bytes) == as_documents(texts)


@settings(max_examples=NUM_EXAMPLES // 3, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["", "a", "b\n\nc", "日本", None]), max_size=20), part_rows=st.integers(1, 6),
    unit_bytes=st.integers(1, 3000),
)  # fmt: skip
@pytest.mark.parametrize("name", TABLES)
def test_tables_do_not_depend_on_the_units(
    scratch: Path, name: str, texts: list[str | None], part_rows: int, unit_bytes: int
) -> None:
    path = write_table(scratch / name, texts, part_rows)
    assert read(path) == as_documents(texts)
    assert read(path, unit_bytes=unit_bytes) == as_documents(texts)


@settings(max_examples=25, deadline=None)
@given(unit_bytes=st.integers(1, 20_000))
def test_a_folder_of_all_formats_does_not_depend_on_the_units(all_formats: Path, unit_bytes: int) -> None:
    for reading in (BLANK_LINE, ReadSettings("file")):
        assert read(all_formats, reading, unit_bytes) == read(all_formats, reading)


@pytest.fixture(scope="module")
def all_formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all_formats")
    for suffix in COMPRESS:
        write(folder / f"a.txt{suffix}", "\n\n".join(TEXTS).encode())
        write(folder / f"a.jsonl{suffix}", as_json_lines(TEXTS))
    for name in TABLES:
        write_table(folder / name, TEXTS)
    return folder


def test_large_files_are_split_and_small_ones_share_a_unit(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", as_json_lines(["x" * 50] * 40))
    table = write_table(tmp_path / "b.parquet", ["x" * 50] * 40, part_rows=1)
    for number in range(30):
        write(tmp_path / f"c{number}.txt", b"text")
    write(tmp_path / "d.txt.gz", b"\n\n".join(str(number).encode() for number in range(2000)))
    sources = find_sources([tmp_path], BLANK_LINE)
    units = plan_units(sources, unit_bytes=1000)
    pieces = [piece for unit in units for piece in unit.pieces]
    num_pieces = [sum(piece.source == source for piece in pieces) for source in sources]
    assert num_pieces[0] == -(-sources[0].size_bytes // 1000) == 3
    assert num_pieces[1] >= table.stat().st_size // 1000 > 3
    assert num_pieces[2:] == [1] * 31
    assert sources[-1].size_bytes > 1000
    assert len({unit.pieces for unit in units for piece in unit.pieces if piece.source in sources[2:32]}) <= 2
    assert [unit.size_bytes for unit in units if len(unit.pieces) > 1 and unit.size_bytes > 1000] == []
    assert plan_units(sources, 1000) == units


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_a_unit_reads_its_own_documents_alone(tmp_path: Path, name: str) -> None:
    """No unit of a file of equal documents has many more than its share."""
    path, texts = tmp_path / name, [f"text {number:3}" for number in range(200)]
    if name == "a.txt":
        write(path, "\n\n".join(texts).encode())
    elif name == "a.jsonl":
        write(path, as_json_lines(texts))
    else:
        write_table(path, texts, part_rows=5)
    sources = find_sources([path], BLANK_LINE)
    units = plan_units(sources, -(-path.stat().st_size // 10))
    counts = [len(list(read_unit(unit))) for unit in units]
    assert sum(counts) == 200
    assert max(counts) <= 25
    assert len(counts) in (10, 11, 14)


def test_a_document_per_file_is_never_split(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"one\n\n" * 1000)
    (unit,) = plan_units(find_sources([tmp_path], ReadSettings("file")), unit_bytes=1)
    assert len(unit.pieces) == 1
    assert len(plan_units(find_sources([tmp_path], BLANK_LINE), unit_bytes=100)) == 50


@pytest.mark.parametrize("unit_bytes", [10, 100, WHOLE])
def test_a_bad_line_keeps_its_number_in_every_unit(tmp_path: Path, unit_bytes: int) -> None:
    content = as_json_lines(TEXTS) + b'\r\n{"text": 5}\n'
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        with pytest.raises(ValueError, match=rf"{name}: line {len(TEXTS) + 2}: expected"):
            read(write(tmp_path / name, content), unit_bytes=unit_bytes)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("unit_bytes", [1, 7, 100, WHOLE])
def test_bytes_that_are_not_utf8_keep_their_place_in_every_unit(tmp_path: Path, name: str, unit_bytes: int) -> None:
    before = as_json_lines(TEXTS) if name == "a.jsonl" else "\n\n".join(TEXTS).encode()
    path = write(tmp_path / name, before + b'\n{"text": "\xe9"}\n\n{"text": "more"}\n')
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8 at byte {len(before) + 11} \(found 0xe9\)"):
        read(path, unit_bytes=unit_bytes)


def test_a_bom_counts_at_the_start_of_the_file_alone(tmp_path: Path) -> None:
    bom = "\ufeff"
    path = write(tmp_path / "a.txt", f"{bom}\n\none\n{bom}\ntwo\n\n{bom}three".encode())
    for unit_bytes in (1, 2, 5, WHOLE):
        assert read(path, unit_bytes=unit_bytes) == [("one", bom, "two"), (f"{bom}three",)]


@pytest.mark.parametrize("document_per", ["file", "blank_line"])
def test_a_lone_carriage_return_is_white_space(tmp_path: Path, document_per: DocumentPer, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.txt", b"two \rwords\r\rmore\r\r\nnext\r")
    ((first, second),) = read(path, ReadSettings(document_per))
    assert (first, second) == ("two \rwords\r\rmore", "next")
    assert tokenizer.encode([first]).tolist() == tokenizer.encode(["two words more"]).tolist()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_files_without_text(tmp_path: Path, kind: str, suffix: str) -> None:
    write(tmp_path / f"a{kind}{suffix}", b"")
    write(tmp_path / f"b{kind}{suffix}", b"\r\n \n\n")
    write(tmp_path / "c.txt", b"text")
    for unit_bytes in (1, WHOLE):
        assert read(tmp_path, unit_bytes=unit_bytes) == [("text",)]


@pytest.mark.parametrize("name", TABLES)
def test_tables_without_rows(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name, [])
    write(tmp_path / "z.txt", b"text")
    assert read(tmp_path) == [("text",)]


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.txt.xz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", *TABLES]
)
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    texts = [f"{number} {'x' * (number % 17)}" for number in range(300)]
    path = tmp_path / name
    if name in TABLES:
        write_table(path, texts, part_rows=100)
    else:
        write(path, as_json_lines(texts) if "jsonl" in name else "\n\n".join(texts).encode())
    whole = path.read_bytes()
    assert len(read(path)) == 300
    for size_bytes in (0, 1, 5, 20, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size_bytes])
        if name == "stream.arrow" and size_bytes >= len(whole) - 9:
            continue  # the mark behind its last batch; a stream may go without
        for reading in (BLANK_LINE, ReadSettings("file")):
            with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: is cut short or damaged \(.+\)"):
                read(path, reading)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("damage", ["no such format", "damaged", "more behind it"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    text = "\n\n".join(f"{number * 7919 % 1000} text" for number in range(3000)).encode()
    with_checksum = {".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    content = bytearray(with_checksum.get(suffix, COMPRESS[suffix])(text))
    if damage == "damaged":
        content[len(content) // 2] ^= 0x40
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(
        {"no such format": text, "damaged": bytes(content), "more behind it": content + b"rubbish!"}[damage]
    )
    with pytest.raises(ValueError, match=rf"a\.txt{suffix}: is cut short or damaged"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files_joined_are_one_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](part) for part in (b"one\n\ntw", b"", b"o\n", b"\nthree")))
    assert read(path) == [("one",), ("two",), ("three",)]
    path.write_bytes(path.read_bytes() + bytes(1000))
    assert read(path) == [("one",), ("two",), ("three",)], "padding"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_text_is_streamed(tmp_path: Path, suffix: str) -> None:
    """Many documents of a file that is far larger than what is held of it."""
    path = write(tmp_path / f"a.jsonl{suffix}", as_json_lines(["x" * 2500]) * 20_000)
    sources = find_sources([path], BLANK_LINE)
    (unit,) = plan_units(sources)
    tracemalloc.start()
    num_documents = sum(1 for _ in read_unit(unit))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_documents == 20_000
    assert peak_bytes < 24 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize(
    ("kind", "document_per"), [(".txt", "file"), (".txt", "blank_line"), (".jsonl", "file")]
)  # fmt: skip
def test_a_decompression_bomb_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str, document_per: DocumentPer
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 2**20)
    path = write(tmp_path / f"a{kind}{suffix}", bytes(40 * 2**20))
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"a{kind}{suffix}: .* {2**20} bytes"):
        read(path, ReadSettings(document_per))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.zst", "a.jsonl.gz"])
def test_a_line_of_50_mb(tmp_path: Path, name: str) -> None:
    texts = ["short", "word " * 10_000_000, "short again", "the end"]
    path = write(tmp_path / name, as_json_lines(texts) if "jsonl" in name else "\n\n".join(texts).encode())
    for unit_bytes in (2**20, 8 * 2**20, WHOLE):
        assert read(path, unit_bytes=unit_bytes) == as_documents(texts)


def test_globs(tmp_path: Path) -> None:
    for name in ("x/b.jsonl.gz", "x/a.jsonl.gz", "x/c.txt", "y/a.jsonl.gz", "y/deep/z.txt", "y/notes.md"):
        write(tmp_path / name, as_json_lines([name]) if "jsonl" in name else name.encode())
    expected = {
        "x/*.jsonl.gz": ["a.jsonl.gz", "b.jsonl.gz"],
        "*/a.jsonl.gz": ["x/a.jsonl.gz", "y/a.jsonl.gz"],
        "[y]/*": ["y/a.jsonl.gz", "y/deep/z.txt"],
        "**/*.txt": ["x/c.txt", "y/deep/z.txt"],
        "y/**": ["a.jsonl.gz", "deep/z.txt"],
    }
    assert {glob: [source.name for source in find_sources([tmp_path / glob])] for glob in expected} == expected
    assert read(tmp_path / "x/*.jsonl.gz") == [("x/a.jsonl.gz",), ("x/b.jsonl.gz",)]
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        find_sources([tmp_path / "*.parquet"])
    with pytest.raises(ValueError, match=r"\*\.md: no .* file there"):
        find_sources([tmp_path / "y" / "*.md"])


def test_a_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", b"one")
    write(tmp_path / "a1.txt", b"two")
    assert [source.name for source in find_sources([tmp_path / "a[1].txt"])] == ["a[1].txt"]


def test_globs_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "texts" / "a.txt", b"one")
    monkeypatch.chdir(tmp_path)
    size_bytes, mtime_ns = 3, Path("texts/a.txt").stat().st_mtime_ns
    assert find_sources([Path("texts/*")]) == [Source(Path("texts/a.txt"), "a.txt", size_bytes, mtime_ns)]
    assert find_sources([Path("*/a.txt")]) == [Source(Path("texts/a.txt"), "texts/a.txt", size_bytes, mtime_ns)]


def test_a_folder_of_arrow_streams_with_json_beside_them(tmp_path: Path) -> None:
    """As the library `datasets` saves it."""
    for split in ("train", "test"):
        for number, text in enumerate(["one", "two"]):
            write_table(tmp_path / split / f"data-stream-{number}.arrow", [f"{split} {text}"])
        write(tmp_path / split / "dataset_info.json", b'{"features": {}}')
        write(tmp_path / split / "state.json", b"{}")
    write(tmp_path / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert read(tmp_path) == [("test one",), ("test two",), ("train one",), ("train two",)]


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst", "a.gz", "a.json", "a.csv.gz", "a.TXT"])
def test_names_of_other_files(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"text")
    with pytest.raises(ValueError, match=rf"{name}: expected a name that ends in {re.escape(formats.EXPECTED_NAMES)}"):
        find_sources([tmp_path / name])


@pytest.mark.slow
def test_a_unit_without_a_blank_line_reads_no_further_than_its_end(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, far behind it, are not its business: not behind many lines, nor behind a long one."""
    for content in (b"word\n" * 2**20 + b"\xe9", b"x" * 5 * 2**20 + b"\n\xe9"):
        sources = find_sources([write(tmp_path / "a.txt", content)], BLANK_LINE)
        first, *others, _, _ = plan_units(sources, unit_bytes=2**20)
        assert len(others) == 3
        assert [list(read_unit(unit)) for unit in others] == [[]] * 3
        with pytest.raises(ValueError, match=f"not UTF-8 at byte {len(content) - 1}"):
            list(read_unit(first))


@pytest.mark.parametrize("name", ["a.arrow", "stream.arrow"])
def test_places_of_strings_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, ["one", "three", "seventeen"], part_rows=3)
    places = struct.pack("<4i", 0, 3, 8, 17)
    assert places in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(places, struct.pack("<4i", 0, 3, 2**30, 17)))
    with pytest.raises(ValueError, match=rf"{name}: is cut short or damaged"):
        read(path)


def test_a_data_set_does_not_depend_on_the_format(
    tmp_path: Path, chapters: list[Path], build_data: Callable[..., bool]
) -> None:
    texts = [chapter.read_text() for chapter in chapters[:5]]
    write(tmp_path / "jsonl" / "a.jsonl.zst", as_json_lines(texts, "content"))
    write(tmp_path / "txt" / "a.txt", "\n\n".join(re.sub(r"\n\s*\n", "\n", text.strip()) for text in texts).encode())
    write_table(tmp_path / "parquet" / "a.parquet", texts)
    build_data([tmp_path / "jsonl"], tmp_path / "1", text_field="content")
    build_data([tmp_path / "txt"], tmp_path / "2", document_per="blank_line")
    build_data([tmp_path / "parquet" / "*"], tmp_path / "3")
    one, two, three = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix == ".h5"}
        for name in ("1", "2", "3")
    )
    assert one == two == three
    assert "train-00000.h5" in one
