"""A run in one page: python -m pretrain.report RUN [RUN ...] [--output FILE.html].

The page needs no network and no other file: losses, accuracies and all that is measured against steps, tokens and hours, what
happened on the way, cloze prompts, settings, code, data and machine. Of several runs the curves lie over each other, and a
table tells how their settings differ. Each chart also goes to a PNG beside the page.
"""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import ArgumentParser, run_command
from data_prep.files import unfinished_file, write_whole
from pretrain.history import Curve, Event, History, filled_text

MAX_RUNS = 8
_MAX_POINTS = 1200  # of a curve; where there are more, least, greatest and median of this many stretches
_STRETCHES = 500
_MAX_EVENTS = 300  # of a run, in the page's list
_MAX_CLOZE = 6  # validations shown
_TEMPLATE = Path(__file__).with_name("report_page.html")
_COLOURS = ("#2563b0", "#c2570c", "#15803d", "#7e3fb5", "#0f766e", "#be185d", "#8a6d00", "#57606a")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_MARKED = ("restart", "rewind", "fault")  # drawn through the charts


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    run: int
    label: str
    """What it is among those of its run."""
    style: str
    """line, faint, points (joined), marks, or extremes (a band around a line)."""
    curve: Curve
    dash: int = 0
    colour: int = 0


@dataclass
class Chart:
    """What is drawn in one frame."""

    name: str
    title: str
    unit: str = ""
    is_log: bool = False
    series: list[Series] = field(default_factory=list)

    def add(self, run: int, label: str, style: str, curve: Curve, dash: int = 0, colour: int | None = None) -> None:
        """A curve without points is left out."""
        if self.is_log:
            above = curve.values_P > 0
            curve = Curve(curve.steps_P[above], curve.hours_P[above], curve.values_P[above])
        colour = run if colour is None else colour
        if len(curve.values_P) > _MAX_POINTS and style in ("line", "faint"):
            self.series.append(Series(run, "", "extremes", curve.extremes(_STRETCHES), 0, colour))
            curve = curve.medians(_STRETCHES)
        elif len(curve.values_P) > _MAX_POINTS:
            curve = curve.extremes(_STRETCHES)
        if len(curve.values_P):
            self.series.append(Series(run, label, style, curve, dash, colour))


def make_charts(histories: list[History]) -> list[Chart]:
    """All charts that there are values for."""
    charts = []
    for name, what in (("loss", "loss"), ("accuracy", "accuracy")):
        for task in ("ae", "par"):
            chart = Chart(f"{task}_{name}", f"{task.upper()} {what}", "nats per masked token" if name == "loss" else "")
            for run, history in enumerate(histories):
                chart.add(run, "training", "faint", history.curve("train", f"{task}_{name}"))
                chart.add(run, "validation", "points", history.curve("validation", f"{task}_{name}"))
            charts.append(chart)
    corpora = list(dict.fromkeys(
        corpus for h in histories for r in h.of_kind("validation") for corpus in r.get("corpora", {})
    ))  # fmt: skip
    for task in ("ae", "par") if corpora else ():
        chart = Chart(f"{task}_loss_by_corpus", f"{task.upper()} validation loss by corpus", "nats per masked token")
        for run, history in enumerate(histories):
            for number, corpus in enumerate(corpora):
                curve = history.curve("validation", "corpora", corpus, f"{task}_loss")
                colour = number % MAX_RUNS if len(histories) == 1 else run
                chart.add(run, corpus, "points", curve, number % len(_DASHES), colour)
        charts.append(chart)
    learning_rate = Chart("learning_rate", "Learning rate")
    gradient_norm = Chart("gradient_norm", "Gradient norm", "before clipping, logarithmic", is_log=True)
    loss_scale = Chart("loss_scale", "Loss scale of fp16", "logarithmic; crosses: skipped steps", is_log=True)
    tokens = Chart("tokens_per_s", "Speed", "tokens of text per second, all ranks")
    utilisation = Chart("utilisation", "Utilisation", "% of the GPUs' peak")
    computing = Chart("tflops", "Computation", "TFLOP/s that the model needs, all ranks")
    data_wait = Chart("data_wait", "Waiting for data", "% of the time, rank 0")
    memory = Chart("memory", "Memory", "GB, of the rank that takes most")
    saving = Chart("checkpoint_stalls", "Checkpoints", "seconds")
    for run, history in enumerate(histories):
        learning_rate.add(run, "", "line", history.curve("train", "learning_rate"))
        gradient_norm.add(run, "", "line", history.curve("train", "gradient_norm"))
        scale = history.curve("train", "loss_scale")
        if (scale.values_P != 1).any():  # as other precisions have none
            loss_scale.add(run, "", "line", scale)
            loss_scale.add(run, "skipped", "marks", history.skipped())
        tokens.add(run, "", "line", history.curve("train", "tokens_per_s"))
        peak = history.peak_flops_per_s
        if peak:
            utilisation.add(run, "", "line", history.curve("train", "flops_per_s", factor=100 / peak))
        else:
            computing.add(run, "", "line", history.curve("train", "flops_per_s", factor=1e-12))
        data_wait.add(run, "", "line", history.curve("train", "data_wait", factor=100))
        memory.add(run, "GPU", "line", history.curve("train", "memory_bytes", factor=1e-9))
        has_gpu = any(series.run == run for series in memory.series)
        memory.add(run, "process", "line", history.curve("train", "host_memory_bytes", factor=1e-9), dash=int(has_gpu))
        saving.add(run, "training stands still", "points", history.curve("save", "save_s"))
        saving.add(run, "flushed and hashed beside it", "points", history.curve("save", "finishing_s"), dash=1)
    charts += [learning_rate, gradient_norm, loss_scale, tokens, utilisation, computing, data_wait, memory, saving]
    for chart in charts:
        chart.series.sort(key=lambda series: series.style != "extremes")  # behind the lines of all runs
    return [chart for chart in charts if chart.series]


# ---- the page


def write_report(runs: list[Path], output: Path) -> list[Path]:
    """Write the page, and a PNG of each chart beside it; returns the PNGs.

    Raises ValueError or OSError where a run has no records, or there are too many of them to tell apart.
    """
    if len(runs) > MAX_RUNS:
        raise ValueError(f"{len(runs)} runs, expected at most {MAX_RUNS}: more colours cannot be told apart")
    histories = [History(run) for run in runs]
    names = _short_names(runs)
    charts = make_charts(histories)
    events = [history.events() for history in histories]
    page = _TEMPLATE.read_text()
    for mark, content in (
        ("TITLE", html.escape(" and ".join(names))),
        ("NAMES", "".join(f'<li class="c{i}"><span></span>{html.escape(name)}</li>' for i, name in enumerate(names))),
        ("SUMMARY", _summary(names, histories)),
        ("NOTE", _note(histories, charts)),
        ("DIFFERENCES", _differences(names, histories)),
        ("CLOZE", _cloze(names, histories)),
        ("EVENTS", _event_list(names, events)),
        ("SETTINGS", _settings(names, histories)),
        ("DATA", _as_script({
            "runs": [
                {"name": name, "tokensPerStep": history.tokens_per_step} for name, history in zip(names, histories, strict=True)
            ],
            "charts": [_chart_values(chart, len(runs)) for chart in charts],
            "events": [_shown(of_run) for of_run in events],
            "sessions": [_sessions(of_run, history) for of_run, history in zip(events, histories, strict=True)],
            "dashes": _DASHES,
        })),
    ):  # fmt: skip
        assert f"<!--{mark}-->" in page
        page = page.replace(f"<!--{mark}-->", content)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, page.encode())
    return list(_write_pngs(charts, names, events, output))


def _short_names(runs: list[Path]) -> list[str]:
    """The folders' names, with as much of what is above as sets them apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(of_run[-depth:]) for of_run in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is given twice")


def _as_script(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def _rounded(values: np.ndarray, digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def _chart_values(chart: Chart, num_runs: int) -> dict[str, Any]:
    return {
        "name": chart.name, "title": chart.title, "unit": chart.unit, "log": chart.is_log,
        "series": [
            {
                "run": s.run, "label": s.label, "style": s.style, "dash": s.dash, "colour": s.colour,
                "steps": s.curve.steps_P.astype(int).tolist(), "hours": _rounded(s.curve.hours_P, 7),
                "values": _rounded(s.curve.values_P),
            }
            for s in chart.series
        ],
    }  # fmt: skip


def _shown(events: list[Event]) -> list[dict[str, Any]]:
    """For the drawing: all that is out of the ordinary, and of the saves a part where they are many."""
    saves = [event for event in events if event.kind == "save"]
    kept = saves[:: -(-len(saves) // _MAX_POINTS) or 1]
    chosen = sorted([*kept, *(event for event in events if event.kind != "save")], key=lambda event: event.time)
    return [
        {"kind": e.kind, "step": e.step, "hours": round(e.hours, 6), "text": e.text, "at": _date(e.time)} for e in chosen
    ]  # fmt: skip


def _sessions(events: list[Event], history: History) -> list[dict[str, Any]]:
    """From each start to the next: where it began and ended, in steps and hours."""
    starts = [event for event in events if event.kind in ("start", "restart")]
    ends = [(event.step, event.hours) for event in starts[1:]] + [(history.step, history.hours)]
    return [
        {"steps": [event.step, max(step, event.step)], "hours": [round(event.hours, 6), round(hours, 6)]}
        for event, (step, hours) in zip(starts, ends, strict=False)
    ]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(names: list[str], histories: list[History]) -> str:
    """The figures of one run side by side; of several in a table."""
    of_runs = [dict(_figures(history)) for history in histories]
    if len(of_runs) == 1:
        tiles = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in of_runs[0].items())
        return f"<dl>{tiles}</dl>"
    labels = list(dict.fromkeys(label for figures in of_runs for label in figures))
    return _table(
        ["", *map(html.escape, names)], [[label, *(figures.get(label, "") for figures in of_runs)] for label in labels]
    )


def _figures(history: History) -> Iterator[tuple[str, str]]:
    """What a run has come to."""
    total, tokens_per_step = history.start.get("total_steps"), history.tokens_per_step
    yield "step", f"{history.step:,}" + (f" of {total:,}" if total else "")
    yield "hours of training", f"{history.hours:,.2f}"
    if tokens_per_step:
        yield "tokens", _short_number(history.step * tokens_per_step)
    for key, style in (("loss", "{:.4f}"), ("accuracy", "{:.1%}")):
        for task in ("ae", "par"):
            values = history.curve("validation", f"{task}_{key}").values_P
            if len(values):
                yield f"{task.upper()} validation {key}", style.format(values[-1])
    speeds = history.curve("train", "tokens_per_s").values_P
    if len(speeds):
        yield "tokens/s, median", f"{np.median(speeds):,.0f}"
    kinds = [event.kind for event in history.events()]
    for kind, label in (("restart", "restarts"), ("rewind", "rewinds"), ("fault", "failed saves")):
        yield label, f"{kinds.count(kind):,}"
    skipped = history.curve("train", "skipped_steps").values_P
    if len(skipped):
        yield "steps skipped by fp16", f"{skipped[-1]:,.0f}"


def _short_number(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _note(histories: list[History], charts: list[Chart]) -> str:
    notes = [
        "Hours are those of training, without the time between an end and the next start; tokens are steps times a batch's "
        "mean tokens of text. Drag over a chart to see a part of it."
    ]
    most = max(len(history.of_kind("train")) for history in histories)
    if most > _MAX_POINTS:
        notes.append(
            f"Of up to {most:,} training records, in {_STRETCHES} stretches, a curve shows the median of each, and the band around "
            "it the least and the greatest, so that no spike is lost."
        )
    notes += [f"{html.escape(history.damage)}." for history in histories if history.damage]
    return " ".join(notes)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


_SECTIONS = {
    "config": "Flags", "model": "Model", "batch_sizes": "Batch", "deepspeed": "DeepSpeed JSON", "data": "Data", "code": "Code",
    "machine": "Machine",
}  # fmt: skip


def _settings_of(history: History) -> dict[str, str]:
    start = history.start
    plain = {
        key: start[key]
        for key in ("total_steps", "precision", "world_size", "zero_stage", "num_parameters")
        if key in start
    }
    sections = {key: start[key] for key in _SECTIONS if key in start}
    return {key: json.dumps(value, ensure_ascii=False).strip('"') for key, value in _flat(plain | sections)}


def _differences(names: list[str], histories: list[History]) -> str:
    if len(histories) == 1:
        return ""
    settings = [_settings_of(history) for history in histories]
    keys = list(dict.fromkeys(key for of_run in settings for key in of_run))
    rows = [
        [f"<code>{html.escape(key)}</code>", *(html.escape(of_run.get(key, "not recorded")) for of_run in settings)]
        for key in keys
        if key != "config.run" and len({of_run.get(key) for of_run in settings}) > 1
    ]
    content = _table(["setting", *map(html.escape, names)], rows) if rows else "<p>None.</p>"
    return f'<section id="differences"><h2>How the runs differ</h2>{content}</section>'


def _cloze(names: list[str], histories: list[History]) -> str:
    parts = []
    for name, history in zip(names, histories, strict=True):
        records = history.of_kind("cloze")
        if not records:
            continue
        chosen = sorted({round(place) for place in np.linspace(0, len(records) - 1, min(_MAX_CLOZE, len(records)))})
        shown = [records[place] for place in chosen]
        texts = list(dict.fromkeys(prompt["text"] for prompt in shown[-1]["prompts"]))
        rows = [
            [html.escape(text), *(_guesses(record, text, is_last=record is shown[-1]) for record in shown)]
            for text in texts
        ]
        title = f"<h3>{html.escape(name)}</h3>" if len(histories) > 1 else ""
        parts.append(title + _table(["prompt", *(f"step {record['step']:,}" for record in shown)], rows))
    if not parts:
        return ""
    return f'<section id="cloze"><h2>Cloze prompts</h2>{"".join(parts)}</section>'


def _guesses(record: dict[str, Any], text: str, *, is_last: bool) -> str:
    """The likeliest words of each mask with their probabilities; of the last validation more of them, and the whole text."""
    prompt = next((prompt for prompt in record["prompts"] if prompt["text"] == text), None)
    if prompt is None:
        return ""
    count = 3 if is_last else 1
    masks = "; ".join(
        ", ".join(f"<b>{html.escape(word)}</b> {probability:.0%}" for word, probability in mask[:count])
        for mask in prompt["masks"]
    )
    return f'<span title="{html.escape(filled_text(prompt))}">{masks}</span>'


def _event_list(names: list[str], events: list[list[Event]]) -> str:
    rows = []
    for name, of_run in zip(names, events, strict=True):
        of_note = [event for event in of_run if event.kind != "save"]
        for event in of_note[-_MAX_EVENTS:]:
            kind = f'<span class="event {event.kind}">{event.kind}</span>'
            row = [_date(event.time), f"{event.step:,}", f"{event.hours:.3f}", kind, html.escape(event.text)]
            rows.append(([html.escape(name)] if len(names) > 1 else []) + row)
    return _table([*(["run"] if len(names) > 1 else []), "time", "step", "hours", "what", ""], rows)


def _settings(names: list[str], histories: list[History]) -> str:
    parts = []
    for name, history in zip(names, histories, strict=True):
        settings = _settings_of(history)
        if len(names) > 1:
            parts.append(f"<h3>{html.escape(name)}</h3>")
        if not settings:
            parts.append("<p>Not recorded.</p>")
            continue
        groups: dict[str, list[list[str]]] = {}
        for key, value in settings.items():
            section, _, rest = key.partition(".")
            title, label = (_SECTIONS[section], rest) if section in _SECTIONS else ("Run", key)
            groups.setdefault(title, []).append([f"<code>{html.escape(label)}</code>", html.escape(value)])
        parts += [
            f"<details><summary>{title}</summary>{_table(['', ''], rows)}</details>" for title, rows in groups.items()
        ]
    return "".join(parts)


# ---- pictures


def _write_pngs(charts: list[Chart], names: list[str], events: list[list[Event]], output: Path) -> Iterator[Path]:
    """A picture of each chart against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for chart in charts:
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for s in chart.series:
            dash = [float(length) for length in _DASHES[s.dash].split()]
            label = ", ".join(part for part in (names[s.run] if len(names) > 1 else "", s.label) if part)
            label = "" if s.style == "extremes" else label
            looks: dict[str, Any] = {
                "color": _COLOURS[s.colour], "linestyle": (0, dash) if dash else "-", "linewidth": 1.6, "label": label,
            }  # fmt: skip
            if s.style in ("faint", "extremes"):
                looks |= {"alpha": 0.45 if s.style == "faint" else 0.25, "linewidth": 1.0}
            elif s.style == "points":
                looks |= {"marker": "o", "markersize": 3.5}
            elif s.style == "marks":
                looks |= {"linestyle": "", "marker": "x", "color": "#b42318"}
            axes.plot(s.curve.steps_P, s.curve.values_P, **looks)
        for kind, step in sorted({(e.kind, e.step) for of_run in events for e in of_run if e.kind in _MARKED}):
            looks = {"color": "#8a6d00", "ymax": 0.04} if kind == "restart" else {"color": "#b42318", "linestyle": ":"}
            axes.axvline(step, linewidth=0.9, **looks)
        axes.set_title(chart.title + (f" ({chart.unit})" if chart.unit else ""), fontsize=11, loc="left")
        axes.set_xlabel("step")
        if chart.is_log:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if any(label for label in axes.get_legend_handles_labels()[1]) and len(chart.series) > 1:
            axes.legend(fontsize=8, frameon=False)
        path = output.with_name(f"{output.stem}-{chart.name}.png")
        with unfinished_file(path) as partial:
            figure.savefig(partial, format="png")
        yield path


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m pretrain.report", description=__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help=f"folder of a run; several, at most {MAX_RUNS}, are compared"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="the page; by default report.html in the first run's folder"
    )
    args = parser.parse_args()

    def command() -> None:
        output = args.output or args.runs[0] / "report.html"
        if output.suffix != ".html":
            raise ValueError(f"--output {output}: expected a name that ends in .html")
        pictures = write_report(args.runs, output)
        print(f"{output}, {output.stat().st_size / 1e3:,.0f} kB; beside it {len(pictures)} PNGs, {output.stem}-*.png")

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
