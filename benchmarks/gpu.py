"""Every speed and memory figure that hangs on a CUDA device, in one file of results.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --scripts wall --seconds 1500 --out benchmarks/results/gpu.json    # parts that are not run again stay
    python benchmarks/gpu.py --device cpu --quick                                               # does it run? figures mean nothing

Runs the other scripts one after another, each in a process of its own. A part that fails or does not end in the time left is recorded as such,
with what it had measured until then; the others still run. ``tensor_train`` needs ``pip install ".[benchmark]"``.

The file: ``machine`` (device, driver and memory, versions), ``quick`` (true: a dry run), and for each part

    command   what was run
    seconds   how long it took
    failed    why it has no figures, or not all; absent where all went well
    figures   the script's own file

| part | script | what its figures are |
|---|---|---|
| graphs | graphs.py | a forward and a step, eager and replayed as a CUDA graph; ``captured``, ``loss difference`` |
| tensor_train | tensor_train.py | seconds of tensor-train layers and of what others do, ratios, ``bars`` |
| steps | query_modes.py | a one-query step over two forwards; batched, split and auto over sequential; memory of a step over a forward's |
| whole_model | whole_model.py | noise on whole models: perturbing, restoring, updating, over MeZO's loop and the bandwidth floor |
| prompt_states | prompt_cache.py | a step with hidden states kept on the device, in CPU memory, on disk, over one without; losses compared |
| prompt_states_batched | prompt_cache.py | the same with several perturbed copies in a forward |
| compiled | compiled.py | eager steps, compiled ones, seconds to compile |
| wall | memory_wall.py | ``cells``: the largest batch of each method within a bound, what the next one dies with; seconds of a step |

Seconds are medians in seconds, memory is in bytes, ratios are without unit and named "a / b".
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine

SECONDS = 540
WALL = [
    "--methods",
    "a forward pass alone;lora;lora, gradient checkpointing;mezo-lora;adazeta-feedback, answer positions",
]


@dataclass(frozen=True)
class Part:
    """A script, its options, and those of a dry run."""

    script: str
    options: tuple[str, ...]
    quick: tuple[str, ...]


PARTS: dict[str, Part] = {  # the shortest first
    "graphs": Part("graphs.py", (), ("--quick",)),
    "tensor_train": Part("tensor_train.py", ("--quick",), ("--quick",)),
    "steps": Part("query_modes.py", ("--rounds", "5"), ("--rounds", "1", "--quick", "--parts", "one,split,memory")),
    "whole_model": Part("whole_model.py", ("--rounds", "5"), ("--rounds", "1", "--quick")),
    "prompt_states": Part("prompt_cache.py", (), ("--steps", "1", "--batch_size", "2")),
    "prompt_states_batched": Part(
        "prompt_cache.py", ("--query_mode", "batched"), ("--steps", "1", "--batch_size", "2", "--query_mode", "batched")
    ),
    "compiled": Part(
        "compiled.py",
        ("--rounds", "3"),
        ("--rounds", "1", "--batches", "1", "--batch_size", "2", "--precision", "fp32"),
    ),
    "wall": Part(
        "memory_wall.py",
        ("run", "--parts", "batch,time", "--precisions", "bf16", "--most", "4096", *WALL),
        ("run", "--parts", "batch", "--precisions", "bf16", "--most", "1", "--methods", "mezo-lora"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scripts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for all parts together")
    parser.add_argument("--quick", action="store_true", help="the least of every part: does it run?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --quick tries the script itself.")
    kept = arguments.out is not None and arguments.out.exists()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if kept else {}
    origin = machine(arguments.device, "transformers", "tensorly", "numpy") | driver()
    results |= {"machine": origin, "quick": arguments.quick}
    deadline = time.monotonic() + arguments.seconds
    for name in arguments.scripts:
        results[name] = run(PARTS[name], arguments.device, arguments.quick, deadline - time.monotonic())
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    failed = [f"{name} ({results[name]['failed']})" for name in arguments.scripts if "failed" in results[name]]
    print(
        f"\n{len(arguments.scripts) - len(failed)} of {len(arguments.scripts)} parts ran{'; failed: ' * bool(failed)}{', '.join(failed)}"
    )
    sys.exit(bool(failed))


def run(part: Part, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """One part's figures, and how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "results.json")
        options = [*(part.quick if quick else part.options), "--device", device, "--out", str(out)]
        shown = shlex.join(["python", f"benchmarks/{part.script}", *options[:-2]])
        print(f"\n== {shown}", flush=True)
        try:
            script = str(Path(__file__).with_name(part.script))
            subprocess.run([sys.executable, script, *options], check=True, timeout=max(1.0, seconds))
            outcome: dict[str, Any] = {}
        except subprocess.TimeoutExpired:
            outcome = {"failed": f"not done after {seconds:.0f} seconds"}
        except subprocess.CalledProcessError as error:
            outcome = {"failed": f"exit status {error.returncode}"}
        figures = json.loads(out.read_text()) if out.exists() else {}
    return {"command": shown, "seconds": round(time.monotonic() - start, 1)} | outcome | {"figures": figures}


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
