"""From text files to a data set: the whole way, on several processes, with the same bytes whatever their number.

Stages of independent tasks, each of which leaves its result in a file, so that an interrupted build goes on:

    duplicates  where they are to be dropped: data_prep/duplicates.py  -> DATA/.work/duplicates/
    units       a part of the input: read, clean, tokenize, cut        -> DATA/.work/unit-00000012-000000-end.npz
    shards      the next `shard_samples` texts: assemble, draw masks   -> DATA/train-00003.h5, DATA/.work/train-00003.json

Before the shards, the main process counts the texts of all units: from then on every sample has its number. A corpus of several
epochs is tokenized once; its texts come as often as it has epochs, each time as samples of their own.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cleaning import CLEANING_COUNTS, NO_CLEANING, CleanSettings, cleaned, is_too_short
from data_prep.corpus import Document, Source, Unit, plan_units, read_unit
from data_prep.differences import describe_differences
from data_prep.duplicates import (
    HASHED,
    KEEP_DUPLICATES,
    KINDS,
    DuplicateSettings,
    choose_bands,
    find_duplicates,
    hash_unit,
    without_duplicates,
)
from data_prep.duplicates import read_digests as read_first_digests
from data_prep.files import read_json, write_json, write_whole
from data_prep.inputs import (
    SOURCE_LIST,
    TIMES,
    describe_sources,
    digests_of_unit,
    find_changed,
    hashes_of_sources,
    read_source_hashes,
    refuse_other_digests,
    remember_times,
    write_source_list,
)
from data_prep.masking import SHOW_MASK_PROBABILITY, SHOW_RANDOM_PROBABILITY, Masks, draw_masks
from data_prep.mixture import Corpus, Mixture, TextOrder, epochs_of, sources_of
from data_prep.packing import MIN_DOCUMENT_TOKENS, Samples, Texts, assemble
from data_prep.parameters import BuildParameters
from data_prep.parts import finished_parts, is_done, part_path
from data_prep.processes import LOGS, Processes, Task
from data_prep.progress import Stage, Work
from data_prep.shards import (
    SPLITS,
    Split,
    manifest_path,
    read_data_manifest,
    shard_name,
    write_data_manifest,
    write_shard,
)  # fmt: skip
from data_prep.tokenizer import Tokenizer, load_tokenizer
from data_prep.units import UNIT, Part, describe_text, read_counts, read_digests, read_texts, tokenize, write_part

WORK = ".work"
_PLAN = "plan.json"
_WORK_VERSION = 3
"""Of what is in WORK, and of how masks are drawn: a new one for each change that would make half a data set another's."""
_SHARDS = tuple(f"{split}-{'[0-9]' * 5}.h5" for split in SPLITS)
_PARTIAL = tuple(f".{name}.partial" for name in (*_SHARDS, "tokenizer.*", SOURCE_LIST, TIMES))
_FIRST_VALIDATION_SAMPLE = 2**48
_DROPPED = ("too_short_documents", "too_long_documents", *KINDS)


@dataclass(frozen=True)
class _ShardPlan:
    """Samples first .. first + num_samples - 1 of a split."""

    split: Split
    index: int
    first: int
    num_samples: int

    def __str__(self) -> str:
        return shard_name(self.split, self.index)


def build(
    mixture: Mixture,
    tokenizer_path: Path,
    folder: Path,
    parameters: BuildParameters,
    processes: Processes,
    *,
    cleaning: CleanSettings = NO_CLEANING,
    duplicates: DuplicateSettings = KEEP_DUPLICATES,
) -> bool:
    """Make the data set `folder`, or go on with it; returns False, having done nothing, if it is made already.

    Raises ValueError for bad input, and where `folder` holds a data set, whole or unfinished, made from something else.
    """
    sources = sources_of(mixture)
    made_from: dict[str, Any] = {
        "parameters": asdict(parameters) | asdict(cleaning) | asdict(duplicates),
        "tokenizer": _describe_tokenizer(tokenizer_path),
        "corpora": [corpus.settings() for corpus in mixture],
        "sources": describe_sources(mixture, sources),
    }
    if is_made(folder, made_from):
        _refuse_other_text(folder, sources, processes)
        return False
    processes.prepare(_set_up, tokenizer_path, folder, parameters, cleaning, duplicates, log_folder=folder / LOGS)
    units = plan_units(sources)
    total_bytes = made_from["sources"]["size_bytes"]
    _refuse_other_text_of_done_units(folder, sources, units, processes)

    def run_over_units(what: str, task: Task, in_folder: Path, kind: str, *words: Any) -> None:
        done = finished_parts(in_folder, kind)
        todo = [number for number in range(len(units)) if not is_done(done.get(number, []))]
        done_bytes = total_bytes - sum(units[number].size_bytes for number in todo)
        arguments = ((number, units[number], done.get(number, []), *words) for number in todo)
        processes.run(task, arguments, Stage(what, total_bytes, "B", done_bytes))

    if duplicates.kinds:
        _hashes(folder).mkdir(exist_ok=True)
        run_over_units("hash texts", _hash_unit, _hashes(folder), HASHED, choose_bands(duplicates))
        find_duplicates(_hashes(folder), len(units), duplicates, processes)
    run_over_units("tokenize", _tokenize_unit, folder / WORK, UNIT)
    of_units = finished_parts(folder / WORK, UNIT)
    parts = [(path, units[number].corpus) for number in range(len(units)) for path in of_units[number]]
    counts = [read_counts(path) for path, _ in parts]
    totals = _totals_of_corpora(mixture, folder, [corpus for _, corpus in parts], counts)
    orders = _order_texts(mixture, folder, [corpus for _, corpus in parts], counts, totals)
    shards = _plan_shards(orders, parameters.shard_samples)
    todo = [shard for shard in shards if not _shard_file(folder, shard).exists()]
    num_samples = sum(s.num_samples for s in shards)
    stage = Stage("draw masks", num_samples, "sample", num_samples - sum(s.num_samples for s in todo))
    processes.run(_write_shard, ((shard, _texts_of(orders[shard.split], shard, parts)) for shard in todo), stage)
    digests = ((unit, read_digests(of_units[number][-1])) for number, unit in enumerate(units))
    made_from["source_list"] = write_source_list(folder, mixture, hashes_of_sources(digests))
    _declare_whole(folder, tokenizer_path, made_from, totals, _shares(mixture, totals, orders), shards, parameters)
    return True


# ---- what the conductor decides


def _describe_tokenizer(path: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(path)
    return {"file": tokenizer.file_name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}


def is_made(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the data set is whole already; if not, its folder is made ready for making it or for going on with it.

    Raises ValueError if it is, or was begun, from something else.
    """
    work = folder / WORK
    if manifest_path(folder).exists():
        _refuse_changes(folder, "a data set", read_data_manifest(folder), made_from)
        shutil.rmtree(work, ignore_errors=True)  # there if it was interrupted behind the manifest
        return True
    if (work / _PLAN).exists() and any(file.name != _PLAN for file in work.glob("[!.]*")):
        plan = read_json(work / _PLAN)
        if (found := plan.get("work_version")) != _WORK_VERSION:
            raise ValueError(
                f"{folder}: holds an unfinished data set begun by another version of this program (its work_version is {found}, "
                f"expected {_WORK_VERSION}); remove it or choose another"
            )
        _refuse_changes(folder, "an unfinished data set", plan, made_from)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder, *_SHARDS, *_PARTIAL, SOURCE_LIST, TIMES)
    work.mkdir(exist_ok=True)
    write_json(work / _PLAN, {**made_from, "work_version": _WORK_VERSION})
    return False


def _remove(folder: Path, *patterns: str) -> None:
    """Delete files of a build, and nothing else that a user may keep there."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def _refuse_changes(folder: Path, what: str, found: dict[str, Any], made_from: dict[str, Any]) -> None:
    if "sources" in made_from and isinstance(found.get("sources"), list):
        raise ValueError(
            f"{folder}: holds {what} made by an earlier version of this program. Training reads it, but it cannot be compared "
            "with this corpus; remove it or choose another folder"
        )
    # A data set from before there was a parameter has its default.
    found = {**found, "parameters": asdict(BuildParameters()) | found.get("parameters", {})}
    changed = [key for key, value in made_from.items() if found.get(key) != value]
    if changed:
        details = describe_differences(
            {key: found.get(key) for key in changed}, {key: made_from[key] for key in changed}
        )
        raise ValueError(
            f"{folder}: holds {what} made from other {' and '.join(changed)} ({details}); remove it or choose another"
        )


def _read_digests_again(units: Iterable[tuple[int, Unit]], num_bytes: int, processes: Processes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    processes.run(_read_again, units, Stage("read input", num_bytes, "B"), lambda work: found.update([work.value]))
    return found


def _refuse_other_text(folder: Path, sources: list[Source], processes: Processes) -> None:
    """Raise ValueError if a data set was made from other text than the sources hold; those of the same time are believed."""
    changed = find_changed(folder, sources)
    if not len(changed):
        return
    units = plan_units([sources[index] for index in changed])
    processes.prepare(int)
    found = _read_digests_again(enumerate(units), sum(unit.size_bytes for unit in units), processes)
    hashes = hashes_of_sources((unit, found[number]) for number, unit in enumerate(units))
    expected = read_source_hashes(folder)
    for index, (source, sha256) in zip(changed, hashes, strict=True):
        if sha256 != expected[index]:
            raise ValueError(
                f"{folder}: holds a data set made from other sources ({source.path} has another content); "
                "remove it or choose another"
            )
    with suppress(OSError):  # a folder that may only be read: they are read again the next time
        remember_times(folder, sources)


def _refuse_other_text_of_done_units(
    folder: Path, sources: list[Source], units: list[Unit], processes: Processes
) -> None:
    """Raise ValueError if the text of a unit has changed since it was tokenized; text of the same time is believed, and what
    is not tokenized yet will be read anyway."""
    parts = finished_parts(folder / WORK, UNIT)
    done = [number for number, of_unit in parts.items() if is_done(of_unit)]
    changed = {sources[index] for index in find_changed(folder / WORK, sources)} if done else set()
    doubtful = {n: units[n] for n in done if any(piece.source in changed for piece in units[n].pieces)}
    num_bytes = sum(unit.size_bytes for unit in doubtful.values())
    if doubtful:
        for number, digests in _read_digests_again(doubtful.items(), num_bytes, processes).items():
            refuse_other_digests(units[number], digests, read_digests(parts[number][-1]))
    remember_times(folder / WORK, sources)


def _totals_of_corpora(
    mixture: Mixture, folder: Path, corpora: list[int], counts: list[dict[str, int]]
) -> list[Counter[str]]:
    """The counts of each corpus; ValueError for one without a text to train on."""
    totals = [Counter[str]() for _ in mixture]
    for corpus_number, of_part in zip(corpora, counts, strict=True):
        totals[corpus_number].update(of_part)
    for corpus, total in zip(mixture, totals, strict=True):
        if not total["train_samples"]:
            _refuse(folder, corpus, _why_nothing_to_train_on(total))
    return totals


def _refuse(folder: Path, corpus: Corpus, reason: str) -> None:
    """Raise ValueError; what is done of the build is of no use."""
    shutil.rmtree(folder / WORK)
    raise ValueError(f"{corpus}: {reason}")


def _why_nothing_to_train_on(total: Counter[str]) -> str:
    if total["validation"]:
        return (
            f"all {total['validation']} documents fell to validation; give more documents, a smaller "
            "--validation_fraction, or --document_per blank_line if blank lines separate them"
        )
    if dropped := [f"{total[name]} {name.replace('_', ' ')}" for name in _DROPPED if total[name]]:
        return (
            f"cleaning left nothing to train on: it dropped {', '.join(dropped)}; documents left with fewer than "
            f"{MIN_DOCUMENT_TOKENS} tokens: {total['too_short']}"
        )
    if total["too_short"]:
        return f"nothing to train on: each of the {total['too_short']} documents has fewer than {MIN_DOCUMENT_TOKENS} tokens"
    return "the corpus is empty: no text in it"


def _order_texts(
    mixture: Mixture, folder: Path, corpora: list[int], counts: list[dict[str, int]], totals: list[Counter[str]]
) -> dict[Split, TextOrder]:
    """The order of each split's texts; validation has each once, whatever the epochs."""
    epochs: dict[Split, list[Fraction]] = {
        "train": epochs_of(mixture, [total["train_samples"] for total in totals]),
        "validation": [Fraction(1)] * len(mixture),
    }
    orders = {
        split: TextOrder([of_part[f"{split}_samples"] for of_part in counts], corpora, epochs[split])
        for split in SPLITS
    }
    for corpus, total, num_samples in zip(mixture, totals, orders["train"].num_samples, strict=True):
        if not num_samples:
            _refuse(
                folder, corpus,
                f"{float(corpus.epochs):g} epochs of its {total['train_samples']} training samples are less than one sample",
            )  # fmt: skip
    return orders


def _plan_shards(orders: dict[Split, TextOrder], shard_samples: int) -> list[_ShardPlan]:
    plans = []
    for split, order in orders.items():
        total = sum(order.num_samples)
        for index, first in enumerate(range(0, total, shard_samples)):
            plans.append(_ShardPlan(split, index, first, min(shard_samples, total - first)))
    return plans


def _texts_of(
    order: TextOrder, shard: _ShardPlan, parts: list[tuple[Path, int]]
) -> list[tuple[Path, np.ndarray | slice]]:
    """Return the file of each of the shard's texts, and their numbers in it: a slice, where each is the next."""
    part_of, numbers = order.texts(shard.first, shard.first + shard.num_samples)
    starts = np.flatnonzero(np.diff(part_of)) + 1
    texts: list[tuple[Path, np.ndarray | slice]] = []
    for of_part, in_part in zip(np.split(part_of, starts), np.split(numbers, starts), strict=True):
        is_run = bool((np.diff(in_part) == 1).all())
        in_file = slice(int(in_part[0]), int(in_part[-1]) + 1) if is_run else in_part
        texts.append((parts[of_part[0]][0], in_file))
    return texts


def _declare_whole(
    folder: Path,
    tokenizer_path: Path,
    made_from: dict[str, Any],
    totals: list[Counter[str]],
    shares: list[dict[str, Any]],
    shards: list[_ShardPlan],
    parameters: BuildParameters,
) -> None:
    total = sum(totals, Counter[str]())
    splits: dict[Split, list[Any]] = {split: [] for split in SPLITS}
    for shard in shards:
        splits[shard.split].append(read_json(_shard_file(folder, shard)))
    write_whole(folder / made_from["tokenizer"]["file"], tokenizer_path.read_bytes())
    write_whole(folder / TIMES, (folder / WORK / TIMES).read_bytes())
    write_data_manifest(folder, {
        **made_from,
        **describe_masking(parameters),
        "documents": _documents(total),
        "mixture": shares,
        "text": describe_text(total),
        "cleaning": {name: total[name] for name in (*CLEANING_COUNTS, *KINDS)},
        "splits": splits,
    })  # fmt: skip
    _remove(folder, *_PARTIAL)
    shutil.rmtree(folder / WORK)


def _shares(mixture: Mixture, totals: list[Counter[str]], orders: dict[Split, TextOrder]) -> list[dict[str, Any]]:
    """What became of each corpus, for the manifest; in a split, corpus follows corpus."""
    return [
        {
            "corpus": corpus.name, "epochs": float(orders["train"].epochs[number]), "documents": _documents(total),
            **{f"{split}_samples": orders[split].num_samples[number] for split in SPLITS},
        }
        for number, (corpus, total) in enumerate(zip(mixture, totals, strict=True))
    ]  # fmt: skip


def _documents(total: Counter[str]) -> dict[str, int]:
    return {name: total[name] for name in (*SPLITS, "too_short")}


def _hashes(folder: Path) -> Path:
    return folder / WORK / "duplicates"


def number_of_sample(split: Split, index: int) -> int:
    """The number that a sample's random choices depend on; no two samples of a data set share one."""
    return index + (_FIRST_VALIDATION_SAMPLE if split == "validation" else 0)


def describe_masking(parameters: BuildParameters) -> dict[str, Any]:
    """Return what the manifest tells of the masks besides the parameters themselves."""
    return {
        "masking": {
            "mask_rates": list(parameters.masks.rates_K), "show_mask_probability": SHOW_MASK_PROBABILITY,
            "show_random_probability": SHOW_RANDOM_PROBABILITY,
        },
        "max_masked_tokens": parameters.max_masked_tokens,
    }  # fmt: skip


def draw_mask_sets(samples: Samples, tokenizer: Tokenizer, parameters: BuildParameters, first_sample: int) -> Masks:
    """All mask sets of samples number first_sample .."""
    return draw_masks(
        samples, parameters.masks, special_ids=tokenizer.special_ids, normal_ids=tokenizer.normal_ids,
        mask_id=tokenizer.mask_id, seed=parameters.seed, first_sample=first_sample,
    )  # fmt: skip


def _shard_file(folder: Path, shard: _ShardPlan) -> Path:
    return folder / WORK / f"{Path(shard_name(shard.split, shard.index)).stem}.json"


# ---- tasks


@dataclass(frozen=True)
class _Worker:
    tokenizer: Tokenizer
    folder: Path
    parameters: BuildParameters
    cleaning: CleanSettings
    duplicates: DuplicateSettings


_worker: _Worker  # set once in each process, so that tasks carry their number and not the tokenizer


def _set_up(tokenizer_path: Path, *settings: Any) -> None:
    global _worker
    _worker = _Worker(load_tokenizer(tokenizer_path), *settings)


def _read_again(index: int, unit: Unit) -> Work:
    """The value is the number of the unit and the digests of its blocks."""
    return Work(unit.size_bytes, value=(index, digests_of_unit(unit)))


def _read_cleaned(unit: Unit, counts: Counter[str], digests: bytearray) -> Iterator[Document]:
    return cleaned(read_unit(unit, digests), _worker.cleaning, counts)


def _hash_unit(index: int, unit: Unit, done: list[Path], bands: tuple[int, int]) -> Work:
    """Leave the hashes of the unit's documents in files; `done` are the parts that have theirs."""
    digests = bytearray()
    documents = _read_cleaned(unit, Counter(), digests)
    hash_unit(_hashes(_worker.folder), index, documents, _worker.duplicates, bands, done=done, digests=digests)
    return Work(unit.size_bytes)


def _tokenize_unit(index: int, unit: Unit, done: list[Path]) -> Work:
    """Leave the unit's texts and counts in files; the text of the parts that are `done` is read again, but no more."""
    counts: Counter[str] = Counter()
    digests = bytearray()
    documents = _read_cleaned(unit, counts, digests)
    if _worker.duplicates.kinds:
        different = without_duplicates(_hashes(_worker.folder), index, documents, _worker.duplicates, counts)
        documents = (document for document in different if not is_too_short(document, _worker.cleaning, counts))
    for _ in islice(documents, sum(read_counts(path)["documents"] for path in done)):
        pass
    num_documents = num_tokens = 0
    for number in count(len(done)):
        counts.clear()  # those of the parts before
        part = Part(documents)
        texts, counts_of_texts = tokenize(part, _worker.tokenizer, _worker.parameters)
        counts.update(counts_of_texts, documents=part.num_documents)
        if part.is_last and _worker.duplicates.kinds:
            refuse_other_digests(unit, digests, read_first_digests(_hashes(_worker.folder), index))
        path = part_path(_worker.folder / WORK, UNIT, index, number, is_last=part.is_last)
        write_part(path, texts, counts, digests if part.is_last else b"")
        num_documents += sum(_documents(counts).values())
        num_tokens += sum(len(of_split.ids) for of_split in texts.values())
        if part.is_last:
            break
    return Work(unit.size_bytes, num_documents, num_tokens)


def _write_shard(shard: _ShardPlan, texts: list[tuple[Path, np.ndarray | slice]]) -> Work:
    """Leave the shard in its place and its entry of the manifest in a file."""
    parameters, tokenizer = _worker.parameters, _worker.tokenizer
    tokenizer.forget_words()
    first_sample = number_of_sample(shard.split, shard.first)
    of_parts = [read_texts(path, shard.split)[numbers] for path, numbers in texts]
    samples = assemble(
        Texts.concatenate(of_parts), seed=parameters.seed, first_sample=first_sample, sos_id=tokenizer.sos_id,
        eos_id=tokenizer.eos_id,
    )  # fmt: skip
    masks = draw_mask_sets(samples, tokenizer, parameters, first_sample)
    path = _worker.folder / shard_name(shard.split, shard.index)
    entry = write_shard(path, samples, masks, parameters.max_length_tokens, parameters.max_masked_tokens)
    write_json(_shard_file(_worker.folder, shard), entry)
    return Work(shard.num_samples, tokens=entry["num_tokens"])
