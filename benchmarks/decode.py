"""python -m benchmarks.decode: what a target token costs, and what remembering keys and values saves.

In one process on the same threads, random weights, forced equal lengths, in turns:

  ours        finetune/search.py: a PMLM of base width
  BART        transformers' BartForConditionalGeneration of equal width, heads and feed-forward, with as many layers in its
              encoder and its decoder as ours has, its own generate and its own cache
  no cache    our search, every step computing source and target anew for each beam (smaller, as it takes long)

Seconds are CPU seconds, user and system of all threads, as other work on the machine does not count then; with OMP_NUM_THREADS=1, as
threads that wait for each other spend CPU seconds. Then the time of each step of one long target. Writes decode.json and decode.png.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.files import write_whole
from finetune.search import Search
from finetune.search_settings import Rules, SearchSettings
from pretrain.layout import PSEUDO, Layout, seq2seq_layout
from pretrain.model import PMLM, PMLMConfig

OURS, BART, NO_CACHE = "ours", "BART", "no cache"
_RULES = Rules(eos_id=3, mask_id=4, never=(0, 2, 4))
_VOCAB_SIZE = 30522


@dataclass(frozen=True)
class Setting:
    """What a table row is measured at."""

    num_layers: int
    num_sources: int
    num_beams: int
    source_tokens: int
    target_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, {self.num_sources} sources of {self.source_tokens} tokens, {self.num_beams} beams, "
            f"{self.target_tokens} target tokens"
        )

    @property
    def search(self) -> SearchSettings:
        """Nothing ends before the last token."""
        return SearchSettings(
            num_beams=self.num_beams, max_length_tokens=self.target_tokens, min_length_tokens=self.target_tokens - 1
        )

    def sources(self) -> list[list[int]]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(0)
        shape = self.num_sources, self.source_tokens
        return torch.randint(5, _VOCAB_SIZE, shape, generator=generator).tolist()  # type: ignore[no-any-return]


def cpu_seconds() -> float:
    """Of this process, all its threads."""
    spent = os.times()
    return spent.user + spent.system


class _Recomputing(Search):
    """The same search with nothing remembered: for each beam the source, its originals and one pseudo mask."""

    def _logits(self) -> torch.Tensor:
        sources = self._memory._sources
        history = self._tokens_BKT.tolist()
        ids = [source for source, beams in zip(sources, history, strict=True) for _ in beams]
        targets = [[*beam, _RULES.mask_id] for beams in history for beam in beams]
        layout = _last_pseudo_alone(seq2seq_layout(ids, targets, mask_id=_RULES.mask_id))
        return self._model.predict(self._model.encode_predicted(layout))

    def _go_on(self, tokens_BK: torch.Tensor, parents_BK: torch.Tensor, totals_BK: torch.Tensor) -> None:
        self._memory.descend = lambda parents_BK: None  # type: ignore[method-assign]
        super()._go_on(tokens_BK, parents_BK, totals_BK)


def _last_pseudo_alone(layout: Layout) -> Layout:
    """Without the pseudo masks of the tokens that are there already."""
    is_last_N = torch.ones(len(layout.ids_N), dtype=torch.bool)
    is_last_N[:-1] = layout.samples_N[:-1] != layout.samples_N[1:]
    kept = (layout.roles_N != PSEUDO) | is_last_N
    tensors = {
        f"{name}_N": getattr(layout, f"{name}_N")[kept]
        for name in ("ids", "positions", "segments", "roles", "turns", "samples")
    }
    edges = (0, *torch.bincount(tensors["samples_N"]).cumsum(0).tolist())
    return Layout(
        **tensors, edges=edges, context_lengths=layout.context_lengths, num_tokens=layout.num_tokens,
        predicted_R=torch.tensor(edges[1:]) - 1, predicted_edges=tuple(range(len(edges))), targets_T=layout.targets_T[:0],
        ae_places_T=None, par_places_T=None,
    )  # fmt: skip


def make_ours(setting: Setting) -> PMLM:
    """Random, the same each time."""
    torch.manual_seed(0)
    positions = max(512, setting.source_tokens + setting.target_tokens)
    return PMLM(PMLMConfig(_VOCAB_SIZE, setting.num_layers, max_positions=positions)).eval()


def make_bart(setting: Setting) -> Any:
    """BART of the same numbers."""
    ours = PMLMConfig(_VOCAB_SIZE, setting.num_layers)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=_VOCAB_SIZE, d_model=ours.hidden_size, activation_function="gelu",
        encoder_layers=ours.num_layers, decoder_layers=ours.num_layers,
        encoder_attention_heads=ours.num_heads, decoder_attention_heads=ours.num_heads,
        encoder_ffn_dim=ours.intermediate_size, decoder_ffn_dim=ours.intermediate_size,
        max_position_embeddings=max(512, setting.source_tokens + setting.target_tokens),
    )).eval()  # fmt: skip


def search_steps(search_class: type[Search], model: PMLM, setting: Setting) -> list[float]:
    """CPU seconds from the beginning to each step's end."""
    begun, ends = cpu_seconds(), []
    search = search_class(model, _RULES, setting.sources(), setting.search, range(setting.num_sources))
    while not search.is_done:
        search.step()
        ends.append(cpu_seconds() - begun)
    assert len(ends) == setting.target_tokens
    return ends


def bart_steps(model: Any, setting: Setting) -> list[float]:
    """The same of transformers' generate."""
    ids = torch.tensor(setting.sources())
    begun, ends = cpu_seconds(), []

    def note(_: torch.Tensor, scores: torch.Tensor, **others: Any) -> torch.Tensor:
        ends.append(cpu_seconds() - begun)
        return torch.zeros(len(_), dtype=torch.bool)

    with torch.inference_mode():
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=setting.num_beams, do_sample=False, length_penalty=1.0,
            early_stopping="never", min_new_tokens=setting.target_tokens, max_new_tokens=setting.target_tokens, use_cache=True,
            stopping_criteria=transformers.StoppingCriteriaList([note]),
        )  # fmt: skip
    assert written.shape[1] == setting.target_tokens + 1
    ends[-1] = cpu_seconds() - begun
    return ends


def measure(setting: Setting, ways: dict[str, Callable[[], list[float]]], repetitions: int, bar: Any) -> dict[str, Any]:
    """The ways in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in [*ways] * repetitions:
        bar.set_postfix_str(way)
        seconds[way].append(ways[way]()[-1])
        bar.update()
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    num_tokens = setting.num_sources * setting.target_tokens
    return {
        "setting": asdict(setting), "title": str(setting), "cpu_seconds": seconds, "medians": medians,
        "tokens_per_cpu_second": {way: num_tokens / median for way, median in medians.items()},
        "ratios": {way: median / medians[OURS] for way, median in medians.items() if way != OURS},
    }  # fmt: skip


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--num_layers", type=int, default=6, help="Transformer layers")
    parser.add_argument("--num_sources", type=int, default=8, help="sources computed at once")
    parser.add_argument("--target_tokens", type=int, default=32, help="tokens written for each source")
    parser.add_argument(
        "--long_target_tokens", type=int, default=256, help="tokens of the target whose steps are plotted"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="runs measured of each")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and figure")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    transformers.logging.set_verbosity_error()
    started = time.monotonic()
    layers, target = args.num_layers, args.target_tokens
    against_bart = [
        Setting(
            layers, args.num_sources, 5, 608, target
        ),  # the paper's sizes for CNN/DailyMail and question generation
        Setting(layers, args.num_sources, 8, 464, target),
        Setting(layers, args.num_sources, 4, 64, target),
        Setting(layers, 1, 1, 256, target),
    ]
    against_no_cache = Setting(layers, 2, 4, 256, target)
    long = Setting(layers, 4, 4, 256, args.long_target_tokens)
    with progress_bar("measure", args.repetitions * (2 * len(against_bart) + 2) + 2, "run") as bar:
        rows = []
        for setting in against_bart:
            ours, bart = make_ours(setting), make_bart(setting)
            rows.append(measure(setting, {
                OURS: lambda m=ours, s=setting: search_steps(Search, m, s), BART: lambda m=bart, s=setting: bart_steps(m, s),  # type: ignore[misc]
            }, args.repetitions, bar))  # fmt: skip
        model = make_ours(against_no_cache)
        rows.append(measure(against_no_cache, {
            OURS: lambda: search_steps(Search, model, against_no_cache), NO_CACHE: lambda: search_steps(_Recomputing, model, against_no_cache),
        }, args.repetitions, bar))  # fmt: skip
        steps = {OURS: search_steps(Search, make_ours(long), long)}
        bar.update()
        steps[BART] = bart_steps(make_bart(long), long)
        bar.update()
    result = {
        "threads": torch.get_num_threads(), "cores": available_cores(), "torch": torch.__version__,
        "transformers": transformers.__version__, "rows": rows, "long": {"title": str(long), "cpu_seconds_to_step": steps},
        "wall_seconds": time.monotonic() - started,
    }  # fmt: skip
    for row in rows:
        print(row["title"])
        for way, median in row["medians"].items():
            print(f"  {way:9} {median:7.2f} CPU s ({min(row['cpu_seconds'][way]):.2f} to {max(row['cpu_seconds'][way]):.2f})   "
                  f"{row['tokens_per_cpu_second'][way]:7.1f} tokens/s   ours is {row['ratios'].get(way, 1):5.2f} x")  # fmt: skip
    quarter = long.target_tokens // 4
    for way, ends in steps.items():
        first, last = (ends[quarter] - ends[0]) / quarter, (ends[-1] - ends[-1 - quarter]) / quarter
        print(f"a step of {long}: {way}: first quarter {first * 1e3:.0f} ms, last {last * 1e3:.0f} ms")
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "decode.json", json.dumps(result, indent=1).encode())
    _draw(result, args.output / "decode.png")


def _draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    ratios, times = figure.subplots(1, 2)
    bars = [(f"{way}: {row['title']}", ratio) for row in result["rows"] for way, ratio in row["ratios"].items()]
    ratios.barh([title for title, _ in bars], [ratio for _, ratio in bars])
    ratios.axvline(1, color="black", linewidth=1)
    ratios.tick_params(axis="y", labelsize=7)
    ratios.set(title="Their CPU time against ours", xlabel="times ours", xscale="log")
    for way, ends in result["long"]["cpu_seconds_to_step"].items():
        width = max(1, len(ends) // 16)
        places = range(width, len(ends), width)
        times.plot(places, [(ends[i] - ends[i - width]) / width * 1e3 for i in places], marker="o", label=way)
    times.set(title=result["long"]["title"], xlabel="target token", ylabel="CPU ms a step")
    times.set_ylim(bottom=0)
    times.title.set_fontsize(9)
    times.grid(alpha=0.3)
    times.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
