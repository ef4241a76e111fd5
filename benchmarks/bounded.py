"""One size after another, each tried in a process of its own that may not take more memory than so much.

The bound is RLIMIT_DATA: the kernel refuses any further private writable memory of the process, the interpreter and the weights included, whether
touched or not; no privilege is needed. On CUDA it is the device's, by torch.cuda.set_per_process_memory_fraction. Linux alone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_opt.errors import reason_of

SLACK = 12  # the largest size is found to one part in so many


@dataclass(frozen=True)
class Setting:
    """What is common to all sizes of a cell."""

    bound: int
    device: str
    most: int  # rows
    seconds: int  # that one size may take


def in_fork(call: Callable[[], dict[str, Any]], seconds: int) -> dict[str, Any]:
    """What ``call`` returns in a fork of this process; or under ``dies`` what ended it."""
    read, write = os.pipe()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.close(read)
        signal.alarm(seconds)
        torch.set_num_threads(
            torch.get_num_threads()
        )  # a fork makes torch's pool anew; threads that do it at once fail
        try:
            found = call()
        except BaseException as error:
            found = {"dies": f"{type(error).__name__}: {reason_of(error)}"}
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    if text:
        os.waitpid(pid, 0)
        return dict(json.loads(text))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGALRM:
        return {"dies": f"not done after {seconds} s"}
    return {"dies": signal.Signals(-code).name if code < 0 else f"exit status {code}"}


def limit(setting: Setting) -> None:
    """From here on this process takes no more."""
    if setting.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting.bound / total)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (setting.bound, setting.bound))


def held() -> dict[str, int]:
    """Bytes of this process by the names of /proc/self/status, of which VmData is what RLIMIT_DATA bounds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Vm", "Rss"))}


def peak(device: str) -> int:
    """The most bytes so far of what is bounded."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    now = held()
    return now["VmPeak"] - now["VmSize"] + now["VmData"]  # what is no private writable memory stays as it is


def clock(device: str) -> float:
    """Seconds: of this process on the processor, which others on the machine do not change; on CUDA by the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def largest(fits: Callable[[int], dict[str, Any]], setting: Setting, slack: int = SLACK) -> dict[str, Any]:
    """The largest size that fits, by bisection, where the next one to try follows from the peaks of those that fitted.

    Returns:
        ``size`` (0: not even 1), what ``fits`` said of it, ``dies_at`` and ``dies`` of the smallest that did not (none: no larger one was
        tried), and all sizes ``tried``.
    """
    low, high, tried = 0, setting.most + 1, []
    best: dict[str, Any] = {}
    dead: dict[str, Any] = {}
    size = 1
    while high - low > max(1, low // slack):
        found = fits(size)
        tried.append({"size": size, **found})
        if "dies" in found:
            high, dead = size, {"dies_at": size, "dies": found["dies"]}
        else:
            low, best = size, found
        size = min(max(_aim([t for t in tried if "peak" in t], setting.bound), low + max(1, low // slack)), high - 1)
        if high <= setting.most and size > low + max(1, low // slack):
            size = min(size, (low + high + 1) // 2)
    return {"size": low, **best, **dead, "tried": tried}


def _aim(fitted: list[dict[str, Any]], bound: int) -> int:
    """Where the line through the first and the last peak reaches the bound; eight times the last size while it does not rise."""
    if not fitted or fitted[-1]["peak"] <= fitted[0]["peak"]:
        return 8 * fitted[-1]["size"] if fitted else 1
    a, b = fitted[0], fitted[-1]
    slope = (b["peak"] - a["peak"]) / (b["size"] - a["size"])
    return int(0.98 * (b["size"] + (bound - b["peak"]) / slope))
