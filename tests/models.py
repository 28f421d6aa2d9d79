"""Tiny models for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from data_prep.tokenizer import Tokenizer
from pretrain.export import StoredModel
from pretrain.model import PMLM, PMLMConfig


def tiny_model(vocab_size: int, **numbers: float) -> PMLM:
    """A model in which every weight matters."""
    config = PMLMConfig.of_size("tiny", vocab_size=vocab_size, **{
        "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "max_positions": 40, "initializer_range": 0.2, "dropout": 0.1,
        "relative_max_distance": 20, **numbers,
    })  # fmt: skip
    torch.manual_seed(3)
    model = PMLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter += torch.randn_like(parameter) * 0.3
    return model


def stored(tokenizer: Tokenizer, **numbers: float) -> StoredModel:
    """A tiny model of this tokenizer, as if a run had trained it."""
    model = tiny_model(tokenizer.vocab_size, **numbers)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    origin = {"objective": "ae+par", "trained_steps": 12, "trained_samples": 96}
    return StoredModel(Path("nowhere"), model.config, weights, tokenizer, origin)
