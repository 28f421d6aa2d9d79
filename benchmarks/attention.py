"""python -m benchmarks.attention: what attention alone and dropout alone cost, by backend.

Forward and backward of one layer's attention over a batch of real text, `cpu` against `reference`, in turns; then
dropout of as many elements as a layer of base has, torch's against this project's. Medians; writes attention.json.
`--attention auto` (pretrain/attention.py) follows the first table.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.text import Text
from benchmarks.train_step import Step, interleaved_seconds
from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.files import write_whole
from pretrain.attention import AttentionBackend, RelativePositionBias, make_attention
from pretrain.dropout import dropout
from pretrain.layout import Layout, Objective, pseudo_masked_layout

_BACKENDS: tuple[AttentionBackend, ...] = ("cpu", "reference")
_ELEMENTS = 3 << 20


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("sample_corpus"), help="text to take the samples from")
    parser.add_argument("--num_heads", type=int, nargs="+", default=[2, 6, 12], help="heads of 64 numbers")
    parser.add_argument("--length_tokens", type=int, nargs="+", default=[128, 256, 512], help="tokens of a sample")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--dropout", type=float, default=0.1, help="on attention's probabilities")
    parser.add_argument("--repetitions", type=int, default=7, help="steps measured of each")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    rows: list[dict[str, Any]] = []
    rounds = args.repetitions + 1
    total = rounds * (len(args.length_tokens) * len(args.num_heads) * len(_BACKENDS) + 4)
    with tempfile.TemporaryDirectory() as folder, progress_bar("measure", total, "step") as bar:
        text = Text(args.corpus, Path(folder))
        for length in args.length_tokens:
            batch = text.batch(length, max(1, args.batch_tokens // length))
            layout = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=text.mask_id)
            for heads in args.num_heads:
                steps = {b: _attention_step(b, layout, heads, args.dropout) for b in _BACKENDS}
                medians = _medians(steps, args.repetitions, bar.update)
                rows.append({"heads": heads, "slots": layout.longest, "medians": medians})
        drops: dict[str, dict[str, float]] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x = torch.randn(_ELEMENTS).to(dtype)
            ways: dict[str, Step] = {"torch": partial(_drop, F.dropout, x), "here": partial(_drop, dropout, x)}
            drops[name] = _medians(ways, args.repetitions, bar.update)
    for row in rows:
        ratio = row["medians"]["cpu"] / row["medians"]["reference"]
        print(f"attention, {row['heads']:2} heads x {row['slots']}^2 slots: cpu is {ratio:.2f} x of reference")
    for name, medians in drops.items():
        here, theirs = (medians[way] * 1e3 for way in ("here", "torch"))
        print(f"dropout of {_ELEMENTS / 1e6:.1f} million elements, {name}: {here:.1f} ms, torch's {theirs:.1f} ms")
    args.output.mkdir(parents=True, exist_ok=True)
    result = {"threads": torch.get_num_threads(), "cores": available_cores(), "attention": rows, "dropout": drops}
    write_whole(args.output / "attention.json", json.dumps(result, indent=1).encode())


def _medians(steps: dict[Any, Step], repetitions: int, advance: Any) -> dict[str, float]:
    seconds = interleaved_seconds(steps, repetitions, advance)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _attention_step(backend: AttentionBackend, layout: Layout, num_heads: int, rate: float) -> Step:
    relative_bias = RelativePositionBias(num_heads, 32, 128)
    torch.nn.init.normal_(relative_bias.weight)
    qkv_N3HD = torch.randn(len(layout.ids_N), 3, num_heads, 64, requires_grad=True)

    def step() -> float:
        attended = make_attention(backend, layout, relative_bias, rate)(qkv_N3HD)
        attended.backward(torch.ones_like(attended))
        return 0.0

    return step


def _drop(drop: Any, x: torch.Tensor) -> float:
    drop(x, 0.1)
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
