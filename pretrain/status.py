"""How far a run is: `python -m pretrain.status --run RUN`.

Exit status 0: finished; 3: not finished, so that the command that started it would go on; 2: cannot be told.
Decided from the newest whole checkpoint, whatever the processes' exit statuses were.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from data_prep.console import USER_ERROR_STATUS, ArgumentParser, describe_error
from data_prep.files import read_json, write_json
from pretrain.checkpoint import newest_whole

UNFINISHED_STATUS = 3
_PLAN = "run.json"


@dataclass(frozen=True)
class Status:
    """What a run has come to."""

    step: int
    """Of the newest whole checkpoint; 0 without any."""
    total_steps: int
    checkpoint: Path | None
    passed_over: list[str]
    """A line for each newer checkpoint that is not whole."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.total_steps


def write_plan(run: Path, total_steps: int) -> None:
    """Note at a run's start where it is to end; a later start may say otherwise."""
    write_json(run / _PLAN, {"total_steps": total_steps})


def read_status(run: Path) -> Status:
    """Raises OSError or ValueError where there is no run, or none of its checkpoints is whole."""
    if not (run / _PLAN).is_file():
        raise FileNotFoundError(2, "no run was started there; expected the folder given as --run", str(run))
    checkpoint, passed_over = newest_whole(run)
    return Status(
        checkpoint.step if checkpoint else 0, int(read_json(run / _PLAN)["total_steps"]),
        checkpoint.folder if checkpoint else None, passed_over,
    )  # fmt: skip


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m pretrain.status", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="PATH", help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a line")
    args = parser.parse_args()
    try:
        status = read_status(args.run)
    except (ValueError, OSError) as error:
        print(f"pretrain.status: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR_STATUS
    if args.json:
        print(json.dumps({
            "step": status.step, "total_steps": status.total_steps, "is_finished": status.is_finished,
            "checkpoint": str(status.checkpoint) if status.checkpoint else None, "passed_over": status.passed_over,
        }))  # fmt: skip
    else:
        finished = "finished" if status.is_finished else "not finished"
        print(
            f"{args.run}: step {status.step} of {status.total_steps}, {finished}, {status.checkpoint or 'no checkpoint'}"
        )
    return 0 if status.is_finished else UNFINISHED_STATUS


if __name__ == "__main__":
    sys.exit(main())
