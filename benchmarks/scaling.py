"""python -m benchmarks.scaling: the planner's model of communication against ranks on this machine.

A ZeRO-2 step of one gloo rank and of two, the same work for each, a thread each. One rank runs beside another that knows nothing
of it, so that both share caches and memory as the two ranks do. The model is given the bandwidth of an all-reduce alone
and says how much longer two ranks take. Writes scaling.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from benchmarks.zero_step import run_ranks
from data_prep.console import ArgumentParser, available_cores, run_command
from data_prep.files import read_json, write_whole
from pretrain.communication import Network, Traffic
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import ModelSize, PMLMConfig
from pretrain.plan import full_samples

RECIPE = Path("ds_configs/zero2_local.json")
_VOCAB_SIZE = 30_522


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--model", choices=get_args(ModelSize), default="small", help="size of the model")
    parser.add_argument("--length_tokens", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--micro_batch", type=int, default=4, help="samples of a micro batch on each rank")
    parser.add_argument("--accumulation_steps", type=int, default=2, help="micro batches of a step")
    parser.add_argument("--repetitions", type=int, default=5, help="steps measured")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for world_size in (1, 2):
            out = Path(name) / f"{world_size}.json"
            run_ranks(world_size, _rank, vars(args), out, num_worlds=2 // world_size)
            found[world_size] = read_json(out)
    step_s = {world_size: statistics.median(of_world["step_s"]) for world_size, of_world in found.items()}
    two = found[2]
    network = Network(2, two["all_reduce_bytes"] / statistics.median(two["all_reduce_s"]), 0)  # 2 (W - 1) / W is 1
    traffic = Traffic(
        two["weight_bytes"], 2, -(-two["weight_bytes"] // two["bucket_bytes"]), two["overlaps"], args.accumulation_steps
    )
    modelled_s = step_s[1] + traffic.exposed_s(2, network, step_s[1] / args.accumulation_steps)
    result = {
        "setting": {k: str(v) for k, v in vars(args).items()}, "cores": available_cores(), "measured": found,
        "step_s": step_s, "all_reduce_bytes_per_s": network.link, "modelled_step_s": modelled_s,
        "measured_efficiency": step_s[1] / step_s[2], "modelled_efficiency": step_s[1] / modelled_s,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "scaling.json", json.dumps(result, indent=1).encode())
    print(
        f"1 rank {step_s[1]:.3f} s, 2 ranks {step_s[2]:.3f} s a step; all-reduce {network.link / 1e9:.2f} GB/s; weak-scaling "
        f"efficiency measured {step_s[1] / step_s[2]:.1%}, by the model {step_s[1] / modelled_s:.1%}"
    )
    print(f"written: {args.output / 'scaling.json'}")


def _rank(rank: int, args: dict[str, Any], out: Path) -> None:
    import torch
    from torch import distributed

    from pretrain.distributed import join_ranks
    from pretrain.ds_config import DeepSpeedConfig
    from pretrain.engine import Engine
    from pretrain.model import PMLM

    torch.set_num_threads(1)
    join_ranks()
    torch.set_num_threads(1)
    world_size, micro_batch, accumulation = (
        distributed.get_world_size(),
        args["micro_batch"],
        args["accumulation_steps"],
    )
    values = read_json(RECIPE) | {
        "train_batch_size": world_size * micro_batch * accumulation, "train_micro_batch_size_per_gpu": micro_batch
    }  # fmt: skip
    path = out.with_name(f"ds-{world_size}.json")
    if rank == 0:
        write_whole(path, json.dumps(values).encode())
    distributed.barrier()
    torch.manual_seed(0)
    config = PMLMConfig.of_size(args["model"], vocab_size=_VOCAB_SIZE, max_positions=args["length_tokens"])
    engine = Engine(PMLM(config).train(), DeepSpeedConfig(path))
    layout = pseudo_masked_layout(full_samples(micro_batch, args["length_tokens"]), Objective.AE_PAR, mask_id=0)
    targets = world_size * accumulation * layout.num_targets

    def step() -> None:
        for _ in range(accumulation):
            losses = engine(layout)
            engine.backward((losses.ae_sum + losses.par_sum) / targets)
            engine.step()

    zero, number_bytes = values["zero_optimization"], 2
    gradient = torch.ones(zero["reduce_bucket_size"], dtype=torch.float16)

    def all_reduce() -> None:
        distributed.all_reduce(gradient)

    times: dict[str, list[float]] = {"step_s": [], "all_reduce_s": []}
    for repetition in range(args["repetitions"] + 1):
        for name, function in (("step_s", step), ("all_reduce_s", all_reduce)):
            distributed.barrier()
            started = time.perf_counter()
            function()
            if repetition:
                times[name].append(time.perf_counter() - started)
    if rank == 0:
        write_whole(out, json.dumps({
            **times, "all_reduce_bytes": gradient.numel() * number_bytes, "overlaps": zero["overlap_comm"],
            "weight_bytes": sum(p.numel() for p in engine.module.parameters()) * number_bytes,
            "bucket_bytes": zero["reduce_bucket_size"] * number_bytes,
        }).encode())  # fmt: skip
    engine.close()


if __name__ == "__main__":
    sys.exit(main())
