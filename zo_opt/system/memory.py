"""Memory in use: of the process on CPUs, of the device on GPUs."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from zo_opt.errors import ZOError

_STATUS = Path("/proc/self/status")  # Linux
PIECE = 3 << 20  # entries


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far, or since :func:`reset_peak_memory`: allocated on a CUDA device, resident for a CPU process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now. A CPU process can do so on Linux only; elsewhere its peak goes on from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        trim()
        with suppress(OSError):  # forbidden in some containers
            _STATUS.with_name("clear_refs").write_text("5")


class MappedFiles:
    """The files of weights that are mapped into this process's memory; on Linux alone, elsewhere there are none.

    What has been read of them counts as resident until the whole file is closed: a second copy of a model while it is being converted.
    """

    def __init__(self, *endings: str) -> None:
        endings = endings or (".safetensors", ".gguf")
        self._ranges: list[tuple[int, int]] = []
        if _STATUS.exists():
            for line in _STATUS.with_name("maps").read_text().splitlines():
                if line.endswith(endings) or "/blobs/" in line:  # as the Hugging Face cache names them
                    start, _, end = line.split(maxsplit=1)[0].partition("-")
                    self._ranges.append((int(start, 16), int(end, 16)))

    def let_go(self, tensor: torch.Tensor) -> None:
        """Give back the pages of a tensor that is a piece of such a file and was never written to; they are read anew if they are needed."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if not tensor.is_contiguous() or not any(low <= start and end <= high for low, high in self._ranges):
            return
        page = mmap.PAGESIZE
        self._give_back(-(-start // page) * page, end // page * page)

    def let_go_of_all(self) -> None:
        """Give back all their pages; for files that are mapped to be read alone."""
        for start, end in self._ranges:
            self._give_back(start, end)

    def _give_back(self, start: int, end: int) -> None:
        if end > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def trim() -> None:
    """Have the C library give freed memory back to the system: what many tensors left in pieces would stay resident."""
    with suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in views of some rows, a few MiB each: what is done with one at a time takes no second tensor's memory.

    >>> [len(piece) for piece in pieces(torch.zeros(3 << 20, 3))]
    [1048576, 1048576, 1048576]
    """
    if tensor.ndim == 0:
        yield tensor
        return
    yield from tensor.split(max(1, PIECE * len(tensor) // max(tensor.numel(), 1)))


def current_memory(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def total_memory(device: torch.device) -> int:
    """Bytes that there are, whoever uses them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def parse_bytes(text: str) -> int:
    """A size such as 24GB (powers of 1000) or 24GiB (powers of 1024) in bytes.

    Raises:
        ZOError: it is no positive size with a unit.

    >>> parse_bytes("24GB"), parse_bytes("1.5 MiB")
    (24000000000, 1572864)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE)
    size = 0
    if found is not None:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1))
    if size < 1:
        raise ZOError(f"memory={text!r} is not understood; give a size with its unit, such as 24GB or 22.5GiB.")
    return size


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
