"""What every adapter method's configuration shares, and the table of methods."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.options import ANY, MOST_NAMES, SEED, check_options, option
from zo_opt.adapters.positions import on_answers
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.targets import WRITERS, Target, find_targets, matches
from zo_opt.choices import Table
from zo_opt.errors import ZOError

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel

__all__ = ["ADAPTERS", "MOST_NAMES", "AdapterConfig", "config_from_dict", "make_config"]


@dataclass(frozen=True)
class AdapterConfig:
    """Where adapters go. A method adds its own fields and says how a target module is wrapped.

    ``default_targets`` and ``wrap`` are all that most methods have to say. The others stand for methods whose adapters share
    tensors (``wrap_all``), train weights of the model itself (``in_place``), look at the pretrained weights before their sizes are
    known (``resolve``), add to the loss (``penalty``) or change as training goes on (``schedule``).

    Attributes:
        default_targets: architecture (``config.model_type``) -> names of the modules to adapt.
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = {}
    adapts_embeddings: ClassVar[bool] = False
    adapts_residual: ClassVar[bool] = False  # "residual" among the targets: the stream that enters a whole layer
    mergeable: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = False  # its start hangs on the first batch that the model runs on

    target_modules: Sequence[str] | None = option(
        None,
        "names (path endings) of the modules to adapt; None: the method's default for the architecture",
        kw_only=True,
    )
    layers: int | Sequence[int] | None = option(
        None, "an integer: the last so many layers; a list: these layers; None: all", ANY, kw_only=True
    )
    modules_to_save: Sequence[str] | None = option(
        None, "modules trained and saved whole, such as a new classification head", kw_only=True
    )
    modules_to_tensorize: Sequence[str] | None = option(
        None,
        "linear layers, such as a classification head's, whose weight is replaced by a tensor train",
        kw_only=True,
    )
    tensorize_rank: int = option(5, "inner ranks of modules_to_tensorize", kw_only=True)
    rank_pattern: Mapping[str, int] | None = option(
        None, "path ending -> rank, for modules whose rank is another than rank", kw_only=True
    )
    positions: Literal["all", "answer"] = option(
        "all",
        "answer: act from the last prompt token on, the prompt goes through the frozen base; all: at every token",
        kw_only=True,
    )
    answer_token: int | None = option(
        None,
        "with positions answer, encoders: the mask token's id; None: the answer is read at the first token",
        SEED,
        kw_only=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.positions == "answer" and type(self).in_place is not AdapterConfig.in_place:
            raise ZOError(
                f"adapter {self.adapter_type!r} trains the model's own weights, which act on every token; leave positions out."
            )

    @property
    def adapter_type(self) -> str:
        """The method's name in the table; of your own, ``module:Class``."""
        return ADAPTERS.name_of(self)

    def check_mergeable(self) -> None:
        """Whether some weight equals the adapted layer.

        Raises:
            ZOError: there is a nonlinearity in between, or the layer acts on some tokens alone.
        """
        self.check_everywhere()
        if not self.mergeable:
            raise ZOError(
                f"adapters of type {self.adapter_type!r} are serial with a nonlinearity and cannot be merged into "
                "the weights; keep them attached (load_adapter_model), or call unload() to remove them."
            )

    def check_everywhere(self) -> None:
        """Whether the adapters act on every token, as a weight does.

        Raises:
            ZOError: they act on answers.
        """
        if self.positions == "answer":
            raise ZOError(
                "these adapters act from the answer on, and a weight acts on every token: merged, they would change the prompt's states; "
                "keep them attached (load_adapter_model), or train with positions='all'."
            )

    def check_ranks(self, names: Sequence[str]) -> None:
        """Whether every key of ``rank_pattern`` means something; ``names`` are the adapted modules' paths.

        Raises:
            ZOError: a key that is the end of no path, or a method without a rank.
        """
        if not self.rank_pattern:
            return
        if not self.modules_to_tensorize and "rank" not in {f.name for f in fields(self)}:
            raise ZOError(f"adapters of type {self.adapter_type!r} have no rank; leave rank_pattern out.")
        for key in self.rank_pattern:
            if not any(matches(name, key) for name in names):
                raise ZOError(
                    f"rank_pattern names {key!r}, which is no adapted module; adapted are {', '.join(names[:4])} ..."
                )

    def rank_of(self, name: str, default: int | None = None) -> int:
        """A module's rank: that of the longest ending of its path in ``rank_pattern``, else the default (``rank`` if None)."""
        rank: int = of_longest_ending(name, self.rank_pattern, getattr(self, "rank", 0) if default is None else default)
        return rank

    def seed_of(self, number: int) -> int:
        """The seed of the target of this number: a stream of its own for each."""
        seed: int = getattr(self, "seed", 0)
        return seed * 100_003 + number

    def find_targets(self, model: nn.Module) -> list[Target]:
        """The modules to adapt, in the model's order.

        Raises:
            ZOError: nothing matches, or no default for this architecture.
        """
        names = self.target_modules
        if names is None:
            model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
            names = self.default_targets.get(model_type)
            if self.positions == "answer" and type(self).wrap is not AdapterConfig.wrap:
                names = WRITERS.get(model_type, names)
            if names is None:
                raise ZOError(
                    f"there are no default targets for model type {model_type or type(model).__name__!r}; give target_modules=[...]."
                )
        found = find_targets(
            model, names, self.layers, embeddings=self.adapts_embeddings, residual=self.adapts_residual
        )
        if self.positions == "all":
            return found
        return on_answers(model, found)

    def resolve(self, targets: Sequence[Target]) -> AdapterConfig:
        """This configuration with what depends on the pretrained weights filled in (ranks a layer); not called when loading."""
        return self

    def wrap_all(self, targets: Sequence[Target]) -> dict[str, AdaptedModule]:
        """Path -> the module that replaces the target there."""
        return {target.name: self.wrap(target, number) for number, target in enumerate(targets)}

    def wrap(self, target: Target, number: int) -> AdaptedModule:
        """The module that replaces the target (which is left as it is); ``number`` counts targets, for seeding."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a target is wrapped")

    def in_place(self, model: nn.Module) -> list[str]:
        """Names of the model's own parameters that the method trains where they are (in float32)."""
        return []

    def penalty(self, model: AdapterModel) -> Tensor | None:
        """A scalar that is added to the loss in training, if any."""
        return None

    def schedule(self, model: AdapterModel) -> AdapterSchedule | None:
        """What changes as training goes on, if anything."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for adapter_config.json."""
        values = ADAPTERS.plain(self)
        return values | {"adapter_type": values.pop("name")}


# Filled in zo_opt/adapters/__init__.py, a line a method.
ADAPTERS: Table[AdapterConfig] = Table("adapter", AdapterConfig)


def of_longest_ending(name: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """The value of the longest key that a module's path ends in, else the default."""
    endings = [key for key in pattern or {} if matches(name, key)]
    return pattern[max(endings, key=len)] if pattern and endings else default


def make_config(adapter_type: Any, options: Mapping[str, Any]) -> AdapterConfig:
    """A method's configuration from options by name; the method's name may be your own ``module:Class``.

    Raises:
        ZOError: the method is not known, or has no such option; or a value is not possible.

    >>> make_config("tt", {"rank": 3}).rank
    3
    """
    if not isinstance(adapter_type, str):
        raise ZOError(f"adapter={adapter_type!r} is not known; choose one of {', '.join(ADAPTERS)}.")
    config = ADAPTERS.make({**options, "name": adapter_type})
    if not isinstance(config, AdapterConfig):
        raise ZOError(f"adapter={adapter_type!r} is no AdapterConfig; name a class derived from it.")
    return config


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """The configuration that ``to_dict`` described, as a file holds it.

    Raises:
        ZOError: it does not fit any method; or it is of a class of your own that is not imported, for a file's word runs no code.
    """
    options = dict(values)
    kind = options.pop("adapter_type", None)
    module, colon, _ = str(kind).partition(":")
    if colon and module not in sys.modules:
        raise ZOError(f"the adapter is of a class of your own, {kind!r}; import {module} before loading it.")
    return make_config(kind, options)
