"""The flags of run_pretrain.sh: what it checks before anything is installed, and what it hands on to whom.

Here setup.sh and the Python of .venv only write down what they were asked for; test_readme.py and test_slurm.py run the real.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gpus import give_gpus, list_of_gpus
from support import REPOSITORY, assert_user_error, environment

from pretrain.launchers import free_port, port_fault
from pretrain.local_ranks import launch_command, main, names_of_ranks

SETUP = "#!/bin/sh\necho setup >> asked\n"
PYTHON = """#!/bin/sh
echo "$*" >> asked
case "$*" in
    *--count*) echo "$RANKS" ;;
    *--check_for_ranks*) exit "$CHECK_STATUS" ;;
    *train-tokenizer*) mkdir -p data ;;
esac
"""
Result = tuple[subprocess.CompletedProcess[str], list[str]]


@pytest.fixture
def pretrain(tmp_path: Path) -> Callable[..., Result]:
    """Run the script with these flags in a folder like the repository; the result, and what was asked for, in order."""
    for name in ("run_pretrain.sh", "ds_configs/zero2.json", "ds_configs/zero2_local.json", "sample_corpus/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(REPOSITORY / name, tmp_path / name)
    (tmp_path / "my texts").mkdir()
    (tmp_path / "more.txt").touch()
    (tmp_path / "mixture.yaml").touch()
    (tmp_path / "run_pretrain.py").touch()
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "manifest.json").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, text in (("setup.sh", SETUP), (".venv/bin/python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*flags: str, ranks: str = "2 cpu", check_status: int = 0) -> Result:
        (tmp_path / "asked").write_text("")
        env = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
        env |= {"RANKS": ranks, "CHECK_STATUS": str(check_status)}
        done = subprocess.run(
            ["./run_pretrain.sh", *flags], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        return done, (tmp_path / "asked").read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--corpus=nowhere", "--corpus: nowhere: no such file or folder"),
        ("more.txt", "more.txt belongs to no flag; your text is given by --corpus"),
        ("--model small more.txt", "more.txt belongs to no flag"),
        ("--corpus=more.txt more.txt", "more.txt belongs to no flag"),
        ("-m tiny", "-m belongs to no flag"),
        ("--corpus", "--corpus needs a value"),
        ("--corpus --model small", "--corpus needs a value"),
        ("--corpus=", "--corpus needs a value"),
        ("--model", "--model needs a value"),
        ("--run --model small", "--run needs a value"),
        ("--name=", "--name needs a value"),
        ("--ranks two", "--ranks is two, expected a whole number"),
        ("--mask-sets=0", "--mask_sets is 0, expected a whole number"),
        ("--master_port=70000", "--master_port is 70000, expected at most 65535"),
        ("--document_per word", "--document_per is word, expected file or blank_line"),
        ("--corpus more.txt --mixture=mixture.yaml", "give one of --corpus, --mixture and --data"),
        ("--mixture nowhere.yaml", "--mixture: nowhere.yaml: no such file"),
        ("--data nowhere", "nowhere: no data set there"),
        ("--data built --vocab_size 90 --mask-sets 3", "--vocab_size --mask_sets: for making a data set"),
        ("--deepspeed-config=nowhere.json", "nowhere.json: no such file; ds_configs/ has some"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_done(
    pretrain: Callable[..., Result], flags: str, message: str
) -> None:
    done, asked = pretrain(*flags.split())
    assert_user_error(done, message)
    assert len(done.stderr.splitlines()) == 1
    assert asked == []


def test_flags_of_run_pretrain_are_checked_before_the_data_are_made(pretrain: Callable[..., Result]) -> None:
    done, asked = pretrain("--moddel", "tiny", check_status=2)
    assert done.returncode == 2
    assert asked[0] == "setup"
    assert asked[-1].startswith("run_pretrain.py ")
    assert asked[-1].endswith(" --moddel tiny --check_for_ranks 2 --check_for_tokens 128")
    assert not any("data_prep" in line for line in asked)


@pytest.mark.parametrize("equals", [False, True])
def test_every_flag_goes_where_it_belongs(pretrain: Callable[..., Result], equals: bool) -> None:
    values = {
        "--corpus": "my texts", "--document-per": "blank_line", "--text_field": "body", "--name": "mine", "--vocab_size": "90",
        "--max_length_tokens": "64", "--mask-sets": "2", "--ranks": "3", "--master-port": "1234", "--model": "small",
        "--deepspeed_config": "ds_configs/zero2.json", "--run": "elsewhere/x", "--seed": "-1",
    }  # fmt: skip
    flags = [f"{k}={v}" for k, v in values.items()] if equals else [word for item in values.items() for word in item]
    done, asked = pretrain(*flags, "--compile", ranks="3 cpu")
    assert done.returncode == 0, done.stderr
    seed = "--seed=-1" if equals else "--seed -1"
    training = (
        "run_pretrain.py --deepspeed_config ds_configs/zero2.json --data data/mine --run elsewhere/x --model small "
        f"--validate_every_steps 100 --save_every_steps 100 {seed} --compile"
    )
    reading = "--corpus my texts --document_per blank_line --text_field body"
    assert asked == [
        "setup",
        "-m pretrain.local_ranks --count --ranks 3 --master_port 1234",
        f"{training} --check_for_ranks 3 --check_for_tokens 64",
        f"-m data_prep train-tokenizer {reading} --tokenizer data/mine-90.model --vocab_size 90",
        f"-m data_prep build {reading} --tokenizer data/mine-90.model --data data/mine --max_length_tokens 64 --mask_sets 2",
        f"-m pretrain.local_ranks --ranks 3 --master_port 1234 {training}",
    ]


@pytest.mark.parametrize(
    ("flags", "texts", "name"),
    [
        ([], "--corpus sample_corpus", "sample_corpus"),
        (["--corpus=more.txt"], "--corpus more.txt", "more"),
        (["--corpus", "more.txt", "my texts", "--corpus=sample_corpus"], "--corpus more.txt my texts sample_corpus", "more"),
        (["--mixture=mixture.yaml"], "--mixture mixture.yaml", "mixture"),
    ],
)  # fmt: skip
def test_the_text_that_is_given_is_what_is_read(
    pretrain: Callable[..., Result], flags: list[str], texts: str, name: str
) -> None:
    done, asked = pretrain(*flags)
    assert done.returncode == 0, done.stderr
    makes = [line for line in asked if line.startswith("-m data_prep")]
    assert [f" {texts} --document_per file" in line for line in makes] == [True, True]
    assert f"--data data/{name} --run runs/{name} --model tiny" in asked[-1]


def test_a_data_set_is_taken_as_it_is(pretrain: Callable[..., Result]) -> None:
    done, asked = pretrain("--data=built")
    assert done.returncode == 0, done.stderr
    assert not any("data_prep" in line for line in asked)
    assert "--data built --run runs/built" in asked[-1]


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose nvidia-smi lists four."""
    give_gpus(monkeypatch, tmp_path, listed=list_of_gpus(4))
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "flags", "printed"),
    [
        ({}, [], "4 cuda"),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, [], "2 cuda"),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, ["--ranks", "1"], "1 cuda"),
        ({"CUDA_VISIBLE_DEVICES": ""}, [], "2 cpu"),
        ({"DS_ACCELERATOR": "cpu"}, ["--ranks=5"], "5 cpu"),
    ],
)
def test_there_is_a_rank_a_visible_gpu(
    four_gpus: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    variables: dict[str, str],
    flags: list[str],
    printed: str,
) -> None:
    for name, value in variables.items():
        four_gpus.setenv(name, value)
    assert main(["--count", *flags]) == 0
    assert capsys.readouterr().out == f"{printed}\n"


def test_more_ranks_than_gpus_and_a_port_in_use_are_refused(
    four_gpus: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    four_gpus.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert main(["--count", "--ranks", "3"]) == 2
    assert "--ranks is 3, and a process here may use 2 GPUs (1, 3)" in capsys.readouterr().err
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["--count", "--master_port", str(other.getsockname()[1])]) == 2
    assert "without the flag a free one is taken" in capsys.readouterr().err


@pytest.mark.slow
def test_deepspeeds_launcher_shows_the_ranks_those_gpus(tmp_path: Path) -> None:
    """The real launcher, with a script as its rank that says what it sees."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'LOCAL_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "pathlib.Path(os.environ['SEEN'], os.environ['RANK']).write_text(' '.join(os.environ[name] for name in names))\n"
    )
    gpus, port = ["GPU-2222-aa", "MIG-33333333-cc", "0"], free_port()
    command = launch_command(names_of_ranks(2, gpus), port, [str(script)])
    done = subprocess.run(command, env=environment(SEEN=str(tmp_path)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        expected = f"GPU-2222-aa,MIG-33333333-cc {rank} {rank} 2 2 127.0.0.1 {port}"
        assert (tmp_path / str(rank)).read_text() == expected


def test_a_free_port_is_free_and_seldom_the_same() -> None:
    ports = {free_port() for _ in range(5)}
    assert len(ports) > 1
    assert not any(port_fault(port) for port in ports)
