"""What a study found so far: results.json, results.md, curves.png and tasks.png."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import plan
from benchmarks.study.plan import Arm
from benchmarks.study.tasks import RESULT, WRITTEN, Task
from data_prep.files import read_json, sha256_of_file, write_json, write_whole
from finetune.score import read_lines, rouge_scores
from pretrain.metrics import read_records

_NUM_EXAMPLES = 5
_LOSSES = ("ae_loss", "par_loss")


def write_report(
    output: Path, arms: Sequence[Arm], tasks: Sequence[Task], floors: dict[str, Any], finetuning_seeds: int
) -> None:
    """Write it, and print the tables."""
    pretraining = {arm.name: found for arm in arms if (found := _pretraining(output, arm))}
    scores = {
        task.name: {
            arm.name: runs for arm in arms
            if (runs := _scores(output / "tasks" / task.name, arm, finetuning_seeds))
        }
        for task in tasks
    }  # fmt: skip
    manifest = output / "data" / "manifest.json"
    write_json(output / "results.json", {
        "data_manifest_sha256": sha256_of_file(manifest), "deepspeed_config": read_json(output / "deepspeed.json"),
        "model_flags": plan.MODEL_FLAGS, "pretraining": pretraining, "floors": floors, "tasks": scores,
    })  # fmt: skip
    lines = [*_pretraining_table(pretraining), "", *_task_table(arms, tasks, scores, floors)]
    for task in tasks:
        lines += ["", *_examples(output / "tasks" / task.name)]
    write_whole(output / "results.md", ("\n".join(lines) + "\n").encode())
    _draw_curves(output / "curves.png", pretraining)
    if tasks:
        _draw_tasks(output / "tasks.png", arms, tasks, scores, floors)
    print("\n".join(lines))


def _pretraining(output: Path, arm: Arm) -> dict[str, Any] | None:
    """What it took, how its losses fell, and what they are in the end; None if its losses are not known."""
    run, losses = output / "pretrain" / arm.name, output / "losses" / arm.name / RESULT
    if not losses.is_file():
        return None
    found: dict[str, Any] = {"steps": 0, "samples": 0, "cpu_s": 0.0, "validations": [], **read_json(losses)["losses"]}
    if arm == plan.RANDOM:
        return found
    result = read_json(run / RESULT)
    found["cpu_s"] = result.pop("cpu_s")[0]
    if arm == plan.BERT:
        return {**found, **result}
    records = read_records(run)
    names = ("step", "ae_loss", "par_loss", "ae_accuracy", "par_accuracy")
    found["validations"] = [{k: r[k] for k in names if k in r} for r in records if r["kind"] == "validation"]
    last = [record for record in records if record["kind"] == "train"][-1]
    return {**found, "steps": last["step"], "samples": last["samples_consumed"]}


def _scores(folder: Path, arm: Arm, seeds: int) -> list[dict[str, Any]]:
    files = [folder / f"{arm.name}-{seed}" / RESULT for seed in range(seeds)]
    return [{"seed": seed, **read_json(file)} for seed, file in enumerate(files) if file.is_file()]


def _pretraining_table(pretraining: dict[str, Any]) -> Iterator[str]:
    yield "| pre-trained | steps | CPU minutes | AE loss (accuracy) | PAR loss (accuracy) |"
    yield "|---|---|---|---|---|"
    for name, found in pretraining.items():
        ae, par = (f"{found[f'{kind}_loss']:.3f} ({found[f'{kind}_accuracy']:.3f})" for kind in ("ae", "par"))
        yield f"| {name} | {found['steps']:,} | {found['cpu_s'] / 60:.0f} | {ae} | {par} |"


def _of_kind(arms: Sequence[Arm], scores: dict[str, Any], metric: str) -> dict[str, list[float]]:
    """The figure of each fine-tuning, by kind of arm: those of several seeds of pre-training together."""
    found: dict[str, list[float]] = {}
    for arm in arms:
        found.setdefault(arm.kind, []).extend(run["scores"][metric] for run in scores.get(arm.name, []))
    return {kind: values for kind, values in found.items() if values}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _task_table(arms: Sequence[Arm], tasks: Sequence[Task], scores: dict[str, Any], floors: dict[str, Any]) -> Iterator[str]:  # fmt: skip
    for task in tasks:
        by_kind = _of_kind(arms, scores[task.name], task.metric)
        yield f"{task.name}: {task.what}. {task.metric}, {task.sizes.train:,} samples to train on"
        yield ""
        yield "| | mean | sd | each |"
        yield "|---|---|---|---|"
        for kind, values in by_kind.items():
            mean, deviation = mean_and_deviation(values)
            yield f"| {kind} | {mean:.1f} | {deviation:.1f} | {', '.join(f'{value:.1f}' for value in values)} |"
        for name, found in floors[task.name].items():
            yield f"| {name} | {found[task.metric]:.1f} | | |"
        yield ""


def _examples(folder: Path) -> Iterator[str]:
    """What the reference's seed 0 wrote: some of the best and of the worst by ROUGE-L, with what random weights came to."""
    written = {arm: folder / f"{arm.name}-0" / WRITTEN for arm in (plan.REFERENCE, plan.RANDOM)}
    if not all(path.is_file() for path in written.values()):
        return
    sources, targets = (read_lines(folder / "test.jsonl", column) for column in ("src", "tgt"))
    texts = {arm: read_lines(path, "text") for arm, path in written.items()}
    ours = texts[plan.REFERENCE]
    scores = [rouge_scores([a], [[b]])[0]["rouge_l"] for a, b in zip(ours, targets, strict=True)]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    inexact = [i for i in order if ours[i].lower() != targets[i].lower()]
    for title, places in (("Good", inexact[:_NUM_EXAMPLES]), ("Bad", order[-_NUM_EXAMPLES:])):
        yield f"{title}:\n"
        yield f"| source | reference | {plan.REFERENCE.kind} | {plan.RANDOM.kind} |"
        yield "|---|---|---|---|"
        for i in places:
            row = (f"{sources[i][:160]} ...", targets[i], ours[i], texts[plan.RANDOM][i])
            yield "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in row) + " |"
        yield ""


def _draw_curves(path: Path, pretraining: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in pretraining))
    for axes, loss in zip(figure.subplots(1, 2, sharey=True), _LOSSES, strict=True):
        for name, found in pretraining.items():
            points = [(v["step"], v[loss]) for v in found["validations"] if loss in v and v["step"]]
            kind, seed = name.rsplit("-", 1)
            if len(points) > 1:
                style = {"color": f"C{kinds.index(kind)}", "linestyle": "-" if seed == "0" else "--"}
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.3, **style)
            elif name == plan.BERT.name and loss == "ae_loss":
                axes.axhline(found[loss], label=f"{name}, at its end", linewidth=1, color="black", linestyle=":")
        title = {"ae_loss": "AE, validation", "par_loss": "PAR, or AR where it is trained, validation"}[loss]
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_tasks(path: Path, arms: Sequence[Arm], tasks: Sequence[Task], scores: dict[str, Any], floors: dict[str, Any]) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        by_kind = _of_kind(arms, scores[task.name], task.metric)
        means, deviations = zip(*map(mean_and_deviation, by_kind.values()), strict=True) if by_kind else ((), ())
        axes.barh(range(len(means)), means, xerr=deviations, color="#4477aa", ecolor="#222222", height=0.6)
        axes.set_yticks(range(len(means)), [*by_kind])
        axes.invert_yaxis()
        for (name, found), style in zip(floors[task.name].items(), (":", "--", "-."), strict=False):
            axes.axvline(found[task.metric], color="#cc6677", linewidth=1.2, linestyle=style, label=name)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes.set(title=task.name, xlabel=task.metric)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
