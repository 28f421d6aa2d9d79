"""What a run is made of and where it runs, for the record of its start: settings, data, code, machine."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from data_prep.console import available_cores
from data_prep.files import sha256_of_file
from data_prep.shards import SPLITS, DataSet, manifest_path
from pretrain.config import Inputs
from pretrain.probe import REPOSITORY, code_hash, versions


def provenance(inputs: Inputs, hosts: list[str], device: str) -> dict[str, Any]:
    """`hosts`: of each rank; `device`: what it computes on. Every value is JSON's own."""
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(inputs.config).items()}
    return {
        "total_steps": inputs.total_steps,
        "precision": inputs.deepspeed.precision,
        "config": config,
        "model": asdict(inputs.model),
        "batch_sizes": asdict(inputs.batch_sizes),
        "deepspeed": inputs.deepspeed.values,
        "data": _describe_data(inputs.data),
        "code": {"commit": _commit(), "sha256": code_hash()},
        "machine": {
            "hosts": dict(Counter(hosts)), "device": device, "cores": available_cores(),
            "host_memory_bytes": psutil.virtual_memory().total, "versions": versions(),
        },
    }  # fmt: skip


def _describe_data(data: DataSet) -> dict[str, Any]:
    manifest = data.manifest
    return {
        "folder": str(data.folder.resolve()),
        "manifest_sha256": sha256_of_file(manifest_path(data.folder)),
        "parameters": data.parameters,
        "tokenizer": manifest["tokenizer"],
        "mixture": manifest.get("mixture", []),
        "splits": {
            split: {"num_samples": data.num_samples(split), "num_tokens": sum(s["num_tokens"] for s in manifest["splits"][split])}
            for split in SPLITS
        },
    }  # fmt: skip


def _commit() -> str:
    """As git describes the checkout, "-dirty" where files were changed; empty where there is no git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
