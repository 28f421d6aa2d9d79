"""A training step on several processes: all of them with the whole of AdamW's state, or each with its part, by DeepSpeed's ZeRO.

What a step computes does not depend on which; in fp16 and bf16 DeepSpeed's weights themselves are of that precision beside fp32 ones,
without it products alone are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from torch import nn

from finetune.processes import Processes
from pretrain.device import Precision, agreed_precision, speeds
from pretrain.distributed import join_ranks
from pretrain.ds_config import DeepSpeedConfig
from pretrain.model import has_weight_decay

BETAS, EPS = (0.9, 0.999), 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
_NORM_ELEMENTS = 1 << 16
"""Whose norm is taken at once: of many millions torch's norm on CPU is up to a thousandth too small."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loss(Protocol):
    """See finetune.trainer.Task."""

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """The samples' losses, added up."""


PrecisionFlag = Literal["auto", "fp32", "bf16", "fp16"]


def check_precision(flag: PrecisionFlag) -> None:
    """Raise ValueError if this device does not compute fast in the precision that the flag names."""
    if flag != "auto" and (fault := speeds().missing(flag)):
        raise ValueError(f"--precision {flag}: {fault}")


def decide_precision(flag: PrecisionFlag, processes: Processes) -> Precision:
    """Return the flag's precision, or, for `auto`, the fastest that all processes' devices have."""
    return agreed_precision(processes.gather(speeds()), ("fp16", "bf16", "fp32"), None) if flag == "auto" else flag


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Matrix products in that precision."""
    return torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else nullcontext()


class Optimizer(Protocol):
    """AdamW, gradients and their sum over the processes."""

    num_turns: int
    """How often each process has to call `add` in a step at least."""

    @property
    def loss_scale(self) -> float:
        """Of fp16; 1 in other precisions."""

    def add(self, samples: Sequence[int], epoch: int, share: float) -> torch.Tensor:
        """Compute the samples' loss times `share`, and add its gradient up."""

    def step(self, learning_rate: float) -> float:
        """Update the weights; returns the gradient's norm, infinite where fp16 overflowed and nothing was updated."""

    def computing(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""

    def saving(self) -> AbstractContextManager[Any]:
        """The model's parameters are its fp32 weights meanwhile; all processes take part."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and facts to go on from, the same with and without DeepSpeed; all processes take part."""

    def restore(self, file: Path) -> None:
        """Take them from a safetensors file."""

    def close(self) -> None:
        """At the end of the training."""


class WholeState:
    """Every process has all of AdamW's state; gradients are added up over the processes."""

    num_turns = 0

    def __init__(
        self, model: nn.Module, task: Loss, groups: list[dict[str, Any]], processes: Processes, precision: str,
        max_gradient_norm: float,
    ) -> None:  # fmt: skip
        self._task, self._processes, self._precision = task, processes, precision
        self._max_norm = max_gradient_norm
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=precision == "fp16")
        self._parameters = dict(model.named_parameters())
        self._gradients = torch.zeros(sum(p.numel() for p in self._parameters.values()), device=processes.device)
        start = 0
        for parameter in self._parameters.values():
            parameter.grad = self._gradients[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    @property
    def loss_scale(self) -> float:
        """See Optimizer."""
        return float(self._scaler.get_scale())

    def add(self, samples: Sequence[int], epoch: int, share: float) -> torch.Tensor:
        """See Optimizer."""
        with self.computing():
            loss = self._task.loss(samples, epoch) * share
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """See Optimizer."""
        self._processes.sum(self._gradients)
        self._scaler.unscale_(self._optimizer)
        parts = self._gradients.split(_NORM_ELEMENTS)
        norm = float(nn.utils.get_total_norm(parts))
        if not math.isfinite(norm) and self._scaler.is_enabled():
            norm = math.inf
        elif self._max_norm:
            self._gradients *= min(self._max_norm / (norm + 1e-6), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._gradients.zero_()
        return norm

    def computing(self) -> AbstractContextManager[Any]:
        """See Optimizer."""
        return autocast(self._processes.device, self._precision)

    def saving(self) -> AbstractContextManager[Any]:
        """See Optimizer."""
        return nullcontext()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """See Optimizer."""
        tensors = {_weight(name): parameter.detach() for name, parameter in self._parameters.items()}
        state = self._optimizer.state
        for name, parameter in self._parameters.items():
            tensors |= {_moment(kind, name): state[parameter][kind] for kind in MOMENTS}
        num_updates = int(next(iter(state.values()))["step"])
        return tensors, {"num_updates": str(num_updates), "torch_loss_scale": json.dumps(self._scaler.state_dict())}

    def restore(self, file: Path) -> None:
        """See Optimizer."""
        with safe_open(file, "pt", device=str(self._processes.device)) as stored, torch.no_grad():
            facts = stored.metadata()
            for name, parameter in self._parameters.items():
                parameter.copy_(stored.get_tensor(_weight(name)))
                self._optimizer.state[parameter] = {
                    **{kind: stored.get_tensor(_moment(kind, name)) for kind in MOMENTS},
                    "step": torch.tensor(float(facts["num_updates"]), device=self._processes.device),
                }
        if scale := json.loads(facts.get("torch_loss_scale", "{}")):
            self._scaler.load_state_dict(scale)

    def close(self) -> None:
        """See Optimizer."""


class _LossModule(nn.Module):
    """A task's loss as DeepSpeed takes it: the forward pass of a module that has the parameters."""

    def __init__(self, model: nn.Module, task: Loss) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, samples: Sequence[int], epoch: int, share: float) -> torch.Tensor:
        return self._task.loss(samples, epoch) * share


class _Saved:
    """See pretrain.engine.SavedState."""

    has_moments = True

    def __init__(self, file: Path) -> None:
        self._stored = safe_open(file, "pt")
        facts = self._stored.metadata()
        self.loss_scaler: dict[str, Any] = json.loads(facts.get("deepspeed_loss_scale", "{}"))
        self.num_updates = int(facts["num_updates"])

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """See Partitions."""
        name = name.removeprefix("model.")
        tensor: torch.Tensor = self._stored.get_tensor(_moment(kind, name) if kind in MOMENTS else _weight(name))
        return tensor.flatten()[start:stop]


class PartedState:
    """Each process has its part of AdamW's state, and in stage 2 of the gradients: DeepSpeed's ZeRO."""

    def __init__(
        self, model: nn.Module, task: Loss, groups: list[dict[str, Any]], processes: Processes, config: DeepSpeedConfig
    ) -> None:  # fmt: skip
        from pretrain.engine import Engine  # here, because DeepSpeed takes seconds to import

        join_ranks()
        self._model, self._processes = model, processes
        self._engine = Engine(_LossModule(model, task), config, groups)
        self._scales = [group["scale"] for group in groups]
        self._num_added = 0
        self.num_turns = self._engine.batch_sizes.accumulation_steps

    @property
    def loss_scale(self) -> float:
        """See Optimizer."""
        return self._engine.loss_scale

    def add(self, samples: Sequence[int], epoch: int, share: float) -> torch.Tensor:
        """See Optimizer."""
        loss: torch.Tensor = self._engine.forward(samples, epoch, share)
        self._engine.backward(loss)
        self._num_added += 1
        if self._num_added < self.num_turns:  # the last one's is `step`
            self._engine.step()
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """See Optimizer."""
        self._num_added = 0
        self._engine.set_learning_rates([learning_rate * scale for scale in self._scales])
        self._engine.step()
        return math.inf if self._engine.is_overflow else self._engine.gradient_norm

    def computing(self) -> AbstractContextManager[Any]:
        """See Optimizer."""
        return nullcontext()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """See Optimizer."""
        lower = {parameter: parameter.data for parameter in self._model.parameters()}
        for parameter in lower:
            parameter.data = self._engine.whole(parameter)
        yield
        for parameter, values in lower.items():
            parameter.data = values

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """See Optimizer."""
        tensors = {}
        for name, parameter in self._model.named_parameters():
            tensors[_weight(name)] = self._engine.whole(parameter)
            tensors |= {_moment(kind, name): self._engine.whole(parameter, kind) for kind in MOMENTS}
        facts = {"num_updates": str(self._engine.num_updates)}
        return tensors, facts | {"deepspeed_loss_scale": json.dumps(self._engine.loss_scaler_state)}

    def restore(self, file: Path) -> None:
        """See Optimizer."""
        self._engine.restore(lambda: _Saved(file))

    def close(self) -> None:
        """See Optimizer."""
        self._engine.release()


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return a group for each depth, with and without weight decay; `scale` is what the depth multiplies the learning rate by.

    The embeddings and the relative bias, which all layers share, lie below the first layer, the new output above the last.
    """
    num_layers = len(model.bert.encoder.layer)  # type: ignore[union-attr, arg-type]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        depth = 0 if words[1] in ("embeddings", "encoder") else num_layers + 1
        depth = int(words[3]) + 1 if words[1:3] == ["encoder", "layer"] else depth
        decays = has_weight_decay(name, parameter)
        group = groups.setdefault((depth, decays), {
            "params": [], "weight_decay": weight_decay if decays else 0.0,
            "scale": layer_decay ** (num_layers + 1 - depth),
        })  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())


def deepspeed_config(path: Path, decided: Mapping[str, Any], world_size: int) -> DeepSpeedConfig:
    """The DeepSpeed JSON, with what the flags decide filled in. Raises ValueError where it says otherwise."""
    num_micro = -(-decided["batch_size"] // decided["micro_batch_size"])
    of_sizes = "--batch_size with --micro_batch_size"
    return DeepSpeedConfig(path, {
        "train_batch_size": (decided["batch_size"], "--batch_size"),
        "train_micro_batch_size_per_gpu": (decided["micro_batch_size"], "--micro_batch_size"),
        "gradient_accumulation_steps": (-(-num_micro // world_size), f"{of_sizes} on {world_size} processes"),
        "gradient_clipping": (decided["max_gradient_norm"], "--max_gradient_norm"),
        "optimizer.type": ("AdamW", "fine-tuning"),
        "optimizer.params.lr": (decided["learning_rate"], "--learning_rate"),
        "optimizer.params.betas": ([*BETAS], "fine-tuning"),
        "optimizer.params.eps": (EPS, "fine-tuning"),
        "optimizer.params.weight_decay": (decided["weight_decay"], "--weight_decay"),
        "fp16.enabled": (decided["precision"] == "fp16", "--precision"),
        "bf16.enabled": (decided["precision"] == "bf16", "--precision"),
    })  # fmt: skip


def _weight(name: str) -> str:
    return f"model.{name}"


def _moment(kind: str, name: str) -> str:
    return f"{kind}.{name}"
