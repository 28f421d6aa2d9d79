"""python -m benchmarks.zero_step: what a ZeRO-2 step costs against plain data parallelism.

Two ranks on this machine train the same PMLM on the same samples in fp32, in turns: under DeepSpeed as `run_pretrain.py`
does it (ZeRO-2, its fused Adam, sums over the ranks), and under torch's DistributedDataParallel with its fused AdamW.
A step is forward, backward, reduction and update. The ratio of medians is the figure. Writes zero_step.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from benchmarks.text import Text
from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.files import read_json, write_whole
from data_prep.shards import SampleBatch
from pretrain.model import ModelSize

ZERO, DDP = "ZeRO-2", "DDP"
WORLD_SIZE = 2
_CONFIG = {
    "gradient_clipping": 0.0,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4, "warmup_num_steps": 10}},
}


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.zero_step", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("sample_corpus"), help="text to take the samples from")
    parser.add_argument("--model", choices=get_args(ModelSize), default="small", help="size of the model")
    parser.add_argument("--length_tokens", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--micro_batch", type=int, default=4, help="samples of a step on each rank")
    parser.add_argument("--repetitions", type=int, default=7, help="steps measured of each")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zero = read_json(Path("ds_configs/zero2_local.json"))["zero_optimization"]
        sizes = {"train_batch_size": args.micro_batch * WORLD_SIZE, "train_micro_batch_size_per_gpu": args.micro_batch}
        config = folder / "ds.json"
        config.write_text(json.dumps({**_CONFIG, **sizes, "zero_optimization": zero}))
        text = Text(args.corpus, folder)
        batch = text.batch(args.length_tokens, args.micro_batch * WORLD_SIZE)
        run_ranks(WORLD_SIZE, _rank, args.model, batch, text.mask_id, config, args.repetitions, folder)
        seconds = read_json(folder / "seconds.json")
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    ratio = medians[ZERO] / medians[DDP]
    args.output.mkdir(parents=True, exist_ok=True)
    setting = {k: str(v) for k, v in vars(args).items()}
    result = {"setting": setting, "cores": available_cores(), "seconds": seconds, "medians": medians, "ratio": ratio}
    write_whole(args.output / "zero_step.json", json.dumps(result, indent=1).encode())
    for way, values in seconds.items():
        print(f"{way:7} {medians[way]:7.3f} s ({min(values):.3f} to {max(values):.3f})")
    print(f"{ZERO} is {ratio:.2f} x of {DDP}; written: {args.output / 'zero_step.json'}")


def run_ranks(world_size: int, function: Callable[..., None], *arguments: Any, num_worlds: int = 1) -> None:
    """Call `function(rank, *arguments)` in the ranks of a world, or of several side by side that know nothing of each other.

    The environment of each is that of a rank. Raises ValueError where one failed.
    """
    context = multiprocessing.get_context("spawn")
    ranks = []
    for _ in range(num_worlds):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks += [
            context.Process(target=_start_rank, args=(rank, world_size, port, function, arguments))
            for rank in range(world_size)
        ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise ValueError("a rank failed; see above")


def _start_rank(
    rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    function(rank, *arguments)


def _rank(
    rank: int, size: ModelSize, batch: SampleBatch, mask_id: int, config: Path, repetitions: int, out: Path
) -> None:
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from pretrain.distributed import join_ranks
    from pretrain.ds_config import DeepSpeedConfig
    from pretrain.engine import Engine, parameter_groups
    from pretrain.layout import Objective, pseudo_masked_layout
    from pretrain.model import PMLM, PMLMConfig

    join_ranks()
    samples = batch[slice(rank, None, WORLD_SIZE)]
    layout = pseudo_masked_layout(samples, Objective.AE_PAR, mask_id=mask_id)

    def make_model() -> PMLM:
        torch.manual_seed(0)
        return PMLM(PMLMConfig.of_size(size, vocab_size=30_522, max_positions=batch.tokens_BL.shape[1])).train()

    engine, plain = Engine(make_model(), DeepSpeedConfig(config)), DistributedDataParallel(make_model())
    adam = torch.optim.AdamW(parameter_groups(plain.module), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def zero_step() -> None:
        losses = engine(layout)
        engine.backward((losses.ae_sum + losses.par_sum) / (WORLD_SIZE * layout.num_targets))
        engine.step()

    def ddp_step() -> None:
        losses = plain(layout)
        ((losses.ae_sum + losses.par_sum) / layout.num_targets).backward()
        adam.step()
        adam.zero_grad()

    steps: dict[str, Callable[[], None]] = {ZERO: zero_step, DDP: ddp_step}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    with progress_bar("measure", (repetitions + 1) * len(steps), "step", is_shown=rank == 0) as bar:
        for repetition in range(repetitions + 1):
            for way, step in steps.items():
                distributed.barrier()
                started = time.perf_counter()
                step()
                distributed.barrier()
                if repetition:
                    seconds[way].append(time.perf_counter() - started)
                bar.update()
    if rank == 0:
        (out / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    sys.exit(main())
