"""The training loop."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict, replace
from typing import IO, Any

import torch
from tqdm import tqdm

from data_prep.console import fitting, progress_bar
from data_prep.errors import UserError
from data_prep.files import sha256_of_file, write_whole
from data_prep.shards import manifest_path
from pretrain import distributed
from pretrain.batches import BatchesAhead, Share, TrainingBatches, validation_batches
from pretrain.checkpoint import Checkpoint, SaveFailed, describe_layout
from pretrain.checkpoint_store import CheckpointStore, find_checkpoint
from pretrain.cloze import in_markdown
from pretrain.config import Inputs
from pretrain.device import agreed_precision, device_name, speeds
from pretrain.engine import Engine
from pretrain.faults import steps_to_replay
from pretrain.guard import Guard, StepValues
from pretrain.layout import Layout
from pretrain.meter import Meter
from pretrain.metrics import Metrics, numbers, read_records
from pretrain.model import PMLM
from pretrain.order import Cursor
from pretrain.provenance import provenance
from pretrain.recovery import Recovery, StepJudge
from pretrain.status import write_plan
from pretrain.stopping import Stopping, agreed_reason
from pretrain.summary import summary
from pretrain.validation import Validator, mean_losses, stacked
from pretrain.watchdog import RankLost, Watch

_LATER_MINUTES = 1.0  # than the watchdog, who can name the rank that is waited for
_PAUSES_BEFORE_SAVING_AGAIN_S = (1.0, 5.0)  # at a run's end


def train(inputs: Inputs, console: IO[str]) -> None:
    """Train, or take up again, the run that `inputs` describes; rank 0 reports to `console`.

    Raises ValueError, on one rank or on all, for what the user can cure; RankLost where another rank is gone; SaveFailed
    where the last checkpoint could not be written.
    """
    config = inputs.config
    distributed.join_ranks(timeout_minutes=config.watchdog_minutes and config.watchdog_minutes + _LATER_MINUTES)
    rank, world_size = distributed.rank(), distributed.world_size()
    with (
        Watch(distributed.ranks_store(), rank, world_size, config.watchdog_minutes, console) as watch,
        Stopping(config.max_hours) as stopping,
    ):
        try:
            trainer = Trainer(inputs, console, watch, stopping)
            trainer.run()
        except RuntimeError as error:  # of a collective, where another rank is gone
            if lost := watch.lost_rank():
                raise RankLost(f"{lost}; resume from the newest whole checkpoint by the same command") from error
            raise
    trainer.close()


class Trainer:
    """A run: the loop, what it is built of, and what it says about itself."""

    def __init__(self, inputs: Inputs, console: IO[str], watch: Watch, stopping: Stopping) -> None:
        self._config, self._console = inputs.config, console
        self._watch, self._stopping = watch, stopping
        self._is_main = distributed.rank() == 0
        self._identity = run_identity(inputs)
        checkpoint = self._find_checkpoint()
        if checkpoint and checkpoint.step > inputs.total_steps:
            raise UserError(
                f"{self._config.run}: step {checkpoint.step} is done, and --max_steps or the schedule end the run at step "
                f"{inputs.total_steps}: raise what ends it, or begin anew with another --run"
            )
        self._inputs = inputs = self._in_agreed_precision(inputs, checkpoint)
        model = self._make_model()
        if self._config.compile:
            model.compile_layers()
        num_parameters = sum(p.numel() for p in model.parameters())  # here, as ZeRO stage 3 leaves empty ones
        self._engine = Engine(model, inputs.deepspeed)
        self._store = CheckpointStore(
            self._config.run,
            self._engine,
            self._identity,
            self._config.keep_last,
            self._config.keep_every_steps,
            lambda: steps_to_replay(self._config.run),
        )
        sizes = inputs.batch_sizes
        self._share = Share(self._engine.rank, self._engine.world_size, sizes.micro_batch, sizes.accumulation_steps)
        states = checkpoint.states if checkpoint else {}
        self._cursor = Cursor(self._share.train_batch, states.get("cursor"))
        self._guard = Guard(self._config.spike_deviations, self._config.spike_window_steps)
        self._guard.load_state_dict(states.get("guard"))
        self._judge = StepJudge(self._guard, self._engine.device)
        self._recovery = Recovery(inputs, self._identity, self._share, self._guard, self._cursor)
        if checkpoint:
            self._load(checkpoint)
        self._saved_step = self._engine.steps
        # What is compiled, as flex attention is on CUDA, is compiled for each shape; flex is left to where nothing is dropped.
        is_flex = self._engine.device.type == "cuda" and self._config.attention in ("auto", "flex")
        self._validation_has_one_shape = self._config.compile or is_flex
        self._batches = self._batches_ahead()
        self._validator = Validator(inputs.data, self._config.objective, self._config.validation_samples, inputs.cloze)
        self._meter = Meter(inputs.model)
        self._metrics = Metrics(self._config.run, self._engine.steps) if self._is_main else None
        if self._metrics:  # `export` needs the tokenizer when the data set may be elsewhere
            if self._metrics.damage:
                self._say(f"warning: {self._metrics.damage}")
            tokenizer = inputs.data.tokenizer
            write_whole(self._config.run / tokenizer.file_name, tokenizer.path.read_bytes())
            write_plan(self._config.run, inputs.total_steps)
        self._report_start(num_parameters, checkpoint is not None)

    def run(self) -> None:
        """Train to the last step, or until the ranks are asked to stop, validating, logging and saving on the way."""
        total, reason = self._inputs.total_steps, None
        if self._is_validation_missing():
            self._validate()
        if self._engine.steps >= total:
            self._say(f"nothing left to train: step {self._engine.steps} of {total} is done")
            self._record("stop", {"reason": "finished"})
            return
        with progress_bar(
            "train", total, "step", initial=self._engine.steps, stream=self._console, is_shown=self._is_main
        ) as bar:
            while self._engine.steps < total:
                with self._meter.waiting_for_data():
                    learning_rate = self._engine.learning_rate
                    self._watch.progress(f"reading the samples of step {self._engine.steps + 1}")
                    micro_batches = self._batches.next_step()
                self._watch.progress(f"step {self._engine.steps + 1}")
                num_targets, reason, fault = self._agree(micro_batches)
                if fault:
                    self._go_back(fault, bar)
                    continue
                if reason:
                    break
                sums = self._train_step(micro_batches, num_targets)
                self._meter.count(micro_batches)
                del micro_batches  # later, the thread that builds the next would take Python's lock meanwhile
                is_last = self._engine.steps >= total
                is_logged = self._engine.steps == 1 or self._is_due(self._config.log_every_steps, is_last)
                means = mean_losses(sums, self._config.objective) if is_logged else {}
                self._meter.step_done()
                bar.update()
                if is_logged:
                    self._log(bar, means, learning_rate)
                is_save_due = self._is_due(self._config.save_every_steps, is_last)
                if is_save_due and (fault := self._judge.judge(distributed.sum_over_ranks(self._judge.own_loss))):
                    self._go_back(fault, bar)
                    continue
                if self._is_due(self._config.validate_every_steps, is_last):
                    self._validate()
                if is_save_due:
                    self._save()
                self._report_saves()
        self._end(reason)

    def close(self) -> None:
        """Report what the run came to, and leave the other ranks."""
        self._batches.close()
        self._inputs.data.close()
        if self._metrics:
            self._metrics.close()
            self._say(summary(self._config.run))
        self._engine.close()

    # ---- the start

    def _in_agreed_precision(self, inputs: Inputs, checkpoint: Checkpoint | None) -> Inputs:
        """Return the inputs with the precision decided, by the devices of all ranks if the DeepSpeed JSON leaves it open."""
        recipe, own = inputs.deepspeed, speeds()
        if len(recipe.allowed_precisions) == 1:
            return inputs
        of_ranks = distributed.gather(own)
        saved = checkpoint.precision if checkpoint else None
        precision = agreed_precision(of_ranks, recipe.allowed_precisions, saved)
        why = (
            "as in the checkpoint"
            if precision == saved
            else f"auto: {own.reason}"
            if precision == own.precisions[0]
            else "auto: of all ranks' devices"
        )
        self._say(f"precision {precision} ({why})")
        return replace(inputs, deepspeed=recipe.with_precision(precision))

    def _find_checkpoint(self) -> Checkpoint | None:
        checkpoint, passed_over = find_checkpoint(self._config.run, self._identity)
        for line in passed_over:
            self._say(line)
        return checkpoint

    def _make_model(self) -> PMLM:
        """Return the model with its initial weights, the same on every rank and at every call."""
        torch.manual_seed(self._config.seed)
        return PMLM(self._inputs.model, self._config.attention, self._config.activation_checkpointing)

    def _load(self, checkpoint: Checkpoint) -> None:
        now = describe_layout(self._engine.world_size, self._engine.zero_stage, self._engine.precision)
        if checkpoint.written_by != now:
            self._say(f"resuming step {checkpoint.step}: saved by {checkpoint.written_by}, cut anew for {now}")
        self._store.load(checkpoint)

    def _batches_ahead(self) -> BatchesAhead:
        """Return the micro batches of the steps that are left."""
        has_one_shape = self._validation_has_one_shape and (self._config.compile or self._inputs.model.dropout == 0)
        batches = TrainingBatches(
            self._inputs.data,
            self._config.objective,
            self._share,
            self._config.seed,
            total_samples=self._inputs.schedule_samples,
            one_shape=has_one_shape,
        )
        ahead, num_steps = self._cursor.copy(), self._inputs.total_steps - self._engine.steps
        starts = (ahead.next().start for _ in range(num_steps))
        return BatchesAhead(batches, starts, is_pinned=self._engine.device.type == "cuda")

    def _report_start(self, num_parameters: int, is_resumed: bool) -> None:
        sizes = self._inputs.batch_sizes
        self._say(
            f"{self._config.objective.value} on {self._config.data}: {num_parameters / 1e6:.1f}M parameters, "
            f"{self._inputs.deepspeed.precision}, batch {sizes.train_batch} = {sizes.micro_batch} x "
            f"{sizes.accumulation_steps} x {self._engine.world_size} ranks"
        )
        if is_resumed:
            self._say(f"resumed from step {self._engine.steps} of {self._inputs.total_steps}")
        hosts = distributed.gather(socket.gethostname())
        if self._is_main:
            about = {
                "resumed": is_resumed,
                "world_size": self._engine.world_size,
                "zero_stage": self._engine.zero_stage,
                "num_parameters": num_parameters,
                "samples_consumed": self._cursor.samples_consumed,
            }
            self._record("start", about | provenance(self._inputs, hosts, device_name()))

    # ---- steps

    def _agree(self, micro_batches: list[Layout]) -> tuple[torch.Tensor, str | None, str | None]:
        """Return, with one collective, the coming step's targets on all ranks, shape (1,); why all ranks are to stop before
        it, or None; and what was wrong with the step before, or None."""
        own = torch.tensor([sum(m.num_targets for m in micro_batches), *self._stopping.vote()], dtype=torch.float64)
        total = distributed.sum_over_ranks(torch.cat([self._judge.own_loss, own.to(self._engine.device)]))
        return total[1:2], agreed_reason(total[2:].tolist()), self._judge.judge(total[:1])

    def _train_step(self, micro_batches: list[Layout], num_targets: torch.Tensor) -> torch.Tensor:
        """Do a step and note it for the judge; returns this rank's sums for `mean_losses`."""
        is_at_smallest_scale = self._engine.is_at_smallest_loss_scale
        sums = train_step(self._engine, micro_batches, num_targets, self._config.seed)
        self._judge.note(
            StepValues(self._engine.steps, 0.0, self._engine.gradient_norm),
            (sums[0] + sums[1])[None] / num_targets[0],
            is_overflow=self._engine.is_overflow,
            is_at_smallest_scale=is_at_smallest_scale,
        )
        self._cursor.next()
        return sums

    def _log(self, bar: Any, means: dict[str, float], learning_rate: float) -> None:
        speed = self._meter.take(self._engine.take_peak_memory_bytes())
        of_step = {
            "learning_rate": learning_rate,
            "gradient_norm": self._engine.gradient_norm,
            "loss_scale": self._engine.loss_scale,
            "skipped_steps": self._engine.skipped_steps,
            "samples_consumed": self._cursor.samples_consumed,
        }
        self._record("train", means | of_step | speed)
        bar.set_postfix_str(fitting(bar, postfixes(means, speed["tokens_per_s"])), refresh=False)

    def _go_back(self, reason: str, bar: Any) -> None:
        """Go back from a step at fault to the last checkpoint or, without one, to the initial weights.

        Raises ValueError, on all ranks, for what `Recovery.go_back` does.
        """
        fault_step = self._engine.steps
        self._watch.progress(f"going back from step {fault_step}")
        self._batches.close()
        self._store.finish()
        self._report_saves()
        checkpoint = self._find_checkpoint()
        rewind = self._recovery.go_back(fault_step, reason, checkpoint, self._store.update_states)
        if checkpoint:
            self._load(checkpoint)
        else:
            self._engine.reset(self._make_model())
        self._saved_step = bar.n = rewind.step
        self._batches = self._batches_ahead()
        if self._metrics:
            self._metrics.close()
            self._metrics = Metrics(self._config.run, rewind.step)
        self._say(
            f"step {fault_step}: {reason}; back to {f'step {rewind.step}' if checkpoint else 'the initial weights'}, samples "
            f"{rewind.skipped.start} to {rewind.skipped.stop - 1} of the order are skipped (rewind {rewind.number} of at "
            f"most {self._config.max_rewinds})"
        )
        self._record("fault", rewind.record)

    def _validate(self) -> None:
        if not self._validator.has_samples or not self._config.validate_every_steps:
            return
        batches = self._batches.call(
            validation_batches,
            self._inputs.data,
            self._config.objective,
            self._share,
            self._config.validation_samples,
            one_shape=self._validation_has_one_shape,
        )
        with progress_bar(
            "validate", len(batches), "batch", stream=self._console, is_shown=self._is_main, is_lasting=False
        ) as bar:

            def is_to_stop(number: int) -> bool:
                self._watch.progress(f"validation at step {self._engine.steps}, batch {number + 1}")
                bar.update(number - bar.n)
                return (
                    agreed_reason(distributed.sum_over_ranks(torch.tensor(self._stopping.vote())).tolist()) is not None
                )

            found = self._validator.validate(self._engine, batches, is_to_stop)
        if not found:
            return  # the next start does it anew
        self._say(f"validation at step {self._engine.steps}: {_short(found.means)}")
        self._record("validation", found.record)
        if found.filled:
            self._record("cloze", {"prompts": found.filled}, text=in_markdown(found.filled))

    def _is_validation_missing(self) -> bool:
        """Whether this step's validation, the one at the run's start too, is still to be done."""
        step = self._engine.steps
        is_done = self._is_main and any(
            record["kind"] == "validation" and record["step"] == step for record in read_records(self._config.run)
        )
        return not distributed.from_rank_0(is_done) and self._is_due(
            self._config.validate_every_steps, step in (0, self._inputs.total_steps)
        )

    def _is_due(self, every_steps: int, is_last: bool) -> bool:
        return is_last or (every_steps > 0 and self._engine.steps % every_steps == 0)

    # ---- saving, and the end

    def _save(self) -> None:
        self._watch.progress(f"saving step {self._engine.steps}")
        self._store.save({"cursor": self._cursor.state_dict(), "guard": self._guard.state_dict()})
        self._saved_step = self._engine.steps

    def _report_saves(self, *, is_end: bool = False) -> None:
        """Report what became of the last saves, as soon as it is known; a failure does not end the run."""
        for save in self._store.saved():
            for fault in save.not_removed:
                self._record("fault", {"fault": fault}, save.step)
                self._say(f"warning: {fault}")
            if save.failure:
                self._record("fault", {"fault": save.failure}, save.step)
                if not is_end:
                    self._say(f"warning: {save.failure}; training goes on; saving is tried again when it is next due")
            else:
                values = {
                    "save_s": round(save.stall_s, 3),
                    "finishing_s": round(save.finishing_s, 3),
                    "size_bytes": save.size_bytes,
                }
                self._record("save", values, save.step)

    def _end(self, reason: str | None) -> None:
        """Save what is not saved. Raises SaveFailed, on all ranks, where that cannot be done."""
        self._watch.progress(f"finishing the checkpoint of step {self._saved_step}")
        failure = self._store.finish()
        if self._saved_step != self._engine.steps:
            self._save()
            failure = self._store.finish()
        for pause_s in _PAUSES_BEFORE_SAVING_AGAIN_S:
            if not failure:
                break
            self._say(f"warning: {failure}; saving is tried again in {pause_s:g} s")
            time.sleep(pause_s)
            self._save()
            failure = self._store.finish()
        self._report_saves(is_end=True)
        self._record("stop", {"reason": reason or "finished"})
        if failure:
            raise SaveFailed(failure)
        if reason:
            saved = "saved; " if self._engine.steps else ""
            self._say(
                f"stopped at step {self._engine.steps} of {self._inputs.total_steps} ({reason}); {saved}"
                "the same command goes on from there"
            )

    # ---- what it says about itself

    def _record(self, kind: str, values: dict[str, Any], step: int | None = None, text: str | None = None) -> None:
        """Write a record on rank 0; losses and what is measured of a step also go to DeepSpeed's monitors, which count by
        the run's samples."""
        if not self._metrics:
            return
        self._metrics.record(kind, self._engine.steps if step is None else step, values, text)
        if kind in ("train", "validation"):
            samples = self._engine.steps * self._share.train_batch
            self._engine.write_events([(name, value, samples) for name, value in numbers(kind, values)])

    def _say(self, text: str) -> None:
        if self._is_main:
            tqdm.write(text, file=self._console)
            self._console.flush()


def train_step(engine: Engine, micro_batches: list[Layout], num_targets: torch.Tensor, seed: int) -> torch.Tensor:
    """One optimizer step; returns this rank's sums, shape (5,), for `mean_losses`."""
    engine.train(True)
    engine.seed_step(seed)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for layout in micro_batches:
        losses = engine(layout)
        engine.backward((losses.ae_sum + losses.par_sum) / num_targets[0])
        engine.step()
        sums += stacked(losses)
    return torch.cat([sums, num_targets / engine.world_size])


def run_identity(inputs: Inputs) -> dict[str, Any]:
    """Return what a resume must not change. Ranks, ZeRO stage and precision are no part of it."""
    return {
        "model": asdict(inputs.model),
        "objective": inputs.config.objective.value,
        "seed": inputs.config.seed,
        "data_sha256": sha256_of_file(manifest_path(inputs.data.folder)),
        "tokenizer_file": inputs.data.tokenizer.file_name,
        "tokenizer_sha256": inputs.data.tokenizer.sha256,
        "train_batch_size": inputs.batch_sizes.train_batch,
    }


def _short(values: dict[str, float]) -> str:
    return " ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in values.items())


def postfixes(means: dict[str, float], tokens_per_s: float) -> list[str]:
    """Return what may stand beside the progress bar, the longest first."""
    speed = f"{tqdm.format_sizeof(tokens_per_s)} tokens/s"
    losses = " ".join(f"{name.removesuffix('_loss').upper()} {means[name]:.2f}" for name in means if "loss" in name)
    return [f"{speed}, {_short(means)}", f"{speed}, {losses}", speed, ""]
