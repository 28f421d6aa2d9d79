"""Ways of computing the same step: compiled, and with activations computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import MASK, VOCAB_SIZE, deepspeed_json, random_batch
from torch._dynamo.utils import counters

from data_prep.shards import DataSet
from pretrain.batches import Share, TrainingBatches, validation_batches
from pretrain.config import check_inputs, make_parser
from pretrain.layout import Layout, Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

CONFIG = PMLMConfig.of_size(
    "tiny", vocab_size=VOCAB_SIZE, num_layers=3, hidden_size=32, num_heads=4, intermediate_size=64, max_positions=64,
    dropout=0.1,
)  # fmt: skip


def make_model(activation_checkpointing: bool = False) -> PMLM:
    torch.manual_seed(0)
    return PMLM(CONFIG, "cpu", activation_checkpointing).train()


def losses_and_gradients(model: PMLM, layout: Layout, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(layout)
    (losses.ae_sum + losses.par_sum).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "ae": losses.ae_sum.detach(), "par": losses.par_sum.detach()}


@pytest.mark.heavy
def test_compiled_once_for_all_steps_with_the_same_losses() -> None:
    plain, compiled = make_model(), make_model()
    compiled.compile_layers()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()
    counters.clear()
    num_graphs = []
    for step in range(3):
        batch = random_batch(3, seed=step, min_length=11 + 5 * step)
        layout = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK, one_shape=True)
        expected, found = (losses_and_gradients(m, layout, seed=step) for m in (plain, compiled))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < num_graphs[0] <= 10  # a break at attention; the last layer is another code
    assert num_graphs == num_graphs[:1] * 3


def test_computing_activations_again_changes_nothing_but_memory() -> None:
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    results, saved_bytes = [], []
    for activation_checkpointing in (False, True):
        model, total = make_model(activation_checkpointing), 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            torch.manual_seed(0)
            model(layout)
        saved_bytes.append(total)
        results.append(losses_and_gradients(model, layout))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert saved_bytes[1] < 0.5 * saved_bytes[0]


@pytest.mark.parametrize("objective", [Objective.AE, Objective.AE_PAR])
def test_batches_of_one_shape_have_the_same_losses(data_set: DataSet, objective: Objective) -> None:
    share = Share(0, 1, 1, 40)
    model = PMLM(
        PMLMConfig.of_size("tiny", dropout=0.1, vocab_size=data_set.tokenizer.vocab_size, max_positions=64)
    ).eval()
    short, long = (TrainingBatches(data_set, objective, share, 0, one_shape=o).step(0) for o in (False, True))
    long += [batch.layout for batch in validation_batches(data_set, objective, share, 8, one_shape=True)]
    num_shapes = [
        len({(len(layout.ids_N), len(layout.predicted_R)) for layout in layouts}) for layouts in (long, short)
    ]
    assert num_shapes[0] == 1 < num_shapes[1]
    for a, b in zip(short[:2], long[:2], strict=True):
        for x, y in zip(model(a), model(b), strict=True):
            torch.testing.assert_close(x, y)


def test_flags(data_folder: Path, tmp_path: Path) -> None:
    parser = make_parser("run_pretrain.py", "")
    config = str(deepspeed_json(tmp_path / "ds.json"))
    always = ["--deepspeed_config", config, "--data", str(data_folder)]
    found = check_inputs(parser.parse_args(always), 1, None).config
    assert (found.attention, found.compile, found.activation_checkpointing) == ("auto", False, False)
    chosen = [*always, "--attention", "flex", "--dropout", "0", "--compile", "--activation-checkpointing"]
    found = check_inputs(parser.parse_args(chosen), 1, None).config
    assert (found.attention, found.compile, found.activation_checkpointing) == ("flex", True, True)
    with pytest.raises(ValueError, match=r"--attention flex cannot drop .* dropout is 0.1; pass --dropout 0"):
        check_inputs(parser.parse_args([*always, "--attention", "flex"]), 1, None)
