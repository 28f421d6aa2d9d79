"""benchmarks.study, small: its jobs, what they leave, and that they are not done twice."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support import REPOSITORY

from benchmarks.study import plan
from benchmarks.study.__main__ import Study
from benchmarks.study.plan import Arm
from benchmarks.study.report import write_report
from benchmarks.study.tasks import RESULT, Classification, QuestionAnswering, Sizes, Writing, random_twin
from data_prep.files import read_json, write_json
from finetune.classify_data import ColumnSettings
from finetune.seq2seq_data import Seq2SeqSettings

TRAINING = {"micro_batch_size": 8, "batch_size": 16, "learning_rate": 1e-3, "epochs": 1}
SIZES = Sizes(40, 10, 20)
TASKS = (
    Classification("letters", "which letter", SIZES, TRAINING, ColumnSettings(), 32),
    QuestionAnswering("spans", "which span", Sizes(8, 3, 4), TRAINING, 100),
    Writing("titles", "which title", SIZES, TRAINING, Seq2SeqSettings(48, 16, num_beams=2)),
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As benchmarks.corpora writes them: a text of Austen's, and tasks made of its sentences."""
    folder = tmp_path_factory.mktemp("corpora")
    chapters = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("*.txt"))[:12]
    paragraphs = [
        line for chapter in chapters for line in chapter.read_text("utf-8").splitlines() if len(line.split()) > 12
    ]
    titles = [" ".join(paragraph.split()[:4]) for paragraph in paragraphs]
    (folder / "text").mkdir()
    (folder / "text" / "novel.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    (folder / "text" / "titled.jsonl").write_text(
        "".join(json.dumps({"text": f"{t}\n{p}"}) + "\n" for t, p in zip(titles, paragraphs, strict=True))
    )
    parts = {"train": slice(0, 100), "validation": slice(100, 115), "test": slice(115, 125)}
    for task in TASKS:
        (folder / "tasks" / task.name).mkdir(parents=True)
    for part, which in parts.items():
        rows = [f"{p[0].lower()}\t{' '.join(p.split())}" for p in paragraphs[which]]
        rows = [row if row[0] in "ait" else f"x{row[1:]}" for row in rows]
        (folder / "tasks" / "letters" / f"{part}.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
        pairs = [{"src": p, "tgt": t} for p, t in zip(paragraphs[which], titles[which], strict=True)]
        (folder / "tasks" / "titles" / f"{part}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        passages = [
            {"context": p, "qas": [
                {"id": f"{part}{i}a", "question": "Begins with?", "is_impossible": False, "answers": [{"text": t, "answer_start": 0}]},
                {"id": f"{part}{i}b", "question": "Who flies?", "is_impossible": True, "answers": []},
            ]}
            for i, (p, t) in enumerate(zip(paragraphs[which], titles[which], strict=True))
        ]  # fmt: skip
        data = {"version": "v2.0", "data": [{"title": "", "paragraphs": passages}]}
        (folder / "tasks" / "spans" / f"{part}.json").write_text(json.dumps(data))
    return folder


def test_no_sample_is_trained_on_and_tested(corpora: Path, tmp_path: Path) -> None:
    for task in TASKS:
        files = task.prepare(corpora, tmp_path / task.name)
        texts = [file.read_text() for file in (files.train, files.validation, files.test)]
        again = task.prepare(corpora, tmp_path / task.name)
        assert [file.read_text() for file in (again.train, again.validation, again.test)] == texts
        if task.name == "spans":
            sets = [set(re.findall(r'"id": "(\w+)[ab]"', text)) for text in texts]
        else:
            sets = [set(text.splitlines()[task.name == "letters" :]) for text in texts]
        assert [len(of_part) for of_part in sets] == [task.sizes.train, task.sizes.validation, task.sizes.test]
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]
        assert not sets[1] & sets[2]


def test_a_lead_has_the_rouge_of_what_it_copies(corpora: Path, tmp_path: Path) -> None:
    task = TASKS[2]
    floors = task.floors(task.prepare(corpora, tmp_path))
    assert floors["lead: 4 words"]["rouge_l"] == pytest.approx(100)
    assert floors["lead: 4 words"]["exact_match"] == 100
    assert 0 < floors["lead: first sentence"]["rouge_l"] < 100


@pytest.mark.heavy
def test_a_small_study(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data, two ways to pre-train and BERT, initial weights, every kind of task, and the report; then nothing is left to do."""
    flags = ("--model", "tiny", "--hidden_size", "32", "--intermediate_size", "64", "--max_positions", "64")
    for name, value in {
        "VOCAB_SIZE": 500, "TEXTS": ("novel", "titled"), "TEXT_WITH_TARGETS": "titled", "WRITING": "titles", "MODEL_FLAGS": flags,
        "MAX_LENGTH_TOKENS": 64,
    }.items():  # fmt: skip
        monkeypatch.setattr(plan, name, value)
    output, arms = tmp_path / "study", (plan.REFERENCE, plan.PMLMS[1], plan.BERT, plan.RANDOM)
    study = Study(corpora, output, total_steps=4, finetuning_seeds=1, num_jobs=2)
    study.run(arms[:2], ())
    took = output / "pretrain" / plan.REFERENCE.name / RESULT
    assert len(read_json(took)["cpu_s"]) == 2, "of training and of export"
    write_json(took, {"cpu_s": [2.0, 1.0]})  # most of what so small a run takes is its start
    study.run(arms[2:], ())
    kept_out = {json.loads(line)["tgt"] for part in ("validation", "test")
                for line in (corpora / "tasks" / "titles" / f"{part}.jsonl").open()}  # fmt: skip
    text = (output / "text" / "titled.jsonl").read_text()
    assert not [title for title in kept_out if f'"{title}\\n' in text]
    assert len(text.splitlines()) >= 100

    for task in TASKS:  # their commands know the tasks of the plan alone
        files = task.prepare(corpora, output / "tasks" / task.name)
        for arm in (plan.REFERENCE, plan.BERT, plan.RANDOM):
            weights = study.weights(arm, 0)
            if arm == plan.RANDOM:
                weights = random_twin(study.weights(plan.REFERENCE, 0), weights, 0)
            run = output / "tasks" / task.name / f"{arm.name}-0"
            scores = task.run(files, weights, run, 0)
            assert 0 <= scores[task.metric] <= 100
            write_json(run / RESULT, {"scores": scores, "cpu_s": [1.0]})
    capsys.readouterr()
    before = {
        path: path.stat().st_mtime_ns
        for path in output.rglob("*")
        if path.name in ("metrics.jsonl", "model.safetensors")
    }
    arms = (plan.REFERENCE, plan.BERT, plan.RANDOM)
    study.run(arms, TASKS)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is done twice"
    table = capsys.readouterr().out
    for arm in arms:
        assert f"| {arm.name} | " in table
    assert all(f"| {arm.kind} | " in table for arm in arms)
    results = read_json(output / "results.json")
    found = results["pretraining"]
    assert found["ae_par-0"]["steps"] == found["ae_par-0"]["validations"][-1]["step"] == 4
    assert found["ae_par-0"]["samples"] == 4 * 32
    for name in ("ae_loss", "par_loss"):  # the run's are in bf16
        assert found["ae_par-0"]["validations"][-1][name] == pytest.approx(found["ae_par-0"][name], rel=1e-2)
        assert found["random-0"][name] == pytest.approx(math.log(500), rel=0.1)
        assert all(4 < found[arm.name][name] < 7 for arm in arms)
    assert found["bert-0"]["cpu_s"] > 0
    assert found["bert-0"]["steps"] > 0
    assert found["random-0"]["cpu_s"] == 0
    assert set(results["tasks"]["titles"]) == {arm.name for arm in arms}
    for name in ("curves.png", "tasks.png", "results.md"):
        assert (output / name).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"deepspeed.json: is of another study; give the same --steps"):
        Study(corpora, output, total_steps=5, finetuning_seeds=1, num_jobs=2).run(arms, ())


@pytest.mark.slow
def test_a_failed_job_is_told_with_its_log(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "TEXTS", ("titled",))
    monkeypatch.setattr(plan, "TEXT_WITH_TARGETS", "titled")
    monkeypatch.setattr(plan, "WRITING", "titles")
    monkeypatch.setattr(plan, "VOCAB_SIZE", 10**6)
    with pytest.raises(ValueError, match=r"data failed; .*data.log ends: .*vocab_size"):
        Study(corpora, tmp_path / "study", 4, 1, 2).run((), ())
    with pytest.raises(ValueError, match="data failed, for the reason above"):
        Study(corpora, tmp_path / "study", 4, 1, 1).run((), ())
    assert "--vocab_size" in capfd.readouterr().err


def test_seeds_of_one_kind_are_averaged_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = replace(TASKS[0], name="letters")
    arms = (Arm("ae"), Arm("ae", 1))
    for arm, accuracy in zip(arms, (60.0, 70.0), strict=True):
        (run := tmp_path / "tasks" / "letters" / f"{arm.name}-0").mkdir(parents=True)
        write_json(run / RESULT, {"scores": {"accuracy": accuracy}, "cpu_s": [1.0]})
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "manifest.json", {})
    write_json(tmp_path / "deepspeed.json", {})
    write_report(tmp_path, arms, (task,), {"letters": {"most frequent class": {"accuracy": 50.0}}}, 1)
    assert "| ae | 65.0 | 7.1 | 60.0, 70.0 |" in capsys.readouterr().out
