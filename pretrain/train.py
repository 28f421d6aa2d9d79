"""The training loop."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import IO, Any

import torch
from tqdm import tqdm

from data_prep.console import progress_bar
from data_prep.files import sha256_of_file, write_whole
from data_prep.shards import manifest_path
from pretrain.batches import BatchesAhead, Share, TrainingBatches, validation_batches
from pretrain.checkpoint import CheckpointStore, SaveFailed
from pretrain.config import Inputs
from pretrain.engine import Engine, fused_adam_build, init_distributed
from pretrain.layout import Layout
from pretrain.metrics import Metrics, read_records
from pretrain.model import PMLM, PretrainingLosses
from pretrain.report import summary
from pretrain.status import write_plan
from pretrain.stopping import Stopping, agreed_reason
from pretrain.watchdog import RankLost, Watch


def train(inputs: Inputs, console: IO[str]) -> None:
    """Train, or take up again, the run that `inputs` describes; rank 0 reports to `console`.

    Raises ValueError, on one rank or on all, for what the user can cure; RankLost where another rank is gone; SaveFailed
    where the last checkpoint could not be written.
    """
    init_distributed()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = inputs.config
    with (
        Watch(Engine.ranks_store(), rank, world_size, config.watchdog_minutes, console) as watch,
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
        self._inputs, self._config, self._console = inputs, inputs.config, console
        self._watch, self._stopping = watch, stopping
        torch.manual_seed(self._config.seed)
        model = PMLM(inputs.model, self._config.attention, self._config.activation_checkpointing)
        if self._config.compile:
            model.compile_layers()
        is_built, _ = fused_adam_build()
        if not is_built and torch.distributed.get_rank() == 0:
            print("compiling DeepSpeed's fused Adam: about a minute, once on this machine", file=console, flush=True)
        self._engine = Engine(model, inputs.deepspeed)
        self._is_main = self._engine.rank == 0
        identity = run_identity(inputs, self._engine.world_size)
        self._store = CheckpointStore(
            self._config.run, self._engine, identity, self._config.keep_last, self._config.keep_every_steps
        )
        checkpoint, passed_over = self._store.resume()
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
        batches = TrainingBatches(
            inputs.data, self._config.objective, self._share, self._config.seed,
            one_shape=self._config.compile or (is_flex and inputs.model.dropout == 0),
        )  # fmt: skip
        self._batches = BatchesAhead(
            batches, self._samples_consumed, inputs.total_steps * self._share.train_batch, self._share.train_batch,
            is_pinned=self._engine.device.type == "cuda",
        )  # fmt: skip
        self._metrics = Metrics(self._config.run, self._engine.steps) if self._is_main else None
        if self._is_main:  # `export` needs it when the data set may be elsewhere
            tokenizer = inputs.data.tokenizer
            write_whole(self._config.run / tokenizer.file_name, tokenizer.path.read_bytes())
            write_plan(self._config.run, inputs.total_steps)
        self._report_start(model, passed_over, checkpoint is not None)

    def _report_start(self, model: PMLM, passed_over: list[str], is_resumed: bool) -> None:
        for line in passed_over:
            self._say(line)
        num_parameters = sum(p.numel() for p in model.parameters())
        sizes = self._inputs.batch_sizes
        self._say(
            f"{self._config.objective.value} on {self._config.data}: {num_parameters / 1e6:.1f}M parameters, "
            f"{self._inputs.deepspeed.precision}, batch {sizes.train_batch} = {sizes.micro_batch} x "
            f"{sizes.accumulation_steps} x {self._engine.world_size} ranks"
        )
        if is_resumed:
            self._say(f"resumed from step {self._engine.steps} of {self._inputs.total_steps}")
        self._record("start", {
            "resumed": is_resumed, "world_size": self._engine.world_size, "num_parameters": num_parameters,
            "samples_consumed": self._samples_consumed,
        })  # fmt: skip

    def run(self) -> None:
        """Train to the last step, or until the ranks are asked to stop, validating, logging and saving on the way."""
        total = self._inputs.total_steps
        if self._is_validation_missing():
            self._validate()
        if self._engine.steps >= total:
            self._say(f"nothing left to train: step {self._engine.steps} of {total} is done")
            return
        reason = None
        step_time_s, data_wait_s, num_tokens = 0.0, 0.0, 0
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
                num_targets, reason = self._agree(micro_batches)
                if reason:
                    break
                sums = self._train_step(micro_batches, num_targets)
                self._samples_consumed += self._share.train_batch
                step = self._engine.steps
                num_tokens += sum(layout.num_tokens for layout in micro_batches)
                is_last = step >= total
                is_logged = step == 1 or step % self._config.log_every_steps == 0 or is_last
                values = self._means(sums) if is_logged else {}
                step_time_s += time.perf_counter() - started
                bar.update()
                if is_logged:
                    tokens = float(self._engine.sum_over_ranks(torch.tensor([num_tokens])))
                    self._record("train", values | self._step_values(learning_rate) | {
                        "tokens_per_s": round(tokens / step_time_s, 1), "data_wait": round(data_wait_s / step_time_s, 5)
                    })  # fmt: skip
                    bar.set_postfix_str(_short(values), refresh=False)
                    step_time_s, data_wait_s, num_tokens = 0.0, 0.0, 0
                if self._is_due(self._config.validate_every_steps, is_last):
                    self._validate()
                if self._is_due(self._config.save_every_steps, is_last):
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

    def _agree(self, micro_batches: list[Layout]) -> tuple[torch.Tensor, str | None]:
        """The coming step's targets on all ranks, shape (1,); and why all ranks are to stop before it, if they are."""
        own = [sum(m.num_targets for m in micro_batches), *self._stopping.vote()]
        total = self._engine.sum_over_ranks(torch.tensor(own, dtype=torch.float64))
        return total[:1], agreed_reason(total[1:].tolist())

    def _train_step(self, micro_batches: list[Layout], num_targets: torch.Tensor) -> torch.Tensor:
        """One optimizer step; returns this rank's sums, which `_means` adds up over all ranks."""
        self._engine.train(True)
        self._engine.seed_step(self._config.seed)
        sums = torch.zeros(4, dtype=torch.float64, device=self._engine.device)
        for layout in micro_batches:
            losses = self._engine(layout)
            self._engine.backward((losses.ae_sum + losses.par_sum) / num_targets[0])
            self._engine.step()
            sums += _stacked(losses)
        return torch.cat([sums, num_targets / self._engine.world_size])

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
        sums = torch.zeros(5, dtype=torch.float64, device=self._engine.device)
        is_cut_short = False
        with progress_bar(
            "validate", len(batches), "batch", stream=self._console, is_shown=self._is_main, is_lasting=False
        ) as bar:
            for batch, layout in enumerate(batches):
                self._watch.progress(f"validation at step {self._engine.steps}, batch {batch + 1}")
                if is_cut_short := self._stopping.is_asked:
                    break
                sums[:4] += _stacked(self._engine(layout))
                sums[4] += layout.num_targets
                bar.update()
        if float(self._engine.sum_over_ranks(torch.tensor([is_cut_short]))):
            return  # the next start does it anew
        values = self._means(sums)
        self._record("validation", values)
        self._say(f"validation at step {self._engine.steps}: {_short(values)}")

    def _is_validation_missing(self) -> bool:
        """Whether this step's validation, the one at the run's start too, is still to be done."""
        step = self._engine.steps
        is_done = self._is_main and any(
            record["kind"] == "validation" and record["step"] == step for record in read_records(self._config.run)
        )
        return not self._engine.from_rank_0(is_done) and self._is_due(
            self._config.validate_every_steps, step in (0, self._inputs.total_steps)
        )

    def _save(self) -> None:
        self._watch.progress(f"saving step {self._engine.steps}")
        self._store.save(self._samples_consumed)
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
        ae_sum, par_sum, ae_correct, par_correct, num_targets = self._engine.sum_over_ranks(sums).tolist()
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

    def _record(self, kind: str, values: dict[str, Any], step: int | None = None) -> None:
        if self._metrics:
            self._metrics.record(kind, self._engine.steps if step is None else step, values)

    def _say(self, text: str) -> None:
        if self._is_main:
            tqdm.write(text, file=self._console)
            self._console.flush()


def run_identity(inputs: Inputs, world_size: int) -> dict[str, Any]:
    """What must not change when a run is taken up again."""
    return {
        "model": asdict(inputs.model),
        "objective": inputs.config.objective.value,
        "seed": inputs.config.seed,
        "data_sha256": sha256_of_file(manifest_path(inputs.data.folder)),
        "tokenizer_file": inputs.data.tokenizer.file_name,
        "tokenizer_sha256": inputs.data.tokenizer.sha256,
        "precision": inputs.deepspeed.precision,
        "zero_stage": inputs.deepspeed.values.get("zero_optimization", {}).get("stage", 0),
        "world_size": world_size,
    }


def _stacked(losses: PretrainingLosses) -> torch.Tensor:
    return torch.stack([value.detach().double() for value in losses])


def _short(values: dict[str, float]) -> str:
    return " ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in values.items())
