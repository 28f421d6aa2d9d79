"""Fine-tuning to classes and numbers, on real sentences, through the command."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from support import run_command

from data_prep.draws import Decision, draw_words
from data_prep.tokenizer import Tokenizer, train_tokenizer
from finetune import Classifier
from finetune.__main__ import main
from finetune.batches import epoch_order, micro_batches, prediction_batches
from finetune.classify_data import make_inputs
from finetune.figures import draw_confusion_matrix, drawable
from finetune.glue import GLUE
from finetune.metrics import classification_metrics, regression_metrics
from finetune.optimizer import parameter_groups
from finetune.runs import GRID
from finetune.tables import read_table
from finetune.trainer import learning_rate_factor
from pretrain.export import read_export
from pretrain.metrics import read_records

QUICK = ("--epochs", "4", "--learning_rate", "2e-3", "--batch_size", "16")


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def folder(classify_folder: Path) -> Path:
    """Not to be changed."""
    return classify_folder


def training(folder: Path, output: Path, *words: object) -> list[str]:
    files = ["--train_file", folder / "train.tsv", "--validation_file", folder / "dev.tsv"]
    return [*map(str, ["classify", "--weights", folder / "weights", "--output", output, *files, *QUICK, "--max_length_tokens", 32, *words])]  # fmt: skip


@pytest.fixture(scope="session")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run, told = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    with mock.patch.object(sys, "argv", ["finetune", *training(folder, run)]), redirect_stderr(told):
        assert main() == 0, told.getvalue()
    assert "are cut to --max_length_tokens 32" in told.getvalue()
    return run


def best_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.slow
def test_it_learns_and_predicts(trained: Path, folder: Path, command: Command, tmp_path: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["validation"]["accuracy"] > 0.75  # chance: 0.5
    for name in ("learning_curve.png", "confusion_matrix.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    assert not (trained / "state.safetensors").exists()
    table = read_table(folder / "dev.tsv", ["text", "label"])
    texts, labels = [row[0] for row in table.rows], [row[1] for row in table.rows]
    predicted = Classifier.load(trained).predict(texts)
    assert accuracy_score(labels, predicted) == summary["validation"]["accuracy"]
    status, out, _ = command("predict", "--model", trained, "--text", *texts[:3])
    assert status == 0
    assert [line.split("\t")[1] for line in out.splitlines()[1:]] == predicted[:3]
    status, _, _ = command("predict", "--model", trained, "--input", folder / "dev.tsv", "--output", tmp_path / "p.tsv")
    assert status == 0
    assert [row[0] for row in read_table(tmp_path / "p.tsv", ["prediction"]).rows] == predicted


@pytest.mark.slow
def test_several_processes_tell_an_error_once(folder: Path, tmp_path: Path) -> None:
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "finetune"]
    done = run_command([*launcher, *training(folder, tmp_path / "run", "--text_column", "words")])
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "finetune classify: error:" in line]
    assert len(told) == 1, done.stderr
    assert "train.tsv: line 1: has no column 'words'" in told[0]


def test_a_launcher_that_tells_too_little_is_not_called_pretraining(
    folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    status, _, err = command(*training(folder, tmp_path / "run"))
    assert status == 2
    assert "RANK is set and MASTER_ADDR is not" in err
    assert "run_pretrain" not in err


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_bit(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    from finetune import trainer

    class Interrupting(trainer.Trainer):
        def _step(self) -> tuple[float, float]:
            if self._progress.step == 37:  # in the third epoch; its state is that of step 30
                raise KeyboardInterrupt
            return super()._step()

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("finetune.runs.Trainer", Interrupting)
        status, _, _ = command(*training(folder, run))
    assert status == 130
    assert (run / "state.safetensors").exists()
    status, _, err = command(*training(folder, run, "--learning_rate", "1e-4"))
    assert status == 2
    assert "learning_rate 0.002, now 0.0001" in err
    assert command(*training(folder, run))[0] == 0
    expected = best_weights(trained)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in best_weights(run).items())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if r["kind"] == "validation"] == [15, 30, 45, 60]
    assert command(*training(folder, run))[0] == 0  # finished: nothing is done again


@pytest.mark.slow
def test_dropout_is_the_weights_own_or_as_told(trained: Path, folder: Path, command: Command, tmp_path: Path) -> None:
    own = read_export(folder / "weights").config.dropout
    assert own == Classifier.load(trained).model.config.dropout == 0.1
    for rate in ("0", "0.3"):
        status, _, err = command(*training(folder, tmp_path / rate, "--epochs", 1, "--dropout", rate))
        assert status == 0, err
        assert Classifier.load(tmp_path / rate).model.config.dropout == float(rate)
    first, second = (read_records(tmp_path / rate)[0] for rate in ("0", "0.3"))
    assert first["loss"] != second["loss"]
    status, _, err = command(*training(folder, tmp_path / "0", "--epochs", 1))
    assert status == 2
    assert "dropout" in err


@pytest.mark.slow
def test_regression_of_pairs_with_seeds_in_bf16(folder: Path, command: Command, tmp_path: Path) -> None:
    words = ("--regression", "--label_column", "length", "--pair_column", "next", "--seeds", 2, "--epochs", 2)
    more = ("--precision", "bf16", "--patience", 1, "--eval_steps", 8, "--layer_decay", 0.9)
    status, _, err = command(*training(folder, tmp_path / "run", *words, *more))
    assert status == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    scores = [run["validation"]["pearson"] for run in summary["runs"]]
    assert len(set(scores)) == 2
    assert summary["mean"]["pearson"] == pytest.approx(np.mean(scores))
    assert summary["standard_deviation"]["pearson"] == pytest.approx(np.std(scores, ddof=1))
    best = max(summary["runs"], key=lambda run: run["validation"]["score"])
    assert summary["best"] == best["name"]
    regressor = Classifier.load(tmp_path / "run")
    values = regressor.predict(["It is a truth.", "A man."], [".hturt a si tI", ".nam A"])
    with pytest.raises(ValueError, match="trained on pairs of texts and is given no second texts"):
        regressor.predict(["It is a truth."])
    with pytest.raises(ValueError, match="1 texts and 2 second texts"):
        regressor.predict(["It is a truth."], ["a", "b"])
    with pytest.raises(ValueError, match="predicts numbers, which have no probabilities"):
        regressor.probabilities(["It is a truth."], ["a"])
    assert all(isinstance(value, float) for value in values)


@pytest.mark.slow
def test_grid(folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRID, "learning_rate", (1e-5, 2e-3))
    for name, values in (("batch_size", (32,)), ("warmup", (0.1,)), ("weight_decay", (0.01,)), ("epochs", (1,))):
        monkeypatch.setitem(GRID, name, values)
    words = training(folder, tmp_path / "run", "--grid", "--seeds", 2)
    for flag in ("--epochs", "--learning_rate", "--batch_size"):
        place = words.index(flag)
        del words[place : place + 2]
    status, _, err = command(*words)
    assert status == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 0, 1]
    of_grid = max(summary["runs"][:2], key=lambda run: run["validation"]["score"])
    assert summary["runs"][2]["learning_rate"] == of_grid["learning_rate"]
    kept = {path.parent.name for path in (tmp_path / "run" / "grid").glob("*/model")}
    assert kept == {of_grid["name"].removeprefix("grid/")}


def test_the_grid_is_the_papers() -> None:
    assert math.prod(map(len, GRID.values())) == 64
    assert (min(GRID["learning_rate"]), max(GRID["learning_rate"])) == (5e-6, 3e-5)


def glue_files(folder: Path, name: str, sentences: list[tuple[str, str]]) -> None:
    """The task's files as GLUE's download has them."""
    task = GLUE[name]
    numbers = {"austen": "1", "bierce": "0"}
    if name == "mnli":
        numbers = {"austen": "entailment", "bierce": "neutral"}
    rows = [(numbers[author], text) for author, text in sentences]
    for file in ("train.tsv", *(file for _, file in task.validation)):
        if task.numbered:
            lines = [f"gj04\t{label}\t\t{text}" for label, text in rows]
        else:
            header = "\t".join(["index", task.text, task.pair or "genre", task.label])
            lines = [header, *(f"{i}\t{text}\t{text[:20]}\t{label}" for i, (label, text) in enumerate(rows))]
        (folder / file).write_text("\n".join(lines) + "\n", "utf-8")
    for file, _ in task.test:
        columns = task.test_columns(file)
        lines = ["\t".join(["index", *columns]), *(f"{i}\t" + "\t".join([text] * len(columns)) for i, (_, text) in enumerate(rows[:5]))]  # fmt: skip
        (folder / file).write_text("\n".join(lines) + "\n", "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cola", "mnli", "sts-b", "qqp"])
def test_glue(name: str, folder: Path, sentences: list[tuple[str, str]], command: Command, tmp_path: Path) -> None:
    glue_files(tmp_path, name, sentences[:40])
    if name == "qqp":
        with open(tmp_path / "train.tsv", "a") as file:
            file.write("77\tbroken\n")
    run = tmp_path / "run"
    words = ("classify", "--glue", name, "--data", tmp_path, "--weights", folder / "weights", "--output", run)
    status, _, err = command(*words, "--epochs", 1, "--max_length_tokens", 32)
    assert status == 0, err
    assert ("1 rows with too few or too many fields are left out" in err) == (name == "qqp")
    values = json.loads((run / "result.json").read_text())["best"]
    names = [f"{metric}{suffix}" for suffix, _ in GLUE[name].validation for metric in GLUE[name].metrics]
    assert values["score"] == pytest.approx(np.mean([values[metric] for metric in names]))
    for _, file in GLUE[name].test:
        lines = (run / "test" / file).read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == list("01234")
        predictions = {line.split("\t")[1] for line in lines[1:]}
        if name == "sts-b":
            assert all(0 <= float(p) <= 5 for p in predictions)
        else:
            assert predictions <= ({"entailment", "neutral"} if name == "mnli" else {"0", "1"})


def test_one_text_is_not_taken_for_many(trained: Path, command: Command) -> None:
    """Python would take a text for a list of its characters."""
    classifier = Classifier.load(trained)
    for call in (classifier.predict, classifier.probabilities, classifier.inputs):
        with pytest.raises(ValueError, match=r"texts is one text, expected a list of texts; write \[text\]"):
            call("It is a truth.")
    with pytest.raises(ValueError, match="pairs is one text"):
        classifier.predict(["a", "b"], "ab")
    with pytest.raises(ValueError, match="trained on single texts and is given pairs"):
        classifier.predict(["a"], ["b"])
    assert len(classifier.predict(["It is a truth."])) == 1
    status, _, err = command("predict", "--model", trained, "--text", "a", "--pair", "b")
    assert (status, "trained on single texts and is given pairs" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "expected either --text or --input"), (["--text", "a", "--input", "x.tsv"], "expected either --text or --input"),
        (["--text", "a", "--question", "b"], "--question: "), (["--passage", "b"], "is a classifier, which takes no such input"),
        (["--text", "a", "--text_column", "b"], "--text_column and --pair_column go with --input"),
    ],
)  # fmt: skip
def test_flags_of_predict_that_do_not_fit_are_refused(
    words: list[str], fault: str, trained: Path, command: Command
) -> None:
    status, out, err = command("predict", "--model", trained, *words)
    assert (status, out) == (2, "")
    assert fault in err


def test_predictions_go_to_a_new_folder(trained: Path, command: Command, tmp_path: Path) -> None:
    status, _, err = command(
        "predict", "--model", trained, "--text", "a", "b", "--output", tmp_path / "new" / "dir" / "p.tsv"
    )
    assert status == 0, err
    assert len((tmp_path / "new" / "dir" / "p.tsv").read_text().splitlines()) == 3


def test_a_folder_of_another_kind_is_told_in_words(
    trained: Path, folder: Path, command: Command, tmp_path: Path
) -> None:
    for words, fault in (
        (("predict", "--model", folder / "weights"), "is a pre-trained model; expected one that `classify` or `answer` fine-tuned"),
        (("generate", "--model", trained, "--text", "a"),
         "is what `python -m finetune classify` writes; expected what `python -m finetune seq2seq` writes"),
        (("generate", "--model", folder / "weights", "--text", "a"), "is a pre-trained model; fine-tune it, or pass it as --weights; expected"),
        (("predict", "--model", tmp_path, "--text", "a"), "no fine-tuned model there; train one first"),
    ):  # fmt: skip
        status, _, err = command(*words)
        assert status == 2
        assert fault in err
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: no fine-tuned model's; expected the folder of a run"):
        Classifier.load(tmp_path)
    values = json.loads((trained / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "version": 1}))
    with pytest.raises(
        ValueError, match=r"is of version 1 of its format, and this program reads version 2; train it again"
    ):
        Classifier.load(tmp_path)


@pytest.mark.parametrize(
    "names", [["$a_$", "$_{b$"], ["经济", "体育"], ["\ue123", "x" * 99, "a\tb"], [str(i) for i in range(99)]]
)
def test_any_class_names_can_be_drawn(names: list[str], tmp_path: Path) -> None:
    """Also those that are broken formulas, and those that no font here has."""
    draw_confusion_matrix(tmp_path / "m.png", [0, 1, 1], [0, 1, 0], names)
    content = (tmp_path / "m.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))
    assert 300 < width == height <= 3000


def test_names_that_no_font_has_are_numbers() -> None:
    from matplotlib import font_manager

    families, shown = drawable(["austen", "\ue123", "$a_$", "x" * 40], font_manager)
    assert families == ["DejaVu Sans"]
    assert shown == ["austen", "1", "$a_$", "x" * 30 + "…"]


def test_nine_tasks() -> None:
    assert len(GLUE) == 9
    assert GLUE["cola"].metrics == ("matthews",)
    assert GLUE["mrpc"].metrics == GLUE["qqp"].metrics == ("accuracy", "f1")


@pytest.mark.parametrize(
    ("changes", "content", "words"),
    [
        ({"--text_column": "words"}, None, ["train.tsv: line 1: has no column 'words'", "label, text, next"]),
        ({"--train_file": "bad.tsv"}, "", ["bad.tsv: is empty"]),
        ({"--train_file": "bad.tsv"}, "label\ttext\n", ["bad.tsv: has no rows"]),
        ({"--train_file": "bad.tsv"}, "label\ttext\na\tx\nb\n", ["bad.tsv: line 3: has 1 fields, expected 2, as the header has"]),
        ({"--train_file": "bad.tsv"}, "label\ttext\na\tx\n", ["bad.tsv: the only label is 'a'"]),
        ({"--validation_file": "bad.tsv"}, "label\ttext\naustin\tx\n", ["bad.tsv: line 2: label 'austin'", "austen, bierce"]),
        ({"--regression": None}, None, ['train.tsv: line 2: label is "', "expected a number"]),
        ({"--train_file": "bad.jsonl"}, '{"label": 1, "text": "x"}\n{"label": 2}\n', ["bad.jsonl: line 2: has no column 'text'"]),
        ({"--train_file": "bad.jsonl"}, '{"label": 1, "text": ["x"]}\n', ['bad.jsonl: line 1: text is ["x"]']),
        ({"--train_file": "bad.jsonl"}, '{"label": 1,\n', ["bad.jsonl: line 1: not valid JSON"]),
        ({"--train_file": "bad.xls"}, "x", ["bad.xls: expected a file that ends in .tsv"]),
        ({"--train_file": "none.tsv"}, None, ["none.tsv: No such file"]),
        ({"--weights": "none"}, None, ["none: no such folder or file of weights"]),
        ({"--weights": "other.weights"}, None, ["not the tokenizer this model was trained with"]),
        ({"--deepspeed_config": "none.json"}, None, ["none.json: no such DeepSpeed configuration"]),
        ({"--warmup": "2", "--batch_size": "0"}, None, ["warmup is 2.0", "batch_size is 0"]),
        ({"--glue": "boolq", "--train_file": None, "--validation_file": None}, None, ["--glue boolq", "wnli"]),
    ],
)  # fmt: skip
def test_bad_input(
    changes: dict[str, Any], content: str | None, words: list[str], folder: Path, command: Command, tmp_path: Path
) -> None:
    given = {
        "--train_file": folder / "train.tsv",
        "--validation_file": folder / "dev.tsv",
        "--weights": folder / "weights",
    }
    given["--output"] = tmp_path / "run"
    if "other.weights" in changes.values():
        shutil.copytree(folder / "weights", tmp_path / "other.weights")
        train_tokenizer(["another text of a few words"] * 9, tmp_path / "other.model", vocab_size=20)
        shutil.copy(tmp_path / "other.model", tmp_path / "other.weights" / "tokenizer.model")
    flags: list[object] = []
    for flag, value in {**given, **changes}.items():
        if flag == "--regression":
            flags.append(flag)
        elif value is not None:
            flags += [flag, tmp_path / value if (isinstance(value, str) and "." in value) or value == "none" else value]
            if isinstance(value, str) and value.startswith("bad") and content is not None:
                (tmp_path / value).write_text(content)
    status, _, err = command("classify", *flags)
    assert status == 2
    assert err.count("error:") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


def test_tables_agree(tmp_path: Path) -> None:
    rows = [("a, b", 'say "x"'), ("é\u2028", "2")]
    (tmp_path / "t.tsv").write_text('﻿x\ty\r\na, b\tsay "x"\r\né\u2028\t2\r\n', "utf-8", newline="")
    (tmp_path / "t.csv").write_text('y,z,x\n"say ""x""",,"a, b"\n2,"two\nlines",é\u2028\n', "utf-8", newline="")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in rows), "utf-8")
    for name, lines in (("t.tsv", [2, 3]), ("t.csv", [2, 3]), ("t.jsonl", [1, 2])):
        table = read_table(tmp_path / name, ["x", "y"])
        assert (table.rows, table.lines) == (rows, lines), name


@pytest.mark.parametrize("lengths", [(3, 3), (20, 3), (3, 20), (20, 20), (20, 9), (0, 30)])
def test_truncation_is_longest_first(lengths: tuple[int, int], sentence_piece: Tokenizer) -> None:
    texts = ["the " * length for length in lengths]
    whole = make_inputs(sentence_piece, [tuple(texts)], 1000)
    found = make_inputs(sentence_piece, [tuple(texts)], 20)
    counts = [whole.segments(0).count(0) - 2, whole.segments(0).count(1) - 1]
    assert found.num_truncated == (sum(counts) > 17)
    while sum(counts) > 17:  # the plain definition
        counts[counts[1] >= counts[0]] -= 1
    assert found.segments(0) == [0] * (counts[0] + 2) + [1] * (counts[1] + 1)
    sos, eos = sentence_piece.sos_id, sentence_piece.eos_id
    start = whole.segments(0).count(0)
    ids = whole.ids[0].tolist()
    assert found.ids[0].tolist() == [sos, *ids[1 : counts[0] + 1], eos, *ids[start : start + counts[1]], eos]


def test_metrics_are_the_libraries() -> None:
    random_numbers = np.random.default_rng(0)
    labels, predicted = random_numbers.integers(0, 2, (2, 50)).tolist()
    assert classification_metrics(labels, predicted, 2) == {
        "accuracy": accuracy_score(labels, predicted), "f1": f1_score(labels, predicted),
        "matthews": matthews_corrcoef(labels, predicted),
    }  # fmt: skip
    values, numbers = random_numbers.normal(size=(2, 50)).tolist()
    found = regression_metrics(values, numbers)
    assert (found["pearson"], found["spearman"]) == (pearsonr(values, numbers)[0], spearmanr(values, numbers)[0])
    assert regression_metrics([1.0, 2.0], [3.0, 3.0])["pearson"] == 0


def test_batches() -> None:
    lengths = np.array([5, 9, 2, 7, 100, 1])
    assert [part.tolist() for part in micro_batches(np.array([0, 1, 2, 3, 5]), lengths, 2)] == [[1, 3], [0, 2], [5]]
    parts = list(prediction_batches(lengths, 16))
    assert sorted(np.concatenate(parts).tolist()) == [*range(6)]
    assert all(lengths[part].sum() <= 16 or len(part) == 1 for part in parts)
    orders = [epoch_order(3, epoch, 50).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == [*range(50)]
    assert orders[1] == np.argsort(draw_words(3, Decision.FINETUNING_ORDER, 0, 50, 1, variant=1)[:, 0]).tolist()


def test_learning_rate() -> None:
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_layers_learn_at_their_own_rate(trained: Path) -> None:
    model = Classifier.load(trained).model
    groups = parameter_groups(model, 0.01, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scales.keys() == set(names.values())
    assert scales["bert.embeddings.word_embeddings.weight"] == (0.125, 0.01)
    assert scales["bert.encoder.rel_pos_bias.weight"] == (0.125, 0)
    assert scales["bert.encoder.layer.0.intermediate.dense.weight"] == (0.25, 0.01)
    assert scales["bert.encoder.layer.1.output.LayerNorm.weight"] == (0.5, 0)
    assert scales["bert.pooler.dense.bias"] == scales["classifier.bias"] == (1, 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_predicts_the_same_classes(
    precision: str, trained: Path, folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 160 sentences at most one is predicted otherwise."""
    monkeypatch.setattr("pretrain.device.Speeds.missing", lambda self, precision: None)
    rows = {}
    for one in ("fp32", precision):
        words = ("--input", folder / "dev.tsv", "--output", tmp_path / one, "--precision", one)
        status, _, err = command("predict", "--model", trained, *words)
        assert status == 0, err
        rows[one] = [line.split("\t") for line in (tmp_path / one).read_text("utf-8").splitlines()[1:]]
    assert len(rows["fp32"]) == 160
    pairs = [*zip(*rows.values(), strict=True)]
    assert sum(a[1] == b[1] for a, b in pairs) >= 0.99 * len(pairs)
    differences = [abs(float(a[2]) - float(b[2])) for a, b in pairs]
    assert 0 < max(differences) < 0.05


def test_a_precision_that_the_device_has_not_is_refused(
    trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.device.Speeds.missing", lambda self, precision: "this device has it not")
    status, _, err = command("predict", "--model", trained, "--text", "a", "--precision", "fp16")
    assert status == 2
    assert "--precision fp16: this device has it not" in err
