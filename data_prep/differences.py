"""What is different between two descriptions of one thing, for an error message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_MOST_TOLD = 5
_HEX_DIGITS_TOLD = 12
_MISSING = object()


def differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """Return a phrase for each value that differs: `mask_sets was 2, is 3`.

    Values in mappings are named by their key, entries of lists by their `name` where they have one, else by their number.
    """
    was, now = _as_mapping(was), _as_mapping(now)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from differences(was.get(key, _MISSING), now.get(key, _MISSING), f"{name} {key}".strip())
        if was == now and list(was) != list(now):
            yield f"the order of the {name} is another"
    elif was != now:
        yield f"{name} was {_as_text(was)}, is {_as_text(now)}"


def describe_differences(was: Any, now: Any) -> str:
    """Return the first differences as one phrase; how many more there are."""
    found = list(differences(was, now))
    more = f"; and {len(found) - _MOST_TOLD:,} more" if len(found) > _MOST_TOLD else ""
    return "; ".join(found[:_MOST_TOLD]) + more


def _as_mapping(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in value]
    if None in names or len(set(names)) < len(names):
        return dict(enumerate(value))
    return {name: {k: v for k, v in entry.items() if k != "name"} for name, entry in zip(names, value, strict=True)}


def _as_text(value: Any) -> str:
    if value is _MISSING:
        return "not there"
    if isinstance(value, str):
        is_hash = len(value) == 64 and set(value) <= set("0123456789abcdef")
        return value[:_HEX_DIGITS_TOLD] if is_hash else value
    return json.dumps(value, ensure_ascii=False)
