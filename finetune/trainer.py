"""The training loop of every task: AdamW, validation, the best weights kept, and a state to go on from.

    RUN/model/             the weights that were best in validation, with config.json and the tokenizer
    RUN/metrics.jsonl      a record of each step logged and each validation; TensorBoard's files beside it
    RUN/learning_curve.png
    RUN/state.safetensors  what an interrupted training goes on from; removed at the end
    RUN/result.json        written last: the best validation

A batch is cut into micro batches of samples of similar length, and the processes take turns at them. Dropout's numbers are
those of the micro batch. So the result does not depend on how many processes there are, but for the rounding of sums.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data_prep.console import progress_bar
from data_prep.files import read_json, unfinished_file, write_json
from finetune.batches import epoch_order, micro_batches
from finetune.figures import Score, draw_learning_curve
from finetune.identity import refuse_other
from finetune.optimizer import (
    Optimizer,
    PartedState,
    PrecisionFlag,
    WholeState,
    decide_precision,
    deepspeed_config,
    parameter_groups,
)
from finetune.processes import Processes
from pretrain.lock import hold_run
from pretrain.metrics import Metrics, read_records

MODEL, STATE, RESULT, CURVE = "model", "state.safetensors", "result.json", "learning_curve.png"
_LOG_STEPS = 10
_BASE_WIDTH, _WIDTH_EXPONENT = 768, 1.8
_FEWEST_STEPS, _MOST_EPOCHS = 200, 40
"""Of the default number of epochs. The exponent is that of a line through rates that worked: docs/finetuning.md."""
_SMALLEST_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class TrainSettings:
    """How a task is trained; the defaults are of the paper's grid for GLUE, for a model as wide as its."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW; by default the task's for a model 768 wide (2e-5; to write 7e-5), more for a narrower one."""
    batch_size: int = 32
    """Samples of a step, all processes together."""
    epochs: int | None = None
    """Times that every sample is seen; by default the task's (10; answers 4), more where these are few steps."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0; then it falls to 0."""
    weight_decay: float = 0.01
    """Of all weights but biases, LayerNorm and the relative position bias."""
    layer_decay: float = 1.0
    """The learning rate of each layer is this times that of the layer above it; 1 = all the same."""
    max_gradient_norm: float = 1.0
    """Larger gradients are scaled down to this norm; 0 = never."""
    micro_batch_size: int = 8
    """Samples computed at once; the processes share a batch's micro batches."""
    precision: PrecisionFlag = "fp32"
    """Precision of matrix products; AdamW and the weights it updates stay in fp32. fp16 has a dynamic loss scale. `auto`
    is the fastest precision that the device has."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON with ZeRO stage 1 or 2 (ds_configs/zero2_finetune.json): each process has a part of AdamW's state."""
    eval_steps: int = 0
    """Steps from one validation to the next, after each of which an interrupted training can go on; 0 = an epoch."""
    patience: int = 0
    """Training ends after so many validations without a better score; 0 = never early."""
    seed: int = 0
    """Key of the new weights, the order of samples and dropout."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}, expected at least {least}"
            for name, least in {
                "batch_size": 1, "micro_batch_size": 1, "eval_steps": 0, "patience": 0,
                "weight_decay": 0, "max_gradient_norm": 0, "seed": 0,
            }.items()
            if not getattr(self, name) >= least
        ]  # fmt: skip
        if self.epochs is not None and self.epochs < 1:
            faults.append(f"epochs is {self.epochs}, expected at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            faults.append(f"learning_rate is {self.learning_rate}, expected more than 0")
        if not 0 <= self.warmup <= 1:
            faults.append(f"warmup is {self.warmup}, expected 0 to 1")
        if not 0 < self.layer_decay <= 1:
            faults.append(f"layer_decay is {self.layer_decay}, expected more than 0 and at most 1")
        if faults:
            raise ValueError("; ".join(faults))

    def decided(self, hidden_size: int, num_samples: int, learning_rate: float, epochs: int) -> TrainSettings:
        """Return these settings with a learning rate and epochs, for a model this wide and so many samples.

        `learning_rate` is the task's for a model 768 wide, `epochs` the task's for many samples.
        """
        if self.learning_rate is None:
            scaled = learning_rate * (_BASE_WIDTH / hidden_size) ** _WIDTH_EXPONENT
            learning_rate = float(f"{scaled:.1e}")
        steps_per_epoch = -(-num_samples // self.batch_size)
        epochs = max(epochs, min(-(-_FEWEST_STEPS // steps_per_epoch), _MOST_EPOCHS))
        return replace(self, learning_rate=self.learning_rate or learning_rate, epochs=self.epochs or epochs)


class Task(Protocol):
    """What is trained for."""

    lengths: np.ndarray
    """Tokens of each sample to train on."""
    base_learning_rate: float
    """Peak learning rate of a model 768 wide."""
    base_epochs: int
    """Times that every sample is seen, if there are many."""

    @property
    def score(self) -> Score:
        """Return which metric the score is."""

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """The samples' losses, added up; what is drawn anew for each epoch depends on it."""

    def validate(self) -> dict[str, float]:
        """Metrics; the one named `score` is better if higher."""

    def save(self, folder: Path) -> None:
        """Write the model as it is, whole; called by one process."""


@dataclass
class _Progress:
    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    num_worse: int = 0
    """Validations since the best."""


def seed_for(*key: object) -> int:
    """A seed of torch's generator for this key."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def learning_rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """What step 0, 1, ... multiplies the peak learning rate by: up in a line, down in a line."""
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return (num_steps - step) / (num_steps - num_warmup)


class Trainer:
    """Trains `model` in the folder `run`, from where an interrupted training of the same identity was."""

    def __init__(
        self, model: nn.Module, task: Task, settings: TrainSettings, run: Path, processes: Processes, identity: dict[str, Any]
    ) -> None:  # fmt: skip
        """`identity`: what else the result depends on. Raises ValueError where the run in the folder is another."""
        self._model, self._task, self._settings, self._run, self._processes = model, task, settings, run, processes
        chosen = {name: value for name, value in asdict(settings).items() if name != "deepspeed_config"}
        self._identity = json.loads(json.dumps({**chosen, **identity}))
        num_samples = len(task.lengths)
        assert settings.learning_rate is not None, "call TrainSettings.decided"
        assert settings.epochs is not None, "call TrainSettings.decided"
        self._peak = settings.learning_rate
        self._steps_per_epoch = -(-num_samples // settings.batch_size)
        self._num_steps = self._steps_per_epoch * settings.epochs
        groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
        self._precision = decide_precision(settings.precision, processes)
        self._optimizer: Optimizer
        if settings.deepspeed_config is None:
            self._optimizer = WholeState(model, task, groups, processes, self._precision, settings.max_gradient_norm)
        else:
            decided = {**chosen, "precision": self._precision}
            config = deepspeed_config(settings.deepspeed_config, decided, processes.world_size)
            self._optimizer = PartedState(model, task, groups, processes, config)
        self._progress = _Progress()

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the best validation's metrics, with its `step`."""
        if self._processes.is_first:
            self._run.mkdir(parents=True, exist_ok=True)
            with hold_run(self._run, console=sys.stderr):
                result = self._train()
        else:
            result = self._train()
        self._processes.wait()
        self._optimizer.close()
        return result

    def _train(self) -> dict[str, Any]:
        self._processes.wait()
        if (finished := read_result(self._run)) is not None:
            refuse_other(self._run / RESULT, finished["identity"], self._identity, "training")
            return dict(finished["best"])
        self._resume()
        self._processes.wait()
        progress, settings, is_first = self._progress, self._settings, self._processes.is_first
        metrics = Metrics(self._run, progress.step) if is_first else None
        every = settings.eval_steps or self._steps_per_epoch
        loss_sum, num_losses, num_steps, started = 0.0, 0, 0, time.monotonic()
        bar = progress_bar(
            self._run.name, self._num_steps, "step", initial=progress.step, is_shown=is_first, is_lasting=False
        )
        with bar:
            while progress.step < self._num_steps and not self._is_at_end():
                loss, norm = self._step()
                is_skipped = self._precision == "fp16" and math.isinf(norm)
                if not is_skipped:
                    loss_sum, num_losses = loss_sum + loss, num_losses + 1
                num_steps += 1
                step = progress.step = progress.step + 1
                bar.update()
                is_due = step % every == 0 or step == self._num_steps
                if step % _LOG_STEPS == 0 or is_due:
                    is_hopeless = is_skipped and self._optimizer.loss_scale <= _SMALLEST_LOSS_SCALE
                    if is_hopeless or not math.isfinite(loss_sum):
                        raise ValueError(
                            f"{self._run}: the loss is not a number at step {step}; try a lower --learning_rate than "
                            f"{settings.learning_rate}"
                        )
                    if metrics is not None:
                        samples_per_s = num_steps * settings.batch_size / (time.monotonic() - started)
                        metrics.record("train", step, {
                            "loss": loss_sum / max(1, num_losses), "gradient_norm": norm,
                            "samples_per_s": round(samples_per_s, 2),
                            "learning_rate": self._learning_rate(step - 1), "epoch": step / self._steps_per_epoch,
                            **({"loss_scale": self._optimizer.loss_scale} if self._precision == "fp16" else {}),
                        })  # fmt: skip
                    bar.set_postfix_str(f"loss {loss_sum / max(1, num_losses):.4f}{self._best_in_words()}")
                    loss_sum, num_losses, num_steps, started = 0.0, 0, 0, time.monotonic()
                if is_due:
                    self._validate(metrics)
                    started = time.monotonic()
        best = {"step": progress.best_step, "score": progress.best_score}
        if metrics is not None:
            metrics.close()
            best = next(
                {name: value for name, value in record.items() if name not in ("kind", "time")}
                for record in read_records(self._run)
                if record["kind"] == "validation" and record["step"] == progress.best_step
            )
            self._draw_curve()
            write_json(self._run / RESULT, {"best": best, "steps": progress.step, "identity": self._identity})
            (self._run / STATE).unlink(missing_ok=True)
        return dict(self._processes.gather(best)[0])

    def _best_in_words(self) -> str:
        if not self._progress.best_step:
            return ""
        return f", best {self._task.score.name} {self._task.score.sign * self._progress.best_score:.4f}"

    def _draw_curve(self) -> None:
        draw_learning_curve(self._run / CURVE, read_records(self._run), self._task.score)

    def _is_at_end(self) -> bool:
        return 0 < self._settings.patience <= self._progress.num_worse

    def _learning_rate(self, step: int) -> float:
        return self._peak * learning_rate_factor(step, self._num_steps, self._settings.warmup)

    def _step(self) -> tuple[float, float]:
        settings, processes, step = self._settings, self._processes, self._progress.step
        epoch, in_epoch = divmod(step, self._steps_per_epoch)
        order = epoch_order(settings.seed, epoch, len(self._task.lengths))
        batch = order[in_epoch * settings.batch_size : (in_epoch + 1) * settings.batch_size]
        self._model.train()
        loss_sum = torch.zeros((), device=processes.device)
        parts = micro_batches(batch, self._task.lengths, settings.micro_batch_size)
        mine = range(processes.rank, len(parts), processes.world_size)
        for place in mine:
            torch.manual_seed(seed_for("dropout", settings.seed, step, place))
            loss_sum += self._optimizer.add(parts[place].tolist(), epoch, 1 / len(batch))
        for _ in range(len(mine), self._optimizer.num_turns):
            self._optimizer.add(parts[-1][-1:].tolist(), epoch, 0.0)
        processes.sum(loss_sum)
        return float(loss_sum), self._optimizer.step(self._learning_rate(step))

    def _validate(self, metrics: Metrics | None) -> None:
        progress = self._progress
        self._model.eval()
        with torch.no_grad(), self._optimizer.computing():
            values = self._task.validate()
        if not math.isfinite(values["score"]):
            raise ValueError(
                f"{self._run}: the validation's {self._task.score.name} is {values['score']} at step {progress.step}, expected a finite "
                f"number; try a lower --learning_rate than {self._settings.learning_rate}, or --precision fp32"
            )
        is_better = values["score"] > progress.best_score
        progress.num_worse = 0 if is_better else progress.num_worse + 1
        if is_better:
            progress.best_score, progress.best_step = values["score"], progress.step
        if metrics is not None:
            metrics.record("validation", progress.step, {**values, "epoch": progress.step / self._steps_per_epoch})
        if is_better:
            with self._optimizer.saving():
                if metrics is not None:
                    (self._run / MODEL).mkdir(exist_ok=True)
                    self._task.save(self._run / MODEL)
        if progress.step < self._num_steps and not self._is_at_end():
            self._save_state()
        if metrics is not None:
            self._draw_curve()

    def _save_state(self) -> None:
        tensors, facts = self._optimizer.state()
        if not self._processes.is_first:
            return
        facts |= {"progress": json.dumps(asdict(self._progress)), "identity": json.dumps(self._identity)}
        with unfinished_file(self._run / STATE) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, facts)

    def _resume(self) -> None:
        file = self._run / STATE
        if not file.is_file():
            return
        try:
            with safe_open(file, "pt") as stored:
                facts = stored.metadata()
            refuse_other(file, json.loads(facts["identity"]), self._identity, "training")
            self._optimizer.restore(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: is damaged ({error}); remove it to train from the beginning") from None
        self._progress = _Progress(**json.loads(facts["progress"]))


def read_result(run: Path) -> dict[str, Any] | None:
    """What a finished training came to; None where there is none."""
    return read_json(run / RESULT) if (run / RESULT).is_file() else None
