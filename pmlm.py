"""pmlm data|pretrain|finetune COMMAND: every command of the installed package.

pmlm data COMMAND        is python -m data_prep COMMAND: tokenizers and data sets
pmlm pretrain COMMAND    is python -m pretrain.COMMAND; `pmlm pretrain run` trains on this machine
pmlm finetune COMMAND    is python -m finetune COMMAND: tasks, and other forms of a model
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from data_prep.console import USER_ERROR_STATUS, ArgumentParser

RUN = "run"
PRETRAIN = {
    RUN: "train on this machine, a rank a visible GPU, or two without GPUs",
    "export": "a run's newest checkpoint as a model that fine-tuning opens",
    "status": "how far a run is",
    "watch": "how a run is doing",
    "report": "runs in one page",
    "show": "the layout of a real sample",
    "plan": "memory, time and price of a run, before there is a GPU",
    "doctor": "check hosts and settings before a run",
    "replay": "a failure's steps once more",
}
"""Commands of pretraining; all but `run` are modules of `pretrain`."""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, or does not return if a launcher takes this process's place."""
    area, *rest = [*(sys.argv[1:] if words is None else words)] or ["--help"]
    if area in ("data", "finetune"):
        return _call("data_prep.__main__" if area == "data" else area + ".__main__", f"pmlm {area}", rest)
    if area == "pretrain":
        return _pretrain(rest)
    wants_help = area in ("-h", "--help")
    print(__doc__, file=sys.stdout if wants_help else sys.stderr)
    if not wants_help:
        print(f"pmlm: error: {area!r}: expected data, pretrain or finetune", file=sys.stderr)
    return 0 if wants_help else USER_ERROR_STATUS


def _pretrain(words: Sequence[str]) -> int:
    command, *rest = [*words] or ["--help"]
    if command == RUN:
        return _run(rest)
    if command in PRETRAIN:
        return _call(f"pretrain.{command}", f"pmlm pretrain {command}", rest)
    listed = "".join(f"  {name:<10}{text}\n" for name, text in PRETRAIN.items())
    wants_help = command in ("-h", "--help")
    print(f"usage: pmlm pretrain COMMAND [FLAGS]\n\n{listed}", file=sys.stdout if wants_help else sys.stderr)
    if not wants_help:
        print(f"pmlm pretrain: error: {command!r}: expected one of {', '.join(PRETRAIN)}", file=sys.stderr)
    return 0 if wants_help else USER_ERROR_STATUS


def _run(words: Sequence[str]) -> int:
    """Start the launcher with run_pretrain.py, which takes all flags but --ranks and --master_port."""
    parser = ArgumentParser(prog="pmlm pretrain run", add_help=False, allow_abbrev=False)
    parser.add_argument("--ranks")
    parser.add_argument("--master_port")
    parser.add_argument("-h", "--help", action="store_true")
    args, flags = parser.parse_known_args(words)
    if args.help:
        print(
            "--ranks N        by default one a visible GPU, 2 without GPUs\n--master_port N  by default a free port\n"
        )
        return _call("run_pretrain", "pmlm pretrain run", ["--help"])
    found = importlib.util.find_spec("run_pretrain")
    assert found is not None
    assert found.origin is not None
    given = [
        word for name in ("ranks", "master_port") if (value := getattr(args, name)) for word in (f"--{name}", value)
    ]
    from pretrain.local_ranks import main as launch

    return launch([*given, found.origin, *flags])


def _call(module: str, name: str, words: Sequence[str]) -> int:
    """Run a module's `main` as the program `name` with these arguments."""
    sys.argv = [name, *words]
    status: int = importlib.import_module(module).main()
    return status


if __name__ == "__main__":
    sys.exit(main())
