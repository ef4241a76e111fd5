"""The scripts of examples/ run, and continue to the same bits."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, line: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [script, *map(str, line)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    AcceleratorState._reset_state(True)  # of the next script's own choice


def test_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--output_dir", tmp_path, "--use_cpu", "True", "--disable_tqdm", "True", "--dataloader_pin_memory", "False"]
    run("zo_trainer.py", [*line, "--max_steps", 10], monkeypatch)
    before, after = map(float, re.findall(r"loss (\S+) -> (\S+) in 80 forward passes", capsys.readouterr().out)[0])
    assert after < before
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name, steps in (("whole", 8), ("parts", 4)):
        run("accelerate_loop.py", ["--steps", steps, "--output_dir", tmp_path / name], monkeypatch)
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", capsys.readouterr().out)]
    assert losses[7] < losses[0] and len(losses) == 12
    run("accelerate_loop.py", ["--steps", 8, "--output_dir", tmp_path / "parts", "--resume"], monkeypatch)
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)
