"""Every code block of the README runs: Python as it stands, command lines on a tiny model and toy rows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_runs import ForkedRun

from zo_opt.cli.main import main
from zo_opt.comparison import runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("optimizers.md", "adapters.md")}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip()
]


def test_all_blocks_are_of_a_language_that_is_run_here() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # the Trainer's own, without a GPU
def test_python_blocks(tiny_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in BLOCKS:
        if language == "python":
            source = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_dir("llama")))
            exec(compile(source.replace("layers=8", "layers=2"), "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_other_pages(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("zo-opt")])
def test_make_and_pip_commands_are_what_ci_runs(command: str) -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    if command.startswith("make"):
        assert command in ci
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        assert command == "pip install ." and "-m pip install" in ci


def test_command_lines(
    tiny_dir: Callable[[str], Path], sentiment_files: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented options as they stand, on toy files; built-in model and rows are replaced."""
    monkeypatch.chdir(tmp_path)
    toy = tmp_path / "my.jsonl"
    rows = sentiment_files.train.read_text()  # type: ignore[attr-defined]
    toy.write_text(rows.replace('"label": 0', '"label": "no"').replace('"label": 1', '"label": "yes"'))
    monkeypatch.setattr(runs.subprocess, "Popen", ForkedRun)
    model = ["--model_name_or_path", str(tiny_dir("llama"))]
    own = {
        "train": ["--train_file", str(toy), "--steps", "2", *model],
        "plan": ["--length", "32", *model],
        "compare": ["--train_file", str(toy), "--budget_forwards", "6", *model],
    }
    own["diagnose"] = [*own["train"], "--queries", "4", "--eps_grid", "[0.01]"]
    for command in (c for c in COMMANDS if c.startswith("zo-opt")):
        arguments = shlex.split(command)[1:]
        if arguments[0] in own:
            arguments = [a for a in arguments if a not in {"./my-model", "--model_name_or_path"}] + own[arguments[0]]
        assert main(arguments) == 0, command
