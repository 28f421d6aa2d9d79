"""DeepSpeed in one small class. The only file that imports it."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import deepspeed
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime import compiler
from pydantic import ValidationError
from torch import nn

from data_prep.console import describe_error
from data_prep.errors import UserError
from pretrain.distributed import current_device, gather, leave_ranks, new_group, rank, world_size
from pretrain.ds_config import BatchSizes, DeepSpeedConfig
from pretrain.layout import Layout
from pretrain.model import PretrainingLosses, has_weight_decay
from pretrain.partitions import MOMENTS, WEIGHT, Partitions


def _import_muon_without_compiler() -> None:
    """Import DeepSpeed's Muon optimizer so that it does not load torch's compiler.

    `deepspeed.initialize` imports it, nothing here uses it, and the compiler takes two seconds of every start.
    """
    make_decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with suppress(ImportError):  # of a version of DeepSpeed without it
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = make_decorator


_import_muon_without_compiler()

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The attributes of DeepSpeed's dynamic loss scaler that change while it works. Its others are settings of the JSON."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: no weight decay on biases, LayerNorm and the relative position bias."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decay if has_weight_decay(name, parameter) else no_decay).append(parameter)
    return [{"params": decay, "name": "decay"}, {"params": no_decay, "name": "no_decay", "weight_decay": 0.0}]


def make_optimizer(groups: list[dict[str, Any]], section: dict[str, Any]) -> torch.optim.Optimizer:
    """Return torch's fused Adam or AdamW as the `optimizer` section of the DeepSpeed JSON describes it.

    As in DeepSpeed, the type Adam means decoupled weight decay (AdamW) unless its adam_w_mode is false. Torch's optimizer
    is compiled already, is as fast as DeepSpeed's, and its steps after a resume have the same bits as without one.
    """
    settings = {key: value for key, value in section["params"].items() if key in ("lr", "betas", "eps", "weight_decay")}
    is_decoupled = str(section["type"]).lower() == "adamw" or section["params"].get("adam_w_mode", True)
    kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    return kind(groups, fused=True, **{"weight_decay": 0.0, **settings})


class SavedState(Protocol):
    """What an engine's state is restored from."""

    loss_scaler: dict[str, Any]
    """State of fp16's loss scaler; empty if another precision was trained in."""
    num_updates: int
    """Steps that Adam had made."""

    @property
    def has_moments(self) -> bool:
        """Whether Adam had made a step."""

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """See Partitions."""


class _Unstepped:
    """The state of an engine that has done no step, as `SavedState`."""

    num_updates, has_moments = 0, False

    def __init__(self, model: nn.Module, dtype: torch.dtype, loss_scaler: dict[str, Any]) -> None:
        """`dtype`: of the weights in training, from which DeepSpeed takes its fp32 ones."""
        self.loss_scaler = loss_scaler
        self._weights = {name: weight.detach().flatten().to(dtype).float() for name, weight in model.named_parameters()}

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return self._weights[name][start:stop]


_S = TypeVar("_S", bound=SavedState)


class Engine:
    """A model under DeepSpeed: forward, backward, step, checkpoint, and sums over the ranks.

    Cures a defect of DeepSpeed 0.19, which a test shows to be there still: see `_defer_loss_scale_update`.
    """

    def __init__(self, model: nn.Module, config: DeepSpeedConfig, groups: list[dict[str, Any]] | None = None) -> None:
        """Give `model` to DeepSpeed. `groups`: the optimizer's parameter groups, by default those of `parameter_groups`.

        Raises ValueError for a configuration that DeepSpeed refuses.
        """
        self.rank, self.world_size = rank(), world_size()
        self.batch_sizes: BatchSizes = config.batch_sizes(self.world_size)
        values = {**config.values, **_three_sizes(self.batch_sizes)}
        groups = groups or parameter_groups(model)
        if config.offloads_optimizer:  # DeepSpeed then compiles its own, by programs that may be next to Python only
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self._is_torch_optimizer = not config.offloads_optimizer
        optimizer = make_optimizer(groups, values.pop("optimizer")) if self._is_torch_optimizer else None
        # On CPUs, DeepSpeed's shared-memory collectives need a compiler and leak 69 MB a rank, for the same bits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)  # takes the process group that is there
        TorchBackend.new_group = lambda self, ranks: new_group(list(ranks))  # for ZeRO's groups
        try:
            self._engine, self._optimizer, _, self._scheduler = deepspeed.initialize(
                model=model, model_parameters=groups, optimizer=optimizer, config=values
            )
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"{config.path}: {'; '.join(faults)}") from None
        self.device = current_device()
        self.precision = config.precision
        self._is_fp16 = config.precision == "fp16"
        self._update_loss_scale = _defer_loss_scale_update(self._optimizer)
        self._optimizer.loss_scaler.raise_error_at_min_scale = False  # the guard tells, and goes back
        self._group_settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self._optimizer.param_groups
        ]
        self._initial_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._initial_schedule = self._scheduler.state_dict() if self._scheduler else {}
        self._initial_loss_scaler = self.loss_scaler_state

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3."""
        return int(self._engine.zero_optimization_stage())

    # ---- training

    @property
    def module(self) -> nn.Module:
        """The model, in the precision it is trained in."""
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def steps(self) -> int:
        """Optimizer steps done, those that fp16 skipped among them."""
        return int(self._engine.global_steps)

    @property
    def skipped_steps(self) -> int:
        """Steps without an update because a gradient overflowed fp16."""
        return int(self._engine.skipped_steps)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def loss_scale(self) -> float:
        """fp16's loss scale; 1 in other precisions."""
        return float(self._optimizer.cur_scale) if self._is_fp16 else 1.0

    @property
    def is_at_smallest_loss_scale(self) -> bool:
        """Whether fp16's loss scale cannot become smaller."""
        return self._is_fp16 and self.loss_scale <= getattr(self._optimizer.loss_scaler, "min_scale", 0.0)

    @property
    def is_overflow(self) -> bool:
        """Whether fp16 skipped the last step."""
        return self._is_fp16 and bool(self._optimizer.overflow)

    @property
    def gradient_norm(self) -> float:
        """Of the last step, unscaled, over all ranks; infinite where it overflowed."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def seed_step(self, seed: int) -> None:
        """Seed dropout for the coming step: a function of seed, step and rank, so nothing has to be saved to resume."""
        digest = hashlib.blake2b(f"{seed} {self.steps} {self.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "big") >> 1)

    def __call__(self, layout: Layout) -> PretrainingLosses:
        """Forward pass of a micro batch, in the mode (train or eval) that `train` set."""
        losses: PretrainingLosses = self.forward(layout.to(self.device))
        return losses

    def forward(self, *inputs: Any) -> Any:
        """The same for a model of another kind."""
        return self._engine(*inputs)

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Of the coming step, for each parameter group, where the DeepSpeed JSON has no schedule."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def predict(self, layout: Layout) -> torch.Tensor:
        """Logits of the slots that are predicted from, [R, V], without dropout, of a layout without targets; called by all
        ranks, as stage 3 needs them."""
        self.train(False)
        logits_RV: torch.Tensor = self._engine(layout.to(self.device))
        return logits_RV

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, a micro batch's share of the whole batch's loss.

        DeepSpeed takes the mean over ranks and accumulation steps; here the loss is a sum of shares.
        """
        self._engine.backward(loss * (self.world_size * self.batch_sizes.accumulation_steps))

    def step(self) -> None:
        """End a micro batch. After the last one of a step, update the weights."""
        self._engine.step()
        self._update_loss_scale()

    # ---- what is measured

    def take_peak_memory_bytes(self) -> int:
        """The most that was allocated on the GPU since this was last asked; 0 without one."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Name, value and place of each, for the monitors of the DeepSpeed JSON; called by rank 0."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events(events)

    # ---- checkpoints

    def save_shards(self, folder: Path, tag: str) -> str | None:
        """Write DeepSpeed's sharded files below `folder`/`tag`; returns why this rank's could not be written, or None.

        An exception on one rank inside DeepSpeed would leave the others waiting at its barriers, so none is let out.
        """
        writer, failures = self._engine.checkpoint_engine, []
        write = writer.save

        def guarded(state_dict: Any, path: str) -> None:
            try:
                write(state_dict, path)
            except (OSError, RuntimeError) as error:
                failures.append(f"{path}: {str(error).splitlines()[0]}")

        writer.save = guarded
        crc32_before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(
            False
        )  # the manifest's SHA-256 says more, and training does not wait for it
        self._engine._copy_recovery_script = lambda save_path: None  # `export` does what that script is for
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            del writer.save
            torch.serialization.set_crc32_options(crc32_before)
        return failures[0] if failures else None

    def load_shards(self, folder: Path, tag: str) -> None:
        """Restore weights, optimizer, loss scale and schedule, whatever the number of ranks and the ZeRO stage that saved
        them; the DeepSpeed JSON, not the checkpoint, keeps deciding learning rate and weight decay.

        DeepSpeed's own way takes the same number of ranks alone, or a converted copy of the checkpoint on disk, and
        unpickles whatever a file holds. Raises ValueError, on all ranks, where one could not read a file.
        """
        saved = self.restore(lambda: Partitions(folder / tag))
        self._scheduler.load_state_dict(saved.model_states["lr_scheduler"])
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, name, saved.model_states[name])
        for group, settings, lr in zip(
            self._optimizer.param_groups, self._group_settings, self._scheduler.get_lr(), strict=True
        ):
            group.update(settings, lr=lr)

    def reset(self, model: nn.Module) -> None:
        """Begin anew with these weights, the initial ones again: as if no step had been done."""
        self.restore(lambda: _Unstepped(model, next(self.module.parameters()).dtype, self._initial_loss_scaler))
        self._scheduler.load_state_dict(self._initial_schedule)
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, name, 0)
        for group, settings, lr in zip(
            self._optimizer.param_groups, self._group_settings, self._initial_rates, strict=True
        ):
            group.update(settings, lr=lr)

    def restore(self, read: Callable[[], _S]) -> _S:
        """Take weights, Adam's state and loss scale from what `read` gives, and return it.

        Raises ValueError, on all ranks, where one could not read.
        """
        failure = None
        try:
            saved = read()
            if self.zero_stage == 3:
                self._optimizer.checkpoint_event_prologue()
            self._restore_partitions(saved)
        except (OSError, ValueError) as error:
            failure = describe_error(error)
        if failure := next((failure for failure in gather(failure) if failure), None):
            raise UserError(failure)
        if self.zero_stage == 3:
            for sub_group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            self._optimizer.checkpoint_event_epilogue()
        else:
            self._optimizer.update_lp_params()
        scaler, found = self._optimizer.loss_scaler, saved.loss_scaler
        if found.keys() >= set(_LOSS_SCALER_STATE) <= vars(scaler).keys():  # both are dynamic
            vars(scaler).update({name: found[name] for name in _LOSS_SCALER_STATE})
            scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
            scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)
        return saved

    def _restore_partitions(self, saved: SavedState) -> None:
        """Fill this rank's parts of the fp32 weights and of Adam's moments."""
        optimizer, state = self._optimizer, self._optimizer.optimizer.state
        is_cut_by_weight = self.zero_stage == 3
        kinds = MOMENTS if saved.has_moments else ()
        state.clear()
        for flat in (
            optimizer.fp32_partitioned_groups_flat if is_cut_by_weight else optimizer.single_partition_of_fp32_groups
        ):
            if saved.has_moments:
                step = torch.tensor(float(saved.num_updates), device=flat.device)
                moments = {kind: torch.zeros_like(flat) for kind in kinds}
                state[flat] = {"step": step if self._is_torch_optimizer else saved.num_updates, **moments}
        if not is_cut_by_weight:
            optimizer._hp_optimizer_states_linked = False
            if saved.has_moments:
                optimizer._lazy_init_hp_params_optimizer_state()
        parameter: Any
        for name, parameter in self.module.named_parameters():
            for kind in (WEIGHT, *kinds):
                key = None if kind == WEIGHT else kind
                if is_cut_by_weight:
                    part = parameter.ds_tensor.numel()
                    start = min(self.rank * part, parameter.ds_numel)
                    values = saved.read(name, kind, start, min(start + part, parameter.ds_numel))
                    values = nn.functional.pad(values, (0, part - len(values)))
                    optimizer.set_local_hp_param(values, parameter, key)
                elif (mapping := parameter._hp_mapping) is not None:
                    address = mapping.lp_fragment_address
                    values = saved.read(name, kind, address.start, address.start + address.numel)
                    mapping.get_hp_fragment(key).data.copy_(values)

    def whole(self, parameter: nn.Parameter, kind: str = WEIGHT) -> torch.Tensor:
        """The fp32 weight, or a moment of it, put together from all ranks, which must all ask. Of ZeRO stage 1 and 2."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if kind != WEIGHT and mapping is not None and kind not in mapping.get_optim_state_keys():
            self._optimizer._hp_optimizer_states_linked = False  # DeepSpeed linked them before Adam had any
            self._optimizer._lazy_init_hp_params_optimizer_state()
        found: torch.Tensor = parameter.get_full_hp_param(None if kind == WEIGHT else kind)  # type: ignore[attr-defined]
        return found

    @property
    def num_updates(self) -> int:
        """Steps that Adam made: those that fp16 skipped are not among them."""
        return next((int(state["step"]) for state in self._optimizer.optimizer.state.values()), 0)

    @property
    def loss_scaler_state(self) -> dict[str, Any]:
        """State of fp16's dynamic loss scaler, for `SavedState`; empty if there is none."""
        scaler = vars(self._optimizer.loss_scaler)
        return {name: scaler[name] for name in _LOSS_SCALER_STATE if name in scaler}

    def release(self) -> None:
        """Give up what the engine holds; the ranks stay together."""
        self._engine.destroy()

    def close(self) -> None:
        """Leave the other ranks."""
        self.release()
        leave_ranks()


def _three_sizes(sizes: BatchSizes) -> dict[str, int]:
    return {
        "train_batch_size": sizes.train_batch,
        "train_micro_batch_size_per_gpu": sizes.micro_batch,
        "gradient_accumulation_steps": sizes.accumulation_steps,
    }


def _defer_loss_scale_update(optimizer: Any) -> Callable[[], None]:
    """Keep DeepSpeed from unscaling a step's gradient with the next step's loss scale.

    Its ZeRO optimizers update the scale before they unscale, so on a step on which the scale doubles the gradient is
    halved (DeepSpeed issue 2686). Returns what applies the update, to be called after the step.
    """
    pending: deque[bool] = deque()
    update = optimizer._update_scale
    optimizer._update_scale = pending.append

    def apply() -> None:
        while pending:
            update(pending.popleft())

    return apply
