"""A model that finds the span of a passage that answers a question, or that there is no answer.

Each token of the passage has a score as start and as end; those of [SOS] say that the answer is not in this window.

Shapes: R slots needed ([SOS] and the passage) of a batch, W windows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.console import progress_bar
from data_prep.tokenizer import Tokenizer
from finetune.answer_data import AnswerSettings, Spans, Windows, encode_passage, make_windows
from finetune.batches import prediction_batches
from finetune.model import initialize, load_model, save_model
from finetune.processes import Processes
from finetune.squad import Question
from pretrain.layout import Layout
from pretrain.model import PMLM


class SpanClassifier(nn.Module):
    """The score of each slot as the start and as the end of an answer, [R, 2]."""

    kind: ClassVar[str] = "pmlm-question-answerer"

    def __init__(self, pretrained: PMLM, seed: int) -> None:
        super().__init__()
        self.config = pretrained.config
        self.bert = pretrained.bert
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        initialize([self.qa_outputs], self.config, seed)

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> Self:
        """See TaskModel."""
        return cls(pretrained, seed=0)

    def forward(self, layout: Layout) -> torch.Tensor:
        """Return the scores of the layout's needed slots, [R, 2]."""
        scores_R2: torch.Tensor = self.qa_outputs(self.bert(layout, is_predicted_only=True))
        return scores_R2.float()


@dataclass(frozen=True)
class Answer:
    """A candidate."""

    text: str
    """Empty: no answer."""
    score: float
    """Start and end, added up."""
    start: int = 0
    """Character of the passage at which it begins."""
    probability: float = 0.0
    """Among the candidates kept."""


class Answerer:
    """A model fine-tuned by `python -m finetune answer`, or on its way there.

    from finetune import Answerer
    answerer = Answerer.load("runs/answer")
    print(answerer.predict("Who must be in want of a wife?", "A single man in possession of a good fortune ...").text)
    """

    def __init__(
        self, model: SpanClassifier, tokenizer: Tokenizer, max_length_tokens: int, settings: AnswerSettings,
        processes: Processes, threshold: float | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model.to(processes.device), tokenizer
        self.max_length_tokens, self.settings, self._processes = max_length_tokens, settings, processes
        self.threshold = threshold
        """No answer where [SOS]'s score less the best answer's is above it; None: there is always one."""

    @classmethod
    def make(
        cls, pretrained: PMLM, tokenizer: Tokenizer, max_length_tokens: int, settings: AnswerSettings, processes: Processes, seed: int
    ) -> Answerer:  # fmt: skip
        """Return one with a new output."""
        return cls(SpanClassifier(pretrained, seed), tokenizer, max_length_tokens, settings, processes)

    @classmethod
    def load(cls, folder: Path | str, processes: Processes | None = None) -> Answerer:
        """Load one from a run's folder; raises ValueError or OSError for what holds none, or a damaged one."""
        model, tokenizer, task = load_model(Path(folder), SpanClassifier)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            model, tokenizer, task["max_length_tokens"], AnswerSettings(**task["answers"]), processes or Processes(device=device),
            task["threshold"],
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write it so that `load` finds it."""
        task: dict[str, Any] = {
            "max_length_tokens": self.max_length_tokens, "answers": vars(self.settings), "threshold": self.threshold,
        }  # fmt: skip
        save_model(folder, self.model, self.tokenizer, task)

    def windows(self, questions: Sequence[Question]) -> Windows:
        """Return the questions as this model takes them."""
        return make_windows(self.tokenizer, questions, self.max_length_tokens, self.settings)

    def loss(self, windows: Windows, places: Sequence[int]) -> torch.Tensor:
        """Return the cross-entropy of start and end among [SOS] and the passage, their mean, added up over some of the windows."""
        layout = windows.layout(places)
        scores_R2 = self.model(layout.to(self._processes.device))
        targets_W2 = torch.from_numpy(windows.targets_W2[list(places)].astype(np.int64)).to(scores_R2.device)
        losses = [
            F.cross_entropy(scores_R2[a:b].T, target_2)
            for target_2, (a, b) in zip(targets_W2, pairwise(layout.predicted_edges), strict=True)
        ]
        return torch.stack(losses).sum()

    def answers(self, questions: Sequence[Question], windows: Windows) -> list[tuple[list[Answer], float]]:
        """Return of each question the best answers, best first, and the score of no answer; all processes take part.

        The score of no answer is the smallest of its windows': there is none only if no window has it.
        """
        processes, lengths = self._processes, windows.lengths
        mine: list[tuple[int, np.ndarray]] = []
        bar = progress_bar("answering", len(lengths), "window", is_shown=processes.is_first, is_lasting=False)
        with bar, torch.no_grad():
            for turn, batch in enumerate(prediction_batches(lengths)):
                if turn % processes.world_size == processes.rank:
                    layout = windows.layout(batch.tolist())
                    scores_R2 = self.model(layout.to(processes.device)).float().cpu().numpy()
                    edges = zip(batch.tolist(), pairwise(layout.predicted_edges), strict=True)
                    mine += [(place, scores_R2[a:b]) for place, (a, b) in edges]
                bar.update(len(batch))
        of_windows: dict[int, np.ndarray] = {}
        for part in processes.gather(mine):
            of_windows.update(part)
        of_questions: list[list[int]] = [[] for _ in questions]
        for place, question in enumerate(windows.question_of_W.tolist()):
            of_questions[question].append(place)
        found, passage, spans = [], None, Spans()
        for question, places in zip(questions, of_questions, strict=True):
            if question.passage != passage:
                passage = question.passage
                _, spans = encode_passage(self.tokenizer, passage)
            scores = [(int(windows.first_W[place]), of_windows[place]) for place in places]
            found.append(best_answers(question.passage, spans, scores, self.settings))
        return found

    def predict(self, question: str, passage: str) -> Answer:
        """Return the best answer; its text is empty if there is none. Raises ValueError for anything but two texts."""
        if not isinstance(question, str) or not isinstance(passage, str):
            raise ValueError(
                f"found {type(question).__name__} and {type(passage).__name__}, expected a question and a passage, two texts"
            )
        self.model.eval()
        questions = [Question("", question, passage, (), None)]
        ((best, none),) = self.answers(questions, self.windows(questions))
        return self.choose(best, none)

    def choose(self, best: Sequence[Answer], none: float) -> Answer:
        """Return the first, or that there is no answer."""
        return best[0] if self.threshold is None or none - best[0].score <= self.threshold else Answer("", none)


def best_answers(
    passage: str, spans: Spans, windows: Sequence[tuple[int, np.ndarray]], settings: AnswerSettings
) -> tuple[list[Answer], float]:
    """Return a question's best answers, best first, and the score of no answer.

    `windows`: of each the passage's token at which it begins, and the scores of [SOS] and the passage's tokens, [1 + tokens, 2].
    """
    none = min(float(scores[0].sum()) for _, scores in windows)
    found: dict[tuple[int, int], float] = {}
    for first, scores in windows:
        starts, ends = scores[1:].T
        for start in np.argsort(-starts, kind="stable")[: settings.num_best]:
            stop = min(len(ends), start + settings.max_answer_tokens)
            after = ends[start:stop]
            for end in np.argsort(-after, kind="stable")[: settings.num_best] + start:
                span = spans[first + start][0], spans[first + end][1]
                score = float(starts[start] + ends[end])
                if span[0] < span[1] and score > found.get(span, -math.inf):
                    found[span] = score
    best = heapq.nsmallest(settings.num_best, found.items(), key=lambda item: (-item[1], item[0]))
    if not best:
        return [Answer("", none, probability=1.0)], none
    exponents = np.exp(np.array([score for _, score in best]) - best[0][1])
    return [
        Answer(passage[start:stop], score, start, float(exponent / exponents.sum()))
        for ((start, stop), score), exponent in zip(best, exponents, strict=True)
    ], none  # fmt: skip
