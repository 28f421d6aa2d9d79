"""What the study trains, on what, and how: the only place with its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.study.tasks import Classification, QuestionAnswering, Sizes, Task, Writing
from finetune.classify_data import ColumnSettings
from finetune.seq2seq_data import Seq2SeqSettings

VOCAB_SIZE = 8000
TOKENIZER_SAMPLE_MB = 20
MAX_LENGTH_TOKENS = 128
MASK_SETS = 4
WRITING, TEXT_WITH_TARGETS = "debian-synopsis", "debian-descriptions"
"""The task whose targets are in the text for pre-training; those it is tested and chosen by are left out there."""
TEXTS = (
    "austen", "debian-descriptions", "dict-foldoc", "dict-gcide", "dict-jargon", "fortunes", "moby-dick", "sword-mhcc", "sword-web",
)  # fmt: skip
"""Of benchmarks.corpora: 74 MB."""

DEEPSPEED_CONFIG = "ds_configs/zero2_tiny.json"
TOTAL_STEPS = 8000
MODEL_FLAGS = ("--model", "tiny", "--max_positions", str(MAX_LENGTH_TOKENS))


@dataclass(frozen=True)
class Arm:
    """A way to pre-train, with one seed."""

    kind: str
    """Objective, and what else is special; arms of the same kind are the same but for the seed."""
    seed: int = 0
    flags: tuple[str, ...] = ()
    """Of run_pretrain.py, beside MODEL_FLAGS; none: not trained by it."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind.replace('+', '_').replace(' ', '_')}-{self.seed}"


def _pmlm(objective: str, seed: int = 0, *more: str, note: str = "") -> Arm:
    return Arm(f"{objective}{note}", seed, ("--objective", objective, "--seed", str(seed), *more))


REFERENCE = _pmlm("ae+par")
PMLMS = (
    REFERENCE,
    _pmlm("ae"),
    _pmlm("ae+par", 0, "--relative_buckets", "0", note=" no bias"),
    _pmlm("par"),
    _pmlm("ae+ar"),
    _pmlm("ar"),
    _pmlm("ae+par", 1),
    _pmlm("ae", 1),
)
"""The most wanted first, as a study may be left half done."""
BERT = Arm("bert")
RANDOM = Arm("random")

_BASICS: dict[str, Any] = {"micro_batch_size": 32, "batch_size": 32}
TASKS: tuple[Task, ...] = (
    Classification(
        "wordnet-lexname", "a noun's gloss: which of 26 fields of meaning", Sizes(2000, 500, 2000),
        {**_BASICS, "learning_rate": 5e-4, "epochs": 6}, ColumnSettings(), max_length_tokens=64,
    ),
    Classification(
        "bible-pairs", "two translations: the same verse or a neighbour", Sizes(4000, 366, 1000),
        {**_BASICS, "learning_rate": 5e-4, "epochs": 4}, ColumnSettings("text_a", "text_b"),
    ),
    QuestionAnswering(
        "wordnet-qa", "which of three glosses is of a field of meaning, or that none is", Sizes(2700, 200, 242),
        {"micro_batch_size": 16, "batch_size": 16, "learning_rate": 1e-3, "epochs": 3, "precision": "auto"}, max_length_tokens=MAX_LENGTH_TOKENS,
    ),
    Writing(
        WRITING, "a package's description: its synopsis", Sizes(25843, 300, 500),
        {"micro_batch_size": 16, "batch_size": 16, "learning_rate": 1.5e-3, "epochs": 1, "precision": "auto"},
        Seq2SeqSettings(96, 32),
    ),
)  # fmt: skip
FINETUNING_SEEDS = 3
