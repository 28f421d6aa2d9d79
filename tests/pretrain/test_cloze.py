"""Prompts with [MASK]: how they are encoded, and what is said of the model's guesses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.import_tokenizer import import_tokenizer
from data_prep.shards import DataSet
from data_prep.tokenizer import Tokenizer
from pretrain.cloze import SHIPPED_PROMPTS, fill_in, in_markdown, read_prompts

TEXTS = ["She saw the man.", "the end", "And the rest of the men left."]


def prompts_of(texts: list[str], path: Path) -> Path:
    path.write_text("\n".join(texts) + "\n\n")
    return path


@pytest.fixture(params=["sentence_piece", "word_piece"])
def tokenizer(request: pytest.FixtureRequest, data_set: DataSet, tmp_path: Path) -> Tokenizer:
    if request.param == "sentence_piece":
        return data_set.tokenizer
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", *"abcdefghijklmnopqrstuvwxyz.,:“”", "##e", "##he"]
    (tmp_path / "vocab.txt").write_text("\n".join([*entries, *(f"##{c}" for c in "abcdfghijklmnopqrstuvwxyz")]))
    return import_tokenizer(tmp_path / "vocab.txt", tmp_path / "bert.json", pieces={})


def test_a_mask_is_cut_as_a_word_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """ "the" is one entry of either vocabulary: masked, it leaves the ids around it as they were."""
    path = prompts_of([text.replace("the", "[MASK]") for text in TEXTS], tmp_path / "prompts")
    prompts = read_prompts(path, tokenizer, 64)
    assert prompts is not None
    assert prompts.num_masks == (1, 1, 2)
    layout = prompts.layout
    for number, text in enumerate(TEXTS):
        found = layout.ids_N[layout.edges[number] : layout.edges[number + 1]].tolist()
        (the,) = tokenizer.encode(["the"]).tolist()
        ids = [tokenizer.sos_id, *tokenizer.encode([text]).tolist(), tokenizer.eos_id]
        assert found == [tokenizer.mask_id if i == the else i for i in ids]
    assert layout.ids_N[layout.predicted_R].tolist() == [tokenizer.mask_id] * 4
    inside = read_prompts(prompts_of(["He said: “[MASK]”, or x[MASK]."], path), tokenizer, 64)
    assert inside is not None
    assert inside.num_masks == (2,)


def test_lines_that_are_no_prompts(data_set: DataSet, tmp_path: Path) -> None:
    path = prompts_of(["A [MASK].", "no mask", "many words [MASK] " * 20], tmp_path / "prompts")
    with pytest.raises(
        ValueError, match=r"line 2 has no \[MASK\]; line 3 has \d+ tokens, expected at most 32; expected"
    ):
        read_prompts(path, data_set.tokenizer, 32)
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none", data_set.tokenizer, 32)
    assert read_prompts(prompts_of([], path), data_set.tokenizer, 32) is None


def test_of_the_shipped_prompts_those_that_fit_are_used(data_set: DataSet) -> None:
    lines = SHIPPED_PROMPTS.read_text().splitlines()
    everything, some = (read_prompts(None, data_set.tokenizer, length) for length in (512, 16))
    assert everything is not None
    assert some is not None
    assert list(everything.texts) == lines
    assert 0 < len(some.texts) < len(lines)


def test_the_likeliest_words_and_their_probabilities(data_set: DataSet, tmp_path: Path) -> None:
    tokenizer = data_set.tokenizer
    prompts = read_prompts(prompts_of(["A [MASK] or [MASK].", "[MASK]"], tmp_path / "prompts"), tokenizer, 64)
    assert prompts is not None
    logits_TV = torch.randn(3, tokenizer.vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    filled = fill_in(prompts, logits_TV, tokenizer)
    assert [prompt["text"] for prompt in filled] == ["A [MASK] or [MASK].", "[MASK]"]
    guesses = [*filled[0]["masks"], *filled[1]["masks"]]
    for logits_V, guess in zip(logits_TV, guesses, strict=True):
        odds = (logits_V.double().exp() / logits_V.double().exp().sum()).tolist()
        best = sorted(range(len(odds)), key=lambda i: -odds[i])[:5]
        assert [word for word, _ in guess] == [tokenizer.surface(i) for i in best]
        assert [p for _, p in guess] == pytest.approx([odds[i] for i in best], abs=1e-4)
    first, second = guesses[0][0][0], guesses[1][0][0]
    assert f"A **{first}** or **{second}**." in in_markdown(filled)
