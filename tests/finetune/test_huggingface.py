"""transformers opens the folder, here and on a machine without this repository, and computes what we compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import stored
from support import run_command

from data_prep.tokenizer import Tokenizer
from finetune.convert import ConvertSettings, convert
from finetune.huggingface import register
from finetune.search import decode
from finetune.search_settings import Rules, SearchSettings
from finetune.weights import load_pretrained
from pretrain.export import write_export
from pretrain.layout import encoder_layout, seq2seq_layout

PAIRS = [("a man in want of a wife", "the truth"), ("good", "and for, it is!"), ("Truth (universally)", "I")]


@pytest.fixture(scope="module")
def folder(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("huggingface") / "model"
    convert(ConvertSettings(export, folder, "huggingface"))
    register()
    return folder


def our_logits(export: Path, batch: Any) -> torch.Tensor:
    """[N, vocabulary] of the batch's texts without its padding."""
    model = load_pretrained(export).model
    is_token = batch["attention_mask"].bool()
    ids, segments = ([row[keep].tolist() for row, keep in zip(batch[name], is_token, strict=True)]
                     for name in ("input_ids", "token_type_ids"))  # fmt: skip
    with torch.no_grad():
        return model.predict(model.encode(encoder_layout(ids, segments)))


def test_logits_are_ours(export: Path, folder: Path) -> None:
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([a for a, _ in PAIRS], [b for _, b in PAIRS], padding=True, return_tensors="pt")
    assert 0 in batch["attention_mask"]
    with torch.no_grad():
        logits = model(**batch).logits
        as_tuple = model(**batch, return_dict=False)[0]
        no_segments = model(batch["input_ids"], batch["attention_mask"]).logits
        from_vectors = model.bert(inputs_embeds=model.get_input_embeddings()(batch["input_ids"])).last_hidden_state
        from_ids = model.bert(batch["input_ids"]).last_hidden_state
    expected = our_logits(export, batch)
    torch.testing.assert_close(logits[batch["attention_mask"].bool()], expected, rtol=0, atol=1e-5)
    assert torch.equal(as_tuple, logits)
    assert torch.equal(from_vectors, from_ids)
    assert not torch.allclose(no_segments, logits, atol=1e-3)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    loss = model(**batch, labels=labels).loss.detach()
    of_ours = torch.nn.functional.cross_entropy(expected, batch["input_ids"][batch["attention_mask"].bool()])
    assert float(loss) == pytest.approx(float(of_ours), rel=1e-5)


def test_what_padding_holds_changes_nothing(folder: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    ids = torch.tensor([[3, 20, 21, 22, 4, 0, 0], [3, 23, 24, 25, 26, 27, 4]])
    mask = (ids != 0).long()
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 30))
    with torch.no_grad():
        before, after = (model(i, attention_mask=mask).logits[mask.bool()] for i in (ids, other))
    assert torch.equal(before, after)


def test_a_text_that_is_too_long_is_refused(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="has 41 tokens, and the model 40 positions"):
        model(torch.ones(1, 41, dtype=torch.long))


def test_the_pipeline_fills_the_mask(export: Path, folder: Path) -> None:
    fill = transformers.pipeline("fill-mask", model=str(folder), tokenizer=str(folder))
    text = f"a man in {fill.tokenizer.mask_token} of a wife"
    answers = fill(text, top_k=3)
    batch = fill.tokenizer(text, return_tensors="pt")
    place = batch["input_ids"][0].tolist().index(fill.tokenizer.mask_token_id)
    best = our_logits(export, batch)[place].softmax(0).topk(3)
    assert [answer["token"] for answer in answers] == best.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-4)


CLASSIFIER, ANSWERS = transformers.AutoModelForSequenceClassification, transformers.AutoModelForQuestionAnswering


@pytest.mark.parametrize(
    ("cls", "head", "labels"),
    [
        (CLASSIFIER, {"bert.pooler.dense", "classifier"}, {"labels": torch.tensor([0, 2])}),
        (ANSWERS, {"qa_outputs"}, {"start_positions": torch.tensor([1, 99]), "end_positions": torch.tensor([2, 3])}),
    ],
)
def test_heads_train_and_are_saved_with_their_code(
    cls: Any, head: set[str], labels: dict[str, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    settings = {"num_labels": 3} if cls is CLASSIFIER else {}
    model, info = cls.from_pretrained(folder, output_loading_info=True, **settings)
    assert set(info["missing_keys"]) == {f"{name}.{kind}" for name in head for kind in ("weight", "bias")}
    ids = torch.tensor([[3, 20, 21, 22, 4], [3, 23, 24, 25, 4]])
    loss = model.eval()(ids, **labels).loss
    loss.backward()
    loss = loss.detach()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused
    with torch.no_grad():
        logits = model(ids)
        if cls is CLASSIFIER:
            pooled = torch.tanh(model.bert.pooler.dense(model.bert(ids)[0][:, 0]))
            expected = model.classifier(pooled)
            torch.testing.assert_close(logits.logits, expected)
            assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(expected, labels["labels"])))
        else:
            scores = model.qa_outputs(model.bert(ids)[0])
            torch.testing.assert_close(torch.stack([logits.start_logits, logits.end_logits], -1), scores)
            # a start outside the text does not count
            start, end = (torch.nn.functional.cross_entropy(scores[..., i][n], labels[k][n]) for i, n, k in (
                (0, slice(1), "start_positions"), (1, slice(2), "end_positions")))  # fmt: skip
            assert float(loss) == pytest.approx(float(start + end) / 2)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_pmlm.py").read_bytes() == (folder / "modeling_pmlm.py").read_bytes()
    again = cls.from_pretrained(tmp_path / "saved")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([0.5, 2.0]), lambda z, y: ((z[:, 0] - y) ** 2).mean()),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_labels_choose_regression_or_several_classes(labels: torch.Tensor, expected: Any, folder: Path) -> None:
    num_labels = labels[0].numel()
    model = CLASSIFIER.from_pretrained(folder, num_labels=num_labels).eval()
    output = model(torch.tensor([[3, 20, 4], [3, 23, 4]]), labels=labels)
    assert float(output.loss.detach()) == pytest.approx(float(expected(output.logits.detach(), labels)), rel=1e-5)


ELSEWHERE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("data_prep", "pretrain", "finetune"):
            raise ImportError(f"{name} is of the repository")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(*map(list, zip(*texts)), padding=True, return_tensors="pt")
with torch.no_grad():
    torch.save([dict(batch), model(**batch).logits], sys.argv[3] + "/result.pt")
model.save_pretrained(sys.argv[3] + "/saved")
AutoModelForMaskedLM.from_pretrained(sys.argv[3] + "/saved", trust_remote_code=True)
print(type(model).__module__.partition(".")[0])
"""


@pytest.mark.slow
def test_the_folder_loads_where_this_repository_is_not(sentence_piece: Tokenizer, tmp_path: Path) -> None:
    export, moved = tmp_path / "export", tmp_path / "moved"
    write_export(export, stored(sentence_piece))
    convert(ConvertSettings(export, moved, "huggingface"))
    done = run_command(
        [sys.executable, "-P", "-c", ELSEWHERE, str(moved), json.dumps(PAIRS), str(tmp_path)],
        cwd=tmp_path, PYTHONPATH="", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "transformers_modules"
    batch, logits = torch.load(tmp_path / "result.pt", weights_only=True)
    expected = our_logits(export, batch)
    torch.testing.assert_close(logits[batch["attention_mask"].bool()], expected, rtol=0, atol=1e-5)
    assert (tmp_path / "saved" / "modeling_pmlm.py").is_file()


def our_targets(export: Path, batch: Any, settings: SearchSettings) -> list[list[tuple[int, ...]]]:
    """Of each of the batch's texts."""
    model = load_pretrained(export).model
    sources = [row[keep].tolist() for row, keep in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
    rules = Rules.of(load_pretrained(export).tokenizer, settings)
    return [[h.tokens for h in found.hypotheses] for found in decode(model, rules, sources, settings)]


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        (SearchSettings(num_beams=1, max_length_tokens=10), {}),
        (SearchSettings(num_beams=4, num_best=3, max_length_tokens=10, length_penalty=0.7), {"length_penalty": 0.7}),
        (
            SearchSettings(num_beams=3, max_length_tokens=12, no_repeat_ngram=2, min_length_tokens=5),
            {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
        ),
    ],
)
def test_generate_writes_what_we_write(
    settings: SearchSettings, theirs: dict[str, Any], export: Path, folder: Path
) -> None:
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([a for a, _ in PAIRS], padding=True, return_tensors="pt")
    assert 0 in batch["attention_mask"]
    expected = our_targets(export, batch, settings)
    for use_cache in (True, False):
        written = model.generate(
            **batch, num_beams=settings.num_beams, num_return_sequences=settings.num_best, do_sample=False,
            max_new_tokens=settings.max_length_tokens, use_cache=use_cache, **theirs,
        )  # fmt: skip
        found = []
        for row in written[:, 1:].tolist():
            stop = row.index(tokenizer.sep_token_id) if tokenizer.sep_token_id in row else len(row)
            found.append(tuple(row[:stop]))
        assert found == [tokens for of_source in expected for tokens in of_source]


def test_the_loss_of_labels_is_that_of_our_layout(export: Path, folder: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ours = load_pretrained(export).model
    sources, targets = [[3, 20, 21, 22, 4], [3, 23, 4]], [[24, 25, 4], [26, 4]]
    layout = seq2seq_layout(sources, targets, mask_id=load_pretrained(export).tokenizer.mask_id)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(ours.predict(ours.encode_predicted(layout)), layout.targets_T)
        loss = model(
            torch.tensor([sources[0], [*sources[1], 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
            labels=torch.tensor([targets[0], [*targets[1], -100]]),
        ).loss  # fmt: skip
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_position_ids_are_honoured(export: Path, folder: Path) -> None:
    """Two texts in one row, each at its own positions and hidden from the other, are the two texts."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.arange(6, 18)[None]
    shifted = torch.arange(3, 15)[None]
    with torch.no_grad():
        plain, same, moved = (model(ids, position_ids=p).logits for p in (None, torch.arange(12)[None], shifted))
        after = model(torch.cat([torch.full((1, 3), 6), ids], dim=1), torch.tensor([[0] * 3 + [1] * 12])).logits[:, 3:]
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, moved, atol=1e-3)
    torch.testing.assert_close(moved, after, rtol=0, atol=1e-5)
    gaps = torch.arange(0, 24, 2)[None]
    with torch.no_grad():
        with_gaps = model(ids, position_ids=gaps).logits
        spread = torch.full((1, 23), 6).index_copy(1, gaps[0], ids)
        is_text = torch.zeros(1, 23, dtype=torch.long).index_fill(1, gaps[0], 1)
        expected = model(spread, is_text).logits[:, ::2]
    torch.testing.assert_close(with_gaps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("auto", "arguments", "word"),
    [
        ("AutoModelForMaskedLM", {"output_attentions": True}, "output_attentions"),
        ("AutoModel", {"head_mask": torch.ones(2)}, "head_mask"),
        ("AutoModelForSequenceClassification", {"output_attentions": True}, "output_attentions"),
        ("AutoModelForQuestionAnswering", {"encoder_hidden_states": torch.ones(1)}, "encoder_hidden_states"),
        ("AutoModelForSeq2SeqLM", {"labels": torch.ones(1, 2).long(), "output_attentions": True}, "output_attentions"),
        ("AutoModelForSeq2SeqLM", {"labels": torch.ones(1, 2).long(), "decoder_position_ids": torch.ones(1, 2)}, "decoder_position_ids"),
    ],
)  # fmt: skip
def test_arguments_without_effect_are_refused(auto: str, arguments: dict[str, Any], word: str, folder: Path) -> None:
    model = getattr(transformers, auto).from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{word}: "):
        model(torch.arange(6, 12)[None], **arguments)
    assert not model.accepts_loss_kwargs
