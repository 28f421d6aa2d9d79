"""What several test files need: made-up samples, commands, and scripts run as ranks."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sentencepiece

from data_prep.files import write_manifest
from data_prep.mask_settings import PAPER_MASKS
from data_prep.masking import draw_masks
from data_prep.packing import NUM_SPECIAL_TOKENS, Texts, assemble, cut_into_texts
from data_prep.shards import SampleBatch, batch_of
from pretrain.checkpoint import FORMAT, VERSION

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS_MARK = "PMLM_TESTS"
"""Environment variable of every process that this pytest started."""
DEEPSPEED_CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))
RECIPES = [path for path in DEEPSPEED_CONFIGS if "finetune" not in path.name]
"""Those for pre-training."""
RUN_IN_ANY_PRECISION = str(REPOSITORY / "tests" / "any_precision.py")
"""run_pretrain.py, for a CPU without fp16 arithmetic too."""
HOSTFILE_COMMAND = "deepspeed --hostfile hosts run_pretrain.py --deepspeed_config ds_configs/zero2.json"
PATIENCE_S = 600.0
"""After so long a test takes a process for one that hangs; no machine is so slow."""
PAD, UNK, SOS, EOS, MASK = range(5)
VOCAB_SIZE = 50


def pinned_versions() -> dict[str, str]:
    """Return the versions of requirements.txt by package, as it names them."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line[:1].isalpha())


def random_batch(num_samples: int, max_length: int = 40, seed: int = 0, min_length: int = 11) -> SampleBatch:
    """Samples of random tokens and lengths, masked by the product's own sampler."""
    random = np.random.default_rng(seed)
    texts = [
        random.integers(5, VOCAB_SIZE, random.integers(min_length, max_length + 1) - 3) for _ in range(num_samples)
    ]
    samples = assemble(texts_of(texts), seed=seed, first_sample=0, sos_id=SOS, eos_id=EOS)
    masks = draw_masks(
        samples, PAPER_MASKS, special_ids=np.arange(5), normal_ids=np.arange(5, VOCAB_SIZE), mask_id=MASK, seed=seed,
        first_sample=0,
    )  # fmt: skip
    most_masked = PAPER_MASKS.max_masked(max_length, NUM_SPECIAL_TOKENS)
    return batch_of(samples, masks.num_masked_KB[0], masks.places_K[0], max_length, most_masked, PAD)


def texts_of(texts: Sequence[np.ndarray]) -> Texts:
    """Texts given one by one."""
    return Texts(np.concatenate(texts), np.array([len(text) for text in texts]))


def cut_document(ids: np.ndarray, max_length: int, document_hash: int = 0, **short: Any) -> list[np.ndarray]:
    """The pieces into which `cut_into_texts` cuts a document."""
    hash_D = np.array([document_hash], dtype=np.uint64)
    return np.split(ids, np.cumsum(cut_into_texts(np.array([len(ids)]), hash_D, max_length, **short))[:-1])


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a data set's folder, without the logs of how it was made."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("logs/")}


def deepspeed_json(path: Path, **changes: Any) -> Path:
    """Write a DeepSpeed JSON for two-rank tests: `ds_configs/zero2_local.json` with some keys replaced (None: removed).

    Its precision is the device's, unless fp16 or bf16 is among the changes.
    """
    values = json.loads((REPOSITORY / "ds_configs" / "zero2_local.json").read_text())
    if changes.keys() & {"fp16", "bf16"}:
        del values["fp16"], values["bf16"]
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def make_checkpoint(run: Path, step: int) -> Path:
    """A whole checkpoint as `CheckpointStore.save` leaves it; what is in the shards does not matter here."""
    folder = run / "checkpoints" / f"step{step:08d}"
    (folder / "shards").mkdir(parents=True)
    content = bytes(range(256)) * 8
    files = {}
    for name in ("shards/mp_rank_00_model_states.pt", "shards/zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes(content)
        files[name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    states = {"cursor": {"samples_consumed": 32 * step, "skipped": []}}
    values = {"step": step, "states": states, "files": files}
    write_manifest(folder / "manifest.json", FORMAT, VERSION, values)
    return folder


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command, as in a shell with the virtual environment active; a thread a rank, as tests share
    the cores."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **changes}


def kill_left_processes(test: str | None = None) -> None:
    """Kill what the tests of this pytest started and did not end, or what the body of that test did.

    A failed or interrupted test may leave a training that never ends, with no parent to find it by; the environment that
    it was given tells whose it is.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            given = process.environ()
            if given.get(TESTS_MARK) != os.environ[TESTS_MARK] or process.pid == os.getpid():
                continue
            if test is None or given.get("PYTEST_CURRENT_TEST") == f"{test} (call)":
                process.kill()


def run_command(
    command: list[str], cwd: Path = REPOSITORY, timeout_s: float = PATIENCE_S, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; stdout and stderr are captured as text."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def run_in_shell(command: str, folder: Path) -> str:
    """A command line that must succeed, as a user types it; its stdout and stderr, together."""
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), text=True, timeout=PATIENCE_S, check=False, executable="/bin/bash",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    assert "Traceback" not in done.stdout
    return done.stdout


def run_as_ranks(
    world_size: int, command: list[str], timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run a Python script as the ranks of a run, without a launcher; all their stderr is in the result."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            ["python", *command], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(world_size)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=timeout_s) for rank in ranks]
    status = max(abs(rank.returncode) for rank in ranks)
    return subprocess.CompletedProcess(command, status, *("".join(o[i] for o in outputs) for i in (0, 1)))


def assert_ids_of_library(ids: list[int], model: sentencepiece.SentencePieceProcessor, line: str) -> None:
    """The ids are those of SentencePiece for the line, but where it segments a word otherwise and, but for rounding, as well."""
    whole = model.encode(line)
    if ids == whole:
        return
    rounding = len(whole) * abs(float(np.spacing(np.float32(sum(map(model.get_score, whole))))))
    for word, other in zip(_words_of(ids, model), _words_of(whole, model), strict=True):
        assert model.decode(word) == model.decode(other)
        assert abs(sum(map(model.get_score, word)) - sum(map(model.get_score, other))) <= rounding


def _words_of(ids: list[int], model: sentencepiece.SentencePieceProcessor) -> list[list[int]]:
    starts = [place for place, i in enumerate(ids) if model.id_to_piece(i).startswith("▁")]
    return [ids[start:stop] for start, stop in zip([0, *starts], [*starts, len(ids)], strict=True)]


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command ended with status 2 and one line of error, without a traceback, that holds all the words."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
