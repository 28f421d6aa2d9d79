"""GLUE's nine tasks: which columns of which of its own files, which metrics, and what the leaderboard is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import write_whole

TRAIN = "train.tsv"


@dataclass(frozen=True)
class GlueTask:
    """A task's folder, as GLUE's download has it."""

    text: str
    pair: str | None
    label: str
    metrics: tuple[str, ...] = ("accuracy",)
    """The official ones, of finetune.metrics; the score is their mean."""
    validation: tuple[tuple[str, str], ...] = (("", "dev.tsv"),)
    """Files, with the suffix of their metrics' names."""
    test: tuple[tuple[str, str], ...] = ()
    """Files, with the name of the prediction file."""
    labels: tuple[str, ...] = ("0", "1")
    """The classes; none where numbers are predicted."""
    numbered: tuple[int, int] | None = None
    """If train.tsv and dev.tsv have no header: the columns of text and label."""

    @property
    def is_regression(self) -> bool:
        """Whether numbers are predicted."""
        return not self.labels

    def test_columns(self, file: str) -> list[str]:
        """Text and pair of a test file."""
        if file == "diagnostic.tsv":
            return ["sentence1", "sentence2"]
        return [self.text] if self.pair is None else [self.text, self.pair]


_ENTAILMENT = ("entailment", "not_entailment")


def _test(name: str) -> tuple[tuple[str, str], ...]:
    return (("test.tsv", f"{name}.tsv"),)


GLUE: dict[str, GlueTask] = {
    "cola": GlueTask("sentence", None, "label", ("matthews",), test=_test("CoLA"), numbered=(3, 1)),
    "sst-2": GlueTask("sentence", None, "label", test=_test("SST-2")),
    "mrpc": GlueTask("#1 String", "#2 String", "Quality", ("accuracy", "f1"), test=_test("MRPC")),
    "sts-b": GlueTask(
        "sentence1", "sentence2", "score", ("pearson", "spearman"), test=_test("STS-B"), labels=()
    ),
    "qqp": GlueTask("question1", "question2", "is_duplicate", ("accuracy", "f1"), test=_test("QQP")),
    "mnli": GlueTask(
        "sentence1", "sentence2", "gold_label", labels=("contradiction", "entailment", "neutral"),
        validation=(("_matched", "dev_matched.tsv"), ("_mismatched", "dev_mismatched.tsv")),
        test=(("test_matched.tsv", "MNLI-m.tsv"), ("test_mismatched.tsv", "MNLI-mm.tsv"), ("diagnostic.tsv", "AX.tsv")),
    ),
    "qnli": GlueTask("question", "sentence", "label", test=_test("QNLI"), labels=_ENTAILMENT),
    "rte": GlueTask("sentence1", "sentence2", "label", test=_test("RTE"), labels=_ENTAILMENT),
    "wnli": GlueTask("sentence1", "sentence2", "label", test=_test("WNLI")),
}  # fmt: skip
SKIPPING = "qqp"
"""The task whose own train.tsv has some rows that are broken."""


def write_leaderboard_file(path: Path, predictions: Sequence[str] | Sequence[float]) -> None:
    """`index` and `prediction`, rows numbered from 0; STS-B's similarity within 0 to 5, with three decimals."""
    lines = (p if isinstance(p, str) else f"{min(max(p, 0.0), 5.0):.3f}" for p in predictions)
    content = "".join(f"{index}\t{line}\n" for index, line in enumerate(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"index\tprediction\n{content}".encode())
