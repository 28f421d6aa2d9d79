"""python -m finetune: from a pre-trained model to a task.

train      classify, answer, seq2seq: fine-tune a model to classes or numbers, to answers, or to write
use        predict: classes, numbers and answers; generate: texts; score: generated texts against references
convert    a pre-trained model from one form to another
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.console import ArgumentParser
from finetune import answer, classify, convert, generate, score, seq2seq
from finetune.answer_model import SpanClassifier
from finetune.classify_model import SequenceClassifier
from finetune.model import model_kind
from finetune.optimizer import autocast
from finetune.processes import Processes
from finetune.runs import add_precision_flag, precision_of, run_with_processes
from finetune.seq2seq_model import Seq2SeqModel

EPILOG = """\
example, in this order:
  python -m finetune classify --weights runs/pretrain/export --output runs/authors \\
      --train_file sample_tasks/authors/train.tsv --validation_file sample_tasks/authors/validation.tsv
  python -m finetune predict --model runs/authors --text "It is a truth universally acknowledged."
several processes: torchrun --nproc_per_node 2 -m finetune classify ...
"""
_TASKS: dict[str, ModuleType] = {
    "classify": classify, "answer": answer, "seq2seq": seq2seq, "generate": generate, "score": score, "convert": convert,
}  # fmt: skip
_OF_CLASSIFIER = ("text", "pair", "text_column", "pair_column")
_OF_ANSWERER = ("question", "passage")


def _add_predict_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", required=True, help="what `classify` or `answer` wrote")
    parser.add_argument("--input", type=Path, metavar="PATH",
                        help="texts in .tsv, .csv, .jsonl or .parquet, or questions in SQuAD's JSON, with or without answers")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="PATH",
                        help="file to write instead of the screen; of answers a folder (default: predictions in --model)")  # fmt: skip
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify")
    parser.add_argument("--pair", nargs="+", metavar="TEXT", help="the second text of each, for pairs")
    parser.add_argument("--text_column", metavar="NAME", help="column of the texts in --input (default: text)")
    parser.add_argument("--pair_column", metavar="NAME", help="column of the second texts, for pairs")
    parser.add_argument("--question", metavar="TEXT", help="a question to answer")
    parser.add_argument("--passage", metavar="TEXT", help="where its answer is to be found")
    add_precision_flag(parser)


def _predict(args: Any, processes: Processes) -> None:
    """Run `python -m finetune predict`."""
    kind = model_kind(args.model)
    if kind == Seq2SeqModel.kind:
        raise ValueError(
            f"{args.model}: is a model that writes; use `python -m finetune generate --model {args.model}`"
        )
    of_kinds: dict[str, tuple[Callable[[Any, Processes], None], Sequence[str]]] = {
        SequenceClassifier.kind: (classify.predict, _OF_ANSWERER), SpanClassifier.kind: (answer.predict, _OF_CLASSIFIER),
    }  # fmt: skip
    if kind not in of_kinds:
        raise ValueError(f"{args.model}: is a pre-trained model; expected one that `classify` or `answer` fine-tuned")
    predict, unfit = of_kinds[kind]
    if given := [f"--{name}" for name in unfit if getattr(args, name) is not None]:
        model = "a classifier" if kind == SequenceClassifier.kind else "an answerer"
        raise ValueError(f"{given[0]}: {args.model} is {model}, which takes no such input; leave it out")
    with autocast(processes.device, precision_of(args, processes)):
        predict(args, processes)


def make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Return the command line, and that of each command."""
    parser = ArgumentParser(prog="python -m finetune", description=__doc__, epilog=EPILOG)
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher, not used")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    made = {}
    of_each = {name: (module.__doc__, module.add_arguments, module.run) for name, module in _TASKS.items()}
    of_each["predict"] = (
        "Predict classes, numbers or answers, with a model that `classify` or `answer` trained.", _add_predict_arguments, _predict
    )  # fmt: skip
    for name in ("classify", "answer", "seq2seq", "predict", "generate", "score", "convert"):
        description, add_arguments, run = of_each[name]
        first_line = str(description).split("\n", 1)[0]
        sub = made[name] = commands.add_parser(name, help=first_line, description=description)
        add_arguments(sub)
        sub.set_defaults(run=run, prog=sub.prog)
    return parser, made


def parse(words: Sequence[str] | None = None) -> Any:
    """Return the flags' values; a recipe's where it has them and they are not given."""
    parser, commands = make_parser()
    args = parser.parse_args(words)
    if getattr(args, "recipe", None) is not None:
        commands[args.command].set_defaults(**seq2seq.RECIPES[args.recipe])
        args = parser.parse_args(words)
    return args


def main() -> int:
    """Entry point; returns the exit status."""
    args = parse()
    return run_with_processes(lambda processes: args.run(args, processes), args.prog)


if __name__ == "__main__":
    sys.exit(main())
