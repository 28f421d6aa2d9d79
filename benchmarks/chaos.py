"""python -m benchmarks.chaos: a small training, hit by faults at seeded random moments, beside the same one left in peace.

Two CPU ranks train a tiny model in fp16 (if the CPU has it) with dropout, a record a step and a checkpoint every few steps,
on a small file system of their own. Each fault is followed by the same command. At the end every train record must have the
bits of the uninterrupted run's. A second pair of runs, in fp32 without dropout, changes the number of ranks, the ZeRO stage
and the precision (to those that the CPU has), and is compared to rounding.

Ranks are forked, by one process that has imported the libraries, and call what run_pretrain.py calls; where the launcher
is to be killed, `deepspeed` starts them. Needs Linux, with the right to mount a tmpfs in a namespace of its own.
Prints a table, writes chaos.json; exit status 1 where a promise is broken.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.text import make_data, make_tokenizer
from data_prep.console import USER_ERROR_STATUS, ArgumentParser, describe_error, progress_bar
from data_prep.files import read_json, write_json
from data_prep.parameters import BuildParameters
from pretrain.checkpoint import checkpoints_folder, newest_whole
from pretrain.device import Precision, speeds
from pretrain.metrics import MEASURED, read_records
from pretrain.watchdog import RETRY_STATUS

BATCH = 12
SAVE_EVERY_STEPS = 4
_STEPS_PER_FAULT = 5
_STEPS_AFTER_START = (1, 7)
_DISK = "48m"
_PATIENCE_S = 240.0
_SURVIVORS_LIMIT_S = 60.0
_ROUNDING = 5e-3
_POLL_S = 0.01


@dataclass(frozen=True)
class Layout:
    """How a part of a run is trained."""

    world_size: int = 2
    stage: int = 2
    precision: Precision = "fp32"


def layouts(precisions: Sequence[Precision]) -> list[Layout]:
    """Return the layouts that the run compared to rounding has, one after the other."""
    moved = [Layout(), Layout(1), Layout(3), Layout(), Layout(stage=1), Layout(stage=3)]
    return [*moved, *(Layout(precision=precision) for precision in precisions if precision != "fp32"), Layout()]


# ---- what is promised of the records


def differences(
    expected: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], *, rounding: float = 0.0
) -> list[str]:
    """What the records of a run that was interrupted have lost, repeated or changed; `rounding`: relative, of losses and
    norms, without accuracies, which jump; 0 = identical bits."""
    wanted = {r["step"]: r for r in expected if r["kind"] == "train"}
    trained = [r for r in found if r["kind"] == "train"]
    steps = [r["step"] for r in trained]
    faults = [f"step {step} is lost" for step in sorted(wanted.keys() - set(steps))]
    faults += [
        f"step {step} is recorded {steps.count(step)} times" for step in sorted(set(steps)) if steps.count(step) > 1
    ]
    for record in trained:
        step = record["step"]
        if record["samples_consumed"] != BATCH * step:
            faults.append(f"step {step}: {record['samples_consumed']} samples consumed, expected {BATCH * step}")
        if step not in wanted:
            faults.append(f"step {step} is not in the uninterrupted run")
            continue
        for key in sorted((wanted[step].keys() | record.keys()) - set(MEASURED)):
            one: Any = wanted[step].get(key)
            other: Any = record.get(key)
            if rounding and key.endswith("_accuracy"):
                continue
            is_rounded = rounding and isinstance(one, float) and isinstance(other, float)
            if not (abs(one - other) <= rounding * max(abs(one), abs(other)) if is_rounded else one == other):
                faults.append(f"step {step}: {key} is {other}, expected {one}")
    return faults


# ---- a run and its processes


class Run:
    """A run that is started, hurt and started again."""

    def __init__(self, folder: Path, disk: Path, data: Path, steps: int, *, is_exact: bool) -> None:
        """`folder` for what must not meet a full disk; the run itself is on `disk`."""
        self.folder, self.disk = disk / folder.name, disk
        self._flags = [
            "--data", str(data), "--run", str(self.folder), "--model", "tiny", "--hidden_size", "16",
            "--intermediate_size", "32", "--num_layers", "2", "--num_heads", "2", "--dropout", "0.1" if is_exact else "0",
            "--log_every_steps", "1", "--validate_every_steps", "0", "--save_every_steps", str(SAVE_EVERY_STEPS),
            "--max_steps", str(steps),
        ]  # fmt: skip
        self._work = folder
        folder.mkdir(parents=True)
        self.console = folder / "console.txt"
        self.console.touch()
        self._steps = steps
        self._context = multiprocessing.get_context("forkserver")
        self._forked: list[Any] = []
        self._launcher: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self, layout: Layout, *, by_launcher: bool = False) -> None:
        """Start all ranks."""
        world_size = layout.world_size
        config = self._work / f"stage{layout.stage}.json"
        values = read_json(Path("ds_configs/zero2_local.json"))
        values["train_batch_size"] = BATCH
        values["zero_optimization"] |= {"stage": layout.stage}
        values["scheduler"]["params"]["total_num_steps"] = self._steps
        values["fp16"] |= {"enabled": layout.precision == "fp16", "loss_scale_window": 40}
        values["bf16"] = {"enabled": layout.precision == "bf16"}
        config.write_text(json.dumps(values))
        flags = ["--deepspeed_config", str(config), *self._flags]
        self._started = time.time()
        self._forked, self._launcher = [], None
        if by_launcher:
            command = ["deepspeed", "--quiet", "--num_accelerators", str(world_size), f"--master_port={_free_port()}"]
            with open(self.console, "ab") as console:
                self._launcher = subprocess.Popen([*command, "run_pretrain.py", *flags], stdout=console, stderr=console)
            return
        port = _free_port()
        for rank in range(world_size):
            process = self._context.Process(
                target=_rank, args=(rank, world_size, port, flags, self.console), daemon=True
            )
            process.start()
            self._forked.append(process)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, those that are left."""
        if self._launcher is None:
            return [psutil.Process(p.pid) for p in self._forked if p.is_alive()]
        return [p for p in self._below_launcher() if "run_pretrain.py" in p.cmdline()[2:3]]

    def processes(self) -> list[psutil.Process]:
        """All that are left, launchers too."""
        return self.ranks() if self._launcher is None else self._below_launcher()

    def _below_launcher(self) -> list[psutil.Process]:
        assert self._launcher is not None
        try:
            own = psutil.Process(self._launcher.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_alive(self) -> bool:
        """Whether any part of it, as started, is."""
        return self._launcher.poll() is None if self._launcher else any(p.is_alive() for p in self._forked)

    def statuses(self) -> list[int | None]:
        """Exit statuses of forked ranks, which are gone."""
        for process in self._forked:
            process.join(5)  # the process that forked it may not have heard yet
        return [p.exitcode for p in self._forked]

    def kill_launcher(self) -> None:
        """Kill `deepspeed` and nothing else."""
        assert self._launcher is not None
        self._launcher.kill()
        self._launcher.wait()

    def wait(self, is_so: Callable[[], Any], what: str) -> None:
        """Raises Broken where the run ends before, or it takes too long."""
        for _ in _awake_seconds(_PATIENCE_S):
            if is_so():
                return
            if not self.is_alive():
                raise Broken(f"the run ended, waiting for {what}; it said: {self.last_words()}")
        raise Broken(f"{what} did not come; it said: {self.last_words()}")

    def start_record(self) -> dict[str, Any] | None:
        """Of this start, as soon as there is one."""
        starts = [r for r in read_records(self.folder) if r["kind"] == "start" and r["time"] >= self._started]
        return starts[-1] if starts else None

    def last_step(self) -> int:
        """Newest step that has a train record."""
        return max((r["step"] for r in read_records(self.folder) if r["kind"] == "train"), default=0)

    def newest_whole_step(self) -> int:
        """0 without a checkpoint."""
        checkpoint, _ = newest_whole(self.folder)
        return checkpoint.step if checkpoint else 0

    def last_words(self) -> str:
        """The end of what it said."""
        return " | ".join(self.console.read_text(errors="replace").splitlines()[-4:])

    def finish(self, layout: Layout) -> None:
        """Train to the end."""
        self.start(layout)
        for _ in _awake_seconds(10 * _PATIENCE_S):
            if not self.is_alive():
                break
        if any(self.statuses()) or self.is_alive():
            raise Broken(f"the run did not end well (statuses {self.statuses()}): {self.last_words()}")


class Broken(Exception):
    """A promise was not kept."""


def _rank(rank: int, world_size: int, port: int, flags: list[str], console: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    descriptor = os.open(console, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    import run_pretrain

    sys.argv = ["run_pretrain.py", *flags]
    os._exit(run_pretrain.main())


def _awake_seconds(limit_s: float) -> Iterator[float]:
    """Time since the first call, polling, up to the limit; what this process was stopped for, as all may be, is not counted."""
    awake_s, last = 0.0, time.monotonic()
    while awake_s < limit_s:
        yield awake_s
        time.sleep(_POLL_S)
        now = time.monotonic()
        awake_s += min(now - last, 1.0)
        last = now


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- faults


@dataclass
class Fault:
    """What was done to the run, and what became of it."""

    kind: str
    step: int = 0
    """Last one recorded when it struck."""
    resumed_step: int = -1
    """At which the next start went on; -1: it did not."""
    survivors_s: float = 0.0
    """Until every process was gone, from the signal on."""
    broken: list[str] = field(default_factory=list)

    @property
    def steps_done_again(self) -> int:
        """By the next start."""
        return max(0, self.step - self.resumed_step)


RANK, ALL, RANK_SAVING, ALL_SAVING = (
    "kill -9 of a rank", "kill -9 of all ranks", "kill -9 of a rank, mid-save", "kill -9 of all, mid-save",
)  # fmt: skip
STARTING, LAUNCHER = "kill -9 of all, during the start", "kill -9 of the launcher"
TERM, USR1, INTERRUPT = "SIGTERM to a rank", "SIGUSR1 to a rank", "Ctrl-C"
TRUNCATED, FLIPPED, MISSING = (
    "newest checkpoint truncated",
    "newest checkpoint bit-flipped",
    "file of the newest missing",
)
DISK_FULL = "disk full, then kill -9"
RANKS_CHANGED, STAGE_CHANGED, PRECISION_CHANGED = "other number of ranks", "other ZeRO stage", "other precision"
KINDS = (
    RANK, ALL, RANK_SAVING, ALL_SAVING, STARTING, LAUNCHER, TERM, USR1, INTERRUPT, TRUNCATED, FLIPPED, MISSING, DISK_FULL,
)  # fmt: skip
_ASKED = {TERM: signal.SIGTERM, USR1: signal.SIGUSR1, INTERRUPT: signal.SIGINT}
_SAVES_ALL = (TERM, USR1, INTERRUPT, LAUNCHER)
_DAMAGES = (TRUNCATED, FLIPPED, MISSING)


def settle(faults: Sequence[Fault]) -> None:
    """A start that was killed before it had a record resumed nothing and trained nothing: the fault before it was resumed
    from by the start behind both."""
    for before, after in reversed(list(pairwise(faults))):
        if before.resumed_step < 0 and after.kind == STARTING:
            before.resumed_step = after.resumed_step
            after.step = min(after.step, after.resumed_step)


def change(here: Layout, there: Layout) -> str:
    """Return the kind of fault that a resume in another layout is."""
    if here.world_size != there.world_size:
        return RANKS_CHANGED
    return STAGE_CHANGED if here.stage != there.stage else PRECISION_CHANGED


class Chaos:
    """Hits a run, a fault at a time."""

    def __init__(self, run: Run, draws: random.Random) -> None:
        self._run, self._draws = run, draws
        self.faults: list[Fault] = []
        self._expected_step = 0

    def hit(self, kind: str, layout: Layout) -> None:
        """Start the run, wait for the moment, do it, and see what is left."""
        run, fault = self._run, Fault(kind)
        try:
            run.start(layout, by_launcher=kind == LAUNCHER)
            if kind == STARTING:
                time.sleep(self._draws.uniform(0, 3))
                self._note_resumed(is_needed=False)
            else:
                self._wait_for_the_moment(kind)
            saved_before = run.newest_whole_step()
            self._strike(kind, fault)
            fault.step = run.last_step()
            if kind in _DAMAGES:
                saved_before = self._damage(kind)
            self._expected_step = run.newest_whole_step()
            if self._expected_step < saved_before:
                fault.broken.append(f"checkpoint {saved_before} is lost, {self._expected_step} is the newest whole one")
            if kind in _SAVES_ALL and self._expected_step != fault.step:
                fault.broken.append(f"asked to end at step {fault.step}, saved {self._expected_step}")
        except (Broken, ValueError) as error:
            fault.broken.append(str(error))
            self._kill(run.processes())
            with suppress(ValueError):
                self._expected_step = run.newest_whole_step()
        self.faults.append(fault)

    def finish(self, layout: Layout) -> None:
        """Start for the last time, and train to the end."""
        self._run.finish(layout)
        self._note_resumed(is_needed=True)

    def _note_resumed(self, *, is_needed: bool) -> None:
        """What the last fault came to, from the record of the start behind it."""
        record = self._run.start_record()
        if record is None:
            if is_needed:
                raise Broken("there is no record of the start")
            return
        step = record["samples_consumed"] // BATCH
        if self.faults:
            self.faults[-1].resumed_step = step
        if step != self._expected_step:
            raise Broken(f"resumed at step {step}, expected {self._expected_step}, the newest whole checkpoint")

    def _wait_for_the_moment(self, kind: str) -> None:
        run, draws = self._run, self._draws
        run.wait(run.start_record, "the start")
        self._note_resumed(is_needed=True)
        resumed = self._expected_step
        last = resumed + draws.randint(*_STEPS_AFTER_START)
        run.wait(lambda: run.last_step() >= last, f"step {last}")
        checkpoints = checkpoints_folder(run.folder)
        if kind in _DAMAGES:  # one of two: whether a run is left with none is another matter
            run.wait(lambda: len(list(checkpoints.glob("step*"))) >= 2 and run.newest_whole_step() > resumed, "a save")
        if kind in (RANK_SAVING, ALL_SAVING):
            run.wait(lambda: any(checkpoints.glob(".tmp-step*")), "a save")
        time.sleep(draws.uniform(0, 0.02 if kind in (RANK_SAVING, ALL_SAVING) else 0.2))

    def _strike(self, kind: str, fault: Fault) -> None:
        run = self._run
        ranks, everyone = run.ranks(), run.processes()
        if kind == DISK_FULL:
            self._fill_the_disk()
        statuses: tuple[int, ...] = (-signal.SIGKILL,)
        if kind in (RANK, RANK_SAVING):
            self._kill([self._draws.choice(ranks)])
            statuses = (-signal.SIGKILL, RETRY_STATUS)
        elif kind == LAUNCHER:
            run.kill_launcher()
        elif kind in _ASKED:
            for rank in ranks if kind == INTERRUPT else [self._draws.choice(ranks)]:
                rank.send_signal(_ASKED[kind])
            statuses = (0,)
        else:
            self._kill(ranks)
        for fault.survivors_s in _awake_seconds(_SURVIVORS_LIMIT_S):
            if not any(map(_is_there, everyone)):
                break
        else:
            self._kill(everyone)
            raise Broken(f"survivors are there after {_SURVIVORS_LIMIT_S:.0f} s")
        if kind != LAUNCHER and not fault.broken and (odd := set(run.statuses()) - set(statuses)):
            fault.broken.append(f"exit statuses {sorted(map(str, odd))}, expected {statuses}: {run.last_words()}")

    def _fill_the_disk(self) -> None:
        """Until two saves in a row have failed; in half of the cases there is room again, and a save, before the end."""
        run, ballast = self._run, self._run.disk / "ballast"
        said = len(run.console.read_text())
        with open(ballast, "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        try:
            run.wait(
                lambda: run.console.read_text()[said:].count("training goes on; saving is tried again") >= 2,
                "the warnings of two saves that failed",
            )
        finally:
            is_room_again = self._draws.random() < 0.5
            if is_room_again:
                ballast.unlink()
        if is_room_again:
            before = run.newest_whole_step()
            run.wait(lambda: run.newest_whole_step() > before, "a save after the full disk")
        self._kill(run.ranks())
        ballast.unlink(missing_ok=True)

    def _damage(self, kind: str) -> int:
        """Damage one file of the newest checkpoint; returns the step of the newest one that is whole then."""
        newest, second = sorted(checkpoints_folder(self._run.folder).glob("step*"), reverse=True)[:2]
        file = self._draws.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(file.read_bytes())
        if kind == MISSING:
            file.unlink()
        elif kind == TRUNCATED:
            file.write_bytes(content[: self._draws.randrange(len(content))])
        else:
            content[self._draws.randrange(len(content))] ^= 1 << self._draws.randrange(8)
            file.write_bytes(content)
        checkpoint, passed_over = newest_whole(self._run.folder)
        assert checkpoint is not None
        if not passed_over or checkpoint.folder == newest:
            raise Broken(f"damage of {file.relative_to(self._run.folder)} was not noticed")
        return int(second.name.removeprefix("step")) if len(passed_over) == 1 else checkpoint.step

    @staticmethod
    def _kill(processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_there(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ---- the whole


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument(
        "--faults", type=int, default=60, help="number of faults, changes of ranks, stage and precision among them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kinds' order and of the moments")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    parser.add_argument(
        "--disk", type=Path, help="a small file system that is there already; by default a tmpfs, mounted"
    )
    args = parser.parse_args()
    try:
        if args.disk is None:
            return _on_a_small_disk()
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR_STATUS


def _on_a_small_disk() -> int:
    """This command again, in a mount namespace of its own, which goes with it."""
    unshare = ["unshare", "-m" if os.geteuid() == 0 else "-rm"]
    with tempfile.TemporaryDirectory() as disk:
        script = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
        command = [sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:], "--disk", disk]
        return subprocess.run([*unshare, "sh", "-c", script, _DISK, disk, *command], check=False).returncode


def _run(args: Any) -> int:
    precisions = speeds().precisions
    moved = layouts(precisions)
    if args.faults < len(KINDS) + len(moved):
        raise ValueError(f"--faults {args.faults}, expected at least {len(KINDS) + len(moved)}, one of each kind")
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["pretrain.train", "deepspeed.runtime.zero.muon.muon_optimizer"])
    draws = random.Random(args.seed)
    num_exact = args.faults - (len(moved) - 1)
    kinds = [KINDS[i % len(KINDS)] for i in range(num_exact)]
    draws.shuffle(kinds)
    steps, rounded_steps = _STEPS_PER_FAULT * num_exact, 8 * len(moved)
    faults: list[Fault] = []
    broken: list[str] = []
    started = time.time()
    with tempfile.TemporaryDirectory() as name, progress_bar("chaos", args.faults + 2, "part") as bar:
        work = Path(name)
        corpus = sorted(Path("sample_corpus/pride_and_prejudice").glob("chapter_0*.txt"))
        tokenizer = make_tokenizer(corpus, work / "tokenizer.model", vocab_size=500)
        parameters = BuildParameters(max_length_tokens=32, mask_sets=2, validation_fraction=0.1, shard_samples=512)
        data = make_data(corpus, tokenizer.path, work / "set", parameters)
        for is_exact, total in ((True, steps), (False, rounded_steps)):
            name = "exact" if is_exact else "rounded"
            usual = Layout(precision=precisions[0] if "fp16" not in precisions else "fp16") if is_exact else Layout()
            reference = Run(work / f"{name}-in-peace", args.disk, data, total, is_exact=is_exact)
            reference.finish(usual)
            bar.update()
            run = Run(work / name, args.disk, data, total, is_exact=is_exact)
            chaos = Chaos(run, draws)
            plan = [(kind, usual) for kind in kinds]
            if not is_exact:
                plan = [(change(here, there), here) for here, there in pairwise(moved)]
            for kind, layout in plan:
                chaos.hit(kind, layout)
                for line in chaos.faults[-1].broken:
                    bar.write(f"{kind}, at step {chaos.faults[-1].step}: {line}", file=sys.stderr)
                bar.update()
            try:
                chaos.finish(usual)
            except Broken as error:
                broken.append(f"{name} run: {error}")
            records = [read_records(r.folder) for r in (reference, run)]
            broken += [f"{name} run: {d}" for d in differences(*records, rounding=0.0 if is_exact else _ROUNDING)]
            settle(chaos.faults)
            faults += chaos.faults
    broken += [f"{fault.kind}, at step {fault.step}: {line}" for fault in faults for line in fault.broken]
    broken += [f"{f.kind}, at step {f.step}: not resumed" for f in faults if f.resumed_step < 0]
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "chaos.json", {
        "setting": {"faults": args.faults, "seed": args.seed, "steps": steps, "rounded_steps": rounded_steps,
                    "batch": BATCH, "save_every_steps": SAVE_EVERY_STEPS, "rounding": _ROUNDING},
        "seconds": round(time.time() - started, 1), "broken": broken,
        "faults": [asdict(f) | {"steps_done_again": f.steps_done_again} for f in faults],
    })  # fmt: skip
    print("\n".join(table(faults)))
    print(f"\n{len(faults)} faults, {steps + rounded_steps} steps; promises broken: {len(broken)}")
    print("\n".join(broken[:40]))
    return 1 if broken else 0


def table(faults: Sequence[Fault]) -> list[str]:
    """Of each kind: number, how many were resumed from, steps done again and seconds until all were gone."""
    lines = ["| fault | number | resumed | steps done again, mean | s until all processes were gone, mean (max) |"]
    lines.append("|---|---:|---:|---:|---:|")
    for kind in dict.fromkeys(
        sorted((f.kind for f in faults), key=[*KINDS, RANKS_CHANGED, STAGE_CHANGED, PRECISION_CHANGED].index)
    ):
        of_kind = [f for f in faults if f.kind == kind]
        resumed = [f for f in of_kind if f.resumed_step >= 0 and not f.broken]
        again = sum(f.steps_done_again for f in resumed) / max(1, len(resumed))
        seconds = [f.survivors_s for f in of_kind]
        lines.append(
            f"| {kind} | {len(of_kind)} | {len(resumed)} | {again:.1f} | "
            f"{sum(seconds) / len(seconds):.1f} ({max(seconds):.1f}) |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
