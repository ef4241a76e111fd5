"""``zo-opt replay``: a run's adapter from its base model and its journal, and what can be wrong with that."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_main
from killed_runs import start
from safetensors.torch import load_file, save_file
from test_wrong_input import assert_one_sentence, evil_code, tree

from zo_opt.journal import read_journal
from zo_opt.record.metrics import MetricsWriter

Options = Callable[..., list[str]]
STEPS = 12
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
KINDS: dict[str, dict[str, Any]] = {
    "adam": {"update_rule": "adam", "lr_schedule": "linear", "clip": 1.0, "query_mode": "split", "queries": 4},
    "mezo": {"optimizer": "mezo", "update_rule": "sgd", "directions": "gaussian"},
    "head": {"head": "classification", "verbalizers": None, "weight_decay": 0.1},
    "mixed": {"precision": "mixed"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Callable[[str], Path]:
    """Kind of run -> directory of a finished one."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind) / "out"
            assert run_main(toy_options(output_dir=done[kind], steps=STEPS, save_steps=5, **KINDS[kind])) == 0
        return done[kind]

    return run


@pytest.fixture
def copied(finished: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished("adam"), tmp_path / "run"))


def same_adapter(one: Path, other: Path) -> None:
    for name in ADAPTER:
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_rebuilt_to_the_bit(finished: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    run = finished(kind)
    before = tree(run)
    assert (run / "start" / ADAPTER[1]).read_bytes() != (run / ADAPTER[1]).read_bytes()
    assert run_main(["replay", str(run), "--to", str(tmp_path / "to")]) == 0
    assert {p.name for p in (tmp_path / "to").iterdir()} == set(ADAPTER)
    same_adapter(tmp_path / "to", run)
    assert tree(run) == before


def test_by_the_journals_own_name(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("adam")
    assert run_main(["replay", str(run / "journal"), "--to", str(tmp_path / "deep" / "to"), "--device", "cpu"]) == 0
    same_adapter(tmp_path / "deep" / "to", run)
    assert f"step 12 of 12, rebuilt on cpu, is in {tmp_path / 'deep' / 'to'}" in capsys.readouterr().out


def test_training_rows_are_not_needed(
    toy_options: Options, sentiment_files: Any, tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = Path(shutil.copy(sentiment_files.train, tmp_path / "rows.jsonl"))
    assert run_main(toy_options(output_dir=tmp_path / "out", train_file=rows, steps=2)) == 0
    rows.unlink()
    assert run_main(["replay", str(tmp_path / "out"), "--to", str(tmp_path / "to")]) == 0
    same_adapter(tmp_path / "to", tmp_path / "out")


def test_the_adapter_after_fewer_steps(toy_options: Options, finished: Callable[[str], Path], tmp_path: Path) -> None:
    """Is that of a shorter run (whose lr does not depend on its length)."""
    assert run_main(toy_options(output_dir=tmp_path / "short", steps=7, **KINDS["mezo"])) == 0
    assert run_main(["replay", str(finished("mezo")), "--to", str(tmp_path / "to"), "--steps", "7"]) == 0
    same_adapter(tmp_path / "to", tmp_path / "short")
    assert run_main(["replay", str(finished("mezo")), "--to", str(tmp_path / "zero"), "--steps", "0"]) == 0
    same_adapter(tmp_path / "zero", finished("mezo") / "start")


@pytest.mark.parametrize("step", [0, 4, 8])
def test_a_resumed_runs_journal_is_that_of_a_whole_run(
    toy_options: Options,
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    broken, original = tmp_path / "broken", MetricsWriter.write

    def write(self: MetricsWriter, record: Any, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == step:
            raise SystemError("killed")

    monkeypatch.setattr(MetricsWriter, "write", write)
    with pytest.raises(SystemError):
        run_main(toy_options(output_dir=broken, steps=STEPS, save_steps=5, **KINDS["adam"]))
    monkeypatch.undo()
    assert read_journal(broken / "journal").steps == step + 1
    assert run_main(["replay", str(broken), "--to", str(tmp_path / "half")]) == 0  # an unfinished run as well
    with (broken / "journal").open("ab") as file:
        file.write(b"[5,[0.1")  # torn
    assert run_main(["train", "--output_dir", str(broken), "--resume", "--save_steps", "5"]) == 0
    assert (broken / "journal").read_bytes() == (finished("adam") / "journal").read_bytes()
    assert run_main(["replay", str(broken), "--to", str(tmp_path / "to")]) == 0
    same_adapter(tmp_path / "to", finished("adam"))


def test_a_run_without_a_journal_still_resumes(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MetricsWriter, "write", lambda *_: (_ for _ in ()).throw(SystemError))
    with pytest.raises(SystemError):
        run_main(toy_options(output_dir=tmp_path / "out", steps=3, save_steps=1))
    monkeypatch.undo()
    (tmp_path / "out" / "journal").unlink()
    assert run_main(["train", "--output_dir", str(tmp_path / "out"), "--resume"]) == 0
    assert "goes on without a journal" in capsys.readouterr().out


@pytest.mark.slow
def test_kill_9(toy_options: Options, tmp_path: Path) -> None:
    """What a killed run has on record can be replayed, and is what an uninterrupted run has."""
    broken, options = tmp_path / "broken", KINDS["mezo"] | {"steps": 400, "save_steps": 50}
    process = start(toy_options(output_dir=broken, **options), tmp_path / "log")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (broken / "journal").exists() and (broken / "journal").stat().st_size > 4000:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    steps = read_journal(broken / "journal").steps
    assert steps > 20
    assert run_main(["replay", str(broken), "--to", str(tmp_path / "to")]) == 0
    assert run_main(toy_options(output_dir=tmp_path / "whole", **options | {"steps": steps})) == 0
    same_adapter(tmp_path / "to", tmp_path / "whole")


# --- what can be wrong ---


def another_base(run: Path) -> None:
    """The run's model with one weight changed."""
    record = json.loads((run / "run.json").read_text())
    other = Path(shutil.copytree(record["config"]["model_name_or_path"], run.parent / "other-model"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] *= 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    record["config"]["model_name_or_path"] = str(other)
    (run / "run.json").write_text(json.dumps(record))


def another_start(run: Path) -> None:
    for name in ADAPTER:
        shutil.copy(run / name, run / "start" / name)


def flip(run: Path) -> None:
    content = bytearray((run / "journal").read_bytes())
    content[-200] ^= 4
    (run / "journal").write_bytes(content)


def drop(line: int) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        lines = (run / "journal").read_bytes().splitlines(keepends=True)
        rest = lines[line + 1 :] if line >= 0 else []
        (run / "journal").write_bytes(b"".join(lines[:line] + rest))

    return change


def nothing(run: Path) -> None:
    del run


Case = tuple[Callable[[Path], Any], list[str], str]
CASES: dict[str, Case] = {
    "another base model": (another_base, [], "another base model"),
    "another start": (another_start, [], "not those that training began with"),
    "a flipped bit": (flip, [], r"is damaged in line \d+ \(step \d+\)"),
    "a gap": (drop(4), [], r"is damaged in line 5 \(step 3\)"),
    "the end lost": (drop(-4), [], "ends after 10 of the run's 12 steps.*--steps 10"),
    "no journal": (lambda run: (run / "journal").unlink(), [], "journal cannot be read"),
    "an empty journal": (lambda run: (run / "journal").write_bytes(b""), [], "is no journal"),
    "no run.json": (lambda run: (run / "run.json").unlink(), [], r"run\.json"),
    "run.json damaged": (lambda run: (run / "run.json").write_text("{"), [], r"run\.json.*damaged"),
    "no start": (lambda run: shutil.rmtree(run / "start"), [], r"start holds no adapter_config\.json"),
    "the model is gone": (
        lambda run: (run / "run.json").write_text(
            (run / "run.json").read_text().replace("tiny-llama", "tiny-no-llama")
        ),
        [],
        "tiny-no-llama.*does not exist",
    ),
    "more steps than there are": (nothing, ["--steps", "13"], "steps=13"),
    "a negative number of steps": (nothing, ["--steps", "-1"], "steps=-1"),
    "steps in words": (nothing, ["--steps", "all"], "steps"),
    "an unknown device": (nothing, ["--device", "abacus"], "abacus"),
    "an unknown option": (nothing, ["--bogus"], "bogus"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, more, what = CASES[name]
    change(copied)
    before = tree(tmp_path)
    capsys.readouterr()
    assert run_main(["replay", str(copied), "--to", str(tmp_path / "to"), *more]) == 2
    assert_one_sentence(capsys.readouterr().err, what)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("line", "what"), [
    (["{run}"], "--to"),
    (["--to", "{free}"], "journal"),
    (["{free}", "--to", "{free}"], "cannot be read"),
    (["{run}", "--to", "{run}"], "--to .* is not empty"),
    (["{run}", "--to", "{run}/run.json"], r"--to .*run\.json cannot be written"),
    (["{run}", "--to", "{run}/run.json/below"], "cannot be written"),
])  # fmt: skip
def test_wrong_paths(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], what: str
) -> None:
    before = tree(tmp_path)
    capsys.readouterr()
    assert run_main(["replay", *(part.format(run=copied, free=tmp_path / "free") for part in line)]) == 2
    assert_one_sentence(capsys.readouterr().err, what)
    assert tree(tmp_path) == before


def test_weights_that_come_out_otherwise_are_taken_if_asked(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a device that rounds otherwise; here the seals were written by weights that nobody had."""
    from zo_opt.journal.format import make_line

    previous, lines = "", []
    for line in (copied / "journal").read_bytes().splitlines():
        content = json.loads(line[:-13])
        if "weights" in content:
            content["weights"] = "0" * 32
        previous, again = make_line(content, previous)
        lines.append(again)
    (copied / "journal").write_bytes(b"".join(lines))
    line = ["replay", str(copied), "--to", str(tmp_path / "to")]
    capsys.readouterr()
    assert run_main(line) == 2
    assert_one_sentence(capsys.readouterr().err, "after step 4 the weights are not those of training")
    assert not (tmp_path / "to").exists()
    assert run_main([*line, "--inexact"]) == 0
    same_adapter(tmp_path / "to", copied)


@pytest.mark.parametrize("command", ["eval", "replay"])
def test_a_run_cannot_allow_itself_to_run_code(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    record = json.loads((copied / "run.json").read_text())
    model = Path(shutil.copytree(record["config"]["model_name_or_path"], tmp_path / "evil"))
    evil_code(model)
    record["config"] |= {"model_name_or_path": str(model), "trust_remote_code": True}
    (copied / "run.json").write_text(json.dumps(record))
    assert run_main([command, str(copied), *(["--to", str(tmp_path / "to")] if command == "replay" else [])]) == 2
    assert_one_sentence(capsys.readouterr().err, "--trust_remote_code")
    assert not (model / "executed").exists()
