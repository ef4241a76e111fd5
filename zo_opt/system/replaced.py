"""Other values for a module's attributes, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within this context a module's (or object's) attributes have these values; they come back whatever happens inside.

    For functions of other libraries that ask no hook. All threads see the values.

    >>> import math
    >>> with replaced(math, pi=3):
    ...     print(math.pi)
    3
    >>> round(math.pi, 2)
    3.14
    """
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
