"""From each form to each and back, nothing changes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from models import stored
from support import files_of

from data_prep.tokenizer import Tokenizer
from finetune import modeling_pmlm
from finetune.__main__ import main
from finetune.convert import ConvertSettings, convert
from finetune.huggingface import register
from finetune.weights import load_pretrained
from pretrain.export import write_export


def converted(source: Path, folder: Path, *forms: str) -> Path:
    """Through all the forms, one after the other; `-` marks safetensors."""
    paths = [source, *(folder / f"{place}_{form}" for place, form in enumerate(forms))]
    for (before, after), form in zip(pairwise(paths), forms, strict=True):
        convert(ConvertSettings(before, after, form.rstrip("-"), safetensors=form.endswith("-")))  # type: ignore[arg-type]
    return paths[-1]


@pytest.mark.slow
def test_all_forms_lead_back_to_the_same_bytes(export: Path, tmp_path: Path) -> None:
    again = converted(export, tmp_path, "unilm", "huggingface", "unilm-", "pmlm")
    assert files_of(again) == files_of(export)
    assert files_of(converted(again, tmp_path / "more", "huggingface")) == files_of(tmp_path / "1_huggingface")
    assert files_of(converted(again, tmp_path / "more2", "unilm-")) == files_of(tmp_path / "2_unilm-")


def test_without_relative_bias_and_with_other_numbers(word_piece: Tokenizer, tmp_path: Path) -> None:
    numbers = {"relative_buckets": 0, "dropout": 0.2, "max_positions": 11, "initializer_range": 0.3}
    write_export(tmp_path / "export", stored(word_piece, **numbers))
    again = converted(tmp_path / "export", tmp_path, "unilm", "huggingface", "pmlm")
    assert files_of(again) == files_of(tmp_path / "export")
    config = json.loads((tmp_path / "1_huggingface" / "config.json").read_text())
    assert (config["rel_pos_bins"], config["hidden_dropout_prob"], config["max_position_embeddings"]) == (0, 0.2, 11)


def test_what_is_called_unilm_has_the_released_names(word_piece: Tokenizer, vocabulary: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "export", stored(word_piece))
    folder = converted(tmp_path / "export", tmp_path, "unilm")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert weights["bert.encoder.layer.1.attention.self.q_bias"].shape == (1, 1, 32)
    assert weights["bert.encoder.layer.1.attention.self.qkv_linear.weight"].shape == (96, 32)
    assert torch.equal(weights["cls.predictions.decoder.weight"], weights["bert.embeddings.word_embeddings.weight"])
    assert (folder / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
    ):  # as others write it, who know of no tokenizer
        values = json.loads((folder / name).read_text())
        if name == "config.json":
            del values["pmlm"]
            (folder / name).write_text(json.dumps(values))
        elif name == "tokenizer.json":
            (folder / name).unlink()
    assert load_pretrained(folder).tokenizer.sha256 == word_piece.sha256


def test_a_bert_without_output_layer_goes_to_every_form(vocabulary: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = transformers.BertModel(transformers.BertConfig(
        vocab_size=116, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_bytes(vocabulary.read_bytes())
    notes = convert(ConvertSettings(tmp_path / "bert", tmp_path / "export", "pmlm"))
    assert any("no output layer" in note for note in notes)
    assert files_of(converted(tmp_path / "export", tmp_path, "huggingface", "pmlm")) == files_of(tmp_path / "export")
    register()
    ours = transformers.AutoModel.from_pretrained(tmp_path / "0_huggingface")
    assert type(ours) is modeling_pmlm.PMLMModel
    ids = torch.randint(6, 116, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=0, atol=1e-5)


def run(*words: object) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["finetune", "convert", *map(str, words)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        status = main()
    return status, stdout.getvalue(), stderr.getvalue()


def test_the_command_says_what_it_did_and_what_is_wrong(word_piece: Tokenizer, tmp_path: Path) -> None:
    export, output = tmp_path / "export", tmp_path / "unilm"
    write_export(export, stored(word_piece))
    assert run("--input", export, "--output", output, "--to", "unilm") == (0, f"{output}: written\n", "")
    for words, fault in (
        (("--input", export, "--output", output, "--to", "pmlm"), "exists already"),
        (("--input", tmp_path / "no", "--output", tmp_path / "x", "--to", "pmlm"), "no such folder or file of weights"),
        (("--input", export, "--output", tmp_path / "x", "--to", "pmlm", "--safetensors"), "is for --to unilm"),
    ):
        status, _, stderr = run(*words)
        assert status == 2
        assert stderr.count("\n") == 1
        assert fault in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "unilm"]
    (export / "model.safetensors").write_bytes(b"")
    status, _, stderr = run("--input", export, "--output", tmp_path / "x", "--to", "huggingface")
    assert (status, "not a whole safetensors file" in stderr) == (2, True)
    assert not (tmp_path / "x").exists()
