"""Learning rate and epochs that nobody named, what is said of a result no better than chance, and honest figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from finetune.classify import Part, chance_in_words, most_frequent
from finetune.classify_data import Inputs, Target
from finetune.figures import Score, learning_curve
from finetune.tokens import TokenListsBuilder
from finetune.trainer import TrainSettings

Command = Callable[..., tuple[int, str, str]]
NO_INPUTS = Inputs(TokenListsBuilder(10).build(), np.zeros(0, dtype=np.int32))


@pytest.mark.parametrize(("hidden_size", "rate"), [(768, 2e-5), (1024, 1.2e-5), (384, 7e-5), (128, 5e-4)])
def test_the_learning_rate_follows_the_width(hidden_size: int, rate: float) -> None:
    assert TrainSettings().decided(hidden_size, 10**6, 2e-5, 10).learning_rate == rate
    assert TrainSettings(learning_rate=3e-3).decided(hidden_size, 10**6, 2e-5, 10).learning_rate == 3e-3


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "epochs"),
    [
        (240, 32, 25),  # 8 steps an epoch: 200 steps
        (241, 32, 25),
        (257, 32, 23),  # 9 steps an epoch
        (240, 16, 14),
        (10, 32, 40),  # never more
        (10**6, 32, 10),
        (640, 32, 10),  # 20 steps an epoch: 200 steps in the task's epochs
        (608, 32, 11),
    ],
)
def test_few_samples_are_seen_more_often(num_samples: int, batch_size: int, epochs: int) -> None:
    settings = TrainSettings(batch_size=batch_size)
    assert settings.decided(768, num_samples, 2e-5, 10).epochs == epochs
    assert TrainSettings(epochs=3).decided(768, num_samples, 2e-5, 10).epochs == 3


def test_what_was_decided_is_said_and_kept(classify_folder: Path, command: Command, tmp_path: Path) -> None:
    """The model is 48 wide; 240 samples are 8 steps of 32. `--batch_size` 240 makes an epoch a step, which is quick."""
    words = ["--weights", classify_folder / "weights", "--train_file", classify_folder / "train.tsv"]
    words += ["--validation_file", classify_folder / "dev.tsv", "--output", tmp_path, "--max_length_tokens", 16]
    status, _, err = command("classify", *words, "--batch_size", 240, "--epochs", 1)
    assert status == 0, err
    rate = float(f"{2e-5 * (768 / 48) ** 1.8:.1e}")
    assert f"learning_rate {rate:g}, by the model's width and the 240 samples" in err
    (run,) = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert (run["learning_rate"], run["epochs"]) == (rate, 1)
    identity = json.loads((tmp_path / "result.json").read_text())["identity"]
    assert identity["learning_rate"] == rate
    status, _, err = command("classify", *words, "--batch_size", 240, "--epochs", 1, "--learning_rate", rate)
    assert status == 0, "what was decided is the same as what is given"
    assert "by the model's width" not in err


def part(labels: list[float]) -> Part:
    return Part(NO_INPUTS, np.array(labels))


def test_a_result_no_better_than_chance_is_named() -> None:
    target = Target(("austen", "bierce"))
    rows = part([0] * 83 + [1] * 77)
    assert most_frequent(rows) == (0, 83 / 160)
    for num_right, words in (
        (79, "is no better"),
        (83, "is no better"),
        (84, "is hardly better"),
        (89, "is hardly better"),
    ):
        said = chance_in_words("dev.tsv", rows, target, {"accuracy": num_right / 160}, "")
        assert said is not None
        assert f"accuracy {num_right / 160:.4f} of 160 rows {words} than always answering 'austen' (0.5188)" in said
        assert "--epochs" in said
    # a standard error is 6.3 rows
    assert chance_in_words("dev.tsv", rows, target, {"accuracy": 90 / 160}, "") is None
    assert chance_in_words("dev.tsv", part([1, 1, 1]), target, {"accuracy_mm": 1.0}, "_mm") is not None
    numbers = Target(mean=2.0, scale=3.0)
    assert "no better than always the mean" in str(chance_in_words("d", rows, numbers, {"pearson": 0.0}, ""))
    assert chance_in_words("d", rows, numbers, {"pearson": 0.4}, "") is None


def records(scores: list[float]) -> list[dict[str, float | str]]:
    train = [{"kind": "train", "step": step, "loss": 0.7 - step / 1000} for step in range(10, 41, 10)]
    return [*train, *({"kind": "validation", "step": 10 * n + 10, "score": s} for n, s in enumerate(scores))]


def test_a_curve_does_not_stretch_a_gain_of_one_sentence() -> None:
    figure = Figure()
    learning_curve(figure, records([0.50, 0.506, 0.512, 0.506]), Score("accuracy", (0.0, 1.0), 0.52), "authors")
    of_loss, of_score = figure.axes
    low, high = of_score.get_ylim()
    assert low <= 0 < 1 <= high
    assert of_loss.get_ylim()[0] == 0
    assert figure.get_suptitle() == "authors: best accuracy 0.512, at step 30"
    chance = of_score.get_lines()[1]
    assert list(chance.get_ydata()) == [0.52, 0.52]
    assert [text.get_text() for text in of_score.get_legend().get_texts()] == [
        "validation",
        "most frequent class: 0.52",
    ]
    assert of_score.get_ylabel() == "accuracy in validation"


@pytest.mark.parametrize(
    ("score", "values", "title", "limits"),
    [
        (Score("loss", sign=-1.0), [-3.0, -2.0, -2.5], "run: best loss 2, at step 20", (0.0, None)),
        (Score("matthews", (-1.0, 1.0), 0.0), [0.1, 0.3, 0.2], "run: best matthews 0.3, at step 20", (-0.02, 1.02)),
        (Score("pearson", (-1.0, 1.0), 0.0), [-0.1, 0.3, 0.2], "run: best pearson 0.3, at step 20", (-1.04, 1.04)),
        (Score("f1", (0.0, 100.0)), [1.0, 7.0, 7.0], "run: best f1 7, at step 20", (-2.0, 102.0)),
    ],
)
def test_every_score_has_its_range(
    score: Score, values: list[float], title: str, limits: tuple[float, float | None]
) -> None:
    figure = Figure()
    learning_curve(figure, records(values), score, "run")
    found = figure.axes[1].get_ylim()
    assert figure.get_suptitle() == title
    assert found[0] == pytest.approx(limits[0], abs=0.021)
    assert limits[1] is None or found[1] == pytest.approx(limits[1], abs=0.021)
