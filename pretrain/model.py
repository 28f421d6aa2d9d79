"""The PMLM: a post-LayerNorm BERT with T5's relative position bias over a layout's slots.

Modules are named as in the released UniLMv2 checkpoints, so their tensors load by name. The model knows no trainer.

Shapes: N slots of a batch, R of them predicted from, H hidden size, T predictions, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.attention import Attention, AttentionBackend, RelativePositionBias, choose_backend, make_attention
from pretrain.cross_entropy import cross_entropy_in_chunks
from pretrain.dropout import Dropout
from pretrain.layout import Layout, few_sizes

ModelSize = Literal["tiny", "small", "base", "large"]
_SIZES: dict[ModelSize, dict[str, float]] = {
    "tiny": {  # what it learns best with: docs/results.md
        "num_layers": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 512,
        "dropout": 0.0,
        "initializer_range": 0.05,
    },
    "small": {"num_layers": 6, "hidden_size": 384, "num_heads": 6, "intermediate_size": 1536},
    "base": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
    "large": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096},
}
_GREATEST = 10**9  # of all that is counted


@dataclass(frozen=True)
class PMLMConfig:
    """The numbers of a model; the defaults are base."""

    vocab_size: int
    """Entries of the vocabulary, special tokens included; taken from the data."""
    num_layers: int = 12
    """Transformer layers."""
    hidden_size: int = 768
    """Width of a slot's vector."""
    num_heads: int = 12
    """Attention heads; they share the hidden size."""
    intermediate_size: int = 3072
    """Width inside a feed-forward block."""
    max_positions: int = 512
    """Entries of the position table: the longest text."""
    dropout: float = 0.1
    """Dropout on hidden vectors and attention probabilities."""
    relative_buckets: int = 32
    """Buckets of the relative position bias; 0 = no such bias."""
    relative_max_distance: int = 128
    """Distance from which on all positions share a bucket."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        counts = ("vocab_size", "num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions")
        faults = [
            f"{name} is {getattr(self, name)}, expected at least 1 and at most {_GREATEST}"
            for name in counts
            if not 1 <= getattr(self, name) <= _GREATEST
        ]
        if not faults and self.hidden_size % self.num_heads:
            faults.append(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout is {self.dropout}, expected 0 or more and less than 1")
        if not 0 < self.initializer_range <= 1:
            faults.append(f"initializer_range is {self.initializer_range}, expected more than 0 and at most 1")
        if self.relative_buckets % 4 or not 0 <= self.relative_buckets <= _GREATEST:
            faults.append(f"relative_buckets is {self.relative_buckets}, expected a multiple of 4, or 0 for no bias")
        elif self.relative_max_distance > _GREATEST:
            faults.append(f"relative_max_distance is {self.relative_max_distance}, expected at most {_GREATEST}")
        elif self.relative_buckets and self.relative_max_distance <= self.relative_buckets // 4:
            faults.append(
                f"relative_max_distance is {self.relative_max_distance}, expected more than a quarter of relative_buckets"
            )
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def of_size(cls, size: ModelSize, **numbers: Any) -> PMLMConfig:
        """The configuration of a named size, any number of it replaced."""
        if size not in get_args(ModelSize):
            raise ValueError(f"no model size {size!r}; expected one of {', '.join(get_args(ModelSize))}")
        return cls(**{**_SIZES[size], **numbers})


class PretrainingLosses(NamedTuple):
    """Sums over the T predicted tokens (not means: the trainer knows how many there are in the whole batch)."""

    ae_sum: torch.Tensor
    par_sum: torch.Tensor
    ae_correct: torch.Tensor
    par_correct: torch.Tensor


class PMLM(nn.Module):
    """A pseudo-masked language model."""

    def __init__(
        self, config: PMLMConfig, attention: AttentionBackend = "auto", activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.bert = _Bert(config)
        self.bert.encoder.attention = attention
        self.bert.encoder.activation_checkpointing = activation_checkpointing
        self.cls = _Heads(config, self.bert.embeddings.word_embeddings)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, RelativePositionBias)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def compile_layers(self) -> None:
        """Have torch compile a layer at its first use; all layers share the code, for each shape of batch its own."""
        for layer in self.bert.encoder.layer:
            layer.compile(dynamic=False)

    def encode(self, layout: Layout) -> torch.Tensor:
        """The last layer's vectors of all slots, [N, H]."""
        hidden_NH: torch.Tensor = self.bert(layout)
        return hidden_NH

    def encode_predicted(self, layout: Layout, attention: Attention | None = None) -> torch.Tensor:
        """Those of the slots that are predicted from, [R, H]; the last layer computes no others.

        `attention`: in place of the layout's own, one that remembers earlier slots (finetune/search.py).
        """
        hidden_RH: torch.Tensor = self.bert(layout, is_predicted_only=True, attention=attention)
        return hidden_RH

    def predict(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, [T, V]."""
        logits_TV: torch.Tensor = self.cls.predictions(hidden_TH)
        return logits_TV

    def forward(self, layout: Layout) -> PretrainingLosses | torch.Tensor:
        """Cross-entropy of the layout's targets, AE and PAR; the head runs on the predicted slots alone. Of a layout without
        targets the logits of those slots, [R, V]: here, as ZeRO stage 3 has weights in `forward` alone."""
        hidden_RH = self.encode_predicted(layout)
        if layout.ae_places_T is None and layout.par_places_T is None:
            return self.predict(hidden_RH)
        places = [p for p in (layout.ae_places_T, layout.par_places_T) if p is not None]
        losses, correct = self.cls.predictions.losses(
            hidden_RH.index_select(0, torch.cat(places)), layout.targets_T.repeat(len(places))
        )
        losses, correct = losses.split(layout.num_targets), correct.split(layout.num_targets)
        zero = hidden_RH.new_zeros(())
        has_ae, has_par = layout.ae_places_T is not None, layout.par_places_T is not None
        return PretrainingLosses(
            ae_sum=losses[0].sum() if has_ae else zero,
            par_sum=losses[-1].sum() if has_par else zero,
            ae_correct=correct[0].sum() if has_ae else zero,
            par_correct=correct[-1].sum() if has_par else zero,
        )


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: not for biases, LayerNorm and the relative position bias."""
    return parameter.ndim >= 2 and "rel_pos_bias" not in name


def layer_norm(size: int) -> nn.Module:
    """Return a LayerNorm with BERT's eps; NVIDIA apex's fused one if a real apex with CUDA is installed."""
    if torch.cuda.is_available() and nvidia_apex_folder() is not None:
        from apex.normalization import FusedLayerNorm  # type: ignore[import-not-found]

        return FusedLayerNorm(size, eps=1e-12)  # type: ignore[no-any-return]
    return _LayerNorm(size, eps=1e-12)


class _LayerNorm(nn.LayerNorm):
    """LayerNorm whose gradient is summed over slots in fp32.

    On CPUs torch sums it in the precision of the weight, and in bf16 loses a third of it over 16,000 slots.
    """

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        if vectors.is_cuda or vectors.element_size() > 2:
            return super().forward(vectors)
        return _Norm.apply(vectors, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, vectors_NH: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor, eps: float
    ) -> torch.Tensor:
        result_NH, *statistics = torch.native_layer_norm(vectors_NH, weight_H.shape, weight_H, bias_H, eps)
        ctx.save_for_backward(vectors_NH, weight_H, bias_H, *statistics)
        ctx.eps = eps
        return result_NH

    @staticmethod
    def backward(ctx: Any, d_result_NH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        vectors_NH, weight_H, bias_H, mean_N1, inverse_std_N1 = ctx.saved_tensors
        d_vectors_NH, _, _ = torch.ops.aten.native_layer_norm_backward(
            d_result_NH, vectors_NH, weight_H.shape, mean_N1, inverse_std_N1, weight_H, bias_H, [True, False, False]
        )
        # `sum` adds up in fp32 whatever it is given, and is faster in 16 bits than with dtype=torch.float32.
        d_weight_H = F.layer_norm(vectors_NH, weight_H.shape, eps=ctx.eps).mul_(d_result_NH).sum(0)
        return d_vectors_NH, d_weight_H.to(weight_H.dtype), d_result_NH.sum(0).to(bias_H.dtype), None


class _Embedding(nn.Embedding):
    """Embedding table whose gradient is summed over slots in fp32, which torch on CPUs does not do in fp16 and bf16."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.is_cuda or self.weight.element_size() > 2:
            return super().forward(ids)
        return _LookUp.apply(self.weight, ids)  # type: ignore[no-any-return]


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids_N)
        ctx.num_rows = len(weight_VH)
        return F.embedding(ids_N, weight_VH)

    @staticmethod
    def backward(ctx: Any, d_vectors_NH: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (ids_N,) = ctx.saved_tensors
        sums_VH = torch.ops.aten.embedding_dense_backward(d_vectors_NH.float(), ids_N, ctx.num_rows, -1, False)
        return sums_VH.to(d_vectors_NH.dtype), None


def nvidia_apex_folder() -> Path | None:
    """Where NVIDIA's apex with its fused LayerNorm is installed.

    The name on PyPI belongs to an unrelated package, so apex is recognised by what it contains, without importing it.
    """
    spec = importlib.util.find_spec("apex")
    has_kernel = importlib.util.find_spec("fused_layer_norm_cuda") is not None
    for folder in (spec.submodule_search_locations or []) if spec and has_kernel else []:
        if (Path(folder) / "normalization" / "fused_layer_norm.py").is_file():
            return Path(folder)
    return None


def _num_rows(number: int, operand: torch.Tensor) -> int:
    """How many rows products are to have for so many: in 16 bits on a CPU oneDNN compiles code for each new number."""
    is_16_bit = operand.element_size() == 2 or torch.is_autocast_enabled("cpu")
    return few_sizes(number) if is_16_bit and not operand.is_cuda else number


# Below, the modules' and parameters' names are those of the released checkpoints.


class _Bert(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(
        self, layout: Layout, is_predicted_only: bool = False, attention: Attention | None = None
    ) -> torch.Tensor:
        num_rows = len(layout.predicted_R if is_predicted_only else layout.ids_N)
        if attention is None:
            weight = self.embeddings.word_embeddings.weight
            layout = layout.filled(_num_rows(len(layout.ids_N), weight), _num_rows(len(layout.predicted_R), weight))
        hidden: torch.Tensor = self.encoder(self.embeddings(layout), layout, is_predicted_only, attention)
        return hidden[:num_rows]


class _Embeddings(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.word_embeddings = _Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = _Embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = _Embedding(2, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = Dropout(config.dropout)

    def forward(self, layout: Layout) -> torch.Tensor:
        vectors = (
            self.word_embeddings(layout.ids_N)
            + self.position_embeddings(layout.positions_N)
            + self.token_type_embeddings(layout.segments_N)
        )
        return self.dropout(self.LayerNorm(vectors))  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    attention: AttentionBackend
    activation_checkpointing: bool

    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.rel_pos_bias = (
            RelativePositionBias(config.num_heads, config.relative_buckets, config.relative_max_distance)
            if config.relative_buckets
            else None
        )

    def attention_of(self, layout: Layout) -> Attention:
        """The chosen backend's attention of a batch."""
        dropout_rate = self.dropout if self.training else 0.0
        backend = choose_backend(layout.ids_N.is_cuda, dropout_rate) if self.attention == "auto" else self.attention
        return make_attention(backend, layout, self.rel_pos_bias, dropout_rate)

    def forward(
        self, hidden_NH: torch.Tensor, layout: Layout, is_predicted_only: bool, attention: Attention | None = None
    ) -> torch.Tensor:
        attention = attention or self.attention_of(layout)
        for index, layer in enumerate(self.layer, start=1):
            slots_R = layout.predicted_R if is_predicted_only and index == len(self.layer) else None
            if self.activation_checkpointing and self.training:
                hidden_NH = checkpoint(layer, hidden_NH, attention, slots_R, use_reentrant=False)
            else:
                hidden_NH = layer(hidden_NH, attention, slots_R)
        return hidden_NH


class _Layer(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Dense(config.hidden_size, config.intermediate_size)
        self.output = _AddAndNorm(config.intermediate_size, config)

    def forward(self, hidden_NH: torch.Tensor, attention: Attention, slots_R: torch.Tensor | None) -> torch.Tensor:
        """Vectors of all slots, or of the layout's predicted ones, which are `slots_R`."""
        attended = self.attention(hidden_NH, attention, slots_R)
        return self.output(F.gelu(self.intermediate.dense(attended)), attended)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _AddAndNorm(config.hidden_size, config)

    def forward(self, hidden_NH: torch.Tensor, attention: Attention, slots_R: torch.Tensor | None) -> torch.Tensor:
        if slots_R is None:
            return self.output(self.self(hidden_NH, attention), hidden_NH)  # type: ignore[no-any-return]
        residual_RH = hidden_NH.index_select(0, slots_R)
        return self.output(self.self.of_predicted(hidden_NH, residual_RH, attention), residual_RH)  # type: ignore[no-any-return]


class _SelfAttention(nn.Module):
    """One product for queries, keys and values; keys have no bias, which the softmax would cancel."""

    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_linear = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden_NH: torch.Tensor, attention: Attention) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(hidden_NH, self.qkv_linear.weight, bias)
        return attention(qkv.unflatten(-1, (3, self.num_heads, -1))).flatten(1)

    def of_predicted(self, hidden_NH: torch.Tensor, hidden_RH: torch.Tensor, attention: Attention) -> torch.Tensor:
        query_weight, key_value_weight = self.qkv_linear.weight.split([hidden_NH.shape[1], 2 * hidden_NH.shape[1]])
        queries = F.linear(hidden_RH, query_weight, self.q_bias)
        keys_values = F.linear(hidden_NH, key_value_weight, torch.cat([torch.zeros_like(self.v_bias), self.v_bias]))
        return attention.of_predicted(
            queries.unflatten(-1, (self.num_heads, -1)), keys_values.unflatten(-1, (2, self.num_heads, -1))
        ).flatten(1)


class _Dense(nn.Module):
    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size_in, size_out)


class _AddAndNorm(_Dense):
    """Dense layer, dropout, residual, LayerNorm."""

    def __init__(self, size_in: int, config: PMLMConfig) -> None:
        super().__init__(size_in, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = Dropout(config.dropout)

    def forward(self, vectors: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(vectors)) + residual)  # type: ignore[no-any-return]


class _Heads(nn.Module):
    def __init__(self, config: PMLMConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.predictions = _PredictionHead(config, word_embeddings)


class _PredictionHead(nn.Module):
    def __init__(self, config: PMLMConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = word_embeddings.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return F.linear(self.transform(hidden_TH), self.decoder.weight, self.bias)

    def losses(
        self, hidden_TH: torch.Tensor, targets_T: torch.Tensor, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each prediction, and whether it is right, without all their logits at a time."""
        num_targets = len(targets_T)
        more = _num_rows(num_targets, hidden_TH) - num_targets
        if more:  # not zeros, for which LayerNorm has no gradient
            hidden_TH = torch.cat([hidden_TH, hidden_TH[-1:].expand(more, -1)])
        losses_T, is_correct_T = cross_entropy_in_chunks(
            self.transform(hidden_TH), self.decoder.weight, self.bias, F.pad(targets_T, (0, more)), label_smoothing
        )
        return losses_T[:num_targets], is_correct_T[:num_targets]


class _Transform(_Dense):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__(config.hidden_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(F.gelu(self.dense(hidden_TH)))  # type: ignore[no-any-return]
