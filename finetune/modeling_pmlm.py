"""PMLM for Hugging Face transformers: a post-LayerNorm BERT with T5's relative position bias, as an encoder.

`PMLMForConditionalGeneration` writes: a pseudo mask predicts each next token, as in UniLMv2's fine-tuning. This file lies in every folder that holds such a model, and needs torch and transformers alone:

    AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)

Names are those of the released UniLMv2 checkpoints. Layers take the bias to be added to the attention scores, whatever is in
it: what is hidden has the most negative number.

Shapes: B texts of L tokens, H hidden size, A heads, D = H / A; in generation S source tokens, T target tokens at once, P before
them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)

_Remember = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From new slots' keys and values to those of all that they may see."""


class PMLMConfig(PretrainedConfig):  # type: ignore[misc]
    """The numbers of a model, named as BERT's and UniLM's; the defaults are base."""

    model_type = "pmlm"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        type_vocab_size: int = 2,
        rel_pos_bins: int = 32,
        max_rel_pos: int = 128,
        pad_token_id: int | None = 0,
        mask_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.type_vocab_size = type_vocab_size
        self.rel_pos_bins = rel_pos_bins
        self.max_rel_pos = max_rel_pos
        self.mask_token_id = mask_token_id
        super().__init__(pad_token_id=pad_token_id, **{"tie_word_embeddings": True, **others})


class _Embeddings(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        vectors_BLH: torch.Tensor,
        token_type_ids_BL: torch.Tensor | None,
        positions_BL: torch.Tensor,
    ) -> torch.Tensor:
        """`vectors_BLH`: the word embeddings."""
        table = self.position_embeddings.weight
        if (length := int(positions_BL.max()) + 1) > len(table):
            raise ValueError(f"a text has {length} tokens, and the model {len(table)} positions; truncate it")
        if token_type_ids_BL is None:
            token_type_ids_BL = torch.zeros(vectors_BLH.shape[:2], dtype=torch.long, device=vectors_BLH.device)
        vectors_BLH = vectors_BLH + table[positions_BL] + self.token_type_embeddings(token_type_ids_BL)
        return self.dropout(self.LayerNorm(vectors_BLH))  # type: ignore[no-any-return]


class _RelativePositionBias(nn.Module):
    """One number for each head and T5 bucket of (key position - query position), shared by all layers."""

    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, config.rel_pos_bins))
        self.max_distance = config.max_rel_pos

    def forward(self, queries_BQ: torch.Tensor, keys_BK: torch.Tensor) -> torch.Tensor:
        """[B, A, Q, K] of positions."""
        return self.weight[:, self._bucket(keys_BK[:, None, :] - queries_BQ[:, :, None])].transpose(0, 1)

    def _bucket(self, distance: torch.Tensor) -> torch.Tensor:
        half = self.weight.shape[1] // 2
        exact = half // 2
        away = distance.abs()
        logarithm = torch.log(away.clamp(min=1).double() / exact) / math.log(self.max_distance / exact)
        far = (exact + (logarithm * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(away < exact, away, far) + (distance > 0) * half


class _SelfAttention(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout_rate = config.num_attention_heads, config.attention_probs_dropout_prob
        self.qkv_linear = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))

    def project(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values, [3, B, A, L, D]."""
        biases = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(hidden_BLH, self.qkv_linear.weight, biases).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)  # type: ignore[no-any-return]

    def forward(
        self, hidden_BLH: torch.Tensor, bias_BALL: torch.Tensor | None, remember: _Remember | None = None
    ) -> torch.Tensor:
        queries_BALD, keys_BALD, values_BALD = self.project(hidden_BLH)
        if remember is not None:
            keys_BALD, values_BALD = remember(keys_BALD, values_BALD)
        rate = self.dropout_rate if self.training else 0.0
        attended_BALD = F.scaled_dot_product_attention(
            queries_BALD, keys_BALD, values_BALD, attn_mask=bias_BALL, dropout_p=rate
        )
        return attended_BALD.transpose(1, 2).flatten(2)


class _AddAndNorm(nn.Module):
    def __init__(self, size_in: int, config: PMLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(size_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, vectors: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(vectors)) + residual)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _AddAndNorm(config.hidden_size, config)


class _Intermediate(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class _Layer(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _AddAndNorm(config.intermediate_size, config)

    def forward(
        self, hidden_BLH: torch.Tensor, bias_BALL: torch.Tensor | None, remember: _Remember | None = None
    ) -> torch.Tensor:
        attended_BLH = self.attention.output(self.attention.self(hidden_BLH, bias_BALL, remember), hidden_BLH)
        return self.output(F.gelu(self.intermediate.dense(attended_BLH)), attended_BLH)  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.rel_pos_bias = _RelativePositionBias(config) if config.rel_pos_bins else None

    def forward(self, hidden_BLH: torch.Tensor, bias_BALL: torch.Tensor | None) -> list[torch.Tensor]:
        """The vectors before each layer, and behind the last."""
        states = [hidden_BLH]
        for layer in self.layer:
            states.append(layer(states[-1], bias_BALL))
        return states

    def bias(
        self, attention_mask_BL: torch.Tensor | None, positions_BL: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Of reading: every token sees every token of its text that is not masked out."""
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(positions_BL, positions_BL).to(dtype)
        if attention_mask_BL is None:
            return bias
        hidden_B11L = (attention_mask_BL == 0)[:, None, None, :]
        if bias is None:
            bias = torch.zeros((), dtype=dtype, device=hidden_B11L.device).expand(hidden_B11L.shape)
        return bias.masked_fill(hidden_B11L, torch.finfo(dtype).min)


class _Pooler(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_BLH[:, 0]))


class _Transform(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(F.gelu(self.dense(vectors)))  # type: ignore[no-any-return]


class _Predictions(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(vectors)) + self.bias  # type: ignore[no-any-return]

    def replace_decoder(self, decoder: nn.Linear) -> None:
        """Take another output embedding, perhaps of more or fewer tokens."""
        self.decoder = decoder
        num_more = len(decoder.weight) - len(self.bias)
        if num_more:
            self.bias = nn.Parameter(F.pad(self.bias.detach(), (0, num_more)), requires_grad=self.bias.requires_grad)


class _Heads(nn.Module):
    def __init__(self, config: PMLMConfig) -> None:
        super().__init__()
        self.predictions = _Predictions(config)


class PMLMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the models below share."""

    config_class = PMLMConfig
    base_model_prefix = "bert"
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"pooler\."]  # which classification alone has
    _no_split_modules: ClassVar[list[str]] = ["_Layer"]
    accepts_loss_kwargs = False
    """transformers' Trainer is to divide losses by the accumulation steps itself."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, _RelativePositionBias)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        for name in ("bias", "q_bias", "v_bias"):
            bias = getattr(module, name, None)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)


class PMLMModel(PMLMPreTrainedModel):
    """The encoder; with a pooler, the first token's vector through a dense layer and tanh, as BERT's."""

    def __init__(self, config: PMLMConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """`attention_mask` is 0 where padding is, [B, L]; `token_type_ids` 0 in the first segment and 1 in the second; `position_ids`
        are 0, 1, 2 ... by default, and also decide the relative position bias. Raises ValueError for what has no effect here.
        """
        _refuse_unused(self.config, output_attentions, others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, expected [texts, tokens]")
        vectors = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(vectors.shape[1], device=vectors.device)[None]
        hidden = self.embeddings(vectors, token_type_ids, position_ids)
        states = self.encoder(hidden, self.encoder.bias(attention_mask, position_ids, hidden.dtype))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=None if self.pooler is None else self.pooler(states[-1]),
            hidden_states=tuple(states) if wanted else None,
        )
        return output.to_tuple() if _as_tuple(self, return_dict) else output


def _refuse_unused(config: PMLMConfig, output_attentions: bool | None, others: dict[str, Any]) -> None:
    """Raise ValueError for arguments of a forward pass that would have no effect."""
    if getattr(config, "output_attentions", False) if output_attentions is None else output_attentions:
        raise ValueError("output_attentions: attention probabilities are not kept here; leave it out")
    if unused := [name for name, value in others.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(unused)}: has no effect in this model; leave it out")


def _as_tuple(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return not (getattr(model.config, "return_dict", True) if return_dict is None else return_dict)


class PMLMForMaskedLM(PMLMPreTrainedModel):
    """Predicts the tokens behind [MASK]; labels of -100 do not count."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: PMLMConfig) -> None:
        super().__init__(config)
        self.bert = PMLMModel(config)
        self.cls = _Heads(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output embedding, which is the word embedding."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output embedding; added tokens get a bias of 0."""
        self.cls.predictions.replace_decoder(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, L, vocabulary]."""
        encoded = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **others)
        logits = self.cls.predictions(encoded.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if _as_tuple(self, return_dict) else output


class PMLMForSequenceClassification(PMLMPreTrainedModel):
    """A class, several or a number of a text or a pair: the pooled first token, dropout, a linear layer, as BERT's."""

    def __init__(self, config: PMLMConfig) -> None:
        super().__init__(config)
        self.bert = PMLMModel(config, add_pooling_layer=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, num_labels]. `config.problem_type` decides the loss; by default the labels do, as for BERT."""
        encoded = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **others)
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if _as_tuple(self, return_dict) else output

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type is None:
            is_class = labels.dtype in (torch.long, torch.int)
            several = "single_label_classification" if is_class else "multi_label_classification"
            self.config.problem_type = "regression" if self.config.num_labels == 1 else several
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.to(logits.dtype).squeeze())
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten().long())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class PMLMForQuestionAnswering(PMLMPreTrainedModel):
    """Where in a passage an answer begins and ends."""

    def __init__(self, config: PMLMConfig) -> None:
        super().__init__(config)
        self.bert = PMLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Start and end scores [B, L]; positions outside the text do not count in the loss."""
        encoded = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **others)
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start_logits.shape[1]
            losses = [
                F.cross_entropy(logits, places.flatten().clamp(0, length), ignore_index=length)
                for logits, places in ((start_logits, start_positions), (end_logits, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=encoded.hidden_states
        )
        return output.to_tuple() if _as_tuple(self, return_dict) else output


class _SourceEncoder:
    """Reads sources: the vectors before each layer, [B, S, layers x H]. No module, so that no weight has two names."""

    main_input_name = "input_ids"

    def __init__(self, bert: PMLMModel) -> None:
        self._bert = bert

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None, output_attentions: bool | None = None, **_: Any,
    ) -> Any:  # fmt: skip
        """All of a source is of the first segment; what `generate` gives besides is not needed."""
        _refuse_unused(self._bert.config, output_attentions, {})
        encoded = self._bert(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, output_hidden_states=True, return_dict=True
        )
        return BaseModelOutput(last_hidden_state=torch.cat(encoded.hidden_states[:-1], dim=-1))

    __call__ = forward


class PMLMForConditionalGeneration(PMLMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Writes a target for a source: `model.generate(input_ids, attention_mask=...)`.

    To transformers it has an encoder and a decoder, of the same weights. The decoder is fed, for each token, the token as an
    original, and a pseudo mask behind it that predicts the next. Originals see the source and the originals up to them, a pseudo
    mask the originals before it and itself; originals' keys and values are in the cache, pseudo masks' are not. The
    first token, decoder_start_token_id, is seen by nobody.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = PMLMForMaskedLM._tied_weights_keys

    def __init__(self, config: PMLMConfig) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = True
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.bos_token_id
        super().__init__(config)
        self.bert = PMLMModel(config)
        self.cls = _Heads(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output embedding, which is the word embedding."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output embedding; added tokens get a bias of 0."""
        self.cls.predictions.replace_decoder(value)

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, **settings: Any
    ) -> torch.Tensor | Any:
        """Write targets, see GenerationMixin; beam search ends only when no hypothesis can become better, as ours."""
        num_beams = settings.get("num_beams") or (generation_config or self.generation_config).num_beams or 1
        if num_beams > 1:
            settings.setdefault("early_stopping", "never")
        elif generation_config is None:
            settings.setdefault("length_penalty", 1.0)  # which greedy search has not
        return super().generate(inputs, generation_config, **settings)

    def get_encoder(self, modality: str | None = None) -> Any:
        """What reads sources."""
        return _SourceEncoder(self.bert)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, T, vocabulary] of the token behind each decoder token. `attention_mask` is the source's, padded behind;
        `token_type_ids` are what tokenizers give, and of no effect: all of a source is of the first segment.
        Raises ValueError for what else has no effect here.

        With `labels`, decoder tokens are by default those before them; labels of -100 do not count.
        """
        _refuse_unused(self.config, output_attentions, others)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("expected decoder_input_ids or labels")
            start_B1 = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start_B1, labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], dim=1)
        if past_key_values is None and use_cache:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = self._logits(encoder_outputs[0], attention_mask, decoder_input_ids, past_key_values)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=encoder_outputs[0]
        )
        return output.to_tuple() if _as_tuple(self, return_dict) else output

    def _logits(
        self, states: torch.Tensor, attention_mask_BS: torch.Tensor | None, ids_BT: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        (num_texts, num_new), device = ids_BT.shape, ids_BT.device
        if attention_mask_BS is None:
            attention_mask_BS = torch.ones(states.shape[:2], dtype=torch.long, device=device)
        num_before = 0 if cache is None else int(cache.get_seq_length())
        lengths_B1 = attention_mask_BS.sum(dim=1, keepdim=True)
        originals_P = torch.arange(num_before + num_new, device=device)
        positions_BP = (lengths_B1 + originals_P - 1).clamp(min=0)
        pseudo_BT = lengths_B1 + originals_P[num_before:]
        queries_BQ = torch.cat([positions_BP[:, num_before:], pseudo_BT], dim=1)
        sources_BS = torch.arange(states.shape[1], device=device).expand(num_texts, -1)
        keys_BK = torch.cat([sources_BS, positions_BP, pseudo_BT], dim=1)

        sees_original = (originals_P[num_before:, None] >= originals_P) & (originals_P > 0)
        sees_pseudo = torch.eye(num_new, dtype=torch.bool, device=device)
        own = torch.cat([sees_original.repeat(2, 1), torch.cat([torch.zeros_like(sees_pseudo), sees_pseudo])], dim=1)
        is_source_BQS = (attention_mask_BS != 0)[:, None].expand(-1, 2 * num_new, -1)
        is_visible_BQK = torch.cat([is_source_BQS, own.expand(num_texts, -1, -1)], dim=2)
        bias = torch.zeros((), dtype=states.dtype, device=device)
        if self.bert.encoder.rel_pos_bias is not None:
            bias = self.bert.encoder.rel_pos_bias(queries_BQ, keys_BK).to(states.dtype)
        bias = torch.where(is_visible_BQK[:, None], bias, torch.finfo(states.dtype).min)

        slots_BQ = torch.cat([ids_BT, torch.full_like(ids_BT, self.config.mask_token_id)], dim=1)
        embeddings = self.bert.embeddings
        hidden = embeddings(embeddings.word_embeddings(slots_BQ), torch.ones_like(slots_BQ), queries_BQ)
        for index, layer in enumerate(self.bert.encoder.layer):
            state = states.unflatten(-1, (len(self.bert.encoder.layer), -1))[:, :, index]
            hidden = layer(hidden, bias, _remember(index, layer, state, num_new, cache))
        return self.cls.predictions(hidden[:, num_new:])  # type: ignore[no-any-return]


def _remember(index: int, layer: Any, state: torch.Tensor, num_new: int, cache: Any) -> _Remember:
    def remember(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        originals, pseudo = (
            (keys[:, :, :num_new], values[:, :, :num_new]),
            (keys[:, :, num_new:], values[:, :, num_new:]),
        )
        if cache is not None and cache.is_updated.get(index):
            of_source = cache.cross_attention_cache.layers[index]
            source = of_source.keys, of_source.values
        else:
            source = tuple(layer.attention.self.project(state)[1:])
            if cache is not None:
                source = cache.cross_attention_cache.update(*source, index)
                cache.is_updated[index] = True
        if cache is not None:
            originals = cache.self_attention_cache.update(*originals, index)
        together = [torch.cat(parts, dim=2) for parts in zip(source, originals, pseudo, strict=True)]
        return together[0], together[1]

    return remember
