"""Write targets for sources, with a model that `python -m finetune seq2seq` trained.

From a file: a JSON line {"text": ..., "score": ...} for each source, in their order.

    OUTPUT                   with --num_best above 1 also the others: "n_best"
    OUTPUT.settings.json     settings, and hashes of model, tokenizer and input; `python -m finetune score` takes it along
    OUTPUT.traces.jsonl      with --traces: all that the searches followed, for --rerank

The same command continues what was interrupted. Under `torchrun --nproc_per_node N -m finetune generate ...` the processes share
the work, and the files are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from data_prep.console import ArgumentParser, add_flags, flag_values, progress_bar
from data_prep.files import (
    NotJSON,
    named,
    parse_json,
    read_json,
    sha256_of_file,
    sync_directory,
    unfinished_file,
    write_json,
)
from finetune.identity import refuse_other
from finetune.model import model_folder
from finetune.processes import Processes
from finetune.runs import say
from finetune.score import made_by_file
from finetune.search import decode, stream
from finetune.search_settings import Found, SearchSettings, Trace, refuse_impossible
from finetune.seq2seq_data import Pair, PairColumns, Pairs, make_sources, read_pairs
from finetune.seq2seq_model import Writer
from finetune.tables import text_lines
from pretrain.export import WEIGHTS

_CHUNK = 512  # sources; part of the result, as batches are made of each
_RANKING = ("length_penalty", "released_length_penalty", "num_best")
_TRACES = ".traces.jsonl"


def write_file(
    folder: Path, writer: Writer, source: Path, column: str, output: Path, *, batch_size: int = 16, with_traces: bool = False,
    processes: Processes | None = None,
) -> None:  # fmt: skip
    """The command with --input. Raises ValueError or OSError, naming flag, or file and line."""
    processes = processes or Processes()
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: expected at least 1")
    if with_traces and writer.search.sampling:
        raise ValueError("--traces is for searches; draws with --sampling have none")
    pairs = read_sources(source, column, writer.task.question_generation)
    examples = make_sources(writer.tokenizer, pairs, writer.task)
    ids, is_filled = examples.sources, examples.is_filled
    refuse_impossible(writer.model, writer.search, int(ids.lengths.max()))
    line = f"{source}: {len(ids):,} sources"
    if examples.num_cut_sources:
        line += f"; {examples.num_cut_sources:,} are cut to the model's {writer.task.max_source_tokens} tokens"
    say(processes, line)
    if not is_filled.all():
        say(processes, f"warning: {source}: {int((~is_filled).sum()):,} sources are empty, and so is what is written for them "
            f"(the first: {examples.first_empty})")  # fmt: skip
    identity = {
        "search": asdict(writer.search), "batch_size": batch_size, "traces": with_traces,
        "model_sha256": sha256_of_file(model_folder(folder) / WEIGHTS),
        "tokenizer_sha256": writer.tokenizer.sha256,
        "files": {"input": pairs.sha256}, "sources": len(ids),
    }  # fmt: skip
    results = _Results(output, identity, _CHUNK, processes)
    if results.is_done:
        say(processes, f"{output}: is complete already, of the same settings")
        return
    bar = progress_bar("writing", len(ids), "source", initial=results.num_done, is_shown=processes.is_first)
    with bar:
        for first in range(results.num_done, len(ids), _CHUNK):
            chunk = [place for place in range(first, min(first + _CHUNK, len(ids))) if is_filled[place]]
            chunk.sort(key=lambda place: -len(ids[place]))
            batches = [chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)]
            mine: dict[int, Found] = {}
            for turn in range(0, len(batches), processes.world_size):
                if turn + processes.rank < len(batches):
                    batch = batches[turn + processes.rank]
                    found = decode(
                        writer.model, writer.rules, [ids[place].tolist() for place in batch], writer.search, samples=batch,
                        batch_size=batch_size, with_traces=with_traces,
                    )  # fmt: skip
                    mine.update(zip(batch, found, strict=True))
                bar.update(sum(map(len, batches[turn : turn + processes.world_size])))
            every: dict[int, Found] = {}
            for part in processes.gather(mine):
                every.update(part)
            stop = min(first + _CHUNK, len(ids))
            bar.update(stop - first - len(chunk))
            if processes.is_first:
                some = [every.get(place, Found([], Trace())) for place in range(first, stop)]
                results.add(
                    [writer.record(found.hypotheses) for found in some],
                    [asdict(found.trace) for found in some if found.trace is not None] if with_traces else [],
                )
    if processes.is_first:
        results.finish()
    processes.wait()
    say(processes, f"{output}: {len(ids):,} texts")


def read_sources(path: Path, column: str, question_generation: bool) -> Pairs:
    """Return the sources in a file; of a .txt, a line each. Raises ValueError or OSError, see `read_pairs`."""
    if path.suffix != ".txt" or question_generation:
        return read_pairs(
            path, PairColumns(source_column=column), question_generation=question_generation, needs_targets=False
        )

    def sources() -> Iterator[Pair]:
        is_empty = True
        for line, text in text_lines(path):
            is_empty = False
            yield Pair(lambda line=line: f"{path}: line {line}", (text,))  # type: ignore[misc]
        if is_empty:
            raise ValueError(f"{path}: is empty; expected a source a line")

    return Pairs(path, sources, lambda: sha256_of_file(path))


class _Results:
    """The output while it grows, in hidden files beside it: lines in whole chunks, and whose they are."""

    def __init__(self, output: Path, identity: dict[str, Any], chunk: int, processes: Processes) -> None:
        """Raises ValueError where there is another output, or part of one."""
        self._output, self._identity = output, identity
        with_traces = identity["traces"]
        self._files = [output, *([output.with_name(output.name + _TRACES)] if with_traces else [])]
        self._partial = [file.with_name(f".{file.name}.partial") for file in self._files]
        self._partial_identity = output.with_name(f".{output.name}.partial.json")
        self.is_done = output.exists()
        self.num_done = 0
        if self.is_done:
            found = read_json(made_by_file(output)) if made_by_file(output).exists() else None
            refuse_other(output, found, identity, "output")
        elif self._partial_identity.exists():
            refuse_other(self._partial_identity, read_json(self._partial_identity), identity, "output")
            whole = [_num_lines(path) // chunk * chunk for path in self._partial]
            self.num_done = min(whole)
        processes.wait()  # all have looked
        if processes.is_first and not self.is_done:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._partial_identity, identity)
            for path in self._partial:
                _cut(path, self.num_done)

    def add(self, *rows: Sequence[dict[str, Any]]) -> None:
        """The next chunk, of each file."""
        for path, of_file in zip(self._partial, rows, strict=False):
            with named(path), open(path, "ab") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_file).encode())
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the files their names, the output last."""
        write_json(made_by_file(self._output), self._identity)
        for partial, path in reversed([*zip(self._partial, self._files, strict=True)]):
            os.replace(partial, path)
        self._partial_identity.unlink()
        sync_directory(self._output.parent)


def _num_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with named(path), open(path, "rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _cut(path: Path, num_lines: int) -> None:
    """Leave the first lines of a file, which need not be there."""
    with named(path), open(path, "a+b") as file:
        file.seek(0)
        for _ in range(num_lines):
            file.readline()
        file.truncate(file.tell())


def rerank(folder: Path, traces: Path, output: Path, changes: dict[str, Any]) -> int:
    """The command with --rerank; returns how many texts there are. Raises ValueError, naming flag, or file and line."""
    if unfit := [name for name in changes if name not in _RANKING]:
        raise ValueError(f"--{unfit[0]}: changes the search; --rerank takes --{', --'.join(_RANKING)} alone")
    if not traces.name.endswith(_TRACES):
        raise ValueError(f"--rerank {traces}: expected what --traces writes, which ends in {_TRACES}")
    settings_file = made_by_file(traces.with_name(traces.name.removesuffix(_TRACES)))
    identity = read_json(settings_file)
    writer = Writer.load(folder)
    if identity["tokenizer_sha256"] != writer.tokenizer.sha256:
        raise ValueError(f"{settings_file}: the model had another tokenizer than {folder}; give --model that model")
    writer.search = replace(SearchSettings(**identity["search"]), **changes)
    if output.exists():
        raise ValueError(f"{output}: exists; choose another --output or remove it")
    num_texts = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        unfinished_file(output) as partial,
        named(traces),
        open(traces, encoding="utf-8") as lines,
        open(partial, "w") as file,
    ):
        for num_texts, line in enumerate(lines, start=1):
            try:
                found = Trace(**parse_json(line)).hypotheses(writer.search, writer.rules.eos_id)
            except (NotJSON, TypeError, ValueError, LookupError):
                raise ValueError(
                    f"{traces}: line {num_texts}: not a line that --traces writes; write the traces again with --traces"
                ) from None
            file.write(json.dumps(writer.record(found), ensure_ascii=False) + "\n")
    write_json(made_by_file(output), {**identity, "search": asdict(writer.search), "reranked": traces.name})
    return num_texts


def _print_stream(writer: Writer, parts: Sequence[str]) -> None:
    (ids,) = writer.ids([tuple(parts)])
    tokens: list[int] = []
    shown = ""
    for token in stream(writer.model, writer.rules, ids, writer.search):
        tokens.append(token)
        text = writer.tokenizer.decode(tokens)
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `python -m finetune generate`."""
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        default=Path("runs/seq2seq"),
        help="what `python -m finetune seq2seq` wrote",
    )
    parser.add_argument(
        "--input", type=Path, metavar="PATH", help="sources: .jsonl, .tsv, .csv or .parquet, or .txt with one a line"
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="file to write, a JSON object a line")
    parser.add_argument(
        "--text", metavar="TEXT", nargs="+", help="one source, given here; for question generation paragraph and answer"
    )
    parser.add_argument(
        "--stream", action="store_true", help="with --text: one beam, and tokens are printed as they come"
    )
    parser.add_argument("--rerank", type=Path, metavar="PATH",
                        help="traces: rank again, with another --length_penalty or --num_best")  # fmt: skip
    parser.add_argument("--traces", action="store_true",
                        help="with --input: also write OUTPUT.traces.jsonl; searches go on to the length limit then")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="sources computed at once")
    add_flags(parser, PairColumns, only=["source_column"])
    add_flags(parser, SearchSettings, optional=True)


def run(args: Any, processes: Processes) -> None:
    """Run `python -m finetune generate`. Raises ValueError or OSError, naming the flag or file."""
    names = [field.name for field in fields(SearchSettings)]
    changes = {name: value for name, value in flag_values(args, names).items() if value is not None}
    if sum(x is not None for x in (args.input, args.text, args.rerank)) != 1:
        raise ValueError("expected one of --input, --text and --rerank")
    if args.text is None and args.output is None:
        raise ValueError("expected --output, the file to write")
    if args.stream and (args.text is None or changes.get("num_beams", 1) != 1 or changes.get("num_best", 1) != 1):
        raise ValueError("--stream goes with --text, and with one beam and one result")
    if args.rerank is not None:
        if processes.is_first:
            say(processes, f"{args.output}: {rerank(args.model, args.rerank, args.output, changes):,} texts")
        return
    writer = Writer.load(args.model, processes, **({"num_beams": 1, **changes} if args.stream else changes))
    if args.text is None:
        write_file(
            args.model, writer, args.input, args.source_column, args.output, batch_size=args.batch_size,
            with_traces=args.traces, processes=processes,
        )  # fmt: skip
        return
    num_parts = 2 if writer.task.question_generation else 1
    if len(args.text) != num_parts or not all(part.strip() for part in args.text):
        expected = "a paragraph and an answer" if num_parts == 2 else "one text"
        raise ValueError(f"--text: expected {expected}, none of it empty, found {len(args.text)}")
    if not processes.is_first:
        return
    if args.stream:
        _print_stream(writer, args.text)
        return
    for hypothesis in decode(writer.model, writer.rules, writer.ids([tuple(args.text)]), writer.search)[0].hypotheses:
        score = f"{hypothesis.score:.4f}\t" if writer.search.num_best > 1 else ""
        print(f"{score}{writer.tokenizer.decode(hypothesis.tokens)}")
