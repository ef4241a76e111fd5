"""Every speed and memory bar on a CUDA device, in under eight minutes, in one file of results.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Runs the other scripts one after another, each in a process of its own, and puts their figures together with the device, its driver and
the versions. A script that fails or does not end in the time left is recorded as such; the others still run. Needs
``pip install ".[benchmark]"``. ``--device cpu`` tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine

SECONDS = 480
SCRIPTS: dict[str, list[str]] = {  # the shortest first
    "tensor_train": ["--quick"],
    "query_modes": ["--rounds", "5"],
    "whole_model": ["--rounds", "5"],
    "prompt_cache": [],
    "compiled": ["--rounds", "3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for all scripts together")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the script itself.")
    results: dict[str, Any] = {"machine": machine(arguments.device, "transformers", "tensorly", "numpy") | driver()}
    deadline = time.monotonic() + arguments.seconds
    for name in arguments.scripts:
        results[name] = run(name, arguments.device, deadline - time.monotonic())
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    failed = [name for name in arguments.scripts if "failed" in results[name]]
    print(
        f"\n{len(arguments.scripts) - len(failed)} of {len(arguments.scripts)} scripts ran"
        + f"; failed: {failed}" * bool(failed)
    )
    sys.exit(bool(failed))


def run(name: str, device: str, seconds: float) -> dict[str, Any]:
    """One script's results, and how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "results.json")
        script = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, str(script), "--device", device, *SCRIPTS[name], "--out", str(out)]
        print(f"\n== {name}", flush=True)
        try:
            subprocess.run(command, check=True, timeout=max(1.0, seconds))
            outcome: dict[str, Any] = {}
        except subprocess.TimeoutExpired:
            outcome = {"failed": f"not done after {seconds:.0f} seconds"}
        except subprocess.CalledProcessError as error:
            outcome = {"failed": f"exit status {error.returncode}"}
        figures = json.loads(out.read_text()) if out.exists() else {}
    return outcome | {"seconds": round(time.monotonic() - start, 1), "figures": figures}


def driver() -> dict[str, str]:
    """The driver's version and what torch was built for."""
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = "unknown"
    return {"driver, memory": said, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


if __name__ == "__main__":
    main()
