"""A pre-trained model to a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.answer_model import Answerer as Answerer
    from finetune.classify_model import Classifier as Classifier
    from finetune.seq2seq_model import Writer as Writer

__all__ = ["Answerer", "Classifier", "Writer"]
_MODULES = {"Answerer": "answer_model", "Classifier": "classify_model", "Writer": "seq2seq_model"}


def __getattr__(name: str) -> Any:
    """Return one of these, loaded at its first use."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_MODULES[name]}"), name)
