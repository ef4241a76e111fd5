"""Good sets of options by name, each a readable file of options: ``zo-opt train --preset fast``."""

from __future__ import annotations

from pathlib import Path

from zo_opt.choices import did_you_mean
from zo_opt.errors import ZOError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def file_of(name: str) -> Path:
    """A preset's file.

    Raises:
        ZOError: there is none of that name.
    """
    if name not in names():
        raise ZOError(f"preset {name!r} is not known; choose one of {', '.join(names())}.{did_you_mean(name, names())}")
    return _FOLDER / f"{name}.yaml"
