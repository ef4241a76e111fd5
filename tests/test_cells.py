"""What a cell may hold: one rule for all columns and formats."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zo_opt import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.tasks.builtin import get_task
from zo_opt.tasks.cells import answers_of, label_of, plain_text_of, text_of
from zo_opt.tasks.rows import column_values, make_examples, read_rows
from zo_opt.tasks.tasks import Task, custom_generation_task, custom_task
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import load_examples

WHERE = "my.jsonl, row 3"
NO_TEXT: list[Any] = [
    None, "", "  ", "\u00a0\n", "\u200b", "\ufeff \u200e", math.nan, math.inf, -math.inf, np.float32("nan"), "nan", "NaN", "-inf",
    ["good", "day"], [1], [], {}, {"text": "a"}, [{"role": "user", "content": "a"}], b"bytes", {1, 2}, np.zeros(2), "half \ud800", 10**5000,
]  # fmt: skip


@pytest.mark.parametrize("value", NO_TEXT, ids=range(len(NO_TEXT)))
def test_what_is_no_text_is_refused_in_every_column(value: Any) -> None:
    """With file, row and column, in one line that can be printed."""
    texts = custom_task(["a", "b"], text_column="text", label_column="label", template=None, verbalizers=None)
    writes = custom_generation_task(text_column="text", target_column="target", template=None)
    good = {"text": "x", "label": "a", "target": "y"}
    for column, task in (("text", texts), ("label", texts), ("text", writes), ("target", writes)):
        if column == "target" and isinstance(value, list) and value in (["good", "day"], [1]):
            continue  # several right answers
        with pytest.raises(ZOError) as error:
            make_examples([good, good, {**good, column: value}], task, "my.jsonl")
        said = str(error.value)
        assert said.startswith(f"{WHERE}: column {column!r}")
        assert said.endswith(".")
        assert "\n" not in said
        said.encode()


def test_running_text_may_be_blank_and_nothing_else() -> None:
    assert [plain_text_of(v, "text", WHERE) for v in ("", " x ", "nan", 7)] == ["", " x ", "nan", "7"]
    for value in (None, math.nan, ["a"], {"a": 1}):
        with pytest.raises(ZOError, match="row 3: column 'text'"):
            plain_text_of(value, "text", WHERE)


def test_a_number_has_one_spelling() -> None:
    for value in (1, 1.0, "1", " 1 ", "1.0", "1.00", np.int64(1), np.float32(1), np.array(1)):
        assert label_of(value, "label", WHERE) == "1", value
    assert [label_of(v, "label", WHERE) for v in (-0.0, "-0.0", 0.5, 1e20, -3.0)] == ["0", "0", "0.5", "1e+20", "-3"]
    assert [label_of(v, "label", WHERE) for v in (True, np.bool_(False), "True")] == ["true", "false", "True"]
    assert text_of(3.0, "text", WHERE) == "3"
    task = Task("t", "{text}", {"0.0": "bad", "1.0": "good"})
    assert [task.label_of(v) for v in (0, "1", 1.0, "1.0")] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "values",
    [
        ("1", "01"), (1, "+1"), ("0.5", ".50"), ("1e1", 10), (True, 1), (0, False), (True, "TRUE"), ("good", "Good"), ("good", "\u200bgood"),
        ("caf\u00e9", "cafe\u0301"), ("very good", "very\u00a0good"), ("2", "\u00b2"),
    ],
)  # fmt: skip
def test_two_spellings_in_one_column_are_refused(values: tuple[Any, Any]) -> None:
    rows = [{"label": v} for v in ("x", *values)]
    with pytest.raises(
        ZOError, match=r"my\.csv, row \d: column 'label' holds (.*), and (.*) in my\.csv, row \d: two spellings"
    ) as error:
        column_values(rows, "label", "my.csv")
    found = re.search(r"holds (.*), and (.*) in my", str(error.value))
    assert found is not None and ascii(found[1]) != ascii(found[2])


def test_one_label_in_several_formats(tmp_path: Path) -> None:
    """A column of floats, as pandas makes of whole numbers with a gap, is the column of whole numbers."""
    texts = {
        "a.csv": "text,label\nx,1.0\ny,0.0\n", "a.tsv": "text\tlabel\nx\t1\ny\t0\n",
        "a.jsonl": '{"text": "x", "label": 1.0}\n{"text": "y", "label": "0"}\n',
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert column_values(read_rows(tmp_path / name), "label", name) == ["0", "1"]


def test_answers() -> None:
    assert answers_of(["one", "", None, 2.0], "answer", WHERE) == ("one", "2")
    for value in ([["a"]], [math.nan], [{"text": "a"}], {"text": ["a"], "answer_start": [0]}, [None, " "]):
        with pytest.raises(ZOError, match="row 3: column 'answer'"):
            answers_of(value, "answer", WHERE)


def test_the_row_is_that_of_the_file_though_rows_are_held_out(tmp_path: Path) -> None:
    rows = [{"text": f"x {i}", "label": i % 2} for i in range(40)]
    for bad in (3, 21, 39):
        path = tmp_path / f"{bad}.jsonl"
        path.write_text("".join(json.dumps(r | ({"text": " "} if i == bad else {})) + "\n" for i, r in enumerate(rows)))
        with pytest.raises(ZOError, match=f"row {bad + 1}: column 'text' is blank"):
            load_examples(TrainConfig(train_file=path, template="{text} It was"), Reporter())


def test_a_class_without_training_rows_and_few_rows_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["a", "b"] * 20
    path, held = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"text": f"x {i}", "label": v}) + "\n" for i, v in enumerate([*labels, "c"])))
    held.write_text('{"text": "x", "label": "c"}\n')
    load_examples(TrainConfig(train_file=path, eval_file=held, template="{text}", max_train_rows=40), Reporter())
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert "no training row has the label c, which the run cannot learn" in text
    assert "1 held-out row is few" in text
    assert "no held-out row has the labels a, b, of which the figures say nothing" in text
    rows = [{"sentence": "x", "label": i % 2} for i in range(400)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    load_examples(TrainConfig(train_file=path), Reporter())
    assert get_task("sst2").labels == ["0", "1"]
    said = capsys.readouterr()
    assert "few" not in said.out + said.err
    assert "no training row" not in said.out + said.err


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"text,text,label\na,b,1\n", "two columns are named 'text'"),
        ("a.tsv", b"label\ttext\tlabel\na\tb\t1\n", "two columns are named 'label'"),
        ("a.csv", b"text,label\na,1\n\xef\xbb\xbftext,label\nb,0\n", "line 3: the header line stands among the rows"),
        ("a.jsonl", b'{"text": "a", "label": 1, "label": 0}\n', "line 1.*'label' stands twice"),
        ("a.csv", b'text,label\na,1\n"b,0\nc,1\n', "not readable as a table"),  # the quote would swallow the rest
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "UTF-8"),
        ("a.csv", "text,label\na,1\n".encode("utf-16-le"), "NUL characters"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "UTF-8"),
    ],
)  # fmt: skip
def test_tables_that_would_lose_something(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ZOError, match=what) as error:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_columns_without_a_name_are_left_alone(tmp_path: Path) -> None:
    """As spreadsheets write them."""
    (tmp_path / "a.csv").write_text("text,label,,\na,1,,\n")
    assert read_rows(tmp_path / "a.csv")[0]["text"] == "a"
