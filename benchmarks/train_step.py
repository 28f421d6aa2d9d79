"""python -m benchmarks.train_step: what a training step costs, and what PAR costs on top of AE.

Forward and backward of models of base width on the same real text, in one process on the same threads. They take
turns, and ratios of medians are the figures:

  AE+PAR         this project's PMLM
  BERT           transformers' BertForMaskedLM with SDPA attention, AE only, of the same size
  dense          the same PMLM inputs the plain way: one S x S mask, one-hot relative bias, torch's dropout, head on every slot
  AE, then PAR   the two objectives in two passes
  compiled       AE+PAR with its layers compiled (--compile)

Utilisation is the step's needed operations in its time against matrix products of the model's shapes in theirs. Memory,
at the longest length, is the growth of a fresh process, model and gradients included. Writes train_step.json and train_step.png.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import bert_config
from benchmarks.text import Text
from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.files import write_whole
from data_prep.shards import SampleBatch
from pretrain.attention import RelativePositionBias, relative_position_bucket
from pretrain.device import speeds
from pretrain.dropout import Dropout
from pretrain.flops import step_flops
from pretrain.layout import PADDING_TURN, Layout, Objective, pseudo_masked_layout, visible
from pretrain.model import PMLM, PMLMConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS, BERT, DENSE, SEPARATE, COMPILED = "AE+PAR", "BERT", "dense", "AE, then PAR", "compiled"
Step = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """What a table row is measured at."""

    num_layers: int
    length_tokens: int
    num_samples: int
    precision: str
    dropout: float
    vocab_size: int

    @property
    def config(self) -> PMLMConfig:
        """Base, but for the number of layers."""
        return PMLMConfig(
            self.vocab_size, self.num_layers, max_positions=max(512, self.length_tokens), dropout=self.dropout
        )

    def __str__(self) -> str:
        return f"{self.num_layers} layers, {self.num_samples} x {self.length_tokens} tokens, {self.precision}, dropout {self.dropout}"


# ---- the models


def pmlm_step(model: PMLM, *layouts: Layout) -> Step:
    """Forward and backward of a PMLM, each layout in a pass of its own; gives the loss per target."""

    def step() -> float:
        total = 0.0
        for layout in layouts:
            losses = model(layout)
            loss = (losses.ae_sum + losses.par_sum) / layout.num_targets
            loss.backward()
            total += float(loss.detach())
        model.zero_grad()
        return total

    return step


def bert_step(config: PMLMConfig, dtype: torch.dtype, layout: Layout) -> Step:
    """Forward and backward of BertForMaskedLM on the context and targets of an AE layout."""
    model = transformers.BertForMaskedLM(bert_config(config)).to(dtype).train()
    ids_BS, segments_BS = padded(layout, layout.ids_N), padded(layout, layout.segments_N)
    attention_mask, labels_BS = padded(layout, torch.ones_like(layout.ids_N)), padded(layout, labels_of(layout), -100)

    def step() -> float:
        loss = model(ids_BS, attention_mask, segments_BS, labels=labels_BS).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return step


def labels_of(layout: Layout) -> torch.Tensor:
    """What each slot is to predict, -100 for nothing."""
    labels_N = torch.full_like(layout.ids_N, -100)
    for places_T in (layout.ae_places_T, layout.par_places_T):
        if places_T is not None:
            labels_N[layout.predicted_R[places_T]] = layout.targets_T
    return labels_N


def padded(layout: Layout, of_slots: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """[N] to [B, S]."""
    of_samples = [of_slots[start:stop] for start, stop in pairwise(layout.edges)]
    return nn.utils.rnn.pad_sequence(of_samples, batch_first=True, padding_value=padding)


class DenseAttention:
    """A mask and a bias for every pair of slots, the bias from one-hot buckets."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias, dropout: float) -> None:
        roles_BS, turns_BS = padded(layout, layout.roles_N), padded(layout, layout.turns_N, PADDING_TURN)
        positions_BS = padded(layout, layout.positions_N)
        is_seen_BSS = visible(roles_BS[:, :, None], turns_BS[:, :, None], roles_BS[:, None, :], turns_BS[:, None, :])
        weight = relative_bias.weight
        self._mask_B1SS = torch.where(is_seen_BSS, 0.0, -10000.0).to(weight.dtype)[:, None]
        buckets_BSS = relative_position_bucket(
            positions_BS[:, None, :] - positions_BS[:, :, None], weight.shape[1], relative_bias.max_distance
        )
        one_hot = F.one_hot(buckets_BSS, weight.shape[1]).to(weight.dtype)
        self._bias_BHSS = F.linear(one_hot, weight).permute(0, 3, 1, 2)
        self._dropout = dropout

    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See pretrain.attention.Attention; the slots are padded ones."""
        qkv_BS3HD = qkv_N3HD.view(len(self._mask_B1SS), -1, *qkv_N3HD.shape[1:])
        queries, keys, values = qkv_BS3HD.transpose(1, 3).unbind(2)
        scores = queries @ keys.mT / queries.shape[-1] ** 0.5 + self._mask_B1SS + self._bias_BHSS
        attended = F.dropout(scores.softmax(dim=-1), self._dropout) @ values
        return attended.transpose(1, 2).flatten(0, 1)


def dense_step(model: PMLM, layout: Layout, *, is_head_on_targets: bool = False) -> Step:
    """Forward and backward of a PMLM's weights the plain way; the head on all slots, or where something is predicted."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, nn.Dropout(child.rate))
    labels = padded(layout, labels_of(layout), -100).flatten()
    with_padding = replace(
        layout, ids_N=padded(layout, layout.ids_N).flatten(), positions_N=padded(layout, layout.positions_N).flatten(),
        segments_N=padded(layout, layout.segments_N).flatten(),
    )  # fmt: skip
    encoder = model.bert.encoder
    assert encoder.rel_pos_bias is not None

    def step() -> float:
        hidden = model.bert.embeddings(with_padding)
        attention = DenseAttention(layout, encoder.rel_pos_bias, model.config.dropout)  # type: ignore[arg-type]
        for layer in encoder.layer:
            hidden = layer(hidden, attention, None)
        at = labels >= 0 if is_head_on_targets else slice(None)
        loss = F.cross_entropy(model.predict(hidden[at]).float(), labels[at], reduction="sum") / layout.num_targets
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return step


def make_step(name: str, setting: Setting, batch: SampleBatch, mask_id: int) -> Step:
    """One of the ways to compute a step, its model made."""
    config, dtype = setting.config, _DTYPES[setting.precision]
    layouts = {
        o: pseudo_masked_layout(batch, o, mask_id=mask_id) for o in (Objective.AE, Objective.PAR, Objective.AE_PAR)
    }
    if name == BERT:
        return bert_step(config, dtype, layouts[Objective.AE])
    torch.manual_seed(0)
    model = PMLM(config).to(dtype).train()
    if name == DENSE:
        return dense_step(model, layouts[Objective.AE_PAR])
    if name == SEPARATE:
        return pmlm_step(model, layouts[Objective.AE], layouts[Objective.PAR])
    if name == COMPILED:
        model.compile_layers()
    return pmlm_step(model, layouts[Objective.AE_PAR])


# ---- measuring


def interleaved_seconds(steps: dict[str, Step], repetitions: int, advance: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each step, all of them taking turns; one round to warm up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
            advance()
    return seconds


def matmul_flops_per_s(setting: Setting, num_slots: int, repetitions: int) -> float:
    """The rate of the products that the layers' weights take part in: forward, and both of the backward pass."""
    config, dtype = setting.config, _DTYPES[setting.precision]
    hidden, slots = config.hidden_size, num_slots
    seconds, operations = 0.0, 0
    for size_out, size_in in (
        (3 * hidden, hidden),
        (hidden, hidden),
        (config.intermediate_size, hidden),
        (hidden, config.intermediate_size),
    ):
        x, w, y = (torch.randn(shape).to(dtype) for shape in ((slots, size_in), (size_out, size_in), (slots, size_out)))
        for a, b in ((x, w.mT), (y, w), (y.mT, x)):
            times = interleaved_seconds({"": partial(_product, a, b)}, repetitions, lambda: None)[""]
            seconds += statistics.median(times)
            operations += 2 * slots * size_in * size_out
    return operations / seconds


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b)[0, 0])


def peak_memory_bytes(name: str, setting: Setting, batch: SampleBatch, mask_id: int) -> int:
    """By how much two steps make a fresh process grow at most, the model included."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_growth_bytes, name, setting, batch, mask_id, torch.get_num_threads()).result()


def _growth_bytes(name: str, setting: Setting, batch: SampleBatch, mask_id: int, num_threads: int) -> int:
    _prepare(num_threads)
    before = _memory_bytes("VmRSS")
    step = make_step(name, setting, batch, mask_id)
    step()
    step()
    return _memory_bytes("VmHWM") - before


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _prepare(num_threads: int) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(num_threads)


# ---- the program


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("sample_corpus"), help="text to take the samples from")
    parser.add_argument("--num_layers", type=int, nargs="+", default=[4, 12], help="layers of base width (768)")
    parser.add_argument("--length_tokens", type=int, nargs="+", default=[128, 512], help="tokens of a sample")
    parser.add_argument("--batch_tokens", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--precision", choices=_DTYPES, nargs="+", help="default: fp32, and bf16 where the CPU has it")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="of all models")
    parser.add_argument("--vocab_size", type=int, default=30_522, help="of all models; the tokenizer has fewer entries")
    parser.add_argument("--sweep_tokens", type=int, nargs="*", default=[128, 256, 512, 1024, 2048],
                        help="lengths for the curve of time against length")  # fmt: skip
    parser.add_argument("--sweep_samples", type=int, nargs="*", default=[1, 2, 4, 8],
                        help="micro batches for the curve of memory against micro batch")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="measure AE+PAR compiled as well")
    parser.add_argument("--repetitions", type=int, default=3, help="steps measured of each")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and PNG")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    _prepare(torch.get_num_threads())
    precisions = args.precision or [name for name in ("fp32", "bf16") if name in speeds().precisions]
    names = [OURS, BERT, DENSE, SEPARATE, *([COMPILED] if args.compile else [])]
    settings = [
        Setting(layers, length, max(1, args.batch_tokens // length), precision, dropout, args.vocab_size)
        for layers in args.num_layers for length in args.length_tokens for precision in precisions for dropout in args.dropout
    ]  # fmt: skip
    first = settings[0]
    of_length = [
        replace(first, length_tokens=length, num_samples=max(1, args.batch_tokens // length), dropout=args.dropout[-1])
        for length in args.sweep_tokens
    ]
    of_batch = [
        replace(first, length_tokens=args.length_tokens[-1], num_samples=number, dropout=0.0)
        for number in args.sweep_samples
    ]
    rounds = args.repetitions + 1
    with_memory = [s for s in settings if s.length_tokens == max(args.length_tokens)]
    total = (len(settings) * rounds + len(with_memory)) * len(names) + len(of_length) * 2 * rounds + len(of_batch) * 2
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        text = Text(args.corpus, Path(folder))
        with progress_bar("measure", total, "step") as bar:
            rows = []
            for setting in settings:
                row = _measure(setting, names, text, args.repetitions, bar.update)
                memory_of = names if setting in with_memory else []
                rows.append(row | {"peak_memory_bytes": _memory(setting, memory_of, text, bar.update)})
            lengths = [
                {"setting": asdict(s), "medians": _medians(s, (OURS, BERT), text, args.repetitions, bar.update)}
                for s in of_length
            ]
            of_micro_batch = [
                {"setting": asdict(s), "bytes": _memory(s, (OURS, BERT), text, bar.update)} for s in of_batch
            ]
    result = {
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": available_cores()},
        "rows": rows, "time_against_length": lengths, "memory_against_micro_batch": of_micro_batch,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "train_step.json", json.dumps(result, indent=1).encode())
    _draw(result, args.output / "train_step.png")
    print("\n".join(_table(rows)))
    print(f"written: {args.output / 'train_step.json'}, {args.output / 'train_step.png'}")


def _medians(setting: Setting, names: Iterable[str], text: Text, repetitions: int, advance: Any) -> dict[str, float]:
    seconds = _seconds(setting, names, text, repetitions, advance)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(
    setting: Setting, names: Iterable[str], text: Text, repetitions: int, advance: Any
) -> dict[str, list[float]]:
    batch = text.batch(setting.length_tokens, setting.num_samples)
    steps = {name: make_step(name, setting, batch, text.mask_id) for name in names}
    seconds = interleaved_seconds(steps, repetitions, advance)
    del steps
    gc.collect()
    return seconds


def _memory(setting: Setting, names: Iterable[str], text: Text, advance: Any) -> dict[str, int]:
    batch, found = text.batch(setting.length_tokens, setting.num_samples), {}
    for name in names:
        found[name] = peak_memory_bytes(name, setting, batch, text.mask_id)
        advance()
    return found


def _measure(setting: Setting, names: list[str], text: Text, repetitions: int, advance: Any) -> dict[str, Any]:
    seconds = _seconds(setting, names, text, repetitions, advance)
    batch = text.batch(setting.length_tokens, setting.num_samples)
    layout = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=text.mask_id)
    needed = step_flops(setting.config, layout).needed
    rate = matmul_flops_per_s(setting, len(layout.ids_N), repetitions)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "setting": asdict(setting), "title": str(setting), "seconds": seconds, "medians": medians,
        "ratios": {name: medians[OURS] / medians[name] for name in names if name != OURS},
        "needed_flops": needed, "matmul_flops_per_s": rate, "utilisation": needed / medians[OURS] / rate,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        yield (
            f"\n{row['title']}: matmul {row['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s, utilisation of {OURS} {row['utilisation']:.0%}"
        )
        for name, values in row["seconds"].items():
            line = (
                f"  {name:13} {row['medians'][name]:8.3f} s ({min(values):.3f} to {max(values):.3f})   {OURS} is "
                f"{row['ratios'].get(name, 1):5.2f} x"
            )
            if name in row["peak_memory_bytes"]:
                line += f"   peak memory {row['peak_memory_bytes'][name] / 2**20:7,.0f} MB"
            yield line


def _draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    ratios, lengths, memory = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    rows = result["rows"]
    others = list(rows[0]["ratios"])
    for place, name in enumerate(others):
        places = [i + (place - len(others) / 2) * 0.8 / len(others) for i in range(len(rows))]
        ratios.barh(places, [row["ratios"][name] for row in rows], height=0.8 / len(others), label=name)
    ratios.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=7)
    ratios.axvline(1, color="black", linewidth=1)
    ratios.set(title=f"Time of {OURS} against others", xlabel="ratio of medians")
    ratios.legend()
    for name in (OURS, BERT):
        measured = result["time_against_length"]
        lengths.plot(
            [m["setting"]["length_tokens"] for m in measured],
            [m["medians"][name] / m["setting"]["num_samples"] / m["setting"]["length_tokens"] * 1e3 for m in measured],
            marker="o", label=name,
        )  # fmt: skip
        measured = result["memory_against_micro_batch"]
        memory.plot(
            [m["setting"]["num_samples"] for m in measured],
            [m["bytes"][name] / 2**20 for m in measured],
            marker="o",
            label=name,
        )
    lengths.set(title="Time against length", xlabel="tokens of a sample", ylabel="ms per token", xscale="log")
    memory.set(title="Memory against micro batch", xlabel="samples", ylabel="peak, MB")
    tokens = [m["setting"]["length_tokens"] for m in result["time_against_length"]]
    lengths.set_xticks(tokens, [str(t) for t in tokens])
    lengths.minorticks_off()
    for axes in (lengths, memory):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
