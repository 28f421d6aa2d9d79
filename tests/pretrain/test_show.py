"""pretrain.show: what it draws is the layout, what it predicts is the model's, and the page works in a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from models import stored
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from data_prep.inspect import read_for_show
from data_prep.shards import DataSet
from pretrain.export import write_export
from pretrain.layout import GIVEN, PSEUDO, Objective, pseudo_masked_layout, visible
from pretrain.show import Sample, grid_lines, main

SAMPLE = 17
PLACES = ("AE", "PAR")


@pytest.fixture(scope="module")
def export(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the data set's tokenizer."""
    folder = tmp_path_factory.mktemp("show") / "export"
    write_export(folder, stored(DataSet(data_folder).tokenizer, max_positions=64))
    return folder


@pytest.fixture(scope="module")
def page(data_folder: Path, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sample with predictions."""
    file = tmp_path_factory.mktemp("page") / "sample.html"
    words = ["show", "--data", data_folder, "--sample", SAMPLE, "--weights", export, "--html", file]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, words)])
        assert main() == 0
    return file


def sample_of(data_folder: Path, objective: Objective = Objective.AE_PAR) -> Sample:
    data = DataSet(data_folder)
    return Sample(data.tokenizer, read_for_show(data, "train", SAMPLE, 1, 0), objective)


def seen_of(sample: Sample, slot: int) -> tuple[list[int], list[int]]:
    """Whom a slot sees and who sees it, pair by pair."""
    facts = [*zip(sample.roles, sample.turns, strict=True)]
    slots = range(len(facts))
    sees = [other for other in slots if visible(*facts[slot], *facts[other])]
    return sees, [other for other in slots if visible(*facts[other], *facts[slot])]


def shown_by(browser: Browser) -> tuple[list[int], list[int], list[int]]:
    """The slots that the page marks: those seen, those that see, the slot itself."""
    script = "[...document.querySelectorAll('button.slot.' + arguments[0])].map(chip => Number(chip.dataset.slot))"
    return tuple(sorted(browser(script, name)) for name in ("sees", "seen", "self"))  # type: ignore[return-value]


def chip(browser: Browser, slot: int) -> Any:
    return browser.find(f'button.slot[data-slot="{slot}"]')


@pytest.mark.parametrize("objective", list(Objective))
def test_groups_see_what_their_slots_see(data_folder: Path, objective: Objective) -> None:
    sample = sample_of(data_folder, objective)
    assert [slot for group in sample.groups for slot in group.slots] == [*range(len(sample.ids))]
    for row, group in enumerate(sample.groups):
        seen = [slot for column, key in enumerate(sample.groups) if sample.sees[row][column] for slot in key.slots]
        assert all(seen_of(sample, slot)[0] == seen for slot in group.slots)


def test_the_terminals_grid_is_the_layouts(data_folder: Path) -> None:
    sample = sample_of(data_folder)
    head, *rows = grid_lines(sample, lambda text, turn: text, 200)
    cells = [row[18:].replace(" ", "") for row in rows if row]
    assert cells == ["".join(".#"[cell] for cell in row) for row in sample.sees]
    assert "all" not in head
    narrow = [*grid_lines(sample, lambda text, turn: text, 26)]
    assert "turns 1 to 3 of" in narrow[0]
    assert len([row for row in narrow[1:] if row]) == 7


def test_predictions_are_the_models(data_folder: Path) -> None:
    """Against all slots' vectors and a whole softmax, one token after the other."""
    sample = sample_of(data_folder)
    data = DataSet(data_folder)
    model = stored(data.tokenizer, max_positions=64).load()
    targets = sample.targets(model)
    with torch.no_grad():
        probabilities_NV = model.predict(model.encode(sample.layout)).softmax(dim=1)
    pseudo = [slot for slot, role in enumerate(sample.roles) if role == PSEUDO]
    originals = [data.tokenizer.surface(sample.ids[slot]) for slot, role in enumerate(sample.roles) if role == GIVEN]
    assert [target.original for target in targets] == originals
    for target, slot in zip(targets, pseudo, strict=True):
        assert target.turn == sample.turns[slot]
        assert target.position == sample.positions[slot]
        for prediction, at in ((target.ae, target.position), (target.par, slot)):
            assert prediction is not None
            values, ids = probabilities_NV[at].sort(descending=True)
            assert [p for _, p in prediction.likeliest] == pytest.approx(values[:5].tolist(), rel=1e-4)
            assert [token for token, _ in prediction.likeliest] == [sample.name(i) for i in ids[:5].tolist()]
            original_id = int(sample.layout.targets_T[pseudo.index(slot)])
            assert prediction.original == pytest.approx(float(probabilities_NV[at, original_id]), rel=1e-4)


def test_what_is_shown_in_the_context_is_told_apart(data_folder: Path) -> None:
    """Of many samples all three occur, and each is what the layout's ids say."""
    data, found = DataSet(data_folder), set()
    for number in range(20):
        sample = Sample(data.tokenizer, read_for_show(data, "train", number, 1, 0), Objective.AE_PAR)
        for target, original in zip(sample.targets(None), sample.layout.targets_T.tolist(), strict=True):
            there = sample.ids[target.position]
            assert (there == data.tokenizer.mask_id) == (target.what_is_shown == "mask")
            assert (there == original) == (target.what_is_shown == "kept")
            found.add(target.what_is_shown)
    assert found == {"mask", "kept", "replaced"}


def test_pointing_at_a_slot_shows_whom_it_sees(browser: Browser, page: Path, data_folder: Path) -> None:
    sample = sample_of(data_folder)
    browser.open(page)
    last = len(sample.ids) - 1
    slots = [3, sample.roles.index(GIVEN), sample.roles.index(PSEUDO), last]
    for slot in slots:
        ActionChains(browser.driver).move_to_element(chip(browser, slot)).perform()
        assert shown_by(browser) == (*seen_of(sample, slot), [slot])
    assert f"slot {last}" in browser.find("#info").text
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    assert "Point at a slot" in browser.find("#info").text
    chip(browser, 3).click()  # is held now
    chip(browser, 3).send_keys(Keys.ARROW_RIGHT)
    assert shown_by(browser)[2] == [4]
    chip(browser, 4).send_keys(Keys.ESCAPE)
    assert not browser("document.body.classList.contains('chosen')")
    grid = browser.find("#grid")
    ActionChains(browser.driver).move_to_element_with_offset(grid, 0, 9).perform()  # below its middle
    num_context = sample.layout.context_lengths[0]
    band, size = (float(value) for value in browser("[grid.dataset.band, grid.viewBox.baseVal.height]"))
    middle = num_context + int(size * (0.5 + 9 / grid.size["height"]) - band)
    assert shown_by(browser) == (*seen_of(sample, middle), [middle])
    assert browser.console_errors() == []


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_can_be_read(browser: Browser, page: Path, width: int, scheme: Any) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.overflow_pixels() == 0
    ink, paper = (browser(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert _luminance(ink) < _luminance(paper) if scheme == "light" else _luminance(ink) > _luminance(paper)
    boxes = browser(
        "[...document.querySelectorAll('#grid rect:not(.cursor)')].map(r => r.getBoundingClientRect().width)"
    )
    assert min(boxes) >= 1
    if width == 400:  # no pointer to hover with
        chip(browser, 5).click()
        assert shown_by(browser)[2] == [5]
    assert browser.console_errors() == []


def _luminance(colour: str) -> float:
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def test_the_command_tells_in_plain_text_what_it_cannot(
    data_folder: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["show", "--data", str(data_folder), *map(str, words)])
        status = main()
        return status, *capsys.readouterr()

    status, out, _ = run("--sample", SAMPLE, "--weights", export)
    assert status == 0
    assert "\033" not in out
    for expected in (f"train sample {SAMPLE}", "pseudo mask 1", "AE   original", "PAR  original"):
        assert expected in out
    for words, fault in (
        (("--sample", 10**6), "--sample 1000000: train has samples 0 to"),
        (("--mask_set", 9), "--mask_set 9"),
        (("--run", data_folder), "no checkpoint there"),
        (("--weights", data_folder), "config.json"),
    ):
        status, _, error = run(*words)
        assert status == 2
        assert fault in error
        assert error.count("\n") == 1


def test_markup_in_a_text_stays_text(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.show import page as page_of

    sample = sample_of(data_folder)
    monkeypatch.setattr(Sample, "name", lambda self, token_id: '<script>"&')
    text = page_of(sample, sample.targets(None), "<b>", None)
    assert text.count("<script>") == 1
    assert "<b>" not in text.split("<script>")[0]
    layout = pseudo_masked_layout(sample.batch, Objective.AE_PAR, mask_id=sample.tokenizer.mask_id)
    assert text.count("&lt;script&gt;") >= len(layout.targets_T)
