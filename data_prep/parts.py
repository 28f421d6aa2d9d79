"""Results of a unit in several files, which are written as its text is read: so that memory is bounded and a restart goes on
inside a unit.

    KIND-00000012-000003.npz        the fourth part of unit 12
    KIND-00000012-000004-end.npz    its last one: the unit is done
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def part_path(folder: Path, kind: str, unit: int, part: int, *, is_last: bool) -> Path:
    """Return where a part of a unit is."""
    return folder / f"{kind}-{unit:08d}-{part:06d}{'-end' if is_last else ''}.npz"


def finished_parts(folder: Path, kind: str) -> dict[int, list[Path]]:
    """Return the parts of each unit that are written, in order: one look at the folder, however many units there are."""
    found: defaultdict[int, list[Path]] = defaultdict(list)
    for name in sorted(os.listdir(folder)):
        if name.startswith(f"{kind}-") and name.endswith(".npz"):
            found[int(name.split("-")[1])].append(folder / name)
    return found


def is_done(parts: Sequence[Path]) -> bool:
    """Return whether the parts are all of their unit."""
    return bool(parts) and parts[-1].stem.endswith("-end")
