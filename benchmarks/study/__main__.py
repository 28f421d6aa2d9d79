"""python -m benchmarks.study: does pre-training learn what the paper says, and what is it worth to tasks?

From the text and the labelled data of benchmarks.corpora, --jobs jobs at a time, which share the cores:

  data      a tokenizer and a data set; what the writing task tests with is left out of the text
  pretrain  the five objectives, AE+PAR without relative position bias, some with two seeds, all on the same samples in the same
            order; and transformers' BertForMaskedLM on them for as many CPU seconds as AE+PAR took,
            the longer of two seeds
  losses    of both kinds, of each of these models and of one with initial weights
  tasks     each of them fine-tuned for four tasks, with several seeds
  report    results.json, results.md and figures, of what there is

What is done is not done again, and what was interrupted goes on: start it again. The numbers are in benchmarks/study/plan.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study import plan
from benchmarks.study.plan import Arm
from benchmarks.study.report import write_report
from benchmarks.study.tasks import RESULT, Task, random_twin
from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.files import read_json, write_json, write_whole

_LAST_LINES = 3
Command = Sequence[object]


@dataclass(frozen=True)
class Job:
    """Commands that leave a study.json with what they took."""

    name: str
    folder: Path
    commands: tuple[Command, ...]

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()


class Study:
    """A study's folder, and what is left to do in it."""

    def __init__(self, corpora: Path, output: Path, total_steps: int, finetuning_seeds: int, num_jobs: int) -> None:
        self._corpora, self._output, self._num_jobs, self._seeds = corpora, output, num_jobs, finetuning_seeds
        self._config = output / "deepspeed.json"
        self._total_steps = total_steps

    def run(self, arms: Sequence[Arm], tasks: Sequence[Task]) -> None:
        """Do what is left for these. Raises ValueError, naming a log, where a command failed."""
        self._output.mkdir(parents=True, exist_ok=True)
        self._make_data()
        self._write_config()
        self._do("pre-train", [self._pretraining(arm) for arm in arms if arm in plan.PMLMS])
        if plan.BERT in arms:
            self._do("pre-train BERT", [self._pretraining_bert()])
        if plan.RANDOM in arms:
            for seed in range(self._seeds):
                random_twin(self.weights(plan.REFERENCE, 0), self.weights(plan.RANDOM, seed), seed)
        self._do("losses", [
            Job(f"losses-{arm.name}", folder, ((
                "-m", "benchmarks.study.losses", "--weights", self.weights(arm, 0), "--data", self._output / "data", "--output", folder,
            ),))
            for arm in arms if (folder := self._output / "losses" / arm.name)
        ])  # fmt: skip
        files = {task.name: task.prepare(self._corpora, self._output / "tasks" / task.name) for task in tasks}
        self._do("fine-tune", [
            Job(f"{task.name}-{arm.name}-{seed}", folder, ((
                "-m", "benchmarks.study.tasks", "--task", task.name, "--train_file", files[task.name].train, "--validation_file",
                files[task.name].validation, "--test_file", files[task.name].test, "--weights", self.weights(arm, seed),
                "--seed", seed, "--output", folder,
            ),))
            for seed in range(self._seeds) for task in tasks for arm in arms
            if (folder := self._output / "tasks" / task.name / f"{arm.name}-{seed}")
        ])  # fmt: skip
        floors = {task.name: task.floors(files[task.name]) for task in tasks}
        write_report(self._output, arms, tasks, floors, self._seeds)

    def _make_data(self) -> None:
        text, data = self._output / "text", self._output / "data"
        kept_out = _test_targets(self._corpora / "tasks" / plan.WRITING)
        text.mkdir(exist_ok=True)
        for name in plan.TEXTS:
            source, copy = self._corpora / "text" / f"{name}.jsonl", text / f"{name}.jsonl"
            if name != plan.TEXT_WITH_TARGETS:
                if not copy.exists():
                    copy.symlink_to(source.resolve())
                continue
            lines = [line for line in source.open("rb") if json.loads(line)["text"].split("\n")[0] not in kept_out]
            if not copy.is_file() or copy.read_bytes() != b"".join(lines):
                write_whole(copy, b"".join(lines))
        tokenizer = self._output / "tokenizer.model"
        self._do("data", [Job("data", self._output / "data_job", (
            ("-m", "data_prep", "train-tokenizer", "--corpus", text, "--tokenizer", tokenizer, "--vocab_size", plan.VOCAB_SIZE,
             "--sample_mb", plan.TOKENIZER_SAMPLE_MB),
            ("-m", "data_prep", "build", "--corpus", text, "--tokenizer", tokenizer, "--data", data, "--max_length_tokens",
             plan.MAX_LENGTH_TOKENS, "--mask_sets", plan.MASK_SETS),
        ))])  # fmt: skip

    def _write_config(self) -> None:
        """The shipped recipe, over --steps; all arms share it."""
        config = read_json(Path(plan.DEEPSPEED_CONFIG))
        schedule = config["scheduler"]["params"]
        share = schedule["warmup_num_steps"] / schedule["total_num_steps"]
        schedule |= {"total_num_steps": self._total_steps, "warmup_num_steps": max(1, round(share * self._total_steps))}
        if self._config.is_file() and read_json(self._config) != config:
            raise ValueError(f"{self._config}: is of another study; give the same --steps, or another --output")
        write_json(self._config, config)

    def _pretrained(self, arm: Arm) -> Path:
        return self._output / "pretrain" / arm.name

    def _pretraining(self, arm: Arm) -> Job:
        run = self._pretrained(arm)
        return Job(arm.name, run, (
            ("run_pretrain.py", "--deepspeed_config", self._config, "--data", self._output / "data", "--run", run, *plan.MODEL_FLAGS,
             *arm.flags, "--validate_every_steps", max(1, self._total_steps // 20), "--save_every_steps",
             max(1, self._total_steps // 10), "--keep_last", 1),
            ("-m", "pretrain.export", "--run", run, "--output", run / "export"),
        ))  # fmt: skip

    def _pretraining_bert(self) -> Job:
        run = self._pretrained(plan.BERT)
        results = [self._pretrained(arm) / RESULT for arm in plan.PMLMS if arm.kind == plan.REFERENCE.kind]
        took = [read_json(result)["cpu_s"][0] for result in results if result.is_file()]
        if not took:
            raise ValueError(
                f"{plan.BERT.name} is trained for as long as {plan.REFERENCE.name}, which is not; name both in --only"
            )
        return Job(plan.BERT.name, run, ((
            "-m", "benchmarks.study.bert", "--deepspeed_config", self._config, "--data", self._output / "data", "--output", run,
            "--cpu_s", max(took), *plan.MODEL_FLAGS,
        ),))  # fmt: skip

    def weights(self, arm: Arm, seed: int) -> Path:
        """What a fine-tuning with this seed begins with."""
        if arm == plan.RANDOM:
            return self._output / "random" / str(seed)
        return self._pretrained(arm) if arm == plan.BERT else self._pretrained(arm) / "export"

    def _do(self, description: str, jobs: Sequence[Job]) -> None:
        """Those that are not done, some at a time; one at a time shows its own progress."""
        left = [job for job in jobs if not job.is_done]
        if not left:
            return
        failures: list[str] = []
        # As many threads for a job that is alone, or its CPU seconds would be others.
        threads = {"OMP_NUM_THREADS": str(max(1, available_cores() // self._num_jobs)), "DS_ACCELERATOR": "cpu"}
        if self._num_jobs == 1:
            for number, job in enumerate(left, start=len(jobs) - len(left) + 1):
                print(f"{description}, {number} of {len(jobs)}: {job.name}", flush=True)
                self._do_one(job, threads, is_alone=True)
            return
        with (
            ThreadPoolExecutor(self._num_jobs) as pool,
            progress_bar(description, len(jobs), "job", initial=len(jobs) - len(left)) as bar,
        ):

            def do(job: Job) -> None:
                if not failures:
                    bar.set_postfix_str(job.name)
                    try:
                        self._do_one(job, threads)
                    except ValueError as error:
                        failures.append(str(error))
                    bar.update()

            list(pool.map(do, left))
        if failures:
            raise ValueError("; ".join(failures))

    def _do_one(self, job: Job, threads: dict[str, str], is_alone: bool = False) -> None:
        log = self._output / "logs" / f"{job.name}.log"
        log.parent.mkdir(exist_ok=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        seconds = []
        for command in job.commands:
            with log.open("ab") as file:
                to = None if is_alone else file
                process = subprocess.Popen(
                    [sys.executable, *map(str, command)], stdin=subprocess.DEVNULL, stdout=to, stderr=to, env={**os.environ, **threads}
                )  # fmt: skip
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode and is_alone:
                raise ValueError(f"{job.name} failed, for the reason above")
            if process.returncode:
                words = log.read_text(errors="replace").replace("\r", "\n").split("\n")
                raise ValueError(f"{job.name} failed; {log} ends: {' | '.join([w for w in words if w][-_LAST_LINES:])}")
            seconds.append(round(usage.ru_utime + usage.ru_stime, 1))
        found: dict[str, Any] = read_json(job.folder / RESULT) if job.is_done else {}
        write_json(job.folder / RESULT, {**found, "cpu_s": seconds})


def _test_targets(task: Path) -> set[str]:
    """The targets that a model is tested, or chosen, by."""
    files = (task / f"{part}.jsonl" for part in ("validation", "test"))
    return {json.loads(line)["tgt"] for file in files for line in file.open("rb")}


def main() -> int:
    """Entry point; returns the exit status."""
    arms = {arm.name: arm for arm in (*plan.PMLMS, plan.BERT, plan.RANDOM)}
    tasks = {task.name: task for task in plan.TASKS}
    parser = ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("data/corpora"), help="what benchmarks.corpora made")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder for everything")
    parser.add_argument(
        "--only", nargs="+", choices=arms, metavar="NAME", default=[*arms], help=f"models: {', '.join(arms)}"
    )
    parser.add_argument(
        "--tasks", nargs="*", choices=tasks, metavar="NAME", default=[*tasks], help=f"tasks: {', '.join(tasks)}"
    )
    parser.add_argument("--steps", type=int, default=plan.TOTAL_STEPS, help="of pre-training")
    parser.add_argument(
        "--seeds", type=int, default=plan.FINETUNING_SEEDS, help="fine-tunings of each model for each task"
    )
    parser.add_argument(
        "--jobs", type=int, default=available_cores(), help="at a time; 1 shows each one's own progress"
    )
    parser.add_argument(
        "--list_corpora", action="store_true", help="print which of benchmarks.corpora this needs, and do nothing"
    )
    args = parser.parse_args()

    def command() -> None:
        if args.list_corpora:  # the writing task for its targets, which are left out of the text
            print(*dict.fromkeys((*plan.TEXTS, plan.WRITING, *args.tasks)))
            return
        study = Study(args.corpora, args.output, args.steps, args.seeds, args.jobs)
        study.run([arms[name] for name in args.only], [tasks[name] for name in args.tasks])

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
