"""Pre-trained weights of every kind as a PMLM: ours, released UniLM's, BERT's.

What a file calls a tensor decides where it goes; nothing is left over and nothing is guessed. Queries, keys and values may be
fused (`qkv_linear`) or separate, names with or without `bert.`, LayerNorm's numbers `weight`, `bias` or `gamma`, `beta`. A key
bias is dropped: it adds the same number to a query's scores of all keys, which the softmax cancels.
"""

from __future__ import annotations

import pickle
import re
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.files import read_json
from data_prep.import_tokenizer import import_tokenizer
from data_prep.tokenizer import Tokenizer, load_tokenizer
from finetune.model import KINDS, load_model, model_folder, model_kind
from finetune.seq2seq_model import Seq2SeqModel
from pretrain.checkpoint import MANIFEST, checkpoints_folder
from pretrain.export import (
    CONFIG,
    FORMAT,
    POOLER,
    TIED,
    StoredModel,
    is_export,
    pooler_shapes,
    read_export,
    read_run,
    read_safetensors,
    refuse_unfit,
)
from pretrain.model import PMLM, PMLMConfig

CONFIG_NAMES = {
    "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads", "intermediate_size": "intermediate_size", "max_positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob", "relative_buckets": "rel_pos_bins", "relative_max_distance": "max_rel_pos",
    "initializer_range": "initializer_range",
}  # fmt: skip
"""PMLMConfig's numbers as UniLM's and BERT's config.json name them."""
FIXED_CONFIG = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
"""What that file may say, and a PMLM always is."""
ORIGIN = "pmlm"
"""Under this key config.json keeps what is known only of our own models: StoredModel's origin, and the tokenizer's file."""
HEAD = "cls.predictions."
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "tokenizer.json", "vocab.txt")
_NOT_USED = re.compile(r"cls\.seq_relationship\..*|.*\.position_ids|.*\.token_type_ids")
_WORDS, _POSITIONS = "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"
_RELATIVE_BIAS = "bert.encoder.rel_pos_bias.weight"


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained model, in fp32 and eval mode, and what text goes through to it."""

    model: PMLM
    tokenizer: Tokenizer
    has_head: bool
    """Whether the output layer was pre-trained; else its weights are initial ones."""
    pooler: dict[str, torch.Tensor] = field(default_factory=dict)
    """See StoredModel."""
    notes: tuple[str, ...] = ()
    """What of the files was not used, or what they lacked and was made up, each in a line for the user."""


@dataclass
class _Found:
    """A foreign file's tensors under our names."""

    file: Path
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """What the file calls each."""
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def load_pretrained(
    path: Path, *, tokenizer: Path | None = None, max_positions: int | None = None, dropout: float | None = None
) -> Pretrained:
    """The model in an export, a run's folder, a checkpoint, a run of `finetune seq2seq`, or a folder or file of UniLM's or
    BERT's weights.

    `tokenizer` (a SentencePiece model, a .json of `import-tokenizer`, or a BERT vocab.txt) is for weights that have none
    beside them. Where `max_positions` is more than the position table has, the table is repeated. `dropout`: instead of the
    weights' own. Raises ValueError or OSError,
    naming file, tensor, what was found and what was expected.
    """
    stored, notes = read_pretrained(path, tokenizer=tokenizer)
    if max_positions is not None and max_positions > stored.config.max_positions:
        notes = (
            *notes,
            f"{stored.file}: its {stored.config.max_positions} positions are repeated up to {max_positions}",
        )
        stored = _with_positions(stored, max_positions)
    if dropout is not None:
        stored = replace(stored, config=replace(stored.config, dropout=dropout))
    has_head = any(name.startswith(HEAD) for name in stored.weights)
    return Pretrained(with_head(stored).load(), stored.tokenizer, has_head, stored.pooler, notes)


def read_pretrained(path: Path, *, tokenizer: Path | None = None) -> tuple[StoredModel, tuple[str, ...]]:
    """The same, not yet a model: the head's weights may all be missing. Also notes, as in Pretrained."""
    if not path.exists():
        raise FileNotFoundError(2, "no such folder or file of weights", str(path))
    if is_export(path) or (is_run := checkpoints_folder(path).is_dir()) or (path / MANIFEST).is_file():
        if tokenizer is not None:
            raise ValueError(f"--tokenizer {tokenizer}: {path} has its own tokenizer; leave the flag out")
        if is_export(path):
            return read_export(path), ()
        return (read_run(path) if is_run else read_run(path.parent.parent, checkpoint=path)), ()
    if (kind := fine_tuned_kind(path)) == Seq2SeqModel.kind:
        return _read_seq2seq(path), ()
    if kind is not None:
        raise ValueError(
            f"{path}: is {KINDS[kind]}; expected a pre-trained model, or one that `python -m finetune seq2seq` wrote"
        )
    return _read_foreign(path, tokenizer)


def fine_tuned_kind(path: Path) -> str | None:
    """Return the kind of a fine-tuned model, as config.json names it; None if `path` holds none."""
    try:
        kind = model_kind(path)
    except (OSError, ValueError):
        return None
    return kind if kind != FORMAT else None


def _read_seq2seq(path: Path) -> StoredModel:
    """Return what `python -m finetune seq2seq` wrote, which is a PMLM as well."""
    model, tokenizer, _ = load_model(path, Seq2SeqModel)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return StoredModel(model_folder(path), model.config, weights, tokenizer)


def with_head(stored: StoredModel) -> StoredModel:
    """The same with the output layer's initial weights, where it has none; always the same ones."""
    if any(name.startswith(HEAD) for name in stored.weights):
        return stored
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        numbers = replace(stored.config, num_layers=1)  # the head has the same size with fewer layers
        head = {name: p.detach() for name, p in PMLM(numbers).named_parameters() if name.startswith(HEAD)}
    return replace(stored, weights={**stored.weights, **head})


def _with_positions(stored: StoredModel, max_positions: int) -> StoredModel:
    table = stored.weights[_POSITIONS]
    repeated = table[torch.arange(max_positions) % len(table)]
    return replace(
        stored,
        config=replace(stored.config, max_positions=max_positions),
        weights={**stored.weights, _POSITIONS: repeated},
    )


def _read_foreign(path: Path, tokenizer_file: Path | None) -> tuple[StoredModel, tuple[str, ...]]:
    file = _weights_file(path) if path.is_dir() else path
    values = _read_config(file.parent / CONFIG)
    found = _renamed(file, _read_tensors(file))
    config = _config(found, values)
    _fit(found, config, values)
    origin = values.get(ORIGIN, {})
    tokenizer_file = tokenizer_file or _tokenizer_beside(file, values)
    tokenizer = _load_tokenizer(tokenizer_file)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{file}: has word embeddings for {config.vocab_size} tokens, and its tokenizer "
            f"{tokenizer_file} has {tokenizer.vocab_size}; pass the one it was trained with as --tokenizer"
        )
    origin = {key: value for key, value in origin.items() if key != "tokenizer_file"}
    return StoredModel(file, config, found.weights, tokenizer, origin), tuple(found.notes)


def _weights_file(folder: Path) -> Path:
    known = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    others = sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")])
    if known or len(others) == 1:
        return (known or others)[0]
    found = (
        f"has {len(others)}: {', '.join(file.name for file in others)}; name the one" if others else "has none of them"
    )
    raise ValueError(
        f"{folder}: expected an export, a run, a checkpoint, or weights named {' or '.join(_WEIGHT_FILES)}, and it {found}"
    )


def _read_config(file: Path) -> dict[str, Any]:
    values = read_json(file) if file.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds no JSON object; expected the configuration of a BERT or UniLM")
    faults = [
        f"{key} is {values[key]!r}, expected {expected!r}"
        for key, expected in {**FIXED_CONFIG, "position_embedding_type": "absolute"}.items()
        if values.get(key, expected) != expected
    ]
    if faults:
        raise ValueError(f"{file}: a PMLM cannot be this model: {'; '.join(faults)}")
    return values


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        weights: Any = read_safetensors(file)
    else:
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
            what = f"objects of {found[1] or found[2]}" if found else "something else, or is damaged"
            raise ValueError(
                f"{file}: expected tensors only, as torch saves them, and it holds {what}; files are never run as code: save the tensors "
                "(`state_dict()`) of the model in it anew, where you trust it, or get another file"
            ) from None
        except (RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it is empty"
            raise ValueError(
                f"{file}: not a complete file of tensors as torch saves them ({reason}); get or make it again"
            ) from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{file}: expected tensors by name, found {type(weights).__name__}, which holds other things")
    return dict(weights)


def _renamed(file: Path, weights: Mapping[str, torch.Tensor]) -> _Found:
    """The tensors under our names; what is known not to be needed is noted, the rest keeps its name, to be refused."""
    found = _Found(file)
    by_name: dict[str, torch.Tensor] = {}
    for given, tensor in weights.items():
        name = given if given.startswith(("bert.", "cls.")) or not given.startswith(_OF_BERT) else f"bert.{given}"
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        name = _RELATIVE_BIAS if name == "bert.rel_pos_bias.weight" else name
        if _NOT_USED.fullmatch(name):
            found.notes.append(f"{file}: {given} is not used")
        elif name in by_name:
            found.faults.append(f"{given} and {found.names[name]} are the same tensor's names")
        else:
            by_name[name] = tensor.float()
            found.names[name] = given
    _untie(found, by_name)
    dropped = [_merge_attention(found, by_name, prefix) for prefix in _attention_prefixes(by_name)]
    if count := sum(dropped):
        found.notes.append(f"{file}: {count} key biases are dropped; the softmax cancels them")
    found.weights.update(by_name)
    return found


_OF_BERT = ("embeddings.", "encoder.", "pooler.", "rel_pos_bias.")


def _untie(found: _Found, by_name: dict[str, torch.Tensor]) -> None:
    """The output embedding is the word embedding, and has one bias, whatever the file calls it."""
    bias = f"{HEAD}bias"
    if f"{HEAD}decoder.bias" in by_name:
        by_name.setdefault(bias, by_name[f"{HEAD}decoder.bias"])
    for copy, original in ((TIED, _WORDS), (f"{HEAD}decoder.bias", bias)):
        if copy in by_name and original in by_name and not torch.equal(by_name.pop(copy), by_name[original]):
            found.faults.append(
                f"{found.names[copy]} is not equal to {found.names[original]}, expected them to be tied"
            )


def _attention_prefixes(by_name: Mapping[str, torch.Tensor]) -> list[str]:
    matches = (re.match(r"bert\.encoder\.layer\.\d+\.attention\.self\.", name) for name in by_name)
    return list(dict.fromkeys(match[0] for match in matches if match))


def _merge_attention(found: _Found, by_name: dict[str, torch.Tensor], prefix: str) -> bool:
    """Make queries, keys and values one matrix, their biases flat, and none for keys; returns whether there was one."""

    def take(name: str) -> torch.Tensor | None:
        return by_name.pop(prefix + name, None)

    parts = {name: take(f"{name}.weight") for name in ("query", "key", "value")}
    given = [part for part in parts.values() if part is not None]
    shapes = {tuple(part.shape) for part in given}
    if given and prefix + "qkv_linear.weight" in by_name:
        found.faults.append(f"{prefix}qkv_linear.weight and separate query, key and value are both there")
    elif len(given) == 3 and len(shapes) == 1:
        by_name[f"{prefix}qkv_linear.weight"] = torch.cat(given)
    elif given:
        found.faults.append(
            "; ".join(f"{prefix}{name}.weight is {'missing' if part is None else f'of shape {list(part.shape)}'}"
                      for name, part in parts.items()) + "; expected three of one shape"
        )  # fmt: skip
    fused, dropped = take("qkv_linear.bias"), False
    if fused is not None:
        query, _, value = fused.flatten().chunk(3)
        by_name[f"{prefix}q_bias"], by_name[f"{prefix}v_bias"], dropped = query, value, True
    for ours, theirs in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
        for name in (ours, theirs):
            if (bias := take(name)) is not None:
                by_name[prefix + ours] = bias.flatten()
    for name in ("key.bias", "k_bias"):
        dropped |= take(name) is not None
    return dropped


def _config(found: _Found, values: Mapping[str, Any]) -> PMLMConfig:
    """From config.json; a number that is not in it from the tensors' shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
    layers = [int(m[1]) for name in shapes if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))]
    numbers: dict[str, Any] = {"num_layers": max(layers, default=-1) + 1}
    for name, tensor_name, place in (
        ("vocab_size", _WORDS, 0), ("hidden_size", _WORDS, 1), ("max_positions", _POSITIONS, 0),
        ("intermediate_size", "bert.encoder.layer.0.intermediate.dense.bias", 0), ("num_heads", _RELATIVE_BIAS, 0),
        ("relative_buckets", _RELATIVE_BIAS, 1),
    ):  # fmt: skip
        if len(shapes.get(tensor_name, ())) > place:
            numbers[name] = shapes[tensor_name][place]
    numbers |= {ours: values[theirs] for ours, theirs in CONFIG_NAMES.items() if theirs in values}
    needed = ("vocab_size", "hidden_size", "num_heads", "intermediate_size", "max_positions")
    if unknown := [name for name in needed if name not in numbers]:
        raise ValueError(
            f"{found.file}: neither its tensors nor {found.file.parent / CONFIG} tell {', '.join(unknown)}; expected the weights "
            f"of a BERT or UniLM, with a config.json that has {', '.join(CONFIG_NAMES[name] for name in unknown)}"
        )
    try:
        return PMLMConfig(**numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found.file.parent / CONFIG}: {error}") from None


def _fit(found: _Found, config: PMLMConfig, values: Mapping[str, Any]) -> None:
    """Make up what may be missing, and refuse what does not fit, by the names in the file."""
    file, weights = found.file, found.weights
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in PMLM(config).named_parameters()}
    if (
        _RELATIVE_BIAS in expected
        and _RELATIVE_BIAS not in weights
        and not values.get(CONFIG_NAMES["relative_buckets"])
    ):
        weights[_RELATIVE_BIAS] = torch.zeros(expected[_RELATIVE_BIAS])
        found.notes.append(f"{file}: has no relative position bias; it is zero")
    if not any(name.startswith(HEAD) for name in weights):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(HEAD)}
        found.notes.append(f"{file}: has no output layer ({HEAD}*)")
    if any(name.startswith(POOLER) for name in weights):
        expected |= pooler_shapes(config)
    faults = list(found.faults)
    try:
        refuse_unfit(file, {found.names.get(n, n): t for n, t in weights.items()}, {
            found.names.get(n, n): shape for n, shape in expected.items()
        })  # fmt: skip
    except ValueError as error:
        faults.append(str(error).removeprefix(f"{file}: "))
    if faults:
        raise ValueError(f"{file}: {'; '.join(faults)}")


def _tokenizer_beside(weights: Path, values: Mapping[str, Any]) -> Path:
    own = values.get(ORIGIN, {}).get("tokenizer_file")
    names = (own,) if own else _TOKENIZER_FILES
    found = [file for name in names if (file := weights.with_name(name)).is_file()]
    if not found:
        raise ValueError(f"{weights.parent}: has none of {', '.join(names)}; pass --tokenizer")
    return found[0]


def _load_tokenizer(path: Path) -> Tokenizer:
    if path.suffix != ".txt":
        return load_tokenizer(path)
    imported = tempfile.TemporaryDirectory(prefix="pmlm_tokenizer_")
    try:
        tokenizer = import_tokenizer(path, Path(imported.name) / "tokenizer.json", cased=_is_cased(path), pieces={})
    except BaseException:
        imported.cleanup()
        raise
    weakref.finalize(tokenizer, imported.cleanup)
    return tokenizer


def _is_cased(vocabulary: Path) -> bool:
    """As the tokenizer_config.json beside it says; else whether an entry has a capital letter."""
    config = vocabulary.with_name("tokenizer_config.json")
    values = read_json(config) if config.is_file() else {}
    if isinstance(values, dict) and isinstance(values.get("do_lower_case"), bool):
        return not values["do_lower_case"]
    entries = vocabulary.read_bytes().decode("utf-8", errors="replace").splitlines()
    return any(entry != entry.lower() for entry in entries if not re.fullmatch(r"\[.*\]", entry))
