"""`python -m data_prep` as a user calls it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from support import assert_user_error, files_of, run_command

from data_prep.__main__ import make_parser
from data_prep.shards import MANIFEST
from data_prep.tokenizer import Tokenizer

Completed = subprocess.CompletedProcess[str]
CommandLine = Callable[..., Completed]
COMMANDS = ["train-tokenizer", "import-tokenizer", "build", "remask", "inspect", "stats", "verify"]
BARS = ("read corpus:", "read input:", "tokenize:", "draw masks:", "verify:")
_HUGE = "1" + "0" * 30
SMALL = ["--max-length-tokens", "64", "--shard-samples", "128", "--workers", "1"]


def assert_one_line_of_error(done: Completed, command: str, *words: object) -> None:
    """Besides progress, stderr holds one line, from the command, with all the words; the status is 2."""
    assert_user_error(done, f"python -m data_prep {command}: error: ", *map(str, words))
    lines = [line for line in done.stderr.splitlines() if not line.startswith(BARS)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"python -m data_prep {command}: error: ")


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(data_folder, tmp_path / "copy"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(data_prep_command: CommandLine, command: str) -> None:
    done = data_prep_command(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m data_prep {command}")
    assert "None" not in done.stdout
    assert done.stderr == ""


def test_help_names_the_commands_in_their_order(data_prep_command: CommandLine) -> None:
    done = data_prep_command("--help")
    order = ["train-tokenizer", "build", "inspect", "verify", "stats", "remask", "import-tokenizer"]
    assert sorted(order) == sorted(COMMANDS)
    places = [done.stdout.index(f"python -m data_prep {command} --") for command in order]
    assert places == sorted(places)


def test_no_command_is_an_error(data_prep_command: CommandLine) -> None:
    assert_user_error(data_prep_command(), "COMMAND")


def test_an_unknown_flag_is_an_error(data_prep_command: CommandLine) -> None:
    assert_user_error(data_prep_command("verify", "--dataa", "x"), "--dataa")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--cased"], ["--algorithm", "bpe"]], ids=["cased", "bpe"])
def test_from_texts_to_a_verified_data_set(
    data_prep_process: CommandLine, chapters: list[Path], tmp_path: Path, flags: list[str]
) -> None:
    tokenizer, data = tmp_path / "made" / "tokenizer.model", tmp_path / "made" / "pretrain"
    trained = data_prep_process(
        "train-tokenizer", "--corpus", *chapters[:5], "--tokenizer", tokenizer, "--vocab-size", 500, *flags
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    num_lines = sum(bool(line.strip()) for chapter in chapters[:5] for line in chapter.read_text("utf-8").splitlines())
    algorithm = "bpe" if "bpe" in flags else "unigram"
    words = f"{tokenizer}: {algorithm}, 500 entries, from {num_lines} of {num_lines} lines (0.0 MB)\n"
    assert trained.stdout == words
    building = ["build", "--corpus", *chapters[:5], "--tokenizer", tokenizer, "--data", data, *SMALL]

    built = data_prep_process(*building, "--mask-sets", 2, "--validation-fraction=0.3")
    assert built.returncode == 0, built.stderr
    assert "documents: " in built.stdout
    again = data_prep_process(*building, "--mask_sets", 2, "--validation_fraction=0.3")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout, "--mask_sets and --mask-sets are the same flag"
    assert_one_line_of_error(
        data_prep_process(*building, "--mask-sets", 3), "build", data, "made from other parameters"
    )

    verified = data_prep_process("verify", "--data", data)
    assert (verified.returncode, verified.stdout) == (0, f"{data}: {len(list(data.glob('*.h5')))} shards are sound\n")

    summary = json.loads(data_prep_process("inspect", "--data", data, "--json").stdout)
    assert summary["vocab_size"] == 500
    assert summary["parameters"]["mask_sets"] == 2
    assert summary["documents"]["train"] + summary["documents"]["validation"] == 5
    assert summary["splits"]["train"]["num_samples"] > 0

    shown = data_prep_process("inspect", "--data", data, "--sample", 4, "--count", 2, "--mask-set", 1)
    assert shown.returncode == 0, shown.stderr
    assert [line.split(",")[0] for line in shown.stdout.splitlines() if line.startswith("---")] == [
        "--- train sample 4", "--- train sample 5",
    ]  # fmt: skip
    assert "[SOS]" in shown.stdout
    assert "turns: 1:" in shown.stdout
    assert ">[M]}" in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--cased"]], ids=["uncased", "cased"])
def test_from_berts_vocabulary_to_a_verified_data_set(
    data_prep_command: CommandLine, bert_vocabulary: Path, chapters: list[Path], tmp_path: Path, flags: list[str]
) -> None:
    tokenizer, data = tmp_path / "made" / "bert.json", tmp_path / "made" / "pretrain"
    imported = data_prep_command("import-tokenizer", "--from", bert_vocabulary, "--tokenizer", tokenizer, *flags)
    assert imported.returncode == 0, imported.stderr
    num_entries = len(bert_vocabulary.read_text("utf-8").splitlines())
    roles = "PAD [PAD] = 0, UNK [UNK] = 3, SOS [CLS] = 4, EOS [SEP] = 5, MASK [MASK] = 6"
    assert imported.stdout == f"{tokenizer}: {num_entries} entries, {roles}\n"

    building = ["build", "--corpus", *chapters[:5], "--tokenizer", tokenizer, "--data", data, *SMALL]
    built = data_prep_command(*building, "--workers", 2)
    assert built.returncode == 0, built.stderr
    assert "nothing to do" in data_prep_command(*building).stdout
    assert (data / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    verified = data_prep_command("verify", "--data", data)
    assert (verified.returncode, verified.stdout) == (0, f"{data}: {len(list(data.glob('*.h5')))} shards are sound\n")

    shown = data_prep_command("inspect", "--data", data, "--count", 1)
    assert shown.returncode == 0, shown.stderr
    text = next(line for line in shown.stdout.splitlines() if line.startswith("[CLS]"))
    assert "##" not in text
    assert ">[M]}" in text
    plain = re.sub(r"\{\d+:([^>]*)>[^}]*\}", r"\1", text).split()
    assert {"the", "[SEP]"} <= set(plain)
    assert any(word[0].isupper() for word in plain) == bool(flags)


def test_import_tokenizer_with_bad_input(data_prep_command: CommandLine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = ["import-tokenizer", "--from", tokenizer.path, "--tokenizer", tmp_path / "t.model"]
    done = data_prep_command(*words, "--mask-piece", "<none>")
    assert_one_line_of_error(done, "import-tokenizer", "--mask_piece <none>", f"{tokenizer.path} has no such entry")
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_stored_masks(
    data_prep_command: CommandLine, data_folder: Path, tokenizer: Tokenizer
) -> None:
    done = data_prep_command("inspect", "--data", data_folder, "--count", 1)
    text = next(line for line in done.stdout.splitlines() if line.startswith("[SOS]"))
    with h5py.File(data_folder / "train-00000.h5", locking=False) as file:
        masked = file["masks"][0, : int(file["samples"][0]["num_masked"])]
        originals = file["tokens"][: int(file["samples"][0]["length"])][masked["position"]]
    for turn, original in zip(masked["turn"], originals, strict=True):
        assert f"{{{turn}:{tokenizer.piece(original).lstrip('▁')}>" in text


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, -3])
def test_inspect_refuses_to_show_no_samples(data_prep_command: CommandLine, data_folder: Path, count: int) -> None:
    done = data_prep_command("inspect", "--data", data_folder, f"--count={count}")
    assert_one_line_of_error(done, "inspect", f"--count {count}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sample", 9999], ["--sample 9999", "samples 0 to"]),
        (["--sample=-1"], ["--sample -1", "samples 0 to"]),
        (["--mask_set", 2], ["--mask_set 2", "mask sets 0 to 1"]),
        (["--data", "missing"], ["missing: no data set there", "python -m data_prep build"]),
    ],
)
def test_inspect_with_bad_input(
    data_prep_command: CommandLine, data_folder: Path, flags: list[object], words: list[str]
) -> None:
    assert_one_line_of_error(data_prep_command("inspect", "--data", data_folder, *flags), "inspect", *words)


@pytest.fixture
def bad_corpora(tmp_path: Path, chapters: list[Path]) -> Path:
    """A folder for each kind of bad corpus; what is wrong comes behind sound text."""
    for name, content in {
        "empty": b"",
        "not_utf8": chapters[0].read_bytes() + b"caf\xe9\n",
        "short": b"Alas!",
        "sound": chapters[0].read_bytes(),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(content)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").write_bytes(json.dumps({"text": "sound"}).encode() + b'\n{"text": \n')
    (tmp_path / "no_text").mkdir()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-tokenizer", "build"])
@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("missing", ["missing: no such corpus", "--corpus"]),
        ("no_text", ["file there"]),
        ("empty", ["the corpus is empty"]),
        ("not_utf8", ["a.txt: not UTF-8 at byte 4459 (found 0xe9)"]),
        ("json", ["a.jsonl: line 2: not valid JSON"]),
    ],
)
def test_a_bad_corpus(
    data_prep_command: CommandLine, bad_corpora: Path, tokenizer: Tokenizer, command: str, corpus: str, words: list[str]
) -> None:
    made = bad_corpora / "made"
    flags = {"train-tokenizer": ["--tokenizer", made], "build": ["--tokenizer", tokenizer.path, "--data", made, *SMALL]}
    done = data_prep_command(command, "--corpus", bad_corpora / corpus, *flags[command])
    assert_one_line_of_error(done, command, bad_corpora / corpus, *words)
    left = {path.name for path in made.iterdir()} if made.exists() else set()
    assert left <= {".work", "logs"}


def test_a_vocabulary_too_large(data_prep_command: CommandLine, bad_corpora: Path) -> None:
    made = bad_corpora / "tokenizer.model"
    done = data_prep_command("train-tokenizer", "--corpus", bad_corpora / "sound", "--tokenizer", made)
    assert_one_line_of_error(done, "train-tokenizer", "--vocab_size 30522: this text supports at most ", "entries")
    assert not made.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokenizer", "missing.model"], ["missing.model: no such tokenizer", "train-tokenizer"]),
        (["--tokenizer", "sample_corpus/README.md"], ["README.md: not a SentencePiece model"]),
        (["--corpus", "{bad}/short", "--workers", 1], ["fewer than 8 tokens"]),
        (["--workers", 0], ["--workers is 0, expected at least 1"]),
        (
            ["--mask-sets", 0, "--shard-samples", 100, "--seed=-1"],
            ["mask_sets is 0", "shard_samples is 100, expected a multiple of 128", "seed is -1"],
        ),
        (["--corpus", "{bad}/sound", "--validation-fraction", 0.999999], ["all 1 documents fell to validation"]),
    ],
)
def test_build_with_bad_input(
    data_prep_command: CommandLine, bad_corpora: Path, tokenizer: Tokenizer, flags: list[object], words: list[str]
) -> None:
    data = bad_corpora / "pretrain"
    flags = [str(flag).format(bad=bad_corpora) for flag in flags]
    done = data_prep_command(
        "build", "--corpus", bad_corpora / "sound", "--tokenizer", tokenizer.path, "--data", data, *flags
    )
    assert_one_line_of_error(done, "build", *words)
    assert not (data / MANIFEST).exists()


def numbers_for_flags() -> list[tuple[str, str, str]]:
    """Each command with each of its flags that take a number, and odd numbers."""
    commands = next(action for action in make_parser()._actions if isinstance(action.choices, dict)).choices
    flags = [
        (command, action.option_strings[0])
        for command, parser in commands.items()
        for action in parser._actions
        if action.type in (int, float)
    ]
    numbers = ["nan", "inf", "-inf", "0", "-1", "1e400", "0.0000001", _HUGE]
    # As many workers are started as are asked for.
    return [(*flag, n) for flag in flags for n in numbers if (flag[1], n) != ("--workers", _HUGE)]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flag", "value"), numbers_for_flags())
def test_a_number_that_cannot_be_gets_a_line(
    data_prep_command: CommandLine,
    data_folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    command: str,
    flag: str,
    value: str,
) -> None:
    """Whatever the number, the command does its work or says in one line what is wrong with it."""
    (tmp_path / "a.txt").write_text("It is a truth universally acknowledged. " * 20)
    words: dict[str, list[object]] = {
        "train-tokenizer": ["--corpus", tmp_path / "a.txt", "--tokenizer", tmp_path / "t.model", "--vocab_size", 25],
        "build": ["--corpus", tmp_path / "a.txt", "--tokenizer", tokenizer.path, "--data", tmp_path / "data",
                  "--workers", 1, "--validation_fraction", 0],
        "remask": ["--data", data_folder, "--output", tmp_path / "new", "--workers", 1],
        "inspect": ["--data", data_folder],
        "stats": ["--data", data_folder, "--workers", 1, "--output", tmp_path / "stats.png"],
    }  # fmt: skip
    done = data_prep_command(command, *words[command], f"{flag}={value}")
    if done.returncode:
        assert_user_error(done, f"python -m data_prep {command}: error: ")
        name = flag.removeprefix("--")
        assert name in done.stderr or "characters" in name, done.stderr


def in_a_shell(script: str, **environment: str) -> Completed:
    command = f'run() {{ {shlex.quote(sys.executable)} -m data_prep "$@"; }}; {script}'
    return run_command(["bash", "-c", command], **environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["inspect --count 9999", "inspect --count 1", "stats --workers 1", "build --help"],
)
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_has_enough_ends_the_command_without_a_word(
    data_folder: Path, tmp_path: Path, words: str, reader: str
) -> None:
    data = "" if "help" in words else f" --data {shlex.quote(str(data_folder))}"
    figure = f" --output {shlex.quote(str(tmp_path / 'stats.png'))}" if "stats" in words else ""
    done = in_a_shell(f'run {words}{data}{figure} | {reader}; echo "status ${{PIPESTATUS[0]}}"')
    assert not done.stderr
    status = int(done.stdout.split()[-1])
    assert status == 128 + signal.SIGPIPE or (reader != "true" and status == 0), "head may have read all of it"


@pytest.mark.slow
def test_an_output_that_is_full_is_an_error(data_folder: Path) -> None:
    done = in_a_shell(f"run inspect --data {shlex.quote(str(data_folder))} > /dev/full")
    assert_one_line_of_error(done, "inspect", "No space left on device")


@pytest.mark.slow
def test_a_terminal_without_the_characters_of_the_text(data_folder: Path) -> None:
    words = f"--data {shlex.quote(str(data_folder))}"
    plain, ascii_only = (
        in_a_shell(f"run inspect {words}", PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii")
    )
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert "▁" in plain.stdout
    assert ascii_only.stdout == plain.stdout.encode("ascii", "backslashreplace").decode()
    of_terminals = [in_a_shell(f"run stats {words} --json --workers 1", PYTHONIOENCODING=e) for e in ("utf-8", "ascii")]
    plain, ascii_only = (json.loads(done.stdout) for done in of_terminals)
    assert ascii_only == plain
    assert of_terminals[1].stdout.isascii()
    assert not of_terminals[0].stdout.isascii()


def test_verify_names_each_damaged_shard(data_prep_command: CommandLine, folder: Path) -> None:
    content = bytearray((folder / "train-00001.h5").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train-00001.h5").write_bytes(content)
    (folder / "validation-00000.h5").unlink()
    done = data_prep_command("verify", "--data", folder)
    assert_one_line_of_error(done, "verify", f"{folder}: 2 fault(s)")
    damaged, missing = done.stdout.splitlines()
    assert damaged.startswith(f"{folder}: train-00001.h5: is damaged: SHA-256 is ")
    assert missing == f"{folder}: validation-00000.h5: is missing"


@pytest.mark.slow
def test_a_glob_and_a_text_field(data_prep_command: CommandLine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "It is a truth universally acknowledged. " * 9}))
    words = [
        "build",
        "--corpus",
        tmp_path / "*.jsonl",
        "--tokenizer",
        tokenizer.path,
        "--data",
        tmp_path / "data",
        *SMALL,
    ]
    assert_one_line_of_error(data_prep_command(*words), "build", "a.jsonl: line 1: ", '"text"', "--text_field")
    for _ in range(2):
        done = data_prep_command(*words, "--text-field", "content", "--validation-fraction", 0)
        assert done.returncode == 0, done.stderr
    assert "already made" in done.stdout


def test_verify_without_a_data_set(data_prep_command: CommandLine, tmp_path: Path) -> None:
    assert_one_line_of_error(
        data_prep_command("verify", "--data", tmp_path), "verify", f"{tmp_path}: no data set there"
    )


def test_inspect_of_a_damaged_shard(data_prep_command: CommandLine, folder: Path) -> None:
    content = bytearray((folder / "train-00000.h5").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (folder / "train-00000.h5").write_bytes(content)
    assert_one_line_of_error(data_prep_command("inspect", "--data", folder), "inspect", folder / "train-00000.h5")


class FullDisk:
    """Commands run on a file system of a few KiB: a tmpfs in a mount namespace of its own, gone with the command."""

    def __init__(self, tmp_path: Path) -> None:
        self.mount_point, self.left = tmp_path / "disk", tmp_path / "left"
        self.mount_point.mkdir()
        self._unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]

    def is_possible(self) -> bool:
        mount = f"mount -t tmpfs tmpfs {shlex.quote(str(self.mount_point))}"
        return bool(shutil.which("unshare")) and run_command([*self._unshare, "sh", "-c", mount]).returncode == 0

    def run(self, size_bytes: int, *words: object, put: Path | None = None) -> Completed:
        """Run `python -m data_prep`, with a copy of `put` on the disk; what is then on the disk is copied to `left`."""
        command = shlex.join([sys.executable, "-m", "data_prep", *map(str, words)])
        disk = shlex.quote(str(self.mount_point))
        script = f"mount -t tmpfs -o size={size_bytes} tmpfs {disk} || exit 1\n"
        script += f"cp {shlex.quote(str(put))} {disk} || exit 1\n" if put else ""
        script += f"{command}\nstatus=$?\ncp -r {disk} {shlex.quote(str(self.left))}\nexit $status\n"
        return run_command([*self._unshare, "sh", "-c", script])


@pytest.fixture
def full_disk(tmp_path: Path) -> FullDisk:
    disk = FullDisk(tmp_path)
    assert disk.is_possible(), "this user may not mount a tmpfs, not even in a namespace of its own"
    return disk


@pytest.mark.slow
def test_the_disk_is_full_for_a_tokenizer(full_disk: FullDisk, chapters: list[Path]) -> None:
    path = full_disk.mount_point / "tokenizer.model"
    done = full_disk.run(
        2**16, "train-tokenizer", "--corpus", *chapters[:2], "--tokenizer", path, "--vocab-size", 500
    )  # fmt: skip
    assert_one_line_of_error(done, "train-tokenizer", f"{path}: No space left on device")
    assert list(full_disk.left.iterdir()) == []


@pytest.mark.slow
def test_a_tokenizer_that_was_there_outlives_a_full_disk(
    full_disk: FullDisk, chapters: list[Path], tokenizer: Tokenizer
) -> None:
    path = full_disk.mount_point / tokenizer.path.name
    size_bytes = tokenizer.path.stat().st_size + 2**16
    done = full_disk.run(
        size_bytes, "train-tokenizer", "--corpus", *chapters[:2], "--tokenizer", path, "--vocab-size", 500,
        put=tokenizer.path,
    )  # fmt: skip
    assert_one_line_of_error(done, "train-tokenizer", f"{path}: No space left on device")
    assert {p.name: p.read_bytes() for p in full_disk.left.iterdir()} == {path.name: tokenizer.path.read_bytes()}


@pytest.mark.slow
def test_the_disk_is_full_for_a_data_set(
    full_disk: FullDisk, chapters: list[Path], tokenizer: Tokenizer, data_folder: Path
) -> None:
    """No data set, and no shard but whole ones; the file named is the one that did not fit."""
    whole = files_of(data_folder)
    page_bytes = 2**12
    unit_and_log_bytes = 20 * page_bytes
    size_bytes = unit_and_log_bytes + len(whole["train-00000.h5"]) + 4 * page_bytes
    data = full_disk.mount_point / "pretrain"
    done = full_disk.run(
        size_bytes, "build", "--corpus", *chapters[:9], "--tokenizer", tokenizer.path, "--data", data, *SMALL,
        "--mask-sets", 2, "--validation-fraction", 0.2,
    )  # fmt: skip
    assert_one_line_of_error(done, "build", f"{data}/train-00001.h5: No space left on device")
    left = full_disk.left / "pretrain"
    assert {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()} == {
        "train-00000.h5": whole["train-00000.h5"]
    }
    assert "OSError: [Errno 28] No space left on device" in (left / "logs" / "main.log").read_text()
