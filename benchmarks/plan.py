"""zo-opt plan against measured peaks: one process a method and model, real tensors, weights drawn at random from the same config.

python benchmarks/plan.py --out benchmarks/results/plan.json

Measured: the allocator's own record of one step after the first (its events, and the bytes that were there before it); and the resident
memory of the process above that of the interpreter with everything imported, which counts what allocators keep as well.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from measure import machine, peak_bytes

from zo_opt.optim import Backpropagation
from zo_opt.planning.plan import Footprint, plan_method
from zo_opt.planning.plan_step import Setting, make_step
from zo_opt.planning.skeleton import make_skeleton, read_config
from zo_opt.system.memory import current_memory, peak_memory, reset_peak_memory
from zo_opt.training.methods import get_method

METHODS = (
    "full",
    "bitfit",
    "lora",
    "dora",
    "adalora",
    "lora-fa",
    "vera",
    "lamda",
    "adapter",
    "loretta",
    "mezo",
    "mezo-lora",
    "adazeta",
)
MODELS = {
    "smollm2-135m": lambda: read_config("smollm2-135m-instruct"),
    "bert-base": lambda: transformers.BertConfig(architectures=["BertForMaskedLM"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--cell", nargs=2, help="model and method: measured in this process")
    arguments = parser.parse_args()
    setting = Setting(batch_size=8, length=64, precision=arguments.precision, device=arguments.device)
    if arguments.cell:
        print(json.dumps(measured(*arguments.cell, setting)))
        return
    cells = []
    for model in arguments.models.split(","):
        skeleton = make_skeleton(MODELS[model](), setting.head, model)
        for method in arguments.methods.split(","):
            start = time.process_time()
            found = plan_method(skeleton, get_method(method), setting)
            seconds = time.process_time() - start
            line = [
                sys.executable,
                __file__,
                "--device",
                setting.device,
                "--precision",
                setting.precision,
                "--cell",
                model,
                method,
            ]
            cell = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            cells.append(compared(model, method, found, cell) | {"plan_seconds": round(seconds, 1)})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in cells[-1].items()}, flush=True)
    ratios = [cell["ratio"] for cell in cells]
    print(
        f"predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}, median {median(ratios):.3f}; the bar is 0.85 to 1.15"
    )
    if arguments.out is not None:
        origin = machine(arguments.device, "transformers") | {"batch": "8 x 64", "precision": arguments.precision}
        arguments.out.write_text(json.dumps({"machine": origin, "cells": cells}, indent=2) + "\n")


def compared(model: str, method: str, found: Footprint, cell: dict[str, int]) -> dict[str, Any]:
    """One row of the result."""
    ratios = {
        "ratio": found.peak / cell["allocated"],
        "above_weights_ratio": (found.peak - found.weights) / max(1, cell["allocated"] - cell["weights"]),
    }
    if cell.get("resident"):
        ratios["resident_ratio"] = found.peak / cell["resident"]
    return {"model": model, "method": method, "predicted": found.peak, **cell, **ratios}


def measured(model: str, method: str, setting: Setting) -> dict[str, int]:
    """Bytes of one step after the first, with real tensors."""
    torch.set_num_threads(1)
    device = torch.device(setting.device)
    on_cpu = device.type == "cpu"
    warm = make_step(build(model, layers=4, vocab_size=100), get_method(method), setting, device)
    warm()  # libraries are loaded
    del warm
    trim()
    baseline = current_memory(device) if on_cpu else 0
    step = make_step(build(model), get_method(method), setting, device)
    step()
    padded(step.batch)
    held = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in [*step.model.parameters(), *step.model.buffers()]
    }
    weights = sum(held.values())
    if not on_cpu:
        before = torch.cuda.memory_allocated()
        return {"allocated": before + peak_bytes(step, "cuda"), "weights": weights}
    states = step.optimizer.adamw.state if isinstance(step.optimizer, Backpropagation) else step.optimizer.state
    state = sum(t.nbytes for values in states.values() for t in values.values() if isinstance(t, torch.Tensor))
    trim()
    reset_peak_memory(device)
    step()
    resident = peak_memory(device) - baseline
    return {"allocated": weights + state + peak_bytes(step), "weights": weights, "resident": resident}


def padded(batch: dict[str, torch.Tensor]) -> None:
    """Rows of different lengths, as batches are: attention needs its mask."""
    mask = batch["attention_mask"]
    mask[0].view(-1)[0] = 0


def build(model: str, layers: int | None = None, vocab_size: int | None = None) -> Any:
    """With weights at random; ``layers``, ``vocab_size``: a smaller one."""
    config = MODELS[model]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.vocab_size = vocab_size or config.vocab_size
    kind = type(make_skeleton(config, "lm", model))
    torch.manual_seed(0)
    return kind(config).eval()


def trim() -> None:
    """What is free goes back to the system, so that resident memory is what is in use."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
