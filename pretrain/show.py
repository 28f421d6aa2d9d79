"""python -m pretrain.show: the layout of a real sample, for human eyes; with a model, what it predicts there.

The text with its masks, whom the slots see, and with --run or --weights the likeliest tokens at each masked place, by AE at
the context's masks and by PAR at the pseudo masks. --html FILE writes a page in which a slot that is pointed at, or reached by
the arrow keys, shows whom it sees and who sees it.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from data_prep import inspect
from data_prep.console import ArgumentParser, add_flags, run_command
from data_prep.files import write_whole
from data_prep.shards import SPLITS, DataSet, SampleBatch
from data_prep.tokenizer import Tokenizer
from pretrain.config import RunConfig
from pretrain.export import StoredModel, read_export, read_run
from pretrain.layout import CONTEXT, GIVEN, PSEUDO, Layout, Objective, pseudo_masked_layout, visible

NUM_PREDICTED = 5
_TEMPLATE = Path(__file__).with_name("show.html")
_ROLE_NAMES = {CONTEXT: "context", GIVEN: "original", PSEUDO: "pseudo mask"}
_NUM_COLOURS = 6  # of turns, over and over: those of show.html, and these of a terminal with 256
_TERMINAL_COLOURS = (33, 203, 35, 178, 80, 169)


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a masked token in one of the two ways."""

    likeliest: list[tuple[str, float]]
    """Tokens with their probabilities, the likeliest first."""
    original: float
    """The original token's probability."""


@dataclass(frozen=True)
class Target:
    """A masked token."""

    turn: int
    position: int
    original: str
    shown: str
    """What the context has there."""
    what_is_shown: inspect.Shown
    ae: Prediction | None
    par: Prediction | None


@dataclass(frozen=True)
class Group:
    """Slots next to each other of one role and turn, which see the same and are seen by the same."""

    role: int
    turn: int
    slots: range


class Sample:
    """One sample's layout, its slots in groups."""

    def __init__(self, tokenizer: Tokenizer, batch: SampleBatch, objective: Objective) -> None:
        """`batch`: one sample."""
        self.tokenizer, self.batch = tokenizer, batch
        self.layout: Layout = pseudo_masked_layout(batch, objective, mask_id=tokenizer.mask_id)
        self.ids, self.roles, self.turns, self.positions = (
            getattr(self.layout, f"{name}_N").tolist() for name in ("ids", "roles", "turns", "positions")
        )
        self.groups = [
            Group(role, turn, range((slots := [*members])[0], slots[-1] + 1))
            for (role, turn), members in groupby(
                range(len(self.ids)), lambda slot: (self.roles[slot], self.turns[slot])
            )
        ]
        self.sees = [[bool(visible(a.role, a.turn, b.role, b.turn)) for b in self.groups] for a in self.groups]
        """Whether a group (row) may attend to another (column)."""

    def name(self, token_id: int) -> str:
        """A token to be read; one that is nothing but a word's start by the mark of it."""
        return self.tokenizer.surface(token_id) or self.tokenizer.piece(token_id)

    def targets(self, model: torch.nn.Module | None) -> list[Target]:
        """The masked tokens in factorization order, with the predictions of a PMLM in eval mode."""
        layout, tokenizer = self.layout, self.tokenizer
        predictions: dict[str, list[Prediction]] = {}
        if model is not None:
            with torch.no_grad():
                hidden_RH = model.encode_predicted(layout)  # type: ignore[operator]
                for name, places_T in (("ae", layout.ae_places_T), ("par", layout.par_places_T)):
                    if places_T is not None:
                        logits_TV = model.predict(hidden_RH[places_T]).float()  # type: ignore[operator]
                        predictions[name] = self._predictions(logits_TV.softmax(dim=1))
        positions, shown = self.batch.positions_BP[0].tolist(), self.batch.shown_BP[0].tolist()
        turns = self.turns_of_targets()
        return [
            Target(
                turns[place], positions[place], self.name(original), self.name(shown[place]),
                inspect.what_is_shown(tokenizer, original, shown[place]),
                *(predictions[name][place] if name in predictions else None for name in ("ae", "par")),
            )
            for place, original in enumerate(layout.targets_T.tolist())
        ]  # fmt: skip

    def turns_of_targets(self) -> list[int]:
        """As the layout has them; without PAR as they were drawn."""
        appended = [turn for role, turn in zip(self.roles, self.turns, strict=True) if role == PSEUDO]
        return appended or self.batch.turns_BP[0, : self.layout.num_targets].tolist()

    def _predictions(self, probabilities_TV: torch.Tensor) -> list[Prediction]:
        likeliest = probabilities_TV.topk(min(NUM_PREDICTED, probabilities_TV.shape[1]), dim=1)
        originals = probabilities_TV.gather(1, self.layout.targets_T[:, None])[:, 0].tolist()
        return [
            Prediction([(self.name(i), p) for i, p in zip(ids, values, strict=True)], original)
            for ids, values, original in zip(
                likeliest.indices.tolist(), likeliest.values.tolist(), originals, strict=True
            )
        ]


# ---- in a terminal


def grid_lines(sample: Sample, paint: inspect.Paint, width: int) -> Iterator[str]:
    """Who sees whom, a group a row and a column, as many turns as fit into the width."""
    last = max((g.turn for g in sample.groups), default=0)
    num_turns = min(last, (width - 20) // 2)
    groups = [index for index, group in enumerate(sample.groups) if group.turn <= num_turns]
    rest = "" if num_turns == last else f"; turns 1 to {num_turns} of {last}, --html shows all"
    yield f"who (row) sees whom (column): the context, originals and pseudo masks by turn{rest}"
    previous = CONTEXT
    for row in groups:
        group = sample.groups[row]
        if group.role != previous:
            yield ""
            previous = group.role
        name = _ROLE_NAMES[group.role] + (f" {group.turn}" if group.turn else "")
        cells, role = [], CONTEXT
        for column in groups:
            key = sample.groups[column]
            cells += [" "] if key.role != role else []
            role = key.role
            cells.append(paint("#", key.turn) if sample.sees[row][column] else ".")
        yield f"{name:>16}  {''.join(cells)}"


def prediction_lines(targets: list[Target], paint: inspect.Paint) -> Iterator[str]:
    """What the model has for each masked token."""
    yield f"the {NUM_PREDICTED} likeliest tokens at each masked place, and the original's probability"
    for target in targets:
        shown = {"mask": "[M]", "kept": "kept"}.get(target.what_is_shown, target.shown)
        yield paint(f"turn {target.turn}: {target.original} @{target.position}, shown: {shown}", target.turn)
        for name, prediction in (("AE", target.ae), ("PAR", target.par)):
            if prediction is not None:
                words = ", ".join(f"{token} {probability:.1%}" for token, probability in prediction.likeliest)
                yield f"  {name:3}  original {prediction.original:6.1%}   {words}"


def _in_colour(text: str, turn: int) -> str:
    if not turn:
        return text
    return f"\033[38;5;{_TERMINAL_COLOURS[(turn - 1) % _NUM_COLOURS]}m{text}\033[0m"


# ---- as a page


def page(sample: Sample, targets: list[Target], title: str, model_name: str | None) -> str:
    """A whole HTML page that needs nothing else."""
    data = {
        "groups": [{"role": _ROLE_NAMES[g.role], "turn": g.turn, "first": g.slots.start, "size": len(g.slots)} for g in sample.groups],
        "sees": ["".join("01"[cell] for cell in row) for row in sample.sees],
        "positions": sample.positions,
    }  # fmt: skip
    parts = {
        "TITLE": html.escape(title),
        "FACTS": html.escape(_facts(sample, model_name)),
        "CONTEXT": "".join(_context(sample, targets)),
        "PREDICTED": "predicted" if model_name else "",
        "APPENDED": "".join(_appended(sample, targets)),
        "GRID": _grid(sample),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    text = _TEMPLATE.read_text("utf-8")
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _facts(sample: Sample, model_name: str | None) -> str:
    layout = sample.layout
    numbers = f"{layout.context_lengths[0]} tokens, {layout.num_targets} of them masked, {len(sample.ids)} slots"
    return numbers + (f"; predictions of {model_name}" if model_name else "")


def _chip(slot: int, text: str, turn: int, what: str, label: str) -> str:
    """A slot that can be pointed at."""
    kind = f" {what}" if what else ""
    colour = f" t{(turn - 1) % _NUM_COLOURS}" if turn else ""
    number = f"<sup>{turn}</sup>" if turn and what not in ("original", "pseudo") else ""
    return (
        f'<button type="button" class="slot{colour}{kind}" data-slot="{slot}" tabindex="{0 if slot == 0 else -1}" '
        f'aria-label="{html.escape(label)}">{html.escape(text)}{number}</button>'
    )


def _context(sample: Sample, targets: list[Target]) -> Iterator[str]:
    masked = {target.position: target for target in targets}
    tokenizer = sample.tokenizer
    for slot in sample.groups[0].slots:
        token_id, target = sample.ids[slot], masked.get(sample.positions[slot])
        original_id = int(sample.batch.tokens_BL[0, slot])
        yield " " if tokenizer.is_word_start(original_id) else ""
        text = sample.name(token_id)
        if target is None:
            what = "special" if token_id in tokenizer.special_ids else ""
            yield _chip(slot, text, 0, what, f"{text}, context, position {slot}")
        else:
            shown = "[M]" if target.what_is_shown == "mask" else text
            label = f"{shown} ({target.what_is_shown}), context, position {slot}, in place of {target.original}, turn {target.turn}"
            yield _chip(slot, shown, target.turn, target.what_is_shown, label)


def _appended(sample: Sample, targets: list[Target]) -> Iterator[str]:
    """A row a turn: its originals, its pseudo masks, and what is predicted."""
    given = [slot for slot, role in enumerate(sample.roles) if role == GIVEN]
    pseudo = [slot for slot, role in enumerate(sample.roles) if role == PSEUDO]
    for turn, members in groupby(range(len(targets)), lambda place: targets[place].turn):
        places = [*members]
        yield f'<section class="turn t{(turn - 1) % _NUM_COLOURS}"><h3>turn {turn}</h3><div>'
        if pseudo:
            originals = (
                _chip(
                    given[p], targets[p].original, turn, "original", f"{targets[p].original}, original of turn {turn}"
                )
                for p in places
            )
            masks = (
                _chip(pseudo[p], "[P]", turn, "pseudo", f"pseudo mask of turn {turn}, predicts {targets[p].original}")
                for p in places
            )
            yield f'<p class="pair"><span>{"".join(originals)}</span> <span>{"".join(masks)}</span></p>'
        else:
            yield f'<p class="pair">{html.escape(" ".join(targets[p].original for p in places))}</p>'
        yield '<div class="targets">'
        for place in places:
            target = targets[place]
            if target.ae is not None or target.par is not None:
                yield f'<div class="target"><h4>{html.escape(target.original)} <small>position {target.position}</small></h4>'
                for name, prediction in (("AE", target.ae), ("PAR", target.par)):
                    yield from _bars(name, prediction, target.original)
                yield "</div>"
        yield "</div></div></section>"


def _bars(name: str, prediction: Prediction | None, original: str) -> Iterator[str]:
    if prediction is None:
        return
    yield f"<table><caption>{name} <small>original {prediction.original:.1%}</small></caption>"
    for token, probability in prediction.likeliest:
        right = ' class="right"' if token == original else ""
        yield (
            f"<tr{right}><th>{html.escape(token)}</th><td>{probability:.1%}</td>"
            f'<td class="bar"><i style="width:{100 * probability:.1f}%"></i></td></tr>'
        )
    yield "</table>"


def _grid(sample: Sample) -> str:
    """Blocks of the attention grid: the context as one band, a unit for every other slot; a row looks, a column is seen."""
    num_context, num_slots = len(sample.groups[0].slots), len(sample.ids)
    num_appended = num_slots - num_context
    band = max(4.0, num_appended / 8)
    size = band + num_appended

    def extent(group: Group) -> tuple[float, int | float]:
        return (0, band) if group.role == CONTEXT else (band + group.slots.start - num_context, len(group.slots))

    parts = [
        f'<svg id="grid" viewBox="0 0 {size:g} {size:g}" data-band="{band:g}" data-context="{num_context}" role="img" '
        'aria-label="attention grid: a row looks, a column is seen">'
    ]
    gap = min(0.12, size / 400)
    for row, group in enumerate(sample.groups):
        y, height = extent(group)
        for column, key in enumerate(sample.groups):
            if sample.sees[row][column]:
                x, width = extent(key)
                colour = f"t{(key.turn - 1) % _NUM_COLOURS}" if key.turn else "c"
                parts.append(
                    f'<rect class="{colour}" x="{x + gap:g}" y="{y + gap:g}" width="{width - 2 * gap:g}" height="{height - 2 * gap:g}"/>'
                )
    parts += [
        f'<path class="edge" d="M{band + n:g} 0V{size:g}M0 {band + n:g}H{size:g}"/>' for n in {0, num_appended // 2}
    ]
    parts.append(
        f'<rect id="row" class="cursor" width="{size:g}"/><rect id="column" class="cursor" height="{size:g}"/></svg>'
    )
    return "".join(parts)


# ---- the program


def _stored_model(args: Any) -> StoredModel | None:
    if args.run:
        return read_run(args.run)
    return read_export(args.weights) if args.weights else None


def _run(args: Any) -> None:
    data = DataSet(args.data)
    batch = inspect.read_for_show(data, args.split, args.sample, 1, args.mask_set)
    stored = _stored_model(args)
    if stored and stored.tokenizer.sha256 != data.tokenizer.sha256:
        raise ValueError(f"{stored.file}: has another tokenizer than {data.folder}; its ids mean other tokens")
    if stored and stored.config.max_positions < int(batch.length_B[0]):
        raise ValueError(
            f"--sample {args.sample}: has {batch.length_B[0]} tokens, and {stored.file} {stored.config.max_positions} positions"
        )
    sample = Sample(data.tokenizer, batch, args.objective)
    targets = sample.targets(stored.load() if stored else None)
    if args.html:
        title = f"{args.split} sample {args.sample}, mask set {args.mask_set}, {args.objective.value}"
        write_whole(args.html, page(sample, targets, title, str(stored.file) if stored else None).encode())
    paint: inspect.Paint = (
        _in_colour if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else lambda text, turn: text
    )
    print("\n".join(inspect.show_samples(data, args.split, args.sample, 1, args.mask_set, paint)), end="\n\n")
    print("\n".join(grid_lines(sample, paint, shutil.get_terminal_size().columns)))
    if stored:
        print("\n" + "\n".join(prediction_lines(targets, paint)))
    if args.html:
        print(f"\nwritten: {args.html}")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m pretrain.show", description=__doc__)
    add_flags(parser, RunConfig, only=["data", "objective"])
    parser.add_argument("--split", choices=SPLITS, default="train", help="where the sample is taken from")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="its number")
    parser.add_argument("--mask_set", type=int, default=0, metavar="N", help="which of the K mask sets")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--run", type=Path, metavar="RUN", help="predict with this run's newest whole checkpoint")
    model.add_argument(
        "--weights", type=Path, metavar="EXPORT", help="predict with what `python -m pretrain.export` wrote"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="page to write")
    args = parser.parse_args()
    return run_command(partial(_run, args), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
