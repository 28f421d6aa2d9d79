"""The output layer in chunks against the plain one."""

from __future__ import annotations

import pytest
import torch
from memory import LargestTensor
from support import MASK, VOCAB_SIZE, random_batch
from torch.nn import functional as F

from pretrain.cross_entropy import cross_entropy_in_chunks
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

pytestmark = pytest.mark.old_processor


def made_up(num_predictions: int, dtype: torch.dtype, vocab_size: int = 50) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_predictions, 16), torch.randn(vocab_size, 16) * 0.5
    bias, targets = torch.randn(vocab_size), torch.randint(vocab_size, (num_predictions,))
    targets[::3] = (hidden[::3] @ weight.T + bias).argmax(dim=1)  # some are right
    return *(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_chunks_equal_the_plain_way(dtype: torch.dtype, chunk: int, label_smoothing: float) -> None:
    hidden, weight, bias, targets = made_up(40, dtype)
    upstream = torch.linspace(-1, 2, 40)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(
        logits if dtype == torch.float64 else logits.float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    gradients = torch.autograd.grad(expected, (hidden, weight, bias), upstream.to(expected.dtype))
    losses, is_correct = cross_entropy_in_chunks(
        hidden, weight, bias, targets, label_smoothing, chunk_logits=50 * chunk
    )
    assert losses.dtype == expected.dtype
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(is_correct, logits.argmax(dim=1) == targets)
    assert 10 < is_correct.sum() < 40
    found = torch.autograd.grad(losses, (hidden, weight, bias), upstream.to(losses.dtype))
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for f, g in zip(found, gradients, strict=True):
        torch.testing.assert_close(f, g, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)  # LayerNorm's on a CPU and on CUDA
def test_under_autocast_the_gradient_is_that_of_the_same_logits(hidden_dtype: torch.dtype) -> None:
    """Weights in fp32, products in bf16, as in fine-tuning with --precision bf16."""
    *given, targets = made_up(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = cross_entropy_in_chunks(given[0].to(hidden_dtype), *given[1:], targets, chunk_logits=350)
    found = torch.autograd.grad(losses.sum(), given)
    in_bf16 = [x.detach().bfloat16().requires_grad_() for x in given]
    expected = torch.autograd.grad(cross_entropy_in_chunks(*in_bf16, targets, chunk_logits=350)[0].sum(), in_bf16)
    for f, e, x in zip(found, expected, given, strict=True):
        assert f.dtype == x.dtype == torch.float32
        torch.testing.assert_close(f, e.float(), rtol=2**-7, atol=1e-4)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, bias, targets = made_up(9, torch.float32)
    losses, _ = cross_entropy_in_chunks(hidden * 1e4, weight, bias, targets)
    torch.testing.assert_close(losses, F.cross_entropy(hidden * 1e4 @ weight.T + bias, targets, reduction="none"))


def test_nothing_to_predict_has_no_gradient() -> None:
    hidden, weight, bias, targets = made_up(0, torch.float32)
    losses, is_correct = cross_entropy_in_chunks(hidden, weight, bias, targets)
    assert len(losses) == len(is_correct) == 0
    assert all(not g.any() for g in torch.autograd.grad(losses.sum(), (hidden, weight, bias)))


def test_the_tied_embedding_gets_both_gradients() -> None:
    """Through the whole model, against the same model with the plain output layer."""
    torch.manual_seed(0)
    model = (
        PMLM(PMLMConfig.of_size("tiny", dropout=0.1, vocab_size=VOCAB_SIZE, hidden_size=32, max_positions=64))
        .double()
        .eval()
    )
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    losses = model(layout)
    assert layout.ae_places_T is not None
    assert layout.par_places_T is not None
    logits = model.predict(model.encode(layout)[layout.predicted_R])
    expected = [logits[places] for places in (layout.ae_places_T, layout.par_places_T)]
    sums = [F.cross_entropy(e, layout.targets_T, reduction="sum") for e in expected]
    torch.testing.assert_close(torch.stack([losses.ae_sum, losses.par_sum]), torch.stack(sums))
    for found, logits in zip((losses.ae_correct, losses.par_correct), expected, strict=True):
        assert found == (logits.argmax(dim=1) == layout.targets_T).sum()
    parameters = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
        for total in (losses.ae_sum + 3 * losses.par_sum, sums[0] + 3 * sums[1])
    ]
    for name, found, right in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, msg=name)


def test_memory_grows_with_neither_predictions_nor_vocabulary() -> None:
    largest = []
    for num_predictions, vocab_size in [(500, 1000), (4000, 1000), (500, 8000)]:
        hidden, weight, bias, targets = made_up(num_predictions, torch.float32, vocab_size)
        with LargestTensor() as seen:
            losses, _ = cross_entropy_in_chunks(hidden, weight, bias, targets, chunk_logits=200_000)
            losses.sum().backward()
        largest.append(seen.num_elements)
    assert max(largest) <= 200_000
