"""Questions about a passage: the span of it that answers, or that there is no answer.

A question is "[SOS] question [EOS] passage [EOS]". A passage too long for that is read in overlapping windows. Each token of
the passage has a score as start and as end; those of [SOS] say that the answer is not here.

Shapes: R slots needed ([SOS] and the passage) of a batch, W windows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.console import progress_bar
from data_prep.tokenizer import Tokenizer
from finetune.batches import prediction_batches
from finetune.classify_model import tokenize
from finetune.model import SpanClassifier, load_model, save_model
from finetune.processes import Processes
from finetune.squad import Question
from pretrain.layout import Layout, encoder_layout
from pretrain.model import PMLM


@dataclass(frozen=True)
class AnswerSettings:
    """How passages are read and answers chosen."""

    stride_tokens: int = 128
    """Tokens from the beginning of one window of a long passage to that of the next."""
    max_question_tokens: int = 64
    """Longer questions are cut."""
    max_answer_tokens: int = 30
    """Longer answers are not considered."""
    num_best: int = 20
    """Answers kept of each question."""

    def __post_init__(self) -> None:
        faults = [f"{name} is {value}, expected at least 1" for name, value in vars(self).items() if value < 1]
        if faults:
            raise ValueError("; ".join(faults))


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


@dataclass(frozen=True)
class Window:
    """A stretch of a question's passage, with the question, as the model takes it."""

    question: int
    ids: list[int]
    first: int
    """Token of the passage at which it begins."""
    num_tokens: int
    """Of the passage."""
    target: tuple[int, int] = (0, 0)
    """Places of the answer's first and last token among those needed; 0 is [SOS]."""

    @property
    def segments(self) -> list[int]:
        """0 for the question, 1 for the passage."""
        num_passage = self.num_tokens + 1
        return [0] * (len(self.ids) - num_passage) + [1] * num_passage

    @property
    def needed(self) -> list[int]:
        """[SOS] and the passage."""
        end = len(self.ids) - 1
        return [0, *range(end - self.num_tokens, end)]


@dataclass(frozen=True)
class Windows:
    """Questions as the model takes them."""

    questions: Sequence[Question]
    offsets: list[list[tuple[int, int]]]
    """Of each question's passage: the characters of its tokens."""
    windows: list[Window]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window."""
        return np.array([len(window.ids) for window in self.windows], dtype=np.int64)

    def layout(self, places: Sequence[int]) -> Layout:
        """Of some of the windows."""
        some = [self.windows[place] for place in places]
        return encoder_layout([w.ids for w in some], [w.segments for w in some], [w.needed for w in some])


def make_windows(
    tokenizer: Tokenizer, questions: Sequence[Question], max_length_tokens: int, settings: AnswerSettings
) -> Windows:
    """Tokenize, cut into windows, and find the answers' tokens. Raises ValueError where no room is left for passages."""
    if max_length_tokens - settings.max_question_tokens - 3 < 1:
        raise ValueError(
            f"--max_length_tokens {max_length_tokens}: leaves no room for a passage behind a question of "
            f"--max_question_tokens {settings.max_question_tokens}"
        )
    asked = tokenize(tokenizer, [question.text for question in questions])
    passages: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
    windows: list[Window] = []
    offsets: list[list[tuple[int, int]]] = []
    for number, question in enumerate(questions):
        if question.passage not in passages:
            ids, spans = tokenizer.encode_with_offsets(question.passage)
            passages[question.passage] = ids, [_without_spaces(question.passage, *span) for span in spans]
        ids, spans = passages[question.passage]
        offsets.append(spans)
        head = [tokenizer.sos_id, *asked[number][: settings.max_question_tokens], tokenizer.eos_id]
        room = max_length_tokens - len(head) - 1
        first_token, last_token = _tokens_of_answer(question, spans)
        for first in range(0, max(1, len(ids) - room + settings.stride_tokens), settings.stride_tokens):
            part = ids[first : first + room]
            is_inside = first <= first_token and last_token < first + len(part)
            target = (first_token - first + 1, last_token - first + 1) if is_inside else (0, 0)
            windows.append(Window(number, [*head, *part, tokenizer.eos_id], first, len(part), target))
            if first + room >= len(ids):
                break
    return Windows(questions, offsets, windows)


def _without_spaces(text: str, start: int, stop: int) -> tuple[int, int]:
    part = text[start:stop]
    return start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())


def _tokens_of_answer(question: Question, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer; -1 without one."""
    if question.start is None:
        return -1, -1
    stop = question.start + len(question.answers[0])
    inside = [place for place, (a, b) in enumerate(spans) if a < stop and b > question.start]
    return (inside[0], inside[-1]) if inside else (-1, -1)


class Answerer:
    """A model fine-tuned by `python -m finetune.answer`, or on its way there.

    from finetune import Answerer
    answerer = Answerer.load("runs/question_answering")
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
        """With a new output."""
        return cls(SpanClassifier(pretrained, seed), tokenizer, max_length_tokens, settings, processes)

    @classmethod
    def load(cls, folder: Path | str, processes: Processes | None = None) -> Answerer:
        """From a run's folder; raises ValueError or OSError for what holds none, or a damaged one."""
        model, tokenizer, task = load_model(Path(folder), SpanClassifier)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            model, tokenizer, task["max_length_tokens"], AnswerSettings(**task["answers"]), processes or Processes(device=device),
            task["threshold"],
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """So that `load` finds it."""
        task: dict[str, Any] = {
            "max_length_tokens": self.max_length_tokens, "answers": vars(self.settings), "threshold": self.threshold,
        }  # fmt: skip
        save_model(folder, self.model, self.tokenizer, task)

    def windows(self, questions: Sequence[Question]) -> Windows:
        """The questions as this model takes them."""
        return make_windows(self.tokenizer, questions, self.max_length_tokens, self.settings)

    def loss(self, windows: Windows, places: Sequence[int]) -> torch.Tensor:
        """Cross-entropy of start and end among [SOS] and the passage, their mean, added up over some of the windows."""
        layout = windows.layout(places)
        scores_R2 = self.model(layout.to(self._processes.device))
        losses = [
            F.cross_entropy(scores_R2[a:b].T, torch.tensor(windows.windows[place].target, device=scores_R2.device))
            for place, (a, b) in zip(places, pairwise(layout.predicted_edges), strict=True)
        ]
        return torch.stack(losses).sum()

    def answers(self, windows: Windows) -> list[tuple[list[Answer], float]]:
        """Of each question the best answers, best first, and the score of no answer; all processes take part."""
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
        of_questions: list[list[int]] = [[] for _ in windows.questions]
        for place, window in enumerate(windows.windows):
            of_questions[window.question].append(place)
        return [self._best(windows, number, places, of_windows) for number, places in enumerate(of_questions)]

    def _best(
        self, windows: Windows, number: int, places: Sequence[int], scores: dict[int, np.ndarray]
    ) -> tuple[list[Answer], float]:
        settings, spans = self.settings, windows.offsets[number]
        passage = windows.questions[number].passage
        none = min(float(scores[place][0].sum()) for place in places)
        found: dict[tuple[int, int], float] = {}
        for place in places:
            window, (starts, ends) = windows.windows[place], scores[place][1:].T
            for start in np.argsort(-starts, kind="stable")[: settings.num_best]:
                stop = min(len(ends), start + settings.max_answer_tokens)
                behind = ends[start:stop]
                for end in np.argsort(-behind, kind="stable")[: settings.num_best] + start:
                    span = spans[window.first + start][0], spans[window.first + end][1]
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

    def predict(self, question: str, passage: str) -> Answer:
        """The best answer; its text is empty where there is none."""
        self.model.eval()
        ((best, none),) = self.answers(self.windows([Question("", question, passage, (), None)]))
        return self.choose(best, none)

    def choose(self, best: Sequence[Answer], none: float) -> Answer:
        """The first, or that there is no answer."""
        return best[0] if self.threshold is None or none - best[0].score <= self.threshold else Answer("", none)
