"""New mask sets for the samples of a data set, without tokenizing again."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data_prep.build import WORK, describe_masking, draw_mask_sets, is_made, number_of_sample
from data_prep.files import read_json, sha256_of_file, write_json, write_whole
from data_prep.inputs import copy_source_list
from data_prep.parameters import BuildParameters
from data_prep.processes import LOGS, Processes
from data_prep.progress import Stage, Work
from data_prep.shards import SPLITS, DataSet, Split, manifest_path, write_data_manifest, write_shard

REMASKED = ("mask_sets", "mask_rate", "block_share", "block_lengths", "seed")
"""The parameters that decide the masks."""


def remask(source: Path, folder: Path, changes: dict[str, Any], processes: Processes) -> bool:
    """Make the data set `folder` from `source`: the same samples, masks drawn anew.

    `changes` are of the parameters REMASKED; one that is None or left out stays as it is in `source`. Goes on where it was
    interrupted; returns False, having done nothing, if it is made already. Raises ValueError for a parameter that cannot be
    and if `folder` holds another data set.
    """
    data = DataSet(source)
    names = [field.name for field in fields(BuildParameters)]
    own = {name: data.parameters[name] for name in names if name in data.parameters}
    parameters = BuildParameters(**own | {name: value for name, value in changes.items() if value is not None})
    made_from = {
        "parameters": data.parameters | asdict(parameters),
        "remasked_from": {"sha256": sha256_of_file(manifest_path(source))},
    }
    if is_made(folder, made_from):
        return False
    work = folder / WORK
    processes.prepare(_set_up, source, folder, parameters, log_folder=folder / LOGS)
    shards = [(split, index) for split in SPLITS for index in range(len(data.manifest["splits"][split]))]
    entries = {(split, index): work / f"{_name(data, split, index)}.json" for split, index in shards}
    todo = [(*shard, entry) for shard, entry in entries.items() if not entry.exists()]
    total = sum(data.num_samples(split) for split in SPLITS)
    todo_samples = sum(data.manifest["splits"][split][index]["num_samples"] for split, index, _ in todo)
    processes.run(_remask_shard, todo, Stage("draw masks", total, "sample", total - todo_samples))
    splits = {split: [read_json(entries[s, i]) for s, i in shards if s == split] for split in SPLITS}
    write_whole(folder / data.tokenizer.path.name, data.tokenizer.path.read_bytes())
    copy_source_list(source, folder)
    content = {key: value for key, value in data.manifest.items() if key not in ("format", "version")}
    write_data_manifest(folder, {**content, **made_from, **describe_masking(parameters), "splits": splits})
    shutil.rmtree(work)
    return True


def _name(data: DataSet, split: Split, index: int) -> str:
    return str(data.manifest["splits"][split][index]["file"])


_worker: tuple[DataSet, Path, BuildParameters]


def _set_up(source: Path, folder: Path, parameters: BuildParameters) -> None:
    global _worker
    _worker = (DataSet(source), folder, parameters)


def _remask_shard(split: Split, index: int, entry: Path) -> Work:
    data, folder, parameters = _worker
    first_sample = number_of_sample(split, index * parameters.shard_samples)
    samples = data.read_shard(split, index)
    masks = draw_mask_sets(samples, data.tokenizer, parameters, first_sample)
    finished = write_shard(
        folder / _name(data, split, index), samples, masks, parameters.max_length_tokens, parameters.max_masked_tokens
    )
    write_json(entry, finished)
    return Work(len(samples.length_B), tokens=finished["num_tokens"])
