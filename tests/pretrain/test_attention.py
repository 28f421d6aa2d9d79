"""Attention backends against the reference, and the reference against a loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from memory import LargestTensor, Products
from support import MASK, VOCAB_SIZE, random_batch

from pretrain.attention import AttentionBackend, RelativePositionBias, make_attention
from pretrain.attention_cpu import cheapest_groups, cost_of_group
from pretrain.attention_flex import mask_mod, score_mod
from pretrain.layout import CONTEXT, GIVEN, PSEUDO, Layout, Objective, pseudo_masked_layout, visible
from pretrain.model import PMLM, PMLMConfig

pytestmark = pytest.mark.old_processor

HEADS, HEAD_SIZE = 4, 8


def seq2seq_like_layout() -> Layout:
    """Two sources as context, and their targets, longer than the sources, as originals and pseudo masks one by one."""
    roles, turns, positions, samples = [], [], [], []
    for sample, (source, target) in enumerate([(16, 20), (9, 13)]):
        roles += [CONTEXT] * source + [GIVEN] * target + [PSEUDO] * target
        turns += [0] * source + [*range(1, target + 1)] * 2
        positions += [*range(source), *([*range(source, source + target)] * 2)]
        samples += [sample] * (source + 2 * target)
    ids = torch.randint(5, VOCAB_SIZE, (len(roles),), generator=torch.Generator().manual_seed(0))
    predicted = (torch.tensor(roles) == PSEUDO).nonzero()[:, 0]
    return Layout(
        ids_N=ids, positions_N=torch.tensor(positions), segments_N=torch.zeros_like(ids), roles_N=torch.tensor(roles),
        turns_N=torch.tensor(turns), samples_N=torch.tensor(samples), edges=(0, 56, 91), context_lengths=(16, 9),
        num_tokens=58, predicted_R=predicted, predicted_edges=(0, 20, 33), targets_T=ids[predicted], ae_places_T=None,
        par_places_T=torch.arange(33),
    )  # fmt: skip


LAYOUTS = {
    **{o.value: pseudo_masked_layout(random_batch(3), o, mask_id=MASK) for o in Objective},
    "full length": pseudo_masked_layout(random_batch(3, min_length=40), Objective.AE_PAR, mask_id=MASK),
    "one shape": pseudo_masked_layout(random_batch(3), Objective.AE_PAR, mask_id=MASK, one_shape=True),
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
    """Context vectors of slots that are no filler, of all and of the predicted, and gradients of a random function of them."""
    bias = make_bias().to(dtype) if has_bias else None
    torch.manual_seed(3)
    num_slots, num_real, num_predicted = len(layout.ids_N), layout.edges[-1], layout.predicted_edges[-1]
    qkv = torch.randn(num_slots, 3, HEADS, HEAD_SIZE).to(dtype).requires_grad_()
    queries = torch.randn(len(layout.predicted_R), HEADS, HEAD_SIZE).to(dtype).requires_grad_()
    weights = torch.randn(num_real + num_predicted, HEADS, HEAD_SIZE).to(dtype)
    attention = make_attention(backend, layout, bias, rate)
    attended = torch.cat([attention(qkv)[:num_real], attention.of_predicted(queries, qkv[:, 1:])[:num_predicted]])
    assert attended.dtype == dtype
    (attended * weights).sum().backward()
    assert qkv.grad is not None
    assert queries.grad is not None
    found = {"attended": attended.detach(), "qkv": qkv.grad, "queries": queries.grad}
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


@pytest.mark.parametrize("num_heads", [1, 12])
def test_no_other_groups_cost_less(num_heads: int) -> None:
    """Of all ways to divide samples in the order of their lengths into runs of 1, 2, 4 .. of them."""

    def cheapest(lengths: list[tuple[int, int]]) -> float:
        if not lengths:
            return 0
        return min(
            cost_of_group(*zip(*lengths[:size], strict=True), num_heads) + cheapest(lengths[size:])
            for size in (1, 2, 4, 8) if size <= len(lengths)
        )  # fmt: skip

    chance = np.random.default_rng(0)
    num_groups = set()
    for num_samples in (1, 2, 3, 7, 10, 10, 10):
        context, appended = chance.integers(1, 12, num_samples) * 16, chance.integers(0, 4, num_samples) * 16
        groups = cheapest_groups(context, appended, num_heads)
        assert sorted(np.concatenate(groups).tolist()) == [*range(num_samples)]
        cost = sum(cost_of_group(context[group].tolist(), appended[group].tolist(), num_heads) for group in groups)
        assert cost == cheapest(sorted(zip(context.tolist(), appended.tolist(), strict=True)))
        num_groups.add(len(groups))
    assert len(num_groups) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_threads_give_the_same(dtype: torch.dtype) -> None:
    """Each takes some of the heads of the bias's gradient."""
    threads, found = torch.get_num_threads(), {}
    try:
        for found_by in (1, 3):
            torch.set_num_threads(found_by)
            found[found_by] = run("cpu", LAYOUTS["ae+par"], dtype, rate=0.1)
    finally:
        torch.set_num_threads(threads)
    for name in found[1]:
        torch.testing.assert_close(found[3][name], found[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [Objective.AE_PAR, Objective.AE])
def test_cpu_drops_the_probabilities_that_the_reference_drops(objective: Objective) -> None:
    """Where it pads nothing, as padding has random numbers too: 112 tokens, and 32 appended slots or none."""
    layout = pseudo_masked_layout(random_batch(3, max_length=112, min_length=112), objective, mask_id=MASK)
    layout = replace(layout, predicted_R=layout.predicted_R[:0], predicted_edges=(0, 0, 0, 0))  # of all slots alone
    reference, found = (run(b, layout, torch.float64, rate=0.3) for b in ("reference", "cpu"))
    plain = run("reference", layout, torch.float64)
    for name in ("attended", "qkv", "bias"):
        torch.testing.assert_close(found[name], reference[name], rtol=0, atol=1e-13)
        assert not torch.allclose(plain[name], reference[name], atol=1e-2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_dropout_in_the_last_layer_leaves_the_mean(backend: AttentionBackend) -> None:
    layout, bias = LAYOUTS["ae+par"], make_bias()
    torch.manual_seed(0)
    queries, keys_values = torch.randn(len(layout.predicted_R), HEADS, 4), torch.randn(len(layout.ids_N), 2, HEADS, 4)
    dropped = make_attention(backend, layout, bias, 0.2)
    expected = make_attention(backend, layout, bias, 0.0).of_predicted(queries, keys_values)
    draws = torch.stack([dropped.of_predicted(queries, keys_values) for _ in range(400)])
    errors = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / 20)
    assert 0.9 < errors.std() < 1.1
    assert abs(errors.mean()) < 0.2


def test_gradients_of_cpu_against_finite_differences() -> None:
    layout, bias = LAYOUTS["full length"], make_bias().double()
    qkv = torch.randn(len(layout.ids_N), 3, HEADS, 2, dtype=torch.float64, requires_grad=True)

    def attend(qkv: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # the same dropout each time
        return torch.func.functional_call(_Whole(layout, bias), {"bias.weight": weight}, (qkv,))

    torch.autograd.gradcheck(attend, (qkv, bias.weight), fast_mode=True)


class _Whole(torch.nn.Module):
    def __init__(self, layout: Layout, bias: RelativePositionBias) -> None:
        super().__init__()
        self.layout, self.bias = layout, bias

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        attention = make_attention("cpu", self.layout, self.bias, 0.2)
        return torch.cat([attention(qkv), attention.of_predicted(qkv[self.layout.predicted_R, 0], qkv[:, 1:])])


@pytest.mark.parametrize(("num_samples", "length"), [(8, 40), (64, 40), (3, 208)])
def test_cpu_never_holds_more_scores_than_a_sample_or_a_bounded_group_has_nor_booleans_for_each_head(
    num_samples: int, length: int
) -> None:
    batch = random_batch(num_samples, max_length=length, min_length=length)
    layout = pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK)
    bias = RelativePositionBias(16, 32, 20)
    torch.nn.init.normal_(bias.weight)
    qkv = torch.randn(len(layout.ids_N), 3, 16, 1, requires_grad=True)
    with LargestTensor() as largest:
        make_attention("cpu", layout, bias, 0.1)(qkv).sum().backward()
    context, appended = (-(-number // 16) * 16 for number in (length, layout.longest - length))
    of_a_sample = max(context**2, appended * (context + appended))
    assert largest.num_elements <= max(16 * of_a_sample, 1 << 18)
    assert num_samples < 64 or largest.num_elements < num_samples * 16 * length**2 / 4
    assert largest.num_bools <= max(of_a_sample, (1 << 18) // 16)


@pytest.mark.slow
@pytest.mark.parametrize("is_autocast", [False, True])
def test_few_shapes_reach_the_products_whatever_the_lengths(is_autocast: bool) -> None:
    """In 16 bits oneDNN compiles code for each, and remembers 1,024."""
    config = PMLMConfig.of_size(
        "tiny", dropout=0.1, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, max_positions=128
    )
    model = PMLM(config, "cpu").to(torch.float32 if is_autocast else torch.bfloat16)
    with Products() as products:
        for seed in range(60):
            batch = random_batch(16, max_length=128, min_length=11, seed=seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                losses = model(pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK))
            (losses.ae_sum + losses.par_sum).backward()
    assert len(products.shapes) < 850


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # on CPU FlexAttention has no backward pass
def test_flex_equals_the_reference_in_value(layout: Layout) -> None:
    bias, qkv = make_bias(), torch.randn(len(layout.ids_N), 3, HEADS, HEAD_SIZE)
    flex, reference = (make_attention(b, layout, bias, 0.0) for b in ("flex", "reference"))
    num_real, num_predicted = layout.edges[-1], layout.predicted_edges[-1]
    torch.testing.assert_close(flex(qkv)[:num_real], reference(qkv)[:num_real], rtol=0, atol=2e-6)
    found, expected = (a.of_predicted(qkv[layout.predicted_R, 0], qkv[:, 1:]) for a in (flex, reference))
    torch.testing.assert_close(found[:num_predicted], expected[:num_predicted], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_flex_does_to_scores_equals_the_reference_in_gradient(layout: Layout) -> None:
    """Its mask and its change of scores, in plain operations on dense scores."""
    expected, bias = run("reference", layout, torch.float64), make_bias().double()
    torch.manual_seed(3)
    num_slots, num_real, num_predicted = len(layout.ids_N), layout.edges[-1], layout.predicted_edges[-1]
    qkv = torch.randn(num_slots, 3, HEADS, HEAD_SIZE).double().requires_grad_()
    queries = torch.randn(len(layout.predicted_R), HEADS, HEAD_SIZE).double().requires_grad_()
    weights = torch.randn(num_real + num_predicted, HEADS, HEAD_SIZE).double()

    def attend(queries: torch.Tensor, slots_R: torch.Tensor | None, num: int) -> torch.Tensor:
        q, (k, v) = queries.transpose(0, 1)[None], qkv[:, 1:].permute(1, 2, 0, 3)[:, None]
        index = [torch.arange(size).view([-1 if d == i else 1 for d in range(4)]) for i, size in enumerate(
            (1, HEADS, len(queries), num_slots))]  # fmt: skip
        scores = score_mod(layout, bias, slots_R)(q @ k.mT / HEAD_SIZE**0.5, *index)
        is_hidden = ~mask_mod(layout, slots_R)(*index)
        return (scores.masked_fill(is_hidden, -torch.inf)[:, :, :num].softmax(-1) @ v)[0].transpose(0, 1)

    attended = torch.cat([attend(qkv[:, 0], None, num_real), attend(queries, layout.predicted_R, num_predicted)])
    (attended * weights).sum().backward()
    assert qkv.grad is not None
    assert queries.grad is not None
    assert bias.weight.grad is not None
    torch.testing.assert_close(qkv.grad, expected["qkv"], rtol=0, atol=1e-12)
    torch.testing.assert_close(queries.grad, expected["queries"], rtol=0, atol=1e-12)
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
    qkv = torch.randn(len(layout.ids_N), 3, HEADS, HEAD_SIZE, dtype=torch.float64)
    attention = make_attention("reference", layout, bias, 0.0)
    found = attention(qkv)
    bias_HNN = bias(layout.positions_N, layout.positions_N)
    roles, turns, samples = layout.roles_N, layout.turns_N, layout.samples_N
    for slot in range(len(qkv)):
        keys = ((samples == samples[slot]) & visible(roles[slot], turns[slot], roles, turns)).nonzero()[:, 0]
        for h in range(HEADS):
            scores = qkv[keys, 1, h] @ qkv[slot, 0, h] / HEAD_SIZE**0.5 + bias_HNN[h, slot, keys]
            torch.testing.assert_close(found[slot, h], scores.softmax(0) @ qkv[keys, 2, h], rtol=0, atol=1e-12)
    of_predicted = attention.of_predicted(qkv[layout.predicted_R, 0], qkv[:, 1:])
    torch.testing.assert_close(of_predicted, found[layout.predicted_R], rtol=0, atol=1e-12)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention 'flash'; expected one of auto, reference, cpu, flex"):
        make_attention("flash", LAYOUTS["ae"], None, 0.0)  # type: ignore[arg-type]
