"""The sample that a tokenizer is trained on."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import REPOSITORY

from data_prep.corpus import find_sources, read_documents
from data_prep.line_sample import LineSample

LINES = [f"line {number}" for number in range(100_000)]
TOTAL_BYTES = sum(len(line) + 1 for line in LINES)


def numbers(lines: Iterator[str]) -> np.ndarray:
    return np.array([int(line.split()[1]) for line in lines])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_the_share_is_right_and_spread_over_the_corpus(share: float) -> None:
    """Within 4.5 standard deviations, of the whole and of each tenth of the corpus."""
    sample = LineSample(int(share * TOTAL_BYTES), TOTAL_BYTES)
    kept = numbers(sample.of(LINES))
    assert sample.num_lines == len(LINES)
    assert sample.num_kept == len(kept)
    assert sample.kept_bytes == sum(len(LINES[number]) for number in kept)
    assert np.all(np.diff(kept) > 0)
    for counts, num_lines in ((np.array([len(kept)]), len(LINES)), (np.bincount(kept // 10_000, minlength=10), 10_000)):
        assert np.all(np.abs(counts - share * num_lines) < 4.5 * (share * (1 - share) * num_lines) ** 0.5 + 1)


@pytest.mark.parametrize("sample_bytes", [TOTAL_BYTES, 10 * TOTAL_BYTES])
def test_a_corpus_no_larger_than_the_sample_is_taken_whole(sample_bytes: int) -> None:
    assert list(LineSample(sample_bytes, TOTAL_BYTES).of(LINES)) == LINES


@pytest.mark.parametrize(("share", "epochs"), [(1, 2.5), (0.5, 3), (0.1, 2), (1, 0.25)])
def test_a_line_is_there_as_often_as_its_epochs_ask(share: float, epochs: float) -> None:
    """floor(share x epochs) times, and once more by what is left: of a line, no other number of times."""
    sample = LineSample(int(share * TOTAL_BYTES), TOTAL_BYTES)
    times = np.bincount(numbers(sample.of(LINES, Fraction(epochs))), minlength=len(LINES))
    whole, rest = divmod(share * epochs, 1)
    assert set(times) <= {int(whole), int(whole) + (rest > 0)}
    assert abs(times.mean() - share * epochs) < 4.5 * (rest * (1 - rest) / len(LINES)) ** 0.5 + 1e-4
    assert sample.num_kept == (times > 0).sum()
    assert sample.kept_bytes == sum(len(line) * int(n) for line, n in zip(LINES, times, strict=True))


def test_another_seed_is_another_sample() -> None:
    samples = [set(LineSample(TOTAL_BYTES // 10, TOTAL_BYTES, seed).of(LINES)) for seed in (0, 0, 1)]
    assert samples[0] == samples[1]
    assert len(samples[0] & samples[2]) < 0.2 * len(samples[0])


def test_a_larger_sample_holds_the_smaller_one() -> None:
    small, large = (set(LineSample(size, TOTAL_BYTES).of(LINES)) for size in (TOTAL_BYTES // 10, TOTAL_BYTES // 5))
    assert small < large


def test_the_sample_does_not_depend_on_how_the_corpus_is_cut_into_files(lines: list[str], tmp_path: Path) -> None:
    text = [f"{line}\n" for line in lines * 5]
    cuts = [0, *sorted(random.Random(0).sample(range(1, len(text)), 6)), len(text)]
    samples = []
    for folder, places in (("one", [0, len(text)]), ("many", cuts)):
        (tmp_path / folder).mkdir()
        for index, (start, stop) in enumerate(pairwise(places)):
            (tmp_path / folder / f"{index}.txt").write_text("".join(text[start:stop]), "utf-8")
        sources = find_sources([tmp_path / folder])
        assert len(sources) == len(places) - 1
        total_bytes = sum(source.size_bytes for source in sources)
        sample = LineSample(total_bytes // 3, total_bytes)
        samples.append(list(sample.of(line for d in read_documents(sources) for line in d.lines)))
    assert samples[0] == samples[1]
    assert 0 < len(samples[0]) < len(text)


def test_no_more_lines_are_held_than_the_one_at_hand() -> None:
    """The source may be asked for a line only when the one before it was taken or passed over."""
    asked = 0

    def source() -> Iterator[str]:
        nonlocal asked
        for line in LINES:
            asked += 1
            yield line

    for kept in LineSample(TOTAL_BYTES // 100, TOTAL_BYTES).of(source()):
        assert int(kept.split()[1]) == asked - 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(lines: list[str], tmp_path: Path) -> None:
    """Fifty times the text costs less than a fifth of what is added; without the sample it would all be held."""
    text = "".join(f"{line}\n" for line in lines)
    peaks, sizes = [], []
    for copies in (20, 1000):
        corpus = tmp_path / f"{copies}.txt"
        corpus.write_text((text + "\n") * copies, "utf-8")
        words = [
            "-m", "data_prep", "train-tokenizer", "--corpus", str(corpus), "--document_per", "blank_line", "--sample_mb",
            "0.5", "--tokenizer", str(tmp_path / f"{copies}.model"), "--vocab_size", "500",
        ]  # fmt: skip
        measure = (
            "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", measure, *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        summary, peak_kib = done.stdout.splitlines()
        assert f"of {len(lines) * copies:,} lines (0." in summary
        peaks.append(int(peak_kib) * 1024)
        sizes.append(corpus.stat().st_size)
    assert sizes[1] - sizes[0] > 28e6
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0])


def test_the_command_trains_on_the_sample_alone(
    data_prep_command: Callable[..., subprocess.CompletedProcess[str]], lines: list[str], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{line}\n" for line in lines * 4), "utf-8")
    share = ["--sample_mb", f"{corpus.stat().st_size / 2e6:.6f}", "--vocab_size", "300"]
    done = data_prep_command("train-tokenizer", "--corpus", corpus, "--tokenizer", tmp_path / "a.model", *share)
    assert done.returncode == 0, done.stderr
    kept = LineSample(int(float(share[1]) * 1e6), corpus.stat().st_size)
    sampled = list(kept.of(lines * 4))
    assert f"from {len(sampled):,} of {4 * len(lines):,} lines" in done.stdout
    (tmp_path / "sampled.txt").write_text("".join(f"{line}\n" for line in sampled), "utf-8")
    whole = ["--corpus", tmp_path / "sampled.txt", "--tokenizer", tmp_path / "b.model", "--vocab_size", "300"]
    assert data_prep_command("train-tokenizer", *whole).returncode == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


@pytest.mark.parametrize(
    ("sample_mb", "fault"),
    [
        ("0", "--sample_mb is 0, expected a number above 0"),
        ("-1", "--sample_mb is -1, expected a number above 0"),
        ("0.000001", "--sample_mb 1e-06: none of the"),
    ],
)
def test_a_sample_too_small(
    data_prep_command: Callable[..., subprocess.CompletedProcess[str]], chapters: list[Path], tmp_path: Path,
    sample_mb: str, fault: str,
) -> None:  # fmt: skip
    words = ["--corpus", chapters[0], "--tokenizer", tmp_path / "t.model", f"--sample_mb={sample_mb}"]
    done = data_prep_command("train-tokenizer", *words)
    assert done.returncode == 2
    assert fault in done.stderr
    assert not (tmp_path / "t.model").exists()
