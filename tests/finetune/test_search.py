"""What is found with remembered keys and values is what is found by computing everything anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import tiny_model
from support import EOS, MASK, PAD, SOS, VOCAB_SIZE

from data_prep.tokenizer import Tokenizer
from finetune import search_memory
from finetune.search import Search, decode, draw_tokens, stream
from finetune.search_settings import Found, Rules, SearchSettings, refuse_impossible
from pretrain.layout import seq2seq_layout
from pretrain.model import PMLM

RULES = Rules(EOS, MASK, (PAD, SOS, MASK))
WORDS = replace(RULES, forbidden=((7,), (8, 9), (20, 21, 22)), may_repeat=(10, 11, 12, 13, 14))


def make_sources(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[SOS, *torch.randint(5, VOCAB_SIZE, (n,), generator=generator).tolist(), EOS] for n in lengths]


SOURCES = make_sources((3, 12, 7, 1, 20))


def random_model(**numbers: float) -> PMLM:
    """Targets of it end now and then."""
    model = tiny_model(VOCAB_SIZE, **{"max_positions": 60, **numbers})
    with torch.no_grad():
        model.cls.predictions.bias[EOS] += 4
    return model


@pytest.fixture(scope="module")
def trained_model() -> PMLM:
    """Writes the next five numbers behind the source's last, less surely the more of them."""
    model = tiny_model(VOCAB_SIZE, initializer_range=0.05, max_positions=60)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(120):
        firsts = torch.randint(10, 40, (16,), generator=generator).tolist()
        lengths = torch.randint(2, 6, (16,), generator=generator).tolist()
        layout = seq2seq_layout(
            [[SOS, first - 1, first, EOS] for first in firsts],
            [[*range(first + 1, first + 1 + n), EOS] for first, n in zip(firsts, lengths, strict=True)],
            mask_id=MASK,
        )
        losses, _ = model.cls.predictions.losses(model.encode_predicted(layout), layout.targets_T)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return model.eval()


def log_probabilities_of(model: PMLM) -> Callable[[list[int], list[tuple[int, ...]]], list[torch.Tensor]]:
    """Of the next token behind each target, from a whole forward pass; what was asked once is remembered."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}

    def of(source: list[int], targets: list[tuple[int, ...]]) -> list[torch.Tensor]:
        new = [target for target in targets if (tuple(source), target) not in known]
        if new:
            layout = seq2seq_layout([source] * len(new), [[*target, MASK] for target in new], mask_id=MASK)
            with torch.no_grad():
                logits = model.predict(model.encode_predicted(layout))
            last = torch.tensor(layout.predicted_edges[1:]) - 1
            for target, row in zip(new, torch.log_softmax(logits[last].double(), dim=-1), strict=True):
                known[tuple(source), target] = row
        return [known[tuple(source), target].clone() for target in targets]

    return of


def allowed(scores: torch.Tensor, so_far: tuple[int, ...], rules: Rules, settings: SearchSettings) -> torch.Tensor:
    """The rules, written down for one target."""
    kept, n = scores.clone(), settings.no_repeat_ngram
    kept[list(rules.never)] = -math.inf
    if len(so_far) < settings.min_length_tokens:
        kept[EOS] = -math.inf
    for word in rules.forbidden:
        if so_far[len(so_far) - len(word) + 1 :] == word[:-1] or len(word) == 1:
            kept[word[-1]] = -math.inf
    ngrams = [so_far[i : i + n] for i in range(len(so_far) - n + 1)] if n else []
    for ngram in ngrams:
        if ngram[:-1] == so_far[len(so_far) - n + 1 :] and not set(ngram) & set(rules.may_repeat):
            kept[ngram[-1]] = -math.inf
    if not kept.isfinite().any():
        kept[EOS] = scores[EOS]
    return kept


def plain_search(
    of: Any, source: list[int], rules: Rules, settings: SearchSettings
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search to the length limit, hypotheses in lists."""
    beams, ended = [(0.0, ())], []
    for length in range(1, settings.max_length_tokens + 1):
        ways = []
        for (total, so_far), scores in zip(beams, of(source, [so_far for _, so_far in beams]), strict=True):
            row = allowed(scores, so_far, rules, settings).tolist()
            ways += [(total + x, so_far, token) for token, x in enumerate(row) if x > -math.inf]
        ways.sort(key=lambda way: -way[0])
        ways = ways[: 2 * settings.num_beams]
        for total, so_far, token in ways[: settings.num_beams]:
            if token == EOS or length == settings.max_length_tokens:
                ended.append((total / length**settings.length_penalty, so_far if token == EOS else (*so_far, token)))
        beams = [(total, (*so_far, token)) for total, so_far, token in ways if token != EOS][: settings.num_beams]
        if (settings.num_beams == 1 and ended) or not beams:
            break
    return sorted(ended, key=lambda end: -end[0])[: settings.num_best]


def assert_same(found: list[Found], expected: list[list[tuple[float, tuple[int, ...]]]]) -> None:
    for of_source, plain in zip(found, expected, strict=True):
        assert [h.tokens for h in of_source.hypotheses] == [tokens for _, tokens in plain]
        scores = [score for score, _ in plain]
        assert [h.score for h in of_source.hypotheses] == pytest.approx(scores, abs=1e-4, rel=1e-5)


SETTINGS = {
    "greedy": (RULES, SearchSettings(num_beams=1, max_length_tokens=12)),
    "greedy, no word twice": (RULES, SearchSettings(num_beams=1, max_length_tokens=12, no_repeat_ngram=1, min_length_tokens=6)),
    "beams": (RULES, SearchSettings(num_beams=4, num_best=4, max_length_tokens=14, length_penalty=0.7)),
    "long ones": (RULES, SearchSettings(num_beams=3, num_best=2, max_length_tokens=14, length_penalty=2.0, min_length_tokens=4)),
    "short ones": (RULES, SearchSettings(num_beams=3, num_best=3, max_length_tokens=10, length_penalty=-1.0)),
    "no repetition": (RULES, SearchSettings(num_beams=3, max_length_tokens=16, no_repeat_ngram=2, min_length_tokens=8)),
    "words": (WORDS, SearchSettings(num_beams=3, num_best=2, max_length_tokens=16, no_repeat_ngram=1, min_length_tokens=8)),
    "many beams": (RULES, SearchSettings(num_beams=40, num_best=7, max_length_tokens=5, length_penalty=0.0)),
    "one token": (RULES, SearchSettings(num_beams=3, num_best=2, max_length_tokens=1)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "trained", "no relative bias"])
def test_search_is_that_of_computing_everything_anew(kind: str, trained_model: PMLM) -> None:
    bias = {"relative_buckets": 0} if kind == "no relative bias" else {}
    model = trained_model if kind == "trained" else random_model(**bias)
    sources = [[SOS, n - 1, n, EOS] for n in (12, 30, 39)] + SOURCES[:2] if kind == "trained" else SOURCES
    of = log_probabilities_of(model)
    num_tokens, lengths = 0, set()
    for name, (rules, settings) in SETTINGS.items():
        if kind == "no relative bias" and name != "beams":
            continue
        found = decode(model, rules, sources, settings, batch_size=3)
        assert_same(found, [plain_search(of, source, rules, settings) for source in sources])
        num_tokens += sum(h.num_tokens for f in found for h in f.hypotheses)
        lengths |= {h.num_tokens for f in found for h in f.hypotheses}
    if kind == "trained":
        best = decode(model, RULES, sources[:1], replace(SETTINGS["beams"][1], num_best=1))[0].hypotheses[0]
        assert best.tokens[:2] == (13, 14)
        assert best.log_probability > -4
    assert len(lengths) > 4  # ends at many places


def test_released_length_penalty() -> None:
    settings = SearchSettings(length_penalty=1.3, released_length_penalty=True)
    assert settings.score(-6.0, 7) == pytest.approx(-6.0 / (12 / 6) ** 1.3)


@pytest.mark.parametrize("name", ["beams", "words"])
def test_batches_change_nothing(name: str) -> None:
    model, (rules, settings) = random_model(), SETTINGS[name]
    sources = make_sources((3, 12, 7, 1, 20, 20, 2, 9), seed=5)
    alone = decode(model, rules, sources, settings, batch_size=1)
    for batch_size in (3, 8):
        together = decode(model, rules, sources, settings, batch_size=batch_size)
        assert_same(together, [[(h.score, h.tokens) for h in f.hypotheses] for f in alone])


def test_columns_that_no_beam_descends_from_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(max_positions=90)
    settings = SearchSettings(num_beams=5, num_best=3, max_length_tokens=50, length_penalty=1.5, min_length_tokens=30)
    dropped = []
    drop = search_memory.SearchMemory._drop_dead_columns

    def counted(memory: Any) -> None:
        before = memory._num_columns
        drop(memory)
        dropped.append(before - memory._num_columns)

    monkeypatch.setattr(search_memory.SearchMemory, "_drop_dead_columns", counted)
    found = decode(model, RULES, SOURCES[:3], settings)
    assert sum(dropped) > 50
    monkeypatch.setattr(search_memory.SearchMemory, "_drop_dead_columns", lambda memory: None)
    all_kept = decode(model, RULES, SOURCES[:3], settings)
    assert_same(found, [[(h.score, h.tokens) for h in f.hypotheses] for f in all_kept])


@pytest.mark.parametrize("name", ["greedy", "beams", "long ones"])
def test_a_trace_ranked_again_is_a_search_with_that_penalty(name: str) -> None:
    model, (rules, settings) = random_model(), SETTINGS[name]
    traced = decode(model, rules, SOURCES, settings, with_traces=True)
    for length_penalty in (settings.length_penalty, 0.0, 1.0, 3.0):
        other = replace(settings, length_penalty=length_penalty, num_best=min(2, settings.num_beams))
        expected = decode(model, rules, SOURCES, other)
        ranked = [found.trace.hypotheses(other, EOS) for found in traced if found.trace is not None]
        assert [[h.tokens for h in f] for f in ranked] == [[h.tokens for h in f.hypotheses] for f in expected]
        for f, e in zip(ranked, expected, strict=True):
            assert [h.score for h in f] == pytest.approx([h.score for h in e.hypotheses], abs=1e-5)
            assert [h.num_tokens for h in f] == [h.num_tokens for h in e.hypotheses]


def test_steps_that_are_fed_two_slots_a_beam_and_leave_finished_sentences_out(trained_model: PMLM) -> None:
    sources = [[SOS, n - 1, n, EOS] for n in (12, 30)] + SOURCES[:3]
    search_ = Search(
        trained_model, RULES, sources, SearchSettings(num_beams=2, max_length_tokens=20, min_length_tokens=1), range(5)
    )
    fed, encode = [], trained_model.encode_predicted

    def counted(layout: Any, attention: Any) -> torch.Tensor:
        fed.append(len(layout.ids_N))
        return encode(layout, attention)

    trained_model.encode_predicted = counted  # type: ignore[method-assign]
    try:
        while not search_.is_done:
            search_.step()
    finally:
        del trained_model.encode_predicted
    assert fed[0] == sum(map(len, sources)) + len(sources)
    assert fed[1] == 2 * 2 * len(sources)
    assert fed[1:] == sorted(fed[1:], reverse=True)
    assert fed[-1] < fed[1]


def test_stream_gives_the_tokens_of_greedy_search(trained_model: PMLM) -> None:
    settings = SearchSettings(num_beams=1, max_length_tokens=12)
    for model in (random_model(), trained_model):
        for source in [*SOURCES, [SOS, 20, 21, EOS]]:
            (found,) = decode(model, RULES, [source], settings)
            assert tuple(stream(model, RULES, source, settings)) == found.hypotheses[0].tokens


# ---- sampling


def test_draws_have_the_plain_distribution() -> None:
    """The first two tokens of many draws, against their probabilities after temperature, top_k and top_p."""
    model = random_model()
    settings = SearchSettings(
        sampling=True,
        num_best=1500,
        max_length_tokens=2,
        temperature=1.5,
        top_k=6,
        top_p=0.9,
        no_repeat_ngram=1,
        seed=3,
    )
    of, source = log_probabilities_of(model), SOURCES[0]

    def distribution(so_far: tuple[int, ...]) -> dict[int, float]:
        kept = allowed(of(source, [so_far])[0], so_far, RULES, settings) / settings.temperature
        likeliest = sorted(range(VOCAB_SIZE), key=lambda token: -float(kept[token]))[: settings.top_k]
        weights = torch.softmax(kept[likeliest], dim=0).tolist()
        nucleus: dict[int, float] = {}
        for token, weight in zip(likeliest, weights, strict=True):
            if sum(nucleus.values()) < settings.top_p:
                nucleus[token] = weight
        return {token: weight / sum(nucleus.values()) for token, weight in nucleus.items()}

    (found,) = decode(model, RULES, [source], settings)
    draws = [h.tokens for h in found.hypotheses]
    expected: dict[tuple[int, ...], float] = {}
    for first, p in distribution(()).items():
        if first == EOS:
            expected[()] = p
            continue
        for second, q in distribution((first,)).items():
            target = (first,) if second == EOS else (first, second)
            expected[target] = expected.get(target, 0.0) + p * q
    assert len(draws) == 1500
    assert set(draws) <= set(expected)
    assert len(expected) > 8
    chi_squared = sum((draws.count(t) - 1500 * p) ** 2 / (1500 * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)
    one = found.hypotheses[0]  # the score is the model's own, of all tokens
    scores = [float(of(source, [one.tokens[:i]])[0][token]) for i, token in enumerate(one.tokens)]
    if one.num_tokens > len(one.tokens):
        scores.append(float(of(source, [one.tokens])[0][EOS]))
    assert one.log_probability == pytest.approx(sum(scores), abs=1e-4)


def test_draws_depend_on_seed_and_sample_alone() -> None:
    model = random_model()
    settings = SearchSettings(sampling=True, num_best=4, max_length_tokens=10)
    one, many = (decode(model, RULES, SOURCES, settings, batch_size=size) for size in (1, 5))
    assert [[h.tokens for h in f.hypotheses] for f in one] == [[h.tokens for h in f.hypotheses] for f in many]
    last = decode(model, RULES, SOURCES[4:], settings, samples=[4])
    assert [h.tokens for h in last[0].hypotheses] == [h.tokens for h in one[4].hypotheses]
    fewer = decode(model, RULES, SOURCES, replace(settings, num_best=2))
    assert [[h.tokens for h in f.hypotheses] for f in fewer] == [[h.tokens for h in f.hypotheses[:2]] for f in one]
    for other in (
        decode(model, RULES, SOURCES, replace(settings, seed=1)),
        decode(model, RULES, SOURCES, settings, samples=range(5, 10)),
    ):
        assert [[h.tokens for h in f.hypotheses] for f in other] != [[h.tokens for h in f.hypotheses] for f in one]
    assert len({h.tokens for h in one[0].hypotheses}) > 1


def test_a_draw_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -math.inf]] * 3)
    units = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, SearchSettings(sampling=True), units).tolist() == [1, 1, 0]


# ---- settings


def test_words_become_tokens(tokenizer: Tokenizer) -> None:
    settings = SearchSettings(forbidden_words="good| the man ", no_repeat_ngram=2, may_repeat="the|,")
    rules = Rules.of(tokenizer, settings)
    assert [tokenizer.decode(word) for word in rules.forbidden] == ["good", "the man"]
    assert set(rules.may_repeat) == {int(i) for word in ("the", ",") for i in tokenizer.encode([word])}
    assert tokenizer.eos_id not in rules.never
    with pytest.raises(ValueError, match="--forbidden_words '龘'"):
        Rules.of(tokenizer, SearchSettings(forbidden_words="龘"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 0, "max_length_tokens": 0}, ["num_beams is 0, expected at least 1", "max_length_tokens is 0"]),
        ({"num_beams": 2, "num_best": 3}, ["num_best is 3", "num_beams, which is 2"]),
        ({"min_length_tokens": 64}, ["min_length_tokens is 64"]),
        ({"temperature": 0.5}, ["--sampling"]),
        ({"sampling": True, "temperature": 0.0}, ["temperature is 0.0"]),
        ({"sampling": True, "top_p": 1.5}, ["top_p is 1.5"]),
        ({"may_repeat": "the"}, ["--no_repeat_ngram"]),
        ({"length_penalty": math.nan}, ["length_penalty is nan"]),
    ],
)
def test_impossible_settings(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SearchSettings(**changes)
    for word in words:
        assert word in str(error.value)


def test_what_the_model_cannot_do_is_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match=r"--num_beams 51: more than the 50 entries"):
        refuse_impossible(model, SearchSettings(num_beams=51), 3)
    with pytest.raises(
        ValueError, match=r"--max_length_tokens 40: behind a source of 22 tokens there are 38 positions"
    ):
        decode(model, RULES, SOURCES, SearchSettings(max_length_tokens=40))
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, RULES, [[SOS, EOS], []], SearchSettings(max_length_tokens=4))
