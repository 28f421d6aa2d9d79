"""How much a DeepSpeed JSON says is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.files import read_json


@dataclass(frozen=True)
class Recipe:
    """What a DeepSpeed JSON says about how much is read."""

    path: Path
    train_batch_size: int
    total_steps: int


def read_recipe(path: Path) -> Recipe:
    """Batch size and steps of a DeepSpeed JSON. Raises FileNotFoundError, or ValueError for a key that is missing or bad."""
    if not path.is_file():
        raise FileNotFoundError(
            2, "no such DeepSpeed configuration (this program's folder ds_configs has some)", str(path)
        )
    values = read_json(path)
    faults = []

    def number(*keys: str) -> int:
        value = values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            faults.append(f"{'.'.join(keys)} is missing: without it there is no telling how many samples are read")
        elif type(value) is not int or value < 1:
            faults.append(f"{'.'.join(keys)}: expected a whole number of at least 1, found {value!r}")
        return value  # type: ignore[no-any-return]

    recipe = Recipe(path, number("train_batch_size"), number("scheduler", "params", "total_num_steps"))
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return recipe
