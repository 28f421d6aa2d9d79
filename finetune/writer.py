"""A fine-tuned sequence-to-sequence model that writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.tokenizer import Tokenizer
from finetune.model import Seq2SeqModel
from finetune.processes import Processes
from finetune.search import Hypothesis, Rules, SearchSettings, decode, refuse_impossible
from finetune.seq2seq_data import make_sources
from finetune.seq2seq_model import Seq2SeqSettings, load_seq2seq


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
        """From a run's folder; `changes` of SearchSettings. Raises ValueError or OSError for what holds no such model."""
        model, tokenizer, task = load_seq2seq(Path(folder))
        own = task.search()
        if "num_beams" in changes and "num_best" not in changes:
            own = replace(own, num_best=1)
        return cls(model.to((processes or Processes()).device), tokenizer, task, replace(own, **changes))

    def write(self, sources: Sequence[str | tuple[str, ...]]) -> list[str]:
        """The best target of each source; for question generation a source is (paragraph, answer)."""
        parts = [(source,) if isinstance(source, str) else source for source in sources]
        ids, _ = make_sources(self.tokenizer, parts, self.task)
        found = decode(self.model, self.rules, ids, self.search)
        return [self.tokenizer.decode(of_one.hypotheses[0].tokens) for of_one in found]

    def record(self, hypotheses: Sequence[Hypothesis]) -> dict[str, Any]:
        """What is written of a source; without hypotheses, of an empty one."""
        rows = [
            {"text": self.tokenizer.decode(h.tokens), "score": round(h.score, 5), "log_probability": round(h.log_probability, 4),
             "tokens": h.num_tokens}
            for h in hypotheses
        ]  # fmt: skip
        best = {name: rows[0][name] if rows else empty for name, empty in (("text", ""), ("score", None))}
        return best if self.search.num_best == 1 else {**best, "n_best": rows}
