"""An export opens without DeepSpeed and computes what the trained model computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import REPOSITORY, deepspeed_json, run_command

from data_prep.build import build
from data_prep.import_tokenizer import import_tokenizer
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.shards import DataSet
from data_prep.tokenizer import WordPiece
from finetune.weights import read_pretrained
from pretrain.batches import Share, validation_batches
from pretrain.export import export, load_exported
from pretrain.layout import Objective
from pretrain.metrics import read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short fp32 run, so that its validation can be repeated closely."""
    folder = tmp_path_factory.mktemp("export")
    config = deepspeed_json(folder / "ds.json", fp16=None, train_micro_batch_size_per_gpu=32)
    done = run_command(
        ["python", "run_pretrain.py", "--deepspeed_config", str(config), "--data", str(data_folder), "--run",
         str(folder / "run"), "--model", "tiny", "--hidden_size", "32", "--max_steps", "12"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_exported_model_has_the_runs_validation_loss(run: Path, data_folder: Path, tmp_path: Path) -> None:
    done = run_command(["python", "-m", "pretrain.export", "--run", str(run), "--output", str(tmp_path / "export")])
    assert done.returncode == 0, done.stderr
    assert "the model after step 12" in done.stdout
    model, tokenizer = load_exported(tmp_path / "export")
    data = DataSet(data_folder)
    assert tokenizer.sha256 == data.tokenizer.sha256
    expected = [record for record in read_records(run) if record["kind"] == "validation"][-1]
    with torch.no_grad():
        layouts = [batch.layout for batch in validation_batches(data, Objective.AE_PAR, Share(0, 1, 32, 1), 2048)]
        losses = [model(layout) for layout in layouts]
    num_targets = sum(layout.num_targets for layout in layouts)
    assert sum(float(x.ae_sum) for x in losses) / num_targets == pytest.approx(expected["ae_loss"], rel=1e-5)
    assert sum(float(x.par_sum) for x in losses) / num_targets == pytest.approx(expected["par_loss"], rel=1e-5)


def test_a_word_piece_tokenizer_goes_from_data_to_export(tmp_path: Path) -> None:
    corpus = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0[1-4].txt"))
    characters = sorted(set("".join(path.read_text("utf-8").lower() for path in corpus)) - {" ", "\n"})
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), "utf-8")
    import_tokenizer(tmp_path / "vocab.txt", tmp_path / "bert.json", pieces={})
    with LocalProcesses(1) as processes:
        parameters = BuildParameters(max_length_tokens=64)
        build([Corpus(corpus)], tmp_path / "bert.json", tmp_path / "data", parameters, processes)
    config = deepspeed_json(tmp_path / "ds.json", fp16=None, train_micro_batch_size_per_gpu=32)
    done = run_command(
        ["python", "run_pretrain.py", "--deepspeed_config", str(config), "--data", str(tmp_path / "data"), "--run",
         str(tmp_path / "run"), "--model", "tiny", "--hidden_size", "32", "--max_steps", "1"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "data")
    export(tmp_path / "run", tmp_path / "export")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert values["tokenizer_file"] == "tokenizer.json"
    assert values["special_ids"] == {"pad": 0, "unk": 1, "sos": 2, "eos": 3, "mask": 4}
    for folder in ("run", "export"):
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == (tmp_path / "bert.json").read_bytes()
        assert not (tmp_path / folder / "tokenizer.model").exists()
    model, tokenizer = load_exported(tmp_path / "export")
    assert isinstance(tokenizer, WordPiece)
    assert tokenizer.vocab_size == len(entries) == len(model.state_dict()["cls.predictions.bias"])


def test_fine_tuning_opens_run_checkpoint_and_export_alike(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "export")
    expected, _ = read_pretrained(tmp_path / "export")
    assert expected.origin["trained_steps"] == 12
    for path in (run, run / "checkpoints" / "step00000012"):
        found, notes = read_pretrained(path)
        assert (found.config, found.origin, notes) == (expected.config, expected.origin, ())
        assert found.tokenizer.sha256 == expected.tokenizer.sha256
        assert found.weights.keys() == expected.weights.keys()
        assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())


def test_export_refuses_what_it_cannot_do(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export(run, tmp_path / "there")
    with pytest.raises(ValueError, match="no checkpoint there"):
        export(tmp_path / "no_run", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("missing", "cls.predictions.bias is missing"),
        ("extra", "spare is not expected"),
        ("shape", r"cls.predictions.bias has shape \[3\], expected \[1000\]"),
        ("config", "not a pmlm export"),
    ],
)
def test_loading_names_every_tensor_that_does_not_fit(run: Path, tmp_path: Path, change: str, fault: str) -> None:
    folder = tmp_path / "export"
    export(run, folder)
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["cls.predictions.bias"]
    elif change == "extra":
        weights["spare"] = torch.zeros(1)
    elif change == "shape":
        weights["cls.predictions.bias"] = torch.zeros(3)
    else:
        (folder / "config.json").write_text(json.dumps({"format": "other"}))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=fault):
        load_exported(folder)
