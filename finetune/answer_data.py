"""Questions about passages as the model takes them.

A question is "[SOS] question [EOS] passage [EOS]". A passage too long for that is read in overlapping windows, so that every
answer of up to `max_answer_tokens` tokens is whole in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.tokenizer import Tokenizer
from finetune.squad import Question
from finetune.tokens import TokenLists, TokenListsBuilder, in_chunks, tokenize
from pretrain.layout import Layout, encoder_layout

_LARGEST_STRIDE_TOKENS = 128
Spans = list[tuple[int, int]]
"""Of each token of a passage: the characters it stands for."""


@dataclass(frozen=True)
class AnswerSettings:
    """How passages are read and answers chosen."""

    stride_tokens: int | None = None
    """Tokens from the beginning of one window of a long passage to that of the next; by default 128, or as many as leave an answer of --max_answer_tokens in one window."""
    max_question_tokens: int = 64
    """Longer questions are cut."""
    max_answer_tokens: int = 30
    """Longer answers are not considered."""
    num_best: int = 20
    """Answers kept of each question."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {value}, expected at least 1"
            for name, value in vars(self).items()
            if value is not None and value < 1
        ]
        if faults:
            raise ValueError("; ".join(faults))

    def stride(self, max_length_tokens: int) -> int:
        """Return the tokens from one window to the next.

        Raises ValueError where no room is left for a passage, and for a stride that would leave tokens of the passage, or an
        answer of `max_answer_tokens`, in no window.
        """
        room = max_length_tokens - self.max_question_tokens - 3
        largest = room - self.max_answer_tokens + 1
        given = f"--max_length_tokens {max_length_tokens} leaves {max(0, room)} tokens for a passage beside a question of --max_question_tokens {self.max_question_tokens}"
        if largest < 1:
            raise ValueError(
                f"{given}, expected at least --max_answer_tokens {self.max_answer_tokens}; raise the first, or lower the others"
            )
        if self.stride_tokens is not None and self.stride_tokens > largest:
            raise ValueError(
                f"--stride_tokens {self.stride_tokens}: {given}, and answers have up to --max_answer_tokens {self.max_answer_tokens}; expected at "
                f"most {largest}, so that each is in a window"
            )
        return self.stride_tokens or min(_LARGEST_STRIDE_TOKENS, largest)


@dataclass(frozen=True)
class Windows:
    """Stretches of questions' passages, each with its question. W windows."""

    questions: TokenLists
    """Tokens of each question, cut."""
    passages: TokenLists
    """Tokens of each passage, every passage once."""
    passage_of: np.ndarray
    """Of each question its passage."""
    question_of_W: np.ndarray
    first_W: np.ndarray
    """Token of the passage at which a window begins."""
    num_tokens_W: np.ndarray
    """Tokens of the passage in a window."""
    targets_W2: np.ndarray
    """Places of the answer's first and last token among those needed; 0, which is [SOS], where it is not in the window."""
    special: tuple[int, int]
    """Ids of [SOS] and [EOS]."""
    num_cut_questions: int
    answerless: frozenset[int]
    """Questions whose answer is in no window, or no token's."""

    def __len__(self) -> int:
        return len(self.question_of_W)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window."""
        lengths_W: np.ndarray = self.questions.lengths[self.question_of_W] + self.num_tokens_W.astype(np.int64) + 3
        return lengths_W

    def ids(self, window: int) -> list[int]:
        """Return a window's tokens, special ones included."""
        question, first = int(self.question_of_W[window]), int(self.first_W[window])
        part = self.passages[int(self.passage_of[question])][first : first + int(self.num_tokens_W[window])]
        sos, eos = self.special
        return [sos, *self.questions[question].tolist(), eos, *part.tolist(), eos]

    def segments(self, window: int) -> list[int]:
        """Return 0 for each token of the question, 1 for each of the passage."""
        num_question = len(self.questions[int(self.question_of_W[window])]) + 2
        return [0] * num_question + [1] * (int(self.num_tokens_W[window]) + 1)

    def needed(self, window: int) -> list[int]:
        """Return the places of [SOS] and the passage's tokens."""
        start = len(self.questions[int(self.question_of_W[window])]) + 2
        return [0, *range(start, start + int(self.num_tokens_W[window]))]

    def layout(self, windows: Sequence[int]) -> Layout:
        """Return the layout of some of the windows."""
        return encoder_layout(*([of(window) for window in windows] for of in (self.ids, self.segments, self.needed)))

    def take(self, kept: Sequence[bool]) -> Windows:
        """Return the windows of some questions; the questions keep their numbers."""
        is_kept_W = np.asarray(kept, dtype=bool)[self.question_of_W]
        return Windows(
            self.questions, self.passages, self.passage_of, self.question_of_W[is_kept_W], self.first_W[is_kept_W],
            self.num_tokens_W[is_kept_W], self.targets_W2[is_kept_W], self.special, self.num_cut_questions, self.answerless,
        )  # fmt: skip


def make_windows(
    tokenizer: Tokenizer, questions: Sequence[Question], max_length_tokens: int, settings: AnswerSettings
) -> Windows:
    """Tokenize, cut into windows, and find the answers' tokens. Raises ValueError, see AnswerSettings.stride."""
    stride = settings.stride(max_length_tokens)
    asked, passages = (TokenListsBuilder(tokenizer.vocab_size) for _ in range(2))
    numbers: dict[str, int] = {}
    passage_of, rows = list[int](), list[tuple[int, int, int, int, int]]()
    num_cut, answerless = 0, set[int]()
    for chunk in in_chunks(enumerate(questions)):
        of_questions = tokenize(tokenizer, [question.text for _, question in chunk])
        num_cut += sum(len(ids) > settings.max_question_tokens for ids in of_questions)
        of_questions = [ids[: settings.max_question_tokens] for ids in of_questions]
        asked.add(of_questions)
        passage, ids, spans = None, list[int](), Spans()
        for (number, question), of_question in zip(chunk, of_questions, strict=True):
            if question.passage != passage:  # questions of a passage follow one another
                passage = question.passage
                ids, spans = encode_passage(tokenizer, passage)
                if passage not in numbers:
                    numbers[passage] = len(numbers)
                    passages.add([ids])
            passage_of.append(numbers[question.passage])
            found = _windows_of(
                len(ids), max_length_tokens - len(of_question) - 3, stride, *_tokens_of_answer(question, spans)
            )
            rows += [(number, *window) for window in found]
            if question.answers and not any(first for *_, first, _ in found):
                answerless.add(number)
    table = np.array(rows, dtype=np.int32).reshape(-1, 5)
    return Windows(
        asked.build(), passages.build(), np.array(passage_of, dtype=np.int32), table[:, 0], table[:, 1], table[:, 2], table[:, 3:],
        (tokenizer.sos_id, tokenizer.eos_id), num_cut, frozenset(answerless),
    )  # fmt: skip


def _windows_of(
    num_tokens: int, room: int, stride: int, first_token: int, last_token: int
) -> list[tuple[int, int, int, int]]:
    """Return of each window of a passage its first token, how many it has, and where the answer is in it."""
    found = []
    for first in range(0, max(1, num_tokens - room + stride), stride):
        stop = min(first + room, num_tokens)
        is_inside = first <= first_token and last_token < stop
        found.append(
            (first, stop - first, *((first_token - first + 1, last_token - first + 1) if is_inside else (0, 0)))
        )
        if stop == num_tokens:
            break
    return found


def encode_passage(tokenizer: Tokenizer, passage: str) -> tuple[list[int], Spans]:
    """Return a passage's tokens, and of each the characters that it stands for, without spaces at their ends."""
    ids, spans = tokenizer.encode_with_offsets(passage)
    return ids, [_without_spaces(passage, *span) for span in spans]


def _without_spaces(text: str, start: int, stop: int) -> tuple[int, int]:
    part = text[start:stop]
    return start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())


def _tokens_of_answer(question: Question, spans: Spans) -> tuple[int, int]:
    """Return first and last token of the first answer; -1 without one."""
    if question.start is None:
        return -1, -1
    stop = question.start + len(question.answers[0])
    inside = [place for place, (a, b) in enumerate(spans) if a < stop and b > question.start]
    return (inside[0], inside[-1]) if inside else (-1, -1)
