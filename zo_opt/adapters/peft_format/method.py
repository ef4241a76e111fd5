"""What a PEFT method says of its files; the rest (saved modules, base weights, options, checks) is common to all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig
from zo_opt.errors import ZOError

PREFIX = "base_model.model."  # before paths of the model in PEFT's files


@dataclass
class Checkpoint:
    """A PEFT checkpoint as read.

    Attributes:
        values: ``adapter_config.json``.
        parts: path of an adapted module -> name of a tensor in it -> the tensor (float32), in the model's order.
        shared: tensors of no module (VeRA's factors).
        targets: the names by which to find the adapted modules.
    """

    values: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor]
    targets: list[str]

    def number(self, name: str, default: float) -> float:
        """A finite number of the configuration.

        Raises:
            ZOError: something else stands there.
        """
        return as_number(name, self.values.get(name, default))


class PeftMethod(ABC):
    """One ``peft_type``.

    Attributes:
        names: a tensor's name in a module, without ``.weight``.
        shared: names of tensors that belong to no module.
        options: options of the method beyond the common ones that may have any value, since they do not matter or ``read`` heeds them.
    """

    peft_type: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def write(
        self, config: AdapterConfig, adapted: Mapping[str, AdaptedModule]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by their names in PEFT's file, and the method's own values of ``adapter_config.json``.

        Raises:
            ZOError: an adapter has no such form.
        """

    @staticmethod
    def refusal(path: str, what: str = "a tensor train (modules_to_tensorize)") -> ZOError:
        """What to raise where PEFT has no form for an adapter."""
        return ZOError(
            f"the adapter at {path!r} is {what} and cannot be exported as LoRA or another of PEFT's adapters; merge it "
            "(merge_and_unload), or keep zo_opt's own format (save_pretrained)."
        )

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> tuple[AdapterConfig, dict[str, Tensor]]:
        """The configuration, and tensors by their names in ``AdapterModel.adapter_state``.

        Raises:
            ZOError: a tensor is missing, or an option has no counterpart here.
        """


def as_number(name: str, value: Any) -> float:
    """A finite number from a checkpoint's configuration.

    Raises:
        ZOError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ZOError(f"the checkpoint's {name} is {value!r}, not a number; copy it anew from where it was saved.")
    return value


def take(parts: Mapping[str, Tensor], name: str, path: str, axes: int) -> Tensor:
    """A tensor of a module.

    Raises:
        ZOError: it is not there, or has another number of axes.
    """
    if name not in parts:
        raise ZOError(f"the checkpoint has no {name} for {path!r}; it is incomplete, copy it anew.")
    if parts[name].ndim != axes:
        raise ZOError(
            f"{name} of {path!r} has shape {tuple(parts[name].shape)}; adapters of linear layers have {axes} axes."
        )
    return parts[name]
