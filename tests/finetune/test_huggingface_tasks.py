"""Fine-tuned models as folders for transformers: the same numbers, names of classes, and code in the model card that runs."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import stored
from support import run_command

from data_prep.tokenizer import Tokenizer
from finetune.answer_data import AnswerSettings
from finetune.answer_model import Answerer
from finetune.classify_data import Target
from finetune.classify_model import Classifier
from finetune.convert import ConvertSettings, convert
from finetune.huggingface import register
from finetune.processes import Processes
from finetune.seq2seq_data import Seq2SeqSettings
from finetune.seq2seq_model import Seq2SeqModel, Writer, save_seq2seq

TEXTS = [
    "a man in want of a wife",
    "good",
    "It is a truth (universally) acknowledged, that a single man must be in want",
]
SECOND = ["the truth of it is in the wife, and the man", "and for, it is!", "good"]
LABELS = ("Austen", "Bierce", "neither $1")
PASSAGE = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def classifier(tokenizer: Tokenizer, run: Path, target: Target, is_of_pairs: bool = False) -> Classifier:
    """Save one with random weights as a run's model."""
    made = Classifier.make(
        stored(tokenizer).load(), tokenizer, target, 24, Processes(), seed=0, is_of_pairs=is_of_pairs
    )
    with torch.no_grad():
        made.model.classifier.bias += torch.linspace(-0.5, 0.5, target.num_outputs)
    (run / "model").mkdir(parents=True)
    made.save(run / "model")
    return made


@pytest.mark.parametrize("is_of_pairs", [False, True])
def test_a_classifier_has_our_logits_and_labels(tokenizer: Tokenizer, is_of_pairs: bool, tmp_path: Path) -> None:
    ours = classifier(tokenizer, tmp_path / "run", Target(LABELS), is_of_pairs)
    convert(ConvertSettings(tmp_path / "run", tmp_path / "hf", "huggingface"))
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.id2label == dict(enumerate(LABELS))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    second = SECOND if is_of_pairs else None
    batch = theirs(TEXTS, second, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 24, "the longest text is to be cut"
    inputs = ours.inputs(TEXTS, second)
    for row, keep, sample in zip(batch["input_ids"], batch["attention_mask"].bool(), inputs.ids, strict=True):
        assert row[keep].tolist() == sample.tolist()
    ours.model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(**batch).logits.numpy(), ours.outputs(inputs), rtol=0, atol=1e-5)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=theirs)
    asked: Any = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, SECOND, strict=True)] if is_of_pairs else TEXTS
    found = [pipe(one, truncation=True) for one in asked]
    found = [one[0] if isinstance(one, list) else one for one in found]
    assert [one["label"] for one in found] == ours.predict(TEXTS, second)
    best = ours.probabilities(TEXTS, second).max(axis=1)
    assert [one["score"] for one in found] == pytest.approx(best.tolist(), abs=1e-5)


def test_a_regressor_gives_our_numbers(sentence_piece: Tokenizer, tmp_path: Path) -> None:
    ours = classifier(sentence_piece, tmp_path / "run", Target(mean=2.5, scale=1.7))
    convert(ConvertSettings(tmp_path / "run", tmp_path / "hf", "huggingface"))
    pipe = transformers.pipeline(
        "text-classification", model=str(tmp_path / "hf"), tokenizer=str(tmp_path / "hf"), function_to_apply="none"
    )
    assert pipe.model.config.problem_type == "regression"
    assert [one["score"] for one in pipe(TEXTS, truncation=True)] == pytest.approx(ours.predict(TEXTS), abs=1e-5)
    one = pipe.tokenizer([TEXTS[0]], return_tensors="pt")
    loss = pipe.model.eval()(**one, labels=torch.tensor([1.0])).loss
    assert float(loss) == pytest.approx((float(ours.predict(TEXTS[:1])[0]) - 1.0) ** 2, rel=1e-4)


def answerer(tokenizer: Tokenizer, run: Path, threshold: float | None) -> Answerer:
    """Save one with random weights as a run's model."""
    made = Answerer.make(
        stored(tokenizer, max_positions=128).load(), tokenizer, 128, AnswerSettings(32, max_answer_tokens=12), Processes(), 0
    )  # fmt: skip
    with torch.no_grad():
        made.model.qa_outputs.weight *= 20
    made.threshold = threshold
    (run / "model").mkdir(parents=True)
    made.save(run / "model")
    return made


def test_an_answerer_has_our_scores(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = answerer(tokenizer, tmp_path / "run", 0.5)
    convert(ConvertSettings(tmp_path / "run", tmp_path / "hf", "huggingface"))
    model, info = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    assert model.config.no_answer_threshold == 0.5
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = theirs("Who wants a wife?", PASSAGE, return_tensors="pt")
    from finetune.squad import Question

    windows = ours.windows([Question("", "Who wants a wife?", PASSAGE, (), None)])
    assert batch["input_ids"][0].tolist() == windows.ids(0)
    ours.model.eval()
    with torch.no_grad():
        expected = ours.model(windows.layout([0]))
        output = model(**batch)
    scores = torch.stack([output.start_logits[0], output.end_logits[0]], -1)[windows.needed(0)]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


ELSEWHERE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("data_prep", "pretrain", "finetune"):
            raise ImportError(f"{name} is of the repository")

sys.meta_path.insert(0, Refuse())
for path in sys.argv[1:]:
    exec(open(path).read())
"""


def example(folder: Path) -> Path:
    """Return a file of the model card's code, for this folder's name."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    assert 'MODEL = "my_model"' in code[1]
    path = folder.with_name(f"{folder.name}.py")
    path.write_text(code[1].replace("my_model", folder.name, 1), "utf-8")
    return path


@pytest.mark.slow
def test_the_model_cards_run_where_this_repository_is_not(sentence_piece: Tokenizer, tmp_path: Path) -> None:
    of_class = classifier(sentence_piece, tmp_path / "run_class", Target(LABELS))
    of_number = classifier(sentence_piece, tmp_path / "run_number", Target(mean=2.5, scale=1.7))
    of_pairs = classifier(sentence_piece, tmp_path / "run_pairs", Target(LABELS), is_of_pairs=True)
    of_answer = answerer(sentence_piece, tmp_path / "run_answer", None)
    answerer(sentence_piece, tmp_path / "run_none", -1e6)
    made = stored(sentence_piece)
    (tmp_path / "run_writer" / "model").mkdir(parents=True)
    save_seq2seq(
        tmp_path / "run_writer" / "model", Seq2SeqModel(made.load()), sentence_piece, Seq2SeqSettings(16, 12, num_beams=3)
    )  # fmt: skip
    files = []
    for name in ("class", "number", "pairs", "answer", "none", "writer"):
        convert(ConvertSettings(tmp_path / f"run_{name}", tmp_path / name, "huggingface"))
        files.append(str(example(tmp_path / name)))
    done = run_command(
        [sys.executable, "-P", "-c", ELSEWHERE, *files], cwd=tmp_path, PYTHONPATH="", HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = "It is a truth."
    said = done.stdout.splitlines()
    assert f"'{of_class.predict([text])[0]}'" in said[0]
    number = re.search(r"'score': (\S+)}", said[1])
    assert number is not None
    assert float(number[1]) == pytest.approx(of_number.predict([text])[0], abs=1e-5)
    assert f"'{of_pairs.predict(['It is raining.'], ['The ground is wet.'])[0]}'" in said[2]
    assert said[3] == of_answer.predict("Who wrote it?", "It was written by Jane Austen in 1813.").text != ""
    assert said[4] == ""
    writer = Writer.load(tmp_path / "run_writer")
    assert said[5] == str(writer.write(["It is a truth universally acknowledged."]))


def test_the_card_names_classes_and_metrics(sentence_piece: Tokenizer, tmp_path: Path) -> None:
    classifier(sentence_piece, tmp_path / "run", Target(LABELS))
    best = {"step": 3, "epoch": 1.0, "score": 0.8125, "accuracy": 0.8125}
    (tmp_path / "run" / "result.json").write_text(json.dumps({"best": best, "identity": {}}))
    convert(ConvertSettings(tmp_path / "run", tmp_path / "hf", "huggingface"))
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    assert '["Austen", "Bierce", "neither $1"]' in card
    assert "| accuracy | 0.8125 |" in card
    assert "| step |" not in card


@pytest.mark.parametrize("to", ["pmlm", "unilm"])
def test_a_classifier_has_no_other_form(to: Any, sentence_piece: Tokenizer, tmp_path: Path) -> None:
    classifier(sentence_piece, tmp_path / "run", Target(LABELS))
    with pytest.raises(ValueError, match=r"run: is what `python -m finetune classify` writes; expected"):
        convert(ConvertSettings(tmp_path / "run", tmp_path / "other", to))
    assert not (tmp_path / "other").exists()


HEADS = (
    "Model",
    "ModelForMaskedLM",
    "ModelForSequenceClassification",
    "ModelForQuestionAnswering",
    "ModelForSeq2SeqLM",
)


@pytest.fixture(scope="module")
def folder(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("huggingface") / "model"
    convert(ConvertSettings(export, folder, "huggingface"))
    return folder


@pytest.mark.parametrize("head", HEADS)
def test_tokens_can_be_added_in_every_head(head: str, folder: Path, tmp_path: Path) -> None:
    cls = getattr(transformers, f"Auto{head}")
    model = cls.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    num_before = len(tokenizer)

    def given(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"labels": ids} if head == "ModelForSeq2SeqLM" else {}

    with torch.no_grad():
        ids = tokenizer("the man in want", return_tensors="pt")["input_ids"]
        before = model(ids, **given(ids), return_dict=True)
        assert tokenizer.add_tokens(["<one>", "<two>", "<three>"]) == 3
        model.resize_token_embeddings(len(tokenizer))
        after = model(ids, **given(ids), return_dict=True)
        more = tokenizer("the <two> in want", return_tensors="pt")["input_ids"]
        assert num_before + 1 in more.tolist()[0]
        model(more, **given(more))
    for name in before:
        if name == "loss":
            continue
        old, new = before[name], after[name]
        if name == "logits" and head in ("ModelForMaskedLM", "ModelForSeq2SeqLM"):
            assert new.shape[-1] == num_before + 3
            new = new[..., :num_before]
        if isinstance(old, torch.Tensor):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    again, info = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 1}, {"max_new_tokens": 4}])
def test_generate_warns_of_nothing(
    settings: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a man in want", "good"], padding=True, return_tensors="pt")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = model.generate(**batch, **settings)
    assert written.shape[1] <= 1 + settings.get("max_new_tokens", 20)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
