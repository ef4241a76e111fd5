"""Peak resident memory of training against evaluation alone: separate processes, the same rows, the same batch size.

python benchmarks/memory.py --out benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from zo_opt.tasks.builtin import task_rows

COMMON = ["--batch_size", "16", "--eval_batch_size", "16", "--steps", "30"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model_name_or_path")
    arguments = parser.parse_args()
    model = ["--model_name_or_path", arguments.model_name_or_path] if arguments.model_name_or_path else []
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory, "rows.jsonl")  # the same for training and evaluation, so that the longest batch is too
        rows.write_text("".join(json.dumps(row) + "\n" for row in task_rows("sst2")))
        common = [*COMMON, *model, "--train_file", str(rows), "--eval_file", str(rows)]
        runs = {
            "training, prompt cache on": ["train", *common, "--output_dir", f"{directory}/cached"],
            "training, prompt cache off": [
                *("train", *common, "--prompt_cache_mb", "0", "--output_dir", f"{directory}/plain")
            ],
            "evaluation alone": ["eval", f"{directory}/cached", "--zero_shot"],
        }
        peaks = {name: peak_of(command) for name, command in runs.items()}
        cache = json.loads(Path(directory, "cached", "results.json").read_text())["cache_bytes"]
    alone = peaks["evaluation alone"]
    for name, peak in peaks.items():
        print(f"{name}: {peak / 2**20:.0f} MiB, {peak / alone:.3f} of evaluation alone")
    print(f"bound on the cache 1024 MiB, used {cache / 2**20:.0f} MiB")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"peak_bytes": peaks, "cache_bytes": cache}, indent=2) + "\n")


def peak_of(command: list[str]) -> int:
    """Peak resident bytes of one run of the command line."""
    child = subprocess.Popen([sys.executable, "-m", "zo_opt.cli.main", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"zo-opt {' '.join(command)} failed")
    return resource_bytes(usage)


def resource_bytes(usage: resource.struct_rusage) -> int:
    """ru_maxrss in bytes (kibibytes on Linux, bytes on macOS)."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
