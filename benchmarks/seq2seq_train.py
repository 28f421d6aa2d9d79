"""python -m benchmarks.seq2seq_train: what a step of sequence-to-sequence fine-tuning costs, against the dense-mask way.

Forward and backward of models of base width on the same micro batches of real pairs, in one process on the same threads. They
take turns, and the ratio of the medians is the figure:

  ours           this project's: no padding, no mask, the last layer and the head at the pseudo masks alone
  dense          the same weights and slots the plain way (benchmarks/train_step.py): samples padded to the longest, one S x S
                 mask, one-hot relative bias, torch's dropout, all slots through all layers and the head
  dense, head on targets   the same with the head at the pseudo masks alone

Pairs are those of --pairs (JSON lines with src and tgt); by default long paragraphs of the sample corpus and their first sentences.
Writes seq2seq_train.json.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.text import make_tokenizer
from benchmarks.train_step import Step, dense_step, interleaved_seconds
from data_prep.console import ArgumentParser, progress_bar, run_command
from data_prep.corpus import find_sources, read_documents
from data_prep.files import write_whole
from data_prep.tokenizer import Tokenizer
from finetune.batches import epoch_order, micro_batches
from finetune.seq2seq_data import Examples, Pair, PairColumns, Pairs, Seq2SeqSettings, make_examples, read_pairs
from finetune.seq2seq_model import Seq2SeqModel
from pretrain.layout import Layout
from pretrain.model import PMLM, PMLMConfig

OURS, DENSE, DENSE_TARGETS = "ours", "dense", "dense, head on targets"
_MIN_WORDS, _MAX_WORDS = 60, 400
_VOCAB_SIZE = 30_522


@dataclass(frozen=True)
class Setting:
    """What is measured at."""

    num_layers: int
    num_samples: int
    micro_batch_size: int
    dropout: float
    vocab_size: int = _VOCAB_SIZE


def sample_pairs(corpus: Path) -> Pairs:
    """Paragraphs, and their first sentences."""
    paragraphs = [line for document in read_documents(find_sources([corpus])) for line in document.lines]
    long = [text for text in paragraphs if _MIN_WORDS <= len(text.split()) <= _MAX_WORDS]
    targets = [re.split(r"(?<=[.!?;])\s+", text)[0] for text in long]
    pairs = [Pair(lambda: str(corpus), (text,), target) for text, target in zip(long, targets, strict=True)]
    return Pairs(corpus, lambda: pairs, lambda: "")


def make_layouts(examples: Examples, setting: Setting, mask_id: int) -> list[Layout]:
    """A batch's micro batches, as training makes them."""
    batch = epoch_order(0, 0, len(examples.sources))[: setting.num_samples]
    return [
        examples.layout(samples.tolist(), mask_id)
        for samples in micro_batches(batch, examples.lengths, setting.micro_batch_size)
    ]


def make_steps(setting: Setting, layouts: Sequence[Layout]) -> dict[str, Step]:
    """Each way; a step gives the loss of the batch's target tokens, the mean over its micro batches."""
    config = PMLMConfig(
        setting.vocab_size, setting.num_layers, dropout=setting.dropout,
        max_positions=max(int(layout.positions_N.max()) for layout in layouts) + 1,
    )  # fmt: skip

    def model() -> PMLM:
        torch.manual_seed(0)
        return PMLM(config).train()

    ours, dense, on_targets = Seq2SeqModel(model()), model(), model()

    def our_step() -> float:
        total = 0.0
        for layout in layouts:
            loss = ours.target_losses(layout)[0].sum() / layout.num_targets
            loss.backward()
            total += loss.item()
        ours.zero_grad()
        return total / len(layouts)

    def of(parts: Sequence[Step]) -> Step:
        return lambda: statistics.fmean(part() for part in parts)

    return {
        OURS: our_step,
        DENSE: of([dense_step(dense, layout) for layout in layouts]),
        DENSE_TARGETS: of([dense_step(on_targets, layout, is_head_on_targets=True) for layout in layouts]),
    }


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.seq2seq_train", description=__doc__)
    parser.add_argument("--pairs", type=Path, metavar="PATH", help="JSON lines with src and tgt")
    parser.add_argument("--corpus", type=Path, default=Path("sample_corpus"),
                        help="text whose paragraphs are the pairs, and which the tokenizer is trained on")  # fmt: skip
    parser.add_argument("--max_source_tokens", type=int, default=464, help="longer sources are cut")
    parser.add_argument("--max_target_tokens", type=int, default=64, help="longer targets are cut")
    parser.add_argument("--num_layers", type=int, default=2, help="of the models, which are of base width")
    parser.add_argument("--num_samples", type=int, default=16, help="pairs of a step")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="pairs computed at once")
    parser.add_argument("--dropout", type=float, default=0.1, help="of all models")
    parser.add_argument("--repetitions", type=int, default=5, help="steps measured of each")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    setting = Setting(args.num_layers, args.num_samples, args.micro_batch_size, args.dropout)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer([args.corpus], Path(folder) / "tokenizer.model", 8000)
        pairs = sample_pairs(args.corpus) if args.pairs is None else read_pairs(args.pairs, PairColumns())
        result = measure(pairs, tokenizer, setting, args)
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "seq2seq_train.json", json.dumps(result, indent=1).encode())
    for name, rate in result["examples_per_s"].items():
        print(f"{name:24} {rate:7.2f} examples/s   {OURS}: {result['ratios'][name]:.2f} x")


def measure(pairs: Pairs, tokenizer: Tokenizer, setting: Setting, args: Any) -> dict[str, Any]:
    """What is written."""
    limits = Seq2SeqSettings(args.max_source_tokens, args.max_target_tokens)
    examples = make_examples(tokenizer, pairs, limits)
    layouts = make_layouts(examples, setting, tokenizer.mask_id)
    steps = make_steps(setting, layouts)
    with progress_bar("measure", len(steps) * (args.repetitions + 1), "step") as bar:
        seconds = interleaved_seconds(steps, args.repetitions, bar.update)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_samples = sum(layout.num_samples for layout in layouts)
    return {
        "setting": vars(setting) | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "source_tokens": [length for layout in layouts for length in layout.context_lengths],
        "target_tokens": sum(layout.num_targets for layout in layouts),
        "seconds": seconds,
        "examples_per_s": {name: num_samples / value for name, value in medians.items()},
        "ratios": {name: value / medians[OURS] for name, value in medians.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
