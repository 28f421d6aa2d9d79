"""What every command line of this project shares: flags, errors and progress."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import pairwise
from typing import IO, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from tqdm import tqdm

USER_ERROR_STATUS = 2
BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE
"""What a shell says of a program whose output nobody reads any more, as of `inspect | head`."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help and one line an error; `--mask-sets` and `--mask_sets` are the same flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and which flag may have been meant, in one line, and end with status 2."""
        unknown = re.search(r"^unrecognized arguments: (--[^ =]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        hint = f" (did you mean {close[0]}?)" if close else ""
        self.exit(USER_ERROR_STATUS, f"{self.prog}: error: {message}{hint}; all flags: --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        is_read = _stdout_is_read()  # else the interpreter would complain when it ends
        super().exit(status if is_read else BROKEN_PIPE_STATUS, message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _underscored(word: str) -> str:
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def add_flags(parser: Any, cls: type, *, only: Iterable[str] | None = None, optional: bool = False) -> None:
    """A flag for each field of a dataclass: its type, its default, and as help the line under it.

    `optional` leaves out the defaults: a flag that is not given is None.
    """
    hints, lines = get_type_hints(cls), _lines_under_fields(cls)
    for field in dataclasses.fields(cls):
        if only is not None and field.name not in only:
            continue
        is_required = field.default is dataclasses.MISSING and not optional
        settings: dict[str, Any] = (
            {"required": True} if is_required else {"default": None if optional else field.default}
        )
        kind = next((t for t in get_args(hints[field.name]) if t is not type(None)), None)
        kind = hints[field.name] if kind is None or get_origin(hints[field.name]) is Literal else kind
        if kind is bool:
            settings["action"] = "store_true"
        elif get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        elif issubclass(kind, Enum):
            settings |= {"type": kind, "choices": list(kind), "metavar": "{" + ",".join(e.value for e in kind) + "}"}
        else:
            settings |= {"type": kind, "metavar": {int: "N", float: "N", str: "NAME"}.get(kind, "PATH")}
        if isinstance(settings.get("default"), Enum):
            settings["default"] = settings["default"].value
        help_text = lines[field.name].replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=help_text, **settings)


def flag_values(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """The parsed values of the named flags."""
    return {name: getattr(args, name) for name in names}


def _lines_under_fields(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): " ".join(str(line.value.value).split())
        for field, line in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    }


def describe_error(error: BaseException) -> str:
    """One line for an error that the user can cure: a ValueError's own words, or an OSError with its file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def tell_error(error: BaseException, name: str) -> None:
    """Tell the user, in one line."""
    print(f"{name}: error: {describe_error(error)}", file=sys.stderr, flush=True)


def tell_note(text: str) -> None:
    """Print, on stderr, what a user should know though nothing is wrong."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], None], name: str) -> int:
    """Run `command`; a user's mistake becomes one line on stderr and status 2, Ctrl-C status 130.

    It ends without a word, with BROKEN_PIPE_STATUS, when nobody reads its output any more. A character that the terminal does
    not have is printed as an escape: ▁ as \\u2581.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
        if sys.stdout:
            sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not _stdout_is_read():
            return BROKEN_PIPE_STATUS
        tell_error(error, name)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _stdout_is_read() -> bool:
    """Write out what was printed; return whether somebody may read it. If nobody does, what is still printed is dropped."""
    if not sys.stdout:  # closed by whoever started the program
        return True
    try:
        sys.stdout.flush()
        output = sys.stdout.fileno()
    except BrokenPipeError:
        output = sys.stdout.fileno()
    except io.UnsupportedOperation:  # no file
        return True
    poll = select.poll()
    poll.register(output, select.POLLERR)
    if not poll.poll(0):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return False


def print_json(value: Any) -> None:
    """Print a value as JSON; a character that the terminal does not have is an escape of JSON's."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1)
    print(text, flush=True)


class _PlainLines:
    """A log file instead of a terminal: tqdm's carriage returns become lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\r", "").strip()
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    description: str,
    total: int,
    unit: str,
    *,
    initial: int = 0,
    stream: IO[str] | None = None,
    is_shown: bool = True,
    is_lasting: bool = True,
) -> Any:
    """A bar with rate and time left; one line every 10 s where the stream is not a terminal.

    One that is not lasting appears only after 5 s, and goes when it is done.
    """
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, unit_scale=unit == "B", dynamic_ncols=is_terminal,
        ncols=None if is_terminal else 160, file=stream if is_terminal else _PlainLines(stream), disable=not is_shown,
        mininterval=0.2 if is_terminal else 10.0, maxinterval=10.0, smoothing=0.1, leave=is_lasting,
        delay=0.0 if is_lasting else 5.0,
    )  # fmt: skip


_ROOM_TO_GROW = 4  # characters: a bar's times and rate get longer


def fitting(bar: Any, postfixes: Sequence[str]) -> str:
    """Return the first of the postfixes with which the bar, its rate and its time left fit into the terminal."""
    if bar.disable:
        return postfixes[-1]
    columns = bar.dynamic_ncols(bar.fp)[0] if bar.dynamic_ncols else bar.ncols
    if not columns:
        return postfixes[0]
    shown = bar.format_dict | {"ncols": None, "postfix": "", "bar_format": "{l_bar}{r_bar}"}
    room = columns - len(tqdm.format_meter(**shown)) - len(", ") - _ROOM_TO_GROW
    return next((postfix for postfix in postfixes if len(postfix) <= room), postfixes[-1])


def available_cores() -> int:
    """Cores this process may run on, which a container or Slurm may have limited."""
    return len(os.sched_getaffinity(0))
