"""What every adapter method's configuration shares, and the table of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from zo_opt.adapters.targets import Target
from zo_opt.errors import ZOError


@dataclass
class AdapterConfig(ABC):
    """Where adapters go. A method adds its own fields and says how a target module is wrapped."""

    adapter_type: ClassVar[str]

    target_modules: Sequence[str] | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "names (path endings) of the modules to adapt; None: the method's default for the architecture"
        },
    )
    layers: int | Sequence[int] | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "an integer: the last so many layers; a list: these layers; None: all"},
    )
    modules_to_save: Sequence[str] | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "modules trained and saved whole, such as a new classification head"},
    )

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, [value])
                continue
            if value is not None and not _all(value, str):
                raise ZOError(f"{name}={value!r} is not possible; give a list of names, or None.")
        if self.layers is not None and type(self.layers) is not int and not _all(self.layers, int):
            raise ZOError(f"layers={self.layers!r} is not possible; give a whole number, a list of them, or None.")

    @abstractmethod
    def default_targets(self, model_type: str) -> Sequence[str] | None:
        """Target names for an architecture, or None where there is no default."""

    @abstractmethod
    def wrap(self, target: Target, number: int) -> nn.Module:
        """The module that replaces the target; ``number`` counts targets, for seeding."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for adapter_config.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | {
            "adapter_type": self.adapter_type
        }


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(type(v) is kind for v in values)


ADAPTERS: dict[str, type[AdapterConfig]] = {}


def register(config: type[AdapterConfig]) -> type[AdapterConfig]:
    """Class decorator: enter a method into the table under its ``adapter_type``."""
    ADAPTERS[config.adapter_type] = config
    return config


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """The configuration that ``to_dict`` described."""
    values = dict(values)
    kind = values.pop("adapter_type", None)
    if kind not in ADAPTERS:
        raise ZOError(f"adapter_type {kind!r} is not known; this version knows {', '.join(sorted(ADAPTERS))}.")
    try:
        return ADAPTERS[kind](**values)
    except TypeError as error:
        raise ZOError(f"the adapter's configuration does not fit type {kind!r}: {error}.") from error
