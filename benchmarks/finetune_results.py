"""python -m benchmarks.finetune_results: weights of BERT's architecture, fine-tuned here and with transformers alone.

Opened by finetune.weights and trained by `finetune classify`, against transformers' BertForSequenceClassification, on film reviews: same
samples, order, batches, steps, learning rates and seeds. The data is what `python -m benchmarks.corpora vader-movies --output
data/corpora` makes. The weights of the best epoch in validation are tested. What is trained already is not trained again. Writes
results.json and results.md.
"""

from __future__ import annotations

import copy
import math
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study.tasks import Classification, Sizes
from data_prep.console import ArgumentParser, run_command
from data_prep.files import read_json, write_json, write_whole
from finetune.batches import epoch_order, prediction_batches
from finetune.classify import train
from finetune.classify_data import ColumnSettings, Data, DataSettings, Labelled, read_data, read_labelled
from finetune.classify_model import Classifier
from finetune.runs import StartSettings
from finetune.trainer import MODEL, TrainSettings, learning_rate_factor

_FILMS = "vader-movies"
_ALL = 10**6
RESULT = "test.json"


def tested(labels: Sequence[str], predicted: Sequence[Any]) -> dict[str, Any]:
    """Return the accuracy, and of each sample whether it is right, a digit."""
    is_right = [a == b for a, b in zip(labels, predicted, strict=True)]
    return {"test": statistics.fmean(is_right), "right": "".join(str(int(right)) for right in is_right)}


def once(folder: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gave when it was called for this folder, with the CPU seconds it took.

    Raises ValueError where it was called with other settings.
    """
    if not (folder / RESULT).is_file():
        before = resource.getrusage(resource.RUSAGE_SELF)
        made = make()
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write_json(folder / RESULT, {**made, "cpu_s": round(cpu_s, 1), "settings": settings})
    found: dict[str, Any] = read_json(folder / RESULT)
    if found.pop("settings") != settings:
        raise ValueError(f"{folder / RESULT}: is of other settings; remove the folder, or choose another --output")
    return found


def train_here(weights: Path, run: Path, data: Data, test: Labelled, settings: TrainSettings, max_length_tokens: int) -> dict[str, Any]:  # fmt: skip
    """Train as `python -m finetune classify` does."""
    summary = train(StartSettings(weights, run, max_length_tokens=max_length_tokens), settings, data)
    predicted = Classifier.load(run).predict(_texts(test))
    return {**tested(test.names(data.target), predicted), "validation": summary["validation"]["accuracy"]}


def _texts(part: Labelled) -> list[str]:
    return [text for (text,) in part.texts()]


# ---- transformers


def train_there(
    weights: Path, run: Path, data: Data, test: Labelled, settings: TrainSettings, max_length_tokens: int
) -> dict[str, Any]:
    """The same recipe with transformers alone: its tokenizer, model and padding, torch's AdamW."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    torch.manual_seed(settings.seed)
    model = transformers.BertForSequenceClassification.from_pretrained(weights, num_labels=len(data.target.labels))
    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate, fused=True,
    )  # fmt: skip

    def batch_of(texts: list[str], places: list[int]) -> Any:
        return tokenizer(
            [texts[i] for i in places], padding=True, truncation=True, max_length=max_length_tokens, return_tensors="pt"
        )  # fmt: skip

    def predict(texts: list[str]) -> list[str]:
        found = [""] * len(texts)
        lengths = [len(text) for text in texts]
        with torch.no_grad():
            for places in prediction_batches(lengths):
                best = model(**batch_of(texts, places.tolist())).logits.argmax(dim=1).tolist()
                for place, label in zip(places, best, strict=True):
                    found[place] = data.target.labels[label]
        return found

    texts, (validation,) = _texts(data.train), data.validation.values()
    of_validation, validated = _texts(validation), validation.names(data.target)
    num_samples, best_state, best_accuracy = len(texts), model.state_dict(), -math.inf
    steps_per_epoch = -(-num_samples // settings.batch_size)
    num_steps = steps_per_epoch * settings.epochs
    targets = data.train.labels.tolist()
    for step in range(num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(settings.seed, epoch, num_samples)
        batch = order[place * settings.batch_size : (place + 1) * settings.batch_size].tolist()
        model.train()
        model(**batch_of(texts, batch), labels=torch.tensor([targets[i] for i in batch])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, num_steps, settings.warmup)
        optimizer.step()
        optimizer.zero_grad()
        if place == steps_per_epoch - 1:
            model.eval()
            found = tested(validated, predict(of_validation))["test"]
            if found > best_accuracy:
                best_accuracy, best_state = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    model.eval()
    model.save_pretrained(run / MODEL)
    return {**tested(test.names(data.target), predict(_texts(test))), "validation": best_accuracy}


# ---- the program


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.finetune_results", description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("data/corpora"), help="what benchmarks.corpora made")
    parser.add_argument(
        "--bert", type=Path, metavar="PATH", required=True, help="folder with BERT's config.json, weights and vocab.txt"
    )
    parser.add_argument("--num_train", type=int, default=1000, help="samples to train on")
    parser.add_argument("--num_test", type=int, default=1000, help="samples to test with, where there are as many")
    parser.add_argument("--epochs", type=int, default=3, help="times that every sample is seen")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="peak")
    parser.add_argument("--max_length_tokens", type=int, default=128, help="longer inputs are cut")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/finetune_results"), help="folder for all that is made"
    )
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    columns = ColumnSettings()
    films = Classification(_FILMS, "", Sizes(args.num_train, _ALL, args.num_test), {}, columns)
    files = films.prepare(args.corpora, args.output / _FILMS)
    reading = DataSettings(train_file=files.train, validation_file=files.validation)
    data = read_data(reading, columns)
    test, _ = read_labelled(files.test, reading, columns, data.target)
    rows = list(_measure(args, data, test))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.output / "results.json", {"settings": settings, "rows": rows})
    table = _table(rows) + _difference(*rows)
    write_whole(args.output / "results.md", table.encode())
    print(table)


def _measure(args: Any, data: Data, test: Labelled) -> Iterator[dict[str, Any]]:
    for name, make in (("here", train_here), ("transformers", train_there)):
        found = []
        for seed in range(args.seeds):
            run = args.output / f"{name}_{seed}"
            numbers = {"epochs": args.epochs, "learning_rate": args.learning_rate}
            settings = TrainSettings(micro_batch_size=32, seed=seed, **numbers)
            known = {
                **numbers,
                "num_train": args.num_train,
                "num_test": args.num_test,
                "max_length_tokens": args.max_length_tokens,
            }
            found.append(once(run, known, partial(make, args.bert, run, data, test, settings, args.max_length_tokens)))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found[-1].items() if key != "right")
            print(f"{name}, seed {seed}: {shown}", file=sys.stderr, flush=True)
        counts = np.bincount(test.labels, minlength=len(data.target.labels)).tolist()
        yield {
            "model": name, "num_train": len(data.train.labels), "num_test": len(test.labels),
            "majority": max(counts) / sum(counts), "runs": found,
            **{f"{kind}_{what}": function([run[kind] for run in found])
               for kind in ("test", "validation") for what, function in (("mean", statistics.fmean), ("sd", _deviation))},
        }  # fmt: skip


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| trained on | tested on | most frequent class | trained by | test accuracy: mean, sd | each seed |", "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        seeds = ", ".join(f"{run['test']:.3f}" for run in row["runs"])
        lines.append(
            f"| {row['num_train']:,} | {row['num_test']:,} | {row['majority']:.3f} | {row['model']} | "
            f"**{row['test_mean']:.3f}**, {row['test_sd']:.3f} | {seeds} |"
        )
    return "\n".join(lines) + "\n"


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The mean accuracy of one less that of the other, with its error over trainings and over samples, which are the same."""
    runs = len(one["runs"])
    over_runs = math.sqrt((one["test_sd"] ** 2 + other["test_sd"] ** 2) / runs)
    counts = [[sum(map(int, sample)) for sample in zip(*(run["right"] for run in row["runs"]), strict=True)] for row in (one, other)]  # fmt: skip
    per_sample = [(a - b) / runs for a, b in zip(*counts, strict=True)]
    over_samples = _deviation(per_sample) / math.sqrt(len(per_sample))
    return (
        f"\n{one['model']} - {other['model']}: {one['test_mean'] - other['test_mean']:+.4f}; standard error {over_runs:.4f} by "
        f"trainings, {over_samples:.4f} by samples\n"
    )


if __name__ == "__main__":
    sys.exit(main())
