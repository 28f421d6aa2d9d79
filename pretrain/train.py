"""The training loop."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import IO, Any

import psutil
import torch
from tqdm import tqdm

from data_prep.console import describe_error, progress_bar
from data_prep.files import sha256_of_file, write_whole
from data_prep.shards import manifest_path
from pretrain import distributed
from pretrain.batches import BatchesAhead, SampleOrder, Share, TrainingBatches, validation_batches, validation_samples
from pretrain.checkpoint import Checkpoint, SaveFailed, describe_layout
from pretrain.checkpoint_store import CheckpointStore, find_checkpoint
from pretrain.cloze import fill_in, in_markdown
from pretrain.config import Inputs
from pretrain.device import agreed_precision, device_name, speeds
from pretrain.engine import Engine
from pretrain.flops import step_flops
from pretrain.guard import Guard, StepValues, Window, behind, new_fault_name, write_fault
from pretrain.layout import Layout
from pretrain.metrics import Metrics, numbers, read_records
from pretrain.model import PMLM, PretrainingLosses
from pretrain.provenance import provenance
from pretrain.status import write_plan
from pretrain.stopping import Stopping, agreed_reason
from pretrain.summary import summary
from pretrain.watchdog import RankLost, Watch


def train(inputs: Inputs, console: IO[str]) -> None:
    """Train, or take up again, the run that `inputs` describes; rank 0 reports to `console`.

    Raises ValueError, on one rank or on all, for what the user can cure; RankLost where another rank is gone; SaveFailed
    where the last checkpoint could not be written.
    """
    distributed.join_ranks()
    rank, world_size = distributed.rank(), distributed.world_size()
    config = inputs.config
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
    """A run: its engine, its place in the data, and what it writes about itself."""

    def __init__(self, inputs: Inputs, console: IO[str], watch: Watch, stopping: Stopping) -> None:
        self._config, self._console = inputs.config, console
        self._watch, self._stopping = watch, stopping
        self._is_main = distributed.rank() == 0
        self._identity = run_identity(inputs)
        checkpoint, passed_over = find_checkpoint(self._config.run, self._identity)
        for line in passed_over:
            self._say(line)
        self._inputs = inputs = self._in_agreed_precision(inputs, checkpoint)
        torch.manual_seed(self._config.seed)
        model = PMLM(inputs.model, self._config.attention, self._config.activation_checkpointing)
        if self._config.compile:
            model.compile_layers()
        num_parameters = sum(p.numel() for p in model.parameters())  # here, as ZeRO stage 3 leaves empty ones
        self._engine = Engine(model, inputs.deepspeed)
        self._store = CheckpointStore(
            self._config.run, self._engine, self._identity, self._config.keep_last, self._config.keep_every_steps
        )
        self._guard = Guard(self._config.spike_deviations, self._config.spike_window_steps)
        self._skipped: list[Window] = []
        self._unjudged: tuple[StepValues, torch.Tensor, bool, bool] | None = None
        if checkpoint:
            self._load(checkpoint)
            self._skipped = checkpoint.skipped
            self._guard.restore(checkpoint.manifest.get("recent_steps", []))
        self._samples_consumed = checkpoint.samples_consumed if checkpoint else 0
        self._saved_step = self._engine.steps
        self._share = Share(
            self._engine.rank,
            self._engine.world_size,
            inputs.batch_sizes.micro_batch,
            inputs.batch_sizes.accumulation_steps,
        )
        # What is compiled, as flex attention is on CUDA, is compiled for each shape; flex is left to where nothing is dropped.
        is_flex = self._engine.device.type == "cuda" and self._config.attention in ("auto", "flex")
        self._validation_has_one_shape = self._config.compile or is_flex
        self._batches = self._batches_ahead()
        self._metrics = Metrics(self._config.run, self._engine.steps) if self._is_main else None
        if self._is_main:  # `export` needs it when the data set may be elsewhere
            tokenizer = inputs.data.tokenizer
            write_whole(self._config.run / tokenizer.file_name, tokenizer.path.read_bytes())
            write_plan(self._config.run, inputs.total_steps)
        self._report_start(num_parameters, checkpoint is not None)

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

    def _batches_ahead(self) -> BatchesAhead:
        """The micro batches of the steps that are left."""
        has_one_shape = self._validation_has_one_shape and (self._config.compile or self._inputs.model.dropout == 0)
        batches = TrainingBatches(
            self._inputs.data,
            self._config.objective,
            self._share,
            self._config.seed,
            total_samples=self._inputs.schedule_samples,
            one_shape=has_one_shape,
        )
        starts = self._starts(self._samples_consumed, self._inputs.total_steps - self._engine.steps)
        return BatchesAhead(batches, starts, is_pinned=self._engine.device.type == "cuda")

    def _starts(self, samples_consumed: int, num_steps: int) -> Iterator[int]:
        """The places at which the coming steps' samples begin."""
        for _ in range(num_steps):
            yield (start := behind(samples_consumed, self._skipped))
            samples_consumed = start + self._share.train_batch

    def _load(self, checkpoint: Checkpoint) -> None:
        now = describe_layout(self._engine.world_size, self._engine.zero_stage, self._engine.precision)
        if checkpoint.written_by != now:
            self._say(f"resuming step {checkpoint.step}: saved by {checkpoint.written_by}, cut anew for {now}")
        self._store.load(checkpoint)

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
            self._record("start", {
                "resumed": is_resumed, "world_size": self._engine.world_size, "zero_stage": self._engine.zero_stage,
                "num_parameters": num_parameters, "samples_consumed": self._samples_consumed,
                **provenance(self._inputs, hosts, device_name()),
            })  # fmt: skip

    def run(self) -> None:
        """Train to the last step, or until the ranks are asked to stop, validating, logging and saving on the way."""
        total = self._inputs.total_steps
        if self._is_validation_missing():
            self._validate()
        if self._engine.steps >= total:
            self._say(f"nothing left to train: step {self._engine.steps} of {total} is done")
            self._record("stop", {"reason": "finished"})
            return
        reason = None
        step_time_s, data_wait_s, num_tokens, num_flops = 0.0, 0.0, 0, 0
        with progress_bar(
            "train", total, "step", initial=self._engine.steps, stream=self._console, is_shown=self._is_main
        ) as bar:
            while self._engine.steps < total:
                started = time.perf_counter()
                learning_rate = self._engine.learning_rate
                self._watch.progress(f"reading the samples of step {self._engine.steps + 1}")
                micro_batches = self._batches.next_step()
                data_wait_s += time.perf_counter() - started
                self._watch.progress(f"step {self._engine.steps + 1}")
                num_targets, reason, fault = self._agree(micro_batches)
                if fault:
                    self._rewind(fault)
                    bar.n = self._engine.steps
                    continue
                if reason:
                    break
                is_at_smallest_scale = self._engine.is_at_smallest_loss_scale
                sums = train_step(self._engine, micro_batches, num_targets, self._config.seed)
                self._note(sums, num_targets, is_at_smallest_scale)
                self._samples_consumed = behind(self._samples_consumed, self._skipped) + self._share.train_batch
                step = self._engine.steps
                num_tokens += sum(layout.num_tokens for layout in micro_batches)
                num_flops += sum(step_flops(self._inputs.model, layout).needed for layout in micro_batches)
                del micro_batches  # later, the thread that builds the next would take Python's lock meanwhile
                is_last = step >= total
                is_logged = step == 1 or step % self._config.log_every_steps == 0 or is_last
                values = self._means(sums) if is_logged else {}
                step_time_s += time.perf_counter() - started
                bar.update()
                if is_logged:
                    speed = self._speed_and_memory(num_tokens, num_flops, step_time_s)
                    self._record("train", values | self._step_values(learning_rate) | speed | {
                        "data_wait": round(data_wait_s / step_time_s, 5)
                    })  # fmt: skip
                    bar.set_postfix_str(f"{_short(values)} {speed['tokens_per_s']:,.0f} tokens/s", refresh=False)
                    step_time_s, data_wait_s, num_tokens, num_flops = 0.0, 0.0, 0, 0
                is_save_due = self._is_due(self._config.save_every_steps, is_last)
                if is_save_due and (fault := self._judge(distributed.sum_over_ranks(self._unjudged_loss()))):
                    self._rewind(fault)
                    bar.n = self._engine.steps
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

    def _agree(self, micro_batches: list[Layout]) -> tuple[torch.Tensor, str | None, str | None]:
        """The coming step's targets on all ranks, shape (1,); why all ranks are to stop before it, if they are; and what was
        wrong with the step before."""
        own = torch.tensor([sum(m.num_targets for m in micro_batches), *self._stopping.vote()], dtype=torch.float64)
        total = distributed.sum_over_ranks(torch.cat([self._unjudged_loss(), own.to(self._engine.device)]))
        return total[1:2], agreed_reason(total[2:].tolist()), self._judge(total[:1])

    def _note(self, sums: torch.Tensor, num_targets: torch.Tensor, is_at_smallest_scale: bool) -> None:
        """Keep this rank's part of a step's loss, to be judged when it has been summed over the ranks."""
        values = StepValues(self._engine.steps, 0.0, self._engine.gradient_norm)
        is_overflow = self._engine.is_overflow
        self._unjudged = values, (sums[0] + sums[1]) / num_targets[0], is_overflow, is_at_smallest_scale

    def _unjudged_loss(self) -> torch.Tensor:
        """This rank's part of it, shape (1,)."""
        return (
            self._unjudged[1][None]
            if self._unjudged
            else torch.zeros(1, dtype=torch.float64, device=self._engine.device)
        )

    def _judge(self, loss: torch.Tensor) -> str | None:
        """What is wrong with the last step, if that is not told already; `loss` is over all ranks."""
        if not self._unjudged:
            return None
        (values, _, is_overflow, is_at_smallest_scale), self._unjudged = self._unjudged, None
        values = replace(values, loss=float(loss[0]))
        return self._guard.fault_of(values, is_overflow=is_overflow, is_at_smallest_scale=is_at_smallest_scale)

    def _rewind(self, reason: str) -> None:
        """Go back to the last checkpoint, and on behind the samples seen since.

        Raises ValueError, on all ranks, where there is no checkpoint or too many windows have been skipped.
        """
        fault_step, stop = self._engine.steps, self._samples_consumed
        self._watch.progress(f"going back from step {fault_step}")
        self._unjudged = None
        self._batches.close()
        self._store.finish()
        self._report_saves()
        checkpoint, passed_over = find_checkpoint(self._config.run, self._identity)
        for line in passed_over:
            self._say(line)
        if checkpoint is None:
            raise ValueError(
                f"step {fault_step}: {reason}; there is no checkpoint to go back to: lower the learning rate, or save earlier "
                "with --save_every_steps"
            )
        first = behind(checkpoint.samples_consumed, self._skipped)
        name = distributed.from_rank_0(new_fault_name(self._config.run, fault_step))
        window = Window(first, stop, checkpoint.step, name)
        failure = None
        if self._is_main:
            try:
                self._write_fault(window, reason, fault_step, checkpoint)
            except OSError as error:
                failure = describe_error(error)
        if failure := distributed.from_rank_0(failure):
            raise ValueError(f"step {fault_step}: {reason}; and it could not be recorded: {failure}")
        if len(self._skipped) >= self._config.max_rewinds:
            raise ValueError(
                f"step {fault_step}: {reason}; {len(self._skipped)} windows of samples have been skipped already (--max_rewinds "
                f"{self._config.max_rewinds}); look at them with `python -m pretrain.replay --run {self._config.run} --fault "
                f"{name.removeprefix('step').lstrip('0')}`, then lower the learning rate or raise --max_rewinds"
            )
        self._skipped.append(window)
        self._store.record_skipped(self._skipped)
        self._load(checkpoint)
        self._guard.restore(checkpoint.manifest.get("recent_steps", []))
        self._samples_consumed, self._saved_step = checkpoint.samples_consumed, checkpoint.step
        self._batches = self._batches_ahead()
        if self._metrics:
            self._metrics.close()
            self._metrics = Metrics(self._config.run, checkpoint.step)
        self._say(
            f"step {fault_step}: {reason}; back to step {checkpoint.step}, samples {first} to {stop - 1} of the order are "
            f"skipped (rewind {len(self._skipped)} of at most {self._config.max_rewinds})"
        )
        self._record("fault", {"fault": reason, "fault_step": fault_step, "first_sample": first, "stop_sample": stop})

    def _write_fault(self, window: Window, reason: str, fault_step: int, checkpoint: Checkpoint) -> None:
        order = SampleOrder(self._inputs.data.num_samples("train"), self._config.seed)
        starts = self._starts(checkpoint.samples_consumed, fault_step - checkpoint.step)
        batch = self._share.train_batch
        write_fault(self._config.run, window, {
            "step": fault_step, "reason": reason, "samples_consumed": checkpoint.samples_consumed,
            "skipped": [asdict(skipped) for skipped in self._skipped], "identity": self._identity,
            "data": str(self._config.data.resolve()), "schedule_samples": self._inputs.schedule_samples, "attention": self._config.attention,
            "activation_checkpointing": self._config.activation_checkpointing, "world_size": self._share.world_size,
            "micro_batch": self._share.micro_batch, "recent_steps": self._guard.recent,
        }, self._inputs.deepspeed.values, (
            json.dumps({"step": step, "epochs": epochs.tolist(), "samples": samples.tolist()})
            for step, start in enumerate(starts, checkpoint.step + 1)
            for epochs, samples in [order.samples(start, start + batch)]
        ))  # fmt: skip

    @torch.no_grad()
    def _validate(self) -> None:
        if not self._inputs.data.num_samples("validation") or not self._config.validate_every_steps:
            return
        self._engine.train(False)
        batches = self._batches.call(
            validation_batches,
            self._inputs.data, self._config.objective, self._share, self._config.validation_samples,
            one_shape=self._validation_has_one_shape,
        )  # fmt: skip
        started = time.perf_counter()
        corpora = list(validation_samples(self._inputs.data, self._config.validation_samples))
        sums = torch.zeros(len(corpora), 5, dtype=torch.float64, device=self._engine.device)
        is_cut_short = False
        with progress_bar(
            "validate", len(batches), "batch", stream=self._console, is_shown=self._is_main, is_lasting=False
        ) as bar:
            for number, (corpus, layout) in enumerate(batches):
                self._watch.progress(f"validation at step {self._engine.steps}, batch {number + 1}")
                if is_cut_short := self._stopping.is_asked:
                    break
                losses = _stacked(self._engine(layout))
                if corpus is not None:
                    sums[corpora.index(corpus), :4] += losses
                    sums[corpora.index(corpus), 4] += layout.num_targets
                bar.update()
        if float(distributed.sum_over_ranks(torch.tensor([is_cut_short]))):
            return  # the next start does it anew
        values: dict[str, Any] = self._means(sums.sum(dim=0))
        self._say(f"validation at step {self._engine.steps}: {_short(values)}")
        if len(corpora) > 1:
            values["corpora"] = {
                corpus: self._means(of_corpus) for corpus, of_corpus in zip(corpora, sums, strict=True)
            }
        prompts = self._inputs.cloze
        filled = (
            fill_in(prompts, self._engine.predict(prompts.layout), self._inputs.data.tokenizer) if prompts else None
        )
        self._record("validation", values | {"validation_s": round(time.perf_counter() - started, 3)})
        if filled:
            self._record("cloze", {"prompts": filled}, text=in_markdown(filled))

    def _is_validation_missing(self) -> bool:
        """Whether this step's validation, the one at the run's start too, is still to be done."""
        step = self._engine.steps
        is_done = self._is_main and any(
            record["kind"] == "validation" and record["step"] == step for record in read_records(self._config.run)
        )
        return not distributed.from_rank_0(is_done) and self._is_due(
            self._config.validate_every_steps, step in (0, self._inputs.total_steps)
        )

    def _save(self) -> None:
        self._watch.progress(f"saving step {self._engine.steps}")
        self._store.save({
            "samples_consumed": self._samples_consumed, "skipped": [asdict(window) for window in self._skipped],
            "recent_steps": self._guard.recent,
        })  # fmt: skip
        self._saved_step = self._engine.steps

    def _report_saves(self, *, is_end: bool = False) -> None:
        """What became of the last saves, as soon as it is known; a failure does not end the run."""
        for save in self._store.saved():
            if save.failure:
                self._record("fault", {"fault": save.failure}, save.step)
                if not is_end:
                    self._say(f"warning: {save.failure}; training goes on; saving is tried again when it is next due")
            else:
                self._record("save", {
                    "save_s": round(save.stall_s, 3), "finishing_s": round(save.finishing_s, 3),
                    "size_bytes": save.size_bytes,
                }, save.step)  # fmt: skip

    def _end(self, reason: str | None) -> None:
        """Save what is not saved. Raises SaveFailed, on all ranks, where that cannot be done."""
        self._watch.progress(f"finishing the checkpoint of step {self._saved_step}")
        failure = self._store.finish()
        if self._saved_step != self._engine.steps or (failure and reason):
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

    def _is_due(self, every_steps: int, is_last: bool) -> bool:
        return is_last or (every_steps > 0 and self._engine.steps % every_steps == 0)

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        """Losses and accuracies per target, over all ranks."""
        ae_sum, par_sum, ae_correct, par_correct, num_targets = distributed.sum_over_ranks(sums).tolist()
        values: dict[str, float] = {}
        objective = self._config.objective
        if objective.has_ae:
            values |= {"ae_loss": ae_sum / num_targets, "ae_accuracy": ae_correct / num_targets}
        if objective.has_par:
            values |= {"par_loss": par_sum / num_targets, "par_accuracy": par_correct / num_targets}
        return values

    def _step_values(self, learning_rate: float) -> dict[str, Any]:
        return {
            "learning_rate": learning_rate, "gradient_norm": self._engine.gradient_norm,
            "loss_scale": self._engine.loss_scale, "skipped_steps": self._engine.skipped_steps,
            "samples_consumed": self._samples_consumed,
        }  # fmt: skip

    def _speed_and_memory(self, num_tokens: int, num_flops: int, seconds: float) -> dict[str, Any]:
        """Of all ranks together; of memory, the rank's that has taken most."""
        rank, world_size = self._engine.rank, self._engine.world_size
        own = torch.zeros(2 + 2 * world_size, dtype=torch.float64)
        own[:2] = torch.tensor([num_tokens, num_flops], dtype=torch.float64)
        own[2 + rank] = psutil.Process().memory_info().rss
        own[2 + world_size + rank] = self._engine.take_peak_memory_bytes()
        total = distributed.sum_over_ranks(own).cpu()
        host_bytes, device_bytes = (int(part.max()) for part in total[2:].split(world_size))
        values = {
            "tokens_per_s": round(float(total[0]) / seconds, 1), "flops_per_s": round(float(total[1]) / seconds),
            "host_memory_bytes": host_bytes,
        }  # fmt: skip
        return values | ({"memory_bytes": device_bytes} if device_bytes else {})

    def _record(self, kind: str, values: dict[str, Any], step: int | None = None, text: str | None = None) -> None:
        """On rank 0; losses and what is measured of a step go to DeepSpeed's monitors too, at the place that these count
        by, samples of the run."""
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
    """One optimizer step; returns this rank's sums, which `Trainer._means` adds up over all ranks."""
    engine.train(True)
    engine.seed_step(seed)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for layout in micro_batches:
        losses = engine(layout)
        engine.backward((losses.ae_sum + losses.par_sum) / num_targets[0])
        engine.step()
        sums += _stacked(losses)
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


def _stacked(losses: PretrainingLosses) -> torch.Tensor:
    return torch.stack([value.detach().double() for value in losses])


def _short(values: dict[str, float]) -> str:
    return " ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in values.items())
