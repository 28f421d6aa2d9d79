"""python -m finetune.answer: the span of a passage that answers a question.

train    fine-tune a pre-trained model on SQuAD's JSON, version 1.1 or 2.0
predict  answer a question given in the command line, or a file of SQuAD's JSON in the official format
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.console import add_flags, flag_values
from data_prep.files import write_json
from finetune.answer_model import Answer, Answerer, AnswerSettings, Windows
from finetune.processes import Processes
from finetune.runs import (
    StartSettings,
    add_train_flags,
    command_parser,
    fingerprint,
    load_start,
    run_with_processes,
    say,
    settings_of,
    train_all,
)
from finetune.squad import Question, SquadFile, best_threshold, read_squad, squad_metrics
from finetune.trainer import TrainSettings
from pretrain.model import PMLM

Answers = Mapping[str, tuple[list[Answer], float]]


class AnswerTask:
    """See finetune.trainer.Task."""

    def __init__(self, answerer: Answerer, train: Windows, validation: Windows, is_v2: bool) -> None:
        self._answerer, self._train, self._validation, self._is_v2 = answerer, train, validation, is_v2
        self.lengths = train.lengths

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """See Task."""
        return self._answerer.loss(self._train, samples)

    def validate(self) -> dict[str, float]:
        """See Task; chooses the threshold."""
        questions = self._validation.questions
        answers = by_question(questions, self._answerer.answers(self._validation))
        if self._is_v2:
            texts = {key: best[0].text for key, (best, _) in answers.items()}
            self._answerer.threshold = best_threshold(questions, texts, no_answer_scores(answers))
        values = squad_metrics(questions, chosen(self._answerer, answers), self._is_v2)
        return {"score": values["f1"], **values}

    def save(self, folder: Path) -> None:
        """See Task."""
        self._answerer.save(folder)


def by_question(questions: Sequence[Question], answers: Sequence[tuple[list[Answer], float]]) -> Answers:
    """By the questions' ids."""
    return {question.id: found for question, found in zip(questions, answers, strict=True)}


def no_answer_scores(answers: Answers) -> dict[str, float]:
    """By how much no answer scores more than the best one."""
    return {key: none - best[0].score for key, (best, none) in answers.items()}


def chosen(answerer: Answerer, answers: Answers) -> dict[str, str]:
    """The answers' texts, as the official script takes them."""
    return {key: answerer.choose(*found).text for key, found in answers.items()}


def write_predictions(folder: Path, answerer: Answerer, answers: Answers) -> None:
    """predictions.json and, of version 2.0, na_prob.json, as the official script takes them; nbest_predictions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "predictions.json", chosen(answerer, answers))
    write_json(folder / "nbest_predictions.json", {key: [vars(a) for a in best] for key, (best, _) in answers.items()})
    if answerer.threshold is not None:
        scores = no_answer_scores(answers)
        odds = {key: 1 / (1 + float(np.exp(-np.clip(score, -50, 50)))) for key, score in scores.items()}
        write_json(folder / "na_prob.json", odds)


def train(
    start: StartSettings, settings: TrainSettings, reading: AnswerSettings, train_file: Path, validation_file: Path,
    processes: Processes | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune, and write the predictions for the validation file; returns the summary."""
    processes = processes or Processes()
    files = {path: read_squad(path) for path in (train_file, validation_file)}
    pretrained = load_start(start, processes)

    def answerer_of(model: PMLM, seed: int) -> Answerer:
        return Answerer.make(model, pretrained.tokenizer, start.max_length_tokens, reading, processes, seed)

    maker = answerer_of(pretrained.model, 0)
    training = maker.windows(usable(files[train_file], processes))
    if num_unmatched := files[validation_file].num_unmatched:
        say(processes, f"warning: {validation_file}: {num_unmatched:,} questions have answers that are not in the passage at "
            "answer_start; they are scored all the same")  # fmt: skip
    validation = maker.windows(files[validation_file].questions)
    say(processes, *(
        f"{path}: {len(w.questions):,} questions in {len(w.windows):,} windows"
        for path, w in ((train_file, training), (validation_file, validation))
    ))  # fmt: skip
    is_v2 = files[validation_file].is_v2

    def make_task(model: PMLM, of_run: TrainSettings) -> tuple[nn.Module, AnswerTask]:
        answerer = answerer_of(model, of_run.seed)
        return answerer.model, AnswerTask(answerer, training, validation, is_v2)

    identity = {
        "max_length_tokens": start.max_length_tokens, **vars(reading), **fingerprint(pretrained.model.bert, [*files]),
    }  # fmt: skip
    summary = train_all(start, settings, pretrained.model, identity, processes, make_task)
    best = Answerer.load(start.output, processes)
    answers = by_question(validation.questions, best.answers(validation))
    if processes.is_first:
        write_predictions(start.output / "validation", best, answers)
    return summary


def usable(file: SquadFile, processes: Processes) -> list[Question]:
    """Those whose answer is where it says, or that have none; the others are counted."""
    kept = [question for question in file.questions if question.start is not None or not question.answers]
    if not file.is_v2:
        kept = [question for question in kept if question.answers]
    if num_left_out := len(file.questions) - len(kept):
        say(processes, f"warning: {file.path}: {num_left_out:,} of {len(file.questions):,} questions are left out: "
            "their answer is not in the passage at answer_start")  # fmt: skip
    if not kept:
        raise ValueError(f"{file.path}: none of its {len(file.questions)} questions has an answer at answer_start")
    return kept


def predict(args: Any, processes: Processes) -> None:
    """The command."""
    if (args.file is None) == (args.question is None or args.passage is None):
        raise ValueError("expected either --question and --passage, or --file")
    answerer = Answerer.load(args.model, processes)
    if args.file is None:
        answer = answerer.predict(args.question, args.passage)
        if processes.is_first:
            print(json.dumps(vars(answer), ensure_ascii=False))
        return
    file = read_squad(args.file, needs_answers=False)
    answers = by_question(file.questions, answerer.answers(answerer.windows(file.questions)))
    output = args.output or Path(args.model) / "predictions"
    if processes.is_first:
        write_predictions(output, answerer, answers)
    say(processes, f"{output}: predictions.json and others for {len(answers):,} questions")
    if any(question.answers for question in file.questions):
        values = squad_metrics(file.questions, chosen(answerer, answers), file.is_v2)
        say(processes, ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


def main() -> int:
    """Entry point; returns the exit status."""
    parser = command_parser("python -m finetune.answer", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="fine-tune", description="Fine-tune a pre-trained model.")
    training.add_argument("--train_file", type=Path, metavar="PATH", required=True, help="SQuAD's JSON to train on")
    training.add_argument("--validation_file", type=Path, metavar="PATH", required=True,
                          help="SQuAD's JSON that the best weights and the threshold are chosen by")  # fmt: skip
    add_flags(training, AnswerSettings)
    add_train_flags(training, without=["grid"], output=Path("runs/question_answering"), epochs=4, max_length_tokens=384)
    predicting = commands.add_parser("predict", help="predict", description="Answer questions.")
    predicting.add_argument("--model", type=Path, default=Path("runs/question_answering"), help="what `train` wrote")
    predicting.add_argument("--question", metavar="TEXT", help="the question")
    predicting.add_argument("--passage", metavar="TEXT", help="where the answer is to be found")
    predicting.add_argument("--file", type=Path, metavar="PATH", help="SQuAD's JSON, with or without answers")
    predicting.add_argument("--output", type=Path, metavar="PATH", help="folder for the predictions for --file")
    args = parser.parse_args()

    def command(processes: Processes) -> None:
        if args.command == "predict":
            predict(args, processes)
            return
        start, settings = settings_of(args)
        reading = AnswerSettings(**flag_values(args, [field.name for field in fields(AnswerSettings)]))
        train(start, settings, reading, args.train_file, args.validation_file, processes)

    return run_with_processes(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
