"""An optimizer's parameters as one axis, in pieces with their groups, with the tensors and directions that go along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.choices import check_numbers
from zo_opt.directions import Directions, StepDirections
from zo_opt.errors import ZOError, reason_of
from zo_opt.optim.choices import RATE, Choices, Setting
from zo_opt.optim.counting import CountingOptimizer, check_finite
from zo_opt.optim.records import Update
from zo_opt.optim.slots import Slots
from zo_opt.optim.update_rules import UpdateRule
from zo_opt.queries.trainables import Piece, Trainables, check_parameters

Directed = Mapping[int, StepDirections]  # step -> its directions
_OF_GROUPS = ("params", "param_names", "name", "lr", "initial_lr", "weight_decay")  # torch's, and what steps look at


class AxisOptimizer(CountingOptimizer):
    """What a zeroth-order optimizer knows of its trainables; found anew when which of them require grad changes (LISA)."""

    choices: Choices
    setting: Setting
    own_directions: ClassVar[bool] = False  # they hang on what a forward showed: no journal can have them drawn again
    slot_values: ClassVar[Mapping[str, float]] = {}  # tensors of the parameters' shapes that it keeps, and their start

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        try:
            super().__init__(params, defaults)
        except (TypeError, ValueError, LookupError) as error:
            if isinstance(error, ZOError):
                raise
            raise ZOError(
                f"these params are not possible ({reason_of(error)}); give trainable_parameters(model), or groups of them."
            ) from error

    def start_axis(self) -> None:
        """Before the first step."""
        self._checked = False
        self._trainables: Trainables | None = None
        self.forget_axis()

    def forget_axis(self) -> None:
        """What follows from the trainables, the seed or the state is found anew."""
        self._slots: Slots | None = None
        self._pieces: list[tuple[Piece, int, bool]] | None = None
        self._directions: StepDirections | None = None
        self._variances: Tensor | None = None

    def trainables(self) -> Trainables:
        """Unique parameters that require grad, in the order in which directions number them.

        Raises:
            ZOError: there is none, or one holds NaN or infinity before training.
        """
        parameters = list({id(p): p for g in self.param_groups for p in g["params"] if p.requires_grad}.values())
        if self._trainables is None or not self._trainables.is_current(parameters):
            if not parameters:
                raise ZOError("no parameter requires grad; give the optimizer trainable_parameters(model).")
            check_parameters(parameters)
            self._check_shapes(parameters)
            trainables = Trainables(parameters)
            if not self._checked:
                check_finite(piece.values for piece in trainables.pieces())
                self._checked = True
            self._trainables = trainables
            self.forget_axis()
        return self._trainables

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's.

        Raises:
            ZOError: the group has an option that is not looked at.
        """
        if unheeded := [name for name in param_group if name not in _OF_GROUPS]:
            raise ZOError(
                f"a parameter group has {unheeded[0]!r}, which no step looks at; groups may differ in lr and weight_decay."
            )
        super().add_param_group(param_group)

    def check_groups(self) -> None:
        """Whether each group can be moved; a scheduler may have changed it.

        Raises:
            ZOError: a learning rate or weight decay is no finite number, or negative.
        """
        for group in self.param_groups:
            check_numbers(RATE, lr=group["lr"], weight_decay=group["weight_decay"])

    def _check_shapes(self, parameters: Sequence[Tensor]) -> None:
        """Whether trainables found anew have the shapes in which they were moved: directions and state are of those."""
        before = (
            {} if self._trainables is None else dict(zip(self._trainables.index, self._trainables.shapes, strict=True))
        )
        for p in parameters:
            if self.step_count and before.get(id(p), tuple(p.shape)) != tuple(p.shape):
                raise ZOError(
                    f"a trainable of shape {before[id(p)]} has shape {tuple(p.shape)} after {self.step_count} steps; make a new optimizer for it."
                )

    def slots(self) -> Slots:
        """The method's and the update rule's tensors of the parameters' shapes."""
        if self._slots is None:
            rule = self.choices.update_rule
            values = dict.fromkeys(rule.state_names, 0.0) | dict(self.slot_values)
            self._slots = Slots(self.trainables(), self.state, values)
        return self._slots

    def distribution(self, step: int) -> Directions:
        """What a step's directions are drawn from; a method whose own it is names ``directions`` among what it fixes."""
        return self.choices.directions

    def directions_of(self, step: int) -> StepDirections:
        """The directions of a step over the trainables."""
        if self._directions is None:
            self._directions = StepDirections(
                self.distribution(step), self.setting.seed, step, self.trainables().parameters
            )
        elif self._directions.step != step:
            found = self._directions.of_step(step, self.distribution(step))
            if step != self.step_count:
                return found
            self._directions = found  # kept: they may keep what the estimate drew
        return self._directions

    def variances(self) -> Tensor | None:
        """Of the directions' entries, one a trainable, float32; None where all are 1."""
        trainables, kind = self.trainables(), self.choices.directions
        if type(kind).variance is Directions.variance:
            return None
        if self._variances is None:
            found = [kind.variance(shape) for shape in trainables.shapes]
            self._variances = torch.tensor(found, device=trainables.parameters[0].device)
        return self._variances

    def all_directions(self, update: Update) -> Directed:
        """The directions that an update names."""
        return {step: self.directions_of(step) for step in {update.step, *(s for s, _ in update.older)}}

    @property
    def update_rule(self) -> UpdateRule:
        """How the estimate moves the parameters."""
        return self.choices.update_rule

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rate of each parameter group."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    def grouped_pieces(self) -> list[tuple[Piece, int, bool]]:
        """The trainables in pieces, each with its parameter group and whether it is decayed."""
        if self._pieces is None:
            trainables = self.trainables()
            labels = list(zip(self._groups(), [len(shape) > 1 for shape in trainables.shapes], strict=True))
            self._pieces = [(piece, *labels[piece.parameter]) for piece in trainables.pieces(labels)]
        return self._pieces

    def _groups(self) -> list[int]:
        """The group of each trainable."""
        found: dict[int, int] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                found.setdefault(id(p), number)
        return [found[id(p)] for p in self.trainables().parameters]

    def parameter_lrs(self) -> Tensor:
        """How far each trainable moves along z_q for a coefficient of 1: its learning rate, over the variance of z_q's entries."""
        lrs, variances = self.lrs, self.variances()
        found = torch.tensor([lrs[g] for g in self._groups()], device=self.trainables().parameters[0].device)
        return found if variances is None else found / variances
