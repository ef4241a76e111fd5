"""Small generation and language-modelling tasks on the tiny models, for the tests of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, run_main

from zo_opt import TTConfig, get_adapter_model
from zo_opt.adapters import AdapterModel
from zo_opt.optim import StepRecord
from zo_opt.record.metrics import MetricsWriter

CPU = torch.device("cpu")


def adapted(architecture: str, **options: Any) -> AdapterModel:
    """A tiny model whose adapters, in the last two layers, do something."""
    model = get_adapter_model(make_model(architecture), TTConfig(rank=2, bottleneck=8, layers=2, **options))
    generator = torch.Generator().manual_seed(0)
    for tensor in model.trainable_state().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.5)
    return model.eval()


def command(**options: Any) -> list[str]:
    """A quick run of ``zo-opt train``; True stands for a flag."""
    values = {"device": "cpu", "precision": "fp32", "batch_size": 4, "eval_batch_size": 4} | options
    return ["train", *(a for k, v in values.items() for a in ([f"--{k}"] if v is True else [f"--{k}", str(v)]))]


def results(directory: Path) -> dict[str, Any]:
    """results.json, in which every number must be finite."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads((directory / "results.json").read_text(), parse_constant=refuse)
    return found


def assert_resumes_to_the_same_bits(
    line: Callable[[Path], list[str]], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies after its third step and is resumed ends as one that does not, row by row."""
    assert run_main([*line(directory / "whole"), "--steps", "5", "--save_steps", "1"]) == 0
    original = MetricsWriter.write

    def die(self: MetricsWriter, record: StepRecord, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == 2:
            raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", die)
        with pytest.raises(SystemError):
            run_main([*line(directory / "cut"), "--steps", "5", "--save_steps", "1"])
    assert run_main(["train", "--output_dir", str(directory / "cut"), "--resume"]) == 0
    whole, cut = results(directory / "whole"), results(directory / "cut")
    assert (whole["before"], whole["after"]) == (cut["before"], cut["after"])
    weights = [(directory / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
