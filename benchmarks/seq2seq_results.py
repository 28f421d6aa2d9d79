"""python -m benchmarks.seq2seq_results: what pre-training gives to writing, in ROUGE, on long descriptions and synopses of Debian packages.

  pre-trained      --weights, fine-tuned by finetune.seq2seq
  random           the same model with initial weights, fine-tuned in the same way
  lead, sentence   the source's first sentence
  lead, words      its first words, as many as a reference has on average

The data is what `python -m benchmarks.corpora debian-synopsis --output data/corpora` makes. Training is on the first pairs of a
permutation of the training file, and the best weights in validation write the test file's targets. A training that was interrupted
goes on, a finished one is not done again. Writes results.json and results.md, which has texts the model wrote as well.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune_results import random_twin
from data_prep.console import ArgumentParser, run_command
from data_prep.files import write_json, write_whole
from finetune.batches import epoch_order
from finetune.generate import write_file
from finetune.pairs import PairColumns, read_pairs
from finetune.runs import StartSettings
from finetune.score import read_lines, rouge_scores, score_files, text_scores
from finetune.seq2seq import TargetSettings, ValidationSettings, train
from finetune.seq2seq_model import Seq2SeqSettings
from finetune.trainer import TrainSettings
from finetune.writer import Writer

SCORES = ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "exact_match")
PRETRAINED, RANDOM = "pre-trained", "random"
_PERMUTATION_SEED = 0
_NUM_EXAMPLES = 5


def some_pairs(source: Path, output: Path, num_pairs: int) -> Path:
    """The first pairs of a permutation of a file's, as a file."""
    pairs = read_pairs(source, PairColumns())
    order = sorted(epoch_order(_PERMUTATION_SEED, 0, len(pairs))[:num_pairs].tolist())
    rows = [{"src": pairs.sources[i][0], "tgt": pairs.targets[i]} for i in order]
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return output


def leads(sources: Sequence[str], num_words: int) -> dict[str, list[str]]:
    """What is written by copying the beginning."""
    return {
        "lead, sentence": [re.split(r"(?<=[.!?:])\s", text)[0] for text in sources],
        f"lead, {num_words} words": [" ".join(text.split()[:num_words]) for text in sources],
    }


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.seq2seq_results", description=__doc__)
    parser.add_argument(
        "--weights", type=Path, metavar="PATH", required=True, help="a pre-trained PMLM, see finetune.seq2seq"
    )
    parser.add_argument("--data", type=Path, default=Path("data/corpora/tasks/debian-synopsis"),
                        help="folder with train.jsonl, validation.jsonl and test.jsonl")  # fmt: skip
    parser.add_argument("--num_train", type=int, default=4000, help="pairs to train on")
    parser.add_argument("--num_validation", type=int, default=300, help="pairs that the best weights are chosen by")
    parser.add_argument("--num_test", type=int, default=500, help="pairs to test with")
    parser.add_argument("--epochs", type=int, default=6, help="times that every pair is seen")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak")
    parser.add_argument("--max_source_tokens", type=int, default=160, help="longer sources are cut")
    parser.add_argument("--max_target_tokens", type=int, default=32, help="longer targets are cut")
    parser.add_argument("--target_mask_prob", type=float, default=0.0, help="see finetune.seq2seq")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each")
    parser.add_argument("--output", type=Path, default=Path("runs/seq2seq_results"), help="folder for all that is made")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    args.output.mkdir(parents=True, exist_ok=True)
    files = {
        name: some_pairs(args.data / f"{name}.jsonl", args.output / f"{name}-{number}.jsonl", number)
        for name, number in (("train", args.num_train), ("validation", args.num_validation), ("test", args.num_test))
    }
    rows = [*_lead_rows(files), *(row for start in (PRETRAINED, RANDOM) for row in _trained_rows(start, files, args))]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.output / "results.json", {"settings": settings, "rows": rows})
    text = "\n".join([*_table(rows), "", *_examples(files["test"], args.output)]) + "\n"
    write_whole(args.output / "results.md", text.encode())
    print(text)


def _lead_rows(files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    sources, targets = (read_lines(files["test"], column) for column in ("src", "tgt"))
    num_words = round(statistics.fmean(len(text.split()) for text in read_lines(files["train"], "tgt")))
    for name, texts in leads(sources, num_words).items():
        yield {"model": name, "scores": text_scores(texts, [[t] for t in targets], ignore_case=True)[0]}


def _trained_rows(start: str, files: dict[str, Path], args: Any) -> Iterator[dict[str, Any]]:
    for seed in range(args.seeds):
        run = args.output / f"{start}-{seed}"
        weights = (
            args.weights if start == PRETRAINED else random_twin(args.weights, args.output / "twins" / str(seed), seed)
        )
        task = Seq2SeqSettings(args.max_source_tokens, args.max_target_tokens)
        summary = train(
            StartSettings(weights, run, max_length_tokens=task.max_positions),
            TrainSettings(learning_rate=args.learning_rate, epochs=args.epochs, seed=seed, micro_batch_size=32),
            task, TargetSettings(target_mask_prob=args.target_mask_prob), ValidationSettings(generated_pairs=0),
            files["train"], files["validation"],
        )  # fmt: skip
        written = run / "test.jsonl"
        write_file(run, Writer.load(run), files["test"], "src", written, batch_size=32)
        result = score_files(
            written, [files["test"]], prediction_column="text", reference_column="tgt", ignore_case=True
        )
        write_json(run / "scores.json", result)
        validation = {name: summary["validation"][name] for name in ("loss", "token_accuracy", "step")}
        yield {"model": start, "seed": seed, "scores": result["scores"], "validation": validation}
        print(f"{start}, seed {seed}: {result['scores']}", file=sys.stderr, flush=True)


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| | ROUGE-1 | ROUGE-2 | ROUGE-L | BLEU | chrF | exact match |"
    yield "|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for score in SCORES:
            values = [row["scores"][score] for row in rows if row["model"] == name]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        yield f"| {name} | {' | '.join(cells)} |"


def _examples(test: Path, output: Path) -> Iterator[str]:
    """What seed 0 wrote: some of the best and of the worst by ROUGE-L, and of both kinds what random weights came to."""
    sources, targets = (read_lines(test, column) for column in ("src", "tgt"))
    written = {start: read_lines(output / f"{start}-0" / "test.jsonl", "text") for start in (PRETRAINED, RANDOM)}
    scores = [rouge_scores([a], [[b]])[0]["rouge_l"] for a, b in zip(written[PRETRAINED], targets, strict=True)]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    inexact = [i for i in order if written[PRETRAINED][i].lower() != targets[i].lower()]
    for title, places in (("Good", inexact[:_NUM_EXAMPLES]), ("Bad", order[-_NUM_EXAMPLES:])):
        yield f"{title}:\n"
        yield "| source | reference | pre-trained | random |"
        yield "|---|---|---|---|"
        for i in places:
            texts = (f"{sources[i][:200]} ...", targets[i], written[PRETRAINED][i], written[RANDOM][i])
            yield "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in texts) + " |"
        yield ""


if __name__ == "__main__":
    sys.exit(main())
