"""python -m benchmarks.golden_losses: the first losses of the shipped recipes, to compare two states of the code bit by bit.

  python -m benchmarks.golden_losses --write golden.json       before a change that must not change any number
  python -m benchmarks.golden_losses --compare golden.json     after it; exit status 1 if a record differs

Each recipe trains a tiny model for some steps on two ranks of this machine, with dropout, validation, a save, and a second
start that resumes from it. The numbers are those of one processor, one build of torch and one number of threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.text import make_data, make_tokenizer
from data_prep.console import ArgumentParser
from data_prep.files import read_json, write_json
from data_prep.parameters import BuildParameters
from pretrain.metrics import MEASURED, read_records

_REPOSITORY = Path(__file__).resolve().parent.parent
_RECIPES = ("zero2_local.json", "zero2_tiny.json")
_STEPS, _STEPS_BEFORE_RESTART = 6, 4
_MODEL = ("--model", "tiny", "--hidden_size", "64", "--intermediate_size", "128")


def losses(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what each recipe's run computes: its training and validation records without what is measured."""
    corpus = sorted((_REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0*.txt"))
    tokenizer = make_tokenizer(corpus, folder / "tokenizer.model", vocab_size=1000)
    parameters = BuildParameters(max_length_tokens=128, mask_sets=2, validation_fraction=0.1)
    data = make_data(corpus, tokenizer.path, folder / "data", parameters)
    return {recipe: _records(folder / Path(recipe).stem, data, recipe) for recipe in _RECIPES}


def _records(run: Path, data: Path, recipe: str) -> list[dict[str, Any]]:
    flags = [
        *(
            "--deepspeed_config",
            str(_REPOSITORY / "ds_configs" / recipe),
            "--data",
            str(data),
            "--run",
            str(run),
            *_MODEL,
        ),
        *("--log_every_steps", "1", "--validate_every_steps", "3", "--validation_samples", "40"),
    ]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for steps in (_STEPS_BEFORE_RESTART, _STEPS):
        command = [sys.executable, "-m", "pretrain.local_ranks", "--ranks", "2", "run_pretrain.py", *flags]
        subprocess.run([*command, "--max_steps", str(steps)], cwd=_REPOSITORY, env=environ, check=True)
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in read_records(run)
        if record["kind"] in ("train", "validation")
    ]


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return a line for each record that is not the same."""
    lines = []
    for recipe in expected.keys() | found.keys():
        before, after = expected.get(recipe, []), found.get(recipe, [])
        if len(before) != len(after):
            lines.append(f"{recipe}: {len(before)} records before, {len(after)} now")
        lines += [f"{recipe}: {a} is now {b}" for a, b in zip(before, after, strict=False) if a != b]
    return lines


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.golden_losses", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="PATH", help="write the records to this file")
    what.add_argument("--compare", type=Path, metavar="PATH", help="compare the records with this file's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder))
    if args.write:
        write_json(args.write, found)
        return 0
    lines = differences(read_json(args.compare), found)
    print("\n".join(lines) or f"{sum(map(len, found.values()))} records, all equal in all bits")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
