"""Fine-tune a pre-trained model to write a target for a source: on JSON lines {"src": ..., "tgt": ...}, TSV, CSV or Parquet; for question
generation on {"paragraph": ..., "answer": ..., "question": ...} or SQuAD's JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from data_prep.console import ArgumentParser, add_flags, progress_bar
from data_prep.draws import Decision, draw_words, unit_interval
from data_prep.files import write_whole
from data_prep.mask_settings import BLOCK_LENGTHS, BLOCK_SHARE
from data_prep.masking import block_draw
from data_prep.tokenizer import Tokenizer
from finetune.batches import epoch_order, prediction_batches
from finetune.figures import Score
from finetune.identity import training_identity
from finetune.processes import Processes
from finetune.runs import StartSettings, add_train_flags, from_flags, load_start, say, settings_of, train_all
from finetune.score import text_scores
from finetune.search import decode
from finetune.search_settings import Rules
from finetune.seq2seq_data import Examples, PairColumns, Pairs, Seq2SeqSettings, make_examples, read_pairs
from finetune.seq2seq_model import Seq2SeqModel, save_seq2seq
from finetune.tokens import TokenLists
from finetune.trainer import TrainSettings
from pretrain.model import PMLM

WRITTEN = "written.jsonl"
"""In the model's folder: what it wrote in validation."""

RECIPES: dict[str, dict[str, Any]] = {
    "cnndm": {
        "learning_rate": 7e-5, "batch_size": 64, "epochs": 14, "warmup": 0.02, "max_source_tokens": 608,
        "max_target_tokens": 160, "length_penalty": 0.7, "released_length_penalty": True, "num_beams": 5, "target_mask_prob": 0.7,
    },
    "xsum": {
        "learning_rate": 7e-5, "batch_size": 64, "epochs": 14, "warmup": 0.02, "max_source_tokens": 720,
        "max_target_tokens": 48, "length_penalty": 0.6, "released_length_penalty": True, "num_beams": 5, "target_mask_prob": 0.5,
    },
    "qg": {
        "learning_rate": 2e-5, "batch_size": 48, "epochs": 16, "warmup": 0.1, "max_source_tokens": 464,
        "max_target_tokens": 48, "length_penalty": 1.3, "released_length_penalty": True, "num_beams": 8, "question_generation": True,
    },
}  # fmt: skip
"""The paper's (PAPER.md): CNN/DailyMail, XSum, question generation. Of the ranges for target_mask_prob one end each."""


@dataclass(frozen=True)
class TargetSettings:
    """What of a target is predicted, and from what."""

    label_smoothing: float = 0.1
    """Share of what is to be predicted that is spread evenly over the vocabulary."""
    target_mask_prob: float = 0.0
    """Each target token is hidden from those behind it, as [MASK], with this probability, anew in each epoch."""
    target_blocks: bool = False
    """Predict blocks of target tokens at once, drawn anew in each epoch as in pre-training: 40 % of 2 to 6 tokens, else one."""

    def __post_init__(self) -> None:
        names = ("label_smoothing", "target_mask_prob")
        faults = [
            f"{n} is {getattr(self, n)}, expected 0 to less than 1" for n in names if not 0 <= getattr(self, n) < 1
        ]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class ValidationSettings:
    """What the best weights are chosen by."""

    best_by: Literal["loss", "rouge_l", "exact_match"] = "loss"
    """The best weights have the lowest loss, or the highest ROUGE-L or exact match of what they write in validation."""
    generated_pairs: int = 64
    """Targets written in each validation, of pairs drawn from the file, for ROUGE-L and exact match; 0 = none."""

    def __post_init__(self) -> None:
        if self.generated_pairs < 0:
            raise ValueError(f"generated_pairs is {self.generated_pairs}, expected at least 0")
        if self.best_by != "loss" and not self.generated_pairs:
            raise ValueError(f"--best_by {self.best_by}: needs --generated_pairs")


class TargetNoise:
    """The turns of targets, and what later turns see of them: a function of seed, epoch and sample."""

    def __init__(self, settings: TargetSettings, tokenizer: Tokenizer, max_target_tokens: int, seed: int) -> None:
        self._settings, self._tokenizer, self._max_tokens, self._seed = settings, tokenizer, max_target_tokens, seed

    def __call__(
        self, targets: TokenLists | Sequence[Sequence[int]], sample: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of one sample's target: turns, and ids to be given."""
        target, settings = np.array(targets[sample], dtype=np.int64), self._settings
        turns = np.arange(1, len(target) + 1)
        if not settings.target_mask_prob and not settings.target_blocks:
            return turns, target
        words = draw_words(self._seed, Decision.SEQ2SEQ_TARGETS, sample, 1, 2 * self._max_tokens, variant=epoch)[0]
        of_masks, of_blocks = words[: self._max_tokens], words[self._max_tokens :]
        is_hidden = np.array([unit_interval(word) for word in of_masks[: len(target)]]) < settings.target_mask_prob
        if settings.target_blocks:
            lengths = [block_draw(word, 1, BLOCK_SHARE, *BLOCK_LENGTHS)[1] for word in of_blocks[: len(target)]]
            turns = np.repeat(turns, lengths)[: len(target)]
        return turns, np.where(is_hidden, self._tokenizer.mask_id, target)


class Seq2SeqTask:
    """See finetune.trainer.Task.

    A batch's loss is that of its target tokens, added up, by the tokens that as many targets have on average: so every
    token of the training set counts as much as any other.
    """

    base_learning_rate, base_epochs = 7e-5, 10

    def __init__(
        self, model: Seq2SeqModel, tokenizer: Tokenizer, settings: Seq2SeqSettings, of_targets: TargetSettings,
        of_validation: ValidationSettings, train: Examples, validation: Examples, processes: Processes, seed: int,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._settings = model.to(processes.device), tokenizer, settings
        self._train, self._validation, self._processes = train, validation, processes
        self._of_validation = of_validation
        self._written: list[dict[str, str]] = []
        best_by = of_validation.best_by
        self.score = Score(best_by, sign=-1.0) if best_by == "loss" else Score(best_by, (0.0, 100.0))
        self._smoothing = of_targets.label_smoothing
        self._noise = TargetNoise(of_targets, tokenizer, settings.max_target_tokens, seed)
        self._mean_target_tokens = float(train.target_lengths.mean())
        self.lengths = train.lengths

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """See Task."""
        turns, given = zip(*(self._noise(self._train.targets, sample, epoch) for sample in samples), strict=True)
        layout = self._train.layout(samples, self._tokenizer.mask_id, turns, given).to(self._processes.device)
        losses_T, _ = self._model.target_losses(layout, self._smoothing)
        return losses_T.sum() / self._mean_target_tokens

    def validate(self) -> dict[str, float]:
        """See Task; loss and accuracy are of a target token, without label smoothing."""
        loss, accuracy = self._loss_and_accuracy()
        values = {"loss": loss, "token_accuracy": accuracy, **self._scores_of_written()}
        best_by = self._of_validation.best_by
        return {"score": self.score.sign * values[best_by], **values}

    def _loss_and_accuracy(self) -> tuple[float, float]:
        processes, examples = self._processes, self._validation
        sums = torch.zeros(2, dtype=torch.float64)
        bar = progress_bar("validating", len(examples.targets), "pair", is_shown=processes.is_first, is_lasting=False)
        with bar, torch.no_grad():
            for turn, batch in enumerate(prediction_batches(examples.lengths)):
                if turn % processes.world_size == processes.rank:
                    layout = examples.layout(batch.tolist(), self._tokenizer.mask_id).to(processes.device)
                    losses_T, is_correct_T = self._model.target_losses(layout)
                    sums += torch.tensor([float(losses_T.sum()), float(is_correct_T.sum())], dtype=torch.float64)
                bar.update(len(batch))
        loss, num_correct = torch.stack(processes.gather(sums)).sum(dim=0).tolist()
        num_tokens = int(examples.target_lengths.sum())
        return loss / num_tokens, num_correct / num_tokens

    def _scores_of_written(self) -> dict[str, float]:
        """ROUGE-L and exact match of targets written for some pairs, always the same."""
        examples, tokenizer, processes = self._validation, self._tokenizer, self._processes
        chosen = epoch_order(0, 0, len(examples.targets))[: self._of_validation.generated_pairs]
        if not len(chosen):
            return {}
        settings = self._settings.search()
        mine = chosen[processes.rank :: processes.world_size].tolist()
        found = decode(
            self._model, Rules.of(tokenizer, settings), [examples.sources[i].tolist() for i in mine], settings
        )
        written: dict[int, str] = {}
        for part in processes.gather(
            {i: tokenizer.decode(of_one.hypotheses[0].tokens) for i, of_one in zip(mine, found, strict=True)}
        ):
            written.update(part)
        self._written = [
            {"src": tokenizer.decode(examples.sources[i]), "tgt": tokenizer.decode(examples.targets[i]), "text": written[i]}
            for i in chosen.tolist()
        ]  # fmt: skip
        scores, _ = text_scores([row["text"] for row in self._written], [[row["tgt"]] for row in self._written])
        return {name: scores[name] for name in ("rouge_l", "exact_match")}

    def save(self, folder: Path) -> None:
        """See Task."""
        lines = [json.dumps(row, ensure_ascii=False) for row in self._written]
        write_whole(folder / WRITTEN, "".join(f"{line}\n" for line in lines).encode())
        save_seq2seq(folder, self._model, self._tokenizer, self._settings)


def in_words(pairs: Pairs, examples: Examples, settings: Seq2SeqSettings) -> list[str]:
    """Return what was read, and what of it was left out or cut, in lines for the user."""
    lines, path = [], pairs.path
    if pairs.num_without_answer:
        lines.append(f"{path}: {pairs.num_without_answer:,} questions without an answer are left out")
    if num_empty := int((~examples.is_filled).sum()):
        lines.append(
            f"warning: {path}: {num_empty:,} of {len(examples.is_filled):,} pairs are left out: their source or target is empty (the "
            f"first: {examples.first_empty})"
        )
    line = f"{path}: {len(examples):,} pairs"
    if examples.num_cut_sources:
        line += (
            f"; {examples.num_cut_sources:,} sources are cut to --max_source_tokens {settings.max_source_tokens}, "
            f"{examples.num_cut_tokens:,} tokens in all"
        )
    if examples.num_cut_targets:
        line += f"; {examples.num_cut_targets:,} targets are cut to --max_target_tokens {settings.max_target_tokens}"
    return [*lines, line]


def train(
    start: StartSettings, settings: TrainSettings, of_model: Seq2SeqSettings, of_targets: TargetSettings,
    of_validation: ValidationSettings, train_file: Path, validation_file: Path, columns: PairColumns | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune; returns the summary."""
    processes, columns = processes or Processes(), columns or PairColumns()
    paths = {"train": train_file, "validation": validation_file}
    pairs = {
        path: read_pairs(path, columns, question_generation=of_model.question_generation)
        for path in dict.fromkeys(paths.values())
    }
    pretrained = load_start(start, processes)
    tokenizer = pretrained.tokenizer
    examples = {}
    for path, of_file in pairs.items():
        examples[path] = make_examples(tokenizer, of_file, of_model)
        say(processes, *in_words(of_file, examples[path], of_model))

    def make_task(model: PMLM, of_run: TrainSettings) -> tuple[nn.Module, Seq2SeqTask]:
        writer = Seq2SeqModel(model)
        task = Seq2SeqTask(
            writer, tokenizer, of_model, of_targets, of_validation, examples[train_file], examples[validation_file],
            processes, of_run.seed,
        )  # fmt: skip
        return writer, task

    identity = training_identity(
        pretrained.model, pretrained.pooler, pretrained.tokenizer, {role: pairs[path].sha256 for role, path in paths.items()},
        {"name": "seq2seq", **asdict(of_model), **asdict(of_targets), **asdict(of_validation), **asdict(columns)},
    )  # fmt: skip
    return train_all(start, settings, pretrained.model, identity, processes, make_task)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `python -m finetune seq2seq`."""
    parser.add_argument("--train_file", type=Path, metavar="PATH", required=True, help="pairs to train on")
    parser.add_argument("--validation_file", type=Path, metavar="PATH", required=True,
                        help="pairs that the best weights are chosen by")  # fmt: skip
    parser.add_argument("--recipe", choices=[*RECIPES], help="the paper's settings for CNN/DailyMail, XSum or question "
                        "generation, in place of the defaults below; other flags given go before them")  # fmt: skip
    for cls in (PairColumns, Seq2SeqSettings, TargetSettings, ValidationSettings):
        add_flags(parser, cls)
    add_train_flags(parser, without=["max_length_tokens", "grid"], output=Path("runs/seq2seq"), batch_size=64)


def run(args: Any, processes: Processes) -> None:
    """Run `python -m finetune seq2seq`."""
    of_model = from_flags(args, Seq2SeqSettings)
    args.max_length_tokens = of_model.max_positions
    start, settings = settings_of(args)
    train(
        start, settings, of_model, from_flags(args, TargetSettings), from_flags(args, ValidationSettings), args.train_file,
        args.validation_file, from_flags(args, PairColumns), processes,
    )  # fmt: skip
    say(processes, f"{start.output}: write with `python -m finetune generate --model {start.output} --text ...`")
