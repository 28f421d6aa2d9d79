"""Whole runs as a user starts them: killed and resumed, damaged, and given bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support import (
    REPOSITORY,
    RUN_IN_ANY_PRECISION,
    assert_user_error,
    deepspeed_json,
    environment,
    free_port,
    run_as_ranks,
    run_command,
)

import run_pretrain
from pretrain.metrics import MEASURED, read_records

pytestmark = pytest.mark.slow

MODEL = ["--model", "tiny", "--hidden_size", "32", "--intermediate_size", "64", "--dropout", "0.1"]
STEPS = 16


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """fp16 with a loss scale that grows on the way, so that its state matters; a schedule of 16 steps."""
    schedule = {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear", "total_num_steps": STEPS}
    return deepspeed_json(
        tmp_path / "ds.json", train_batch_size=32, train_micro_batch_size_per_gpu=8,
        fp16={"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3},
        scheduler={"type": "WarmupDecayLR", "params": schedule},
    )  # fmt: skip


def flags(config: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [
        RUN_IN_ANY_PRECISION, "--deepspeed_config", str(config), "--data", str(data), "--run", str(run), *MODEL,
        "--log_every_steps", "1", "--validate_every_steps", "5", "--save_every_steps", "3", "--keep_last", "9", "--validation_samples", "64", *more,
    ]  # fmt: skip


def two_ranks(*arguments: str) -> list[str]:
    port = f"--master_port={free_port()}"
    return ["deepspeed", "--quiet", "--num_accelerators", "2", port, *arguments]


def curve(run: Path) -> list[dict[str, Any]]:
    """What a run computed."""
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in read_records(run)
        if record["kind"] in ("train", "validation")
    ]  # fmt: skip


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(d for child in children for d in descendants(int(child)))]


RUN_THAT_WAITS = """
import runpy, sys, time
sys.path[0] = {repository!r}
from pretrain.batches import BatchesAhead
next_step, steps = BatchesAhead.next_step, iter(range({num_steps}))
def waiting(self):
    while next(steps, None) is None:
        time.sleep(1)
    return next_step(self)
BatchesAhead.next_step = waiting
runpy.run_path({script!r}, run_name="__main__")
"""


def train_until_killed(flags: list[str], run: Path, step: int) -> None:
    """Start two ranks, which wait after the step behind `step`; when that is recorded, kill -9 the launcher and them."""
    script = run.parent / "waiting.py"
    script.write_text(RUN_THAT_WAITS.format(repository=str(REPOSITORY), num_steps=step + 1, script=flags[0]))
    command = two_ranks(str(script), *flags[1:])
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True)
    while not any(r["kind"] == "train" and r["step"] >= step for r in read_records(run)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def uninterrupted(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16 steps on two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_command(two_ranks(*flags(config.__wrapped__(folder), data_folder, folder / "run")))  # type: ignore[attr-defined]
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.old_processor
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(
    uninterrupted: Path, data_folder: Path, tmp_path: Path
) -> None:
    expected = curve(uninterrupted / "run")
    trained = [r for r in expected if r["kind"] == "train"]
    assert [r["step"] for r in trained] == list(range(1, STEPS + 1))
    assert len({r["loss_scale"] for r in trained}) > 2
    assert trained[-1]["ae_loss"] < trained[0]["ae_loss"]

    command = flags(uninterrupted / "ds.json", data_folder, tmp_path / "run")
    train_until_killed(command, tmp_path / "run", step=7)
    done = run_command(two_ranks(*command))
    assert done.returncode == 0, done.stderr
    assert "resumed from step" in done.stderr
    starts = [record for record in read_records(tmp_path / "run") if record["kind"] == "start"]
    assert [start["resumed"] for start in starts] == [False, True]
    assert starts[0]["config"] == starts[1]["config"]
    assert curve(tmp_path / "run") == expected


RUN_THAT_LOOKS_FOR_OLD_BATCHES = """
import os, runpy, sys, weakref
sys.argv = sys.argv[1:]
from pretrain.batches import BatchesAhead
next_step, last, output = BatchesAhead.next_step, [], os.dup(1)  # the run has its own
def looking(self):
    assert not any(layout() for layout in last), "a batch of the step before is still there"
    os.write(output, b"freed " * len(last))
    assert "torch._inductor.compile_fx" not in sys.modules, "two seconds of every start"
    layouts = next_step(self)
    last[:] = map(weakref.ref, layouts)
    return layouts
BatchesAhead.next_step = looking
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_batch_is_freed_before_the_next_is_waited_for(config: Path, data_folder: Path, tmp_path: Path) -> None:
    """Freed while a thread that builds others has Python's lock, it took most of what was told as waiting for data."""
    done = run_command(
        [sys.executable, "-c", RUN_THAT_LOOKS_FOR_OLD_BATCHES, *flags(config, data_folder, tmp_path / "run")]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("freed") == 4 * (STEPS - 1)


def damage(run: Path) -> str:
    """Flip a bit in the newest checkpoint; returns its name."""
    newest = sorted((run / "checkpoints").glob("step*"))[-1]
    victim = newest / "shards" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 0x10
    victim.write_bytes(content)
    return newest.name


def test_resumed_from_an_older_checkpoint_the_run_ends_where_it_would_have(
    uninterrupted: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted / "run", run)
    damaged = damage(run)
    done = run_as_ranks(2, flags(uninterrupted / "ds.json", data_folder, run))
    assert done.returncode == 0, done.stderr
    assert f"passed over checkpoint {damaged}" in done.stderr
    assert "resumed from step 15" in done.stderr
    assert curve(run) == curve(uninterrupted / "run")


def one_rank(config: Path, data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_command(["python", *flags(config, data, run, *more)])


def test_no_whole_checkpoint_is_not_a_fresh_start(uninterrupted: Path, data_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted / "run", tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    done = one_rank(uninterrupted / "ds.json", data_folder, tmp_path / "run")
    assert_user_error(done, "checkpoints is whole", "manifest.json: No such file or directory", "--run")


def test_another_kind_of_run_is_not_resumed(uninterrupted: Path, data_folder: Path) -> None:
    changes = ["--objective", "ae", "--hidden_size", "64"]
    done = one_rank(uninterrupted / "ds.json", data_folder, uninterrupted / "run", *changes)
    assert_user_error(
        done, "another kind of run: model.hidden_size was 32 and is now 64; objective was 'ae+par' and is now 'ae'; put"
    )


def test_a_run_is_not_resumed_to_end_before_it_is(uninterrupted: Path, data_folder: Path) -> None:
    before = {path: path.read_bytes() for path in (uninterrupted / "run").glob("*.json*")}
    done = one_rank(uninterrupted / "ds.json", data_folder, uninterrupted / "run", "--max_steps", "3")
    assert_user_error(done, f"step {STEPS} is done", "end the run at step 3")
    assert {path: path.read_bytes() for path in (uninterrupted / "run").glob("*.json*")} == before


def test_the_learning_rate_is_the_jsons_after_a_resume(uninterrupted: Path, data_folder: Path, tmp_path: Path) -> None:
    """DeepSpeed would take it from the checkpoint without a word."""
    shutil.copytree(uninterrupted / "run", tmp_path / "run")
    values = json.loads((uninterrupted / "ds.json").read_text())
    values["scheduler"]["params"] |= {"total_num_steps": 20, "warmup_max_lr": 5e-3}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    done = run_as_ranks(2, flags(tmp_path / "ds.json", data_folder, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    rates = {r["step"]: r["learning_rate"] for r in curve(tmp_path / "run") if r["kind"] == "train"}
    assert sorted(rates) == list(range(1, 21))
    for step in (17, 18, 20):  # the scheduler starts one step late: step n is trained at schedule place n - 2
        assert rates[step] == pytest.approx(5e-3 * (20 - (step - 2)) / (20 - 4))


# ---- bad input: one clear line, status 2


def refused(*words: str) -> subprocess.CompletedProcess[str]:
    """run_pretrain.py in this process, for what is refused before the training starts: a process of its own takes seconds."""
    errors = io.StringIO()
    with (
        mock.patch.object(sys, "argv", list(words)),
        mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"),
        contextlib.redirect_stderr(errors),
    ):
        status = run_pretrain.main()
    return subprocess.CompletedProcess(words, status, "", errors.getvalue())


def test_missing_data_names_the_command_that_makes_it(config: Path, tmp_path: Path) -> None:
    done = refused("run_pretrain.py", "--deepspeed_config", str(config), "--data", str(tmp_path / "none"))
    assert_user_error(done, "no data set there", "python -m data_prep build --corpus TEXTS", str(tmp_path / "none"))


def test_all_faults_are_told_at_once(config: Path, data_folder: Path, tmp_path: Path) -> None:
    config = deepspeed_json(config, gradient_cliping=1.0)
    done = refused(*flags(config, tmp_path / "none", tmp_path / "run", "--num_heads", "5", "--max_steps", "0"))
    assert_user_error(done, "unknown key gradient_cliping", "no data set there", "num_heads 5", "max_steps is 0")
    assert not (tmp_path / "run").exists()


def test_a_precision_that_the_machine_lacks_is_refused_first(config: Path, tmp_path: Path) -> None:
    """As on an old processor; before there are data, as run_pretrain.sh checks, and with all other faults."""
    command = ["python", "run_pretrain.py", "--deepspeed_config", str(config)]
    done = run_command([*command, "--check_for_ranks", "2", "--num_heads", "5"], ONEDNN_MAX_CPU_ISA="AVX2")
    assert_user_error(done, "fp16.enabled: fp16 has no fast arithmetic on this device", "it has fp32", "num_heads 5")
    done = run_command([*command, "--data", str(tmp_path / "none")], ONEDNN_MAX_CPU_ISA="AVX2")
    assert_user_error(done, "fp16.enabled: fp16 has no fast arithmetic on this device", "no data set there")
    config = deepspeed_json(config, train_batch_size=32, train_micro_batch_size_per_gpu=8)  # the precision is auto
    done = run_command([*command, "--check_for_ranks", "2"], ONEDNN_MAX_CPU_ISA="AVX2")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = run_command([*command, "--check_for_ranks", "3", "--check_for_tokens", "600"])
    assert_user_error(done, "is not train_micro_batch_size_per_gpu 8", "up to 600 tokens", "--max_positions 600")


def test_an_offloaded_optimizer_and_compiled_layers_need_a_compiler(config: Path) -> None:
    config = deepspeed_json(config, zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    command = ["python", "run_pretrain.py", "--deepspeed_config", str(config), "--check_for_ranks", "1", "--compile"]
    done = run_command(command, CXX="no-such-compiler")
    assert_user_error(done, "offload_optimizer: ", "--compile: ", "the program no-such-compiler is missing")


def test_a_batch_that_the_ranks_do_not_divide(config: Path, data_folder: Path, tmp_path: Path) -> None:
    config = deepspeed_json(config, train_batch_size=33)
    done = run_command(two_ranks(*flags(config, data_folder, tmp_path / "run")))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1  # the launcher ends the other rank before it repeats it
    assert "train_batch_size 33 is not train_micro_batch_size_per_gpu 16" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_deepspeeds_own_schema_refuses(config: Path, data_folder: Path, tmp_path: Path) -> None:
    config = deepspeed_json(config, zero_optimization={"stage": 2, "overlapcomm": True})
    done = one_rank(config, data_folder, tmp_path / "run")
    assert_user_error(done, "overlapcomm", str(config))


@pytest.mark.parametrize("victim", ["tokenizer.model", "manifest.json", "train-00000.h5"])
def test_foreign_or_damaged_data(config: Path, data_folder: Path, tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    if victim == "tokenizer.model":
        from data_prep.tokenizer import train_tokenizer

        lines = (REPOSITORY / "sample_corpus" / "pride_and_prejudice" / "chapter_01.txt").read_text().splitlines()
        train_tokenizer(lines, folder / victim, vocab_size=200)
        words = ["tokenizer.model: not the tokenizer these shards were made with"]
    elif victim == "manifest.json":
        manifest = json.loads((folder / victim).read_text()) | {"version": 99}
        (folder / victim).write_text(json.dumps(manifest))
        words = ["format version 99", "build it anew"]
    else:
        content = bytearray((folder / victim).read_bytes())
        for place in range(2000, len(content), 2000):
            content[place] ^= 0x01
        (folder / victim).write_bytes(content)
        words = ["train-00000.h5: damaged", "python -m data_prep verify"]
    if victim == "train-00000.h5":  # noticed when it is read
        assert_user_error(one_rank(config, folder, tmp_path / "run"), *words)
    else:
        assert_user_error(refused(*flags(config, folder, tmp_path / "run")), *words)


def test_a_full_disk_while_saving(config: Path, data_folder: Path, small_disk: Path) -> None:
    """Training goes on to its end, which is an error as nothing could be saved."""
    (small_disk / "other_data").write_bytes(bytes(3_300_000))
    done = run_as_ranks(2, flags(config, data_folder, small_disk / "run"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "could not be saved" in done.stderr
    assert "training goes on" in done.stderr
    assert done.stderr.count("error: ") == 2  # of each rank
    records = read_records(small_disk / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "fault"] == [3, 6, 9, 12, 15, 16, 16, 16]
    assert not list((small_disk / "run" / "checkpoints").glob("*"))
