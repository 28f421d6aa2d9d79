"""python -m benchmarks.data_prep: what making a data set costs beside tokenizing alone, and how fast it is read.

All in one run, on the same text: encoding with the sentencepiece library alone; the whole way from text to shards with 4
mask sets, by 1 and by 2 processes; the masks' share of it; peak memory; and how fast the loader hands out samples.
Prints a table; --output writes the figures as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_prep.build import draw_mask_sets
from data_prep.console import ArgumentParser, run_command
from data_prep.corpus import find_sources, read_documents
from data_prep.packing import Samples
from data_prep.parameters import BuildParameters
from data_prep.shards import CHUNK_SAMPLES, DataSet
from data_prep.tokenizer import train_tokenizer
from pretrain.batches import SampleOrder, _Chunks

_MASK_SETS = 4
_VOCAB_SIZE = 8000
_TRAINING_LINES = 100_000


def seconds_of_encoding(corpus: list[Path], model: Path) -> float:
    """Read the corpus and encode it line by line, in one process, nothing else."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    started = time.perf_counter()
    for document in read_documents(find_sources(corpus)):
        for line in document.lines:
            processor.encode(line)
    return time.perf_counter() - started


def seconds_of_build(corpus: list[Path], model: Path, folder: Path, workers: int) -> float:
    """The whole command, its start included."""
    command = [
        sys.executable, "-m", "data_prep", "build", "--corpus", *map(str, corpus), "--tokenizer", str(model), "--data",
        str(folder), "--mask_sets", str(_MASK_SETS), "--workers", str(workers),
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_of_masks(data: DataSet) -> float:
    """Draw all mask sets of the training samples again."""
    parameters = BuildParameters(mask_sets=_MASK_SETS)
    num_samples, seconds = data.num_samples("train"), 0.0
    for first in range(0, num_samples, 8 * CHUNK_SAMPLES):
        batch = data.read_samples("train", first, min(first + 8 * CHUNK_SAMPLES, num_samples))
        samples = Samples(batch.tokens_BL.astype(np.int32), batch.length_B, batch.segment_boundary_B)
        started = time.perf_counter()
        draw_mask_sets(samples, data.tokenizer, parameters, first)
        seconds += time.perf_counter() - started
    return seconds


def samples_per_s_of_loader(data: DataSet, batch: int = 256) -> float:
    """The global order and the reading of its samples, in one process, from page-cached shards."""
    order, chunks = SampleOrder(data.num_samples("train"), seed=0), _Chunks(data, "train")
    num_samples = max(data.num_samples("train"), 20_000)
    started = time.perf_counter()
    for first in range(0, num_samples, batch):
        epochs, samples = order.samples(first, first + batch)
        chunks.read(samples, epochs % data.num_mask_sets)
    return num_samples / (time.perf_counter() - started)


def measure(corpus: list[Path]) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = read_documents(find_sources(corpus))
        lines = (line for document in documents for line in document.lines)
        training = [line for _, line in zip(range(_TRAINING_LINES), lines, strict=False)]
        model = train_tokenizer(training, folder / "tokenizer.model", vocab_size=_VOCAB_SIZE).path
        text_bytes = sum(source.size_bytes for source in find_sources(corpus))
        encode_s = seconds_of_encoding(corpus, model)
        one_s = seconds_of_build(corpus, model, folder / "one", 1)
        two_s = seconds_of_build(corpus, model, folder / "two", 2)
        data = DataSet(folder / "one")
        result = {
            "text_bytes": text_bytes, "samples": data.num_samples("train"), "encode_s": encode_s, "build_1_s": one_s,
            "build_2_s": two_s, "build_to_encode": one_s / encode_s, "speedup_2": one_s / two_s,
            "masks_share": seconds_of_masks(data) / one_s, "loader_samples_per_s": samples_per_s_of_loader(data),
            "peak_bytes_of_a_process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }  # fmt: skip
        data.close()
    return result


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="text files or folders, 100 MB or more")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()

    def command() -> None:
        result = measure(args.corpus)
        for key, value in result.items():
            print(f"{key:24} {value:,.3f}" if isinstance(value, float) else f"{key:24} {value:,}")
        if args.output:
            args.output.write_text(json.dumps(result, indent=1))

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
