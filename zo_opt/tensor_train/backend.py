"""tensorly with its numpy backend, for the calling thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def numpy_backend() -> Iterator[None]:
    """tensorly computes with numpy inside; afterwards the calling thread has its own backend again.

    ``tensorly.backend_context(..., local_threadsafe=True)`` is not enough: when it ends it makes the thread's former backend that
    of *all* threads (seen in 0.10.0). tensorly is imported here, so that importing zo_opt does not cost it.
    """
    import tensorly

    former = tensorly.get_backend()
    if former == "numpy":
        yield
        return
    tensorly.set_backend("numpy", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(former, local_threadsafe=True)
