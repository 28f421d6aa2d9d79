"""Weights of every kind load by name, compute what they computed at home, and are refused where they do not fit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import stored, tiny_model
from safetensors.torch import save_file
from support import run_command

from data_prep.import_tokenizer import import_tokenizer
from data_prep.tokenizer import Tokenizer
from finetune.weights import load_pretrained
from pretrain.export import read_export, write_export
from pretrain.layout import encoder_layout
from pretrain.model import PMLM

Weights = dict[str, torch.Tensor]
CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "rel_pos_bins": 32, "max_rel_pos": 20, "hidden_act": "gelu", "type_vocab_size": 2, "initializer_range": 0.2,
}  # fmt: skip


def released(model: PMLM) -> Weights:
    """As UniLMv2 was released: fused, biases of shape 1 x 1 x H."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {n: t.view(1, 1, -1) if n.endswith(("q_bias", "v_bias")) else t for n, t in weights.items()}


def separate(weights: Weights) -> Weights:
    """As older ones: three matrices and biases, that of the keys too, and the relative bias beside the encoder."""
    parts = {}
    for name, tensor in weights.items():
        if name.endswith("qkv_linear.weight"):
            for part, matrix in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                parts[name.replace("qkv_linear", part)] = matrix
            parts[name.replace("qkv_linear.weight", "key.bias")] = torch.randn(32)
        else:
            name = name.replace("q_bias", "query.bias").replace("v_bias", "value.bias")
            parts[name.replace("encoder.rel_pos_bias", "rel_pos_bias")] = (
                tensor.flatten() if name.endswith((".query.bias", ".value.bias")) else tensor
            )
    return parts


def without_prefix(weights: Weights) -> Weights:
    return {name.removeprefix("bert."): tensor for name, tensor in weights.items()}


def with_gamma_and_beta(weights: Weights) -> Weights:
    return {re.sub(r"(LayerNorm\.)(weight|bias)$", lambda m: m[1] + ("gamma" if m[2] == "weight" else "beta"), name): tensor
            for name, tensor in weights.items()}  # fmt: skip


def fused_bias(weights: Weights) -> Weights:
    """One bias of 3H instead of q_bias and v_bias."""
    result = {name: tensor for name, tensor in weights.items() if not name.endswith(("q_bias", "v_bias"))}
    for name, query in weights.items():
        if name.endswith("q_bias"):
            value = weights[name.replace("q_bias", "v_bias")]
            key = torch.randn(32)
            result[name.replace("q_bias", "qkv_linear.bias")] = torch.cat([query.flatten(), key, value.flatten()])
    return result


def with_extras(weights: Weights) -> Weights:
    extras = {
        "bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32),
        "cls.seq_relationship.weight": torch.zeros(2, 32), "bert.embeddings.position_ids": torch.arange(40)[None],
        "cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone(),
    }  # fmt: skip
    return {**weights, **extras}


def identical(weights: Weights) -> Weights:
    return weights


def write(folder: Path, weights: Weights, config: dict[str, Any], vocabulary: Path | None, name: str) -> Path:
    folder.mkdir()
    if name.endswith("safetensors"):
        save_file({n: t.clone().contiguous() for n, t in weights.items()}, folder / name)
    else:
        torch.save(weights, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    if vocabulary:
        (folder / "vocab.txt").write_bytes(vocabulary.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "unilm2-base.bin"])
@pytest.mark.parametrize(
    "form", [identical, separate, without_prefix, with_gamma_and_beta, fused_bias, with_extras], ids=lambda f: f.__name__
)  # fmt: skip
def test_every_form_of_released_names_gives_the_same_weights(
    form: Callable[[Weights], Weights], name: str, word_piece: Tokenizer, vocabulary: Path, tmp_path: Path
) -> None:
    model = tiny_model(word_piece.vocab_size)
    folder = write(tmp_path / "unilm", form(released(model)), CONFIG, vocabulary, name)
    found = load_pretrained(folder)
    assert found.has_head
    assert found.model.config == model.config
    for (parameter, ours), theirs in zip(model.named_parameters(), found.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), parameter
    assert found.tokenizer.sha256 == word_piece.sha256
    assert any("4 key" in note or "2 key" in note for note in found.notes) == (form in (separate, fused_bias))
    if form is with_extras:
        assert len(found.notes) == 2
        assert found.pooler.keys() == {"dense.weight", "dense.bias"}


def test_half_precision_and_no_config_are_enough_where_the_relative_bias_tells_the_heads(
    word_piece: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(word_piece.vocab_size, relative_max_distance=128)
    torch.save({name: tensor.half() for name, tensor in released(model).items()}, tmp_path / "w.bin")
    found = load_pretrained(tmp_path / "w.bin", tokenizer=word_piece.path).model
    assert found.config == type(found.config)(**{**vars(model.config), "initializer_range": 0.02})
    for ours, theirs in zip(model.parameters(), found.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(ours.half().float(), theirs)


def bert(vocab_size: int, **changes: Any) -> transformers.BertForMaskedLM:
    torch.manual_seed(5)
    config = transformers.BertConfig(**{
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.2, **changes,
    })  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # those of the keys among them
                parameter += torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_bert_gives_the_logits_it_gives_in_transformers_key_biases_and_all(vocabulary: Path, tmp_path: Path) -> None:
    size = len(vocabulary.read_text("utf-8").splitlines())
    theirs = bert(size)
    assert theirs.bert.encoder.layer[0].attention.self.key.bias.abs().max() > 1
    theirs.save_pretrained(tmp_path / "bert")
    found = load_pretrained(tmp_path / "bert", tokenizer=vocabulary)
    assert found.has_head
    assert found.model.state_dict()["bert.encoder.rel_pos_bias.weight"].abs().max() == 0
    samples = [torch.randint(5, size, (length,)) for length in (7, 1, 23)]
    segments = [(torch.arange(len(ids)) > 4).long() for ids in samples]
    layout = encoder_layout([i.tolist() for i in samples], [s.tolist() for s in segments])
    ours = found.model.predict(found.model.encode(layout)).split(layout.context_lengths)
    for ids, of_ids, logits in zip(samples, segments, ours, strict=True):
        expected = theirs(ids[None], token_type_ids=of_ids[None]).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_bert_without_output_layer_loads_as_an_encoder(vocabulary: Path, tmp_path: Path) -> None:
    theirs = bert(len(vocabulary.read_text("utf-8").splitlines())).bert
    theirs.save_pretrained(tmp_path / "bert")
    found, again = (load_pretrained(tmp_path / "bert", tokenizer=vocabulary) for _ in range(2))
    assert not found.has_head
    assert any("no output layer" in note for note in found.notes)
    ids = [8, 9, 10, 11, 12]
    ours = found.model.encode(encoder_layout([ids], [[0] * 5]))
    torch.testing.assert_close(ours, theirs(torch.tensor([ids])).last_hidden_state[0], rtol=0, atol=2e-5)
    for one, other in zip(found.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_positions_are_extended_by_repetition(export: Path) -> None:
    plain, longer = load_pretrained(export), load_pretrained(export, max_positions=95)
    name = "bert.embeddings.position_embeddings.weight"
    table, repeated = plain.model.state_dict()[name], longer.model.state_dict()[name]
    assert torch.equal(repeated, torch.cat([table, table, table[:15]]))
    assert longer.model.config.max_positions == 95
    assert "40 positions are repeated up to 95" in longer.notes[0]
    assert load_pretrained(export, max_positions=20).model.config.max_positions == 40


def test_an_export_loads_as_it_is(export: Path) -> None:
    found = load_pretrained(export)
    assert (found.has_head, found.notes) == (True, ())
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, read_export(export).weights[name])
    with pytest.raises(ValueError, match="has its own tokenizer; leave the flag out"):
        load_pretrained(export, tokenizer=export / "tokenizer.json")


LAYER = "bert.encoder.layer.1."


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({LAYER + "output.dense.bias": None}, [r"output.dense.bias is missing, expected with shape \[32\]"]),
        ({LAYER + "spare": torch.zeros(1), "crit.one_hot": torch.zeros(1)}, ["crit.one_hot is not exp", "1.spare is not"]),
        (
            {LAYER + "output.dense.bias": torch.zeros(3), "bert.embeddings.token_type_embeddings.weight": torch.zeros(6, 32)},
            [r"dense.bias has shape \[3\], expected \[32\]", r"type_embeddings.weight has shape \[6, 32\], expected \[2, 32\]"],
        ),
        ({LAYER + "attention.self.query.weight": torch.zeros(32, 32)}, ["are both there"]),
        ({LAYER + "attention.self.qkv_linear.weight": None, LAYER + "attention.self.query.weight": torch.zeros(32, 32)},
         ["key.weight is missing"]),
        ({"cls.predictions.bias": None}, ["cls.predictions.bias is missing"]),
        ({"cls.predictions.decoder.weight": torch.zeros(116, 32)}, ["decoder.weight is not equal to bert.embeddings.word"]),
        ({"embeddings.LayerNorm.gamma": torch.zeros(32)}, ["gamma and bert.embeddings.LayerNorm.weight are the same"]),
        ({"bert.encoder.rel_pos_bias.weight": None}, ["rel_pos_bias.weight is missing"]),
        ({"bert.encoder.rel_pos_bias.weight": torch.zeros(32, 4)}, [r"\[32, 4\], expected \[4, 32\]"]),
        ({"bert.embeddings.word_embeddings.weight": None}, ["word_embeddings.weight is missing"]),
    ],
)  # fmt: skip
def test_every_tensor_that_does_not_fit_is_named(
    change: dict[str, torch.Tensor | None], faults: list[str], word_piece: Tokenizer, vocabulary: Path, tmp_path: Path
) -> None:
    weights = released(tiny_model(word_piece.vocab_size)) | change
    config = {**CONFIG, "vocab_size": word_piece.vocab_size}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    folder = write(tmp_path / "unilm", kept, config, vocabulary, "pytorch_model.bin")
    for fault in faults:
        with pytest.raises(ValueError, match=fault) as caught:
            load_pretrained(folder)
        assert str(folder / "pytorch_model.bin") in str(caught.value)


class _Code:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("config", "weights", "fault"),
    [
        ({"hidden_act": "gelu_new"}, {}, "hidden_act is 'gelu_new', expected 'gelu'"),
        ({"layer_norm_eps": 1e-5}, {}, "layer_norm_eps is 1e-05"),
        ({}, {"a": _Code()}, "expected tensors only, .* and it holds objects of "),
        ({}, {"model": {"a": torch.zeros(1)}}, "expected tensors by name"),
        ({}, [torch.zeros(1)], "expected tensors by name, found list"),
        ({}, {"a": torch.zeros(1)}, "tell vocab_size, hidden_size, num_heads"),
    ],
)
def test_what_is_not_such_a_model_is_refused(
    config: dict[str, Any], weights: Any, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "unilm", weights, config, None, "pytorch_model.bin")
    with pytest.raises(ValueError, match=fault) as raised:
        load_pretrained(folder)
    assert "this must not run" not in capsys.readouterr().out
    assert "weights_only" not in str(raised.value)


def test_files_that_are_not_there_or_damaged_are_named(export: Path, vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder or file of weights"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"expected an export, a run, a checkpoint, or weights named .* has none of them"
    ):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a complete file of tensors|expected tensors only"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_pretrained(tmp_path)


def test_another_tokenizer_is_refused(word_piece: Tokenizer, vocabulary: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "unilm", released(tiny_model(word_piece.vocab_size)), CONFIG, None, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has none of tokenizer.model, .*; pass --tokenizer"):
        load_pretrained(folder)
    other = tmp_path / "vocab.txt"
    other.write_text(vocabulary.read_text("utf-8") + "more\n", "utf-8")
    with pytest.raises(ValueError, match=r"for 116 tokens, and its tokenizer .*vocab.txt has 117"):
        load_pretrained(folder, tokenizer=other)


def test_a_vocabulary_is_cased_if_its_config_or_its_entries_say_so(vocabulary: Path, tmp_path: Path) -> None:
    text = vocabulary.read_text("utf-8")
    for name, entries, config, cased in (
        ("a", text, None, False), ("b", text.replace("woman", "Woman"), None, True),
        ("c", text.replace("woman", "Woman"), {"do_lower_case": True}, False), ("d", text, {"do_lower_case": False}, True),
    ):  # fmt: skip
        folder = write(tmp_path / name, released(tiny_model(116)), CONFIG, None, "pytorch_model.bin")
        (folder / "vocab.txt").write_text(entries, "utf-8")
        if config:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        expected = import_tokenizer(folder / "vocab.txt", tmp_path / f"{name}.json", cased=cased, pieces={})
        assert load_pretrained(folder).tokenizer.sha256 == expected.sha256


@pytest.mark.slow
def test_loading_needs_neither_deepspeed_nor_transformers(word_piece: Tokenizer, tmp_path: Path) -> None:
    export = tmp_path / "export"
    write_export(export, stored(word_piece))
    code = (
        "import sys; from pathlib import Path; from finetune.weights import load_pretrained;"
        f"load_pretrained(Path({str(export)!r})); print(sorted({{'deepspeed', 'transformers'}} & set(sys.modules)))"
    )
    done = run_command([sys.executable, "-c", code])
    assert done.stdout == "[]\n", done.stdout + done.stderr
