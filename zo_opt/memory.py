"""Memory in use: of the process on CPUs, of the device on GPUs."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, resident for a CPU process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def readable(size: float) -> str:
    """Bytes for people, in powers of 1024.

    >>> readable(3 * 2**30), readable(1536)
    ('3.0 GiB', '1.5 KiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
