"""Rows from where people have them: every way gives the same run, and values are those that stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import Sentiment, run_main
from rich.console import Console
from text_tasks import results

import zo_opt
from zo_opt import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.tasks.builtin import get_task
from zo_opt.tasks.rows import make_examples, read_rows
from zo_opt.tasks.tables import IN_PYTHON, hub_name, rows_given
from zo_opt.tasks.tasks import Task
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import load_examples

Options = Callable[..., list[str]]
ODD = [  # what a reader that guesses types would change
    {"text": "007", "label": "NA"}, {"text": "2020-01-01", "label": "true"}, {"text": "1e5", "label": "null"}, {"text": "1.0", "label": "None"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def parquet(path: Path, rows: list[dict[str, Any]], **types: Any) -> Path:
    dataset = datasets.Dataset.from_list(rows)
    for column, feature in types.items():
        dataset = dataset.cast_column(column, feature)
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(
        dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata), path
    )
    return path


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of the kind that its name says."""
    if path.suffix == ".parquet":
        return parquet(path, rows)
    header = list(rows[0])
    tables = {".csv": ",", ".tsv": "\t"}
    if path.suffix == ".json":
        text = json.dumps(rows)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = "".join(
            tables[path.suffix].join(map(str, line)) + "\n" for line in (header, *(r.values() for r in rows))
        )
    path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_values_are_what_stands_in_the_file(suffix: str, tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / f"odd{suffix}", ODD)) == ODD


def test_lines_of_json_under_the_name_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ODD))
    assert read_rows(tmp_path / "a.json") == ODD


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_without_a_header(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"odd{suffix}", ODD)
    path.write_text(path.read_text().split("\n", 1)[1])
    assert read_rows(path, ["text", "label"]) == ODD


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("reached") / "run"
    assert run_main(toy_options(steps=2, output_dir=out)) == 0
    return results(out)


@pytest.mark.parametrize("way", ["parquet", "json", "no header", "saved", "hub"])
def test_every_way_gives_the_same_run(
    way: str, toy_options: Options, sentiment_files: Sentiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: dict[str, Any]
) -> None:  # fmt: skip
    rows = sentiment_files.rows[:64]
    changes: dict[str, Any] = {}
    if way in ("parquet", "json"):
        changes = {"train_file": written(tmp_path / f"rows.{way}", rows)}
    elif way == "no header":
        path, held = written(tmp_path / "rows.csv", rows), written(tmp_path / "held.csv", sentiment_files.rows[64:])
        for p in (path, held):
            p.write_text(p.read_text().split("\n", 1)[1])
        changes = {"train_file": path, "eval_file": held, "column_names": "text,label"}
    else:
        both = datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(sentiment_files.rows[64:])}
        )
        if way == "saved":
            both.save_to_disk(str(tmp_path / "saved"))
        asked: list[Any] = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, config, split: asked.append((name, config, split)) or both[split]
        )
        name = str(tmp_path / "saved") if way == "saved" else "me/mine"
        changes = {"train_file": None, "eval_file": None, "dataset": name, "eval_split": "test"}
        if way == "hub":
            changes["dataset_config"] = "plain"
    assert run_main(toy_options(steps=2, output_dir=tmp_path / "out", **changes)) == 0
    found = results(tmp_path / "out")
    assert (found["before"], found["after"]) == (reached["before"], reached["after"])
    assert run_main(["eval", str(tmp_path / "out")]) == 0
    if way == "hub":
        assert asked == [("me/mine", "plain", "test"), ("me/mine", "plain", "train"), ("me/mine", "plain", "test")]


@pytest.mark.parametrize("kind", ["list", "Dataset", "stream"])
def test_from_python(
    kind: str, tiny_model_dir: Path, sentiment_files: Sentiment, tmp_path: Path, reached: dict[str, Any]
) -> None:
    rows, held = sentiment_files.rows[:64], sentiment_files.rows[64:]
    make: Any = {
        "list": lambda x: x,
        "Dataset": datasets.Dataset.from_list,
        "stream": lambda x: datasets.Dataset.from_list(x).to_iterable_dataset(),
    }
    options: dict[str, Any] = {
        "model_name_or_path": str(tiny_model_dir), "template": "{text} It was", "verbalizers": "terrible,great", "device": "cpu",
        "precision": "fp32", "adapter": "tt", "query_mode": "sequential", "schedule": {"name": "constant", "queries": 2}, "lr": 0.03,
        "lr_schedule": "constant", "steps": 2, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    run = zo_opt.train(make[kind](rows), make[kind](held), quiet=True, **options)
    found = results(tmp_path / "out")
    assert (found["before"], found["after"]) == (reached["before"], reached["after"])
    assert run.evaluate().row_scores == run.evaluate(make[kind](held)).row_scores == found["after"]["row_scores"]
    assert [p.label for p in run.predict(make[kind](held))] == [p.label for p in run.predict(held)]
    again = zo_opt.load_run(tmp_path / "out")
    assert again.evaluate(held).row_scores == found["after"]["row_scores"]
    with pytest.raises(ZOError, match="given in Python and are in no file; give them again"):
        again.evaluate()


def test_labels_that_a_table_names_are_its_words(
    toy_options: Options, sentiment_files: Sentiment, tmp_path: Path
) -> None:
    named = datasets.ClassLabel(names=["terrible", "great"])
    path = parquet(tmp_path / "named.parquet", sentiment_files.rows, label=named)
    assert read_rows(path)[1]["label"] == 1
    line = toy_options(steps=1, train_file=path, eval_file=None, verbalizers=None, output_dir=tmp_path / "out")
    assert run_main(line) == 0
    task = json.loads((tmp_path / "out" / "run.json").read_text())["resolved"]["task"]
    assert task["verbalizers"] == {"0": "terrible", "1": "great"}


@pytest.mark.parametrize("first", ["numbers", "names"])
def test_a_tables_own_names_say_what_its_numbers_mean(
    first: str, toy_options: Options, sentiment_files: Sentiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training and afterwards, whatever the order of the names in a file."""
    names = ["terrible", "great"]
    rows = sentiment_files.rows
    called = [row | {"label": names[row["label"]]} for row in rows]
    turned = [row | {"label": 1 - row["label"]} for row in rows]
    files = {
        "numbers": parquet(tmp_path / "a.parquet", rows, label=datasets.ClassLabel(names=names)),
        "names": written(tmp_path / "b.jsonl", called),
        "turned": parquet(tmp_path / "c.parquet", turned, label=datasets.ClassLabel(names=names[::-1])),
    }
    out = tmp_path / "out"
    line = toy_options(steps=1, train_file=files[first], eval_file=files["turned"], verbalizers=None, output_dir=out)
    assert run_main(line) == 0
    assert results(out)["after"]["trained_on"] == len(rows)
    run = zo_opt.load_run(out)
    assert len({tuple(run.evaluate(file).row_scores) for file in files.values()}) == 1
    others = parquet(tmp_path / "d.parquet", rows, label=datasets.ClassLabel(names=["no", "yes"]))
    with pytest.raises(ZOError, match="row 1: label 0, which its table calls 'no', is unknown; this task's labels are"):
        run.evaluate(others)
    few = [row | {"label": 2 * row["label"]} for row in rows[:8]]
    task = _task(parquet(tmp_path / "e.parquet", few, label=datasets.ClassLabel(names=["bad", "so so", "fine"])))
    assert (dict(task.verbalizers), task.label_names) == ({"0": "bad", "2": "fine"}, ("bad", "fine"))
    nobody = parquet(
        tmp_path / "f.parquet", [*rows[:8], rows[8] | {"label": -1}], label=datasets.ClassLabel(names=names)
    )
    with pytest.raises(ZOError, match="row 9: column 'label' holds -1, and the table names its labels 0 to 1 alone"):
        _task(nobody)


def test_a_builtin_task_reads_the_names_of_a_table(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": i} for i in range(3)]
    names = datasets.ClassLabel(names=["contradiction", "entailment", "neutral"])  # another order than the task's
    task = get_task("cb")
    found = make_examples(read_rows(parquet(tmp_path / "cb.parquet", rows, label=names)), task, "cb.parquet")
    assert [task.labels[e.label] for e in found] == names.names


def _task(path: Path) -> Task:
    config = TrainConfig(train_file=path, template="{text} It was")
    return load_examples(config, Reporter(Console(quiet=True))).task


def test_arrays_of_a_frame_are_lists() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = rows_given([{"messages": np.array(messages, dtype=object), "label": np.int64(1)}], "the rows")
    assert rows == [{"messages": messages, "label": 1}]


# --- what cannot be ---


class Frame:
    """Looks like a table of another library."""


GIVEN: dict[str, tuple[Any, str]] = {
    "a frame": (Frame(), r"of type Frame; give a list of mappings.*to_dict\('records'\)"),
    "a number": (3, "of type int"),
    "texts": (["a", "b"], "of type list; give a list of mappings"),
    "nothing": ([], "are none"),
    "splits": (datasets.DatasetDict({"train": datasets.Dataset.from_list(ODD)}), r"several splits \(train\); give one"),
    "an empty data set": (datasets.Dataset.from_list(ODD).select([]), "is empty"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_no_rows(name: str) -> None:
    given, what = GIVEN[name]
    with pytest.raises(ZOError, match=what):
        rows_given(given, "the rows")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a hub that cannot be reached": ({"dataset": "me/mine"}, r"data set 'me/mine', split 'train', could not be fetched \(.*\); look at"),
    "a hub where a file was meant": ({"train_file": "me/mine"}, r"data set 'me/mine', split 'train', could not be fetched"),
    "a split that is not there": ({"dataset": "SAVED", "split": "test"}, r"split 'test', could not be fetched \(it has the splits train\)"),
    "no data set": ({"dataset": "EMPTY"}, r"data set '.*', split 'train', could not be fetched"),
    "both": ({"dataset": "me/mine", "train_file": "a.csv"}, "train_file was given with dataset"),
    "a split of nothing": ({"split": "test"}, "split was given without dataset"),
    "a configuration of nothing": ({"dataset_config": "plain"}, "dataset_config was given without dataset"),
    "names for lines of JSON": ({"train_file": "ROWS", "column_names": "a,b"}, r"column_names are of \.csv and \.tsv files"),
    "names of nothing": ({"column_names": "a,b"}, "column_names was given without train_file"),
    "a name twice": ({"train_file": "TABLE", "column_names": "a,a"}, "column_names='a,a' must be different names"),
    "too few names": ({"train_file": "TABLE", "column_names": "text"}, "more fields than"),
    "damaged Parquet": ({"train_file": "DAMAGED"}, r"damaged\.parquet cannot be read as Parquet"),
    "an array of numbers": ({"train_file": "NUMBERS"}, r"numbers\.json, row 1: a int; each row must be one JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence_says_what_cannot_be_had(
    name: str, toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ODD)}).save_to_disk("saved")
    Path("empty").mkdir()
    Path("damaged.parquet").write_bytes(b"PAR1 and no more")
    Path("numbers.json").write_text("[1, 2]")
    written(Path("rows.jsonl"), ODD), written(Path("table.csv"), ODD)
    places = {
        "SAVED": "saved",
        "EMPTY": "empty",
        "DAMAGED": "damaged.parquet",
        "NUMBERS": "numbers.json",
        "ROWS": "rows.jsonl",
        "TABLE": "table.csv",
    }
    changes, what = WRONG[name]
    capsys.readouterr()
    line = toy_options(
        **{"train_file": None, "eval_file": None, "output_dir": "out"}
        | {k: places.get(v, v) for k, v in changes.items()}
    )
    assert run_main(line) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.search(what, said[-1]), said
    assert said[-1].endswith(".") and not Path("out").exists()


def test_what_a_name_of_the_hub_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    names = {
        "org/name": "org/name",
        "org/rows.csv": None,
        "here/rows": None,
        "rows": None,
        "../a": None,
        "a/b/c": None,
        "/a": None,
    }
    assert {name: hub_name(Path(name)) for name in names} == names
    assert hub_name(IN_PYTHON) is None
