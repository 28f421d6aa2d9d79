"""python -m pretrain.export: a run's newest whole checkpoint as a model that fine-tuning opens.

    EXPORT/config.json          sizes, and the special ids
    EXPORT/model.safetensors    fp32 weights, named as in the released UniLMv2 checkpoints
    EXPORT/tokenizer.model      or tokenizer.json, which config.json tells

The output embedding is the word embedding; it is stored once.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from data_prep.console import ArgumentParser, run_command
from data_prep.files import read_json, sync_directory, write_json, write_whole
from data_prep.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint import SHARDS, newest_whole
from pretrain.model import PMLM, PMLMConfig
from pretrain.partitions import Partitions

FORMAT = "pmlm"
VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_TIED = "cls.predictions.decoder.weight"


def export(run: Path, output: Path) -> int:
    """Write the run's newest whole checkpoint to the folder `output`; returns its step.

    Raises ValueError if there is no such checkpoint or `output` exists.
    """
    checkpoint, _ = newest_whole(run)
    if checkpoint is None:
        raise ValueError(f"{run}: no checkpoint there; train first, with `--run {run}`")
    if output.exists():
        raise ValueError(f"{output}: exists already; remove it or choose another --output")
    identity = checkpoint.manifest["identity"]
    tokenizer = load_tokenizer(run / identity["tokenizer_file"])
    if tokenizer.sha256 != identity["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer.path}: not the tokenizer this run was trained with; copy it from the data set")
    weights = Partitions(checkpoint.folder / SHARDS).weights()
    stored = {name: tensor.contiguous() for name, tensor in weights.items() if name != _TIED}
    unfinished = output.with_name(f".{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_whole(unfinished / WEIGHTS, save(stored))
        write_whole(unfinished / tokenizer.file_name, tokenizer.path.read_bytes())
        write_json(unfinished / CONFIG, {
            "format": FORMAT, "version": VERSION, "model": identity["model"], "objective": identity["objective"],
            "special_ids": {name: getattr(tokenizer, f"{name}_id") for name in ("pad", "unk", "sos", "eos", "mask")},
            "tokenizer_file": tokenizer.file_name, "tokenizer_sha256": tokenizer.sha256,
            "trained_steps": checkpoint.step, "trained_samples": checkpoint.samples_consumed,
        })  # fmt: skip
    except OSError:
        shutil.rmtree(unfinished)
        raise
    unfinished.rename(output)
    sync_directory(output.parent)
    return checkpoint.step


def load_exported(folder: Path) -> tuple[PMLM, Tokenizer]:
    """The model (fp32, in eval mode) and tokenizer of an export.

    Raises ValueError, naming file and tensor, for what is missing, extra or misshapen.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(f"{folder / CONFIG}: not a {FORMAT} export of version {VERSION}")
    tokenizer = load_tokenizer(folder / config["tokenizer_file"])
    if tokenizer.sha256 != config["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer.path}: not the tokenizer this model was trained with")
    model = PMLM(PMLMConfig(**config["model"]))
    weights = load_file(folder / WEIGHTS)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != _TIED}
    faults = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    faults += [f"{name} is not expected" for name in weights.keys() - expected.keys()]
    faults += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if faults:
        raise ValueError(f"{folder / WEIGHTS}: {'; '.join(sorted(faults))}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval(), tokenizer


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
