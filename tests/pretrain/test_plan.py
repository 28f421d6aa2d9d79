"""pretrain.plan: its numbers against measurements, plain definitions and the paper's run."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode

from data_prep.shards import DataSet
from pretrain.communication import HOP_S, Network, Traffic
from pretrain.config import make_parser as run_parser
from pretrain.ds_config import DeepSpeedConfig
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig
from pretrain.plan import Plan, describe, full_samples, main, make_parser, make_plan, write

PAPERS = REPOSITORY / "ds_configs" / "zero2.json"


def plan_of(*flags: object) -> Plan:
    return make_plan(make_parser().parse_args(["--deepspeed_config", str(PAPERS), *map(str, flags)]))


def recipe_of(path: Path, **changes: object) -> Path:
    """The paper's with some keys replaced."""
    path.write_text(json.dumps(json.loads(PAPERS.read_text()) | {"train_micro_batch_size_per_gpu": 1} | changes))
    return path


@pytest.fixture(scope="module")
def papers_run() -> Plan:
    """64 V100 of 32 GB."""
    return plan_of()


def test_the_papers_run_falls_out(papers_run: Plan) -> None:
    assert papers_run.days == pytest.approx(20, rel=0.2)
    assert (papers_run.gpus, papers_run.train_batch_size, papers_run.total_steps) == (64, 7680, 500_000)
    assert papers_run.largest_micro_batch >= 30  # the recipe's
    assert "19" in next(line for line in describe(papers_run) if line.startswith("run: "))


def test_the_largest_micro_batch_is_the_largest(papers_run: Plan, tmp_path: Path) -> None:
    assert papers_run.micro_batch * papers_run.accumulation_steps == 7680 // 64
    assert papers_run.memory[2].total <= papers_run.usable_memory_bytes
    largest = papers_run.largest_micro_batch
    for share in (largest, largest + 1):
        recipe = recipe_of(tmp_path / f"{share}.json", train_batch_size=64 * share)
        assert (plan_of("--deepspeed_config", recipe).micro_batch == share) == (share == largest)


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "ds.json", train_batch_size=8)
    flags = [
        "--deepspeed_config",
        recipe,
        "--model",
        "tiny",
        "--max_length_tokens",
        "64",
        "--vocab_size",
        "500",
        "--nodes",
        "1",
        "--gpus",
        "2",
    ]
    plan = plan_of(*flags)
    config = PMLMConfig.of_size("tiny", dropout=0.1, vocab_size=500)
    layout = pseudo_masked_layout(full_samples(8, 64), Objective.AE_PAR, mask_id=4)
    with FlopCounterMode(display=False) as counter:
        losses = PMLM(config, "reference").train()(layout)
        (losses.ae_sum + losses.par_sum).backward()
    assert plan.step_flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    again = plan_of(*flags, "--activation_checkpointing")
    assert again.step_flops == plan.step_flops
    with FlopCounterMode(display=False) as counter:
        losses = PMLM(config, "reference", activation_checkpointing=True).train()(layout)
        (losses.ae_sum + losses.par_sum).backward()
    assert again.step_flops + again.recomputed_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_what_is_written_trains(papers_run: Plan, data_folder: Path, tmp_path: Path) -> None:
    plan = plan_of("--nodes", 2, "--gpu", "A100-80GB", "--dropout", 0, "--data", data_folder, "--max_steps", 70,
                   "--objective", "ar", "--output", tmp_path / "out")  # fmt: skip
    config, script = write(plan, tmp_path / "out")
    recipe, written = json.loads(PAPERS.read_text()), json.loads(config.read_text())
    assert [*written] == [*recipe]
    assert written == recipe | {"train_micro_batch_size_per_gpu": plan.micro_batch}
    sizes = DeepSpeedConfig(config).batch_sizes(16)
    assert (sizes.micro_batch, sizes.accumulation_steps) == (plan.micro_batch, plan.accumulation_steps)
    words = shlex.split(script.read_text().splitlines()[-1])
    assert words[:5] == ["sbatch", "--nodes=2", "run_pretrain.sh", "--ranks", "8"]
    args = run_parser("", "").parse_args(words[5:])
    assert (args.deepspeed_config, args.objective, args.dropout, args.max_steps) == (config, Objective.AR, 0.0, 70)
    with pytest.raises(ValueError, match="exists already"):
        write(papers_run, tmp_path / "out")


def test_a_data_set_decides_lengths_vocabulary_and_epochs(data_folder: Path) -> None:
    data = DataSet(data_folder)
    plan = plan_of("--data", data_folder, "--max_steps", 100, "--nodes", 1)
    assert plan.epochs == pytest.approx(768_000 / data.num_samples("train"))
    mean_tokens = sum(shard["num_tokens"] for shard in data.manifest["splits"]["train"]) / data.num_samples("train")
    assert plan.tokens == pytest.approx(768_000 * mean_tokens, rel=0.05)
    short = plan_of("--max_length_tokens", 64, "--vocab_size", data.tokenizer.vocab_size, "--nodes", 1)
    assert plan.num_parameters == short.num_parameters
    assert plan.memory == short.memory  # of the longest samples there may be
    assert plan.step_flops < short.step_flops


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_a_ring_sends_what_one_that_is_played_sends(ranks: int) -> None:
    """An all-reduce as a reduce-scatter and an all-gather, part by part."""
    values = np.random.default_rng(0).integers(0, 9, (ranks, ranks * 3))
    parts = np.stack(np.split(values.copy(), ranks, axis=1), axis=1)
    sent = np.zeros(ranks, int)
    for adds in (True, False):
        for turn in range(ranks - 1):
            moved = [((rank - turn + (not adds)) % ranks, rank) for rank in range(ranks)]
            copies = [parts[rank, part].copy() for part, rank in moved]
            for (part, rank), copy in zip(moved, copies, strict=True):
                there = (rank + 1) % ranks
                parts[there, part] = parts[there, part] + copy if adds else copy
                sent[rank] += len(copy)
    assert (parts.reshape(ranks, -1) == values.sum(axis=0)).all()
    size = ranks * 3
    assert [*sent] == [Traffic(size, 0, 1, False, 1).sent_bytes(ranks)] * ranks
    network = Network(gpus_per_node=4, link=100.0, between_nodes=10.0)
    hops = 2 * (ranks - 1) * HOP_S
    assert network.ring_s(size, ranks, 2) == pytest.approx(sent[0] / (100.0 if ranks <= 4 else 10.0) + hops)


def test_what_overlaps_is_hidden_but_for_the_last_bucket() -> None:
    network = Network(8, link=1e9, between_nodes=1e9)
    weights = 10**9
    apart = Traffic(weights, 2, 10, False, 3).exposed_s(4, network, micro_batch_s=100.0)
    reduce, gather = 2 * 0.75, 0.75
    assert apart == pytest.approx(3 * reduce + gather, rel=0.01)
    assert Traffic(weights, 1, 10, False, 3).exposed_s(4, network, 100.0) == pytest.approx(reduce + gather, rel=0.01)
    hidden = Traffic(weights, 2, 10, True, 3).exposed_s(4, network, micro_batch_s=100.0)
    assert hidden == pytest.approx(3 * reduce / 10 + gather, rel=0.01)
    assert Traffic(weights, 2, 10, True, 3).exposed_s(1, network, micro_batch_s=100.0) == 0


def test_weak_scaling_falls_with_the_number_of_gpus(papers_run: Plan) -> None:
    rows = papers_run.weak_scaling
    assert [row.gpus for row in rows] == [2**power for power in range(11)]
    assert rows[0].efficiency == 1
    assert all(a.efficiency >= b.efficiency for a, b in pairwise(rows))
    slow = plan_of("--network_gb_per_s", 1).weak_scaling
    assert slow[3].efficiency == rows[3].efficiency  # in one node
    assert slow[4].efficiency < rows[4].efficiency


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--gpu", "V200"], "--gpu V200: not in the table"),
        (["--nodes", "7"], "train_batch_size 7680"),
        (["--gpu_memory_gb", "2"], "does not fit"),
        (["--attention", "flex"], "--attention flex cannot drop"),
        (["--attention", "cpu"], "cannot run on a GPU"),
        (["--efficiency", "1.5"], "expected at most 1"),
        (["--max_length_tokens", "1024"], "--max_positions 1024"),
        (["--data", "nowhere"], "no data set there"),
        (["--data", "nowhere", "--vocab_size", "9"], "leave the flag out"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--deepspeed_config", str(PAPERS), *flags])
    assert main() == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_json_has_the_same_numbers(
    papers_run: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--deepspeed_config", str(PAPERS), "--price_per_gpu_hour", "2", "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["days"] == papers_run.days
    assert found["memory"]["2"]["activations"] == papers_run.memory[2].activations
    assert found["price"] == pytest.approx(papers_run.days * 24 * 64 * 2)
