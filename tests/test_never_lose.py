"""Nothing is lost: runs that are killed, stopped, run out of disk or find their files damaged end as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_main
from killed_runs import Tally, differences, finish, kill_until_done
from optimizer_problem import make
from test_journal import Model, run

from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, ClipProjectedGrads, redo
from zo_opt.record import checkpoint, report
from zo_opt.record.metrics import MetricsWriter, read_lines
from zo_opt.record.output import LOCK_NAME, output_directory
from zo_opt.schedules import constant_queries, variance_queries
from zo_opt.system.files import write_atomically
from zo_opt.training import stepper

Options = Callable[..., list[str]]
JOB: dict[str, Any] = {  # as much state as there is
    "steps": 12, "save_steps": 5, "update_rule": "adam", "lr_schedule": "linear", "warmup_steps": 3, "clip": 1.0,
    "query_mode": "sequential", "query_schedule": "variance", "max_queries": 3, "weight_decay": 0.1, "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    """Drawing a report takes longer than all else in these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "picture", lambda *_: b"")
        yield


def resume(directory: Path, *more: str) -> int:
    return run_main(["train", "--output_dir", str(directory), "--resume", *more])


def raised_by(signum: int) -> Callable[..., Any]:
    return lambda *_, **__: signal.raise_signal(signum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Path:
    """The directory of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole") / "out"
    assert run_main(toy_options(output_dir=directory, **JOB)) == 0
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Path:
    """The directory of a run that died in step 11 of 12: checkpoints after 10 and 5 steps, 11 steps on record."""
    directory = tmp_path_factory.mktemp("killed") / "out"

    def die_in(step: int) -> None:
        original = stepper.training_loss

        def loss(*arguments: Any) -> torch.Tensor:
            if len(read_lines(directory)) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        stepper.training_loss = loss

    code, said = finish(toy_options(output_dir=directory, **JOB), directory.with_name("log"), lambda: die_in(11))
    assert code == -signal.SIGKILL, said
    assert (directory / LOCK_NAME).exists()
    return directory


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "out"))


# --- kill -9 ---


def test_kill_9_at_random_instants(toy_options: Options, tmp_path: Path) -> None:
    """A few of the kills of benchmarks/kills.py."""
    options = {"steps": 20, "save_steps": 7, "optimizer": "adazeta", "query_mode": "split"}
    out, plain, tally = tmp_path / "run" / "out", tmp_path / "plain" / "out", Tally()
    for directory in (out, plain):
        directory.parent.mkdir()
    code, said = finish(toy_options(output_dir=plain, **options), tmp_path / "log")
    assert code == 0, said
    results = json.loads((plain / "results.json").read_text())
    seconds = results["train_seconds"] + results["other_seconds"], results["train_seconds"]
    kill_until_done(toy_options(output_dir=out, **options), out, random.Random(1), seconds, 3, tally, journal=True)
    assert tally.failures == []
    assert differences(out, plain, journal=True) == []


# But those that have no journal.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adamw", "agzo")])
def test_a_redone_step_leaves_what_the_step_left(tmp_path: Path, name: str) -> None:
    """Weights, slots, counts, history and step control, through the lines of metrics.jsonl; and so the steps after it."""
    models = Model(), Model()
    fixed = name in ("fzoo", "grzo")
    optimizers = [
        make(
            model,
            name,
            [{"params": [model.w, model.b]}, {"params": [model.v], "lr": 0.03, "weight_decay": 0.2}],
            weight_decay=0.1,
            query_schedule=constant_queries(3) if fixed else variance_queries(2, 4),
            step_control=() if fixed else (ClipProjectedGrads(1.5),),
        )
        for model in models
    ]
    one, other = optimizers
    with MetricsWriter(tmp_path, 0) as metrics:
        for _ in range(6):
            run(one, models[0], 1)
            assert one.last_record is not None
            assert one.last_update is not None
            metrics.write(one.last_record, 0.1, one.history, 0.0)
            line = read_lines(tmp_path)[-1]
            redo(other, one.last_update, line.record(other.history))
    for _ in range(3):
        assert repr(one.state_dict()) == repr(other.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
        run(one, models[0], 1)
        run(other, models[1], 1)


def test_recorded_steps_take_no_forward_pass(copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], stepper.training_loss
    monkeypatch.setattr(stepper, "training_loss", lambda *a: calls.append(1) or original(*a))
    assert resume(copied) == 0
    before, last = read_lines(copied)[-2:]
    assert len(calls) == last.values["forwards"] - before.values["forwards"]
    assert differences(copied, whole, journal=True) == []


# --- damaged files ---


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def line_of(path: Path, number: int) -> float:
    """Where the middle of a line is, as a share of the file."""
    lines = path.read_bytes().splitlines(keepends=True)
    return (sum(map(len, lines[:number])) + len(lines[number]) / 2) / sum(map(len, lines))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {  # what is done, what is said of it, whether the journal goes on
    "checkpoint flipped": (lambda r: flip(r / checkpoint.NAME, 0.7), "from the checkpoint before it, after step 5", True),
    "checkpoint lost": (lambda r: (r / checkpoint.NAME).unlink(), "5 of them in the checkpoint, 6 from the journal", True),
    "record cut, other files unfinished": (
        lambda r: [cut(r / "run.json", 0.5), *((r / f".{n}.abcd1234").write_bytes(b"x") for n in (checkpoint.NAME, "journal"))],
        "10 of them in the checkpoint, 1 from the journal", True,
    ),
    "metrics flipped": (
        lambda r: flip(r / "metrics.jsonl", line_of(r / "metrics.jsonl", 10)), "resuming after step 10 of", True,
    ),
    "journal torn": (lambda r: cut(r / "journal", 0.995), "resuming after step 10 of", True),
    "journal flipped at its end": (
        lambda r: flip(r / "journal", line_of(r / "journal", -1)), "is damaged in line.*done again", True,
    ),
    "journal flipped": (lambda r: flip(r / "journal", line_of(r / "journal", 3)), "goes on without a journal", False),
    "journal cut": (lambda r: cut(r / "journal", line_of(r / "journal", 4)), "ends after . steps.*goes on without a journal", False),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_changes_nothing_about_the_outcome(
    copied: Path, whole: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, words, journal = DAMAGE[name]
    damage(copied)
    assert resume(copied) == 0
    assert re.search(words, capsys.readouterr().out)
    found = differences(copied, whole, journal=journal)
    assert found == ([] if journal else ["journal", "journal.damaged"])
    assert json.loads((copied / "run.json").read_text())["config"]["seed"] == JOB["seed"]


def test_a_line_of_metrics_lost_before_the_checkpoint_is_lost_alone(copied: Path, whole: Path) -> None:
    path = copied / "metrics.jsonl"
    flip(path, line_of(path, 4))
    assert resume(copied) == 0
    assert [line.values["step"] for line in read_lines(copied)] == [s for s in range(12) if s != 4]
    assert differences(copied, whole, journal=True) == ["metrics.jsonl"]


def test_every_flipped_or_missing_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    plain = {"format": checkpoint.FORMAT, "zo": {"step": 3}, "extra": {}}
    content = b"".join(checkpoint.sealed({"adapter.w": torch.arange(20.0), "adapter.b": torch.ones(3)}, plain))
    path.write_bytes(content)
    checkpoint.verify(path)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ZOError, match=r"damaged|not written by this version"):
            checkpoint.verify(path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ZOError, match="damaged"):
            checkpoint.verify(path)


def test_two_damaged_checkpoints_end_in_a_sentence(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (checkpoint.NAME, checkpoint.PREVIOUS_NAME):
        flip(copied / name, 0.7)
    before = {path: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    assert resume(copied) == 2
    assert "is damaged (" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before


def test_what_was_there_is_kept_as_the_one_before(tmp_path: Path) -> None:
    path, previous = tmp_path / "now", tmp_path / "before"
    for content in (b"1", b"2", b"3"):
        write_atomically(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    previous.unlink()
    os.link(path, previous)  # killed between the two names
    write_atomically(path, b"4", previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"4", b"3")
    assert {p.name for p in tmp_path.iterdir()} == {"now", "before"}


# --- disk ---


@pytest.mark.parametrize(("name", "more"), [("journal", 10), (checkpoint.NAME, -100)])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    toy_options: Options, whole: Path, tmp_path: Path, name: str, more: int
) -> None:
    """RLIMIT_FSIZE stands for it: from step 7 on no file may grow beyond the size that one has by then."""
    out, log = tmp_path / "out", tmp_path / "log"

    def fill_the_disk() -> None:
        original = stepper.training_loss

        def loss(*arguments: Any) -> torch.Tensor:
            if len(read_lines(out)) == 7:
                limit = (out / name).stat().st_size + more
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return original(*arguments)

        stepper.training_loss = loss

    code, said = finish(toy_options(output_dir=out, **JOB), log, fill_the_disk)
    assert code == 2
    assert f"{name} cannot be written (the disk is full" in said
    assert "Traceback" not in said
    checkpoint.verify(out / checkpoint.NAME)
    assert checkpoint.step_of(out / checkpoint.NAME) == 5
    assert len(read_lines(out)) == (7 if name == "journal" else 10)
    assert resume(out) == 0  # room was made
    assert differences(out, whole, journal=True) == []


# --- two runs, stops, clocks ---


def test_two_runs_on_one_directory(toy_options: Options, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with output_directory(copied, resume=True):
        assert resume(copied) == 2
        assert f"is being written by process {os.getpid()} on" in capsys.readouterr().err
        assert run_main(toy_options(output_dir=copied, **JOB)) == 2
        assert "is being written by" in capsys.readouterr().err
    assert not (copied / LOCK_NAME).exists()


PHASES = {  # where a signal comes -> whether a checkpoint is there by then
    "zo_opt.training.setup.Tools.record_prompts": False,
    "zo_opt.training.loop.evaluate": False,
    "zo_opt.training.loop._Run._write_record": False,
    "zo_opt.training.loop.report.write": True,
}


@pytest.mark.parametrize("where", PHASES)
def test_sigterm_outside_training(
    toy_options: Options, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, raised_by(signal.SIGTERM))
        assert run_main(toy_options(output_dir=out, **JOB)) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if PHASES[where]:
        assert "--resume" in error
        assert resume(out) == 0
    else:
        assert "before the first step" in error
        assert not out.exists()
        return
    assert differences(out, whole, journal=True) == []


def test_sigterm_while_saving(toy_options: Options, whole: Path, tmp_path: Path) -> None:
    """The file is written to its end, the step is not lost."""
    out, original, calls = tmp_path / "out", checkpoint.sealed, []

    def sealed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "sealed", sealed)
        assert run_main(toy_options(output_dir=out, **JOB)) == 143
    done = checkpoint.step_of(out / checkpoint.NAME)
    assert done == len(read_lines(out)) == 6  # asked to stop while step 5 was saved, it stops after the next
    assert resume(out) == 0
    assert differences(out, whole, journal=False) == []


def test_a_run_killed_before_its_first_step_begins_anew(
    toy_options: Options, copied: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its journal has no step yet; one that has is never thrown away."""
    for name in (checkpoint.NAME, checkpoint.PREVIOUS_NAME, "metrics.jsonl"):
        (copied / name).unlink()
    assert run_main(toy_options(output_dir=copied, **JOB)) == 2
    assert "is not empty" in capsys.readouterr().err
    journal = copied / "journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    assert resume(copied) == 0
    assert "begins anew" in capsys.readouterr().out
    assert differences(copied, whole, journal=True) == []


def test_directories_made_up_in_the_same_second(tmp_path: Path) -> None:
    wanted, made = tmp_path / "runs" / "sst2", []
    for _ in range(3):
        with output_directory(wanted, unique=True) as directory:
            (directory / "file").touch()
            made.append(directory.name)
    assert made == ["sst2", "sst2-2", "sst2-3"]
    with pytest.raises(ZOError, match="stop"), output_directory(wanted, unique=True):
        raise ZOError("stop")
    assert not (tmp_path / "runs" / "sst2-4").exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """A directory with a run.json of something else is no run that never began."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "thesis.txt").write_text("all of it")
    (tmp_path / "run.json").write_text('{"versions": {"python": "3.11"}}')
    with pytest.raises(ZOError, match="not empty"), output_directory(tmp_path):
        pass
    assert (tmp_path / "start" / "thesis.txt").read_text() == "all of it"


def test_a_stated_number_of_failed_steps_ends_the_run(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, out = stepper.training_loss, tmp_path / "out"

    def loss(*arguments: Any) -> torch.Tensor:
        return original(*arguments) * (torch.nan if len(read_lines(out)) >= 4 else 1)

    monkeypatch.setattr(stepper, "training_loss", loss)
    assert run_main(toy_options(output_dir=out, **JOB | {"save_steps": 4, "max_failed_steps": 3})) == 1
    assert "3 steps in a row" in capsys.readouterr().err
    assert len(read_lines(out)) == 6
    checkpoint.verify(out / checkpoint.NAME)
    assert checkpoint.step_of(out / checkpoint.NAME) == 4
    monkeypatch.undo()
    assert resume(out) == 0  # what was wrong is mended
    assert [line.values["dropped"] > 0 for line in read_lines(out)] == [s in (4, 5) for s in range(12)]
