"""Convert a model from one form to another; nothing of it changes.

    pmlm           our export, which fine-tuning opens, as does every other form here
    unilm          the released UniLMv2's names: pytorch_model.bin (or model.safetensors), config.json, vocab.txt
    huggingface    a folder for transformers, with its code, a fast tokenizer and a model card

--input takes each of them, a run's folder, a checkpoint, and BERT's weights. Fine-tuned models go to huggingface, with their output
layers and labels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import nn

from data_prep.console import ArgumentParser, add_flags
from data_prep.files import write_json, write_whole
from data_prep.tokenizer import WordPiece
from finetune.answer_model import Answerer, SpanClassifier
from finetune.classify_model import Classifier, SequenceClassifier
from finetune.fast_tokenizer import is_lowercase
from finetune.huggingface import unilm_config, write_huggingface
from finetune.model import model_folder
from finetune.model_card import Purpose, classification, question_answering, writing
from finetune.processes import Processes
from finetune.runs import from_flags, say
from finetune.seq2seq_model import load_seq2seq
from finetune.trainer import MODEL, read_result
from finetune.weights import fine_tuned_kind, read_pretrained, with_head
from pretrain.export import CONFIG, TIED, WEIGHTS, StoredModel, refuse_existing, unfinished_folder, write_export

Form = Literal["pmlm", "unilm", "huggingface"]


@dataclass(frozen=True)
class ConvertSettings:
    """What is converted to what."""

    input: Path
    """Export, run's folder, checkpoint, or folder or file of UniLM's, BERT's or transformers' weights."""
    output: Path
    """Folder to write; must not exist."""
    to: Form
    """Form to write."""
    tokenizer: Path | None = None
    """SentencePiece model, tokenizer.json or BERT vocab.txt of weights that have none beside them."""
    safetensors: bool = False
    """For --to unilm: model.safetensors in place of pytorch_model.bin."""

    def __post_init__(self) -> None:
        if self.safetensors and self.to != "unilm":
            raise ValueError(f"--safetensors: is for --to unilm; --to {self.to} writes no other weights")


def convert(settings: ConvertSettings) -> tuple[str, ...]:
    """Convert; returns notes on what of the input was not used or had to be made up.

    Raises ValueError or OSError for an input that does not fit, and for an output that exists.
    """
    refuse_existing(settings.output)
    if (kind := fine_tuned_kind(settings.input)) is not None and settings.to == "huggingface":
        if settings.tokenizer is not None:
            raise ValueError(f"--tokenizer: {settings.input} has its own tokenizer; leave the flag out")
        write_huggingface(settings.output, *read_fine_tuned(settings.input, kind))
        return ()
    stored, notes = read_pretrained(settings.input, tokenizer=settings.tokenizer)
    stored = with_head(stored)
    stored.load()  # refuses what does not fit
    write: dict[Form, Callable[[Path, StoredModel], None]] = {
        "pmlm": write_export, "huggingface": write_huggingface,
        "unilm": lambda output, stored: write_unilm(output, stored, safetensors=settings.safetensors),
    }  # fmt: skip
    write[settings.to](settings.output, stored)
    return notes


def read_fine_tuned(path: Path, kind: str) -> tuple[StoredModel, Purpose]:
    """Return a fine-tuned model with its output layers, named as transformers' BERT names them, and what it is for.

    A regressor's output layer is scaled, so that it gives numbers as `predict` does. Raises ValueError or OSError for a damaged one.
    """
    folder = model_folder(path)
    result = read_result(folder.parent) if folder.name == MODEL else None
    metrics = {k: v for k, v in (result["best"] if result else {}).items() if k not in ("step", "epoch", "score")}
    model: nn.Module
    if kind == SequenceClassifier.kind:
        classifier = Classifier.load(path, Processes())
        model, tokenizer, target = classifier.model, classifier.tokenizer, classifier.target
        with torch.no_grad():
            model.classifier.weight *= target.scale
            model.classifier.bias.copy_(model.classifier.bias * target.scale + target.mean)
        purpose = classification(target.labels, classifier.is_of_pairs, classifier.max_length_tokens, metrics)
    elif kind == SpanClassifier.kind:
        answerer = Answerer.load(path, Processes())
        model, tokenizer = answerer.model, answerer.tokenizer
        purpose = question_answering(
            answerer.threshold, answerer.settings.max_answer_tokens, answerer.max_length_tokens, metrics
        )
    else:
        model, tokenizer, task = load_seq2seq(path)
        purpose = writing(task.search(), task.max_source_tokens, metrics)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return StoredModel(folder, model.config, weights, tokenizer), purpose


def write_unilm(output: Path, stored: StoredModel, *, safetensors: bool = False) -> None:
    """Write the folder `output`, whole, as UniLMv2 was released."""
    tokenizer, words = stored.tokenizer, stored.weights["bert.embeddings.word_embeddings.weight"]
    weights = {
        name: tensor.reshape(1, 1, -1).clone() if name.endswith(("q_bias", "v_bias")) else tensor.contiguous()
        for name, tensor in stored.weights.items()
    }
    with unfinished_folder(output) as folder:
        if safetensors:
            write_whole(folder / WEIGHTS, save({**weights, TIED: words.clone()}, metadata={"format": "pt"}))
        else:
            content = io.BytesIO()
            torch.save({**weights, TIED: words}, content)
            write_whole(folder / "pytorch_model.bin", content.getvalue())
        write_whole(folder / tokenizer.file_name, tokenizer.path.read_bytes())
        if isinstance(tokenizer, WordPiece):
            entries = (tokenizer.piece(token_id) for token_id in range(tokenizer.vocab_size))
            write_whole(folder / "vocab.txt", "".join(f"{entry}\n" for entry in entries).encode())
            write_json(folder / "tokenizer_config.json", {"do_lower_case": is_lowercase(tokenizer)})
        write_json(folder / CONFIG, unilm_config(stored, tokenizer.file_name))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `python -m finetune convert`."""
    add_flags(parser, ConvertSettings)


def run(args: Any, processes: Processes) -> None:
    """Run `python -m finetune convert`."""
    if not processes.is_first:
        return
    settings = from_flags(args, ConvertSettings)
    say(processes, *convert(settings))
    print(f"{settings.output}: written")
