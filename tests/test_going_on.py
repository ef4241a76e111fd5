"""A run that is at its end, or was stopped before it, goes on to other steps than it was started with."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_main
from text_tasks import results

from zo_opt.record import checkpoint
from zo_opt.record.metrics import MetricsWriter, read_metrics

Options = Callable[..., list[str]]
BACKPROPAGATION: dict[str, Any] = {
    "optimizer": "adamw", "adapter": "lora", "lr": 0.02, "query_mode": None, "query_schedule": None, "queries": None,
}  # fmt: skip
FEEDBACK: dict[str, Any] = dict.fromkeys(("adapter", "query_mode", "query_schedule", "queries", "lr"))
KINDS = {"backpropagation": BACKPROPAGATION, "a journal": {"lr": 0.1}, "feedback": FEEDBACK}


def go_on(directory: Path, *more: object) -> int:
    return run_main(["train", "--output_dir", str(directory), "--resume", *map(str, more)])


def weights(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def lrs(directory: Path) -> list[float]:
    return [line["lr"] for line in read_metrics(directory)]


def stopped(line: list[str], step: int, stop: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = MetricsWriter.write

    def write(self: MetricsWriter, record: Any, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == step:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        run_main(line)


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_constant_learning_rate_it_is_the_longer_run(kind: str, toy_options: Options, tmp_path: Path) -> None:
    options = KINDS[kind] | {"lr_schedule": "constant", "eval_steps": 2}
    assert run_main(toy_options(**options, steps=4, output_dir=tmp_path / "parts")) == 0
    assert run_main(toy_options(**options, steps=7, output_dir=tmp_path / "whole")) == 0
    assert go_on(tmp_path / "parts", "--steps", 7) == 0
    parts, whole = results(tmp_path / "parts"), results(tmp_path / "whole")
    for name in ("before", "after", "curve", "kept_step", "steps", "queries", "forwards"):
        assert parts[name] == whole[name], name
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert json.loads((tmp_path / "parts/run.json").read_text())["went_on"] == [{"after_step": 4, "steps": 7}]
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_the_learning_rate_is_that_of_the_longer_run(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BACKPROPAGATION | {"lr_schedule": "linear", "lr": 0.08}
    assert run_main(toy_options(**options, steps=4, output_dir=tmp_path / "run")) == 0
    capsys.readouterr()
    assert go_on(tmp_path / "run", "--steps", 8) == 0
    said = capsys.readouterr().out
    assert "from here on its learning rate is that of a run of 8 steps (linear): 0 becomes 0.04" in said
    assert lrs(tmp_path / "run") == pytest.approx([0.08, 0.06, 0.04, 0.02, 0.04, 0.03, 0.02, 0.01])
    assert go_on(tmp_path / "run", "--steps", 10) == 0  # and again
    assert lrs(tmp_path / "run")[8:] == pytest.approx([0.016, 0.008])


def test_after_ctrl_c(toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = toy_options(**BACKPROPAGATION, epochs=2, output_dir=tmp_path / "run")  # 8 steps
    stopped(line, 2, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    assert go_on(tmp_path / "run", "--steps", 5) == 0
    assert results(tmp_path / "run")["steps"] == 5


def test_killed_on_the_way_it_goes_on_to_the_new_end(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise SystemError

    for name in ("whole", "broken"):
        assert run_main(toy_options(lr=0.1, steps=3, output_dir=tmp_path / name)) == 0
    assert go_on(tmp_path / "whole", "--steps", 6) == 0
    with pytest.raises(SystemError):
        stopped(["train", "--output_dir", str(tmp_path / "broken"), "--resume", "--steps", "6"], 4, die, monkeypatch)
    assert not (tmp_path / "broken/results.json").exists()
    assert go_on(tmp_path / "broken") == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert run_main(["replay", str(tmp_path / "broken"), "--to", str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_at_its_end_it_ends_again(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(toy_options(**BACKPROPAGATION, steps=3, output_dir=tmp_path / "run")) == 0
    before, tuned = results(tmp_path / "run"), weights(tmp_path / "run")
    assert go_on(tmp_path / "run") == 0
    assert "at its end; --steps of more than 3 goes on" in capsys.readouterr().out
    assert (results(tmp_path / "run")["after"], weights(tmp_path / "run")) == (before["after"], tuned)


REFUSED: dict[str, tuple[dict[str, Any], list[object], str]] = {
    "steps that are made": (BACKPROPAGATION, [3], "steps=3 was given with --resume, and the run has taken 4; give more"),
    "an adapter of phases": (
        BACKPROPAGATION | {"adapter": "lamda", "lr": 0.01, "rank": 2}, [9], "adapter 'lamda', whose phases were laid out for 4",
    ),
    "privacy": (
        {"query_mode": None, "privacy_noise": 1.0, "privacy_clip": 1.0, "query_schedule": None, "queries": None}, [9],
        "holds no checkpoint.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on(name: str, toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, given, what = REFUSED[name]
    assert run_main(toy_options(**options, steps=4, output_dir=tmp_path / "run")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert go_on(tmp_path / "run", "--steps", *given) == 2
    assert what in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_steps_beyond_the_checkpoint_are_not_lost(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die() -> None:
        raise SystemError

    with pytest.raises(SystemError):
        stopped(toy_options(lr=0.1, steps=6, output_dir=tmp_path / "run"), 3, die, monkeypatch)
    assert go_on(tmp_path / "run", "--steps", 9) == 2
    assert (
        "killed after step 4, and its checkpoint is of step 0; resume it without --steps first"
        in capsys.readouterr().err
    )
    assert checkpoint.step_of(tmp_path / "run" / checkpoint.NAME) == 0
    assert go_on(tmp_path / "run") == 0 and go_on(tmp_path / "run", "--steps", 9) == 0


def test_a_run_that_ended_early_asks_for_more_patience(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BACKPROPAGATION | {"lr": 0.0, "eval_steps": 1, "patience": 1}
    assert run_main(toy_options(**options, steps=6, output_dir=tmp_path / "run")) == 0
    assert results(tmp_path / "run")["steps"] == 2
    assert go_on(tmp_path / "run", "--steps", 8) == 2
    assert "give a larger --patience beside --steps" in capsys.readouterr().err
    assert go_on(tmp_path / "run", "--steps", 8, "--patience", 3) == 0
    assert results(tmp_path / "run")["steps"] == 4
