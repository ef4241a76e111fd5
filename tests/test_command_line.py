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
from zo_opt.cli.commands import COMMANDS
from zo_opt.training import TrainConfig
from zo_opt.training.help import part_names
from zo_opt.training.options import PARTS
from zo_opt.training.parsing import read_options_file
from zo_opt.training.parts import TABLES

Options = Callable[..., list[str]]


def test_it_is_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "zo_opt", "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes: 0 done; 1 it was tried and failed" in " ".join(done.stdout.split())


def test_help_of_every_command_is_quick_and_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """No help imports torch, whose import alone takes longer than help may; none shows Python's types."""
    monkeypatch.setenv("COLUMNS", "80")
    script = (
        "import sys; from zo_opt.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit(str([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    assert done.stdout.count("Exit codes: 0 done;") == len(COMMANDS)
    assert not [
        word for word in ("<class", "Literal[", "Optional[", ":func:", "``", "[choice]", "null") if word in done.stdout
    ]
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("part", PARTS)
def test_the_names_in_help_are_those_of_the_table(part: str) -> None:
    assert part_names(part) == list(TABLES[part])


def test_results_for_programs(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_main(toy_options(steps=2, output_dir=out, json=True)) == 0
    found = capsys.readouterr()
    assert json.loads(found.out) == {"output_dir": str(out)} | results(out)
    assert "zero-shot evaluation: " in found.err
    assert run_main(["eval", str(out), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["row_scores"] == results(out)["after"]["row_scores"]
    [line] = (out / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["command"] == f"zo-opt eval {out} --json"
    assert json.loads(found.out).items() <= json.loads(line).items()
    assert "tuned: accuracy" in found.err
    assert run_main(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(out)]["state"] == "finished"


def test_results_of_commands_without_a_run(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(["schedule", "--query_schedule", "constant", "--steps", "5", "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["schedules"] == {"constant": {"queries": 5, "forwards": 10}}
    assert "picture: schedule.png" in found.err
    assert (
        run_main(["plan", "--model_name_or_path", str(tiny_model_dir), "--methods", "lora", "--length", "16", "--json"])
        == 0
    )
    found = capsys.readouterr()
    [row] = json.loads(found.out)["methods"]
    assert row["method"] == "lora" and row["process"] > row["weights"] > 0
    assert "a step of 16 x 16 tokens" in found.err
    assert (
        run_main(
            ["plan", "--model_name_or_path", str(tiny_model_dir), "--methods", "lora", "--length", "16", "--quiet"]
        )
        == 0
    )
    assert capsys.readouterr() == ("", "")


def test_what_a_run_becomes_for_programs(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged, rebuilt = (tmp_path / name for name in ("run", "merged", "rebuilt"))
    assert run_main(toy_options(adapter="lora", steps=2, output_dir=run, quiet=True)) == 0
    assert run_main(["merge", str(run), "--to", str(merged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "to": str(merged), "as": "model"}
    assert run_main(["replay", str(run), "--to", str(rebuilt), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["of"], found["to"]) == (2, 2, str(rebuilt))
    assert run_main(["generate", str(run), "--prompt", "a film", "--max_new_tokens", "2", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"row", "text"}


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
