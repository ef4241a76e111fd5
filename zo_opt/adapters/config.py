"""What every adapter method's configuration shares, and the table of methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.targets import Target, find_targets, matches
from zo_opt.choices import Table
from zo_opt.errors import ZOError

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


MOST_SIZE = 1 << 24  # of a rank, bottleneck or number of steps: what an adapter's size follows from is bounded
MOST_NAMES = 10_000  # of modules or layers in a list: each is looked for in the whole model


@dataclass
class AdapterConfig(ABC):
    """Where adapters go. A method adds its own fields and says how a target module is wrapped.

    ``default_targets`` and ``wrap`` are all that most methods have to say. The others stand for methods whose adapters share
    tensors (``wrap_all``), train weights of the model itself (``in_place``), look at the pretrained weights before their sizes are
    known (``resolve``), add to the loss (``penalty``) or change as training goes on (``schedule``).
    """

    adapter_type: ClassVar[str]
    adapts_embeddings: ClassVar[bool] = False
    adapts_residual: ClassVar[bool] = False  # "residual" among the targets: the stream that enters a whole layer
    mergeable: ClassVar[bool] = True

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

    modules_to_tensorize: Sequence[str] | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "linear layers, such as a classification head's, whose weight is replaced by a tensor train"},
    )
    tensorize_rank: int = field(default=5, kw_only=True, metadata={"help": "inner ranks of modules_to_tensorize"})
    rank_pattern: dict[str, int] | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "path ending -> rank, for modules whose rank is another than rank"},
    )

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save", "modules_to_tensorize"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, [value])
                continue
            if value is not None and not _all(value, str):
                raise ZOError(f"{name}={value!r} is not possible; give a list of names, or None.")
        if self.layers is not None and type(self.layers) is not int and not _all(self.layers, int):
            raise ZOError(f"layers={self.layers!r} is not possible; give a whole number, a list of them, or None.")
        for name in ("target_modules", "modules_to_save", "modules_to_tensorize", "layers", "rank_pattern"):
            value = getattr(self, name)
            if isinstance(value, list | tuple | dict) and len(value) > MOST_NAMES:
                raise ZOError(f"{name} has {len(value):,} entries; give at most {MOST_NAMES:,}.")
        self.check_whole("tensorize_rank")
        pattern = self.rank_pattern
        if pattern is not None and not (
            isinstance(pattern, dict)
            and all(type(k) is str and type(v) is int and 1 <= v <= MOST_SIZE for k, v in pattern.items())
        ):
            raise ZOError(f"rank_pattern={pattern!r} is not possible; give names with whole numbers of at least 1.")

    def check_whole(self, *names: str) -> None:
        """Whether fields hold whole numbers of at least 1 (and at most MOST_SIZE).

        Raises:
            ZOError: with a sentence on the first that does not.
        """
        for name in names:
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ZOError(f"{name}={getattr(self, name)} is not possible; give a whole number of at least 1.")
            if getattr(self, name) > MOST_SIZE:
                raise ZOError(f"{name} is larger than {MOST_SIZE:,}, which no model needs; give less.")

    def check_seed(self) -> None:
        """Whether ``seed`` names a stream for every target.

        Raises:
            ZOError: it is no whole number from 0 to 2^40.
        """
        seed = getattr(self, "seed", 0)
        if type(seed) is not int or not 0 <= seed <= 1 << 40:
            raise ZOError(f"seed={seed!r} is not possible; give a whole number from 0 to 2^40.")

    def check_mergeable(self) -> None:
        """Whether some weight equals the adapted layer.

        Raises:
            ZOError: there is a nonlinearity in between.
        """
        if not self.mergeable:
            raise ZOError(
                f"adapters of type {self.adapter_type!r} are serial with a nonlinearity and cannot be merged into "
                "the weights; keep them attached (load_adapter_model), or call unload() to remove them."
            )

    def rank_of(self, name: str, default: int) -> int:
        """A module's rank: that of the longest ending of its path in ``rank_pattern``, else the default."""
        pattern = self.rank_pattern or {}
        endings = [key for key in pattern if matches(name, key)]
        return pattern[max(endings, key=len)] if endings else default

    def find_targets(self, model: nn.Module) -> list[Target]:
        """The modules to adapt, in the model's order.

        Raises:
            ZOError: nothing matches, or no default for this architecture.
        """
        names = self.target_modules
        if names is None:
            model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
            names = self.default_targets(model_type)
            if names is None:
                raise ZOError(
                    f"there are no default targets for model type {model_type or type(model).__name__!r}; give target_modules=[...]."
                )
        return find_targets(model, names, self.layers, embeddings=self.adapts_embeddings, residual=self.adapts_residual)

    def resolve(self, targets: Sequence[Target]) -> AdapterConfig:
        """This configuration with what depends on the pretrained weights filled in (ranks a layer); not called when loading."""
        return self

    def wrap_all(self, targets: Sequence[Target]) -> dict[str, AdaptedModule]:
        """Path -> the module that replaces the target there."""
        return {target.name: self.wrap(target, number) for number, target in enumerate(targets)}

    def in_place(self, model: nn.Module) -> list[str]:
        """Names of the model's own parameters that the method trains where they are (in float32)."""
        return []

    def penalty(self, model: AdapterModel) -> Tensor | None:
        """A scalar that is added to the loss in training, if any."""
        return None

    def schedule(self, model: AdapterModel) -> AdapterSchedule | None:
        """What changes as training goes on, if anything."""
        return None

    @abstractmethod
    def default_targets(self, model_type: str) -> Sequence[str] | None:
        """Target names for an architecture, or None where there is no default."""

    @abstractmethod
    def wrap(self, target: Target, number: int) -> AdaptedModule:
        """The module that replaces the target (which is left as it is); ``number`` counts targets, for seeding."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for adapter_config.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | {
            "adapter_type": self.adapter_type
        }


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(type(v) is kind for v in values)


def check_positive(name: str, value: Any) -> None:
    """Whether an option is a positive finite number.

    Raises:
        ZOError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ZOError(f"{name}={value!r} is not possible; give a positive number.")


ADAPTERS: Table[AdapterConfig] = Table("adapter", AdapterConfig)


def register(config: type[AdapterConfig]) -> type[AdapterConfig]:
    """Class decorator: enter a method into the table under its ``adapter_type``."""
    ADAPTERS.entries[config.adapter_type] = config
    return config


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """The configuration that ``to_dict`` described."""
    values = dict(values)
    kind = values.pop("adapter_type", None)
    try:
        return make_config(kind, values)
    except ZOError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # values of other types than the fields'
        raise ZOError(f"the adapter's configuration does not fit type {kind!r}: {error}.") from error


def make_config(adapter_type: Any, options: dict[str, Any]) -> AdapterConfig:
    """A method's configuration from options by name.

    Raises:
        ZOError: the method is not known, or has no such option; or a value is not possible.

    >>> make_config("tt", {"rank": 3}).rank
    3
    """
    if adapter_type not in ADAPTERS:
        raise ZOError(f"adapter_type {adapter_type!r} is not known; this version knows {', '.join(sorted(ADAPTERS))}.")
    known = [f.name for f in fields(ADAPTERS[adapter_type])]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ZOError(f"adapter {adapter_type!r} has no option {unknown[0]!r}; it has {', '.join(known)}.")
    made: AdapterConfig = ADAPTERS[adapter_type](**options)
    return made
