"""python -m benchmarks.data_prep: what making a data set costs beside tokenizing alone, how much memory, how fast it is read.

All in one run, on the same text, which is JSON lines as `python -m benchmarks.corpora` makes them:

  speed    `data_prep build` with 4 mask sets, its start included, by 1 and by 2 processes, beside three plain loops that
           only read and encode with the sentencepiece library: a call for each line, for each document, for many lines;
           they take turns, and the figures are the fastest of each
  stages   where the CPU seconds of a build go
  sizes    builds of 10 MB and of 500 MB (the text several times): the largest process, and 1 process beside 2
  loader   samples a second from page-cached shards; 10,000 shards; the order of 10^9 samples

Beside the seconds on the clock are CPU seconds, which other work on the machine disturbs less. Prints a table; --output
writes the figures as JSON.

With --scale, instead, what a corpus of 160 GB would open, send and hold: see benchmarks/data_scale.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.data_scale import measure_scale, table_of_scale
from data_prep.build import draw_mask_sets
from data_prep.cleaning import NO_CLEANING, cleaned
from data_prep.console import ArgumentParser, progress_bar, run_command
from data_prep.corpus import Document, Unit, find_sources, make_document, plan_units, read_unit
from data_prep.corpus_files import find_files
from data_prep.memory import keep_freed_memory
from data_prep.packing import Texts, assemble
from data_prep.parameters import BuildParameters
from data_prep.parts import part_path
from data_prep.shards import CHUNK_SAMPLES, DataSet, read_data_manifest, write_data_manifest, write_shard
from data_prep.tokenizer import load_tokenizer
from data_prep.units import UNIT, read_texts, tokenize, write_part
from pretrain.batches import RecentChunks, SampleOrder

_T = TypeVar("_T")
_MASK_SETS = 4
_VOCAB_SIZE = 8000
_TOKENIZER_SAMPLE_MB = 15
_SMALL_BYTES, _LARGE_BYTES = 10 * 10**6, 500 * 10**6
_NUM_SHARDS = 10_000
_NUM_SAMPLES = 10**9
_MB = 10**6

# A fresh small process starts the command: a child's ru_maxrss begins with the memory of the process it was split from.
_LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)])
_, status, usage = os.wait4(child, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""

_ENCODE = """
import json, sys
import sentencepiece
way, model, *files = sys.argv[1:]
encode = sentencepiece.SentencePieceProcessor(model_file=model).encode
lines, num_characters = [], 0
for path in files:
    with open(path, "rb") as file:
        for row in file:
            text = json.loads(row)["text"]
            if way == "a document a call":
                encode(text)
            elif way == "a line a call":
                for line in text.split("\\n"):
                    encode(line)
            else:
                lines += text.split("\\n")
                num_characters += len(text)
                if num_characters > 2**18:
                    encode(lines, num_threads=1)
                    lines, num_characters = [], 0
encode(lines, num_threads=1)
"""
_START = """
import data_prep.__main__, data_prep.draws, data_prep.processes, numpy
data_prep.processes.LocalProcesses(1).prepare(lambda: None)
data_prep.draws.word_of(numpy.uint64(0), 0)  # numba's, too
"""
_WAYS = ("a line a call", "a document a call", "many lines a call")


@dataclass(frozen=True)
class Cost:
    """What a command took, with the processes it started."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    """Of its largest process."""


def cost_of(*command: object) -> Cost:
    """Run a Python command, its output thrown away. Raises CalledProcessError if it fails."""
    launcher = [sys.executable, "-c", _LAUNCHER, sys.executable, *map(str, command)]
    return Cost(*json.loads(subprocess.run(launcher, check=True, stdout=subprocess.PIPE).stdout))


def cost_of_build(corpus: Sequence[Path], model: Path, folder: Path, workers: int) -> Cost:
    """The whole command."""
    return cost_of(
        "-m", "data_prep", "build", "--corpus", *corpus, "--tokenizer", model, "--data", folder, "--mask_sets", _MASK_SETS,
        "--workers", workers,
    )  # fmt: skip


def train(corpus: Sequence[Path], model: Path) -> None:
    """A tokenizer of the corpus, in a process of its own: this one stays small."""
    cost_of(
        "-m", "data_prep", "train-tokenizer", "--corpus", *corpus, "--tokenizer", model, "--vocab_size", _VOCAB_SIZE,
        "--sample_mb", _TOKENIZER_SAMPLE_MB,
    )  # fmt: skip


def measure_speed(
    corpus: Sequence[Path], files: Sequence[Path], model: Path, folder: Path, rounds: int
) -> dict[str, Any]:
    """Builds into `folder`/1 and /2, and the plain loops, in turns; the fastest of each."""
    runs: dict[str, Callable[[], Cost]] = {way: partial(cost_of, "-c", _ENCODE, way, model, *files) for way in _WAYS}
    for workers in (1, 2):
        runs[f"build, {workers}"] = partial(_build_anew, corpus, model, folder / str(workers), workers)
    costs: dict[str, list[Cost]] = defaultdict(list)
    with _bar("speed", rounds * len(runs)) as bar:
        for _ in range(rounds):
            for name, run in runs.items():
                costs[name].append(run())
                bar.update(1)
    result: dict[str, Any] = {"runs": {name: [asdict(cost) for cost in found] for name, found in costs.items()}}
    for unit in ("wall_s", "cpu_s"):
        best = {name: min(getattr(cost, unit) for cost in found) for name, found in costs.items()}
        result[unit] = best
        result[f"build_to_encode_{unit}"] = best["build, 1"] / min(best[way] for way in _WAYS)
        result[f"build_to_line_by_line_{unit}"] = best["build, 1"] / best[_WAYS[0]]
    result["speedup_of_2"] = result["wall_s"]["build, 1"] / result["wall_s"]["build, 2"]
    result["peak_bytes"] = max(cost.peak_bytes for found in costs.values() for cost in found)
    return result


def _build_anew(corpus: Sequence[Path], model: Path, folder: Path, workers: int) -> Cost:
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    return cost_of_build(corpus, model, folder, workers)


def measure_stages(corpus: Sequence[Path], model: Path, folder: Path) -> dict[str, float]:
    """CPU seconds of the parts of a build, each done for itself in this process."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.process_time()
        yield
        seconds[stage] += time.process_time() - started

    keep_freed_memory()
    folder.mkdir()
    sources, tokenizer, parameters = find_sources(corpus), load_tokenizer(model), BuildParameters(mask_sets=_MASK_SETS)
    seconds["start of the process"] = cost_of("-c", _START).cpu_s
    exec(_START, {})
    with timed("compiled code from its cache"):
        few = [make_document([line]) for line in ("It is a truth universally acknowledged.", "A single man.")]
        texts, _ = tokenize(few, tokenizer, replace(parameters, validation_fraction=0))
        samples = assemble(texts["train"], seed=0, first_sample=0, sos_id=tokenizer.sos_id, eos_id=tokenizer.eos_id)
        draw_mask_sets(samples, tokenizer, parameters, 0)
    units = plan_units(sources)
    encode = tokenizer.encode_texts

    def timed_encode(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        with timed("encode"):
            return encode(texts)

    def read(unit: Unit) -> Iterator[Document]:
        return cleaned(read_unit(unit, bytearray()), NO_CLEANING, Counter())

    tokenizer.encode_texts = timed_encode  # type: ignore[method-assign]
    waiting: list[Texts] = []
    with _bar("stages", len(units)) as bar:
        for index, unit in enumerate(units):
            with timed("read: JSON, lines, hash of the input"):
                for _ in read(unit):
                    pass
            with timed("read and hash"):
                for document in read(unit):
                    assert document.hash >= 0
            with timed("tokenize"):
                texts, counts = tokenize(read(unit), tokenizer, parameters)
            with timed("texts to files and back"):
                path = part_path(folder, UNIT, index, 0, is_last=True)
                write_part(path, texts, counts, b"")
                waiting.append(read_texts(path, "train"))
            bar.update(1)
            while sum(len(texts.num_ids_B) for texts in waiting) >= parameters.shard_samples or index == len(units) - 1:
                with timed("texts to files and back"):
                    together = Texts.concatenate(waiting)
                    shard = together[np.arange(min(parameters.shard_samples, len(together.num_ids_B)))]
                    waiting = [together[np.arange(len(shard.num_ids_B), len(together.num_ids_B))]]
                if not len(shard.num_ids_B):
                    break
                with timed("samples"):
                    samples = assemble(shard, seed=0, first_sample=0, sos_id=tokenizer.sos_id, eos_id=tokenizer.eos_id)
                with timed("masks"):
                    masks = draw_mask_sets(samples, tokenizer, parameters, 0)
                with timed("shards: HDF5, hash, write"):
                    path, most_masked = folder / "train-00000.h5", parameters.max_masked_tokens
                    write_shard(path, samples, masks, parameters.max_length_tokens, most_masked)
    tokenized, seconds["hashes of the documents"] = seconds.pop("tokenize"), seconds.pop("read and hash")
    seconds["cut into texts, count"] = tokenized - seconds["encode"] - seconds["hashes of the documents"]
    seconds["hashes of the documents"] -= seconds["read: JSON, lines, hash of the input"]
    return seconds


def measure_sizes(files: Sequence[Path], model: Path, folder: Path) -> list[dict[str, Any]]:
    """The largest process, and the time, of builds of a little and of much text."""
    folder.mkdir()
    small, large = folder / "small", folder / "large"
    small.mkdir()
    large.mkdir()
    num_bytes = 0
    with open(small / "text.jsonl", "wb") as taken:
        for row in (row for file in files for row in file.open("rb")):
            if num_bytes > _SMALL_BYTES:
                break
            num_bytes += taken.write(row)
    copies = -(-_LARGE_BYTES // sum(file.stat().st_size for file in files))
    for copy in range(copies):
        for number, file in enumerate(files):
            (large / f"{copy:02d}-{number:04d}.jsonl").symlink_to(file.resolve())
    costs = []
    with _bar("sizes", 3) as bar:
        for corpus, workers in ((small, 2), (large, 1), (large, 2)):
            cost = cost_of_build([corpus], model, folder / f"{corpus.name}-{workers}", workers)
            text_bytes = sum(file.stat().st_size for file in corpus.iterdir())
            costs.append({"text_bytes": text_bytes, "workers": workers, **asdict(cost)})
            bar.update(1)
    return costs


def measure_loader(data: DataSet, batch: int = 256) -> dict[str, Any]:
    """The global order and the reading of its samples, in this process, from page-cached shards."""
    order, chunks = SampleOrder(data.num_samples("train"), seed=0), RecentChunks(data, "train")
    resident, seconds, cpu_s = [], 0.0, 0.0
    num_samples = 4 * max(data.num_samples("train") // 4, 50_000)
    with _bar("loader", 4) as bar:
        for quarter in range(4):
            started, started_cpu = time.perf_counter(), time.process_time()
            for first in range(quarter * num_samples // 4, (quarter + 1) * num_samples // 4, batch):
                epochs, samples = order.samples(first, first + batch)
                chunks.read(samples, epochs % data.num_mask_sets)
            if quarter:  # the first warms up
                seconds += time.perf_counter() - started
                cpu_s += time.process_time() - started_cpu
            resident.append(_resident_bytes())
            bar.update(1)
    timed = num_samples * 3 // 4
    return {
        "samples_per_s": timed / seconds, "samples_per_cpu_s": timed / cpu_s,
        "growth_bytes": resident[-1] - resident[0], "length": data.max_length_tokens,
    }  # fmt: skip


def measure_many_shards(small: DataSet, folder: Path) -> dict[str, Any]:
    """An epoch over 10,000 shards of a chunk of short samples each, which are copies of one file."""
    folder.mkdir()
    tokenizer, parameters = small.tokenizer, BuildParameters(max_length_tokens=16, shard_samples=CHUNK_SAMPLES)
    texts = Texts(np.tile(tokenizer.normal_ids[:8], CHUNK_SAMPLES).astype(np.uint16), np.full(CHUNK_SAMPLES, 8))
    samples = assemble(texts, seed=0, first_sample=0, sos_id=tokenizer.sos_id, eos_id=tokenizer.eos_id)
    masks = draw_mask_sets(samples, tokenizer, parameters, 0)
    path = folder / "train-00000.h5"
    entry = write_shard(path, samples, masks, parameters.max_length_tokens, parameters.max_masked_tokens)
    content = path.read_bytes()
    names = [f"train-{index:05d}.h5" for index in range(_NUM_SHARDS)]
    for name in names:
        (folder / name).write_bytes(content)
    (folder / tokenizer.file_name).write_bytes(tokenizer.path.read_bytes())
    manifest = {k: v for k, v in read_data_manifest(small.folder).items() if k not in ("format", "version")}
    splits = {"train": [{**entry, "file": name} for name in names], "validation": []}
    write_data_manifest(folder, {**manifest, "parameters": asdict(parameters), "splits": splits})

    data = DataSet(folder)
    order, chunks = SampleOrder(data.num_samples("train"), seed=0), RecentChunks(data, "train")
    files_before, most_files, resident = _open_files(), 0, []
    with _bar("10,000 shards", _NUM_SHARDS) as bar:
        for first in range(0, _NUM_SHARDS * CHUNK_SAMPLES, 64 * CHUNK_SAMPLES):
            epochs, numbers = order.samples(first, min(first + 64 * CHUNK_SAMPLES, _NUM_SHARDS * CHUNK_SAMPLES))
            chunks.read(numbers, epochs)
            most_files = max(most_files, _open_files() - files_before)
            resident.append(_resident_bytes())
            bar.update(len(numbers) // CHUNK_SAMPLES)
    data.close()
    return {
        "shards": _NUM_SHARDS,
        "open_files": most_files,
        "growth_bytes": resident[-1] - resident[len(resident) // 4],
    }


def measure_order() -> dict[str, Any]:
    """Go through an epoch of 10^9 samples; each must come once."""
    order = SampleOrder(_NUM_SAMPLES, seed=0)
    is_seen = np.zeros(-(-_NUM_SAMPLES // CHUNK_SAMPLES), dtype=np.bool_)
    is_seen[:] = False  # here, so that its pages count before the start
    step = 64 * CHUNK_SAMPLES
    before, resident, each_once = 0, 0, True
    started = time.process_time()
    with _bar("order", _NUM_SAMPLES) as bar:
        for first in range(0, _NUM_SAMPLES, step):
            stop = min(first + step, _NUM_SAMPLES)
            samples = np.sort(order.samples(first, stop)[1])
            chunks = samples[::CHUNK_SAMPLES] // CHUNK_SAMPLES
            whole_chunks = (chunks[:, None] * CHUNK_SAMPLES + np.arange(CHUNK_SAMPLES)).ravel()[: len(samples)]
            each_once &= np.array_equal(samples, whole_chunks) and not is_seen[chunks].any()
            is_seen[chunks] = True
            resident = max(resident, _resident_bytes()) if first % (100 * step) == 0 else resident
            before = before or resident
            bar.update(stop - first)
    return {
        "samples": _NUM_SAMPLES, "each_once": bool(each_once and is_seen.all()), "growth_bytes": resident - before,
        "samples_per_cpu_s": _NUM_SAMPLES / (time.process_time() - started),
    }  # fmt: skip


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _bar(stage: str, total: int) -> Any:
    return progress_bar(f"{stage:14}", total, "", stream=sys.stderr)


def measure(corpus: Sequence[Path], rounds: int) -> dict[str, Any]:
    """All figures."""
    files = [path for path, _ in find_files(corpus)]
    if others := [file for file in files if file.suffix != ".jsonl"]:
        raise ValueError(f"{others[0]}: expected .jsonl files alone, which the plain loops read")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tokenizer.model"
        train(corpus, model)
        speed = measure_speed(corpus, files, model, folder, rounds)
        sizes = measure_sizes(files, model, folder / "sizes")
        stages = measure_stages(corpus, model, folder / "stages")
        data, small = DataSet(folder / "1"), DataSet(folder / "sizes" / "small-2")
        result = {
            "text_bytes": sum(file.stat().st_size for file in files), "samples": data.num_samples("train"),
            "speed": speed, "stages_cpu_s": stages, "sizes": sizes, "loader": measure_loader(data),
            "many_shards": measure_many_shards(small, folder / "many"), "order": measure_order(),
        }  # fmt: skip
        data.close()
        small.close()
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    """The figures beside what is wanted."""
    speed, stages, sizes = result["speed"], result["stages_cpu_s"], result["sizes"]
    loader, shards, order = result["loader"], result["many_shards"], result["order"]
    yield f"{result['text_bytes'] / _MB:.0f} MB of text, {result['samples']:,} samples to train, {_MASK_SETS} mask sets"
    yield ""
    yield f"{'':28}{'wall s':>9}{'CPU s':>9}"
    for name in speed["wall_s"]:
        yield f"{name:28}{speed['wall_s'][name]:9.1f}{speed['cpu_s'][name]:9.1f}"
    yield ""
    total, large = sum(stages.values()), sizes[1]["text_bytes"]
    for name, seconds in sorted(stages.items(), key=lambda stage: -stage[1]):
        yield f"{name:28}{seconds:9.2f} CPU s{seconds / total:8.1%}"
    yield ""
    yield f"{'':62}{'found':>12}{'wanted':>12}"
    yield from (f"{what:62}{found:>12}{wanted:>12}" for what, found, wanted in (
        ("build / fastest plain loop, wall", f"{speed['build_to_encode_wall_s']:.2f}", "<= 1.15"),
        ("build / fastest plain loop, CPU", f"{speed['build_to_encode_cpu_s']:.2f}", "<= 1.15"),
        ("build / a line a call, wall", f"{speed['build_to_line_by_line_wall_s']:.2f}", ""),
        ("build / a line a call, CPU", f"{speed['build_to_line_by_line_cpu_s']:.2f}", ""),
        ("masks, share of the CPU seconds of all stages", f"{stages['masks'] / total:.1%}", "< 5%"),
        ("2 processes, times as fast as 1, wall", f"{speed['speedup_of_2']:.2f}", ">= 1.85"),
        (f"the same on {large / _MB:.0f} MB", f"{sizes[1]['wall_s'] / sizes[2]['wall_s']:.2f}", ">= 1.85"),
        *((f"largest process, {size['text_bytes'] / _MB:.0f} MB of text, {size['workers']} processes",
           f"{size['peak_bytes'] / _MB:.0f} MB", "< 600 MB") for size in sizes),
        (f"largest process, {result['text_bytes'] / _MB:.0f} MB of text", f"{speed['peak_bytes'] / _MB:.0f} MB", "< 600 MB"),
        (f"loader, samples/s at length {loader['length']}, wall", f"{loader['samples_per_s']:,.0f}", ">= 20,000"),
        ("loader, samples per CPU s", f"{loader['samples_per_cpu_s']:,.0f}", ""),
        ("loader, memory added by the last three quarters", f"{loader['growth_bytes'] / _MB:.1f} MB", "0"),
        (f"{shards['shards']:,} shards: open files", f"{shards['open_files']}", "<= 32"),
        (f"{shards['shards']:,} shards: memory added by the last three quarters", f"{shards['growth_bytes'] / _MB:.1f} MB", "0"),
        (f"order of {order['samples']:,} samples: each once", f"{order['each_once']}", "True"),
        (f"order of {order['samples']:,} samples: memory added", f"{order['growth_bytes'] / _MB:.1f} MB", "0"),
    ))  # fmt: skip


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", type=Path, nargs="+", help=".jsonl files or folders, 100 MB or more")
    what.add_argument("--scale", action="store_true", help="count what a simulated corpus of 160 GB opens and sends")
    parser.add_argument("--rounds", type=int, default=3, help="how often each run of the speed part is done")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()

    def command() -> None:
        if args.scale:
            with tempfile.TemporaryDirectory() as name:
                result = measure_scale(Path(name))
        else:
            result = measure(args.corpus, args.rounds)
        print("\n".join(table_of_scale(result) if args.scale else table(result)))
        if args.output:
            args.output.write_text(json.dumps(result, indent=1))

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
