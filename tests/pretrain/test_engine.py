"""Training under DeepSpeed on several real ranks: gradients, the optimizer, and the defect that the engine cures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import Ranks
from support import MASK, RECIPES, VOCAB_SIZE, deepspeed_json, random_batch

from data_prep.shards import DataSet
from pretrain.batches import Share, TrainingBatches
from pretrain.ds_config import DeepSpeedConfig
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

pytestmark = [pytest.mark.slow, pytest.mark.old_processor]

FP32 = {"fp16": None, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}


def small_model(vocab_size: int = VOCAB_SIZE, dropout: float = 0.0) -> PMLM:
    torch.manual_seed(3)
    return PMLM(
        PMLMConfig.of_size("tiny", vocab_size=vocab_size, hidden_size=32, intermediate_size=64, dropout=dropout)
    )


def _zero2_gradients(rank: int, config: Path, data: Path, out: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    from pretrain.distributed import sum_over_ranks
    from pretrain.engine import Engine

    model = small_model(DataSet(data).tokenizer.vocab_size)
    engine = Engine(model, DeepSpeedConfig(config))
    batches = TrainingBatches(DataSet(data), Objective.AE_PAR, Share(rank, 2, 4, 2), seed=0).step(0)
    num_targets = sum_over_ranks(torch.tensor([sum(b.num_targets for b in batches)]))
    for layout in batches:
        losses = engine(layout)
        engine.backward((losses.ae_sum + losses.par_sum) / num_targets[0])
        if layout is batches[-1]:
            gradients = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
        engine.step()
    if rank == 0:
        torch.save(gradients, out)


def test_gradients_of_two_ranks_and_two_accumulation_steps_equal_one_big_batch(
    data_folder: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Samples differ in length, so a mean of per-rank means would not."""
    config = deepspeed_json(tmp_path / "ds.json", **FP32)
    two_ranks(_zero2_gradients, config, data_folder, tmp_path / "gradients.pt")
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)

    data = DataSet(data_folder)
    model = small_model(data.tokenizer.vocab_size)
    layout = TrainingBatches(data, Objective.AE_PAR, Share(0, 1, 16, 1), seed=0).step(0)[0]
    losses = model(layout)
    ((losses.ae_sum + losses.par_sum) / layout.num_targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=float(2e-5 * scale), msg=name)
    assert float(max(g.abs().max() for g in found.values())) > 1e-3


def _gradient_norms(rank: int, config: Path, out: Path) -> None:
    """The norms of the gradients that Adam is given, with a learning rate of 0: the same batch, the same gradient."""
    from pretrain import engine

    found = {"cured": _norms_and_scales(engine.Engine(small_model(), DeepSpeedConfig(config)), rank)}
    with mock.patch.object(engine, "_defer_loss_scale_update", return_value=lambda: None):
        found["not cured"] = _norms_and_scales(engine.Engine(small_model(), DeepSpeedConfig(config)), rank)
    if rank == 0:
        out.write_text(json.dumps(found))


def _norms_and_scales(engine: Any, rank: int) -> tuple[list[float], list[float]]:
    layout = pseudo_masked_layout(random_batch(8, seed=rank), Objective.AE_PAR, mask_id=MASK)
    adam, given = engine._optimizer.optimizer, []
    adam_step = adam.step

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.norm().item() for group in adam.param_groups for p in group["params"] if p.grad is not None]
        given.append(sum(g**2 for g in gradients) ** 0.5)
        return adam_step(*args, **kwargs)

    adam.step = recording_step
    norms, scales = [], []
    for _ in range(8):
        given.clear()
        losses = engine(layout)
        engine.backward((losses.ae_sum + losses.par_sum) / 400)
        engine.step()
        norms.append(sum(g**2 for g in given) ** 0.5)
        scales.append(engine.loss_scale)
    return norms, scales


def test_the_gradient_is_not_halved_when_the_loss_scale_grows(two_ranks: Ranks, tmp_path: Path) -> None:
    """Without the cure it is: if that part fails, DeepSpeed has been mended and the cure can go."""
    config = deepspeed_json(
        tmp_path / "ds.json", train_batch_size=16, train_micro_batch_size_per_gpu=8,
        fp16={"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3},
        optimizer={"type": "Adam", "params": {"lr": 0.0}},
        scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.0, "warmup_num_steps": 2}},
    )  # fmt: skip
    two_ranks(_gradient_norms, config, tmp_path / "norms.json")
    for name, (norms, scales) in json.loads((tmp_path / "norms.json").read_text()).items():
        assert scales[-1] > scales[0]
        ratios = [norm / norms[0] for norm in norms]
        if name == "cured":
            assert ratios == pytest.approx([1.0] * 8, rel=2e-2)
        else:
            assert min(ratios) == pytest.approx(0.5, rel=2e-2)


def _train_and_resume(rank: int, config: Path, folder: Path) -> None:
    from pretrain.engine import Engine

    for is_resumed in (False, True):
        running = Engine(small_model(), DeepSpeedConfig(config))
        if is_resumed:
            running.load_shards(folder, "half")
        while running.steps < 24:
            batch = random_batch(8, seed=10 * running.steps + rank)
            losses = running(pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK))
            running.backward((losses.ae_sum + losses.par_sum) / 400)
            running.step()
            if running.steps == 8 and not is_resumed:
                assert running.save_shards(folder, "half") is None
        if rank == 0:
            torch.save(running.module.state_dict(), folder / f"weights-{is_resumed}.pt")


def test_adam_goes_on_to_the_bit_after_a_resume(two_ranks: Ranks, tmp_path: Path) -> None:
    config = deepspeed_json(
        tmp_path / "ds.json", train_batch_size=16, train_micro_batch_size_per_gpu=8, fp16=None,
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}},
    )  # fmt: skip
    two_ranks(_train_and_resume, config, tmp_path)
    whole, resumed = (torch.load(tmp_path / f"weights-{r}.pt", weights_only=True) for r in (False, True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _step_reset_and_step(rank: int, config: Path) -> None:
    """The same steps before and after a reset, whose loss scale has fallen and whose learning rate is another by then."""
    from pretrain.engine import Engine

    running = Engine(small_model(), DeepSpeedConfig(config))
    layouts = [
        pseudo_masked_layout(random_batch(8, seed=10 * n + rank), Objective.AE_PAR, mask_id=MASK) for n in range(5)
    ]
    found: list[list[Any]] = []
    for is_again in (False, True):
        if is_again:
            running.reset(small_model())
        values: list[Any] = []
        for layout in layouts:
            rate = running.learning_rate
            losses = running(layout)
            running.backward((losses.ae_sum + losses.par_sum) / 400)
            running.step()
            values += [running.steps, rate, running.loss_scale, running.skipped_steps, float(losses.ae_sum)]
        found.append(values)
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_reset_engine_does_the_same_steps_to_the_bit(
    two_ranks: Ranks, tmp_path: Path, precision: str, stage: int
) -> None:
    sections: dict[str, Any] = {
        "fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2, "hysteresis": 1},
        "bf16": {"enabled": True},
    }
    config = deepspeed_json(
        tmp_path / "ds.json", train_batch_size=16, train_micro_batch_size_per_gpu=8, zero_optimization={"stage": stage},
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 3}},
        **{precision: sections[precision]},
    )  # fmt: skip
    two_ranks(_step_reset_and_step, config)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_the_optimizer_is_adam_as_the_json_describes_it(name: str) -> None:
    """20 steps in float64 by the formulas of Loshchilov and Hutter, and with adam_w_mode false by those of Kingma and Ba."""
    from pretrain.engine import make_optimizer

    torch.manual_seed(0)
    weights = [torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    params = {"lr": 1e-2, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1, "adam_w_mode": name == "AdamW"}
    groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, {"type": "Adam", "params": params})
    expected, moments = [w.detach().double() for w in weights], [[0.0, 0.0], [0.0, 0.0]]
    for step in range(1, 21):
        for index, decay in enumerate((0.1, 0.0)):
            gradient = torch.randn_like(weights[index])
            weights[index].grad = gradient
            w, g = expected[index], gradient.double()
            if name == "AdamW":
                w -= 1e-2 * decay * w
            else:
                g = g + decay * w
            m, v = moments[index]
            moments[index] = m, v = [0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g]
            w -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.98**step)) ** 0.5 + 1e-6)
        optimizer.step()
    for found, exact in zip(weights, expected, strict=True):
        torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=1e-6)


def _twenty_steps_of_each(rank: int, config: Path, folder: Path) -> None:
    """With the engine's optimizer, and with the one that DeepSpeed makes of the same JSON; its checkpoint is resumed."""
    from pretrain.engine import Engine

    found = []
    for is_deepspeeds in (False, True):
        with mock.patch.object(DeepSpeedConfig, "offloads_optimizer", is_deepspeeds):
            running = Engine(small_model(), DeepSpeedConfig(config))
        for step in range(20):
            _train(running, 10 * step + rank)
        optimizer = type(running._optimizer.optimizer).__name__
        found.append((optimizer, {name: running.whole(p) for name, p in running.module.named_parameters()}))
    assert running.save_shards(folder, "deepspeeds") is None
    resumed = Engine(small_model(), DeepSpeedConfig(config))
    resumed.load_shards(folder, "deepspeeds")
    assert resumed.num_updates == running.num_updates == 20
    for engine in (running, resumed):
        _train(engine, 200 + rank)
        found.append(("", {name: engine.whole(p) for name, p in engine.module.named_parameters()}))
    if rank == 0:
        torch.save(found, folder / "found.pt")


def _train(engine: Any, seed: int) -> None:
    losses = engine(pseudo_masked_layout(random_batch(8, seed=seed), Objective.AE_PAR, mask_id=MASK))
    engine.backward((losses.ae_sum + losses.par_sum) / 400)
    engine.step()


@pytest.mark.heavy
def test_twenty_steps_are_those_of_deepspeeds_fused_adam_and_its_checkpoint_is_resumed(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """DeepSpeed compiles its own at first use, for which this test needs a C++ compiler."""
    config = deepspeed_json(tmp_path / "ds.json", train_batch_size=16, train_micro_batch_size_per_gpu=8, fp16=None)
    two_ranks(_twenty_steps_of_each, config, tmp_path)
    of_each = torch.load(tmp_path / "found.pt", weights_only=True)
    (ours, found), (deepspeeds, expected), (_, continued), (_, resumed) = of_each
    assert (ours, deepspeeds) == ("AdamW", "FusedAdam")
    start = small_model().state_dict()
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert moved > 1e-3
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-3 * moved)
        torch.testing.assert_close(resumed[name], continued[name], rtol=0, atol=1e-3 * moved)


def _two_steps_offloaded(rank: int, config: Path, out: Path) -> None:
    from pretrain.engine import Engine

    engine = Engine(small_model(), DeepSpeedConfig(config))
    for step in range(2):
        _train(engine, 10 * step + rank)
    if rank == 0:
        out.write_text(type(engine._optimizer.optimizer).__name__)
    assert engine.num_updates == 2


@pytest.mark.heavy
def test_an_offloaded_optimizer_is_deepspeeds(two_ranks: Ranks, tmp_path: Path) -> None:
    """It is compiled at its first use, for which this test needs a C++ compiler."""
    config = deepspeed_json(
        tmp_path / "ds.json", train_batch_size=16, train_micro_batch_size_per_gpu=8, fp16=None,
        zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}},
    )  # fmt: skip
    two_ranks(_two_steps_offloaded, config, tmp_path / "optimizer")
    assert (tmp_path / "optimizer").read_text() == "DeepSpeedCPUAdam"


def _two_steps_of_each(rank: int, data: Path, out: Path) -> None:
    configs = [DeepSpeedConfig(path) for path in RECIPES]
    runs = [config.with_precision(precision) for config in configs for precision in config.allowed_precisions]
    found = [_two_steps(rank, config, DataSet(data)) for config in runs]
    if rank == 0:
        out.write_text(json.dumps(found))


def _two_steps(rank: int, config: DeepSpeedConfig, data: DataSet) -> dict[str, Any]:
    from pretrain.engine import Engine

    config.values.update(train_batch_size=64, train_micro_batch_size_per_gpu=16)
    engine = Engine(small_model(data.tokenizer.vocab_size, dropout=0.1), config)
    sizes = engine.batch_sizes
    batches = TrainingBatches(data, Objective.AE_PAR, Share(rank, 2, sizes.micro_batch, sizes.accumulation_steps), 0)
    is_finite = True
    for step in range(2):
        for layout in batches.step(step * sizes.train_batch):
            losses = engine(layout)
            is_finite &= bool(torch.isfinite(losses.ae_sum + losses.par_sum))
            engine.backward((losses.ae_sum + losses.par_sum) / layout.num_targets / sizes.accumulation_steps / 2)
            engine.step()
    moments = [state["exp_avg"] for state in engine._optimizer.optimizer.state.values()]
    return {
        "name": config.path.name, "is_finite": is_finite, "steps": engine.steps, "skipped_steps": engine.skipped_steps,
        "dtypes": sorted({str(parameter.dtype) for parameter in engine.module.parameters()}),
        "has_moments": bool(moments) and all(bool(moment.abs().max() > 0) for moment in moments),
    }  # fmt: skip


def test_every_shipped_configuration_trains_in_every_precision_that_it_allows(
    data_folder: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    """All that a JSON says is tried but the size of its batch, which is 7680 in the paper's."""
    two_ranks(_two_steps_of_each, data_folder, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    fp16, bf16, fp32 = "torch.float16", "torch.bfloat16", "torch.float32"
    dtypes = [("zero2.json", fp16)] + [
        (f"zero2_{name}.json", dtype) for name in ("local", "tiny") for dtype in (fp16, bf16, fp32)
    ]
    assert found == [
        {"name": name, "is_finite": True, "steps": 2, "skipped_steps": 0, "dtypes": [dtype], "has_moments": True}
        for name, dtype in dtypes
    ]


def _product_of_a_denormal(rank: int) -> None:
    assert float(torch.full((64,), 1e-39).mul(0.5).sum()) == 0


def test_ranks_on_a_cpu_flush_denormals(two_ranks: Ranks) -> None:
    """Products of them take many times longer."""
    assert float(torch.full((64,), 1e-39).mul(0.5).sum()) > 0
    two_ranks(_product_of_a_denormal)
