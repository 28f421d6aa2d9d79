"""The model against its definition, against leaks, and against independent implementations."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support import MASK, VOCAB_SIZE, random_batch
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5Attention

from pretrain.attention import AttentionBackend, relative_position_bucket
from pretrain.layout import GIVEN, PSEUDO, Layout, Objective, few_sizes, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig, layer_norm, nvidia_apex_folder

CONFIG = PMLMConfig.of_size(
    "tiny", dropout=0.1, vocab_size=VOCAB_SIZE, hidden_size=32, num_heads=4, intermediate_size=64, num_layers=3, max_positions=64,
    initializer_range=0.3, relative_max_distance=20,
)  # fmt: skip


def make_model(config: PMLMConfig = CONFIG, dtype: torch.dtype = torch.float64) -> PMLM:
    torch.manual_seed(1)
    model = PMLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def par_log_probabilities(model: PMLM, layout: Layout) -> torch.Tensor:
    assert layout.par_places_T is not None
    return F.log_softmax(model.predict(model.encode_predicted(layout)[layout.par_places_T]), dim=-1)


def only_slots(layout: Layout, keep: torch.Tensor) -> Layout:
    """The layout of one sample with just some of its slots, nothing predicted."""
    names = ("ids_N", "positions_N", "segments_N", "roles_N", "turns_N", "samples_N")
    num_context = int((layout.turns_N[keep] == 0).sum())
    return replace(
        layout, edges=(0, int(keep.sum())), context_lengths=(num_context,), **{n: getattr(layout, n)[keep] for n in names}
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("objective", [Objective.AE_PAR, Objective.PAR, Objective.AR, Objective.AE_AR])
@pytest.mark.parametrize("relative_buckets", [32, 0])
def test_one_pass_equals_a_pass_for_each_turn(objective: Objective, relative_buckets: int) -> None:
    """p(x_M | rest) = prod over turns of p(turn | rest, earlier turns): each factor by a pass of its own."""
    model = make_model(replace(CONFIG, relative_buckets=relative_buckets))
    for seed in range(4):
        layout = pseudo_masked_layout(random_batch(1, seed=seed), objective, mask_id=MASK)
        turns_N, roles_N = layout.turns_N, layout.roles_N
        in_one_pass = par_log_probabilities(model, layout)
        assert layout.par_places_T is not None
        for place, slot in enumerate(layout.predicted_R[layout.par_places_T].tolist()):
            turn = turns_N[slot]
            keep = (turns_N == 0) | ((roles_N == GIVEN) & (turns_N < turn)) | ((roles_N == PSEUDO) & (turns_N == turn))
            # Here the only rule left is: context sees context, the rest sees what it may of what is there.
            hidden = model.encode(only_slots(layout, keep))[int(keep[:slot].sum())]
            expected = F.log_softmax(model.predict(hidden[None]), dim=-1)[0]
            torch.testing.assert_close(in_one_pass[place], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("objective", [Objective.AE, Objective.AE_PAR, Objective.AE_AR])
def test_ae_in_one_pass_equals_the_context_alone(objective: Objective) -> None:
    model = make_model()
    layout = pseudo_masked_layout(random_batch(3), objective, mask_id=MASK)
    alone = pseudo_masked_layout(random_batch(3), Objective.AE, mask_id=MASK)
    hidden = model.encode(layout)[layout.turns_N == 0]
    torch.testing.assert_close(hidden, model.encode(alone), rtol=0, atol=1e-9)
    assert torch.isclose(model(layout).ae_sum, model(alone).ae_sum, rtol=0, atol=1e-4)  # a sum in fp32


@pytest.mark.parametrize("attention", ["reference", "cpu"])
@pytest.mark.parametrize("objective", list(Objective))
def test_a_last_layer_of_the_predicted_slots_alone_gives_their_vectors(
    objective: Objective, attention: AttentionBackend
) -> None:
    model = make_model()
    model.bert.encoder.attention = attention
    for one_shape in (False, True):
        layout = pseudo_masked_layout(random_batch(4), objective, mask_id=MASK, one_shape=one_shape)
        num_predicted = layout.predicted_edges[-1]
        expected = model.encode(layout)[layout.predicted_R[:num_predicted]]
        torch.testing.assert_close(model.encode_predicted(layout)[:num_predicted], expected, rtol=0, atol=1e-9)


def test_ar_is_par_with_one_token_turns() -> None:
    model, batch = make_model(), random_batch(4)
    one_token_turns = torch.arange(1, batch.turns_BP.shape[1] + 1).numpy()
    as_par = replace(batch, turns_BP=(batch.turns_BP > 0) * one_token_turns)
    ar = par_log_probabilities(model, pseudo_masked_layout(batch, Objective.AR, mask_id=MASK))
    par = par_log_probabilities(model, pseudo_masked_layout(as_par, Objective.PAR, mask_id=MASK))
    torch.testing.assert_close(ar, par, rtol=0, atol=0)


@pytest.mark.parametrize("objective", [Objective.AE_PAR, Objective.AE_AR])
def test_a_masked_original_changes_no_prediction_of_its_own_or_an_earlier_turn(objective: Objective) -> None:
    model = make_model()
    layout = pseudo_masked_layout(random_batch(1, seed=5), objective, mask_id=MASK)
    assert layout.par_places_T is not None
    turns_T = layout.turns_N[layout.predicted_R[layout.par_places_T]]
    num_context = layout.context_lengths[0]
    before, context = par_log_probabilities(model, layout), model.encode(layout)[:num_context]
    for place in range(layout.num_targets):
        ids = layout.ids_N.clone()
        ids[num_context + place] = 5 + (ids[num_context + place] + 1) % (VOCAB_SIZE - 5)
        changed = replace(layout, ids_N=ids)
        after = par_log_probabilities(model, changed)
        later = turns_T > turns_T[place]
        assert torch.equal(before[~later], after[~later])
        assert torch.equal(context, model.encode(changed)[:num_context])
        assert (before[later] != after[later]).any(dim=1).all()


def test_a_batch_gives_what_its_samples_give() -> None:
    model, batch = make_model(), random_batch(6)
    together = model(pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=MASK))
    alone = [model(pseudo_masked_layout(batch[[i]], Objective.AE_PAR, mask_id=MASK)) for i in range(6)]
    for name in together._fields:
        torch.testing.assert_close(getattr(together, name), sum(getattr(a, name) for a in alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_that_round_numbers_up_change_no_loss_and_no_gradient(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are there gradients that are not finite: LayerNorm has none for zeros, which biases of zero make of zeros."""
    torch.manual_seed(0)
    model = PMLM(CONFIG, "cpu").to(dtype)
    layout = pseudo_masked_layout(random_batch(9), Objective.AE_PAR, mask_id=MASK)
    numbers = (len(layout.ids_N), len(layout.predicted_R), 2 * layout.num_targets)
    assert all(few_sizes(number) > number for number in numbers)
    results = []
    for is_rounded in (True, False):
        if not is_rounded:
            monkeypatch.setattr("pretrain.model.few_sizes", lambda number: number)
        model.zero_grad()
        model.eval()
        losses = model(layout)
        (losses.ae_sum + losses.par_sum).backward()
        results.append([*losses, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        assert (found - expected).float().norm() <= {torch.bfloat16: 0.05, torch.float16: 0.01}[
            dtype
        ] * expected.float().norm()


@pytest.mark.parametrize("max_distance", [20, 128])
def test_buckets_are_t5s(max_distance: int) -> None:
    distance = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(
        distance, bidirectional=True, num_buckets=32, max_distance=max_distance
    )
    assert torch.equal(relative_position_bucket(distance, 32, max_distance), expected)


def test_ae_logits_equal_transformers_bert() -> None:
    """Without the relative bias and the appended slots, the PMLM is a BERT whose keys have no bias."""
    ours = make_model(replace(CONFIG, relative_buckets=0))
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, layer_norm_eps=1e-12,
    )).double().eval()  # fmt: skip
    weights = dict(ours.state_dict())
    for layer in range(3):
        prefix = f"bert.encoder.layer.{layer}.attention.self."
        qkv, q_bias, v_bias = (weights.pop(prefix + n) for n in ("qkv_linear.weight", "q_bias", "v_bias"))
        for name, weight in zip(("query", "key", "value"), qkv.chunk(3), strict=True):
            weights[f"{prefix}{name}.weight"] = weight
        weights |= {f"{prefix}query.bias": q_bias, f"{prefix}value.bias": v_bias, f"{prefix}key.bias": 0 * q_bias}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    layout = pseudo_masked_layout(random_batch(4), Objective.AE, mask_id=MASK)
    found = ours.predict(ours.encode(layout)).split(layout.context_lengths)
    inputs = zip(
        layout.ids_N.split(layout.context_lengths), layout.segments_N.split(layout.context_lengths), strict=True
    )
    for ids, segments in inputs:
        logits = theirs(ids[None], token_type_ids=segments[None]).logits[0]
        torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-9)
        found = found[1:]


def test_base_has_the_papers_size_and_names() -> None:
    with torch.device("meta"):
        model = PMLM(PMLMConfig.of_size("base", vocab_size=30_522))
    bert, key_biases, relative_bias = 109_514_298, 12 * 768, 12 * 32
    assert sum(p.numel() for p in model.parameters()) == bert - key_biases + relative_bias
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layer = {
        "attention.self.qkv_linear.weight": (2304, 768), "attention.self.q_bias": (768,), "attention.self.v_bias": (768,),
        "attention.output.dense.weight": (768, 768), "attention.output.dense.bias": (768,),
        "attention.output.LayerNorm.weight": (768,), "attention.output.LayerNorm.bias": (768,),
        "intermediate.dense.weight": (3072, 768), "intermediate.dense.bias": (3072,),
        "output.dense.weight": (768, 3072), "output.dense.bias": (768,),
        "output.LayerNorm.weight": (768,), "output.LayerNorm.bias": (768,),
    }  # fmt: skip
    expected = {
        "bert.embeddings.word_embeddings.weight": (30_522, 768), "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.token_type_embeddings.weight": (2, 768), "bert.embeddings.LayerNorm.weight": (768,),
        "bert.embeddings.LayerNorm.bias": (768,), "bert.encoder.rel_pos_bias.weight": (12, 32),
        "cls.predictions.bias": (30_522,), "cls.predictions.transform.dense.weight": (768, 768),
        "cls.predictions.transform.dense.bias": (768,), "cls.predictions.transform.LayerNorm.weight": (768,),
        "cls.predictions.transform.LayerNorm.bias": (768,), "cls.predictions.decoder.weight": (30_522, 768),
        **{f"bert.encoder.layer.{i}.{name}": shape for i in range(12) for name, shape in layer.items()},
    }  # fmt: skip
    assert shapes == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 8e-2)])
@torch.no_grad()
def test_every_precision_gives_the_loss_of_fp64(dtype: torch.dtype, tolerance: float) -> None:
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    exact = make_model(replace(CONFIG, initializer_range=0.1))(layout)
    found = make_model(replace(CONFIG, initializer_range=0.1), dtype)(layout)
    assert float(found.ae_sum) == pytest.approx(float(exact.ae_sum), rel=tolerance)
    assert float(found.par_sum) == pytest.approx(float(exact.par_sum), rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_loss_of_the_cpu() -> None:
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    model = make_model(dtype=torch.float32)
    expected = model(layout)
    found = model.cuda()(layout.to(torch.device("cuda")))
    assert float(found.ae_sum) == pytest.approx(float(expected.ae_sum), rel=1e-4)
    assert float(found.par_sum) == pytest.approx(float(expected.par_sum), rel=1e-4)


def test_dropout_is_on_in_training_alone() -> None:
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    model = make_model()
    assert torch.equal(model(layout).par_sum, model(layout).par_sum)
    model.train()
    assert not torch.equal(model(layout).par_sum, model(layout).par_sum)


def make_package(folder: Path, *files: str, content: str = "") -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_a_foreign_apex_is_not_taken_for_nvidias_nor_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "apex/__init__.py", content="raise RuntimeError('a foreign package was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert nvidia_apex_folder() is None
    assert isinstance(layer_norm(8), torch.nn.LayerNorm)
    assert "apex" not in sys.modules


def test_nvidias_apex_is_recognised_by_what_it_contains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(
        tmp_path, "apex/__init__.py", "apex/normalization/__init__.py", "apex/normalization/fused_layer_norm.py"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert nvidia_apex_folder() is None  # its kernels are not built
    make_package(tmp_path, "fused_layer_norm_cuda.py")
    assert nvidia_apex_folder() == tmp_path / "apex"


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ({"num_heads": 5}, "hidden_size 128 is not a multiple of num_heads 5"),
        (
            {"num_layers": 0, "dropout": 1.0},
            "num_layers is 0, expected at least 1 and at most 1000000000; dropout is 1.0",
        ),
        ({"relative_buckets": 6}, "relative_buckets is 6"),
    ],
)
def test_impossible_numbers_are_refused(numbers: dict[str, float], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        PMLMConfig.of_size("tiny", vocab_size=100, **numbers)
