"""Draws docs/layout.svg from `pretrain.layout` itself: python docs/draw_layout.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.layout import CONTEXT, GIVEN, PSEUDO, visible

OUTPUT = Path(__file__).with_name("layout.svg")
CELL, LEFT, TOP = 26, 150, 96
COLOURS = {0: "#7a8699", 1: "#2a78d6", 2: "#d9730d"}
ROLE_NAMES = {CONTEXT: "context", GIVEN: "originals", PSEUDO: "pseudo"}

# x1 .. x6 with turns {4, 5} then {2}: role, turn, name, and what is in the slot.
SLOTS = [
    *((CONTEXT, 0, f"c{i}", "[M]" if i in (2, 4, 5) else f"x{i}") for i in range(1, 7)),
    *((GIVEN, turn, f"o{i}", f"x{i}") for i, turn in ((4, 1), (5, 1), (2, 2))),
    *((PSEUDO, turn, f"p{i}", "[P]") for i, turn in ((4, 1), (5, 1), (2, 2))),
]


def draw() -> str:
    """The SVG: a filled cell where the row's slot may attend to the column's."""
    size = len(SLOTS) * CELL
    width, height = LEFT + size + 20, TOP + size + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="22" font-weight="bold" fill="#1a1f29">Who may attend to whom (row looks, column is seen)</text>',
    ]
    for index, (_, turn, name, content) in enumerate(SLOTS):
        x, y = LEFT + index * CELL + CELL / 2, TOP + index * CELL + CELL / 2 + 4
        parts.append(f'<text x="{x}" y="{TOP - 26}" text-anchor="middle" fill="{COLOURS[turn]}">{name}</text>')
        parts.append(f'<text x="{x}" y="{TOP - 9}" text-anchor="middle" font-size="11" fill="#1a1f29">{content}</text>')
        parts.append(f'<text x="{LEFT - 44}" y="{y}" text-anchor="end" fill="{COLOURS[turn]}">{name}</text>')
        parts.append(f'<text x="{LEFT - 9}" y="{y}" text-anchor="end" font-size="11" fill="#1a1f29">{content}</text>')
    for row, (query_role, query_turn, *_) in enumerate(SLOTS):
        for column, (key_role, key_turn, *_) in enumerate(SLOTS):
            is_seen = visible(query_role, query_turn, key_role, key_turn)
            fill = COLOURS[key_turn] if is_seen else "#eef0f3"
            x, y = LEFT + column * CELL + 1, TOP + row * CELL + 1
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="{fill}"/>')
    for role, name in ROLE_NAMES.items():
        places = [index for index, slot in enumerate(SLOTS) if slot[0] == role]
        middle = (places[0] + places[-1] + 1) * CELL / 2
        parts.append(f'<text x="{LEFT + middle}" y="{TOP - 46}" text-anchor="middle" fill="#1a1f29">{name}</text>')
        parts.append(f'<text x="12" y="{TOP + middle + 4}" fill="#1a1f29">{name}</text>')
    legend = [(0, "context"), (1, "turn 1: x4 x5"), (2, "turn 2: x2")]
    for index, (turn, text) in enumerate(legend):
        x = LEFT + index * 112
        parts.append(f'<rect x="{x}" y="{TOP + size + 22}" width="14" height="14" rx="3" fill="{COLOURS[turn]}"/>')
        parts.append(f'<text x="{x + 20}" y="{TOP + size + 34}" fill="#1a1f29">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    OUTPUT.write_text(draw())
