"""The machine that every zeroth-order optimizer shares: estimate -> step control -> update rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zo_opt.choices import python_number
from zo_opt.directions import Stream
from zo_opt.errors import ZOError
from zo_opt.estimators import Estimate, combine
from zo_opt.estimators.private import made_private
from zo_opt.optim.asking import asking
from zo_opt.optim.axis import Directed
from zo_opt.optim.choices import Method
from zo_opt.optim.counting import check_closure
from zo_opt.optim.records import StepRecord, Update
from zo_opt.optim.repeatable import Repeatable
from zo_opt.optim.rounding import round_into
from zo_opt.optim.state import KeepsState
from zo_opt.optim.write_grad import WritesGrad
from zo_opt.queries import modes
from zo_opt.queries.copies import Limits
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.nesting import most_directions
from zo_opt.queries.perturbation import Perturbed, Transform
from zo_opt.queries.trainables import Piece, Trainables


class ZerothOrderOptimizer(WritesGrad, KeepsState):
    """A ``torch.optim.Optimizer`` whose gradients come from forward passes.

    Two phases: ``estimate`` perturbs, queries and restores; ``step`` applies the mean of the estimates made since the last step.
    Estimates made before one step share their directions, so that accumulation over k micro-batches of equal size
    equals one k times larger batch (in split mode in expectation). Works with parameter groups and every torch lr scheduler.
    Parameters in bf16 or fp16 are updated with stochastic rounding, so that small updates count on average.

    A method that is more than a set of choices is a subclass: it declares its ``method`` and what it does otherwise, and overrides
    the hooks below. Its own options are arguments of its constructor, kept under their names.

    Args:
        params: parameters or groups; those that do not require grad are left alone. Groups may differ in ``lr`` and ``weight_decay``.
        method: what it is called and presets; the class's own if not given.
        options: what it does (:class:`~zo_opt.optim.choices.Choices`) and where it runs (:class:`~zo_opt.optim.choices.Setting`).

    Attributes:
        choices, setting: the options, with defaults.
        ranks: the processes that share the queries, or None.
        last_update: what the last step did to the weights.

    Raises:
        ZOError: on impossible options.
    """

    method: Method = Method("zeroth-order")
    own_estimates: ClassVar[bool] = False  # it evaluates other losses than its estimator alone does
    own_gradient: ClassVar[bool] = False  # its move is not along the step's directions as they were evaluated
    own_arithmetic: ClassVar[bool] = False  # it rounds where +-1 directions would not

    def __init__(self, params: Iterable[Any], method: Method | None = None, **options: Any) -> None:
        self.method = method if method is not None else self.method
        self.choices, self.setting = self.method.sort(options)
        choices, setting = self.choices, self.setting
        self.mode, self.ranks = modes.resolve(choices.query_mode, setting.distributed, setting.module)
        if choices.line_search is not None and (self.own_estimates or self.own_gradient):
            raise ZOError(
                f"a line search looks at losses along the step's own estimate, and {self.method.name!r} moves otherwise; use it with mezo."
            )
        if choices.estimator.gives_gradient and (self.own_estimates or self.own_gradient):
            raise ZOError(
                f"{self.method.name!r} moves along directions of weights, which its estimator has not; leave estimator out."
            )
        if getattr(choices.query_schedule, "needs_split", False) and self.mode != "split":
            raise ZOError(
                f'query_mode="{choices.query_mode}" does not split the batch, whose examples are as many as the queries; pass a '
                "query_schedule with it."
            )
        if setting.privacy is not None:
            alone = (
                self.mode == "sequential"
                and self.ranks is None
                and choices.line_search is None
                and not self.own_estimates
            )
            estimator = made_private(choices.estimator, setting.privacy, choices.query_schedule, alone=alone)
            self.choices = choices = replace(choices, estimator=estimator)
        super().__init__(params, {"lr": choices.lr, "weight_decay": choices.weight_decay})
        self.start_counting(setting.steps_per_epoch, setting.max_failed_steps)
        self.start_axis()
        self.update_count = 0
        self.last_update: Update | None = None
        self._control: list[dict[str, float]] = [{} for _ in choices.step_control]
        self.pending: list[tuple[Estimate, Evaluator]] = []
        self._queries, self._limits = 0, Limits()
        self.asks = False  # whether a closure is being asked for losses
        self._repeatable = False  # whether the closure was seen to be
        self._evaluated: tuple[nn.Module, ...] | None = None  # what it then ran in evaluation mode
        self.estimator_memory: dict[str, Tensor] = {}  # the estimator's, from step to step
        if setting.privacy is not None:
            setting.privacy.attach()  # last: who is refused has taken nothing into use

    # --- the two phases ---

    @torch.inference_mode(False)  # what is kept must outlast the caller's
    @torch.no_grad()
    def estimate(self, closure: Callable[..., Any], batch: Any = None) -> Tensor:
        """Evaluate this step's queries on one (micro-)batch, restore the trainables to the bit, remember the result.

        Args:
            closure: returns the loss (scalar tensor or float) without gradients; called with ``batch`` if one is given.
            batch: any nesting of tensors with the example axis first; needed by the modes beyond sequential.

        Returns:
            The mean loss over finite queries, a float32 scalar on the CPU (nan where none was finite).
        """
        check_closure(closure)
        trainables = self._trainables_of_step()
        if self.pending and self.choices.estimator.own_closure:
            raise ZOError("with privacy one step() follows each estimate(); evaluate micro-batches within the closure.")
        if not self.pending:  # estimates before one step share their directions, hence their number
            self._queries = self._scheduled_queries(batch)
            if self.ranks is not None:
                self.ranks.begin_step(self.step_count, self._in_words(), trainables, batch)
        perturbed = Perturbed(trainables, self.directions_of(self.step_count), self.transform())
        first = self._first(closure)
        evaluator = Evaluator(
            perturbed, first or closure, batch, self.mode, self.setting.module, self.ranks,
            limits=self._limits, memory=self.estimator_memory,
        )  # fmt: skip
        with asking(self):
            estimate = self.estimate_from(evaluator, self._queries)
        if first is not None:
            self._repeatable, self._evaluated = True, first.evaluated
            if self.step_count == 0:  # later: a resumed run's, which counts what the whole one did
                estimate = replace(estimate, forwards=estimate.forwards + first.extra)
        self.pending.append((estimate, evaluator))
        return torch.tensor(estimate.loss)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Tensor:  # type: ignore[override]
        """Apply the mean of the estimates made since the last step (a closure given here is estimated first).

        Returns:
            The mean loss of those estimates.

        Raises:
            ZOError: nothing was estimated.
            NonFiniteLossError: no loss was finite, ``max_failed_steps`` times in a row; the trainables are untouched.
        """
        if closure is not None:
            self.estimate(closure, batch)
        elif batch is not None:
            raise ZOError(
                "step() was given a batch and no closure to call with it; give both, or neither after estimate()."
            )
        loss, update = self.plan()
        self.move(update)
        if not update.coefficients:
            self.count_failure()
        return torch.tensor(loss)

    def plan(self) -> tuple[float, Update]:
        """From the estimates made since the last step to the update: lost queries, records, step control, line search."""
        if not self.pending:
            raise ZOError("step() was called without an estimate; pass a closure, or call estimate(closure) first.")
        self._trainables_of_step()
        estimate, evaluators = combine([e for e, _ in self.pending]), [e for _, e in self.pending]
        record = StepRecord(
            self.step_count, self.epoch, estimate.loss, len(estimate.projected_grads), estimate.dropped,
            estimate.forwards, tuple(estimate.projected_grads.tolist()),
            estimate.tokens or estimate.forwards * evaluators[0].tokens,
        )  # fmt: skip
        kept = estimate.projected_grads.isfinite()
        self.pending = []
        projected_grads = self.take_in(record)
        if projected_grads is None:
            return estimate.loss, Update(self.step_count, self.lrs, ())
        weights = estimate.weights[kept] / estimate.weights[kept].sum()
        coefficients = torch.zeros_like(estimate.projected_grads)
        coefficients[kept] = weights * projected_grads
        lost = tuple(torch.nonzero(~kept).flatten().tolist())
        update = Update(self.step_count, self.lrs, tuple(coefficients.tolist()), lost=lost, gradient=estimate.gradient)
        update = self.update_from(estimate, update)
        if self.choices.line_search is not None:
            with asking(self):
                update, forwards = self.choices.line_search(update, self.parameter_lrs(), evaluators)
            self.history.forwards += forwards
        return estimate.loss, update

    def take_in(self, record: StepRecord) -> Tensor | None:
        """Counts, history and step control after a step's queries; the finite projected gradients as controlled, None if too few."""
        self.last_record = record
        self.history.queries += record.queries
        self.history.forwards += record.forwards
        self.history.tokens += record.tokens
        self.history.observe(record.projected_grads)
        self.dropped_queries += record.dropped
        projected_grads = torch.tensor(record.projected_grads, dtype=torch.float64)
        projected_grads = projected_grads[projected_grads.isfinite()]
        controls = self.choices.step_control
        if len(projected_grads) < min(max((c.least for c in controls), default=1), record.queries):
            return None
        for control, memory in zip(controls, self._control, strict=True):
            projected_grads = control(projected_grads, memory)
        return projected_grads

    def move(self, update: Update) -> None:
        """Take a step: one walk over the trainables."""
        if update.coefficients:
            self.failed_steps = 0
            self.update_count += 1
            self.prepare(update)
            self._sweep(update)
        self.choices.estimator.charge(update.step, len(update.coefficients))
        self.last_update = update
        self.step_count += 1

    def _sweep(self, update: Update) -> None:
        """Gradient, decay, update rule, a cache-sized piece at a time."""
        rule = self.choices.update_rule
        directions, slots = self.all_directions(update), self.slots()
        for piece, number, decayed in self.grouped_pieces():
            group, lr = self.param_groups[number], update.lrs[number]
            self.absorb(piece, update, directions)
            if lr == 0 and rule.linear:
                continue
            # A linear rule's lr joins the coefficients: with z = +-1 every product is exact, on any device.
            gradient, factor = self.gradient(piece, update, directions, lr if rule.linear else 1.0)
            wide = piece.values.dtype in (torch.float32, torch.float64)
            values = piece.values if wide and lr != 0 else piece.values.to(torch.float32, copy=True)
            if group["weight_decay"] and decayed:
                values.mul_(1 - lr * group["weight_decay"])
            state = {name: slots.range(name, piece.start, piece.stop) for name in rule.state_names}
            if rule.linear:
                rule.apply(values, gradient, state, factor, self.update_count)
            else:
                rule.apply(values, gradient * factor, state, lr, self.update_count)
            if lr != 0 and not wide:
                round_into(piece.values, values, Stream(self.setting.seed, update.step, 0), piece.start)

    # --- hooks: what methods differ in ---

    def transform(self) -> Transform | None:
        """How directions depend on weights and state (see :class:`~zo_opt.queries.perturbation.Perturbed`)."""
        return None

    def estimate_from(self, evaluator: Evaluator, queries: int) -> Estimate:
        """One micro-batch's estimate; a method that overrides it declares ``own_estimates``."""
        return self.choices.estimator(evaluator, queries, self.choices.zo_eps)

    def update_from(self, estimate: Estimate, update: Update) -> Update:
        """What the estimate asks for, given the mean's coefficients."""
        return update

    def forwards(self, step: int, queries: int) -> int:
        """Forward passes that a step on one batch takes."""
        estimator, search = self.choices.estimator, self.choices.line_search
        split = self.mode == "split"
        cost = estimator.forwards_per_query * queries + estimator.forwards_per_step
        if step == 0 and self.setting.module is None:
            cost += 1  # its first point twice
        cost = estimator.forwards_split if split else cost + (estimator.forwards_at_start if step == 0 else 0)
        return cost + (len(search.multipliers) if search is not None else 0)

    def prepare(self, update: Update) -> None:
        """Take in an update before it is applied: state of the whole axis."""

    def absorb(self, piece: Piece, update: Update, directions: Directed) -> None:
        """Take in an update before it is applied to a piece: state of that piece."""

    def gradient(self, piece: Piece, update: Update, directions: Directed, scale: float) -> tuple[Tensor, float]:
        """scale * sum_q c_q z_q / var(z) over a piece, older directions included, as (tensor, factor); not to be changed in place.

        A factor, so that a single direction needs no product of its own. A method that overrides it declares ``own_gradient``.
        """
        if update.gradient is not None:
            return update.gradient[piece.start : piece.stop].to(piece.values.device), scale
        transform, variances = self.transform(), self.variances()
        terms = [
            (step, query, scale * coefficient)
            for step, coefficients in ((update.step, update.coefficients), *update.older)
            for query, coefficient in enumerate(coefficients)
            if coefficient != 0
        ]
        total: Tensor | None = None
        for step, query, coefficient in terms:
            z = directions[step].range(query, piece.start, piece.stop)
            if transform is not None:
                z = transform(z, piece.start, piece.stop, piece.values)
            if variances is not None:
                z = z / self.trainables().spread(variances, piece.start, piece.stop)
            if len(terms) == 1:
                return z, coefficient
            total = z * coefficient if total is None else total.add_(z, alpha=coefficient)
        return total if total is not None else torch.zeros(len(piece.values), device=piece.values.device), 1.0

    # --- the machine ---

    def _trainables_of_step(self) -> Trainables:
        """The trainables, which must be those of the estimates made for this step.

        Raises:
            ZOError: they are others; the estimates are let go.
        """
        try:
            self.check_groups()
            trainables = self.trainables()
            if self.pending and not self.pending[0][1].perturbed.trainables.same_kinds(trainables.parameters):
                raise ZOError(
                    "the trainables are no longer those that this step's estimates were made for (one was frozen, thawed, or is of another "
                    "shape, dtype or device); these estimates are dropped: estimate anew, then step."
                )
        except ZOError:
            self.pending = []
            raise
        return trainables

    def _first(self, closure: Callable[..., Any]) -> Repeatable | None:
        """The run's first closure, to be seen giving one loss at one point; copies in one forward need a module, whose dropout is off.

        Seen again once a module that it ran in evaluation mode trains.
        """
        given = self.setting.module is not None
        seen = self._repeatable and not any(m.training for m in self._evaluated or ())
        if seen or self.choices.estimator.gives_gradient:
            return None
        return Repeatable(closure, in_evaluation=given) if self.mode == "sequential" or not given else None

    def _in_words(self) -> str:
        """What the processes of a run must agree on at a step."""
        return (
            f"{self.method.name}, seed {self.setting.seed}, {self._queries} queries, zo_eps {self.choices.zo_eps:g}, lr {self.lrs}, "
            f"{self.trainables().total} trainables"
        )

    def _scheduled_queries(self, batch: Any) -> int:
        queries = python_number(self.choices.query_schedule(self.step_count, self.epoch, self.history))
        if type(queries) is not int or queries < 1:
            raise ZOError(
                f"the query schedule returned {queries!r} at step {self.step_count}; it must return a whole number of at least 1."
            )
        return min(queries, most_directions(batch)) if self.mode == "split" and batch is not None else queries
