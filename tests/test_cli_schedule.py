"""``zo-opt schedule``: the table, the picture and its numbers agree with the schedules; mistakes are one sentence."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_main

from zo_opt.schedules import SCHEDULES, adazeta_queries, cosine_queries, linear_queries, simulate

PNG = b"\x89PNG\r\n\x1a\n"
SEQUENTIAL = [name for name in SCHEDULES if name != "every-example"]  # which needs split
ALL = ",".join(SEQUENTIAL)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def columns(path: Path) -> dict[str, dict[str, list[int]]]:
    """The CSV: schedule -> column -> numbers in the order of steps."""
    read: dict[str, dict[str, list[int]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            course = read.setdefault(row.pop("query_schedule"), {name: [] for name in row})
            for name, value in row.items():
                course[name].append(int(value))
    return read


def test_the_command_of_the_design(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "schedule --query_schedule adazeta --schedule.alpha 0.85 --schedule.beta 0.4 --schedule.max_queries 15 --steps 1000"
    assert run_main(line.split()) == 0
    expected = simulate(adazeta_queries(0.85, 0.4, 15), 1000)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert f"queries     {sum(expected):,}" in shown.out
    assert f"forwards    {2 * sum(expected):,}" in shown.out
    rows = dict(re.findall(r"^ +(\d+) +(\d+) *$", shown.out, flags=re.MULTILINE))
    assert {int(step): int(count) for step, count in rows.items()} == {
        step: expected[step] for step in [*range(0, 1000, 100), 999]
    }
    assert (here / "schedule.png").read_bytes().startswith(PNG)
    course = columns(here / "schedule.csv")["adazeta"]
    assert course["step"] == course["epoch"] == list(range(1000))
    assert course["queries"] == expected
    assert course["forwards"][-1] == 2 * sum(expected)
    assert sorted(path.name for path in here.iterdir()) == ["schedule.csv", "schedule.png"]


def test_several_side_by_side(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "schedule --query_schedule adazeta,linear,cosine --steps 90 --steps_per_epoch 9 --out here/p.png"
    assert run_main(line.split()) == 0
    courses = columns(here / "here" / "p.csv")
    assert list(courses) == ["adazeta", "linear", "cosine"]
    assert courses["adazeta"]["queries"] == simulate(adazeta_queries(), 90, 9)
    assert courses["linear"]["queries"] == simulate(linear_queries(1, 15, 90), 90)
    assert courses["cosine"]["queries"] == simulate(cosine_queries(1, 15, 90), 90)
    assert courses["linear"]["epoch"] == [step // 9 for step in range(90)]
    shown = capsys.readouterr().out
    assert re.search(r"step +epoch +adazeta +linear +cosine", shown)
    assert "an epoch is 9 steps" in shown
    assert (here / "here" / "p.png").read_bytes().startswith(PNG)


def test_all_fit_a_terminal_of_80_columns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["schedule", "--query_schedule", ALL]) == 0
    table = capsys.readouterr().out.split("an epoch")[0].splitlines()
    assert re.search(" +".join(["step", *SEQUENTIAL]), "\n".join(table))
    assert max(map(len, table)) <= 80
    courses = columns(here / "schedule.csv")
    assert list(courses) == SEQUENTIAL
    assert courses["budget"]["forwards"][-1] == courses["adazeta"]["forwards"][-1]  # the default budget
    assert courses["variance"]["queries"][-1] > 5  # the signal is assumed to fall


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs(here: Path, steps: int) -> None:
    assert run_main(["schedule", "--query_schedule", ALL, "--steps", str(steps)]) == 0
    assert all(len(course["queries"]) == steps for course in columns(here / "schedule.csv").values())


def test_split_costs_two_forwards_and_is_bounded_by_the_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "schedule --query_schedule linear,constant --schedule.end 20 --schedule.queries 20 --query_mode split --steps 10 --batch_size 8"
    assert run_main(line.split()) == 0
    for course in columns(here / "schedule.csv").values():
        assert course["forwards"] == list(range(2, 22, 2))
        assert max(course["queries"]) == 8
    assert "whatever its queries, at most 8 (split)" in capsys.readouterr().out


def test_options_of_the_other_schedules(here: Path) -> None:
    line = "schedule --query_schedule stepwise,budget,variance --steps 8 --schedule.milestones 0:2,6:5 --schedule.forwards 40"
    assert run_main([*line.split(), "--schedule.min_queries", "2", "--signal_end", "1"]) == 0
    courses = columns(here / "schedule.csv")
    assert courses["stepwise"]["queries"] == [2] * 6 + [5] * 2
    assert courses["budget"]["queries"] == [2] * 4 + [3] * 4
    assert courses["budget"]["forwards"][-1] == 40
    assert courses["variance"]["queries"] == [2] * 8


def test_derived_beta(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_main(
            [
                "schedule",
                "--schedule.beta",
                "derived",
                "--schedule.max_queries",
                "30",
                "--steps",
                "1000",
                "--steps_per_epoch",
                "10",
            ]
        )
        == 0
    )
    assert "derived for 100 epochs" in capsys.readouterr().out
    assert columns(here / "schedule.csv")["adazeta"]["queries"][-1] == 19  # 20 is reached as the run ends


def test_a_config_file(here: Path) -> None:
    (here / "options.yaml").write_text("query_schedule: linear\nsteps: 4\nschedule:\n  end: 4\n")
    assert run_main(["schedule", "--config", "options.yaml", "--steps", "7"]) == 0
    assert columns(here / "schedule.csv")["linear"]["queries"] == [1, 2, 2, 3, 3, 4, 4]


def test_without_a_name_nothing_is_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert run_main(["schedule", "--steps", "5"]) == 0
    assert sorted(p.name for p in here.glob("*.png")) == ["schedule-2.png", "schedule-3.png", "schedule.png"]
    assert "schedule-3.png" in capsys.readouterr().out


def test_overwrite_replaces(here: Path) -> None:
    (here / "p.png").write_text("old")
    (here / "p.csv").write_text("old")
    assert run_main(["schedule", "--steps", "5", "--out", "p.png", "--overwrite"]) == 0
    assert (here / "p.png").read_bytes().startswith(PNG)
    assert (here / "p.csv").read_text().startswith("query_schedule,step,epoch,queries,forwards\nadazeta,0,0,1,2\n")


# name -> (what to put there first, options, what the sentence must say)
Case = tuple[Callable[[Path], object], str, str]


def nothing(here: Path) -> None:
    pass


CASES: dict[str, Case] = {
    "unknown schedule": (nothing, "--query_schedule bogus", "'bogus'.*constant, adazeta.*variance"),
    "one unknown schedule among others": (nothing, "--query_schedule adazeta,bogus", "'bogus'"),
    "no schedule": (nothing, "--query_schedule=", "''"),
    "a comma too many": (nothing, "--query_schedule adazeta,", "''"),
    "unknown query mode": (nothing, "--query_mode bogus", "'bogus'.*sequential.*split"),
    **{f"alpha {value}": (nothing, f"--schedule.alpha {value}", "alpha") for value in ("0", "1", "-1", "nan", "much")},
    **{f"beta {value}": (nothing, f"--schedule.beta={value}", "beta") for value in ("0", "1", "-1", "nan", "much")},
    "too few epochs to derive beta": (nothing, "--schedule.beta derived --steps 20", "20 epochs.*at least 24"),
    **{
        f"{name} {value}": (nothing, f"--{name} {value}", name.rpartition(".")[2])
        for name in (
            "schedule.max_queries",
            "schedule.min_queries",
            "steps",
            "steps_per_epoch",
            "batch_size",
            "signal_end",
        )
        for value in ("0", "-2", "word")
    },
    "steps without end": (nothing, "--steps 1000000000", "steps=1000000000"),
    "every example without split": (nothing, "--query_schedule every-example", "add --query_mode split"),
    "a flat option of a schedule": (nothing, "--max_queries 3", r"Did you mean --schedule\.max_queries\?"),
    "an option of no schedule": (
        nothing,
        "--schedule.colour 3",
        "the schedule has no option 'colour'; it has alpha, beta",
    ),
    "an option of another schedule": (nothing, "--schedule.queries 3", "the schedule has no option 'queries'"),
    "an adapter": (nothing, "--adapter.rank 3", "adapter"),
    "a floor above the ceiling": (nothing, "--schedule.min_queries 20", "min_queries=20"),
    "a signal that rises": (nothing, "--signal_end 2", "signal_end=2"),
    "a signal that is none": (nothing, "--signal_end nan", "signal_end"),
    "too small a budget": (nothing, "--query_schedule budget --schedule.forwards 1999", "forwards=1999.*2000"),
    "a budget of nothing": (nothing, "--query_schedule budget --schedule.forwards 0", "forwards=0"),
    "a budget in split mode": (
        nothing,
        "--query_schedule budget --query_mode split",
        "leaves a budget nothing to decide",
    ),
    "milestones of another form": (nothing, "--query_schedule stepwise --schedule.milestones 5", "'5'"),
    "milestones that begin late": (nothing, "--query_schedule stepwise --schedule.milestones 5:1", "begin at step 0"),
    "unknown option": (nothing, "--bogus 3", "bogus"),
    "picture of another kind": (nothing, "--out p.jpg", r"p\.jpg.*\.png"),
    "picture without a suffix": (nothing, "--out p", r"\.png"),
    "picture is there": (lambda p: (p / "p.png").write_text("mine"), "--out p.png", r"p\.png is there.*--overwrite"),
    "numbers are there": (lambda p: (p / "p.csv").write_text("mine"), "--out p.png", r"p\.csv is there"),
    "picture is a directory": (lambda p: (p / "p.png").mkdir(), "--out p.png --overwrite", r"p\.png is there"),
    "picture below a file": (lambda p: (p / "plain").write_text("mine"), "--out plain/p.png", "cannot be written"),
    "no such config file": (nothing, "--config none.yaml", r"none\.yaml|config"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    prepare, options, what = CASES[name]
    prepare(here)
    before = {path: path.is_dir() or path.read_bytes() for path in here.rglob("*")}
    assert run_main(["schedule", *options.split()]) == 2
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert line.startswith("zo-opt: error: ")
    assert line.endswith(".")
    assert re.search(what, line), line
    assert said.out == ""
    assert {path: path.is_dir() or path.read_bytes() for path in here.rglob("*")} == before


def test_help_names_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["schedule", "--help"]) == 0
    said = "".join(capsys.readouterr().out.split())  # a name may be broken at its hyphen
    assert all(name in said for name in SCHEDULES)
