"""Attention backends against the reference, and the reference against a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from memory import LargestTensor
from support import MASK, VOCAB_SIZE, random_batch

from pretrain.attention import AttentionBackend, RelativePositionBias, choose_backend, make_attention
from pretrain.attention_flex import mask_mod, score_mod
from pretrain.layout import CONTEXT, GIVEN, PADDING_TURN, PSEUDO, Layout, Objective, pseudo_masked_layout, visible
from pretrain.model import PMLM, PMLMConfig

HEADS, HEAD_SIZE = 4, 8


def seq2seq_like_layout() -> Layout:
    """Two sources as context, and their targets, longer than the sources, as originals and pseudo masks one by one."""
    num_source, num_target = 16, 20
    lengths = [(16, 20), (9, 13)]
    turns = [
        [0] * source + [PADDING_TURN] * (num_source - source)
        + ([*range(1, target + 1)] + [PADDING_TURN] * (num_target - target)) * 2
        for source, target in lengths
    ]  # fmt: skip
    positions = [[*range(num_source), *([*range(source, source + num_target)] * 2)] for source, _ in lengths]
    ids = torch.randint(5, VOCAB_SIZE, (2, num_source + 2 * num_target), generator=torch.Generator().manual_seed(0))
    slots = torch.tensor(turns).flatten().nonzero()[:0, 0]
    return Layout(
        ids_BS=ids, positions_BS=torch.tensor(positions), segments_BS=torch.zeros_like(ids), turns_BS=torch.tensor(turns),
        roles_S=torch.tensor([CONTEXT] * num_source + [GIVEN] * num_target + [PSEUDO] * num_target),
        num_context=num_source, num_tokens=58, targets_T=slots, ae_slots_T=None, par_slots_T=slots,
    )  # fmt: skip


LAYOUTS = {
    **{o.value: pseudo_masked_layout(random_batch(3), o, mask_id=MASK) for o in Objective},
    "full length": pseudo_masked_layout(random_batch(3, min_length=40), Objective.AE_PAR, mask_id=MASK),
    "seq2seq": seq2seq_like_layout(),
}


def make_bias() -> RelativePositionBias:
    torch.manual_seed(2)
    bias = RelativePositionBias(HEADS, 32, 20)
    torch.nn.init.normal_(bias.weight)
    return bias


def run(
    backend: AttentionBackend, layout: Layout, dtype: torch.dtype, rate: float = 0.0, has_bias: bool = True
) -> dict[str, torch.Tensor]:
    """Context vectors of slots that are no padding, and gradients of a random function of them."""
    bias = make_bias().to(dtype) if has_bias else None
    torch.manual_seed(3)
    num_samples, num_slots = layout.ids_BS.shape
    qkv = torch.randn(num_samples, num_slots, 3, HEADS, HEAD_SIZE).to(dtype).requires_grad_()
    weights = torch.randn(num_samples, num_slots, HEADS, HEAD_SIZE).to(dtype)
    is_text = (layout.turns_BS >= 0)[:, :, None, None]
    attended = make_attention(backend, layout, bias, rate)(qkv)
    assert attended.dtype == dtype
    (attended * weights * is_text).sum().backward()
    assert qkv.grad is not None
    found = {"attended": (attended * is_text).detach(), "qkv": qkv.grad}
    if bias is not None:
        assert bias.weight.grad is not None
        found["bias"] = bias.weight.grad
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cpu_equals_the_reference_in_value_and_gradient(layout: Layout, dtype: torch.dtype) -> None:
    """In low precision it may be as far from the truth as the reference is."""
    truth = run("reference", layout, torch.float64)
    reference, found = run("reference", layout, dtype), run("cpu", layout, dtype)
    for name in truth:
        error = (found[name] - truth[name]).norm() / truth[name].norm()
        allowed = (reference[name] - truth[name]).norm() / truth[name].norm()
        assert error <= 1.5 * allowed + {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, 1e-3), name


def test_cpu_equals_the_reference_without_relative_bias() -> None:
    for layout in LAYOUTS.values():
        reference, found = (run(b, layout, torch.float64, has_bias=False) for b in ("reference", "cpu"))
        for name in reference:
            torch.testing.assert_close(found[name], reference[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["full length", "ae"])
def test_cpu_drops_the_probabilities_that_the_reference_drops(name: str) -> None:
    layout = replace(LAYOUTS["full length"]) if name == "full length" else pseudo_masked_layout(
        random_batch(3, min_length=40), Objective.AE, mask_id=MASK
    )  # fmt: skip
    reference, found = (run(b, layout, torch.float64, rate=0.3) for b in ("reference", "cpu"))
    plain = run("reference", layout, torch.float64)
    for name in reference:
        torch.testing.assert_close(found[name], reference[name], rtol=0, atol=1e-13)
        assert not torch.allclose(plain[name], reference[name], atol=1e-2)


def test_gradients_of_cpu_against_finite_differences() -> None:
    layout, bias = LAYOUTS["full length"], make_bias().double()
    qkv = torch.randn(3, layout.ids_BS.shape[1], 3, HEADS, 2, dtype=torch.float64, requires_grad=True)

    def attend(qkv: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # the same dropout each time
        return torch.func.functional_call(_Whole(layout, bias), {"bias.weight": weight}, (qkv,))

    torch.autograd.gradcheck(attend, (qkv, bias.weight), fast_mode=True)


class _Whole(torch.nn.Module):
    def __init__(self, layout: Layout, bias: RelativePositionBias) -> None:
        super().__init__()
        self.layout, self.bias = layout, bias

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        return make_attention("cpu", self.layout, self.bias, 0.2)(qkv)


def test_cpu_never_holds_the_scores_of_more_than_a_sample_nor_booleans_for_each_head() -> None:
    layout = pseudo_masked_layout(random_batch(8, min_length=40), Objective.AE_PAR, mask_id=MASK)
    num_slots = layout.ids_BS.shape[1]
    num_appended = num_slots - layout.num_context
    bias = RelativePositionBias(16, 32, 20)
    torch.nn.init.normal_(bias.weight)
    attend = make_attention("cpu", layout, bias, 0.1)
    qkv = torch.randn(8, num_slots, 3, 16, 1, requires_grad=True)
    with LargestTensor() as largest:
        attend(qkv).sum().backward()
    of_a_batch = 8 * 16 * num_appended * num_slots  # the appended rows' bias and its gradient
    assert largest.num_elements <= of_a_batch < 8 * 16 * layout.num_context**2
    with LargestTensor() as largest:
        make_attention("cpu", layout, bias, 0.1)
    assert largest.num_bools <= 8 * num_appended * num_slots


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # on CPU FlexAttention has no backward pass
def test_flex_equals_the_reference_in_value(layout: Layout) -> None:
    bias, qkv = make_bias(), torch.randn(*layout.ids_BS.shape, 3, HEADS, HEAD_SIZE)
    bias.requires_grad_(False)
    found, expected = (make_attention(b, layout, bias, 0.0)(qkv) for b in ("flex", "reference"))
    is_text = layout.turns_BS >= 0
    torch.testing.assert_close(found[is_text], expected[is_text], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_flex_does_to_scores_equals_the_reference_in_gradient(layout: Layout) -> None:
    """Its mask and its change of scores, in plain operations on dense scores."""
    expected, bias = run("reference", layout, torch.float64), make_bias().double()
    torch.manual_seed(3)
    num_samples, num_slots = layout.ids_BS.shape
    qkv = torch.randn(num_samples, num_slots, 3, HEADS, HEAD_SIZE).double().requires_grad_()
    weights = torch.randn(num_samples, num_slots, HEADS, HEAD_SIZE).double()
    q, k, v = qkv.transpose(1, 3).unbind(2)
    index = [torch.arange(size).view([-1 if d == i else 1 for d in range(4)]) for i, size in enumerate(
        (num_samples, HEADS, num_slots, num_slots))]  # fmt: skip
    scores = score_mod(layout, bias)(q @ k.mT / HEAD_SIZE**0.5, *index)
    attended = (scores.masked_fill(~mask_mod(layout)(*index), -torch.inf).softmax(-1) @ v).transpose(1, 2)
    (attended * weights * (layout.turns_BS >= 0)[:, :, None, None]).sum().backward()
    assert qkv.grad is not None
    assert bias.weight.grad is not None
    torch.testing.assert_close(qkv.grad, expected["qkv"], rtol=0, atol=1e-12)
    torch.testing.assert_close(bias.weight.grad, expected["bias"], rtol=0, atol=1e-12)


def test_flex_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="flex attention has no gradient on a CPU; pass --attention cpu"):
        make_attention("flex", LAYOUTS["ae"], make_bias(), 0.0)
    with pytest.raises(ValueError, match=r"flex attention cannot drop probabilities, and dropout is 0\.1"):
        make_attention("flex", LAYOUTS["ae"], make_bias(), 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["flex", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cuda_equals_the_reference_on_cpu(backend: AttentionBackend, dtype: torch.dtype) -> None:
    config = PMLMConfig.of_size(
        "tiny", vocab_size=VOCAB_SIZE, hidden_size=64, num_heads=4, max_positions=64, dropout=0.0
    )
    layout = LAYOUTS["ae+par"]
    results = []
    for device, precision, name in (("cpu", torch.float64, "reference"), ("cuda", dtype, backend)):
        torch.manual_seed(0)
        model = PMLM(config, attention=name).to(device, precision)  # type: ignore[arg-type]
        losses = model(layout.to(torch.device(device)))
        (losses.ae_sum + losses.par_sum).backward()
        results.append({n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype], name


def test_the_reference_against_a_loop_over_queries_and_visible_keys() -> None:
    layout, bias = LAYOUTS["ae+par"], make_bias().double()
    torch.manual_seed(0)
    qkv = torch.randn(*layout.ids_BS.shape, 3, HEADS, HEAD_SIZE, dtype=torch.float64)
    found = make_attention("reference", layout, bias, 0.0)(qkv)
    for b in range(len(qkv)):
        bias_HSS = bias(layout.positions_BS[b], layout.positions_BS[b])
        for s in range(qkv.shape[1]):
            keys = visible(layout.roles_S[s], layout.turns_BS[b, s], layout.roles_S, layout.turns_BS[b]).nonzero()[:, 0]
            for h in range(HEADS):
                scores = qkv[b, keys, 1, h] @ qkv[b, s, 0, h] / HEAD_SIZE**0.5 + bias_HSS[h, s, keys]
                expected = scores.softmax(0) @ qkv[b, keys, 2, h]
                torch.testing.assert_close(found[b, s, h], expected, rtol=0, atol=1e-12)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention 'flash'; expected one of auto, reference, cpu, flex"):
        make_attention("flash", LAYOUTS["ae"], None, 0.0)  # type: ignore[arg-type]


def test_auto_is_the_loop_over_samples_where_it_pays() -> None:
    layout = LAYOUTS["ae"]
    num_slots = layout.ids_BS.shape[1]
    enough = -(-(2**17) // num_slots**2)
    assert [choose_backend(layout, heads, 0.1) for heads in (enough - 1, enough)] == ["reference", "cpu"]
