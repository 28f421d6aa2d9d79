"""What users' files may hold, and what is said of what they may not: one reader for every command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.files import sha256_of_file
from data_prep.tokenizer import Tokenizer
from finetune.classify_data import ColumnSettings, Data, DataSettings, read_data
from finetune.glue import GLUE
from finetune.seq2seq_data import PairColumns, Seq2SeqSettings, make_examples, read_pairs
from finetune.squad import read_squad
from finetune.tables import Column, TableFile, as_label, as_number, as_text, read_table

ROWS = [{"label": ("austen", "bierce")[i % 2], "text": f"a text {i}"} for i in range(16)]
LINES = [json.dumps(row) for row in ROWS]
HEADER = "label\ttext"
FIELDS = [f"{row['label']}\t{row['text']}" for row in ROWS]


def read(path: Path, content: str | bytes, **changes: Any) -> Data:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_data(DataSettings(train_file=path, validation_file=path, **changes), ColumnSettings())


def refused(path: Path, content: str | bytes, **changes: Any) -> str:
    """The message, which begins with the file's path and is short."""
    with pytest.raises(ValueError, match=r".") as raised:
        read(path, content, **changes)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"label": "austen", "text": "x", "more": ' + "[" * 100_000, ["not valid JSON (lists or objects in one another"]),
        ('{"label": "austen", "text": "x", "id": ' + "9" * 5_000 + "}", ["not valid JSON (an integer of more than 4300 digits)"]),
        ('{"label": "austen", "text": "broken \\ud83d emoji"}', ["text has half a surrogate pair, which is no character"]),
        ('{"label": "br\\udc00", "text": "x"}', ["label has half a surrogate pair"]),
        ('{"label": NaN, "text": "x"}', ["label is NaN (a number), which is no class; remove the row"]),
        ('{"label": "austen", "text": NaN}', ["text is NaN (a number), expected text"]),
        ('{"label": "austen", "text": 1e999}', ["text is Infinity (a number), expected text"]),
        ('{"label": "austen", "text": 1.5}', ["text is 1.5 (a number), expected text"]),
        ('{"label": "austen", "text": true}', ["text is true (true or false), expected text"]),
        ('{"label": "austen", "text": null}', ["text is nothing, expected text"]),
        ('{"label": true, "text": "x"}', ["label is true (true or false), expected a class's name or number"]),
        ('{"label": null, "text": "x"}', ["label is nothing, expected a class's name"]),
        ('{"label": ["austen"], "text": "x"}', ['label is ["austen"] (a list), expected a class']),
        ('{"label": " - ", "text": "x"}', ["label is '-', which stands for no label; remove the row, or give it a label"]),
        ('{"label": "", "text": "x"}', ["label is '', which stands for no label"]),
        ('["austen", "x"]', ['found ["austen", "x"] (a list), expected a JSON object on each line']),
        ('{"label": "austen",', ["not valid JSON (", "at character 20); expected a JSON object on each line"]),
        ('{"label": "austen", "texts": "x"}', ["has no column 'text'; it has label, texts; name another with --text_column"]),
    ],
)  # fmt: skip
def test_a_json_line_that_cannot_be_taken_is_named(line: str, words: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path / "x.jsonl", "\n".join([*LINES, line]) + "\n")
    assert message.startswith("line 17: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("x.tsv", [HEADER, *FIELDS, "austen\ta text with\ta tab in it"],
         ["line 18: has 3 fields, expected 2, as the header has; look for tabs"]),
        ("x.tsv", [HEADER, *FIELDS, "austen"], ["line 18: has 1 fields, expected 2, as the header has"]),
        ("x.csv", ["label,text", "austen,x", "bierce,a, b"], ["line 3: has 3 fields, expected 2", "look for commas"]),
        ("x.csv", ["label,text", "austen,x", 'bierce,"a'], ["line 3: not valid CSV (", "expected fields as Excel quotes them"]),
        ("x.tsv", ["label\ttext\tlabel", "a\tb\tc"], ["line 1: has two columns 'label'; expected one"]),
        ("x.tsv", [HEADER, *FIELDS, "-\tno agreement"], ["line 18: label is '-', which stands for no label"]),
        ("x.tsv", [HEADER, *FIELDS, "\tblank label here"], ["line 18: label is '', which stands for no label"]),
        ("x.tsv", [HEADER, *FIELDS, " nan\tof pandas"], ["line 18: label is 'nan', which stands for no label"]),
        ("x.tsv", ["labels\ttext", "a\tb"], ["line 1: has no column 'label'; it has labels, text; name another with --label_column"]),
        ("x.tsv", [HEADER], ["has no rows; expected at least one below the header"]),
        ("x.jsonl", [], ["has no rows; expected at least one"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_taken_is_named(name: str, lines: list[str], words: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path / name, "".join(f"{line}\n" for line in lines))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl"])
def test_a_file_that_ends_lines_with_cr_is_named_and_not_printed(name: str, tmp_path: Path) -> None:
    lines = {"x.tsv": [HEADER, *FIELDS], "x.csv": ["label,text", "a,b"], "x.jsonl": LINES}[name]
    message = refused(tmp_path / name, "\r".join(lines) + "\r")
    assert message == r"its lines end with CR only, expected LF or CRLF; convert it: tr '\r' '\n' < OLD > NEW"


def test_what_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path) -> None:
    content = f"{HEADER}\n{FIELDS[0]}\n".encode()
    message = refused(tmp_path / "x.tsv", content + "austen\té\n".encode("latin-1"))
    assert message == f"line 3: not UTF-8 at byte {len(content) + 7} (found 0xe9); convert it, for example with iconv"


def test_blank_lines_empty_fields_at_the_end_and_windows_line_ends_count_for_nothing(tmp_path: Path) -> None:
    data = read(tmp_path / "x.tsv", "\ufeff" + "\r\n".join([HEADER, "", *(f"{row}\t\t" for row in FIELDS), ""]))
    assert [*data.train.texts()] == [(row["text"],) for row in ROWS]
    assert data.train.labels.tolist() == [0, 1] * 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1.0, "1", "1.0", " 1 ", "01", "+1.00"], {"1"}),
        (["austen", "austen ", "\tausten"], {"austen"}),
        ([0, -0.0, "0", "-0.0", ".0"], {"0"}),
        ([0.5, "0.50", ".5"], {"0.5"}),
        ([-2, "-2.0"], {"-2"}),
        (["1.2.3", "1e3", "v1.0", "neutral"], {"1.2.3", "1e3", "v1.0", "neutral"}),
        (["9" * 40, "9" * 39 + "8"], {"9" * 40, "9" * 39 + "8"}),
        (["none", "N/A", "false"], {"none", "N/A", "false"}),
    ],
)
def test_labels_that_mean_the_same_are_one_class(values: list[Any], expected: set[str]) -> None:
    assert {as_label(value) for value in values} == expected


@pytest.mark.parametrize("value", ["-", "", "  ", "nan", "NaN", math.nan, math.inf, True, None, [], {}])
def test_what_stands_for_no_label_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^is "):
        as_label(value)


def test_numbers_and_texts_are_taken_as_they_are_written() -> None:
    assert [as_number(value) for value in (1, 2.5, "2.50", "-1e2")] == [1, 2.5, 2.5, -100]
    for value in (True, None, "x", "", "nan", math.inf, [1], 10**400):
        with pytest.raises(ValueError, match="expected a number"):
            as_number(value)
    assert [as_text(value) for value in ("", "a", 12)] == ["", "a", "12"]


def test_the_classes_are_named_with_their_counts(tmp_path: Path) -> None:
    data = read(
        tmp_path / "x.jsonl", "\n".join([*LINES[:5], '{"label": 10, "text": "x"}', '{"label": "2", "text": "x"}'])
    )
    assert data.target.labels == ("austen", "bierce", "2", "10")
    words = data.train.in_words(data.target)
    assert words.endswith("x.jsonl: 7 rows of 4 classes: austen 3, bierce 2, 2 1, 10 1")
    many = "".join(f'{{"label": "c{i:02}", "text": "x"}}\n' for i in range(25))
    data = read(tmp_path / "y.jsonl", many)
    assert data.train.in_words(data.target).endswith("c19 1 and 5 more")
    data = read(tmp_path / "z.jsonl", "".join(f'{{"label": {i}, "text": "x"}}\n' for i in (1, 2, 6)), regression=True)
    assert data.train.in_words(data.target).endswith("3 rows; numbers from 1 to 6, mean 3")


# ---- GLUE


def glue(folder: Path, name: str, rows: list[list[str]], dev: list[list[str]] | None = None) -> Data:
    task = GLUE[name]
    header = [["index", task.text, *([task.pair] if task.pair else []), task.label]] if task.numbered is None else []
    for file, of_file in (("train.tsv", rows), *((file, dev or rows) for _, file in task.validation)):
        (folder / file).write_text("".join("\t".join(row) + "\n" for row in [*header, *of_file]))
    return read_data(DataSettings(glue=name, data=folder), ColumnSettings())


def test_broken_rows_of_qqp_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [[str(i), "How do I?", "How can I?", str(i % 2)] for i in range(16)]
    data = glue(tmp_path, "qqp", [*rows, ["97", "What is", "a tab?", "What is tab?", "1"], ["98", "short row"]], rows)
    assert data.target.labels == ("0", "1")
    assert data.train.labels.tolist() == [0, 1] * 8
    words = data.train.in_words(data.target)
    assert "2 rows with too few or too many fields are left out (the first: line 18)" in words
    with pytest.raises(ValueError, match=r"dev.tsv: line 18: has 5 fields, expected 4"):
        glue(tmp_path, "qqp", rows, [*rows, ["97", "What is", "a tab?", "What is tab?", "1"]])


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("qqp", "2", r"label '2' is none of those of GLUE's qqp: 0, 1"),
        ("mnli", "yes", r"label 'yes' is none of those of GLUE's mnli: contradiction, entailment, neutral"),
        ("mnli", "-", r"gold_label is '-', which stands for no label"),
        ("rte", "not entailment", r"of GLUE's rte: entailment, not_entailment"),
        ("sts-b", "7", r"score is 7, expected 0 to 5"),
        ("sts-b", "high", r'score is "high" \(text\), expected a number'),
    ],
)
def test_glues_labels_are_known(name: str, label: str, words: str, tmp_path: Path) -> None:
    good = {
        "sts-b": ("1.5", "3"),
        "mnli": ("neutral", "entailment"),
        "rte": ("entailment", "entailment"),
        "qqp": ("0", "0"),
    }
    rows = [["0", "a", "b", good[name][0]], ["1", "c", "d", good[name][1]]]
    data = glue(tmp_path, name, rows)  # rte's and qqp's classes are two, though one is in the file
    assert data.target.num_outputs == {"sts-b": 1, "mnli": 3, "rte": 2, "qqp": 2}[name]
    with pytest.raises(ValueError, match=rf"train\.tsv: line 4: .*{words}"):
        glue(tmp_path, name, [*rows, ["2", "e", "f", label]])


def test_flags_that_glue_would_ignore_are_refused(tmp_path: Path) -> None:
    for settings, columns in (
        (DataSettings(glue="qqp", data=tmp_path, regression=True), ColumnSettings()),
        (DataSettings(glue="qqp", data=tmp_path), ColumnSettings("words")),
        (DataSettings(glue="qqp", data=tmp_path, label_column="y"), ColumnSettings()),
    ):
        with pytest.raises(ValueError, match="--glue qqp: knows its columns and labels"):
            read_data(settings, columns)


# ---- passes, Parquet


def test_each_pass_reads_the_same_file_or_says_that_it_has_changed(tmp_path: Path) -> None:
    for name, content in (("x.tsv", "\n".join([HEADER, *FIELDS])), ("x.jsonl", "\n".join(LINES))):
        path = tmp_path / name
        path.write_text(content)
        table = TableFile(path, [Column("text", as_text)])
        assert [row.values[0] for row in table] == [row["text"] for row in ROWS]
        assert table.sha256 == sha256_of_file(path)
        assert len([*table]) == 16
        path.write_text(content.replace("a text 3", "b text 3"))
        with pytest.raises(ValueError, match="has changed since this command began"):
            list(table)


def test_parquet_is_read_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"label": [1.0, 0.0] * 1000, "text": [f"text {i}" for i in range(2000)]}), path, row_group_size=300
    )
    data = read_data(DataSettings(train_file=path, validation_file=path), ColumnSettings())
    assert data.target.labels == ("0", "1")
    assert data.train.labels.tolist() == [1, 0] * 1000
    assert [*data.train.texts()][1999] == ("text 1999",)
    assert data.train.table.sha256 == sha256_of_file(path)
    pq.write_table(pa.table({"label": ["a", None, "b"], "text": ["x", "y", "z"]}), path)
    with pytest.raises(ValueError, match=r"x\.parquet: row 2: label is nothing, expected a class's name"):
        read_data(DataSettings(train_file=path, validation_file=path), ColumnSettings())


# ---- pairs and SQuAD


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"src": 12, "tgt": true}', "tgt is true (true or false), expected text or a list of tokens"),
        ('{"src": "a", "tgt": NaN}', "tgt is NaN (a number), expected text or a list of tokens"),
        ('{"src": 1e999, "tgt": "b"}', "src is Infinity (a number), expected text or a list of tokens"),
        ('{"src": "broken \\ud83d", "tgt": "x"}', "src has half a surrogate pair"),
        ('{"src": ["a", "\\ud83d"], "tgt": "x"}', "src has half a surrogate pair"),
        ('{"src": ["a", 2], "tgt": "x"}', "src is a list with 2 (a number) in it, expected text or a list of tokens"),
    ],
)
def test_a_pair_that_cannot_be_taken_is_named(line: str, words: str, word_piece: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"src": "a truth", "tgt": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r".") as raised:
        make_examples(word_piece, read_pairs(path, PairColumns()), Seq2SeqSettings())
    assert str(raised.value).startswith(f"{path}: line 2: {words}")


PASSAGE = "Jane lived in Bath. She wrote novels there in 1801."


def squad(path: Path, *changes: dict[str, Any], context: str = PASSAGE) -> Path:
    """Two questions, each with one answer, changed; a value of ... removes a key."""
    entries = []
    for number, change in enumerate([*changes, *[{}] * (2 - len(changes))]):
        entry = {
            "id": f"q{number}",
            "question": "Where?",
            "answers": [{"text": "Bath", "answer_start": 14}],
            "is_impossible": False,
        }
        entries.append({key: value for key, value in (entry | change).items() if value is not ...})
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": entries}]}]}))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_impossible": "false"}, "'is_impossible' is \"false\" (text), expected true or false"),
        ({"is_impossible": "No"}, "'is_impossible' is \"No\" (text), expected true or false"),
        ({"is_impossible": 0}, "'is_impossible' is 0 (a number), expected true or false"),
        ({"is_impossible": 1}, "'is_impossible' is 1 (a number), expected true or false"),
        ({"is_impossible": True}, "'is_impossible' is true and there are 1 answers; expected one or the other"),
        ({"answers": []}, "has no answers; expected at least one, or 'is_impossible': true"),
        ({"answers": [], "is_impossible": ...}, "has no answers; expected at least one, or 'is_impossible': true"),
        ({"answers": ...}, "has no 'answers', expected a list"),
        ({"id": "q1"}, "qas[1]: 'id' is \"q1\" (text), as in data[0].paragraphs[0].qas[0]; expected every question to have its own"),
        ({"id": 7}, "'id' is 7 (a number), expected text"),
        ({"question": "half \ud83d"}, "'question' has half a surrogate pair"),
        ({"answers": [{"text": "Bath", "answer_start": 14.0}]}, "answers[0]: 'answer_start' is 14.0 (a number), expected a whole number"),
        ({"answers": [{"text": "Bath", "answer_start": "14"}]}, "answers[0]: 'answer_start' is \"14\" (text), expected a whole number"),
        ({"answers": [{"text": "Bath", "answer_start": True}]}, "'answer_start' is true (true or false), expected a whole number"),
        ({"answers": [{"text": "Bath", "answer_start": -1}]}, "'answer_start' is -1, expected a character of the passage, 0 to 50"),
        ({"answers": [{"text": "Bath", "answer_start": 51}]}, "'answer_start' is 51, expected a character of the passage"),
        ({"answers": [{"text": " ", "answer_start": 4}]}, "answers[0]: 'text' is empty, expected the answer"),
        ({"answers": [{"text": 1801, "answer_start": 46}]}, "answers[0]: 'text' is 1801 (a number), expected text"),
        ({"answers": ["Bath"]}, 'answers[0]: found "Bath" (text), expected an object with \'text\''),
    ],
)  # fmt: skip
def test_what_is_not_squads_json_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = squad(tmp_path / "x.json", change)
    with pytest.raises(ValueError, match=r".") as raised:
        read_squad(path)
    assert str(raised.value).startswith(f"{path}: data[0].paragraphs[0].qas[")
    assert words in str(raised.value)


def test_a_passage_with_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\[0\]\.paragraphs\[0\]: 'context' has half a surrogate pair"):
        read_squad(squad(tmp_path / "x.json", context=f"{PASSAGE} \ud83d end"))


def test_what_squads_json_says_is_read(tmp_path: Path) -> None:
    path = squad(tmp_path / "x.json", {"is_impossible": True, "answers": []})
    file = read_squad(path)
    assert [(q.answers, q.start) for q in file.questions] == [((), None), (("Bath",), 14)]
    assert (file.is_v2, file.is_labelled, file.num_unmatched, file.sha256) == (True, True, 0, sha256_of_file(path))
    unlabelled = squad(
        tmp_path / "y.json", {"answers": ..., "is_impossible": ...}, {"answers": [], "is_impossible": ...}
    )
    file = read_squad(unlabelled, needs_answers=False)
    assert (file.is_v2, file.is_labelled) == (False, False)
    elsewhere = [
        {"text": "Bath", "answer_start": 3},
        {"text": "Jane", "answer_start": 0},
        {"text": "Jane", "answer_start": 0},
    ]
    file = read_squad(squad(tmp_path / "z.json", {"answers": elsewhere}, {"answers": elsewhere[:1]}))
    assert [(q.answers, q.start) for q in file.questions] == [(("Jane", "Jane", "Bath"), 0), (("Bath",), None)]
    assert file.num_unmatched == 1


def test_deep_or_endless_squad_is_named(tmp_path: Path) -> None:
    for content, words in (
        ("[" * 100_000, "lists or objects in one another"),
        ("9" * 5000, "an integer of more than 4300 digits"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=rf"x\.json: line 1: not valid JSON \({words}"):
            read_squad(tmp_path / "x.json")


def test_a_small_table_is_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,label\n"two\nlines",1\nb,2\n')
    table = read_table(tmp_path / "x.csv", ["label", "text"])
    assert (table.rows, table.lines) == ([("1", "two\nlines"), ("2", "b")], [2, 4])
    assert np.dtype(np.int64) == read(tmp_path / "y.tsv", "\n".join([HEADER, *FIELDS])).train.labels.dtype
