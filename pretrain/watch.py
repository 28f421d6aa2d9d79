"""How a run is doing, from its files alone: python -m pretrain.watch --run RUN [--once] [--json].

From another shell, or another machine that shares the file system. Exit status, when the run has ended, with --once and at
Ctrl-C: 0 nothing is wrong, 1 something is, 2 cannot be told.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from data_prep.console import USER_ERROR_STATUS, ArgumentParser, describe_error
from pretrain.metrics import METRICS, Records

UNHEALTHY_STATUS = 1
_RECENT = 50  # training records that speed and loss scale are judged by
_LEAST_SILENCE_S = 120.0
_START_SILENCE_S = 900.0  # compiling, and reading a checkpoint
_SILENCE_FACTOR = 5.0  # times the longest recent time between records
_FALL = 2.0**5  # of the loss scale, within the recent records


@dataclass
class View:
    """What can be said of a run now."""

    state: str
    """starting, running, silent, stopped or finished."""
    step: int
    total_steps: int | None
    seconds_left: float | None
    """To the last step, at the recent pace, validations and saves included."""
    silent_s: float
    """Since the last record."""
    train: dict[str, Any] = field(default_factory=dict)
    """The last training record."""
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation record."""
    saved_step: int | None = None
    restarts: int = 0
    rewinds: int = 0
    disk_free_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    """What is wrong; empty for a healthy run."""

    @property
    def has_ended(self) -> bool:
        """Whether no more is to come."""
        return self.state in ("stopped", "finished")


def look(run: Path, records: list[dict[str, Any]], now: float) -> View:
    """What the records and the disk say at a time, in seconds since 1970."""
    if not records:
        raise ValueError(f"{run / METRICS}: has no records yet")
    of_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        of_kind.setdefault(record["kind"], []).append(record)
    trained, starts = of_kind.get("train", []), of_kind.get("start", [])
    session = records[max(place for place, record in enumerate(records) if record["kind"] == "start" or place == 0) :]
    recent = [record for record in session if record["kind"] == "train"][-_RECENT:]
    start = starts[-1] if starts else {}
    total = start.get("total_steps")
    step = session[-1]["step"] if session[-1]["kind"] in ("start", "stop") else (trained[-1]["step"] if trained else 0)
    silent_s = max(0.0, now - records[-1]["time"])
    stop = records[-1] if records[-1]["kind"] == "stop" else None
    patience_s = _patience_s(session)
    if stop:
        state = "finished" if stop["reason"] == "finished" else "stopped"
    else:
        state = "silent" if silent_s > patience_s else "running" if recent else "starting"
    seconds_left = None
    if total and len(recent) > 1 and not stop and recent[-1]["step"] > recent[0]["step"]:
        pace_s = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
        seconds_left = max(0.0, (total - step) * pace_s - silent_s)
    saves, faults = of_kind.get("save", []), of_kind.get("fault", [])
    rewinds = [record for record in faults if "fault_step" in record]
    view = View(
        state, step, total, seconds_left, silent_s, trained[-1] if trained else {},
        of_kind.get("validation", [{}])[-1], saves[-1]["step"] if saves else None,
        restarts=sum(record["resumed"] for record in starts), rewinds=len(rewinds),
        disk_free_bytes=shutil.disk_usage(run).free,
    )  # fmt: skip
    view.faults = list(_faults(view, session, recent, saves, faults, patience_s, start))
    return view


def _patience_s(session: list[dict[str, Any]]) -> float:
    """The longest that no record is expected for."""
    times = [record["time"] for record in session[1:]]
    if len(times) < 2 or not any(record["kind"] == "train" for record in session):
        return _START_SILENCE_S
    gaps: list[float] = [after - before for before, after in pairwise(times)]
    return max(_LEAST_SILENCE_S, _SILENCE_FACTOR * max(gaps[-_RECENT:]))


def _faults(
    view: View, session: list[dict[str, Any]], recent: list[dict[str, Any]], saves: list[dict[str, Any]],
    faults: list[dict[str, Any]], patience_s: float, start: dict[str, Any],
) -> Iterator[str]:  # fmt: skip
    if view.state == "silent":
        yield f"no record for {_span(view.silent_s)}, expected one within {_span(patience_s)}: it hangs, or was killed"
    losses = [value for key, value in view.train.items() if key.endswith("_loss")]
    if not all(math.isfinite(value) for value in losses):
        yield f"the loss is not finite at step {view.train['step']}"
    scales = [record["loss_scale"] for record in recent]
    num_done = sum(record["kind"] == "train" for record in session)
    if num_done > _RECENT and scales[-1] * _FALL <= max(scales):  # at first it comes down from where it began
        yield f"fp16's loss scale fell from {max(scales):g} to {scales[-1]:g} within {recent[-1]['step'] - recent[0]['step']} steps"
    saved_at = saves[-1]["time"] if saves else 0.0
    for fault in faults:
        if fault["time"] >= saved_at:  # nothing whole has been saved since
            where = f"step {fault['fault_step']}: " if "fault_step" in fault else ""
            yield f"{where}{fault['fault']}" + ("; gone back from" if where else "")
    limit = start.get("config", {}).get("max_rewinds")
    if limit is not None and view.rewinds >= limit > 0:
        yield f"{view.rewinds} rewinds, of {limit} that --max_rewinds allows: the next fault ends the run"
    size = saves[-1]["size_bytes"] if saves else 0
    if not view.has_ended and view.disk_free_bytes < 2 * size:
        yield (
            f"{view.disk_free_bytes / 1e9:.1f} GB free on the run's disk, less than two checkpoints of {size / 1e9:.1f} GB"
        )


def _span(seconds: float) -> str:
    """In words: the two largest units."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (whole, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


def describe(run: Path, view: View) -> str:
    """A few lines for a terminal, at most some 80 characters wide but for what is wrong."""
    done = f" of {view.total_steps:,} ({view.step / view.total_steps:.1%})" if view.total_steps else ""
    lines = [f"{run}: {view.state}", f"step        {view.step:,}{done}"]
    if view.seconds_left is not None:
        at = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + view.seconds_left))
        lines[-1] += f", {_span(view.seconds_left)} left, until {at}"
    for name, record in (("training", view.train), ("validation", view.validation)):
        if record:
            losses = [
                f"{task.upper()} {record[f'{task}_loss']:.4f}" for task in ("ae", "par") if f"{task}_loss" in record
            ]
            right = [f"{record[f'{task}_accuracy']:.1%}" for task in ("ae", "par") if f"{task}_accuracy" in record]
            lines.append(f"{name:11} loss {', '.join(losses)}; right {', '.join(right)} (step {record['step']:,})")
    if view.train:
        train = view.train
        lines.append(
            f"pace        {train['tokens_per_s']:,.0f} tokens/s, waiting for data {train['data_wait']:.1%}, "
            f"gradient norm {train['gradient_norm']:.3g}, loss scale {train['loss_scale']:g}"
        )
    saved = "none yet" if view.saved_step is None else f"step {view.saved_step:,}"
    lines.append(
        f"checkpoint  {saved}; {view.restarts} restarts, {view.rewinds} rewinds; {view.disk_free_bytes / 1e9:,.0f} GB free"
    )
    lines.append(f"last record {_span(view.silent_s)} ago")
    lines += [f"WRONG       {fault}" for fault in view.faults] or ["healthy"]
    return "\n".join(lines)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m pretrain.watch", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="PATH", help="folder of the run")
    parser.add_argument("--once", action="store_true", help="look once and end; else until the run ends, or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print a JSON object, a line each time, instead of text")
    parser.add_argument("--every_seconds", type=float, default=5.0, metavar="N", help="time between looks")
    args = parser.parse_args()
    records, status, num_lines = Records(args.run), USER_ERROR_STATUS, 0
    is_terminal = sys.stdout.isatty() and not args.json
    try:
        while True:
            view = look(args.run, records.update(), time.time())
            view.faults += [records.damage] if records.damage else []
            status = UNHEALTHY_STATUS if view.faults else 0
            text = orjson.dumps(asdict(view)).decode() if args.json else describe(args.run, view)
            up = f"\x1b[{num_lines}F\x1b[J" if is_terminal and num_lines else ""
            print(f"{up}{text}" + ("" if is_terminal or args.json else "\n"), flush=True)
            width = shutil.get_terminal_size().columns
            num_lines = sum(max(1, -(-len(line) // width)) for line in text.splitlines())
            if args.once or view.has_ended:
                return status
            time.sleep(args.every_seconds)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return status


if __name__ == "__main__":
    sys.exit(main())
