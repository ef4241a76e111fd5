"""Other values for a module's attributes, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within this context a module's (or object's) attributes have these values; they come back whatever happens inside.

    For functions of other libraries that ask no hook, and for layers that give something else than they compute. All threads see the values.

    >>> import math
    >>> with replaced(math, pi=3):
    ...     print(math.pi)
    3
    >>> round(math.pi, 2)
    3.14
    """
    own = {name: vars(owner)[name] for name in values if name in vars(owner)}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in values:
            if name in own:
                setattr(owner, name, own[name])
            elif name in vars(owner):  # its class's shows again
                delattr(owner, name)
