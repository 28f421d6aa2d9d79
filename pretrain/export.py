"""python -m pretrain.export: a run's newest whole checkpoint as a model that fine-tuning opens.

    EXPORT/config.json          sizes, and the special ids
    EXPORT/model.safetensors    fp32 weights, named as in the released UniLMv2 checkpoints
    EXPORT/tokenizer.model      or tokenizer.json, which config.json tells

The output embedding is the word embedding; it is stored once.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from data_prep.console import ArgumentParser, run_command
from data_prep.files import read_json, sync_directory, write_json, write_whole
from data_prep.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint import SHARDS, Checkpoint, newest_whole, read_checkpoint
from pretrain.model import PMLM, PMLMConfig
from pretrain.order import Cursor
from pretrain.partitions import Partitions

FORMAT = "pmlm"
VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TIED = "cls.predictions.decoder.weight"
POOLER = "bert.pooler."
_ORIGINS = ("objective", "trained_steps", "trained_samples")


@dataclass(frozen=True)
class StoredModel:
    """A model as files hold it."""

    file: Path
    """Where the weights are, for messages."""
    config: PMLMConfig
    weights: dict[str, torch.Tensor]
    """fp32, named as PMLM's own, without the output embedding, which is the word embedding. A pooler may be among them."""
    tokenizer: Tokenizer
    origin: dict[str, Any] = field(default_factory=dict)
    """How it was trained, where that is known: objective, trained_steps, trained_samples."""

    @property
    def pooler(self) -> dict[str, torch.Tensor]:
        """A BERT's layer for [SOS], which a PMLM has not and classification begins with: dense.weight and dense.bias, or nothing."""
        return {n.removeprefix(POOLER): tensor for n, tensor in self.weights.items() if n.startswith(POOLER)}

    def load(self) -> PMLM:
        """The model, in eval mode. Raises ValueError, naming file and tensor, for what is missing, extra or misshapen."""
        model = PMLM(self.config)
        parameters = dict(model.named_parameters())
        expected = {name: tuple(p.shape) for name, p in parameters.items()}
        refuse_unfit(self.file, self.weights, expected | (pooler_shapes(self.config) if self.pooler else {}))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
        return model.eval()


def pooler_shapes(config: PMLMConfig) -> dict[str, tuple[int, ...]]:
    """By name, of those that a pooler has."""
    size = config.hidden_size
    return {f"{POOLER}dense.weight": (size, size), f"{POOLER}dense.bias": (size,)}


def refuse_unfit(file: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError that names every tensor that is missing, extra or misshapen."""
    faults = [
        f"{name} is missing, expected with shape {list(expected[name])}" for name in expected.keys() - weights.keys()
    ]
    faults += [f"{name} is not expected" for name in weights.keys() - expected.keys()]
    faults += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if faults:
        raise ValueError(f"{file}: {'; '.join(sorted(faults))}")


def export(run: Path, output: Path) -> int:
    """Write the run's newest whole checkpoint to the folder `output`; returns its step.

    Raises ValueError if there is no such checkpoint or `output` exists.
    """
    refuse_existing(output)
    stored = read_run(run)
    write_export(output, stored)
    return int(stored.origin["trained_steps"])


def read_run(run: Path, checkpoint: Path | None = None) -> StoredModel:
    """The model in a run's newest whole checkpoint, or in the named one.

    Raises ValueError if there is no such checkpoint or the tokenizer is another.
    """
    found: Checkpoint | None = read_checkpoint(checkpoint) if checkpoint else newest_whole(run)[0]
    if found is None:
        raise ValueError(f"{run}: no checkpoint there; train first, with `--run {run}`")
    identity = found.manifest["identity"]
    tokenizer = load_tokenizer(run / identity["tokenizer_file"])
    if tokenizer.sha256 != identity["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer.path}: not the tokenizer this run was trained with; copy it from the data set")
    weights = Partitions(found.folder / SHARDS).weights()
    return StoredModel(
        found.folder, PMLMConfig(**identity["model"]), {n: t for n, t in weights.items() if n != TIED}, tokenizer,
        {"objective": identity["objective"], "trained_steps": found.step, "trained_samples": Cursor(identity["train_batch_size"], found.states["cursor"]).samples_consumed},
    )  # fmt: skip


def write_export(output: Path, stored: StoredModel) -> None:
    """Write the folder `output`, whole."""
    tokenizer = stored.tokenizer
    with unfinished_folder(output) as folder:
        write_whole(folder / WEIGHTS, save({name: tensor.contiguous() for name, tensor in stored.weights.items()}))
        write_whole(folder / tokenizer.file_name, tokenizer.path.read_bytes())
        write_json(folder / CONFIG, {
            "format": FORMAT, "version": VERSION, "model": asdict(stored.config),
            "special_ids": {name: getattr(tokenizer, f"{name}_id") for name in ("pad", "unk", "sos", "eos", "mask")},
            "tokenizer_file": tokenizer.file_name, "tokenizer_sha256": tokenizer.sha256, **stored.origin,
        })  # fmt: skip


def refuse_existing(output: Path) -> None:
    """Raises ValueError if there is something to overwrite."""
    if output.exists():
        raise ValueError(f"{output}: exists already; remove it or choose another --output")


@contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` if nothing is raised, and else goes."""
    refuse_existing(output)
    unfinished = output.with_name(f".{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    unfinished.rename(output)
    sync_directory(output.parent)


def is_export(folder: Path) -> bool:
    """Whether `write_export` made it."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return isinstance(config, dict) and config.get("format") == FORMAT


def read_export(folder: Path) -> StoredModel:
    """What `write_export` wrote. Raises ValueError for what is of another format, or lacks its tokenizer or weights."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(f"{folder / CONFIG}: not a {FORMAT} export of version {VERSION}")
    tokenizer = load_tokenizer(folder / config["tokenizer_file"])
    if tokenizer.sha256 != config["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer.path}: not the tokenizer this model was trained with")
    origin = {name: config[name] for name in _ORIGINS if name in config}
    return StoredModel(
        folder / WEIGHTS, PMLMConfig(**config["model"]), read_safetensors(folder / WEIGHTS), tokenizer, origin
    )


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file. Raises ValueError for what is no such file, or a damaged one."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); get or make it anew") from None


def load_exported(folder: Path) -> tuple[PMLM, Tokenizer]:
    """The model (fp32, in eval mode) and tokenizer of an export.

    Raises ValueError, naming file and tensor, for what is missing, extra or misshapen.
    """
    stored = read_export(folder)
    return stored.load(), stored.tokenizer


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m pretrain.export", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args()

    def command() -> None:
        step = export(args.run, args.output)
        print(f"{args.output}: the model after step {step}")

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
