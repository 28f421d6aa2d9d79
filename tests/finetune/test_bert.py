"""BERT's weights are trained to what transformers' BertForSequenceClassification is trained to, its pooler included."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import files_of

from finetune.__main__ import main
from finetune.batches import epoch_order
from finetune.classify import ClassifyTask, Part
from finetune.classify_data import Target
from finetune.classify_model import Classifier
from finetune.convert import ConvertSettings, convert
from finetune.huggingface import register
from finetune.processes import Processes
from finetune.trainer import Trainer, TrainSettings, learning_rate_factor
from finetune.weights import load_pretrained
from pretrain.export import read_export

MAX_TOKENS = 40
SETTINGS = TrainSettings(
    learning_rate=2e-3, batch_size=12, micro_batch_size=4, epochs=3, weight_decay=0.1, max_gradient_norm=1.5, warmup=0.2
)
NUM_SAMPLES = 40  # the last batch of an epoch is smaller


def random_bert(num_labels: int) -> Any:
    """A model in which every weight matters and nothing is dropped."""
    torch.manual_seed(7)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=116, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=MAX_TOKENS, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=num_labels, rel_pos_bins=0,
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn_like(parameter) * 0.2
    return model.eval()


@pytest.fixture
def bert(vocabulary: Path, tmp_path: Path) -> tuple[Any, Path]:
    """transformers' model, and the folder with its BertModel."""
    theirs, folder = random_bert(num_labels=2), tmp_path / "bert"
    theirs.bert.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(vocabulary.read_bytes())
    return theirs, folder


class Recording(Trainer):
    """Keeps each step's loss and gradient norm."""

    steps: list[tuple[float, float]]

    def _step(self) -> tuple[float, float]:
        self.steps.append(super()._step())
        return self.steps[-1]


def train_there(model: Any, batch_of: Any, targets: torch.Tensor) -> list[tuple[float, float]]:
    """The recipe with transformers and torch alone: each step's loss and gradient norm."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "weight_decay": decay}
              for decays, decay in ((True, SETTINGS.weight_decay), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.learning_rate)
    steps_per_epoch = -(-NUM_SAMPLES // SETTINGS.batch_size)
    num_steps, steps = SETTINGS.epochs * steps_per_epoch, []
    model.train()
    for step in range(num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(SETTINGS.seed, epoch, NUM_SAMPLES)
        batch = order[place * SETTINGS.batch_size : (place + 1) * SETTINGS.batch_size].tolist()
        loss = model(**batch_of(batch), labels=targets[batch]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_gradient_norm)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.learning_rate * learning_rate_factor(step, num_steps, SETTINGS.warmup)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((float(loss.detach()), float(norm)))
    model.eval()
    return steps


@pytest.mark.slow
def test_a_training_without_dropout_is_that_of_transformers(
    bert: tuple[Any, Path], sentences: list[tuple[str, str]], tmp_path: Path
) -> None:
    theirs, folder = bert
    texts, labels = [text for _, text in sentences[:NUM_SAMPLES]], [label for label, _ in sentences[:NUM_SAMPLES]]
    names = sorted(set(labels))
    targets = torch.tensor([names.index(label) for label in labels])
    pretrained = load_pretrained(folder)
    ours = Classifier.make(
        pretrained.model, pretrained.tokenizer, Target(tuple(names)), MAX_TOKENS, Processes(), SETTINGS.seed, pretrained.pooler
    )  # fmt: skip
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.model.classifier.weight)
        theirs.classifier.bias.copy_(ours.model.classifier.bias)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batch_of(places: list[int]) -> Any:
        return tokenizer(
            [texts[i] for i in places], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )

    inputs = ours.inputs(texts)
    assert inputs.num_truncated > 5
    assert [ids.tolist() for ids in inputs.ids] == tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]

    def assert_same_outputs(classifier: Classifier, atol: float) -> None:
        with torch.no_grad():
            expected = theirs(**batch_of([*range(NUM_SAMPLES)])).logits
        classifier.model.eval()
        torch.testing.assert_close(torch.from_numpy(classifier.outputs(inputs)), expected, rtol=0, atol=atol)

    assert_same_outputs(ours, 1e-5)
    part = Part(inputs, targets.tolist())
    trainer = Recording(
        ours.model, ClassifyTask(ours, part, {"": part}, ("accuracy",)), SETTINGS, tmp_path / "run", Processes(), {}
    )
    trainer.steps = []
    trainer.train()
    expected = train_there(theirs, batch_of, targets)
    assert len(trainer.steps) == len(expected) == 12
    for (loss, norm), (of_theirs, norm_of_theirs) in zip(trainer.steps, expected, strict=True):
        assert loss == pytest.approx(of_theirs, abs=1e-4)
        assert norm == pytest.approx(norm_of_theirs, rel=1e-3)
    norms = [norm for _, norm in expected]
    assert min(norms) < SETTINGS.max_gradient_norm < max(norms)
    assert expected[0][0] - expected[-1][0] > 0.1
    assert_same_outputs(ours, 1e-3)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert_same_outputs(Classifier.load(tmp_path / "saved"), 1e-3)


def test_the_command_begins_with_the_pooler_and_goes_on_with_no_other(
    bert: tuple[Any, Path], classify_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    theirs, folder = bert
    flags = {
        "weights": folder, "output": tmp_path / "run", "train_file": classify_folder / "train.tsv",
        "validation_file": classify_folder / "dev.tsv", "max_length_tokens": 32, "epochs": 1, "learning_rate": 1e-12,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["finetune", "classify", *words])
    assert main() == 0
    trained = Classifier.load(tmp_path / "run").model.get_parameter("bert.pooler.dense.weight")
    torch.testing.assert_close(trained, theirs.bert.pooler.dense.weight, rtol=0, atol=1e-6)
    with torch.no_grad():
        theirs.bert.pooler.dense.weight += 1
    theirs.bert.save_pretrained(folder)
    capsys.readouterr()
    assert main() == 2
    assert "(weights: another content)" in capsys.readouterr().err


@torch.no_grad()
def test_the_pooler_goes_through_every_form(bert: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = bert
    before = folder
    for form in ("pmlm", "unilm", "huggingface"):
        convert(ConvertSettings(before, tmp_path / form, form))  # type: ignore[arg-type]
        before = tmp_path / form
        pooler = load_pretrained(before).pooler
        assert pooler.keys() == {"dense.weight", "dense.bias"}
        for name, tensor in pooler.items():
            assert torch.equal(tensor, theirs.bert.pooler.get_parameter(name))
    convert(ConvertSettings(before, tmp_path / "again", "pmlm"))
    assert files_of(tmp_path / "again") == files_of(tmp_path / "pmlm")
    assert read_export(tmp_path / "again").pooler.keys() == pooler.keys()

    register()
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(tmp_path / "huggingface", num_labels=2, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    theirs.classifier.load_state_dict(model.classifier.state_dict())
    ids = torch.randint(6, 116, (3, 9))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    for others in (transformers.AutoModel, transformers.AutoModelForMaskedLM, transformers.AutoModelForSeq2SeqLM):
        assert not others.from_pretrained(tmp_path / "huggingface", output_loading_info=True)[1]["unexpected_keys"] & {
            "bert.pooler.dense.weight", "pooler.dense.weight",
        }  # fmt: skip


def test_without_a_pooler_it_is_new(bert: tuple[Any, Path], export: Path) -> None:
    assert load_pretrained(export).pooler == {}
    pretrained = load_pretrained(bert[1])

    def made(pooler: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model = Classifier.make(
            pretrained.model, pretrained.tokenizer, Target(("a", "b")), MAX_TOKENS, Processes(), 3, pooler
        ).model
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    new, given = made({}), made(pretrained.pooler)
    assert new["bert.pooler.dense.bias"].abs().max() == 0
    assert {name for name in new if not torch.equal(new[name], given[name])} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"pooler.dense.weight": torch.zeros(32, 32)}, r"bert.pooler.dense.bias is missing, expected with shape \[32\]"),
        ({"pooler.dense.weight": torch.zeros(32, 31), "pooler.dense.bias": torch.zeros(32)},
         r"pooler.dense.weight has shape \[32, 31\], expected \[32, 32\]"),
        ({"pooler.dense.weight": torch.zeros(32, 32), "pooler.dense.bias": torch.zeros(32), "pooler.gate": torch.zeros(1)},
         "pooler.gate is not expected"),
    ],
)  # fmt: skip
def test_a_pooler_that_does_not_fit_is_named(
    weights: dict[str, torch.Tensor], fault: str, bert: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = bert
    (folder / "model.safetensors").unlink()
    kept = {name: tensor for name, tensor in theirs.bert.state_dict().items() if not name.startswith("pooler.")}
    torch.save({**kept, **weights}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=fault):
        load_pretrained(folder)


@pytest.mark.slow
def test_dropout_disturbs_gradients_as_much_as_that_of_transformers(
    bert: tuple[Any, Path], sentences: list[tuple[str, str]]
) -> None:
    """Of a batch, not only of a sample: noise that samples shared would not be less in their mean."""
    num_draws, texts = 400, [text for text, _ in sentences[:8]]
    folder, targets = bert[1], torch.tensor([0, 1] * 4)
    config = transformers.AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder, config=config)
    pretrained = load_pretrained(folder, dropout=0.2)
    ours = Classifier.make(
        pretrained.model, pretrained.tokenizer, Target(("a", "b")), MAX_TOKENS, Processes(), 0, pretrained.pooler
    )
    with torch.no_grad():
        theirs.classifier.weight.normal_()
        ours.model.classifier.weight.copy_(theirs.classifier.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    inputs = ours.inputs(texts)
    names = [
        "classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.weight",
        "bert.encoder.layer.0.attention.output.dense.weight", "bert.embeddings.word_embeddings.weight",
    ]  # fmt: skip

    def draws(model: Any, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        model.train()
        parameters = [model.get_parameter(name) for name in names]
        found = [torch.autograd.grad(loss(), parameters) for _ in range(num_draws)]
        return [torch.stack(of_parameter).flatten(1) for of_parameter in zip(*found, strict=True)]

    torch.manual_seed(0)
    here = draws(ours.model, lambda: ours.loss(inputs, targets, range(8)) / 8)
    there = draws(theirs, lambda: theirs(**batch, labels=targets).loss)
    for name, a, b in zip(names, here, there, strict=True):
        assert 0.85 < a.var(dim=0).sum() / b.var(dim=0).sum() < 1.18, name
        error = (a.mean(dim=0) - b.mean(dim=0)).square().sum() / (a.var(dim=0).sum() + b.var(dim=0).sum()) * num_draws
        assert 0.5 < error < 1.6, name  # 1 where the means differ by chance alone
