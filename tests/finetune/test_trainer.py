"""The trainer on two ranks under DeepSpeed, and in fp16: the same training as in one process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from support import DEEPSPEED_CONFIGS

from finetune.classify import ClassifyTask, Part
from finetune.classify_data import Target, make_inputs
from finetune.classify_model import Classifier
from finetune.figures import Score
from finetune.optimizer import WholeState, deepspeed_config
from finetune.processes import Processes
from finetune.tables import read_table
from finetune.trainer import MODEL, STATE, Trainer, TrainSettings
from finetune.weights import load_pretrained

(CONFIG,) = (path for path in DEEPSPEED_CONFIGS if "finetune" in path.name)
SETTINGS = TrainSettings(learning_rate=2e-3, batch_size=12, micro_batch_size=4, epochs=2, layer_decay=0.9)
NUM_SAMPLES = 28


class Interrupting(Trainer):
    """Stops in the second epoch, whose state is that of its beginning."""

    def _step(self) -> tuple[float, float]:
        if self._progress.step == 4:
            raise KeyboardInterrupt
        return super()._step()


def train(
    rank: int, world_size: int, folder: Path, run: Path, settings: TrainSettings, trainer: type[Trainer] = Trainer
) -> None:
    """On the first samples: batches of 3, 3 and 1 micro batches, so that two ranks have not as many."""
    torch.set_num_threads(1)
    processes = Processes(rank, world_size)
    pretrained = load_pretrained(folder / "weights")
    rows = read_table(folder / "train.tsv", ["text", "label"]).rows[:NUM_SAMPLES]
    labels = sorted({label for _, label in rows})
    inputs = make_inputs(pretrained.tokenizer, [(text,) for text, _ in rows], 32)
    classifier = Classifier.make(
        pretrained.model, pretrained.tokenizer, Target(tuple(labels)), 32, processes, settings.seed
    )
    part = Part(inputs, [labels.index(label) for _, label in rows])
    task = ClassifyTask(classifier, part, {"": part}, ("accuracy",))
    try:
        trainer(classifier.model, task, settings, run, processes, {}).train()
    except KeyboardInterrupt:
        assert trainer is Interrupting


def best(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / MODEL / "model.safetensors")


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.fixture(scope="session")
def in_one_process(classify_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in fp32."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(0, 1, classify_folder, run, SETTINGS)
    return run


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def _on_two_ranks(rank: int, folder: Path, out: Path) -> None:
    of = {p: replace(SETTINGS, deepspeed_config=CONFIG, precision=p) for p in ("fp32", "bf16", "fp16")}  # type: ignore[arg-type]
    for precision, settings in of.items():
        train(rank, 2, folder, out / precision, settings)
    train(rank, 2, folder, out / "alone", of["fp32"], Interrupting)
    train(rank, 2, folder, out / "again", of["fp16"], Interrupting)
    train(rank, 2, folder, out / "again", of["fp16"])
    train(rank, 2, folder, out / "without", SETTINGS)


@pytest.mark.slow
def test_two_ranks_are_one_process_with_zero_and_without(
    in_one_process: Path, classify_folder: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks(_on_two_ranks, classify_folder, tmp_path)
    expected = best(in_one_process)
    assert_close(best(tmp_path / "fp32"), expected, 2e-4)
    assert_close(best(tmp_path / "without"), expected, 2e-4)
    for precision in (
        "bf16",
        "fp16",
    ):  # weights of half the precision in the model, fp32 ones beside them and in the file
        found = best(tmp_path / precision)
        assert_close(found, expected, 2e-2)
        weight = found["bert.embeddings.word_embeddings.weight"]
        assert not torch.equal(weight, weight.half().float())
    assert [record["loss_scale"] for record in records(tmp_path / "fp16", "train")] == [2.0**16] * 2
    whole, parts = best(tmp_path / "fp16"), best(tmp_path / "again")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    train(0, 1, classify_folder, tmp_path / "alone", SETTINGS)  # taken up by another number of ranks, without DeepSpeed
    assert_close(best(tmp_path / "alone"), expected, 2e-4)


@pytest.mark.slow
def test_fp16_goes_on_to_the_bit(in_one_process: Path, classify_folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, precision="fp16")
    train(0, 1, classify_folder, tmp_path / "whole", settings)
    train(0, 1, classify_folder, tmp_path / "parts", settings, Interrupting)
    assert (tmp_path / "parts" / STATE).is_file()
    train(0, 1, classify_folder, tmp_path / "parts", settings)
    whole, parts = best(tmp_path / "whole"), best(tmp_path / "parts")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert_close(whole, best(in_one_process), 2e-2)


class _Huge:
    """A loss whose gradient overflows fp16 until the loss scale is small."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self._weight = weight

    def loss(self, samples: Any, epoch: int) -> torch.Tensor:
        return (self._weight.half() * 2.0).sum().float() * len(samples)


def test_the_loss_scale_falls_until_nothing_overflows() -> None:
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(4))})
    optimizer = WholeState(model, _Huge(model["w"]), [{"params": [model["w"]], "scale": 1.0}], Processes(), "fp16", 1.0)
    norms = []
    for _ in range(4):
        optimizer.add([0, 1], 0, 1.0)
        norms.append(optimizer.step(0.1))
    assert norms[:3] == [np.inf] * 3  # 65536 x 4 and its halves are above 65504
    assert norms[3] == pytest.approx(8)
    assert optimizer.loss_scale == 8192
    assert optimizer.state()[1]["num_updates"] == "1"
    torch.testing.assert_close(model["w"].detach(), torch.full((4,), -0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batch_size": 64}, ["train_batch_size is 64, and --batch_size makes it 12"]),
        ({"gradient_clipping": 0.5, "fp16": {"enabled": True}},
         ["gradient_clipping is 0.5, and --max_gradient_norm makes it 1.0", "fp16.enabled is True, and --precision makes it False"]),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, ["scheduler: the learning rate is decided by the flags"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}},
         ["optimizer.params.lr is 1e-05, and --learning_rate makes it 0.002", "optimizer.params.torch_adam: decided"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage: expected 1 or 2, found 3"]),
        ({"zero_optimisation": {}}, ["unknown key zero_optimisation"]),
    ],
)  # fmt: skip
def test_flags_decide_what_is_not_deepspeeds(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **changes}))
    with pytest.raises(ValueError, match=r"ds\.json: ") as raised:
        deepspeed_config(tmp_path / "ds.json", vars(SETTINGS), 2)
    assert all(word in str(raised.value) for word in words), raised.value


def test_auto_is_what_the_flags_say(tmp_path: Path) -> None:
    values = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(values))
    config = deepspeed_config(tmp_path / "ds.json", vars(SETTINGS), 2)
    sizes = config.batch_sizes(2)
    assert (sizes.micro_batch, sizes.accumulation_steps) == (4, 2)  # three micro batches on two ranks
    assert config.values["optimizer"]["params"]["lr"] == 2e-3
    assert config.precision == "fp32"


class _Scores:
    """A task without data, whose validations give these scores."""

    lengths = np.full(4, 3)
    base_learning_rate, base_epochs = 2e-5, 10

    def __init__(self, model: torch.nn.Module, scores: list[float], name: str = "accuracy", sign: float = 1.0) -> None:
        self._model, self._scores, self.score = model, iter(scores), Score(name, sign=sign)
        self.saved: list[float] = []
        self._last = 0.0

    def loss(self, samples: Any, epoch: int) -> torch.Tensor:
        """See Task."""
        return sum(p.sum() for p in self._model.parameters()) * 0.001  # type: ignore[return-value]

    def validate(self) -> dict[str, float]:
        """See Task."""
        self._last = next(self._scores)
        return {"score": self._last}

    def save(self, folder: Path) -> None:
        """See Task."""
        self.saved.append(self._last)


def _train_for(scores: list[float], folder: Path, run: Path, **changes: Any) -> tuple[_Scores, dict[str, Any]]:
    pretrained = load_pretrained(folder / "weights")
    task = _Scores(pretrained.model, scores, **{k: changes.pop(k) for k in ("name", "sign") if k in changes})
    settings = TrainSettings(epochs=len(scores), batch_size=4, **{"learning_rate": 2e-5, **changes})
    return task, Trainer(pretrained.model, task, settings, run, Processes(), {}).train()


def test_the_best_is_the_first_of_the_highest_scores(classify_folder: Path, tmp_path: Path) -> None:
    task, best = _train_for([0.5, 0.75, 0.75, 0.25], classify_folder, tmp_path / "run")
    assert task.saved == [0.5, 0.75]
    assert (best["step"], best["score"]) == (2, 0.75)
    assert len(records(tmp_path / "run", "validation")) == 4
    task, best = _train_for([0.5, 0.5, 0.5, 0.9], classify_folder, tmp_path / "patient", patience=2)
    assert (task.saved, best["step"]) == ([0.5], 1)
    assert len(records(tmp_path / "patient", "validation")) == 3


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_ends_the_training_in_words(
    score: float, classify_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"the validation's accuracy is -?(nan|inf) at step 1, expected a finite number; try a lower --learning_rate",
    ):
        _train_for([score, 0.5], classify_folder, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_best_is_shown_as_what_it_is(classify_folder: Path, tmp_path: Path) -> None:
    """No score before the first validation, and a loss is not shown as its negative."""
    shown: list[str] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return

        def update(self, count: int = 1) -> None:
            return

        def set_postfix_str(self, text: str) -> None:
            shown.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.trainer.progress_bar", lambda *_, **__: Bar())
        _train_for([-8.57, -7.0], classify_folder, tmp_path / "run", name="loss", sign=-1.0)
    assert "best" not in shown[0]
    assert shown[1].endswith(", best loss 8.5700")
