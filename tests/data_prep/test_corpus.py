from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_prep import corpus
from data_prep.corpus import Document, ReadSettings, find_sources, read_documents

BOM = b"\xef\xbb\xbf"


def texts(*paths: Path, document_per: corpus.DocumentPer = "file") -> list[str]:
    """The documents' lines, joined by |."""
    return ["|".join(document.lines) for document in read_documents(find_sources(paths, ReadSettings(document_per)))]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def json_lines(*values: str) -> bytes:
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def test_a_document_per_file(chapters: list[Path]) -> None:
    documents = list(read_documents(find_sources(chapters[:3])))
    for document, chapter in zip(documents, chapters[:3], strict=True):
        assert document.lines == tuple(line.strip() for line in chapter.read_text().split("\n") if line.strip())


def test_a_document_per_blank_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\n\none\n two \n\n \t\n\nthree\nfour\n\nfive\n\n")
    assert texts(path, document_per="blank_line") == ["one|two", "three|four", "five"]
    assert texts(path) == ["one|two|three|four|five"]


def test_a_document_per_json_line(sample_corpus: Path) -> None:
    path = sample_corpus / "devils_dictionary.jsonl"
    stored = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    documents = list(read_documents(find_sources([path])))
    assert [" ".join(" ".join(d.lines).split()) for d in documents] == [" ".join(text.split()) for text in stored]
    assert len(documents) == 714


def test_json_lines_may_hold_more_keys_blank_lines_and_line_breaks(tmp_path: Path) -> None:
    content = b'\n{"id": 1, "text": "one\\n\\ntwo"}\n\n  \n{"text": "three"}\n{"text": " "}\n'
    path = write(tmp_path / "a.jsonl", content)
    assert texts(path) == texts(path, document_per="blank_line") == ["one|two", "three"]


def test_files_come_in_the_order_of_their_names_below_the_folder(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", "c.txt", "a10.txt", "a9.txt"):
        write(tmp_path / name, json_lines(name) if name.endswith("jsonl") else name.encode())
    write(tmp_path / "notes.md", b"not a text")
    names = [source.name for source in find_sources([tmp_path])]
    assert names == ["a/c.jsonl", "a/z.txt", "a10.txt", "a9.txt", "b.txt", "c.txt"]
    assert texts(tmp_path) == names


def test_several_paths_come_as_given(tmp_path: Path) -> None:
    for name in ("x/b.txt", "x/a.txt", "y.txt"):
        write(tmp_path / name, name.encode())
    assert texts(tmp_path / "y.txt", tmp_path / "x") == ["y.txt", "x/a.txt", "x/b.txt"]


@pytest.mark.parametrize("document_per", ["file", "blank_line"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n \n\t\n", []),
        (BOM, []),
        (BOM + b"one\ntwo\n", ["one|two"]),
        (b"one\r\ntwo\r\n", ["one|two"]),
        (b"one\ntwo", ["one|two"]),
        ("naïve — 日本\n".encode(), ["naïve — 日本"]),
    ],
    ids=["empty", "white space", "BOM alone", "BOM", "CRLF", "no line end", "not ASCII"],
)
def test_text_files_as_they_occur(
    tmp_path: Path, content: bytes, expected: list[str], document_per: corpus.DocumentPer
) -> None:
    assert texts(write(tmp_path / "a.txt", content), document_per=document_per) == expected


@pytest.mark.parametrize(
    "content",
    [BOM + json_lines("one", "two"), json_lines("one", "two").replace(b"\n", b"\r\n"), json_lines("one", "two")[:-1]],
    ids=["BOM", "CRLF", "no line end"],
)
def test_json_files_as_they_occur(tmp_path: Path, content: bytes) -> None:
    assert texts(write(tmp_path / "a.jsonl", content)) == ["one", "two"]


def test_blank_lines_with_crlf_separate_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", BOM + b"one\r\n\r\ntwo\r\nthree")
    assert texts(path, document_per="blank_line") == ["one", "two|three"]


@pytest.mark.parametrize(("name", "document_per"), [("a.txt", "file"), ("a.txt", "blank_line"), ("a.jsonl", "file")])
@pytest.mark.parametrize("first", [b"", BOM], ids=["", "BOM"])
def test_text_that_is_not_utf8_is_named_to_the_byte(
    tmp_path: Path, chapters: list[Path], name: str, document_per: corpus.DocumentPer, first: bytes
) -> None:
    lines = [line for line in chapters[0].read_text().splitlines() if line]
    before = first + (json_lines(*lines) if name == "a.jsonl" else "\n\n".join(lines).encode())
    path = write(tmp_path / name, before + b'\n{"text": "caf\xe9 au lait"}\n' + json_lines("more"))
    message = rf"a\.\w+: not UTF-8 at byte {len(before) + 14} \(found 0xe9\)"
    assert path.read_bytes()[len(before) + 14] == 0xE9
    with pytest.raises(ValueError, match=message):
        texts(path, document_per=document_per)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "no end', "not valid JSON"),
        (b'{"text": "one"} {"text": "two"}', "not valid JSON"),
        (b"plain text", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "a", "number": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"body": "text"}', 'expected a JSON object with a string under "text"'),
        (b'{"text": 5}', 'expected a JSON object with a string under "text"'),
        (b'["text"]', 'expected a JSON object with a string under "text"'),
        (b'{"text": "half a pair: \\ud83d"}', "surrogate"),
    ],
    ids=["cut off", "two on a line", "no JSON", "nested", "huge number", "no text", "number", "list", "lone surrogate"],
)  # fmt: skip
def test_bad_json_is_named_to_the_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", json_lines("one") + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 3: .*{reason}"):
        [document.hash for document in read_documents(find_sources([path]))]


@pytest.mark.parametrize(("name", "document_per"), [("a.txt", "file"), ("a.txt", "blank_line"), ("a.jsonl", "file")])
def test_a_document_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, document_per: corpus.DocumentPer
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    allowed, too_large = b"x" * 90, b"y" * 60 + b"\n" + b"z" * 60
    as_json = name == "a.jsonl"
    write(tmp_path / "allowed" / name, json_lines("x" * 80) if as_json else allowed)
    write(tmp_path / "large" / name, json_lines(too_large.decode()) if as_json else too_large)
    assert len(texts(tmp_path / "allowed", document_per=document_per)) == 1
    with pytest.raises(ValueError, match=rf"{name}: .*100"):
        texts(tmp_path / "large", document_per=document_per)


def test_bytes_read_are_reported(sample_corpus: Path) -> None:
    for reading in (ReadSettings("file"), ReadSettings("blank_line")):
        sources = find_sources([sample_corpus], reading)
        advances: list[int] = []
        assert list(read_documents(sources, advances.append))
        assert sum(advances) == sum(source.size_bytes for source in sources)


def test_no_such_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        find_sources([tmp_path / "missing"])


def test_a_folder_without_texts(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", b"text")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no \.txt, \.jsonl \(.*\), \.parquet or \.arrow file there"):
        find_sources([tmp_path])


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "text.pdf", b"text")
    with pytest.raises(ValueError, match=r"text\.pdf: expected a name that ends in \.txt, \.jsonl"):
        find_sources([path])


def test_the_hash_is_of_the_text_alone(tmp_path: Path) -> None:
    written = [
        write(tmp_path / "a.txt", b"one\ntwo\n"), write(tmp_path / "b.txt", BOM + b" one\r\n\r\ntwo"),
        write(tmp_path / "c.jsonl", json_lines("one\ntwo")),
    ]  # fmt: skip
    assert len({document.hash for document in read_documents(find_sources(written))}) == 1
    assert Document(("one", "two")).hash == int.from_bytes(hashlib.blake2b(b"one\ntwo", digest_size=8).digest(), "big")
    assert Document(("one", "two")).hash != Document(("onetwo",)).hash
