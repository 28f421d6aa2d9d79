"""Fine-tune a pre-trained model to answer questions with a span of a passage, on SQuAD's JSON, version 1.1 or 2.0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.console import ArgumentParser, add_flags
from data_prep.files import write_json
from finetune.answer_data import AnswerSettings, Windows, make_windows
from finetune.answer_model import Answer, Answerer
from finetune.identity import training_identity
from finetune.processes import Processes
from finetune.runs import StartSettings, add_train_flags, from_flags, load_start, say, settings_of, train_all
from finetune.squad import Question, SquadFile, best_threshold, read_squad, squad_metrics
from finetune.trainer import TrainSettings
from pretrain.model import PMLM

Answers = Mapping[str, tuple[list[Answer], float]]


class AnswerTask:
    """See finetune.trainer.Task."""

    score_name, score_sign = "f1", 1.0

    def __init__(
        self, answerer: Answerer, train: Windows, questions: Sequence[Question], validation: Windows, is_v2: bool
    ) -> None:
        """`questions`: those of `validation`."""
        self._answerer, self._train, self._is_v2 = answerer, train, is_v2
        self._questions, self._validation = questions, validation
        self.lengths = train.lengths

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """See Task."""
        return self._answerer.loss(self._train, samples)

    def validate(self) -> dict[str, float]:
        """See Task; chooses the threshold."""
        answers = by_question(self._questions, self._answerer.answers(self._questions, self._validation))
        if self._is_v2:
            texts = {key: best[0].text for key, (best, _) in answers.items()}
            self._answerer.threshold = best_threshold(self._questions, texts, no_answer_scores(answers))
        values = squad_metrics(self._questions, chosen(self._answerer, answers), self._is_v2)
        return {"score": values["f1"], **values}

    def save(self, folder: Path) -> None:
        """See Task."""
        self._answerer.save(folder)


def by_question(questions: Sequence[Question], answers: Sequence[tuple[list[Answer], float]]) -> Answers:
    """Return the answers by the questions' ids."""
    return {question.id: found for question, found in zip(questions, answers, strict=True)}


def no_answer_scores(answers: Answers) -> dict[str, float]:
    """Return by how much no answer scores more than the best one."""
    return {key: none - best[0].score for key, (best, none) in answers.items()}


def chosen(answerer: Answerer, answers: Answers) -> dict[str, str]:
    """Return the answers' texts, as the official script takes them."""
    return {key: answerer.choose(*found).text for key, found in answers.items()}


def write_predictions(folder: Path, answerer: Answerer, answers: Answers) -> None:
    """Write predictions.json and, of version 2.0, na_prob.json, as the official script takes them; nbest_predictions.json."""
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
    reading.stride(start.max_length_tokens)  # refuses what cannot be, before anything is read
    to_train, validated = read_squad(train_file), read_squad(validation_file)
    pretrained = load_start(start, processes)
    tokenizer = pretrained.tokenizer
    training = training_windows(
        to_train, make_windows(tokenizer, to_train.questions, start.max_length_tokens, reading), processes, reading
    )
    validation = make_windows(tokenizer, validated.questions, start.max_length_tokens, reading)
    if validated.num_unmatched:
        say(processes, f"warning: {validation_file}: {validated.num_unmatched:,} questions have answers that are not in the passage at "
            "answer_start; they are scored all the same")  # fmt: skip
    if to_train.is_v2 != validated.is_v2:
        versions = ["2.0" if file.is_v2 else "1.1" for file in (to_train, validated)]
        say(processes, f"warning: {train_file} is of SQuAD {versions[0]} and {validation_file} of {versions[1]}: whether there may be no "
            "answer is trained as in the one and scored as in the other")  # fmt: skip
    say(processes, f"{validation_file}: {len(validated.questions):,} questions in {len(validation):,} windows")
    identity = training_identity(
        pretrained.model, pretrained.pooler, pretrained.tokenizer, {"train": to_train.sha256, "validation": validated.sha256},
        {"name": "answer", "max_length_tokens": start.max_length_tokens, **vars(reading)},
    )  # fmt: skip
    questions, is_v2 = validated.questions, validated.is_v2
    del to_train, validated  # the texts of questions to train on are needed no more

    def make_task(model: PMLM, of_run: TrainSettings) -> tuple[nn.Module, AnswerTask]:
        answerer = Answerer.make(model, tokenizer, start.max_length_tokens, reading, processes, of_run.seed)
        return answerer.model, AnswerTask(answerer, training, questions, validation, is_v2)

    summary = train_all(start, settings, pretrained.model, identity, processes, make_task)
    best = Answerer.load(start.output, processes)
    answers = by_question(questions, best.answers(questions, validation))
    if processes.is_first:
        write_predictions(start.output / "validation", best, answers)
    return summary


def training_windows(file: SquadFile, windows: Windows, processes: Processes, reading: AnswerSettings) -> Windows:
    """Return the windows of questions whose answer is where it says, or that have none, and tell how many are left out.

    Raises ValueError if no question has an answer.
    """
    is_matched = [question.start is not None or not question.answers for question in file.questions]
    kept = [is_one and number not in windows.answerless for number, is_one in enumerate(is_matched)]
    total = len(file.questions)
    if unmatched := is_matched.count(False):
        say(processes, f"warning: {file.path}: {unmatched:,} of {total:,} questions are left out: their answer is not in the passage "
            "at answer_start")  # fmt: skip
    if lost := sum(is_matched) - sum(kept):
        say(processes, f"warning: {file.path}: {lost:,} of {total:,} questions are left out: their answer has more tokens than fit in a "
            f"window, or than --max_answer_tokens {reading.max_answer_tokens}")  # fmt: skip
    if not any(is_one and question.answers for is_one, question in zip(kept, file.questions, strict=True)):
        raise ValueError(
            f"{file.path}: none of its {total:,} questions has an answer at answer_start that fits in a window"
        )
    found = windows.take(kept)
    line = f"{file.path}: {sum(kept):,} questions in {len(found):,} windows"
    if windows.num_cut_questions:
        line += (
            f"; {windows.num_cut_questions:,} questions are cut to --max_question_tokens {reading.max_question_tokens}"
        )
    say(processes, line)
    return found


def predict(args: Any, processes: Processes) -> None:
    """Run `python -m finetune predict` with an answerer."""
    is_one = args.question is not None and args.passage is not None
    if (args.input is not None) == is_one or (args.question is None) != (args.passage is None):
        raise ValueError(
            "expected either --question and --passage, or --input, SQuAD's JSON, which an answerer answers"
        )
    answerer = Answerer.load(args.model, processes)
    if args.input is None:
        answer = answerer.predict(args.question, args.passage)
        if processes.is_first:
            print(json.dumps(vars(answer), ensure_ascii=False))
        return
    file = read_squad(args.input, needs_answers=False)
    answers = by_question(file.questions, answerer.answers(file.questions, answerer.windows(file.questions)))
    output = args.output or Path(args.model) / "predictions"
    if processes.is_first:
        write_predictions(output, answerer, answers)
    say(processes, f"{output}: predictions.json and others for {len(answers):,} questions")
    if file.is_labelled:
        values = squad_metrics(file.questions, chosen(answerer, answers), file.is_v2)
        say(processes, ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `python -m finetune answer`."""
    parser.add_argument("--train_file", type=Path, metavar="PATH", required=True, help="SQuAD's JSON to train on")
    parser.add_argument("--validation_file", type=Path, metavar="PATH", required=True,
                        help="SQuAD's JSON that the best weights and the threshold are chosen by")  # fmt: skip
    add_flags(parser, AnswerSettings)
    add_train_flags(parser, without=["grid"], output=Path("runs/answer"), epochs=4, max_length_tokens=384)


def run(args: Any, processes: Processes) -> None:
    """Run `python -m finetune answer`."""
    start, settings = settings_of(args)
    train(start, settings, from_flags(args, AnswerSettings), args.train_file, args.validation_file, processes)
    say(
        processes,
        f"{start.output}: answer with `python -m finetune predict --model {start.output} --question ... --passage ...`",
    )
