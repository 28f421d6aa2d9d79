"""transformers' models of the sizes of ours, to measure against."""

from __future__ import annotations

from typing import Any

import transformers

from pretrain.model import PMLMConfig


def bert_config(config: PMLMConfig, **more: Any) -> transformers.BertConfig:
    """BERT's configuration of the same size, with torch's fused attention; `more`: other values of it."""
    return transformers.BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions, hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout, initializer_range=config.initializer_range, attn_implementation="sdpa", **more,
    )  # fmt: skip
