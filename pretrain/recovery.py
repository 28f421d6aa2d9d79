"""What a run does about a step at fault: it is judged, recorded, gone back from, and its samples are skipped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from data_prep.console import describe_error
from data_prep.errors import UserError
from pretrain import distributed
from pretrain.batches import SampleOrder, Share
from pretrain.checkpoint import Checkpoint
from pretrain.config import Inputs
from pretrain.faults import faults_folder, new_fault_name, write_fault
from pretrain.guard import Guard, StepValues
from pretrain.order import Cursor


@dataclass(frozen=True)
class Rewind:
    """A way back that was taken."""

    step: int
    """The step that the run is at now."""
    fault_step: int
    reason: str
    skipped: range
    """Positions in the order of samples."""
    number: int
    """1 for the first rewind of the run."""

    @property
    def record(self) -> dict[str, Any]:
        """Its record in RUN/metrics.jsonl."""
        first_sample, stop_sample = self.skipped.start, self.skipped.stop
        return {
            "fault": self.reason,
            "fault_step": self.fault_step,
            "first_sample": first_sample,
            "stop_sample": stop_sample,
        }


class StepJudge:
    """Judges the last step when its loss has been summed over the ranks: at the next step's collective, or before a save."""

    def __init__(self, guard: Guard, device: torch.device) -> None:
        self._guard, self._device = guard, device
        self._unjudged: tuple[StepValues, torch.Tensor, bool, bool] | None = None

    def note(
        self, values: StepValues, own_loss: torch.Tensor, *, is_overflow: bool, is_at_smallest_scale: bool
    ) -> None:
        """Keep a step to be judged; `own_loss`, shape (1,), is this rank's part of its loss, and `values.loss` is not used."""
        self._unjudged = values, own_loss, is_overflow, is_at_smallest_scale

    @property
    def own_loss(self) -> torch.Tensor:
        """This rank's part of the loss that is to be judged, shape (1,); 0 if there is none."""
        return self._unjudged[1] if self._unjudged else torch.zeros(1, dtype=torch.float64, device=self._device)

    def judge(self, loss: torch.Tensor) -> str | None:
        """Return what is wrong with the step, given `own_loss` summed over the ranks, or None; a step is judged once."""
        if not self._unjudged:
            return None
        (values, _, is_overflow, is_at_smallest_scale), self._unjudged = self._unjudged, None
        values = replace(values, loss=float(loss[0]))
        return self._guard.fault_of(values, is_overflow=is_overflow, is_at_smallest_scale=is_at_smallest_scale)


class Recovery:
    """Takes a run back from a step at fault; called by all ranks together."""

    def __init__(self, inputs: Inputs, identity: dict[str, Any], share: Share, guard: Guard, cursor: Cursor) -> None:
        self._inputs, self._identity, self._share = inputs, identity, share
        self._guard, self._cursor = guard, cursor

    def go_back(
        self,
        fault_step: int,
        reason: str,
        checkpoint: Checkpoint | None,
        update_states: Callable[[str, Callable[[Any], Any]], None],
    ) -> Rewind:
        """Move cursor and guard to where the checkpoint was saved, or without one to the run's start, and skip the samples
        since. The weights are the caller's to restore.

        The fault is recorded first. `update_states` is called to tell all checkpoints of the skipped samples, so that every
        later resume has the same. Raises ValueError, on all ranks, if nothing could be recorded, or if too many ranges
        have been skipped.
        """
        run, max_rewinds = self._inputs.config.run, self._inputs.config.max_rewinds
        states = checkpoint.states if checkpoint else {}
        earlier = Cursor(self._share.train_batch, states.get("cursor"))
        step = checkpoint.step if checkpoint else 0
        stop = self._cursor.samples_consumed
        self._cursor.rewind(earlier)
        skipped = range(self._cursor.copy().next().start, stop)
        name = distributed.from_rank_0(new_fault_name(run, fault_step))
        failure = None
        if distributed.rank() == 0:
            try:
                self._write_fault(name, fault_step, reason, step, skipped)
            except OSError as error:
                failure = describe_error(error)
        if failure := distributed.from_rank_0(failure):
            raise UserError(f"step {fault_step}: {reason}; and it could not be recorded: {failure}")
        num_before = len(self._cursor.skipped)
        if num_before >= max_rewinds:
            command = ["python", "-m", "pretrain.replay", "--run", str(run)]
            command += ["--fault", name.removeprefix("step").lstrip("0")]
            raise UserError(
                f"step {fault_step}: {reason}; {num_before} windows of samples have been skipped already (--max_rewinds "
                f"{max_rewinds}); look at them with `{shlex.join(command)}`, then lower the learning rate or raise --max_rewinds"
            )
        self._cursor.skip(skipped)
        update_states("cursor", self._told_of_skipped)
        self._guard.load_state_dict(states.get("guard"))
        return Rewind(step, fault_step, reason, skipped, num_before + 1)

    def _told_of_skipped(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's state of the cursor with all that has been skipped."""
        cursor = self._cursor.copy()
        cursor.samples_consumed = Cursor(self._share.train_batch, state).samples_consumed
        return cursor.state_dict()

    def _write_fault(self, name: str, fault_step: int, reason: str, step: int, skipped: range) -> None:
        config, ahead = self._inputs.config, self._cursor.copy()
        order = SampleOrder(self._inputs.data.num_samples("train"), config.seed)
        about = {
            "step": fault_step,
            "reason": reason,
            "window": {"first_sample": skipped.start, "stop_sample": skipped.stop, "checkpoint_step": step},
            "cursor": self._cursor.state_dict(),
            "recent_steps": self._guard.state_dict()["recent_steps"],
            "identity": self._identity,
            "data": str(config.data.resolve()),
            "schedule_samples": self._inputs.schedule_samples,
            "attention": config.attention,
            "activation_checkpointing": config.activation_checkpointing,
            "batch_sizes": asdict(self._inputs.batch_sizes),
            "world_size": self._share.world_size,
        }
        lines = (
            json.dumps({"step": number, "epochs": epochs.tolist(), "samples": samples.tolist()})
            for number in range(step + 1, fault_step + 1)
            for positions in [ahead.next()]
            for epochs, samples in [order.samples(positions.start, positions.stop)]
        )
        write_fault(faults_folder(config.run) / name, about, self._inputs.deepspeed.values, lines)
