"""Text at URLs, from real servers of this machine: the data set is that of local files, or one line tells why not."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from support import files_of
from texts import as_json_lines, write, write_table

from data_prep import build as build_module
from data_prep import storage
from data_prep.console import describe_error
from data_prep.corpus import ReadSettings, find_sources, plan_units, read_documents
from data_prep.mixture import Corpus, read_mixture, sources_of
from data_prep.storage import Url, location, open_raw, state_of

Build = Callable[..., bool]
TEXTS = [f"Text number {number}, in two lines\nas it is kept in many places of the world" for number in range(300)]


class _Server(ThreadingHTTPServer):
    """A web server of a folder that knows ranges."""

    folder: Path
    failures: list[str]
    """What goes wrong with the next requests for content: a status, "cut" or "whole"."""
    num_requests = 0


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        failure = self.server.failures.pop(0) if self.server.failures and self.command == "GET" else ""
        if failure.isdigit() or not path.is_file():
            self.send_response(int(failure or HTTPStatus.NOT_FOUND))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        tag = hashlib.sha256(content).hexdigest()
        is_part = asked is not None and failure != "whole"
        if asked and is_part:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.server.num_requests += self.command == "GET"
        self.send_response(HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", tag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if failure == "cut" else content)
        if failure == "cut":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[_Server, str]]:
    """A server, and the URL of its folder."""
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.001)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.failures = tmp_path / "served", []
    server.folder.mkdir()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def write_all_formats(folder: Path) -> list[str]:
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        write(folder / name, as_json_lines(TEXTS))
    write(folder / "d.txt", "\n\n".join(TEXTS).encode())
    for name in ("e.parquet", "f.arrow", "stream-g.arrow"):
        write_table(folder / name, TEXTS, part_rows=50)
    return sorted(path.name for path in folder.iterdir())


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name.endswith(".h5")}


@pytest.mark.parametrize("range_bytes", [1_000, 2**22])
def test_every_format_is_read_from_a_web_server(
    served: tuple[_Server, str], monkeypatch: pytest.MonkeyPatch, range_bytes: int
) -> None:
    server, root = served
    names = write_all_formats(server.folder)
    monkeypatch.setattr(storage, "RANGE_BYTES", range_bytes)
    reading = ReadSettings("blank_line")
    local, remote = (
        find_sources([place(name) for name in names], reading)
        for place in (lambda name: server.folder / name, lambda name: Url(f"{root}/{name}?version=1"))
    )
    assert [source.name for source in remote] == [source.name for source in local] == names
    assert [d.lines for d in read_documents(remote)] == [d.lines for d in read_documents(local)]


def test_the_data_set_is_that_of_local_files(
    served: tuple[_Server, str], tmp_path: Path, build_data: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two processes, which are forked after the conductor has asked the server; a local corpus in the same mixture."""
    server, root = served
    names = write_all_formats(server.folder)
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=8_000))
    shutil.copytree(server.folder, tmp_path / "local" / "copy")
    for kind, paths in (
        ("local", [str(tmp_path / "local" / "copy" / name) for name in names]),
        ("remote", [f"{root}/{name}" for name in names]),
    ):
        (tmp_path / f"{kind}.yaml").write_text(
            f"corpora:\n- {{name: web, document_per: blank_line, paths: {paths}}}\n- {{name: disk, paths: local/copy/a.jsonl}}\n"
        )
    for kind, workers in (("local", 1), ("remote", 2)):
        assert build_data(tmp_path / f"{kind}.yaml", tmp_path / f"data-{kind}", workers=workers)
    assert shards_of(tmp_path / "data-local") == shards_of(tmp_path / "data-remote")
    assert len(shards_of(tmp_path / "data-local")) > 1
    lists = [(tmp_path / f"data-{kind}" / "sources.jsonl").read_text() for kind in ("local", "remote")]
    assert lists[0] == lists[1]
    assert not build_data(tmp_path / "remote.yaml", tmp_path / "data-remote")
    write(server.folder / "d.txt", "\n\n".join(reversed(TEXTS)).encode())
    with pytest.raises(ValueError, match="made from other sources"):
        build_data(tmp_path / "remote.yaml", tmp_path / "data-remote")


def test_what_does_not_come_is_asked_for_again(served: tuple[_Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, root = served
    content = write(server.folder / "a.txt", bytes(range(256)) * 40).read_bytes()
    monkeypatch.setattr(storage, "RANGE_BYTES", 4_000)
    server.failures = ["503", "cut", "429", "", "cut", "500"]
    with open_raw(Url(f"{root}/a.txt")) as file:
        assert b"".join(iter(lambda: file.read(1_500), b"")) == content
    assert server.failures == []
    server.failures = ["503"] * 100
    with open_raw(Url(f"{root}/a.txt")) as file, pytest.raises(OSError, match="tried 6 times") as failure:
        file.read(10)
    assert describe_error(failure.value).startswith(f"{root}/a.txt: cannot be read")
    assert len(server.failures) == 94


def test_only_what_is_needed_is_asked_for(served: tuple[_Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, root = served
    write(server.folder / "a.txt", b"x" * 100_000)
    monkeypatch.setattr(storage, "RANGE_BYTES", 1_000)
    with open_raw(Url(f"{root}/a.txt")) as file:
        file.seek(50_000)
        assert file.read(10) == b"x" * 10
        assert file.read(10) == b"x" * 10
    assert server.num_requests == 1


def test_a_server_without_ranges_is_told(served: tuple[_Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, root = served
    write(server.folder / "a.txt", b"x" * 10_000)
    monkeypatch.setattr(storage, "RANGE_BYTES", 1_000)
    server.failures = ["whole"]
    with open_raw(Url(f"{root}/a.txt")) as file, pytest.raises(ValueError, match=r"a\.txt: the server sends more"):
        file.read(10)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{root}/none.txt", "none.txt: No such file"),
        ("{root}/a.csv", "a.csv: no .txt, .jsonl"),
        ("ftp://127.0.0.1/a.txt", "ftp://127.0.0.1/a.txt: expected s3://, hf://, https://, http:// or a path"),
    ],
)
def test_a_bad_url_is_one_line(
    served: tuple[_Server, str],
    url: str,
    words: str,
    tmp_path: Path,
    tokenizer: object,
    data_prep_command: Callable[..., object],
) -> None:
    server, root = served
    write(server.folder / "a.csv", b"x")
    done = data_prep_command(
        "build",
        "--corpus",
        url.format(root=root),
        "--tokenizer",
        tokenizer.path,
        "--data",
        tmp_path / "data",  # type: ignore[attr-defined]
    )
    assert done.returncode == 2  # type: ignore[attr-defined]
    assert done.stderr.count("\n") == 1  # type: ignore[attr-defined]
    assert words in done.stderr  # type: ignore[attr-defined]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    monkeypatch.setitem(__import__("sys").modules, "fsspec.implementations.http", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[remote\]'"):
        state_of(Url("https://127.0.0.1:1/a.txt"))


def test_locations() -> None:
    assert location("texts/a.txt") == Path("texts/a.txt")
    url = location("https://host/x/a.jsonl.gz?token=a/b.txt")
    assert isinstance(url, Url)
    assert (url.name, url.suffix, url.stem) == ("a.jsonl.gz", ".gz", "a.jsonl")
    assert location("s3://bucket/a?b.txt").name == "a?b.txt"


# ---- S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, bytes], None]]:
    """A server that speaks S3, with a bucket; what puts an object into it."""
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(storage, "_FIRST_PAUSE_S", 0.001)
        client = boto3.client("s3")
        client.create_bucket(Bucket="texts")
        yield lambda key, content: client.put_object(Bucket="texts", Key=key, Body=content) and None
        server.stop()


def test_objects_below_a_prefix_and_by_globs(s3: Callable[[str, bytes], None]) -> None:
    for key in ("g/x/b.txt", "g/x/a.jsonl", "g/y/c.txt.gz", "g/x/.hidden/d.txt", "g/x/notes.md", "g/._e.txt"):
        s3(key, b"text")
    expected = {
        "s3://texts/g": ["x/a.jsonl", "x/b.txt", "y/c.txt.gz"],
        "s3://texts/g/": ["x/a.jsonl", "x/b.txt", "y/c.txt.gz"],
        "s3://texts/g/x": ["a.jsonl", "b.txt"],
        "s3://texts/g/x/b.txt": ["b.txt"],
        "s3://texts/g/*/*.txt": ["x/b.txt"],
        "s3://texts/g/**": ["x/a.jsonl", "x/b.txt", "y/c.txt.gz"],
    }
    assert {url: [source.name for source in find_sources([Url(url)])] for url in expected} == expected
    assert find_sources([Url("s3://texts/g/x/b.txt")])[0].path == Url("s3://texts/g/x/b.txt")


@pytest.mark.parametrize("url", ["s3://texts/none", "s3://texts/none/*.txt", "s3://nobucket/a.txt"])
def test_no_such_object(s3: Callable[[str, bytes], None], url: str) -> None:
    with pytest.raises((ValueError, OSError)) as failure:
        find_sources([Url(url)])
    assert describe_error(failure.value).startswith(f"{url}: ")


@pytest.mark.slow
def test_the_data_set_of_objects_is_that_of_local_files(
    s3: Callable[[str, bytes], None], tmp_path: Path, build_data: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_all_formats(tmp_path / "local")
    for name in names:
        s3(f"all/{name}", (tmp_path / "local" / name).read_bytes())
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=8_000))
    (tmp_path / "mixture.yaml").write_text(
        "corpora:\n- {name: a, paths: s3://texts/all}\n- {name: b, paths: [local/a.jsonl, 's3://texts/all/b*']}\n"
    )
    assert [type(source.path).__name__ for source in sources_of(read_mixture(tmp_path / "mixture.yaml"))][-2:] != []
    for kind, corpus in (("local", tmp_path / "local"), ("remote", Url("s3://texts/all"))):
        assert build_data([corpus], tmp_path / kind / "data", workers=2, document_per="blank_line")
    assert shards_of(tmp_path / "remote" / "data") == shards_of(tmp_path / "local" / "data")
    assert build_data(tmp_path / "mixture.yaml", tmp_path / "mixed", workers=2)
    s3("all/b.jsonl.gz", (tmp_path / "local" / "b.jsonl.gz").read_bytes() + bytes(100))
    with pytest.raises(ValueError, match="made from other sources"):
        build_data(tmp_path / "mixture.yaml", tmp_path / "mixed")


def test_a_corpus_names_what_it_reads() -> None:
    assert str(Corpus([Path("a"), Url("s3://texts/all")])) == "a, s3://texts/all"
