"""zo-opt compare from the command line: tables, failures, interruption, resuming."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import psutil
import pytest
from conftest import Sentiment, run_main
from forked_runs import FORKING

from zo_opt.comparison import runs, supervisor
from zo_opt.errors import ZOError
from zo_opt.record.output import output_directory
from zo_opt.record.progress import Reporter
from zo_opt.training.config import TrainConfig
from zo_opt.training.stop import StopRequest

Compare = Callable[..., list[str]]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "subprocess", FORKING)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.02)


@pytest.fixture(scope="session")
def compare_line(tiny_model_dir: Path, sentiment_files: Sentiment) -> Compare:
    """Options -> command line of a comparison on the toy task."""

    def line(**changes: Any) -> list[str]:
        values = {
            "model_name_or_path": tiny_model_dir, "train_file": sentiment_files.train, "eval_file": sentiment_files.eval,
            "template": "{text} It was", "verbalizers": "terrible,great", "device": "cpu", "precision": "fp32",
            "budget_forwards": 12, **changes,
        }  # fmt: skip
        found = ["compare"]
        for name, value in values.items():
            if value is not None:
                found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return found

    return line


def rows_of(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((directory / "rows.json").read_text())}


TIMED = ("peak_memory", "step_seconds")


def untimed(directory: Path) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in row.items() if k not in TIMED} for name, row in rows_of(directory).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, compare_line: Compare) -> tuple[Path, list[str]]:
    """Directory and command line of a finished comparison of three methods."""
    directory = tmp_path_factory.mktemp("compare") / "out"
    line = compare_line(methods="lora,mezo-lora,adalora", seeds="0,1", jobs=2, output_dir=directory)
    patch = pytest.MonkeyPatch()
    patch.setattr(psutil, "subprocess", FORKING)
    patch.setattr(supervisor, "LOOK_SECONDS", 0.02)
    assert run_main(line) == 0
    patch.undo()
    return directory, line


def test_every_cell_is_filled(finished: tuple[Path, list[str]]) -> None:
    rows = rows_of(finished[0])
    assert list(rows) == ["lora", "mezo-lora", "adalora"]
    for name, row in rows.items():
        assert row["state"] == "finished"
        assert row["seeds"] == 2
        assert all(value is not None for value in row.values())
        assert row["steps"] == {"mezo-lora": 6}.get(name, 4)
        assert row["forwards"] == 12
        assert row["low"] <= row["score"] <= row["high"]
        assert row["peak_memory"] > 1 << 20
    assert rows["adalora"]["trainable_end"] < rows["adalora"]["trainable"]


def test_files_of_a_comparison(finished: tuple[Path, list[str]]) -> None:
    directory, _ = finished
    table = list(csv.DictReader((directory / "compare.csv").read_text().splitlines()))
    assert [line["method"] for line in table] == ["lora", "mezo-lora", "adalora"]
    assert all(line["score"] and line["trainable"] for line in table)
    page = (directory / "compare.md").read_text()
    assert all(f"| {name} |" in page for name in ("lora", "mezo-lora", "adalora"))
    assert "zo-opt compare" in page
    assert matplotlib.image.imread(directory / "compare.png")[..., :3].std() > 0.05


def test_weights_are_not_kept(finished: tuple[Path, list[str]]) -> None:
    kept = [p for p in finished[0].rglob("*") if p.suffix == ".safetensors" or p.name in ("journal", "start")]
    assert kept == []


def test_what_is_finished_is_not_run_again(
    finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(psutil.subprocess, "Popen", refuse)
    before = rows_of(finished[0])
    assert run_main(["compare", "--output_dir", str(finished[0]), "--resume"]) == 0
    assert rows_of(finished[0]) == before
    assert "mezo-lora" in capsys.readouterr().out


def test_the_table_fits_80_columns(
    finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main(["compare", "--output_dir", str(finished[0]), "--resume"]) == 0
    out = capsys.readouterr().out
    table = [line.rstrip() for line in out.splitlines() if "table and pictures" not in line]
    assert max(map(len, table)) <= 80
    for heading in ("trainable", "at end", "peak memory", "s a step", "train loss", "95% interval"):
        assert out.count(heading) == 1, heading
    assert sum("mezo-lora" in line for line in table) == 3


def test_where_all_fail_there_is_a_table(
    forked: None, compare_line: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = compare_line(methods="lora,mezo-lora", **{"adapter.target_modules": '["q_proj","nowhere"]'}, output_dir=out)
    code = run_main(line)
    rows, text = rows_of(out), capsys.readouterr()
    assert code == 2
    assert all(row["state"] == "failed" and "nowhere" in row["reason"] for row in rows.values())
    assert "no run finished" in text.err
    assert (out / "compare.md").is_file() and (out / "compare.png").is_file()


def test_one_that_diverges(forked: None, compare_line: Compare, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    line = compare_line(methods="lora,full", **{"adapter.alpha": 1e38}, budget_forwards=60, output_dir=out)
    assert run_main(line) == 0
    rows = rows_of(out)
    assert rows["full"]["state"] == "finished"
    assert rows["lora"]["state"] == "diverged"
    assert "lora: diverged" in capsys.readouterr().out
    assert "diverged" in (out / "compare.md").read_text()


def test_a_run_killed_from_outside_is_shown_and_tried_again(
    forked: None, compare_line: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = [], runs.Run.start

    def start_and_kill(self: runs.Run, *arguments: Any) -> Any:
        process = start(self, *arguments)
        started.append(self.method)
        if started == ["lora"]:
            os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(runs.Run, "start", start_and_kill)
    out = tmp_path / "out"
    assert run_main(compare_line(methods="lora,mezo-lora", output_dir=out)) == 0
    rows = rows_of(out)
    assert (rows["lora"]["state"], rows["mezo-lora"]["state"]) == ("failed", "finished")
    assert "SIGKILL" in rows["lora"]["reason"]
    assert run_main(["compare", "--output_dir", str(out), "--resume"]) == 0
    assert rows_of(out)["lora"]["state"] == "finished"
    assert started == ["lora", "mezo-lora", "lora"]


def test_interrupted_and_resumed_is_as_uninterrupted(
    forked: None,
    finished: tuple[Path, list[str]],
    compare_line: Compare,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one run at a time instead of two, so that the runs' caches are others', and the directory under another name."""
    out = tmp_path / "out"
    line = compare_line(methods="lora,mezo-lora,adalora", seeds="0,1", jobs=2, output_dir=out)

    def interrupt() -> None:
        while not list(out.glob("runs/mezo-lora/*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert run_main(line) == 143
    thread.join(timeout=1)
    assert f"zo-opt compare --output_dir {out} --resume" in capsys.readouterr().err
    states = {row["state"] for row in rows_of(out).values()}
    assert "running" in states
    assert run_main([*line, "--resume", "--seeds", "0"]) == 2
    assert "seeds=0 was given with --resume" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    out.rename("moved")
    assert run_main(["compare", "--output_dir", "moved", "--resume", "--jobs", "1"]) == 0
    assert untimed(tmp_path / "moved") == untimed(finished[0])


def test_a_second_signal_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN); pathlib.Path(sys.argv[1]).touch(); time.sleep(99)"
    started, processes = tmp_path / "started", []

    def start(*_: Any) -> psutil.Popen:
        processes.append(psutil.Popen([sys.executable, "-c", deaf, str(started)]))
        return processes[-1]

    def ask_twice() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3 * supervisor.LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs.Run, "start", start)
    threading.Thread(target=ask_twice, daemon=True).start()
    run = runs.Run("lora", TrainConfig(output_dir=tmp_path / "run"))
    with pytest.raises(StopRequest):
        supervisor.run_all([run], Reporter(), "comparing", jobs=1, prefixes=tmp_path, keep_models=False)
    assert processes[0].wait() == -signal.SIGKILL
    assert run.outcome() is None


def test_a_run_that_outlived_its_comparison_is_not_started_again(tmp_path: Path) -> None:
    with output_directory(tmp_path / "run"), pytest.raises(ZOError, match="still being written by process"):
        runs.Run("lora", TrainConfig(output_dir=tmp_path / "run")).start(1, tmp_path)


def test_a_search_of_learning_rates(forked: None, compare_line: Compare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_main(compare_line(methods="mezo:lora", lr_trials=3, lr_forwards=6, output_dir=out)) == 0
    for name, row in rows_of(out).items():
        trials = sorted((out / "lr" / name.replace(":", "_")).glob("*/results.json"))
        found = [json.loads(path.read_text()) for path in trials]
        assert len(found) == 3
        assert row["search_forwards"] == sum(t["forwards"] for t in found) == 18
        assert row["forwards"] == 12
        best = min(found, key=lambda t: t["after"]["loss"])
        assert row["lr"] == best["lr"]
        assert all(json.loads((path.parent / "run.json").read_text())["config"]["validation"] for path in trials)


@pytest.mark.slow
def test_a_budget_in_seconds(forked: None, compare_line: Compare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = compare_line(methods="lora,mezo-lora", budget_forwards=None, budget_seconds=0.3, output_dir=out)
    assert run_main(line) == 0
    for name, row in rows_of(out).items():
        assert row["steps"] > 1
        last = json.loads((out / "runs" / name / "seed-0" / "metrics.jsonl").read_text().splitlines()[-1])
        assert 0.03 < last["seconds"] < 3.0  # a shared machine


def test_a_budget_of_memory(forked: None, compare_line: Compare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = compare_line(methods="full,mezo", budget_memory="1.1MiB", prompt_cache="off", output_dir=out)
    assert run_main(line) == 0
    rows = rows_of(out)
    assert rows["mezo"]["batch_size"] in (16, 8, 4, 2)
    full = rows["full"]
    assert full["state"] == "does not fit" or full["batch_size"] < rows["mezo"]["batch_size"]


def test_nothing_fits(forked: None, compare_line: Compare, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run_main(compare_line(methods="full,lora", budget_memory="1KiB", output_dir=out)) == 2
    assert {row["state"] for row in rows_of(out).values()} == {"does not fit"}
    assert "1KiB" in capsys.readouterr().out
    assert (out / "compare.png").is_file()


def test_running_text(forked: None, compare_line: Compare, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the film is a long story of two friends and their way home in winter\n" * 40)
    out = tmp_path / "out"
    line = compare_line(
        methods="lora,mezo-lora", task="lm", train_file=text, eval_file=None, template=None, verbalizers=None,
        max_length=16, seeds="0,1", held_out=8, output_dir=out,
    )  # fmt: skip
    assert run_main(line) == 0
    for row in rows_of(out).values():
        assert row["metric"] == "perplexity"
        assert row["low"] <= row["score"] <= row["high"]
    assert "perplexity" in (out / "compare.md").read_text()


def test_texts_to_write(forked: None, compare_line: Compare, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the film {i}", "answer": "great"}) + "\n" for i in range(24)))
    out = tmp_path / "out"
    line = compare_line(
        methods="lora", train_file=rows, eval_file=None, template="{text} It was", verbalizers=None, target_column="answer",
        max_new_tokens=2, held_out=4, output_dir=out,
    )  # fmt: skip
    assert run_main(line) == 0
    assert rows_of(out)["lora"]["metric"] == "rougeL"


WRONG = {
    "unknown method": ({"methods": "lora,loar"}, "'loar' is not known"),
    "a method twice": ({"methods": "lora,lora"}, "each once"),
    "no seeds": ({"seeds": "a,b"}, "whole numbers"),
    "two budgets": ({"budget_seconds": 3}, "both given"),
    "no budget": ({"budget_forwards": 0}, "positive"),
    "a budget of no step": ({"budget_forwards": 2, "methods": "mezo-lora,lora"}, "does not pay for one step"),
    "one trial": ({"lr_trials": 1}, "at least 2"),
    "lr and trials": ({"lr": 0.1, "lr_trials": 2}, "leave one out"),
    "forward passes of no trials": ({"lr_forwards": 9}, "lr_forwards was given without lr_trials"),
    "an option of no method": (
        {"methods": "lora,dora", "zo_eps": 0.1},
        "zo_eps=0.1 is of no use to any of the methods",
    ),
    "memory without unit": ({"budget_memory": "24"}, "unit"),
    "rank that cannot be": ({"methods": "lora", "adapter.rank": -1}, "method lora: "),
    "no rows": ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_sentence_and_leaves_nothing(
    case: str, compare_line: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, part = WRONG[case]
    out = tmp_path / "out"
    assert run_main(compare_line(output_dir=out, **changes)) == 2
    error = capsys.readouterr().err
    assert part in error
    assert "Traceback" not in error
    assert not out.exists()


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["compare", "--resume", "--output_dir", str(tmp_path)]) == 2
    assert "zo-opt compare" in capsys.readouterr().err
    assert run_main(["compare", "--resume"]) == 2


@pytest.mark.slow
def test_in_a_real_process(compare_line: Compare, tmp_path: Path) -> None:
    """With a small lr that YAML must not take for a word; all other tests run forks."""
    out = tmp_path / "out"
    assert run_main(compare_line(methods="mezo-lora", lr=1e-06, output_dir=out)) == 0
    row = rows_of(out)["mezo-lora"]
    assert row["state"] == "finished"
    assert row["lr"] == 1e-06
