"""``zo-opt status`` reads what a run's files say; trackers are told what metrics.jsonl has."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_main

from zo_opt.record import checkpoint
from zo_opt.record.metrics import MetricsWriter
from zo_opt.record.output import LOCK_NAME, output_directory
from zo_opt.record.trackers import Trackers, check_trackers
from zo_opt.record.watch import Watched
from zo_opt.training import stepper

Options = Callable[..., list[str]]
JOB: dict[str, Any] = {
    "steps": 6,
    "save_steps": 2,
    "optimizer": "mezo",
    "query_mode": "split",
}


def resume(directory: Path, *more: str) -> int:
    return run_main(["train", "--output_dir", str(directory), "--resume", *more])


@pytest.fixture
def died(toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that died after its third step, its lock left behind."""
    original, out = MetricsWriter.write, tmp_path / "out"

    def write(self: MetricsWriter, record: Any, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == 2:
            raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        with pytest.raises(SystemError):
            run_main(toy_options(output_dir=out, **JOB))
    (out / LOCK_NAME).touch()
    return out


def test_a_run_from_its_death_to_its_end(died: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in died.rglob("*")}
    capsys.readouterr()
    assert run_main(["status", str(died)]) == 1
    said = capsys.readouterr().out
    for part in ("killed", "3 of 6", "queries", "after step 2", "verified up to step 3", "--resume"):
        assert part in said
    with output_directory(died, resume=True):
        assert run_main(["status", str(died)]) == 0
        said = capsys.readouterr().out
        assert f"running, process {os.getpid()} on" in said
        assert "left" in said
        assert "memory" in said
    assert Watched(died).look().state == "stopped"
    assert {path: path.stat().st_mtime_ns for path in died.rglob("*")}.keys() == before.keys() - {died / LOCK_NAME}
    watched = Watched(died)
    assert watched.look().steps == 3
    assert resume(died) == 0
    now = watched.look()
    results = json.loads((died / "results.json").read_text())
    assert (now.state, now.steps, now.checkpoint_step) == ("finished", 6, 6)
    assert (now.queries, now.forwards, now.dropped) == (results["queries"], results["forwards"], 0)
    assert replace(now, checkpoint_age=None) == replace(Watched(died).look(), checkpoint_age=None)
    assert run_main(["status", str(died), "--follow"]) == 0  # nothing left to follow


def test_what_is_damaged_is_told(died: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = bytearray((died / "journal").read_bytes())
    journal[len(journal) // 2] ^= 1
    (died / "journal").write_bytes(journal)
    os.utime(died / checkpoint.NAME, (time.time() + 3600,) * 2)  # the clock has jumped
    assert run_main(["status", str(died)]) == 1
    assert "damaged" in capsys.readouterr().out
    assert Watched(died).look().checkpoint_age == 0


def test_a_checkpoint_with_one_wrong_bit_is_not_sound(died: Path) -> None:
    path = died / checkpoint.NAME
    assert Watched(died).look().sound
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    status = Watched(died).look()
    assert not status.sound
    assert status.checkpoint_step == checkpoint.step_of(died / checkpoint.PREVIOUS_NAME)


def test_a_comparisons_runs_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.json").write_text("{}")
    for name in ("lora", "mezo"):
        run = tmp_path / "runs" / name / "seed-0"
        run.mkdir(parents=True)
        (run / "run.json").write_text("{}")
    assert run_main(["status", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "runs/lora/seed-0" in said
    assert said.count("stopped") == 2


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        assert run_main(["status", str(directory)]) == 2
        assert "output_dir" in capsys.readouterr().err


# --- trackers ---


class Notebook:
    """A tracker as accelerate has them."""

    name = "notebook"
    requires_logging_directory = False
    pages: list[tuple[str, Any]] = []  # noqa: RUF012
    fails_at = -1

    def __init__(self, project: str, **_: Any) -> None:
        self.pages.append(("project", project))

    def start(self) -> None:
        self.pages.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.pages.append(("steps", values["steps"]))

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.pages.append((next(iter(values)).split("/")[0], step))

    def finish(self) -> None:
        self.pages.append(("finish", None))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "pages", [])
    return Notebook


def test_a_tracker_is_told_every_step_once(
    notebook: type[Notebook], toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = stepper.training_loss

    def stop_after_four(*arguments: Any) -> Any:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) == 4:
            raise SystemError
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stepper, "training_loss", stop_after_four)
        with pytest.raises(SystemError):
            run_main(toy_options(output_dir=out, report_to="notebook", **JOB | {"save_steps": 3}))
    first, notebook.pages[:] = list(notebook.pages), []
    assert first == [
        ("project", "zo-opt"), ("start", None), ("steps", 6), ("eval", 0), *(("train", s) for s in range(4)), ("finish", None),
    ]  # fmt: skip
    assert resume(out) == 0
    steps = [page for page in notebook.pages if page[0] in ("train", "eval")]
    assert steps == [("train", 3), ("train", 4), ("train", 5), ("eval", 6)]  # step 3 was beyond the checkpoint


def test_a_tracker_that_fails_ends_no_run(
    notebook: type[Notebook], toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(notebook, "fails_at", 2)
    assert run_main(toy_options(output_dir=tmp_path / "out", report_to="notebook", **JOB)) == 0
    assert "notebook failed (no network); the run goes on without it" in capsys.readouterr().out
    assert notebook.pages[-1] == ("train", 1)


def test_tensorboard_has_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert check_trackers("tensorboard, none") == ["tensorboard"]
    said: list[str] = []
    for first, losses in ((0, [3.0, 2.0, 9.0]), (2, [1.0])):  # the second one takes the place of step 2
        trackers = Trackers(["tensorboard"], tmp_path, {"steps": 3}, "id", first, said.append)
        for step, loss in enumerate(losses, first):
            line = {"step": step, "loss": loss, "lr": 0.1, "queries": 1, "dropped": 0, "forwards": 2, "seconds": 0.1}
            trackers.log_step(line)
        trackers.close()
    assert said == []
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
