"""The one description of a zeroth-order optimizer: which choices decide how it estimates and moves, and where it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from zo_opt.choices import Range, Table, check_numbers, did_you_mean, python_number
from zo_opt.directions import DIRECTIONS, Directions, Gaussian, Rademacher
from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.estimators import ESTIMATORS, Estimator, TwoSided
from zo_opt.optim.line_search import LineSearch
from zo_opt.optim.step_control import STEP_CONTROLS, StepControl
from zo_opt.optim.update_rules import SGD, UPDATE_RULES, UpdateRule
from zo_opt.privacy.gaussian import GaussianPrivacy
from zo_opt.queries.modes import QUERY_MODES
from zo_opt.schedules import SCHEDULES, ConstantQueries, QueryMode, QuerySchedule

RATE = Range(least=0)  # of lr and weight decay
PARTS: Mapping[str, Table[Any]] = {
    "estimator": ESTIMATORS,
    "directions": DIRECTIONS,
    "query_schedule": SCHEDULES,
    "update_rule": UPDATE_RULES,
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What an optimizer does. :meth:`of` takes every part as the thing itself, by name, or as a name with options.

    Args:
        lr: learning rate, in parameter units per unit of gradient (SGD) or parameter units per step (Adam).
        zo_eps: perturbation scale, in parameter units.
        weight_decay: decoupled decay; applied to parameters of two axes or more, not to biases and norms.
        estimator: losses -> derivatives along directions (:data:`~zo_opt.estimators.ESTIMATORS`).
        directions: their distribution (:data:`~zo_opt.directions.DIRECTIONS`).
        query_schedule: (step, epoch, history) -> queries (:data:`~zo_opt.schedules.SCHEDULES`).
        update_rule: how the estimate moves the parameters (:data:`~zo_opt.optim.UPDATE_RULES`).
        step_control: applied in order to the projected gradients before the update (:data:`~zo_opt.optim.STEP_CONTROLS`).
        line_search: multipliers, or a :class:`~zo_opt.optim.LineSearch`: lengths of the step tried before it is taken; costs forwards.
        query_mode: how the queries are evaluated; batched, split and auto need ``module`` and a batch.

    Raises:
        ZOError: on a name or value that is not possible, or parts that do not go together.

    >>> Choices.of(lr=0.1, directions="rademacher", step_control="clip").step_control
    (ClipProjectedGrads(factor=3.0, decay=0.95),)
    """

    lr: float
    zo_eps: float = 1e-3
    weight_decay: float = 0.0
    estimator: Estimator = field(default_factory=TwoSided)
    directions: Directions = field(default_factory=Gaussian)
    query_schedule: QuerySchedule = field(default_factory=ConstantQueries)
    update_rule: UpdateRule = field(default_factory=SGD)
    step_control: tuple[StepControl, ...] = ()
    line_search: LineSearch | None = None
    query_mode: QueryMode = "sequential"

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "zo_eps"):
            object.__setattr__(self, name, python_number(getattr(self, name)))  # of numpy or torch: JSON keeps it
        check_numbers(RATE, lr=self.lr, weight_decay=self.weight_decay)
        check_numbers(Range(above=0), zo_eps=self.zo_eps)
        if self.query_mode not in QUERY_MODES:
            raise ZOError(f"query_mode={self.query_mode!r} is not known; choose one of {', '.join(QUERY_MODES)}.")
        modes = self.estimator.query_modes
        if modes is not None and self.query_mode not in modes:
            name = ESTIMATORS.name_of(self.estimator)
            raise ZOError(f"query_mode={self.query_mode!r} does not apply to estimator {name!r}; leave it {modes[0]}.")
        if self.estimator.gives_gradient:
            for name, given in (("step_control", self.step_control), ("line_search", self.line_search)):
                if given:
                    raise ZOError(
                        f"{name} acts on derivatives along directions of weights, which this estimator has not; leave it out."
                    )
            if not isinstance(self.directions, Gaussian | Rademacher):
                raise ZOError(
                    "queries on activations take directions 'rademacher' or 'gaussian', of independent entries; give one."
                )
        if self.line_search is not None and not self.update_rule.linear:
            raise ZOError(
                "a line search looks at losses along the step's own estimate; use it with the plain SGD update rule."
            )

    @classmethod
    def of(cls, **given: Any) -> Choices:
        """The choices from names, names with options (:meth:`plain`'s) or the things themselves.

        Raises:
            ZOError: as said above.
        """
        made = {name: PARTS[name].make(value) if name in PARTS else value for name, value in given.items()}
        if "step_control" in made:
            made["step_control"] = tuple(map(STEP_CONTROLS.make, _listed("step_control", made["step_control"])))
        if made.get("line_search") is not None and not isinstance(made["line_search"], LineSearch):
            made["line_search"] = LineSearch(tuple(_listed("line_search", made["line_search"])))
        return cls(**made)

    @property
    def lr_is_a_length(self) -> bool:
        """Whether lr is in parameter units a step, whatever the gradient's scale."""
        return self.update_rule.lr_is_a_length or any(control.lr_is_a_length for control in self.step_control)

    def plain(self) -> dict[str, Any]:
        """The choices as JSON keeps them, and as the constructor takes them."""
        return {
            **{name: getattr(self, name) for name in ("lr", "zo_eps", "weight_decay", "query_mode")},
            **{name: table.plain(getattr(self, name)) for name, table in PARTS.items()},
            "step_control": [STEP_CONTROLS.plain(control) for control in self.step_control],
            "line_search": list(self.line_search.multipliers) if self.line_search is not None else None,
        }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where an optimizer runs.

    Args:
        seed: all directions follow from it; the global random state is never touched.
        steps_per_epoch: optimizer steps in an epoch, for schedules that count epochs.
        module: the module that owns the parameters; dropout is off in it while losses are evaluated.
        distributed: what ranks share in query mode distributed, and how each evaluates its part; the queries, sequentially, by default.
        max_failed_steps: this many steps in a row without any finite loss raise :class:`~zo_opt.errors.NonFiniteLossError`.
        privacy: differential privacy of the examples; the closure then returns a loss for each example, and the losses that
            ``step`` and the records give are nan, for they are not private.

    Raises:
        ZOError: on impossible values.
    """

    seed: int = 0
    steps_per_epoch: int = 1
    module: nn.Module | None = None
    distributed: Distributed | None = None
    max_failed_steps: int = 10
    privacy: GaussianPrivacy | None = None

    def __post_init__(self) -> None:
        for name in ("seed", "steps_per_epoch", "max_failed_steps"):
            object.__setattr__(self, name, python_number(getattr(self, name)))
        check_numbers(Range(whole=True), seed=self.seed)
        if not -(2**63) <= self.seed < 2**64:
            raise ZOError(f"seed={self.seed} is not possible; give a whole number of at most 64 bits, such as 0.")
        check_numbers(
            Range(least=1, whole=True), steps_per_epoch=self.steps_per_epoch, max_failed_steps=self.max_failed_steps
        )
        for name, kind in (("module", nn.Module), ("privacy", GaussianPrivacy), ("distributed", Distributed)):
            if not isinstance(getattr(self, name), kind | None):
                raise ZOError(
                    f"{name}={getattr(self, name)!r} is not possible; give a {kind.__name__}, or leave it out."
                )


CHOICES = tuple(f.name for f in fields(Choices))
SETTING = tuple(f.name for f in fields(Setting))


@dataclass(frozen=True)
class Method:
    """What a name stands for.

    Attributes:
        name: as on the command line.
        presets: choices where none are given; step control that is given comes after the preset one.
        fixes: choices that are the method itself, and cannot be given.
        own: names of the options that it has besides.
    """

    name: str
    presets: Mapping[str, Any] = field(default_factory=dict)
    fixes: frozenset[str] = frozenset()
    own: tuple[str, ...] = ()

    def sort(self, options: Mapping[str, Any]) -> tuple[Choices, Setting]:
        """The options given to the method, over its presets, as the two halves of an optimizer.

        Raises:
            ZOError: an option that the method does not have, or a value that is not possible.
        """
        if fixed := [option for option in options if option in self.fixes]:
            raise ZOError(
                f"{self.name!r} takes no {fixed[0]}, which is its own or of no use to it; leave it out, or take mezo."
            )
        known = [option for option in (*CHOICES, *SETTING) if option not in self.fixes]
        if unknown := [option for option in options if option not in known]:
            everything = [*self.own, *known]
            raise ZOError(
                f"{self.name!r} has no option {unknown[0]!r}; it has {', '.join(everything)}."
                + did_you_mean(unknown[0], everything)
            )
        choices = dict(self.presets) | {k: v for k, v in options.items() if k in CHOICES}
        if "step_control" in self.presets and "step_control" in options:
            choices["step_control"] = (*self.presets["step_control"], *_listed("step_control", options["step_control"]))
        if "lr" not in choices:
            raise ZOError(f"{self.name!r} has no learning rate of its own; give lr.")
        return Choices.of(**choices), Setting(**{k: v for k, v in options.items() if k in SETTING})


def _listed(name: str, given: Any) -> list[Any]:
    if isinstance(given, str | Mapping | StepControl):
        return [given]
    if isinstance(given, Iterable):
        return list(given)
    raise ZOError(f"{name}={given!r} is not possible; give a tuple, () for none.")
