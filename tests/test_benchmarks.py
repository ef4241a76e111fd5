"""The benchmarks that need a machine of their own run here, too: small, on the CPU."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tokenizer_for

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA and /proc are Linux's")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.parametrize("most_that_fits", [0, 1, 2, 7, 90, 1000])
def test_the_search_ends_at_the_largest_size(benchmark: Callable[[str], Any], most_that_fits: int) -> None:
    """Within one part in SLACK, whatever the smallest sizes' peaks look like; few sizes are tried."""
    bounded = benchmark("bounded")
    setting = bounded.Setting(bound=100 + 3 * most_that_fits, device="cpu", most=256, seconds=1)

    def fits(size: int) -> dict[str, Any]:
        assert 1 <= size <= setting.most
        peak = 100 + 3 * size + (size < 3) * 20 - 20 * (size < 3 and size > 1)
        return {"peak": peak} if size <= most_that_fits else {"dies": "MemoryError"}

    found = bounded.largest(fits, setting)
    right = min(most_that_fits, setting.most)
    assert right - max(1, right // bounded.SLACK) < found["size"] <= right
    assert ("dies" in found) == (most_that_fits < setting.most)
    assert len(found["tried"]) == len({t["size"] for t in found["tried"]}) <= 10


def test_the_bound_is_hard_and_the_childs_alone(benchmark: Callable[[str], Any]) -> None:
    bounded = benchmark("bounded")
    room = 200 << 20
    setting = bounded.Setting(bounded.held()["VmData"] + room, "cpu", 1, 60)

    def take(size: int) -> dict[str, Any]:
        bounded.limit(setting)
        torch.empty(size, dtype=torch.uint8)
        return {"peak": bounded.peak("cpu")}

    assert setting.bound - room < bounded.in_fork(lambda: take(room // 2), 60)["peak"] <= setting.bound
    assert "can't allocate memory" in bounded.in_fork(lambda: take(2 * room), 60)["dies"]  # untouched, and refused
    assert torch.empty(2 * room, dtype=torch.uint8).nbytes == 2 * room
    assert bounded.in_fork(lambda: __import__("time").sleep(30), 1) == {"dies": "not done after 1 s"}


def test_the_wall_on_a_small_model(
    benchmark: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of many narrow layers backpropagation keeps all: forward passes alone take several times the batch."""
    tokenizer = tokenizer_for("llama")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=40, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wall, out = benchmark("memory_wall"), tmp_path / "wall.json"
    bound = (wall.held()["VmData"] >> 10) + (64 << 10)
    methods = "lora;mezo-lora"

    def call(*line: str) -> None:
        monkeypatch.setattr(sys, "argv", ["memory_wall.py", *line])
        wall.main()

    call(
        *("run", "--parts", "batch", "--precisions", "bf16", "--methods", methods, "--most", "256"),
        *("--bound", f"{bound}KiB", "--model_name_or_path", str(tmp_path / "model"), "--out", str(out)),
    )
    found = {cell["method"]: cell for cell in json.loads(out.read_text())["cells"]}
    sizes = {name: cell["size"] for name, cell in found.items()}
    assert 0 < 3 * sizes["lora"] < sizes["mezo-lora"], found
    assert found["lora"]["dies"].startswith("RuntimeError: ")
    call("table", str(out))
    assert re.search(r"\| lora \| backpropagation \| bf16 .*(refused|RuntimeError)", capsys.readouterr().out)
    call("draw", str(out), "--out", str(tmp_path / "wall.png"))
    assert (tmp_path / "wall.png").stat().st_size > 10_000


def test_the_gpu_script_runs_on_the_cpu(tmp_path: Path) -> None:
    """One part in full; one that has no time left is recorded as such, and the file is as documented."""
    out, script = tmp_path / "gpu.json", ROOT / "benchmarks" / "gpu.py"
    line = [sys.executable, str(script), "--device", "cpu", "--quick", "--out", str(out)]
    subprocess.run([*line, "--scripts", "graphs"], check=True, capture_output=True)
    done = subprocess.run([*line, "--scripts", "steps", "--seconds", "0"], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "steps (not done after" in done.stdout
    results = json.loads(out.read_text())
    assert set(results) == {"machine", "quick", "graphs", "steps"} and results["quick"]
    assert set(results["graphs"]) == {"command", "seconds", "figures"}
    cell = results["graphs"]["figures"]["float32 1x64"]
    assert cell["captured"] is False and cell["loss difference"] == 0 and cell["eager step, s"] > 0
    documented = re.findall(r"^\| (\w+) \| \w+\.py", script.read_text(), re.M)
    assert documented == re.findall(r'^    "(\w+)": Part\(', script.read_text(), re.M)
