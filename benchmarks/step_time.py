"""python -m benchmarks.step_time: what PAR costs on top of AE.

Times a training step (forward and backward) of the PMLM with AE+PAR against transformers' BertForMaskedLM, AE only, of
the same size, on the same text, in one process: the two take turns, and the ratio of their medians is the figure.
The PMLM with AE alone is measured as well. Prints a table; --output writes the figures as JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from data_prep.build import build
from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.corpus import find_sources, read_documents
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.shards import DataSet, SampleBatch
from data_prep.tokenizer import train_tokenizer
from pretrain.layout import Layout, Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

_VOCAB_SIZE = 8000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def full_length_batch(corpus: Path, max_length_tokens: int, num_samples: int) -> tuple[SampleBatch, int]:
    """Samples of real text, as long as they come, and the mask id."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (line for document in read_documents(find_sources([corpus])) for line in document.lines)
        tokenizer = train_tokenizer(lines, folder / "tokenizer.model", vocab_size=_VOCAB_SIZE)
        with LocalProcesses(available_cores()) as processes:
            build([Corpus([corpus])], tokenizer.path, folder / "data", BuildParameters(max_length_tokens), processes)
        data = DataSet(folder / "data")
        batch = data.read_samples("train", 0, data.num_samples("train")).as_int64()
        data.close()
    longest = batch.length_B.argsort()[::-1][:num_samples]
    return batch[longest], tokenizer.mask_id


def make_bert(config: PMLMConfig) -> Any:
    """transformers' BERT of the same size, with its SDPA attention."""
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions, hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout, attn_implementation="sdpa",
        )
    )  # fmt: skip


def pmlm_step(model: PMLM, layout: Layout) -> Callable[[], None]:
    """Forward and backward of a PMLM."""

    def step() -> None:
        losses = model(layout)
        ((losses.ae_sum + losses.par_sum) / layout.num_targets).backward()
        model.zero_grad()

    return step


def bert_step(model: Any, layout: Layout) -> Callable[[], None]:
    """Forward and backward of BertForMaskedLM on the same context and targets."""
    assert layout.ae_slots_T is not None
    labels = torch.full_like(layout.ids_BS, -100)
    labels.view(-1)[layout.ae_slots_T] = layout.targets_T
    attention_mask = (layout.turns_BS == 0).long()

    def step() -> None:
        model(layout.ids_BS, attention_mask, layout.segments_BS, labels=labels).loss.backward()
        model.zero_grad()

    return step


def measure(steps: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each step, all of them taking turns; one round to warm up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with progress_bar("measure", (repetitions + 1) * len(steps), "step") as bar:
        for repetition in range(repetitions + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if repetition:
                    seconds[name].append(time.perf_counter() - started)
                bar.update()
    return seconds


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("sample_corpus"), help="text to take the samples from")
    parser.add_argument("--num_layers", type=int, default=4, help="layers of base width (768)")
    parser.add_argument("--max_length_tokens", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--precision", choices=_DTYPES, default="fp32", help="of weights and activations")
    parser.add_argument("--dropout", type=float, default=0.0, help="of both models")
    parser.add_argument("--repetitions", type=int, default=7, help="steps measured of each")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.manual_seed(0)
    batch, mask_id = full_length_batch(args.corpus, args.max_length_tokens, args.batch)
    config = PMLMConfig(
        vocab_size=_VOCAB_SIZE, num_layers=args.num_layers, max_positions=args.max_length_tokens, dropout=args.dropout
    )
    dtype = _DTYPES[args.precision]
    both = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=mask_id)
    ae_only = pseudo_masked_layout(batch, Objective.AE, mask_id=mask_id)
    pmlm, bert = PMLM(config).to(dtype).train(), make_bert(config).to(dtype).train()
    bert_name = "BertForMaskedLM AE"
    seconds = measure(
        {
            "PMLM AE+PAR": pmlm_step(pmlm, both), "PMLM AE": pmlm_step(pmlm, ae_only), bert_name: bert_step(bert, ae_only),
        },
        args.repetitions,
    )  # fmt: skip
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{args.num_layers} layers of base width, {batch.tokens_BL.shape} tokens, {args.precision}, dropout {args.dropout}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    )
    for name, values in seconds.items():
        print(
            f"{name:20} median {medians[name]:.3f} s  (min {min(values):.3f}, max {max(values):.3f})  "
            f"{medians[name] / medians[bert_name]:.2f} x {bert_name}"
        )
    if args.output:
        result = {"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds, "medians": medians}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
