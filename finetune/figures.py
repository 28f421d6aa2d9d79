"""Figures of a training: learning curve and confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import unfinished_file

_MOST_NAMED, _MOST_NAME_CHARACTERS = 40, 30
"""Confusion matrices of more classes have neither names nor numbers; longer names are cut."""
_MAX_SIDE_INCHES = 30.0


def draw_figure(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 5)) -> None:
    """Write a PNG, whole."""
    from matplotlib.figure import Figure  # here, because it takes its time to import

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with unfinished_file(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def draw_learning_curve(path: Path, records: Sequence[dict[str, Any]], score_name: str, sign: float) -> None:
    """Draw training loss and validation score against steps; the score times `sign` is what its name says."""

    def draw(figure: Any) -> None:
        loss, score = figure.subplots(2, 1, sharex=True)
        for axes, kind, name, factor in ((loss, "train", "loss", 1.0), (score, "validation", "score", sign)):
            points = [(r["step"], factor * r[name]) for r in records if r["kind"] == kind]
            axes.plot(*zip(*points, strict=True), marker="." if kind == "validation" else None)
            axes.set_ylabel(f"{kind} {name if kind == 'train' else score_name}")
        score.set_xlabel("step")

    draw_figure(path, draw)


def draw_confusion_matrix(path: Path, labels: Sequence[float], predicted: Sequence[int], names: Sequence[str]) -> None:
    """Draw how many of each class (a row) were taken for which (a column); names are drawn as they are, `$` included.

    Names that no installed font can draw are replaced by their numbers among the classes, which config.json lists.
    """
    from matplotlib import font_manager
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix([int(x) for x in labels], predicted, labels=range(len(names)))
    is_named = len(names) <= _MOST_NAMED
    fonts, shown = drawable(names if is_named else [], font_manager)
    is_numbered = not is_named or any(name.isdecimal() for name in set(shown) - set(names))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
        numbers = ", by its number in model/config.json" if is_numbered else ""
        axes.set_xlabel(f"predicted class{numbers}")
        axes.set_ylabel(f"class{numbers}")
        if not is_named:
            return
        axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", parse_math=False, fontfamily=fonts)
        axes.set_yticks(range(len(names)), shown, parse_math=False, fontfamily=fonts)
        for (row, column), count in np.ndenumerate(counts):
            is_dark = count > counts[row].sum() / 2
            axes.text(column, row, str(count), ha="center", va="center", color="white" if is_dark else "black")

    side = min(max(4.0, 1.5 + 0.6 * len(names)), _MAX_SIDE_INCHES)
    draw_figure(path, draw, (side, side))


def drawable(names: Sequence[str], font_manager: Any) -> tuple[list[str], list[str]]:
    """Return font families, in the order in which they are to be tried, and the names as those fonts can draw them."""
    families, glyphs = ["DejaVu Sans"], _characters_of(font_manager.findfont("DejaVu Sans"))
    wanted = {c for name in names for c in name if c.isprintable() and not c.isspace()}
    if wanted - glyphs:
        for font in font_manager.fontManager.ttflist:
            if wanted & (more := _characters_of(font.fname)) - glyphs:
                families.append(font.name)
                glyphs |= more
            if not wanted - glyphs:
                break
    shown = []
    for number, name in enumerate(names):
        can_draw = name.isprintable() and {c for c in name if not c.isspace()} <= glyphs
        short = name if len(name) <= _MOST_NAME_CHARACTERS else f"{name[:_MOST_NAME_CHARACTERS]}…"
        shown.append(short if can_draw else str(number))
    return families, shown


def _characters_of(font_file: str) -> set[str]:
    from matplotlib.ft2font import FT2Font

    return {chr(code) for code in FT2Font(font_file).get_charmap()}
