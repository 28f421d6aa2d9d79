"""Which files are a corpus, where folders hold hidden files, links and circles of links."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.corpus_files import find_files

Found = Callable[..., tuple[list[str], str]]


@pytest.fixture
def found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Found:
    """The names that `find_files` gives, and what it tells; `paths` are below the test's folder."""

    def find(*paths: str) -> tuple[list[str], str]:
        names = [name for _, name in find_files([tmp_path / path for path in paths])]
        return names, capsys.readouterr().err.replace(f"{tmp_path}/", "")

    return find


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., None]:
    """Write files of these names; `link -> target` is a link."""

    def write(*entries: str) -> None:
        for entry in entries:
            name, arrow, target = entry.partition(" -> ")
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if arrow:
                (tmp_path / name).symlink_to(target)
            else:
                (tmp_path / name).write_text(name)

    return write


HIDDEN = ("c/.DS_Store", "c/._a.txt", "c/.ipynb_checkpoints/a-checkpoint.txt", "c/d/.git/x/b.txt", "c/d/.b.jsonl")


def test_hidden_files_and_folders_are_no_corpus(tree: Callable[..., None], found: Found) -> None:
    tree("c/a.txt", "c/d/b.txt", *HIDDEN, "c/.x -> d")
    assert found("c") == (["a.txt", "d/b.txt"], "")
    assert found("c/*") == (["a.txt", "d/b.txt"], "")
    assert found("*") == (["c/a.txt", "c/d/b.txt"], "")
    assert found("c/**/*.txt") == (["a.txt", "d/b.txt"], "")
    assert found("c/**") == (["a.txt", "d/b.txt"], "")


def test_what_is_hidden_is_read_where_it_is_named(tree: Callable[..., None], found: Found) -> None:
    tree("c/a.txt", *HIDDEN)
    assert found("c/._a.txt") == (["._a.txt"], "")
    assert found("c/.ipynb_checkpoints") == (["a-checkpoint.txt"], "")
    assert found("c/d/.git/*/*.txt") == (["x/b.txt"], "")
    assert found("c/.*.txt") == (["._a.txt"], "")


def test_linked_files_and_folders_are_read(tree: Callable[..., None], found: Found) -> None:
    tree("elsewhere/x.txt", "elsewhere/deep/y.txt", "z.txt", "c/b.txt", "c/a -> ../elsewhere", "c/d.txt -> ../z.txt")
    expected = ["a/deep/y.txt", "a/x.txt", "b.txt", "d.txt"]
    assert found("c") == found("c/*") == found("c/**") == (expected, "")
    assert found("c/**/*.txt") == (expected, "")
    assert found("c/a") == (["deep/y.txt", "x.txt"], "")


@pytest.mark.parametrize("pattern", ["c", "c/**/*.txt", "c/**", "c/*"])
def test_circles_of_links_end(tree: Callable[..., None], found: Found, pattern: str) -> None:
    """Links that fan out: followed in every order they would take years."""
    tree("c/b.txt", "c/up -> ..", "c/self -> .", *(f"c/d{i}/a.txt" for i in range(6)))
    tree(*(f"c/d{i}/to{j} -> ../d{j}" for i in range(6) for j in range(6)))
    names, told = found(pattern)
    assert names == ["b.txt", *(f"d{i}/a.txt" for i in range(6))]
    assert "a link to a folder that is read already, not followed" in told


def test_two_folders_that_link_to_each_other(tree: Callable[..., None], found: Found) -> None:
    tree("x/a.txt", "y/b.txt", "x/to -> ../y", "y/to -> ../x")
    names, told = found("x")
    assert names == ["a.txt", "to/b.txt"]
    assert told == "note: x/to/to: a link to a folder that is read already, not followed\n"


def test_a_folder_is_known_by_its_own_name(tree: Callable[..., None], found: Found) -> None:
    tree("c/z/x.txt", "c/a -> z", "c/b -> z")
    names, told = found("c")
    assert names == ["z/x.txt"]
    assert told == "note: c/a, c/b: a link to a folder that is read already, not followed\n"


def test_a_folder_inside_one_that_two_links_lead_to(tree: Callable[..., None], found: Found) -> None:
    tree("e/deep/y.txt", "e/x.txt", "c/a -> ../e/deep", "c/b -> ../e")
    assert found("c") == (["a/y.txt", "b/x.txt"], "")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["b.txt", "."], ["b.txt", "a.txt", "d/c.txt"]),
        ([".", "b.txt"], ["a.txt", "b.txt", "d/c.txt"]),
        (["*.txt", "d", "d/c.txt", "d/*"], ["a.txt", "b.txt", "c.txt"]),
        (["d/../b.txt", "b.txt"], ["b.txt"]),
    ],
)
def test_a_file_named_twice_is_read_once(
    tree: Callable[..., None], found: Found, paths: list[str], names: list[str]
) -> None:
    tree("a.txt", "b.txt", "d/c.txt")
    got, told = found(*paths)
    assert got == names
    assert re.fullmatch(r"note: .*(b|c)\.txt: named more than once, read once\n", told)


def test_a_link_to_a_file_that_is_read_is_the_same_file(tree: Callable[..., None], found: Found) -> None:
    tree("c/a.txt", "c/b.txt -> a.txt")
    assert found("c") == (["a.txt"], "note: c/b.txt: named more than once, read once\n")


def test_many_that_are_passed_over_are_one_line(tree: Callable[..., None], found: Found) -> None:
    tree(*(f"c/{i}.txt" for i in range(9)))
    names, told = found("c", "c/*.txt")
    assert len(names) == 9
    assert told == "note: c/0.txt, c/1.txt, c/2.txt and 6 more: named more than once, read once\n"


def test_equal_files_are_two(tree: Callable[..., None], found: Found, tmp_path: Path) -> None:
    tree("c/a.txt")
    (tmp_path / "c" / "b.txt").write_text("c/a.txt")
    assert found("c") == (["a.txt", "b.txt"], "")


@pytest.mark.parametrize("pattern", ["c", "c/*", "c/**"])
@pytest.mark.parametrize("name", ["lost.txt", "lost"])
def test_a_link_to_nothing_is_an_error(tree: Callable[..., None], found: Found, pattern: str, name: str) -> None:
    tree("c/a.txt", f"c/{name} -> gone")
    with pytest.raises(FileNotFoundError, match="a link to nothing"):
        found(pattern)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/x/*.txt", ["a/x/1.txt", "x/1.txt"]),
        ("**/x", ["a/x/1.txt", "a/x/y/2.txt", "x/1.txt"]),
        ("a/**/2.txt", ["x/y/2.txt"]),
        ("**/a/**/[12].txt", ["a/x/1.txt", "a/x/y/2.txt"]),
        ("*/**/y", ["a/x/y/2.txt"]),
        ("**/*", ["a/x/1.txt", "a/x/y/2.txt", "x/1.txt"]),
    ],
)
def test_globs_of_any_depth(tree: Callable[..., None], found: Found, pattern: str, expected: list[str]) -> None:
    tree("a/x/1.txt", "a/x/y/2.txt", "x/1.txt", "notes.md")
    assert found(pattern) == (expected, "")
