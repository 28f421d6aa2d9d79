"""What every command line of this project shares: flags, errors and progress."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any

from tqdm import tqdm

USER_ERROR_STATUS = 2


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help; `--mask-sets` and `--mask_sets` are the same flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_underscored(word) for word in words], namespace)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _underscored(word: str) -> str:
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def describe_error(error: BaseException) -> str:
    """One line for an error that the user can cure: a ValueError's own words, or an OSError with its file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def run_command(command: Callable[[], None], name: str) -> int:
    """Run `command`; a user's mistake becomes one line on stderr and status 2, Ctrl-C status 130."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"{name}: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


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


def progress_bar(description: str, total: int, unit: str, *, initial: int = 0, stream: IO[str] | None = None) -> Any:
    """A bar with rate and time left; one line every 10 s where the stream is not a terminal."""
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, unit_scale=unit == "B", dynamic_ncols=is_terminal,
        ncols=None if is_terminal else 100, file=stream if is_terminal else _PlainLines(stream),
        mininterval=0.2 if is_terminal else 10.0, maxinterval=10.0, smoothing=0.1,
    )  # fmt: skip


def available_cores() -> int:
    """Cores this process may run on, which a container or Slurm may have limited."""
    return len(os.sched_getaffinity(0))
