"""Memory in use: of the process on CPUs, of the device on GPUs."""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


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
    live = _Live(lambda x: x if isinstance(x, FakeTensor) else fake.from_tensor(x))
    with torch.no_grad(), fake, live:
        call()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of storages made inside that are still referred to."""

    def __init__(self, fake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self.peak = 0
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        # Left alone, the mode would carry out an operation in place on real tensors.
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if all(r.alias_info is None for r in func._schema.returns):  # neither a view nor written in place
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


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
