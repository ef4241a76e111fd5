"""Readers of strangers' files against more than 10^5 changed files: only our own error comes out, in bounded time and memory.

    python benchmarks/fuzz.py --out benchmarks/results/fuzz.json

Each target of tests/fuzz_targets.py runs in a process of its own under a limit of address space, each input under a limit of time.
An input counts as a finding where anything else than ZOError comes out, where it takes longer than the limit, or where the process
dies; findings are printed with their inputs, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# Slow readers get fewer inputs; the sum is above 10^5.
INPUTS = {
    "adapter": 8000, "peft": 8000, "safetensors": 8000, "journal": 15_000, "raw_journal": 20_000, "run": 10_000, "checkpoint": 4000,
    "metrics": 20_000, "rows": 20_000, "tables": 100_000, "options": 1500, "lines": 10_000,
    "comparison": 6000,
}  # fmt: skip
SECONDS, ROOM = 10, 1 << 30  # for an input; of address space beyond what the process has at its start


class TooSlowError(BaseException):
    """Not to be caught by any reader."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the inputs")
    parser.add_argument("--targets", default=",".join(INPUTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import fuzz_targets  # noqa: F401 (once, for all forks)

    results = {}
    for name in options.targets.split(","):
        count = round(options.scale * INPUTS[name])
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=run, args=(name, count, options.seed, theirs))
        process.start()
        theirs.close()
        try:
            results[name] = ours.recv()
        except EOFError:
            results[name] = {"inputs": 0, "findings": [f"the process died with exit code {process.exitcode}"]}
        process.join()
        r = results[name]
        print(
            f"{name:12} {r['inputs']:7,} inputs  {len(r['findings'])} findings  { ({k: v for k, v in r.items() if k != 'findings'}) }",
            flush=True,
        )
        for finding in r["findings"]:
            print(finding)
    if options.out is not None:  # targets that were run before and not now are kept
        command = " ".join(["python", *sys.argv])
        kept = json.loads(options.out.read_text())["targets"] if options.out.exists() else {}
        results = kept | {name: {"command": command, "seed": options.seed} | r for name, r in results.items()}
    inputs = sum(r["inputs"] for r in results.values())
    found = sum(len(r["findings"]) for r in results.values())
    print(f"{inputs:,} inputs, {found} findings")
    if options.out is not None:
        summary = {"inputs": inputs, "findings": found, "targets": results}
        options.out.write_text(json.dumps(summary, indent=2) + "\n")
    return int(found > 0)


def run(name: str, count: int, seed: int, answer: Connection) -> None:
    """One target's inputs, in a process of its own."""
    from fuzz_targets import TARGETS, mutate

    warnings.simplefilter("error")
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    findings: dict[str, str] = {}
    accepted, slowest = 0, 0.0

    def too_slow(*_: Any) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        seeds = target.seeds(directory)
        target.run(seeds[0], directory)  # what is imported or allocated once
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        before, start = peak(), time.monotonic()
        for _ in range(count):
            content = mutate(rng, rng.choice(seeds))
            begun = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                accepted += target.run(content, directory)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                findings.setdefault(
                    f"{type(error).__name__} {where.filename}:{where.lineno}",
                    f"{''.join(traceback.format_exception(error)[-6:])}\n{content[:2000]!r}",
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - begun)
        seconds = time.monotonic() - start
    answer.send(
        {
            "inputs": count, "accepted": accepted, "slowest_s": round(slowest, 3), "seconds": round(seconds, 1),
            "grown_mb": round((peak() - before) / 1e6, 1), "findings": list(findings.values()),
        }
    )  # fmt: skip


def peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
