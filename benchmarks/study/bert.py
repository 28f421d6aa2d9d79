"""python -m benchmarks.study.bert: transformers' BertForMaskedLM, pre-trained on the samples of a data set for so many CPU seconds.

Samples, their order, what is masked and what is shown there are those that run_pretrain.py with --objective ae takes, and so are
batch, AdamW, clipping and schedule, but that the schedule ends with the time, not after so many steps. Writes to OUTPUT what
transformers' save_pretrained does, with the tokenizer beside it, as finetune.weights opens it, and last study.json.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

from benchmarks.peers import bert_config
from benchmarks.study.tasks import RESULT
from benchmarks.train_step import labels_of, padded
from data_prep.console import ArgumentParser, add_flags, progress_bar, run_command
from data_prep.files import write_json, write_whole
from data_prep.shards import DataSet
from finetune.optimizer import PrecisionFlag, autocast, check_precision, decide_precision
from finetune.processes import Processes
from pretrain.batches import Share, TrainingBatches
from pretrain.config import MODEL_NUMBERS, model_of
from pretrain.ds_config import DeepSpeedConfig
from pretrain.engine import parameter_groups
from pretrain.layout import Layout, Objective
from pretrain.model import PMLMConfig


def cpu_s() -> float:
    """CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.study.bert", description=__doc__)
    parser.add_argument("--deepspeed_config", type=Path, required=True, metavar="PATH",
                        help="batch size, AdamW, clipping, peak learning rate and warm-up's share of the time")  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="data set made by data_prep build")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cpu_s", type=float, required=True, metavar="N", help="CPU seconds to train for")
    parser.add_argument("--precision", choices=get_args(PrecisionFlag), default="auto", help="of matrix products")
    parser.add_argument("--model", default="tiny", help="size; the numbers below replace single ones of it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and dropout")
    add_flags(parser, PMLMConfig, only=MODEL_NUMBERS, optional=True)
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    check_precision(args.precision)
    precision = decide_precision(args.precision, Processes())
    data, settings = DataSet(args.data), DeepSpeedConfig(args.deepspeed_config)
    config = model_of(args, data.tokenizer.vocab_size)
    model = transformers.BertForMaskedLM(bert_config(config, pad_token_id=data.tokenizer.pad_id))
    optimizer, schedule = _optimizer(model, settings), settings.values["scheduler"]["params"]
    warmup = schedule["warmup_num_steps"] / schedule["total_num_steps"]
    share = Share(0, 1, settings.batch_sizes(1).train_batch, 1)
    batches = TrainingBatches(data, Objective.AE, share, args.seed)
    step, started = 0, cpu_s()
    with progress_bar("train", round(args.cpu_s), "s") as bar:
        while (part := (cpu_s() - started) / args.cpu_s) < 1:
            layout = batches.step(step * share.train_batch)[0]
            with autocast(torch.device("cpu"), precision):
                loss = model(**_inputs(layout), labels=padded(layout, labels_of(layout), -100)).loss
            loss.backward()
            if settings.values["gradient_clipping"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.values["gradient_clipping"])
            for group in optimizer.param_groups:
                group["lr"] = schedule["warmup_max_lr"] * min(part / warmup, (1 - part) / (1 - warmup))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.n = round(cpu_s() - started)
            bar.set_postfix_str(f"ae loss {float(loss.detach()):.3f}", refresh=False)
            bar.update(0)
    model.save_pretrained(args.output)
    write_whole(args.output / data.tokenizer.file_name, data.tokenizer.path.read_bytes())
    write_json(args.output / RESULT, {"steps": step, "samples": step * share.train_batch})
    data.close()


def _optimizer(model: torch.nn.Module, settings: DeepSpeedConfig) -> torch.optim.Optimizer:
    params = settings.values["optimizer"]["params"]
    return torch.optim.AdamW(
        parameter_groups(model), lr=0.0, betas=tuple(params["betas"]), eps=params["eps"],
        weight_decay=params["weight_decay"], fused=True,
    )  # fmt: skip


def _inputs(layout: Layout) -> dict[str, torch.Tensor]:
    return {
        "input_ids": padded(layout, layout.ids_N),
        "token_type_ids": padded(layout, layout.segments_N),
        "attention_mask": padded(layout, torch.ones_like(layout.ids_N)),
    }


if __name__ == "__main__":
    sys.exit(main())
