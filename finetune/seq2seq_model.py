"""A model that writes a target for a source, in its folder and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from data_prep.tokenizer import Tokenizer
from finetune.model import load_model, refuse_one_text, save_model
from finetune.processes import Processes
from finetune.search import decode
from finetune.search_settings import Hypothesis, Rules, SearchSettings, refuse_impossible
from finetune.seq2seq_data import Pair, Seq2SeqSettings, make_sources
from pretrain.layout import Layout
from pretrain.model import PMLM


class Seq2SeqModel(PMLM):
    """A PMLM with its pre-trained output layer, all of it under the released names. T target tokens."""

    kind: ClassVar[str] = "pmlm-seq2seq"

    def __init__(self, pretrained: PMLM) -> None:
        nn.Module.__init__(self)
        self.config, self.bert, self.cls = pretrained.config, pretrained.bert, pretrained.cls

    @classmethod
    def of_task(cls, pretrained: PMLM, task: dict[str, Any]) -> Self:
        """See TaskModel."""
        return cls(pretrained)

    def target_losses(self, layout: Layout, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of each target token of a `seq2seq_layout`, [T], and whether it is the likeliest."""
        return self.cls.predictions.losses(self.encode_predicted(layout), layout.targets_T, label_smoothing)


def save_seq2seq(folder: Path, model: Seq2SeqModel, tokenizer: Tokenizer, settings: Seq2SeqSettings) -> None:
    """Write a model's folder, see save_model."""
    save_model(folder, model, tokenizer, asdict(settings))


def load_seq2seq(folder: Path) -> tuple[Seq2SeqModel, Tokenizer, Seq2SeqSettings]:
    """Load, in eval mode, what `python -m finetune seq2seq` wrote; see load_model."""
    model, tokenizer, task = load_model(folder, Seq2SeqModel)
    return model, tokenizer, Seq2SeqSettings(**task)


class Writer:
    """A model that writes.

    from finetune import Writer
    print(Writer.load("runs/seq2seq").write(["The committee met on Monday ..."]))
    """

    def __init__(
        self, model: Seq2SeqModel, tokenizer: Tokenizer, task: Seq2SeqSettings, search: SearchSettings | None = None
    ) -> None:
        """`search`: other settings than the model's own. Raises ValueError for settings that the model cannot follow."""
        self.model, self.tokenizer, self.task = model.eval(), tokenizer, task
        self.search = search or task.search()
        self.rules = Rules.of(tokenizer, self.search)
        refuse_impossible(model, self.search, 0)

    @classmethod
    def load(cls, folder: Path | str, processes: Processes | None = None, **changes: Any) -> Writer:
        """Load one from a run's folder; `changes` of SearchSettings. Raises ValueError or OSError for what holds no such model."""
        model, tokenizer, task = load_seq2seq(Path(folder))
        own = task.search()
        if "num_beams" in changes and "num_best" not in changes:
            own = replace(own, num_best=1)
        return cls(model.to((processes or Processes()).device), tokenizer, task, replace(own, **changes))

    def ids(self, sources: Sequence[str | tuple[str, ...]]) -> list[list[int]]:
        """Return each source's tokens, as the model takes them. Raises ValueError, see `write`."""
        refuse_one_text("sources", sources)
        num_parts = 2 if self.task.question_generation else 1
        expected = "a paragraph and an answer" if num_parts == 2 else "one text"
        parts = [(source,) if isinstance(source, str) else tuple(source) for source in sources]
        for place, source in enumerate(parts):
            if len(source) != num_parts or not all(isinstance(part, str) and part.strip() for part in source):
                raise ValueError(
                    f"source {place + 1}: expected {expected}, none of it empty, found {len(source)} of them"
                )
        made = make_sources(self.tokenizer, [Pair(lambda: "", source) for source in parts], self.task)
        return [ids.tolist() for ids in made.sources]

    def write(self, sources: Sequence[str | tuple[str, ...]]) -> list[str]:
        """Return the best target of each source; for question generation a source is (paragraph, answer).

        Raises ValueError for one text instead of a list, an empty source, and a source that has not as many parts.
        """
        found = decode(self.model, self.rules, self.ids(sources), self.search)
        return [self.tokenizer.decode(of_one.hypotheses[0].tokens) for of_one in found]

    def record(self, hypotheses: Sequence[Hypothesis]) -> dict[str, Any]:
        """Return what is written of a source; without hypotheses, of an empty one."""
        rows = [
            {"text": self.tokenizer.decode(h.tokens), "score": round(h.score, 5), "log_probability": round(h.log_probability, 4),
             "tokens": h.num_tokens}
            for h in hypotheses
        ]  # fmt: skip
        best = {name: rows[0][name] if rows else empty for name, empty in (("text", ""), ("score", None))}
        return best if self.search.num_best == 1 else {**best, "n_best": rows}
