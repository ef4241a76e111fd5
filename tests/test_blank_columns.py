"""Columns that may be blank, as Alpaca's ``input``: from the rows to the prompt, in training and afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, run_main, tokenizer_for
from text_tasks import command

import zo_opt
from zo_opt.tasks.rows import make_examples
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import Task

ALPACA = [
    {"instruction": "the film is", "input": "", "output": "great"},
    {"instruction": "two friends", "input": "a story", "output": "winter"},
    {"instruction": "the long way", "output": "home"},
    {"instruction": "is a film", "input": None, "output": "terrible"},
] * 3
TEMPLATE = "{instruction}\nReview {input}\nIt was"


@pytest.fixture
def line(tiny_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))

    def made(**options: Any) -> list[str]:
        values = {
            "model_name_or_path": tiny_dir("llama"), "train_file": tmp_path / "alpaca.json", "target_column": "output",
            "template": TEMPLATE, "steps": 2, "max_new_tokens": 3, "output_dir": tmp_path / "run", "optional_columns": "input",
        } | options  # fmt: skip
        return command(**{name: value for name, value in values.items() if value is not None})

    return made


@pytest.mark.parametrize(
    ("template", "blank", "filled"),
    [
        (TEMPLATE, "x\nIt was", "x\nReview y\nIt was"),
        ("{a} and {b}\nIt was", "x and \nIt was", "x and y\nIt was"),  # a line that shows something else stays
        ("{a}\n\n{b}", "x\n\n", "x\n\ny"),  # and so does the last
        ("{b}\n{a}:", "x:", "y\nx:"),
    ],
)  # fmt: skip
def test_a_line_of_blanks_is_left_out(template: str, blank: str, filled: str) -> None:
    task = Task("mine", template.replace("instruction", "a").replace("input", "b"), optional=("b",))
    for value in ("", "  ", "\u200b", None, math.nan, "nan", np.float32("nan"), pd.NA, pd.NaT):
        assert task.filled(task.fields({"a": "x", "b": value})) == blank
    assert task.filled(task.fields({"a": "x"})) == blank
    assert task.filled(task.fields({"a": "x", "b": "y"})) == filled
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))).optional == ("b",)


def test_a_text_that_is_cut_to_nothing_takes_its_line_along() -> None:
    task = Task("mine", TEMPLATE, kind="generation", target_column="output", optional=("input",), max_new_tokens=2)
    rows = [{"instruction": "a", "input": "the film " * 60, "output": "great"}]
    scorer = make_scorer(make_model("llama"), tokenizer_for("llama"), task, 24)
    [encoded] = scorer.encode_all(make_examples(rows, task, "rows"))
    assert encoded.truncated and len(encoded.prompts[0]) <= 24


def test_alpacas_rows_from_a_file_to_text(
    line: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(line()) == 0
    said = capsys.readouterr().out
    assert "input ({input} in the prompt where it is not blank)" in said
    run = zo_opt.load_run(tmp_path / "run")
    prompts = ["the film is\nIt was", "two friends\nReview a story\nIt was", "the long way\nIt was"]
    assert run.generate(ALPACA[:3]) == run.generate(prompts, form="plain")
    assert run.generate(["the film is"]) == run.generate(
        prompts[:1], form="plain"
    )  # the one column that a prompt needs
    assert run.evaluate(ALPACA).rows == len(ALPACA)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "blank without it": ({"optional_columns": None}, "row 1: column 'input' is empty; fill it or remove the row, or name the column in --optional"),
    "a column that is not shown": ({"optional_columns": "output"}, "names 'output', which the prompt does not show; it shows instruction, input"),
    "a column that is not there": ({"optional_columns": "more", "template": "{instruction} {more}"}, "names 'more', a column that no row has"),
    "all columns": ({"optional_columns": "input,instruction"}, "names all columns of the prompt"),
    "no names": ({"optional_columns": "input,"}, "must be different names with commas between"),
    "no rows": ({"train_file": None, "target_column": None}, "optional_columns was given without train_file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_gets_one_sentence(
    name: str, line: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    changes, what = WRONG[name]
    assert run_main(line(**changes)) == 2
    assert what in capsys.readouterr().err


def test_the_others_must_not_be_blank() -> None:
    task = Task("mine", "{a} {b}", optional=("b",))
    with pytest.raises(zo_opt.ZOError, match="column 'a' is empty"):
        task.fields({"a": "", "b": "y"})
