"""Everything ``zo-opt train`` can be told, with its defaults (the recipe of docs/methods/learning.md), and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zo_opt.adapters import ADAPTERS, AdapterConfig
from zo_opt.choices import Table, split
from zo_opt.directions import DIRECTIONS
from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.estimators import ESTIMATORS, Estimator, TwoSided
from zo_opt.models.quantisation import check_kind
from zo_opt.optim import OPTIMIZERS, STEP_CONTROLS, UPDATE_RULES, Method, UpdateRule, method_of
from zo_opt.privacy import check_delta, check_epsilon
from zo_opt.record.trackers import check_trackers
from zo_opt.schedules import SCHEDULES, QuerySchedule, RunLength, for_run
from zo_opt.schedules.base import two_sided_cost
from zo_opt.tasks import objectives
from zo_opt.training.heeded import check_heeded
from zo_opt.training.options import (
    BACKPROPAGATION,
    MOST_STEPS,
    PARTS,
    FirstOptions,
    LearningOptions,
    ModelOptions,
    RowOptions,
    RunOptions,
)
from zo_opt.training.parsing import typed
from zo_opt.training.parts import fixed_options, run_defaults


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FirstOptions, RowOptions, ModelOptions, LearningOptions, RunOptions):
    """Options of a training run: those of its groups (:mod:`~zo_opt.training.options`).

    >>> TrainConfig(adapter={"name": "lora", "rank": 4}, optimizer="mezo").make_adapter().rank
    4
    """

    def check(self) -> None:
        """Everything that can be wrong before anything is loaded.

        Raises:
            ZOError: with a sentence on the first mistake.
        """
        typed(self.to_dict())
        check_heeded(self)
        if self.quantise is not None:
            check_kind(self.quantise)
        adapter = self.make_adapter()
        if adapter.layers == ():
            raise ZOError("layers=[] leaves nothing to adapt; give a number, a list of layers, or nothing.")
        if self.quantise is not None and type(adapter).in_place is not AdapterConfig.in_place:
            raise ZOError(
                f"adapter {self.adapter_name!r} trains the model's own weights, which quantise={self.quantise!r} freezes; choose "
                "another adapter, or leave --quantise out."
            )
        objectives.check_name(self.objective)
        if self.values_alone and self.differentiates:
            raise ZOError(
                f"objective={self.objective!r} has no gradient, which optimizer={self.optimizer_name!r} needs; choose an optimizer that "
                "needs values alone, such as adazeta."
            )
        if self.compile and (self.mode != "sequential" or self.optimizer_name == "forward-gradient"):
            raise ZOError(
                "compiled layers cannot be run on many copies or differentiated; with --compile give --query_mode sequential and "
                "another optimizer than forward-gradient."
            )
        self.check_given_parts()
        if self.zo_eps is not None and self.differentiates:
            raise ZOError("zo_eps is of no use to exact derivatives; leave it out, or choose another estimator.")
        check_trackers(self.report_to)
        if self.share != "queries":
            self.make_distributed()
            if self.on_activations:
                raise ZOError(
                    f"share={self.share!r} averages losses over rows of several processes, and activations belong to rows; with queries on "
                    "activations give --share queries, or --estimator two-sided."
                )
            if self.objective == "f1":
                raise ZOError("the F1 of a batch is no mean over its rows; with objective='f1' give --share queries.")
        if self.zeroth_order:
            self.make_choices()
        self.check_privacy()

    def check_given_parts(self) -> None:
        """Whether each part that was given is one that the optimizer has.

        Raises:
            ZOError: it is what makes the optimizer.
        """
        for name in fixed_options(self.optimizer_name) & self.given().keys():
            raise ZOError(f"{name} is no option of optimizer {self.optimizer_name!r}; leave it out, or choose another.")

    def check_privacy(self) -> None:
        """Whether a run's options allow a guarantee.

        Raises:
            ZOError: with a sentence on the first that does not.
        """
        if not self.private:
            return
        if self.privacy_epsilon is not None and self.privacy_noise is not None:
            raise ZOError(
                "privacy_epsilon and privacy_noise were both given; the noise follows from epsilon, leave one out."
            )
        if self.privacy_epsilon is not None:
            check_epsilon(self.privacy_epsilon)
        check_delta(self.privacy_delta)
        if self.privacy_clip is None:
            raise ZOError(
                "privacy needs --privacy_clip, the bound on one row's projected gradient; choose it on other rows (docs/how-to/privacy.md)."
            )
        kind = OPTIMIZERS.find(self.optimizer_name)
        if (
            getattr(kind, "own_estimates", False)
            or type(self.method.presets.get("estimator", TwoSided())) is not TwoSided
            or not self.zeroth_order
        ):
            raise ZOError(
                f"optimizer={self.optimizer_name!r} uses the rows otherwise than by two-sided differences, which alone are made private; "
                "choose another, such as adazeta or mezo."
            )
        wrong = {
            "query_mode": self.mode != "sequential" and "privacy needs sequential",
            "schedule": self.schedule is not None
            and split("schedule", self.schedule)[0] == "variance"
            and "its queries depend on what was measured",
            "objective": self.values_alone and "privacy needs the loss of each row",
            "batch_order": self.batch_order != RowOptions.batch_order
            and "rows are sampled independently of each other",
            "adapter": self.make_adapter().reads_rows and "it starts from the rows as they are",
            "quantise": self.quantise == "bnb-int8" and "it rounds each row by what the other rows of its batch are",
        }
        for name, why in wrong.items():
            if why:
                raise ZOError(f"{name}={getattr(self, name)!r} cannot be used with privacy: {why}; leave it out.")

    # --- what the names stand for ---

    @property
    def rows_name(self) -> str | None:
        """What the user's own rows are called; None where they are the task's own."""
        return self.dataset if self.train_file is None else str(self.train_file)

    @property
    def adapter_name(self) -> str:
        """The adapter's name."""
        return split("adapter", self.adapter)[0]

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name."""
        return split("optimizer", self.optimizer)[0]

    @property
    def method(self) -> Method:
        """What the optimizer presets and fixes."""
        return method_of(self.optimizer_name)

    @property
    def keeps_best(self) -> bool:
        """Whether the run's weights are those that were best on the held-out rows."""
        return self.eval_steps is not None and self.keep != "last"

    @property
    def zeroth_order(self) -> bool:
        """Whether the run takes forward passes alone."""
        return self.optimizer_name != BACKPROPAGATION

    @property
    def differentiates(self) -> bool:
        """Whether the optimizer needs a loss that torch can differentiate."""
        estimator = (
            self.method.presets.get("estimator") if self.estimator is None else _made(ESTIMATORS, self.estimator)
        )
        return not self.zeroth_order or (isinstance(estimator, Estimator) and estimator.differentiates)

    @property
    def values_alone(self) -> bool:
        """Whether what is trained has no gradient anywhere."""
        return self.objective != objectives.LOSS

    @property
    def most_steps(self) -> int:
        """The run's steps; where its rows, not yet counted, are to say them, the most that it may take."""
        return MOST_STEPS if self.steps is None else self.steps

    @property
    def private(self) -> bool:
        """Whether training rows are to be hidden."""
        return self.privacy_epsilon is not None or self.privacy_noise is not None

    @property
    def on_activations(self) -> bool:
        """Whether queries shift inner activations: asked for; or adazeta with tt-lora, where nothing given is of weights."""
        if not self.zeroth_order:
            return False
        if self.estimator is not None:
            return bool(getattr(ESTIMATORS.find(split("estimator", self.estimator)[0]), "gives_gradient", False))
        return (self.optimizer_name, self.adapter_name) == ("adazeta", "tt-lora") and self.of_weights is None

    @property
    def of_weights(self) -> str | None:
        """The first option given that only queries on weights have."""
        own = split("adapter", self.adapter)[1]
        given = {
            "objective": self.objective == "f1",  # a number of the batch, and no row's own
            "adapter.positions": own.get("positions") == "all",
            "adapter.trainable": own.get("trainable") == "all",
            "query_mode": self.query_mode in ("batched", "split", "auto"),
            "share": self.share != "queries",
            "directions": self.directions is not None
            and split("directions", self.directions)[0] not in ("rademacher", "gaussian"),
            "step_control": self.step_control not in (None, "none"),
            "line_search": self.line_search is not None,
            "privacy_clip": self.private,
            "schedule": self.schedule is not None and split("schedule", self.schedule)[0] == "every-example",
        }
        return next((name for name, is_given in given.items() if is_given), None)

    @property
    def on_answers(self) -> bool:
        """Whether the adapter acts on answers unless it was told otherwise."""
        asked = split("adapter", self.adapter)[1].get("positions")
        return asked == "answer" or (asked is None and self.on_activations)

    @property
    def mode(self) -> str:
        """How one process evaluates: the query mode asked for; else split, where the optimizer has it."""
        if self.query_mode is not None:
            return "sequential" if self.query_mode == "distributed" else self.query_mode
        alone = self.private or self.share != "queries" or self.differentiates or self.on_activations
        # F1 of a few rows says little, and copies cannot write together.
        return "sequential" if alone or self.objective not in (objectives.LOSS, "accuracy") else "split"

    # --- the things themselves ---

    def make_adapter(self, **defaults: Any) -> AdapterConfig:
        """The adapter that the options describe; ``defaults`` stand for options that were not given.

        Raises:
            ZOError: the method is not known, has no such option; or a value is not possible.
        """
        return ADAPTERS.make(self.adapter, **defaults)

    def make_distributed(self) -> Distributed:
        """What several processes share, and how they are watched."""
        return Distributed(
            share=self.share, within=self.mode, timeout=self.rank_timeout, check_every=self.rank_check_every
        )

    def make_schedule(self, steps_per_epoch: int = 1) -> QuerySchedule | None:
        """The query schedule asked for; None stands for the optimizer's own."""
        choice = self.schedule
        if choice is None:
            if self.optimizer_name != "adazeta":
                return None
            choice = "constant" if self.private else "adazeta"  # more queries need more noise
        length = RunLength(self.most_steps, steps_per_epoch, *self.cost)
        return for_run(SCHEDULES.make(choice, **run_defaults("schedule", choice)), length)

    @property
    def cost(self) -> tuple[int, int]:
        """Forward passes of a query, and of a step besides."""
        return (1, 1) if self.on_activations else two_sided_cost(self.mode)

    def make_choices(self, steps_per_epoch: int = 1) -> dict[str, Any]:
        """What the optimizer is told beside lr and where it runs; what the options leave open is its own.

        Raises:
            ZOError: a part is not possible.
        """
        fixed, presets = self.method.fixes, self.method.presets
        directions = self.directions
        if directions is None and "directions" not in fixed and "directions" not in presets:
            directions = "rademacher"
        given: dict[str, Any] = {
            "estimator": _made(ESTIMATORS, self.estimator or ("learned-feedback" if self.on_activations else None)),
            "directions": _made(DIRECTIONS, directions),
            "query_schedule": self.make_schedule(steps_per_epoch),
            "update_rule": self.make_update_rule(),
            "step_control": self._step_control(),
            "line_search": self.line_search,
            "zo_eps": None if "zo_eps" in fixed else self.eps,
            "weight_decay": self.weight_decay,
        }
        given = {name: value for name, value in given.items() if value is not None and name not in fixed}
        self.method.sort(given | {"lr": self.lr or 0.0})  # whether they go together
        return given

    @property
    def eps(self) -> float:
        """The perturbation scale asked for; else the objective's."""
        if self.zo_eps is not None:
            return self.zo_eps
        if self.on_activations:  # shares of the body's output
            return 0.3 if self.values_alone else 3e-2
        return objectives.ZO_EPS if self.values_alone else 1e-2

    def make_update_rule(self) -> UpdateRule | None:
        """The update rule asked for (adam for adazeta); None stands for the optimizer's own."""
        choice = self.update_rule or ("adam" if self.optimizer_name == "adazeta" else None)
        return None if choice is None else UPDATE_RULES.make(choice, **run_defaults("update_rule", choice))

    def _step_control(self) -> list[Any]:
        if self.on_activations and self.step_control is None:
            return []
        given = self.step_control if self.step_control is not None else "clip"
        listed = given if isinstance(given, list) else [given]
        return [STEP_CONTROLS.make(control) for control in listed if control not in ("none", {"name": "none"})]

    # --- plain values ---

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults, as plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """What ``to_dict`` gave, or a command line's options.

        Raises:
            ZOError: an option that there is not, or a value of another type.
        """
        return cls(**typed(values))


def _made(table: Table[Any], choice: Any) -> Any:
    return None if choice is None else table.make(choice)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


assert set(PARTS) <= {f.name for f in fields(TrainConfig)}
