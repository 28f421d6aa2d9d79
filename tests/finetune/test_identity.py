"""A training is continued, or its result given again, only if everything that it depends on is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.tokenizer import Tokenizer, train_tokenizer
from finetune.answer import train as train_answerer
from finetune.answer_data import AnswerSettings
from finetune.classify import train as train_classifier
from finetune.classify_data import ColumnSettings, DataSettings, read_data
from finetune.identity import refuse_other, training_identity
from finetune.processes import Processes
from finetune.runs import StartSettings
from finetune.seq2seq import TargetSettings, ValidationSettings
from finetune.seq2seq import train as train_writer
from finetune.seq2seq_data import PairColumns, Seq2SeqSettings
from finetune.trainer import RESULT, STATE, Trainer, TrainSettings
from pretrain.export import StoredModel, write_export
from pretrain.model import PMLM, PMLMConfig

Command = Callable[..., tuple[int, str, str]]
TEXTS = [
    "it is a truth universally acknowledged",
    "one skilled in circumvention of the law",
    "a single man in want of a wife",
]
SETTINGS = TrainSettings(learning_rate=1e-3, epochs=1, batch_size=8)


class _Identities(Exception):
    """Ends a training before it begins."""


@pytest.fixture
def identity_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """The identity that a training would have."""
    seen: list[dict[str, Any]] = []

    def stop(
        model: nn.Module, task: Any, settings: TrainSettings, run: Path, processes: Processes, identity: dict[str, Any]
    ) -> Any:
        trainer = Trainer.__new__(Trainer)
        Trainer.__init__(trainer, model, task, settings, run, processes, identity)
        seen.append(trainer._identity)
        raise _Identities

    def of(train: Callable[[], Any]) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr("finetune.runs.Trainer", stop)
            with pytest.raises(_Identities):
                train()
        return seen[-1]

    return of


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An export of a tiny model."""
    tokenizer = train_tokenizer(TEXTS * 3, tmp_path / "t.model", vocab_size=40)
    return _write_weights(tmp_path / "weights", tokenizer)


def _write_weights(folder: Path, tokenizer: Tokenizer, seed: int = 0, **changes: Any) -> Path:
    config = PMLMConfig.of_size(
        "tiny",
        vocab_size=40,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        max_positions=64,
        num_layers=1,
        **changes,
    )
    torch.manual_seed(seed)
    named = {name: parameter.detach() for name, parameter in PMLM(config).named_parameters()}
    shutil.rmtree(folder, ignore_errors=True)
    write_export(folder, StoredModel(folder, config, named, tokenizer))
    return folder


def _rows(path: Path, last: str = "a wife") -> Path:
    rows = [
        {"a": f"{text} {i}", "b": str(i % 3), "c": str(i % 2), "d": text} for i, text in enumerate([*TEXTS * 3, last])
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _squad(path: Path, question: str = "which?") -> Path:
    qas = [{"id": "1", "question": question, "answers": [{"text": "truth", "answer_start": 8}]}]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": TEXTS[0], "qas": qas}]}]}))
    return path


def _other(value: Any) -> Any:
    """Another value of the same kind that the settings take."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if value >= 1 or isinstance(value, int) else value / 2 + 0.07
    return value


def test_everything_that_a_classifier_depends_on_is_in_its_identity(
    weights: Path, tmp_path: Path, identity_of: Any
) -> None:
    def identity(
        train: Path, validation: Path, columns: tuple[str, str | None] = ("a", None), label: str = "b", regression: bool = False,
        max_length_tokens: int = 32, dropout: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        data = read_data(
            DataSettings(train_file=train, validation_file=validation, label_column=label, regression=regression), ColumnSettings(*columns)
        )  # fmt: skip
        start = StartSettings(weights, tmp_path / "run", max_length_tokens=max_length_tokens, dropout=dropout)
        return dict(identity_of(lambda: train_classifier(start, SETTINGS, data)))

    train, dev = _rows(tmp_path / "train.jsonl"), _rows(tmp_path / "dev.jsonl", "a man")
    plain = identity(train, dev)
    moved = [shutil.copy(file, tmp_path / name) for file, name in ((train, "t.jsonl"), (dev, "d.jsonl"))]
    assert identity(*map(Path, moved)) == plain  # names and folders do not count
    replaced = _rows(tmp_path / "other" / "train.jsonl", "a truth")
    others = {
        "training file of one name": identity(replaced, dev), "validation file": identity(train, train), "roles": identity(dev, train),
        "text column": identity(train, dev, ("d", None)), "pair column": identity(train, dev, ("a", "d")),
        "label column": identity(train, dev, label="c"), "regression": identity(train, dev, regression=True),
        "length": identity(train, dev, max_length_tokens=16), "dropout": identity(train, dev, dropout=0.3),
    }  # fmt: skip
    chosen = {field.name for field in fields(TrainSettings)} - {
        "deepspeed_config"
    }  # with it and without it is one training
    assert {name: plain[name] for name in chosen} == {name: getattr(SETTINGS, name) for name in chosen}
    tokenizer = train_tokenizer(TEXTS * 3, tmp_path / "t.model", vocab_size=40)
    _write_weights(weights, tokenizer, seed=1)
    others["weights"] = identity(train, dev)
    _write_weights(weights, train_tokenizer([*TEXTS * 2, *TEXTS[0].split()], tmp_path / "u.model", vocab_size=40))
    others["tokenizer"] = identity(train, dev)
    _write_weights(weights, tokenizer, relative_max_distance=64)
    others["configuration"] = identity(train, dev)
    seen = [json.dumps(value, sort_keys=True) for value in (plain, *others.values())]
    assert len(set(seen)) == len(seen), [name for name, value in others.items() if value == plain]
    _write_weights(weights, tokenizer)
    assert identity(train, dev) == plain


def test_everything_that_an_answerer_depends_on_is_in_its_identity(
    weights: Path, tmp_path: Path, identity_of: Any
) -> None:
    train, dev = _squad(tmp_path / "train.json"), _squad(tmp_path / "dev.json", "what?")

    def identity(train: Path, dev: Path, **changes: Any) -> dict[str, Any]:
        reading = AnswerSettings(**{"max_question_tokens": 8, "max_answer_tokens": 5, **changes})
        start = StartSettings(weights, tmp_path / "run", max_length_tokens=40)
        return dict(identity_of(lambda: train_answerer(start, SETTINGS, reading, train, dev)))

    plain = identity(train, dev)
    others = [
        identity(_squad(tmp_path / "other" / "train.json", "who?"), dev),
        identity(train, train),
        identity(dev, train),
    ]
    others += [identity(train, dev, stride_tokens=9), identity(train, dev, max_question_tokens=9)]
    others += [identity(train, dev, max_answer_tokens=6), identity(train, dev, num_best=3)]
    assert plain not in others
    assert identity(Path(shutil.copy(train, tmp_path / "moved.json")), dev) == plain


def test_everything_that_a_writer_depends_on_is_in_its_identity(
    weights: Path, tmp_path: Path, identity_of: Any
) -> None:
    train, dev = _rows(tmp_path / "train.jsonl"), _rows(tmp_path / "dev.jsonl", "a man")
    columns = PairColumns("a", "b")
    limits, of_targets, of_validation = Seq2SeqSettings(24, 8), TargetSettings(), ValidationSettings(generated_pairs=2)

    def identity(train: Path, dev: Path, columns: PairColumns = columns, *settings: Any) -> dict[str, Any]:
        given = {type(one): one for one in (limits, of_targets, of_validation, *settings)}
        start = StartSettings(weights, tmp_path / "run", max_length_tokens=32)
        return dict(identity_of(lambda: train_writer(
            start, SETTINGS, given[Seq2SeqSettings], given[TargetSettings], given[ValidationSettings], train, dev, columns
        )))  # fmt: skip

    plain = identity(train, dev)
    others = [
        identity(_rows(tmp_path / "other" / "train.jsonl", "truth"), dev),
        identity(train, train),
        identity(dev, train),
    ]
    others += [identity(train, dev, PairColumns("d", "b")), identity(train, dev, PairColumns("a", "c"))]
    for settings in (limits, of_targets, of_validation):
        for name, value in asdict(settings).items():
            other = "rouge_l" if name == "best_by" else _other(value)
            if name != "question_generation":  # which reads other columns
                others.append(identity(train, dev, columns, replace(settings, **{name: other})))
    assert plain not in others
    assert identity(Path(shutil.copy(train, tmp_path / "moved.jsonl")), dev) == plain


def test_a_task_is_in_its_identity(word_piece: Tokenizer) -> None:
    model = PMLM(PMLMConfig.of_size("tiny", vocab_size=40, hidden_size=16, num_heads=2, num_layers=1))
    one, other, pooled = (
        training_identity(model, pooler, word_piece, {"train": "1"}, {"name": name})
        for name, pooler in (("classify", {}), ("answer", {}), ("classify", {"bert.pooler.dense.bias": torch.ones(2)}))
    )
    assert one != other
    assert one["weights_sha256"] == other["weights_sha256"] != pooled["weights_sha256"]


def test_differences_are_told_in_words() -> None:
    theirs = {
        "learning_rate": 1,
        "files": {"train": "a", "validation": "b"},
        "task": {"regression": False},
        "weights_sha256": "x",
    }
    ours = {
        "learning_rate": 2,
        "files": {"train": "c", "validation": "b"},
        "task": {"regression": True},
        "weights_sha256": "y",
    }
    refuse_other(Path("f"), theirs, theirs, "training")
    with pytest.raises(ValueError, match=r".") as raised:
        refuse_other(Path("f"), theirs, ours, "training")
    assert str(raised.value) == (
        "f: is of another training (learning_rate 1, now 2, the train file has another content, regression False, now True, weights: "
        "another content); give the same, or another --output"
    )
    with pytest.raises(ValueError, match="exists, and does not say what made it"):
        refuse_other(Path("f"), None, ours, "training")


def test_the_old_result_is_not_given_for_another_file_of_the_same_name(
    weights: Path, tmp_path: Path, command: Command
) -> None:
    """Neither after the end nor in the middle of a training."""
    train, dev = _rows(tmp_path / "train.jsonl"), _rows(tmp_path / "dev.jsonl", "a man")
    words = ["classify", "--weights", weights, "--output", tmp_path / "run", "--epochs", 1, "--text_column", "a", "--label_column", "b",
             "--max_length_tokens", 32, "--validation_file", dev]  # fmt: skip
    assert command(*words, "--train_file", train)[0] == 0
    other = _rows(tmp_path / "other" / "train.jsonl", "a truth")
    status, _, told = command(*words, "--train_file", other)
    assert status == 2
    assert f"{RESULT}: is of another training (the train file has another content)" in told
    state = tmp_path / "run" / STATE
    (tmp_path / "run" / RESULT).rename(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, state, {"identity": json.dumps(result["identity"]), "progress": "{}"})
    status, _, told = command(*words, "--train_file", other)
    assert status == 2
    assert f"{STATE}: is of another training (the train file has another content)" in told
