"""The model card of a folder for transformers: README.md, with what the model is for and code that runs as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.search_settings import SearchSettings

_FOLDER = '\n\nMODEL = "my_model"  # this folder\n'


@dataclass(frozen=True)
class Purpose:
    """The task of a model in a folder for transformers."""

    architecture: str
    """Its class in finetune/modeling_pmlm.py."""
    pipeline_tag: str
    """The task's name at Hugging Face."""
    example: str
    """Python code that uses the model, in the folder MODEL."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json for this task."""
    max_length_tokens: int | None = None
    """Longest input the model was trained on, special tokens included; None: as many tokens as there are positions."""
    search: SearchSettings = field(default_factory=SearchSettings)
    """How targets are decoded."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the best validation; empty where they are not known."""


def masked_lm() -> Purpose:
    """Return the purpose of a pre-trained model."""
    return Purpose("PMLMForMaskedLM", "fill-mask", """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model=MODEL, trust_remote_code=True)
print(fill_mask("a single man in " + fill_mask.tokenizer.mask_token + " of a good fortune"))
""", search=SearchSettings(num_beams=1))  # fmt: skip


def classification(
    labels: tuple[str, ...], is_of_pairs: bool, max_length_tokens: int, metrics: Mapping[str, float]
) -> Purpose:
    """Return the purpose of a model of classes, or of a number if there are no labels."""
    text = '{"text": "It is raining.", "text_pair": "The ground is wet."}' if is_of_pairs else '"It is a truth."'
    extra = "" if labels else ', function_to_apply="none"'
    config: dict[str, Any] = {"problem_type": "regression", "id2label": {"0": "number"}, "label2id": {"number": 0}}
    if labels:
        config = {
            "problem_type": "single_label_classification",
            "id2label": {str(place): label for place, label in enumerate(labels)},
            "label2id": {label: place for place, label in enumerate(labels)},
        }
    example = f"""\
from transformers import pipeline

classify = pipeline("text-classification", model=MODEL, trust_remote_code=True)
print(classify({text}, truncation=True{extra}))
"""
    return Purpose(
        "PMLMForSequenceClassification", "text-classification", example, config, max_length_tokens, metrics=metrics
    )


def question_answering(
    threshold: float | None, max_answer_tokens: int, max_length_tokens: int, metrics: Mapping[str, float]
) -> Purpose:
    """Return the purpose of a model that finds answers; `threshold`: see finetune.answer_model.Answerer."""
    example = f"""\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model = AutoModelForQuestionAnswering.from_pretrained(MODEL, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
question, passage = "Who wrote it?", "It was written by Jane Austen in 1813."
batch = tokenizer(question, passage, truncation="only_second", return_offsets_mapping=True, return_tensors="pt")
offsets = batch.pop("offset_mapping")[0].tolist()
with torch.no_grad():
    output = model(**batch)
# the best first and last token of the passage, at most {max_answer_tokens} tokens
is_passage = torch.tensor([part == 1 for part in batch.sequence_ids(0)])
scores = output.start_logits[0][:, None] + output.end_logits[0]
is_span = (is_passage[:, None] & is_passage).triu().tril({max_answer_tokens - 1})
score, place = scores.masked_fill(~is_span, -torch.inf).flatten().max(dim=0)
first, last = divmod(int(place), len(is_passage))
answer = passage[offsets[first][0] : offsets[last][1]].strip()
# the first token's scores say that there is no answer
threshold = model.config.no_answer_threshold
if threshold is not None and scores[0, 0] - score > threshold:
    answer = ""
print(answer)
"""
    return Purpose(
        "PMLMForQuestionAnswering", "question-answering", example, {"no_answer_threshold": threshold}, max_length_tokens,
        metrics=metrics,
    )  # fmt: skip


def writing(search: SearchSettings, max_source_tokens: int, metrics: Mapping[str, float]) -> Purpose:
    """Return the purpose of a model that writes a target for a source."""
    return Purpose("PMLMForConditionalGeneration", "text2text-generation", """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained(MODEL, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
batch = tokenizer(["It is a truth universally acknowledged."], truncation=True, padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
""", {}, max_source_tokens, search, metrics)  # fmt: skip


def model_card(purpose: Purpose, origin: Mapping[str, Any]) -> str:
    """Return README.md of a folder, wherever it lies; `origin`: see StoredModel."""
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {purpose.pipeline_tag}", "tags:", "- pmlm", "- unilm", "---", "",
        "# Pseudo-masked language model", "",
        "A pseudo-masked language model (UniLMv2, [Bao et al., 2020](https://arxiv.org/abs/2002.12804)): a Transformer encoder with",
        "BERT's names and T5's relative position bias. The folder holds its code (`modeling_pmlm.py`), which transformers runs if",
        "`trust_remote_code=True` is given.", "",
        "```python", purpose.example.rstrip().replace("\n\n", _FOLDER, 1), "```", "",
    ]  # fmt: skip
    if labels := purpose.config.get("id2label"):
        names = list(labels.values())
        lines += [f"Classes, in the order of the logits ({len(names)}):" if len(names) > 1 else "One logit, the predicted number.", ""]  # fmt: skip
        if len(names) > 1:
            lines += ["```json", json.dumps(names, ensure_ascii=False), "```", ""]
    if purpose.max_length_tokens is not None:
        lines += [f"Trained on inputs of at most {purpose.max_length_tokens} tokens, special tokens included.", ""]
    if purpose.metrics:
        lines += ["| metric in validation | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in purpose.metrics.items()]
        lines.append("")
    if origin:
        lines += ["Pre-training: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in origin.items()) + ".", ""]  # fmt: skip
    return "\n".join(lines)
