"""Ways to start the command line, what it prints for programs, presets and completion."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import run_main
from text_tasks import results

from zo_opt import presets
from zo_opt.training import TrainConfig
from zo_opt.training.parsing import read_options_file

Options = Callable[..., list[str]]


def test_it_is_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "zo_opt", "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes: 0 done; 1 training failed" in " ".join(done.stdout.split())


def test_results_for_programs(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_main(toy_options(steps=2, output_dir=out, json=True)) == 0
    found = capsys.readouterr()
    assert json.loads(found.out) == {"output_dir": str(out)} | results(out)
    assert "zero-shot evaluation: " in found.err
    assert run_main(["eval", str(out), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["row_scores"] == results(out)["after"]["row_scores"]
    assert "tuned: accuracy" in found.err
    assert run_main(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(out)]["state"] == "finished"


def test_a_quiet_run(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(toy_options(steps=2, output_dir=tmp_path / "out", quiet=True)) == 0
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "")
    assert run_main(toy_options(steps=2, output_dir=tmp_path / "out", quiet=True)) == 2  # which is not empty
    assert "is not empty" in capsys.readouterr().err
    assert run_main(["eval", str(tmp_path / "out"), "--quiet", "--json"]) == 0
    found = capsys.readouterr()
    assert "row_scores" in json.loads(found.out) and found.err == ""


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_possible(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = read_options_file(presets.file_of(name))
    TrainConfig.from_dict(values).check()
    assert run_main(["train", "--preset", name, "--steps", "7", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 7  # what is typed wins


def test_the_papers_preset_runs(toy_options: Options, tmp_path: Path) -> None:
    none = dict.fromkeys(("adapter", "query_mode", "query_schedule", "queries", "lr", "lr_schedule"))
    assert run_main([*toy_options(**none, steps=2, output_dir=tmp_path / "out"), "--preset", "paper-adazeta"]) == 0
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert (config["adapter"]["name"], config["zo_eps"], config["lr"]) == ("tt", 0.001, 0.0001)


@pytest.mark.parametrize(("line", "what"), [
    (["train", "--preset", "accurat"], "preset 'accurat' is not known; choose one of accurate, fast, paper-adazeta. Did you mean accurate?"),
    (["train", "--preset"], "preset '' is not known"),
    (["completion", "fish"], "bash or zsh"),
    (["train", "--learning_rate", "1"], "--learning_rate is not known. Did you mean --lr?"),
    (["train", "--num_train_epochs", "1"], "--num_train_epochs is not known. Did you mean --epochs?"),
    (["train", "--quantize", "int8"], "--quantize is not known. Did you mean --quantise?"),
    (["train", "--dataset_name", "a/b"], "--dataset_name is not known. Did you mean --dataset?"),
    (["train", "--evaluation_strategy", "steps"], "--evaluation_strategy is not known. Did you mean --eval_steps?"),
    (["train", "--early_stopping_patience", "3"], "--early_stopping_patience is not known. Did you mean --patience?"),
    (["generate", "run", "--max_tokens", "3"], "--max_tokens is not known."),
    (["predict", "run", "--files", "a"], "--files is not known. Did you mean --file?"),
])  # fmt: skip
def test_what_is_mistyped(line: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(line) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("predict", "--eval_steps", "--max_new_tokens", "bnb-nf4"))


def test_bash_takes_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = f"source {tmp_path}/script; COMP_WORDS=(zo-opt train --eval_s); COMP_CWORD=2; _shtab_zo_opt; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--eval_split", "--eval_steps"]
