"""Timing and memory for the benchmarks: interleaved medians, peak bytes, what the machine can do."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def interleaved(
    actions: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    at_least: float = 0.0,
    at_most: float = math.inf,
) -> dict[str, float]:
    """Median seconds of each action; one warm-up round, then all of them in turn.

    Args:
        actions: what is measured, by name.
        rounds: measurements of each.
        at_least: seconds that a measurement lasts: a short action is repeated, and its mean is one measurement.
        at_most: seconds for one action in all: a long one has fewer rounds, three at least.

    A CUDA device in use is waited for before the clock is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    calls = dict.fromkeys(actions, 1)
    for name, action in actions.items():
        action()  # the first call of all pays for allocations
        calls[name] = max(1, math.ceil(at_least / _time(action, 1))) if at_least else 1
    for _ in range(rounds):
        for name, action in actions.items():
            spent = sum(seconds[name]) * calls[name]
            if len(seconds[name]) < 3 or spent < at_most:
                seconds[name].append(_time(action, calls[name]))
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def _time(action: Callable[[], Any], calls: int) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        action()
    synchronize()
    return (time.perf_counter() - start) / calls


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes allocated at once while it runs, beyond those that were."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        live += change
        top = max(top, live)
    return top


def show(title: str, figures: dict[str, float]) -> None:
    """A title and its figures, a line each."""
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:<40} {value:.4g}")


def machine(device: str, *packages: str) -> dict[str, Any]:
    """Where figures come from: processor, device, threads, versions."""
    names = {line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in packages},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def roofline(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and FLOPs a second of a square matrix product in each dtype."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 7)
    rates = {"bytes": 2 * source.nbytes / seconds["copy"]}
    side = 8192 if device == "cuda" else 1024
    for dtype in dtypes:
        square = torch.ones(side, side, dtype=dtype, device=device)
        seconds = interleaved({"product": lambda square=square: square @ square}, 7)
        rates[str(dtype)[6:]] = 2 * side**3 / seconds["product"]
    return rates


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run under the short names of these tables (``layers``, ``max_queries`` ...) as TrainConfig takes them.

    >>> nested({"layers": 2, "query_schedule": "constant", "max_queries": 8})
    {'adapter': {'name': 'tt', 'layers': 2}, 'schedule': {'name': 'constant', 'queries': 8}}
    """
    rest = dict(options)
    own = {name: rest.pop(name) for name in ("layers", "rank", "bottleneck", "target_modules") if name in rest}
    if own:
        rest["adapter"] = {"name": rest.get("adapter", "tt"), **own}
    schedule = rest.pop("query_schedule", None)
    counts = {name: rest.pop(name) for name in ("max_queries", "min_queries") if name in rest}
    if schedule == "constant":
        counts = {"queries": counts["max_queries"]}
    if schedule is not None or counts:
        rest["schedule"] = {"name": schedule or "adazeta", **counts}
    return rest
