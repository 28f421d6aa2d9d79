"""benchmarks.corpora: parsers on small hand-made inputs, what comes out twice, and two real packages."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY, assert_user_error, run_command

from benchmarks.corpora import output, packages
from benchmarks.corpora.containers import (
    Synset,
    parse_description,
    read_dictd,
    read_rdb,
    read_stanzas,
    read_sword,
    read_wordnet,
)
from benchmarks.corpora.markup import (
    blocks,
    osis_paragraphs,
)
from benchmarks.corpora.output import clean_documents, is_made, make_entry, read_entries
from benchmarks.corpora.packages import Debian, DebianLists, Pip, Shelf, read_archive
from benchmarks.corpora.registry import ENTRIES, SHA256, Kind
from benchmarks.corpora.tasks import find_answer, split_of
from benchmarks.corpora.tasks import wordnet_qa as wordnet_qa_entry
from data_prep.console import progress_bar


def r_strings(strings: list[str | None], version: int = 3) -> bytes:
    """A character vector as R's saveRDS writes it (XDR)."""
    native = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    body = b"".join(
        struct.pack(">Ii", 0x00040009, -1 if s is None else len(s.encode())) + (s or "").encode() for s in strings
    )
    return (
        b"X\n" + struct.pack(">iii", version, 0x040201, 0x030500) + native + struct.pack(">Ii", 16, len(strings)) + body
    )


def test_rdb_of_each_compression() -> None:
    lists: list[list[str | None]] = [["Emma", "", "naïve"], ["\t\x00\x00\x00\x04trap"], ["a", None, "b"]]
    numbers = b"X\n" + struct.pack(">iii", 2, 0x040201, 0x030500) + struct.pack(">Ii", 13, 1) + b"\0\0\0\7"
    raws = [r_strings(lists[0]), numbers, r_strings(lists[1], version=2), r_strings(lists[2])]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    packed = [
        zlib.compress(raws[0]), zlib.compress(raws[1]), b"2" + bz2.compress(raws[2]),
        b"Z" + lzma.compress(raws[3], format=lzma.FORMAT_RAW, filters=filters),
    ]  # fmt: skip
    content = b"".join(struct.pack(">I", len(raw)) + data for raw, data in zip(raws, packed, strict=True))
    assert list(read_rdb(content)) == [lists[0], lists[1], ["a", "b"]]


def test_rdb_refuses_other_serializations() -> None:
    with pytest.raises(ValueError, match="XDR"):
        list(read_rdb(struct.pack(">I", 9) + zlib.compress(b"A\n2 ascii")))


def dictd_number(value: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (dictd_number(value // 64) if value >= 64 else "") + digits[value % 64]


def test_dictd_entries_once_in_the_order_of_the_file() -> None:
    entries = {
        "00-database-short": "  The title\n",
        "zebra": "zebra\n  An animal.\n",
        "ant": "ant\n  Ameise, größer: ß.\n",
    }
    text = "".join(entries.values()).encode()
    at = {word: text.index(entry.encode()) for word, entry in entries.items()}
    words = [*entries, "ants"]
    lines = [
        f"{word}\t{dictd_number(at[key])}\t{dictd_number(len(entries[key].encode()))}\n"
        for word in sorted(words)
        for key in ["ant" if word == "ants" else word]
    ]
    read = list(read_dictd("".join(lines).encode(), gzip.compress(text)))
    assert read == [entries["zebra"], entries["ant"]]


def sword_module(entries: list[str], blocks_of: list[int]) -> tuple[bytes, bytes, bytes]:
    """A testament: `blocks_of` says in which block each entry lies; an empty entry has a place but no text."""
    texts: dict[int, bytes] = {}
    verses = b""
    for entry, block in zip(entries, blocks_of, strict=True):
        start = len(texts.setdefault(block, b""))
        verses += struct.pack("<IIH", block, start, len(entry.encode())) if entry else bytes(10)
        texts[block] += entry.encode()
    packed = [zlib.compress(texts[block]) for block in sorted(texts)]
    starts = [sum(map(len, packed[:i])) for i in range(len(packed))]
    index = b"".join(
        struct.pack("<III", start, len(data), len(texts[i]))
        for i, (start, data) in enumerate(zip(starts, packed, strict=True))
    )
    return index, verses, b"".join(packed)


def test_sword_numbers_verses_from_their_chapter() -> None:
    entries = [
        "header",
        '<chapter n="1" sID="Gen.1"/>',
        "In the <w>beginning</w> .",
        "",
        "Third.",
        '<chapter sID="Gen.2"/>',
        "Ω.",
    ]
    read = list(read_sword(*sword_module(entries, [0, 0, 0, 0, 1, 1, 1])))
    assert [verse[:2] for verse in read] == [
        ("", 1),
        ("Gen.1", 0),
        ("Gen.1", 1),
        ("Gen.1", 3),
        ("Gen.2", 0),
        ("Gen.2", 1),
    ]
    assert [osis_paragraphs(verse.markup) for verse in read[2:]] == [["In the beginning."], ["Third."], [], ["Ω."]]


def test_sword_entry_of_several_verses_comes_once() -> None:
    index, verses, texts = sword_module(["A comment.", "Another."], [0, 0])
    read = list(read_sword(index, verses[:10] * 3 + verses[10:], texts))
    assert [verse.markup for verse in read] == ["A comment.", "Another."]


def test_osis_without_notes_and_titles() -> None:
    markup = '<title>Head</title><div sID="a" type="x-p"/>“ <w>God</w> said<note>a <b>note</b></note>, &amp; so<div eID="a"/>Next'
    assert osis_paragraphs(markup) == ["“God said, & so", "Next"]


def test_control_description() -> None:
    text = (
        "Package: a\nDescription-en: short words\n First line\n second line.\n .\n New one:\n  * item\n  * other\n after\n\n"
        "Package: b\nSection: net\n"
    )
    first, second = read_stanzas(text)
    assert second == {"Package": "b", "Section": "net"}
    synopsis, paragraphs = parse_description(first["Description-en"])
    assert synopsis == "short words"
    assert paragraphs == ["First line second line.", "New one:", "* item", "* other", "after"]


def test_wordnet_gloss_without_examples() -> None:
    data = '  1 licence\n0000 03 n 02 hot_dog 0 dog 1 001 @ 0 n 0000 | a sausage; in a bun; "I ate it"  \n'
    data += "0001 00 s 01 galore(ip) 0 000 | in great numbers  \n"
    assert list(read_wordnet(data.encode())) == [
        Synset(3, "hot dog", "a sausage; in a bun"), Synset(0, "galore", "in great numbers")
    ]  # fmt: skip


def test_blocks() -> None:
    assert blocks("a\n  b\n \t\nc  d\r\n\r\ne\n") == ["a b", "c d", "e"]


def test_documents_are_cleaned_and_come_once() -> None:
    long, other = (
        "one two three four five six seven eight",
        "nine ten  eleven twelve thirteen\tfourteen fifteen sixteen",
    )
    documents = [
        ["Head", long],
        ["too short"],
        [long, "Tail"],
        [other],
        [other],
        ["a b c d", "e f g h"],
        ["a b c d", "e f g h"],
    ]
    assert list(clean_documents(documents)) == [f"Head\n{long}", " ".join(other.split()), "a b c d\ne f g h"]


def test_split_keeps_nine_tenths_for_training() -> None:
    splits = [split_of(f"text {i}") for i in range(4000)]
    assert splits == [split_of(f"text {i}") for i in range(4000)]
    for name, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert splits.count(name) / 4000 == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("passage", "answer", "expected"),
    [
        ("It is May 1983.", "May 1983", "May 1983"), ("a “ quoted ” word", '"quoted"', "“ quoted ”"),
        ("In 1990 – 1995 .", "1990-1995", "1990 – 1995"), ("İstanbul and Ankara", "ANKARA", "Ankara"), ("x", "y", None),
    ],
)  # fmt: skip
def test_answer_is_found(passage: str, answer: str, expected: str | None) -> None:
    span = find_answer(passage, answer)
    assert (passage[span[0] : span[1]] if span else None) == expected


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_archive_gives_regular_files_by_path(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar.gz", ("./b/2.txt", b"two"), ("a/1.txt", b"one"), ("a/1.bin", b""))
    assert list(read_archive(path, r".*\.txt").items()) == [("a/1.txt", b"one"), ("b/2.txt", b"two")]


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "a\\..\\evil.txt"])
@pytest.mark.parametrize("form", ["tar", "zip"])
def test_archive_that_leads_outside_is_refused(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / "evil.zip"
    if form == "tar":
        path = tar_of(tmp_path / "evil.tar.gz", (name, b"x"))
    else:
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr(name, "x")
    with pytest.raises(ValueError, match="refused"):
        read_archive(path, "good")


def test_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar.gz", ("a.txt", bytes(range(256)) * 100))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.tar\.gz: is damaged"):
        read_archive(path, r".*")


def test_debian_package_is_read_and_a_cut_one_named(tmp_path: Path) -> None:
    (tmp_path / "tree/DEBIAN").mkdir(parents=True)
    (tmp_path / "tree/usr").mkdir()
    fields = {"Package": "a", "Version": "1:2", "Architecture": "all", "Maintainer": "me <me@x>", "Description": "d"}
    (tmp_path / "tree/DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    (tmp_path / "tree/usr/text.txt").write_text("content\n" * 1000)
    path = tmp_path / "deb" / "a_1%3a2_all.deb"
    path.parent.mkdir()
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", path], check=True, capture_output=True)
    shelf = Shelf(tmp_path)
    assert shelf.read(Debian("a", "1:2"), r"usr/.*\.txt") == {"usr/text.txt": b"content\n" * 1000}
    assert shelf.versions == {"a": "1:2"}
    with pytest.raises(ValueError, match="holds no file like"):
        shelf.read(Debian("a", "1:2"), "other")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"a_1%3a2_all\.deb"):
        shelf.read(Debian("a", "1:2"), r"usr/.*")


class FakeShelf(Shelf):
    """Files given by the test."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(Path())
        self._files = files

    def read(self, package: Debian | Pip, pattern: str) -> dict[str, bytes]:
        return self._files


def test_wordnet_qa_asks_for_a_field_that_one_gloss_or_none_is_of() -> None:
    fields = {5: "animal", 6: "artifact", 13: "food", 15: "location", 18: "person", 20: "plant"}
    lines = [
        f"{10 * number + i:08} {number:02} n 01 word{i} 0 000 @ | the gloss number {i} of {name}"
        for number, name in fields.items()
        for i in range(20)
    ]
    lines.append("00000001 09 n 01 idea 0 000 @ | a gloss of a field that is not asked for")
    splits = wordnet_qa_entry(FakeShelf({"data.noun": "\n".join(lines).encode()}))
    passages = [passage for passages in splits.values() for passage in passages]
    told: list[str] = []
    for passage in passages:
        glosses = [gloss.strip() for gloss in passage["context"].split(".")[:-1]]
        names = [gloss.split()[-1] for gloss in glosses]
        assert len(set(names)) == 3
        assert set(names) <= set(fields.values())
        told += glosses
        *found, missing = passage["qas"]
        assert missing["is_impossible"]
        assert missing["question"].removeprefix("Which is a kind of ").rstrip("?") not in names
        assert len({question["question"] for question in found}) == 3
        for question in found:
            (answer,) = question["answers"]
            assert answer["text"] in glosses
            assert question["question"] == f"Which is a kind of {answer['text'].split()[-1]}?"
    assert len(told) == len(set(told))
    assert len(passages) > 20


def test_made_twice_is_the_same_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(shelf: Shelf) -> Any:
        shelf.versions["dict-jargon"] = "1.0"
        return iter([["One two three four five six seven eight — neun."], ["too short"]])

    entry = replace(ENTRIES["dict-jargon"], make=make)
    text = '{"text": "One two three four five six seven eight — neun."}\n'.encode()
    monkeypatch.setitem(SHA256, "text/dict-jargon.jsonl", hashlib.sha256(text).hexdigest())
    first = make_entry(entry, tmp_path / "a", tmp_path)
    made = make_entry(entry, tmp_path / "b", tmp_path)
    assert (tmp_path / "a/text/dict-jargon.jsonl").read_bytes() == text
    assert (tmp_path / "b/text/dict-jargon.jsonl").read_bytes() == text
    assert (tmp_path / "a/MANIFEST.json").read_bytes() == (tmp_path / "b/MANIFEST.json").read_bytes()
    assert first == made == read_entries(tmp_path / "a")["dict-jargon"]
    assert (made["documents"], made["words"], made["bytes"], made["packages"]) == (
        1,
        10,
        len(text),
        {"dict-jargon": "1.0"},
    )

    monkeypatch.setattr(output, "make_entry", lambda *_: pytest.fail("made again"))
    assert output.make_all([entry], tmp_path / "a", tmp_path, lambda _: pytest.fail("nothing to do")) == {}
    (tmp_path / "a/text/dict-jargon.jsonl").write_bytes(text[:-1])
    assert not is_made(tmp_path / "a", first)


def test_other_bytes_than_expected_are_refused_unless_asked_for(tmp_path: Path) -> None:
    def make(shelf: Shelf) -> Any:
        shelf.versions["dict-jargon"] = "4.5"
        return iter([["One two three four five six seven eight nine."]])

    entry = replace(ENTRIES["dict-jargon"], make=make)
    expected = SHA256["text/dict-jargon.jsonl"][:12]
    with pytest.raises(
        ValueError, match=rf"dict-jargon\.jsonl, made of dict-jargon 4\.5, is another text .*expected {expected}\)"
    ):
        make_entry(entry, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    make_entry(entry, tmp_path, tmp_path, any_version=True)
    assert output.left_to_make([entry], tmp_path, any_version=True) == []
    assert output.left_to_make([entry], tmp_path) == [entry], "the next one who asks for the expected text gets it"


def test_every_file_has_its_hash() -> None:
    parts = {Kind.TEXT: ["text/{}.jsonl"], Kind.QA: ["tasks/{}/{{}}.json"], Kind.SEQ2SEQ: ["tasks/{}/{{}}.jsonl"]}
    expected = {
        name.format(part)
        for entry in ENTRIES.values()
        for name in (form.format(entry.name) for form in parts.get(entry.kind, ["tasks/{}/{{}}.tsv"]))
        for part in ("train", "validation", "test")
    }
    assert set(SHA256) == expected
    assert all(len(value) == 64 for value in SHA256.values())


@pytest.mark.parametrize("any_version", [False, True])
def test_another_version_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_version: bool) -> None:
    """Of a Debian that offers version 2 of a package, and the lists of another release."""
    tools = tmp_path / "bin"
    tools.mkdir()
    lists = tmp_path / "lists"
    lists.write_text("Package: a\nDescription-en: b\n")
    apt_get = f"""case "$*" in
        "download a=2") echo deb > a_2_all.deb;;
        download*) echo "E: Version not found" >&2; exit 100;;
        *) echo "trixie|13.1|{lists}"; echo "trixie-updates|13-updates|{lists}";;
    esac"""
    for name, script in (("apt-get", apt_get), ("apt-cache", "echo 'a | 2 | x'")):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    shelf = Shelf(tmp_path / "cache", any_version=any_version)
    monkeypatch.setattr(packages, "read_archive", lambda path, pattern: {path.name: b""})
    monkeypatch.setattr(packages, "_CAT_FILE", ("cat",))
    if any_version:
        assert list(shelf.read(Debian("a", "1"), ".*")) == ["a_2_all.deb"]
        assert shelf.descriptions(DebianLists("bookworm", "12.15")) == lists.read_text()
        assert shelf.versions == {"a": "2", "Debian package lists": "trixie-13.1"}
    else:
        with pytest.raises(ValueError, match="a=1: this machine's Debian offers 2; with --any_version"):
            shelf.read(Debian("a", "1"), ".*")
        with pytest.raises(
            ValueError, match=r"apt has the package lists of Debian 13\.1 \(trixie\), main, expected .* 12\.15"
        ):
            shelf.descriptions(DebianLists("bookworm", "12.15"))
    assert list(shelf.read(Debian("a", "2"), ".*")) == ["a_2_all.deb"]


def test_one_that_cannot_be_had_stops_no_other(tmp_path: Path) -> None:
    def fail(_: Shelf) -> Any:
        raise ValueError("no such package")

    document = ["one two three four five six seven eight"]
    bad, bad_too = (replace(ENTRIES[name], make=fail) for name in ("austen", "fortunes"))
    good = replace(ENTRIES["dict-jargon"], make=lambda _: iter([document]))
    bar = progress_bar("", 1, "B", is_shown=False)
    failures = output.make_all([bad, good, bad_too], tmp_path, tmp_path, lambda _: bar, any_version=True)
    assert failures == {"no such package": ["austen", "fortunes"]}
    assert list(read_entries(tmp_path)) == ["dict-jargon"]


def test_each_kind_writes_its_format(tmp_path: Path) -> None:
    qas = [{"id": "1", "question": "q", "is_impossible": True, "answers": []}]
    rows: dict[Kind, list[Any]] = {
        Kind.CLASSIFICATION: [("b", "x y")], Kind.PAIRS: [("b", "x", "y")],
        Kind.SEQ2SEQ: [("x", "y")], Kind.QA: [{"context": "c", "qas": qas}],
    }  # fmt: skip
    expected = {
        Kind.CLASSIFICATION: "label\ttext\nb\tx y\n",
        Kind.PAIRS: "label\ttext_a\ttext_b\nb\tx\ty\n", Kind.SEQ2SEQ: '{"src": "x", "tgt": "y"}\n',
        Kind.QA: json.dumps({"version": "v2.0", "data": [{"title": "", "paragraphs": rows[Kind.QA]}]}) + "\n",
    }  # fmt: skip
    for kind, content in expected.items():
        entry = replace(ENTRIES["vader-movies"], kind=kind, make=lambda _, kind=kind: {"train": rows[kind]})
        (name,) = make_entry(entry, tmp_path, tmp_path, any_version=True)["files"]
        assert (tmp_path / name).read_text() == content
        assert name.startswith("tasks/vader-movies/train.")


def test_list_shows_licences_and_makes_nothing(tmp_path: Path) -> None:
    done = corpora("--list", "--json", "--output", str(tmp_path / "out"))
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(ENTRIES)
    assert rows["disfl-qa"]["use"] == "local use only"
    assert rows["dict-jargon"]["licence"] == "public domain"
    assert not (tmp_path / "out").exists()


def test_docs_name_every_corpus() -> None:
    page = (REPOSITORY / "docs" / "corpora.md").read_text()
    assert [name for name in ENTRIES if f"| `{name}` |" not in page] == []


def test_unknown_name_is_a_user_error() -> None:
    assert_user_error(corpora("dict-jargon", "no-such"), "no-such", "--list")


def test_empty_package_lists_say_what_to_run(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\nexit 0\n")
    (tools / "apt-get").chmod(0o755)
    command = [sys.executable, "-m", "benchmarks.corpora", "dict-jargon", "fortunes", "--output", str(tmp_path / "out")]
    done = run_command(command, PATH=str(tools))
    assert_user_error(done, "dict-jargon, fortunes", "apt-get update", "--update")


def corpora(*arguments: str) -> Any:
    return run_command([sys.executable, "-m", "benchmarks.corpora", *arguments])


@pytest.mark.heavy
def test_two_packages_through_apt(tmp_path: Path) -> None:
    arguments = ("dict-jargon", "fortunes", "--json", "--output", str(tmp_path))
    done = corpora("--update", *arguments)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    lines = (tmp_path / "text/dict-jargon.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert any("the closest hackish equivalent" in text for text in texts)
    assert made["dict-jargon"]["documents"] == len(lines) > 2000
    assert {name: file["sha256"] for entry in made.values() for name, file in entry["files"].items()} == {
        name: SHA256[name] for name in ("text/dict-jargon.jsonl", "text/fortunes.jsonl")
    }
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = corpora(*arguments)
    assert json.loads(again.stdout) == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times
