"""zo-opt plan against real runs: the resident memory of whole `zo-opt train` processes on this machine's CPU, the built-in model.

python benchmarks/plan.py --out benchmarks/results/plan.json

A run of three steps a method, with rows of 64 tokens in batches of 8; its peak is what the run itself reports, loading and evaluation included.
Foretold is what `zo-opt plan` says of the same options, with adapters in the last quarter of the layers as `zo-opt train` puts them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import machine

from zo_opt.models.builtin import DEFAULT_MODEL
from zo_opt.planning import Setting, make_skeleton, plan_method, read_config
from zo_opt.system.memory import current_memory
from zo_opt.training.pairings import get_pairing
from zo_opt.training.recipe import last_quarter

# method -> the options of zo-opt train that make it
METHODS = {
    "full": ["--optimizer", "adamw", "--adapter", "full"],
    "lora": ["--optimizer", "adamw", "--adapter", "lora"],
    "loretta": ["--optimizer", "adamw", "--adapter", "tt"],
    "mezo": ["--optimizer", "mezo", "--adapter", "full", "--query_mode", "auto"],
    "mezo-lora": ["--optimizer", "mezo", "--adapter", "lora", "--query_mode", "auto"],
    "adazeta": ["--optimizer", "adazeta", "--adapter", "tt"],
}
TOKENS, ROWS = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--precision", default="fp32", help="fp32, mixed, or both with a comma between")
    arguments = parser.parse_args()
    skeleton = make_skeleton(read_config(DEFAULT_MODEL), "lm", DEFAULT_MODEL)
    base, cells = current_memory(torch.device("cpu")), []
    for precision in arguments.precision.split(","):
        for name in arguments.methods.split(","):
            setting = Setting(ROWS, TOKENS, precision, "cpu", layers=last_quarter(skeleton))
            found, run = plan_method(skeleton, get_pairing(name).config(), setting), measured(METHODS[name], precision)
            cell = {
                "method": name, "precision": precision, "base": base, "step": found.peak, "process": found.process(base),
                **run, "ratio": round(found.process(base) / run["peak_memory"], 3),
            }  # fmt: skip
            cells.append(cell)
            print({k: f"{v / 2**20:.0f} MiB" if isinstance(v, int) else v for k, v in cell.items()}, flush=True)
    ratios = [cell["ratio"] for cell in cells]
    print(f"foretold / measured, whole processes: {min(ratios):.2f} to {max(ratios):.2f}")
    if arguments.out is not None:
        origin = machine("cpu", "transformers") | {"batch": f"{ROWS} x {TOKENS}", "model": DEFAULT_MODEL}
        arguments.out.write_text(json.dumps({"machine": origin, "cells": cells}, indent=2) + "\n")


def measured(options: list[str], precision: str) -> dict[str, Any]:
    """Peak resident bytes of a run, and of its training steps alone."""
    with tempfile.TemporaryDirectory() as directory:
        rows, out = Path(directory) / "rows.jsonl", Path(directory) / "out"
        text = "a film that says little and says it well " * 10
        lines = [json.dumps({"text": text, "label": label}) for label in (0, 1) * ROWS]
        rows.write_text("\n".join(lines))
        line = [
            sys.executable, "-c", "import sys; from zo_opt.cli.main import main; sys.exit(main())", "train", "--task", "sst2",
            "--train_file", str(rows), "--eval_file", str(rows), "--max_length", str(TOKENS), "--batch_size", str(ROWS),
            "--eval_batch_size", str(ROWS), "--steps", "3", "--device", "cpu", "--precision", precision, "--prompt_cache", "off",
            "--output_dir", str(out), *options,
        ]  # fmt: skip
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        results = json.loads((out / "results.json").read_text())
    return {name: results[name] for name in ("peak_memory", "train_peak_memory")}


if __name__ == "__main__":
    main()
