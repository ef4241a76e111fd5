"""Memory in use: of the process on CPUs, of the device on GPUs."""

from __future__ import annotations

import ctypes
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from zo_opt.errors import ZOError

_STATUS = Path("/proc/self/status")  # Linux


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far, or since :func:`reset_peak_memory`: allocated on a CUDA device, resident for a CPU process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows: psutil knows its peak
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now. A CPU process can do so on Linux only; elsewhere its peak goes on from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        with suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)  # what was freed while loading goes back to the system
        with suppress(OSError):  # forbidden in some containers
            _STATUS.with_name("clear_refs").write_text("5")


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


def predicted_peak(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call will hold at once beyond those that exist now, found without computing anything.

    The call runs on fake tensors, of which shapes and lifetimes are all there is. Scratch memory inside an operation is not seen.

    Raises:
        RuntimeError: the call looks at values, which fake tensors do not have.

    >>> x = torch.zeros(1000)
    >>> predicted_peak(lambda: (x + 1) * 2)
    8000
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)

    class Live(LiveBytes):
        def call(self, func: Any, args: Any, kwargs: Any) -> Any:
            # Left alone, the mode would carry out an operation in place on real tensors.
            args, kwargs = tree_map_only(Tensor, as_fake, (args, kwargs))
            return func(*args, **kwargs)

    def as_fake(x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else fake.from_tensor(x)

    live = Live()
    with torch.no_grad(), fake, live:
        call()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages, made inside or handed to ``hold``, that are still referred to.

    Attributes:
        now: bytes that are there.
        peak: the most that were there at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._births: dict[int, int] = {}  # of storages alive, by number
        self._made = self._made_at_peak = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def forget_peak(self) -> None:
        """Look for the peak from now on."""
        self.peak, self._made_at_peak = self.now, self._made

    def there_at_peak(self, tensor: Tensor) -> bool:
        """Whether a tensor that is alive was so at the peak."""
        return self._births.get(tensor.untyped_storage()._cdata, self._made) < self._made_at_peak

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an operation."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = self.call(func, args, kwargs or {})
        if all(r.alias_info is None for r in func._schema.returns):  # neither a view nor written in place
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._births:
            return
        self._births[key] = self._made
        self._made += 1
        self.now += size
        if self.now > self.peak:
            self.peak, self._made_at_peak = self.now, self._made
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._births.pop(key, None)
        self.now -= size


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
