"""New mask sets for the samples of a data set, without tokenizing again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.build import WORK, draw_mask_sets, number_of_sample
from data_prep.console import progress_bar
from data_prep.files import read_json, sha256_of_file, write_json, write_whole
from data_prep.parameters import BuildParameters
from data_prep.processes import Processes
from data_prep.shards import SPLITS, DataSet, Split, manifest_path, read_data_manifest, write_data_manifest, write_shard


def remask(
    source: Path, folder: Path, seed: int, mask_sets: int, processes: Processes, bar: Callable[..., Any] | None = None
) -> bool:
    """Make the data set `folder` from `source`: the same samples, masks drawn with another seed.

    Goes on where it was interrupted; returns False, having done nothing, if it is made already. Raises ValueError if
    `folder` holds another data set.
    """
    data = DataSet(source)
    names = [field.name for field in fields(BuildParameters)]
    parameters = replace(
        BuildParameters(**{name: data.parameters[name] for name in names if name in data.parameters}), seed=seed, mask_sets=mask_sets
    )  # fmt: skip
    changed = {
        "parameters": data.parameters | asdict(parameters),
        "remasked_from_sha256": sha256_of_file(manifest_path(source)),
    }
    if manifest_path(folder).exists():
        manifest = read_data_manifest(folder)
        if {key: manifest.get(key) for key in changed} != changed:
            raise ValueError(f"{folder}: holds another data set; remove it or choose another --output")
        return False
    work = folder / WORK
    processes.on_main(lambda: work.mkdir(parents=True, exist_ok=True))
    processes.prepare(_set_up, source, folder, parameters)
    shards = [(split, index) for split in SPLITS for index in range(len(data.manifest["splits"][split]))]
    entries = {(split, index): work / f"{_name(data, split, index)}-{seed}-{mask_sets}.json" for split, index in shards}
    todo = processes.on_main(lambda: [(*shard, entry) for shard, entry in entries.items() if not entry.exists()])
    bar = bar or partial(progress_bar, is_shown=False)
    with bar("draw masks", sum(data.num_samples(split) for split in SPLITS), "sample") as progress:
        processes.run(_remask_shard, todo, progress.update)

    def declare_whole() -> None:
        splits = {split: [read_json(entries[s, i]) for s, i in shards if s == split] for split in SPLITS}
        write_whole(folder / data.tokenizer.path.name, data.tokenizer.path.read_bytes())
        content = {key: value for key, value in data.manifest.items() if key not in ("format", "version")}
        write_data_manifest(folder, {**content, **changed, "splits": splits})
        shutil.rmtree(work)

    processes.on_main(declare_whole)
    return True


def _name(data: DataSet, split: Split, index: int) -> str:
    return str(data.manifest["splits"][split][index]["file"])


_worker: tuple[DataSet, Path, BuildParameters]


def _set_up(source: Path, folder: Path, parameters: BuildParameters) -> None:
    global _worker
    _worker = (DataSet(source), folder, parameters)


def _remask_shard(split: Split, index: int, entry: Path) -> int:
    data, folder, parameters = _worker
    first_sample = number_of_sample(split, index * parameters.shard_samples)
    samples = data.read_shard(split, index)
    masks = draw_mask_sets(samples, data.tokenizer, parameters, first_sample)
    write_json(entry, write_shard(folder / _name(data, split, index), samples, masks, parameters.max_length_tokens))
    return len(samples.length_B)
