"""python -m data_prep: from text files to a data set that run_pretrain.py reads."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from fractions import Fraction
from functools import partial
from itertools import chain, groupby
from operator import attrgetter, mul
from pathlib import Path
from typing import Any, TypeVar

from data_prep import inspect
from data_prep.build import build
from data_prep.cleaning import CleanSettings, cleaned
from data_prep.console import (
    ArgumentParser,
    add_flags,
    available_cores,
    flag_values,
    print_json,
    progress_bar,
    run_command,
)  # fmt: skip
from data_prep.corpus import ReadSettings, Source, read_documents
from data_prep.duplicates import DuplicateSettings
from data_prep.formats import EXPECTED_NAMES
from data_prep.import_tokenizer import import_tokenizer
from data_prep.line_sample import LineSample
from data_prep.mixture import Corpus, Mixture, epochs_of, read_mixture, sources_of
from data_prep.parameters import BuildParameters
from data_prep.processes import PROCESSES_PER_CORE, LocalProcesses, MPIProcesses, Processes, launched_by_mpi
from data_prep.recipe import read_recipe
from data_prep.remask import REMASKED, remask
from data_prep.shards import SPLITS, DataSet, find_faults, read_data_manifest
from data_prep.stats import Measured
from data_prep.stats import measure as measure_data_set
from data_prep.stats_figure import draw
from data_prep.stats_summary import describe, summarize
from data_prep.storage import location
from data_prep.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, ROLE_PIECES, train_tokenizer

_T = TypeVar("_T")

EPILOG = """\
example, in this order:
  python -m data_prep train-tokenizer --corpus texts/ --tokenizer data/tokenizer.model
  python -m data_prep build --corpus texts/ --tokenizer data/tokenizer.model --data data/pretrain
  python -m data_prep inspect --data data/pretrain --sample 0
  python -m data_prep verify --data data/pretrain
  python -m data_prep stats --data data/pretrain --deepspeed_config ds_configs/zero2.json
  python -m data_prep remask --data data/pretrain --output data/pretrain-more --mask_sets 10 --seed 1
or, with a vocabulary from elsewhere, first:
  python -m data_prep import-tokenizer --from vocab.txt --tokenizer data/tokenizer.json
"""


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m data_prep", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run, prog=sub.prog)
        return sub

    def takes_corpus(sub: ArgumentParser) -> None:
        texts = sub.add_mutually_exclusive_group(required=True)
        texts.add_argument("--corpus", nargs="+", metavar="PATH",
                           help=f"text files ({EXPECTED_NAMES}), folders of them, or globs; also s3://, hf:// or https://")  # fmt: skip
        texts.add_argument("--mixture", type=Path, metavar="YAML",
                           help="file that names several corpora and how often training sees each; docs/data.md shows one")  # fmt: skip
        add_flags(sub, ReadSettings)
        add_flags(sub, CleanSettings)

    def takes_tokenizer(sub: ArgumentParser, what: str) -> None:
        sub.add_argument("--tokenizer", type=Path, default=Path("data/tokenizer.model"), help=what)

    def takes_data(sub: ArgumentParser) -> None:
        sub.add_argument("--data", type=Path, default=Path("data/pretrain"), help="folder of the data set")

    def takes_workers(sub: ArgumentParser) -> None:
        sub.add_argument("--workers", type=int, metavar="N",
                         help="processes on this machine (default: its cores; never more than two a core, nor than there is work); "
                              "under mpirun or srun rank 0 conducts and the other ranks work. The bytes do not depend on it")  # fmt: skip

    sub = command("train-tokenizer", _train_tokenizer, "Train a SentencePiece tokenizer on a corpus.")
    takes_corpus(sub)
    takes_tokenizer(sub, "file to write")
    sub.add_argument(
        "--vocab_size", type=int, default=30_522, help="entries, special tokens included (default: BERT's)"
    )
    sub.add_argument("--algorithm", choices=["unigram", "bpe"], default="unigram", help="SentencePiece's model type")
    sub.add_argument(
        "--cased", action="store_true", help="keep upper case; without it text is lower-cased (nmt_nfkc_cf)"
    )
    sub.add_argument(
        "--sample_mb",
        type=float,
        default=200,
        metavar="N",
        help="train on about this much of the corpus, in MB: memory",
    )
    sub.add_argument("--seed", type=int, default=0, help="another one, another sample")

    sub = command("import-tokenizer", _import_tokenizer, "Make a tokenizer of a vocabulary from elsewhere; ids stay.")
    sub.add_argument("--from", dest="source", type=Path, required=True, metavar="FILE",
                     help="BERT's vocab.txt, or a SentencePiece model (T5, ALBERT, XLM-R, ...)")  # fmt: skip
    sub.add_argument("--tokenizer", type=Path, required=True, help="file to write: .json of a vocab.txt, else .model")
    sub.add_argument("--cased", action="store_true", help="the vocab.txt is of a cased model")
    for role, names in ROLE_PIECES.items():
        flag = f"--{role.lower()}_piece"
        sub.add_argument(flag, metavar="PIECE", help=f"unused entry to be {names[0]}, if not one of {' '.join(names)}")

    sub = command("build", _build, "Tokenize a corpus, cut it into samples, draw their masks, write HDF5 shards.")
    takes_corpus(sub)
    takes_tokenizer(sub, "file made by train-tokenizer or import-tokenizer")
    takes_data(sub)
    add_flags(sub, DuplicateSettings)
    add_flags(sub, BuildParameters)
    takes_workers(sub)

    sub = command("remask", _remask, "Draw new mask sets for a data set, without tokenizing again.")
    takes_data(sub)
    sub.add_argument("--output", type=Path, required=True, help="folder of the new data set")
    add_flags(sub, BuildParameters, only=["mask_sets", "seed"])
    add_flags(sub, BuildParameters, only=set(REMASKED) - {"mask_sets", "seed"}, optional=True)
    takes_workers(sub)

    sub = command("inspect", _inspect, "Show what a data set holds, and samples with their masks and turns.")
    takes_data(sub)
    sub.add_argument("--split", choices=SPLITS, default="train", help="where the samples are taken from")
    sub.add_argument("--sample", type=int, default=0, help="number of the first sample shown")
    sub.add_argument("--count", type=int, default=3, help="samples shown")
    sub.add_argument("--mask_set", type=int, default=0, help="which of the K mask sets")
    sub.add_argument("--json", action="store_true", help="print the summary alone, as JSON")

    sub = command("stats", _stats, "Measure a data set: lengths, vocabulary, duplicates, epochs; draw a figure.")
    takes_data(sub)
    sub.add_argument("--deepspeed_config", type=Path, metavar="JSON",
                     help="tell how many epochs its train_batch_size and total_num_steps make of the data set")  # fmt: skip
    sub.add_argument("--output", type=Path, metavar="PNG", help="figure to write (default: stats.png in --data)")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
    takes_workers(sub)

    sub = command("verify", _verify, "Read every byte of a data set and name what is wrong with it.")
    takes_data(sub)
    return parser


_bytes_bar = partial(progress_bar, unit="B")


def _from_flags(cls: type[_T], args: Any) -> _T:
    """The settings that the command line gives, of a class whose fields are flags."""
    return cls(**flag_values(args, [field.name for field in fields(cls)]))  # type: ignore[arg-type]


def _mixture(args: Any) -> Mixture:
    reading = _from_flags(ReadSettings, args)
    return read_mixture(args.mixture, reading) if args.mixture else [Corpus([*map(location, args.corpus)], reading)]


def _train_tokenizer(args: Any) -> None:
    if not 0 < args.sample_mb < math.inf:
        raise ValueError(f"--sample_mb is {args.sample_mb:g}, expected a number above 0")
    if not MIN_VOCAB_SIZE <= args.vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"--vocab_size is {args.vocab_size}, expected {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}, expected 0 to 2**63 - 1")
    mixture, cleaning = _mixture(args), _from_flags(CleanSettings, args)
    sources = [list(of_corpus) for _, of_corpus in groupby(sources_of(mixture), key=attrgetter("corpus"))]
    sizes = [sum(source.size_bytes for source in of_corpus) for of_corpus in sources]
    epochs = epochs_of(mixture, sizes)
    total_bytes = sum(map(mul, epochs, sizes), Fraction())
    sample = LineSample(int(args.sample_mb * 1e6), total_bytes, args.seed)
    with _bytes_bar("read corpus", sum(sizes)) as bar:

        def lines_of(of_corpus: list[Source]) -> Iterator[str]:
            documents = cleaned(read_documents(of_corpus, bar.update), cleaning, Counter())
            return (line for document in documents for line in document.lines)

        lines = chain.from_iterable(map(sample.of, map(lines_of, sources), epochs))
        first = next(lines, None)
        if first is None:
            corpus = ", ".join(map(str, mixture))
            if sample.num_lines:
                raise ValueError(
                    f"--sample_mb {args.sample_mb:g}: none of the {sample.num_lines:,} lines of {corpus} fell to so small "
                    "a sample; ask for more"
                )
            raise ValueError(f"{corpus}: the corpus is empty: no text in it")
        tokenizer = train_tokenizer(
            chain([first], lines),
            args.tokenizer,
            vocab_size=args.vocab_size,
            algorithm=args.algorithm,
            cased=args.cased,
        )
    print(
        f"{args.tokenizer}: {args.algorithm}, {tokenizer.vocab_size:,} entries, from {sample.num_kept:,} of "
        f"{sample.num_lines:,} lines ({sample.kept_bytes / 1e6:.1f} MB)"
    )


def _import_tokenizer(args: Any) -> None:
    pieces = {role: piece for role in ROLE_PIECES if (piece := getattr(args, f"{role.lower()}_piece")) is not None}
    tokenizer = import_tokenizer(args.source, args.tokenizer, cased=args.cased, pieces=pieces)
    ids = {role: getattr(tokenizer, f"{role.lower()}_id") for role in ("PAD", "UNK", "SOS", "EOS", "MASK")}
    roles = ", ".join(f"{role} {tokenizer.piece(token_id)} = {token_id}" for role, token_id in ids.items())
    print(f"{args.tokenizer}: {tokenizer.vocab_size:,} entries, {roles}")


def _build(args: Any) -> None:
    mixture, parameters = _mixture(args), _from_flags(BuildParameters, args)
    cleaning, duplicates = _from_flags(CleanSettings, args), _from_flags(DuplicateSettings, args)

    def make(processes: Processes) -> bool:
        return build(
            mixture, args.tokenizer, args.data, parameters, processes, cleaning=cleaning, duplicates=duplicates
        )

    _with_processes(args, make, partial(_tell_what_was_built, args.data))


def _remask(args: Any) -> None:
    _with_processes(
        args,
        partial(remask, args.data, args.output, flag_values(args, REMASKED)),
        partial(_tell_what_was_built, args.output),
    )


def _stats(args: Any) -> None:
    figure = args.output or args.data / "stats.png"
    if figure.suffix != ".png":
        raise ValueError(f"--output {figure}: the figure is a PNG; give it a name that ends in .png")

    def measure(processes: Processes) -> Measured:
        recipe = read_recipe(args.deepspeed_config) if args.deepspeed_config else None
        return measure_data_set(DataSet(args.data), recipe, processes)

    def tell(measured: Measured) -> None:
        draw(measured, figure)
        if args.json:
            print_json(summarize(measured))
        else:
            print("\n".join([*describe(measured), f"figure: {figure}"]), flush=True)

    _with_processes(args, measure, tell)


def _with_processes(args: Any, work: Callable[[Processes], _T], tell: Callable[[_T], None]) -> None:
    """Work with the processes that the command line or the launcher gives, and tell what came of it."""
    is_mpi = launched_by_mpi()
    if is_mpi and args.workers is not None:
        raise ValueError("--workers is for one machine; under MPI the ranks do the work: leave it out")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is {args.workers}, expected at least 1")
    most = PROCESSES_PER_CORE * available_cores()
    if args.workers is not None and args.workers > most:
        print(
            f"note: --workers {args.workers}: {most} are started at most, {PROCESSES_PER_CORE} for each core of this machine",
            file=sys.stderr,
        )
    with (
        MPIProcesses(shows_progress=True)
        if is_mpi
        else LocalProcesses(args.workers or available_cores(), shows_progress=True)
    ) as processes:
        if processes is None:  # a rank that was to work, and has
            return
        result = work(processes)
    tell(result)


def _tell_what_was_built(folder: Path, made: bool) -> None:
    if not made:
        print(f"{folder}: already made from this corpus, tokenizer and parameters; nothing to do")
        return
    data = DataSet(folder)
    print("\n".join(inspect.describe(data)))
    if not data.num_samples("validation"):
        print("note: no document fell to validation; with more documents, or a larger --validation_fraction, some will")


def _inspect(args: Any) -> None:
    data = DataSet(args.data)
    if args.json:
        print_json(inspect.summarize(data))
        return
    print("\n".join(inspect.describe(data)), end="\n\n")
    print("\n".join(inspect.show_samples(data, args.split, args.sample, args.count, args.mask_set)))


def _verify(args: Any) -> None:
    shards = [entry for entries in read_data_manifest(args.data)["splits"].values() for entry in entries]
    with _bytes_bar("verify", sum(entry["size_bytes"] for entry in shards)) as bar:
        faults = list(find_faults(args.data, bar.update))
    for fault in faults:
        print(f"{args.data}: {fault}")
    if faults:
        raise ValueError(f"{args.data}: {len(faults)} fault(s); build the data anew, into an empty folder")
    print(f"{args.data}: {len(shards)} shards are sound")


def main() -> int:
    """Entry point; returns the exit status."""
    args = make_parser().parse_args()
    return run_command(lambda: args.run(args), args.prog)


if __name__ == "__main__":
    sys.exit(main())
