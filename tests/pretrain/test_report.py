"""A run of a mixture with all that it records of itself, and its report in a browser."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from support import REPOSITORY, RUN_IN_ANY_PRECISION, deepspeed_json, run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.build import build
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.shards import DataSet
from pretrain.batches import validation_samples
from pretrain.ds_config import DeepSpeedConfig
from pretrain.history import History
from pretrain.metrics import METRICS, read_records
from pretrain.report import write_report
from pretrain.watch import look

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def folder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: fp16 with overflows, two corpora, DeepSpeed's CSV monitor."""
    folder = tmp_path_factory.mktemp("report")
    chapters = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0[1-6].txt"))
    mixture = [
        Corpus(chapters, name="novel"),
        Corpus([REPOSITORY / "sample_corpus" / "devils_dictionary.jsonl"], name="words"),
    ]
    parameters = BuildParameters(max_length_tokens=64, validation_fraction=0.2, shard_samples=1024)
    with LocalProcesses(1) as processes:
        build(mixture, data_folder / "tokenizer.model", folder / "data", parameters, processes)
    (folder / "prompts.txt").write_text("It is a [MASK] universally acknowledged.\nMr [MASK] and <b>Mrs</b> [MASK]\n")
    config = deepspeed_json(
        folder / "ds.json", train_batch_size=16, fp16={"enabled": True, "initial_scale_power": 20, "hysteresis": 1},
        scheduler={"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 1, "total_num_steps": 99}},
        csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "csv"},
    )  # fmt: skip
    command = [
        "python", RUN_IN_ANY_PRECISION, "--deepspeed_config", str(config), "--data", str(folder / "data"), "--run", str(folder / "run"),
        "--model", "tiny", "--hidden_size", "32", "--intermediate_size", "64", "--log_every_steps", "1", "--validate_every_steps", "3",
        "--save_every_steps", "3", "--validation_samples", "40", "--cloze_prompts", str(folder / "prompts.txt"), "--max_steps",
    ]  # fmt: skip
    done = run_command([*command, str(STEPS)])
    assert done.returncode == 0, done.stderr
    return folder


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "run") if record["kind"] == kind]


def test_a_start_tells_what_the_run_is_made_of(folder: Path) -> None:
    (first,) = of_kind(folder, "start")
    assert first["config"]["validation_samples"] == 40
    assert first["deepspeed"] == json.loads((folder / "ds.json").read_text())
    assert first["data"]["splits"]["train"]["num_samples"] == DataSet(folder / "data").num_samples("train")
    assert [share["corpus"] for share in first["data"]["mixture"]] == ["novel", "words"]
    assert re.fullmatch(r"[0-9a-f]{64}", first["code"]["sha256"])
    assert first["code"]["commit"]
    assert sum(first["machine"]["hosts"].values()) == 1
    assert first["machine"]["versions"]["deepspeed"]


def test_a_training_record_tells_speed_and_memory(folder: Path) -> None:
    records = of_kind(folder, "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["skipped_steps"] > 0
    for record in records:
        assert 2e8 < record["host_memory_bytes"] < 2e10
        per_token = record["flops_per_s"] / record["tokens_per_s"]
        assert 1e5 < per_token < 1e7  # 6 x 0.1M parameters, attention and head


def test_validation_by_corpus_adds_up(folder: Path) -> None:
    """The corpora's losses, weighted by their masked tokens, are the whole's; each has its part of the samples."""
    data = DataSet(folder / "data")
    chosen = validation_samples(data, 40)
    sizes = {corpus: len(samples) for corpus, samples in data.samples_of_corpora("validation").items()}
    assert sum(sizes.values()) == data.num_samples("validation") > 80
    assert sum(map(len, chosen.values())) == 40
    for corpus, samples in chosen.items():
        of_corpus = data.samples_of_corpora("validation")[corpus]
        assert samples.start == of_corpus.start
        assert of_corpus.stop - 2 * samples.step <= samples[-1] < of_corpus.stop, "spread over the corpus's files"
        assert len(samples) == pytest.approx(40 * sizes[corpus] / sum(sizes.values()), abs=1)
    masked = [data.read_samples("validation", s.start, s.stop).num_masked_B[:: s.step].sum() for s in chosen.values()]
    records = of_kind(folder, "validation")
    assert [record["step"] for record in records] == [0, 3, 6]
    for record in records:
        for key in ("ae_loss", "par_loss", "ae_accuracy", "par_accuracy"):
            values = [record["corpora"][corpus][key] for corpus in ("novel", "words")]
            assert values[0] != values[1] or "accuracy" in key
            whole = sum(n * value for n, value in zip(masked, values, strict=True)) / sum(masked)
            assert record[key] == pytest.approx(whole, rel=1e-9)


def test_prompts_are_filled_in_at_every_validation(folder: Path) -> None:
    records = of_kind(folder, "cloze")
    assert [record["step"] for record in records] == [0, 3, 6]
    for record in records:
        assert [len(prompt["masks"]) for prompt in record["prompts"]] == [1, 2]
        odds = [p for prompt in record["prompts"] for mask in prompt["masks"] for _, p in mask]
        assert all(0 < p < 1 for p in odds)
    assert records[0]["prompts"] != records[-1]["prompts"]
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    assert "cloze/text_summary" in events.Tags()["tensors"]
    assert {"train/ae_loss", "validation/corpora/words/par_loss"} <= set(events.Tags()["scalars"])


def test_deepspeeds_monitors_get_what_is_recorded(folder: Path) -> None:
    """At samples of the run, which DeepSpeed counts its own values by."""
    for kind, name in (("train", "ae_loss"), ("validation", "corpora_words_ae_loss")):
        with open(folder / "csv" / f"{kind}_{name}.csv") as file:
            rows = [row for row in csv.reader(file) if row[0] != "step"]
        expected = [
            (16 * record["step"], record["corpora"]["words"]["ae_loss"] if kind == "validation" else record["ae_loss"])
            for record in of_kind(folder, kind)
        ]
        assert [(int(step), float(value)) for step, value in rows] == expected


def test_a_package_that_a_monitor_lacks_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"wandb.enabled: the package wandb is not installed; pip install wandb"):
        DeepSpeedConfig(deepspeed_json(folder / "wandb.json", wandb={"enabled": True}))


def test_watch_finds_the_run_finished(folder: Path) -> None:
    records = read_records(folder / "run")
    view = look(folder / "run", records, now=records[-1]["time"])
    assert (view.state, view.step, view.total_steps, view.restarts, view.faults) == ("finished", STEPS, STEPS, 0, [])


# ---- the page


LABELS = """(() => {
  const faults = [];
  for (const svg of document.querySelectorAll(".plot svg")) {
    const frame = svg.getBoundingClientRect(), name = svg.closest("figure").id;
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect(), parseFloat(getComputedStyle(t).fontSize)]);
    if (texts.length < 4) faults.push(`${name}: ${texts.length} labels`);
    texts.forEach(([text, box, size], n) => {
      if (size < 11) faults.push(`${name}: "${text}" has ${size} px`);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        faults.push(`${name}: "${text}" is outside`);
      for (const [other, o] of texts.slice(n + 1))
        if (box.left < o.right && o.left < box.right && box.top + 2 < o.bottom && o.top + 2 < box.bottom) faults.push(`${name}: "${text}" is on "${other}"`);
    });
  }
  return faults;
})()"""
CONTRAST = """(() => {
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
  return Math.min(...[...document.querySelectorAll("figure text, figcaption, .key, td, th, figcaption small")].map(e => {
    const own = light(getComputedStyle(e)[e.namespaceURI.endsWith("svg") ? "fill" : "color"]);
    return (Math.max(own, ground) + .05) / (Math.min(own, ground) + .05);
  }));
})()"""


def made_up(path: Path, name: str, num_records: int, lr: float) -> Path:
    """A long run with restarts, a rewind, spikes and NaN, made of the real one's start."""
    start = of_kind(path, "start")[0]
    run = path / name
    run.mkdir()
    start |= {"deepspeed": start["deepspeed"] | {"optimizer": {"type": "Adam", "params": {"lr": lr}}}}
    records = [start]
    for number in range(1, num_records + 1):
        seconds = start["time"] + 30 * number
        loss = 2 + 6 / (1 + number / 500) + (9 if number == num_records // 2 else 0)
        records.append({
            "kind": "train", "step": 10 * number, "time": seconds, "ae_loss": loss, "par_loss": loss - 0.1, "learning_rate": lr,
            "gradient_norm": float("inf") if number % 999 == 0 else 1.0 + number % 7, "loss_scale": 2.0 ** (10 + number // 999 % 5),
            "skipped_steps": number // 999, "tokens_per_s": 1e6 + number % 13, "data_wait": 0.01, "flops_per_s": 1e12,
            "host_memory_bytes": 3 * 10**9, "memory_bytes": 30 * 10**9,
        })  # fmt: skip
        if number % (num_records // 4) == 0:
            records.append({"kind": "fault", "step": 10 * number - 50, "time": seconds, "fault": "</script><b>", "fault_step": 10 * number,
                            "first_sample": 1, "stop_sample": 9})  # fmt: skip
            records.append(start | {"resumed": True, "step": 10 * number, "time": seconds})
    (run / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Of the real run alone."""
    output = folder / "out" / "report.html"
    done = run_command(["python", "-m", "pretrain.report", str(folder / "run"), "--output", str(output)])
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{output}, \d+ kB; beside it 14 PNGs, report-\*.png\n", done.stdout)
    return output


def test_the_page_stands_alone(page: Path) -> None:
    content = page.read_text()
    assert len(content) < 200_000
    assert not re.search(r"""(src|href)=["'](?!data:)""", content)
    assert not re.search(r"https?://(?!www\.w3\.org/)", content)
    pictures = {path.name for path in page.parent.glob("*.png")}
    assert {
        "report-ae_loss.png",
        "report-par_loss_by_corpus.png",
        "report-loss_scale.png",
        "report-memory.png",
    } <= pictures
    assert all((page.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert not list(page.parent.glob(".*"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_legible(page: Path, browser: Browser, width: int, scheme: Any) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser("document.querySelectorAll('figure .series path').length") >= 20
    assert browser(LABELS) == []
    assert browser(CONTRAST) > 4.5
    assert browser.overflow_pixels() == 0
    assert browser.console_errors() == []


def test_the_page_tells_all_of_the_run(page: Path, browser: Browser) -> None:
    browser.open(page)
    charts = browser("[...document.querySelectorAll('figure')].map(f => f.id)")
    assert charts == [
        "ae_loss", "par_loss", "ae_accuracy", "par_accuracy", "ae_loss_by_corpus", "par_loss_by_corpus", "learning_rate",
        "gradient_norm", "loss_scale", "tokens_per_s", "tflops", "data_wait", "memory", "checkpoint_stalls", "timeline",
    ]  # fmt: skip
    text = browser("document.body.textContent")
    for expected in (
        "6 of 6",
        "started on 1 rank",
        "It is a [MASK] universally",
        "<b>Mrs</b>",
        "validation_samples",
    ):
        assert expected in text
    last = of_kind(page.parent.parent, "validation")[-1]
    assert f"{last['ae_loss']:.4f}" in text
    shown = browser("data.charts[0].series.find(s => s.label === 'validation').values")
    assert shown == pytest.approx([record["ae_loss"] for record in of_kind(page.parent.parent, "validation")], rel=1e-4)


def test_the_axis_can_be_switched_and_a_part_chosen(page: Path, browser: Browser) -> None:
    browser.open(page)

    def last_label() -> str:
        return str(
            browser(
                "[...document.querySelectorAll('#ae_loss svg text')].filter(t => t.getAttribute('text-anchor') === 'middle').at(-1).textContent"
            )
        )

    assert last_label() == "6"
    history = History(page.parent.parent / "run")
    tokens = 6 * (history.tokens_per_step or 0)
    browser.driver.execute_script("document.querySelector('input[value=tokens]').click()")
    assert 0.6 * tokens < float(last_label()) <= tokens  # some thousand
    browser.driver.execute_script("document.querySelector('input[value=hours]').click()")
    assert float(last_label()) <= history.hours * 1.001
    browser.driver.execute_script("document.querySelector('input[value=steps]').click()")
    drag = """(() => {
      const plot = document.querySelector("#ae_loss .plot"), box = plot.getBoundingClientRect();
      plot.setPointerCapture = () => {};
      const send = (type, share) => plot.dispatchEvent(new PointerEvent(type, {clientX: box.left + share * box.width, clientY: box.top + 50, pointerId: 1}));
      send("pointermove", .5);
      const tip = plot.querySelector(".tip").textContent;
      send("pointerdown", .5); send("pointermove", .9); send("pointerup", .9);
      return tip;
    })()"""
    tip = browser(drag)
    assert re.match(r"step 3training [\d.]+validation [\d.]+$", tip)
    low, high = browser("part")
    assert 2 < low < 3.5 < 5 < high < 6
    assert browser(LABELS) == []
    browser.find("#whole").click()
    assert browser("part") is None
    assert browser.console_errors() == []


def test_long_runs_are_thinned_and_compared(folder: Path, browser: Browser) -> None:
    runs = [made_up(folder, "a", 6_000, 1e-3), made_up(folder, "b", 2_000, 5e-4)]
    output = folder / "both" / "report.html"
    write_report(runs, output)
    assert output.stat().st_size < 1_500_000
    browser.open(output, width=400)
    assert browser("document.title") == "a and b"
    rows = browser(
        "[...document.querySelectorAll('#differences tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert rows == [["deepspeed.optimizer.params.lr", "0.001", "0.0005"]]
    loss = browser("data.charts[0].series.filter(s => s.run === 0)")
    assert [series["style"] for series in loss] == ["extremes", "faint"]
    assert max(loss[0]["values"]) == pytest.approx(2 + 6 / (1 + 3_000 / 500) + 9, rel=1e-4)
    assert len(loss[0]["values"]) <= 1002
    assert "Of up to 6,000 training records" in browser("document.body.textContent")
    assert browser("document.querySelectorAll('#loss_scale .series .mark').length") == 6 + 2
    assert browser("document.querySelectorAll('#timeline .mark').length") >= 8
    assert browser("document.body.textContent").count("</script><b>; back to step") == 8
    assert browser(LABELS) == []
    assert browser.overflow_pixels() == 0
    assert browser.console_errors() == []


def test_folders_that_are_no_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no records of a run there"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="9 runs, expected at most 8"):
        write_report([tmp_path] * 9, tmp_path / "report.html")
    with pytest.raises(ValueError, match="a run is given twice"):
        write_report([folder / "run"] * 2, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
