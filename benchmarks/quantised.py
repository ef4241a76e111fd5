"""Bases in few bits, compiled or from a GGUF file: bytes, seconds a step, accuracy before and after tuning; results/quantised.json.

    python benchmarks/quantised.py bases [--gguf model.gguf] [--only int4,int8]   # each base once, fewer rows than the default run
    python benchmarks/quantised.py weights [--only int4,int8]                     # of each base, its bytes alone
    python benchmarks/quantised.py default                                        # zo-opt train --quantise int4, three seeds

Needs ``pip install '.[quantised]'``. Every base is loaded and tuned in processes of their own; what was measured before and is not
measured again stays in the file. Seconds depend on what else the machine does: "load" is its load average at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quantised.json"
BASES = {
    "fp32": ["--precision", "fp32"],
    "mixed": ["--precision", "mixed"],
    "torchao int8": ["--precision", "mixed", "--quantise", "int8"],
    "torchao int4": ["--precision", "mixed", "--quantise", "int4"],
    "bitsandbytes int8": ["--precision", "mixed", "--quantise", "bnb-int8"],
    "bitsandbytes nf4": ["--precision", "mixed", "--quantise", "bnb-nf4"],
    "compiled": ["--precision", "mixed", "--compile", "--query_mode", "sequential", "--query_schedule", "constant"],
}
SHORT = [
    "--max_train_rows",
    "128",
    "--held_out",
    "128",
    "--steps",
    "20",
    "--batch_size",
    "8",
    "--schedule.max_queries",
    "8",
]


def tune(options: list[str]) -> dict[str, Any]:
    """``zo-opt train`` with these options: what its results.json says."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["train", *options, "--output_dir", f"{directory}/out"]
        load = os.getloadavg()[0]
        done = subprocess.run(
            [sys.executable, "-m", "zo_opt.cli.main", *command], check=False, capture_output=True, text=True
        )
        if done.returncode:
            return {"options": " ".join(options), "failed": (done.stderr or done.stdout).strip().splitlines()[-3:]}
        results = json.loads((Path(directory) / "out" / "results.json").read_text())
    return {
        "options": " ".join(Path(option).name if option.endswith(".gguf") else option for option in options),
        "before": results["before"]["accuracy"],
        "after": results["after"]["accuracy"],
        "loss_after": results["after"]["loss"],
        "rows": results["after"]["rows"],
        "step_seconds": results["train_seconds"] / results["steps"],
        "peak_memory": results["peak_memory"],
        "precision": results["precision"],
        "load": load,
    }


def weigh(options: list[str]) -> dict[str, int]:
    """Load a base in a process of its own: bytes of its weights, and of anonymous memory that loading took at most ("loading_peak"),
    that were still there after it ("loaded"), and after the C library gave back what was freed, as it is made to before training ("training").
    """
    done = subprocess.run([sys.executable, __file__, "weigh", *options], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _weigh(options: list[str]) -> dict[str, int]:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 (what loading imports is not its memory)

    from zo_opt.journal.provenance import frozen_state
    from zo_opt.models.quantisation import KINDS, quiet
    from zo_opt.record.progress import Reporter
    from zo_opt.system.checksum import plain_parts
    from zo_opt.system.memory import reset_peak_memory
    from zo_opt.tasks.builtin import get_task
    from zo_opt.training.config import TrainConfig
    from zo_opt.training.setup import load_base

    given = dict(zip(options[::2], options[1::2], strict=True))
    values = {
        name: given[f"--{name}"] for name in ("precision", "quantise", "model_name_or_path") if f"--{name}" in given
    }
    with quiet(stderr=True):
        if (package := KINDS.get(values.get("quantise", ""))) is not None:
            __import__("torchao.quantization" if package == "torchao" else package)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = load_base(TrainConfig(**values), get_task("sst2"), Reporter())
    done.set()
    watcher.join()
    found = {"loading_peak": peak[0] - before, "loaded": anonymous() - before}
    reset_peak_memory(torch.device("cpu"))
    found["training"] = anonymous() - before
    parts = [part for name, t in frozen_state(base.model, ()).items() for _, part in plain_parts(name, t)]
    return {"weights": sum(t.numel() * t.element_size() for t in parts)} | found


def anonymous() -> int:
    """Resident bytes of this process that are no file's."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def save(name: str, row: dict[str, Any]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found[name] = row
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(name, json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bases", "weights", "default"])
    parser.add_argument("--gguf", help="a GGUF file of the built-in model")
    parser.add_argument("--only", help="names of bases, with commas")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.what != "default":
        bases = BASES | (
            {"GGUF": ["--precision", "mixed", "--model_name_or_path", arguments.gguf]} if arguments.gguf else {}
        )
        for name in arguments.only.split(",") if arguments.only else bases:
            options = bases[name]
            known = json.loads(RESULTS.read_text()).get(name, {}) if RESULTS.is_file() else {}
            row = known if arguments.what == "weights" else tune([*options, *SHORT])
            pairs = options[: 4 if "--quantise" in options or "--model_name_or_path" in options else 2]
            save(name, row | weigh(pairs))
    else:
        with tempfile.TemporaryDirectory() as cache:  # the frozen layers are the same for every seed
            kept = ["--prompt_cache", "disk", "--prompt_cache_dir", cache]
            for seed in arguments.seeds.split(","):
                options = ["--quantise", "int4", "--precision", "mixed", "--seed", seed]
                row = tune([*options, *kept])
                save(f"default run, int4, seed {seed}", row | {"options": " ".join(options)})
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["weigh"]:
        print(json.dumps(_weigh(sys.argv[2:])))
    else:
        main()
