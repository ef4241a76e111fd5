"""The machine that every zeroth-order optimizer shares: estimate -> step control -> update rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_opt.directions import Directions, StepDirections, Stream, get_directions
from zo_opt.distributed import Distributed
from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.estimators import Estimate, combine, private_two_sided, two_sided
from zo_opt.optim.line_search import LineSearch
from zo_opt.optim.records import StepRecord, Update
from zo_opt.optim.rounding import round_into
from zo_opt.optim.slots import Slots
from zo_opt.optim.step_control import StepControl
from zo_opt.optim.update_rules import SGD, UpdateRule
from zo_opt.privacy import GaussianPrivacy
from zo_opt.prompts.shared_prefix import SharedPrefix
from zo_opt.queries import modes as query_modes
from zo_opt.queries.copies import Limits
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.nesting import batch_size
from zo_opt.queries.perturbation import Perturbed
from zo_opt.queries.trainables import Piece, Trainables
from zo_opt.schedules import History, QuerySchedule, constant_queries


class ZerothOrderOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose gradients come from forward passes.

    Two phases: ``estimate`` perturbs, queries and restores; ``step`` applies the mean of the estimates made since the last step.
    Estimates made before one step share their directions, so that accumulation over k micro-batches of equal size
    equals one k times larger batch (in split mode in expectation). Works with parameter groups and every torch lr scheduler.
    Parameters in bf16 or fp16 are updated with stochastic rounding, so that small updates count on average.

    Args:
        params: parameters or groups; those that do not require grad are left alone. Groups may differ in ``lr`` and ``weight_decay``.
        lr: learning rate, in parameter units per unit of gradient (SGD) or parameter units per step (Adam).
        zo_eps: perturbation scale, in parameter units.
        weight_decay: decoupled decay; applied to parameters of two axes or more, not to biases and norms.
        seed: all directions follow from it; the global random state is never touched.
        directions: a name of :data:`~zo_opt.directions.DIRECTIONS` or a :class:`~zo_opt.directions.Directions`.
        query_schedule: a callable (step, epoch, history) -> queries; one query a step by default.
        steps_per_epoch: optimizer steps in an epoch, for schedules that count epochs.
        query_mode: ``"sequential"``, ``"batched"``, ``"split"``, ``"auto"`` or ``"distributed"``; batched, split and auto need
            ``module`` and a batch.
        distributed: what ranks share in query mode distributed, and how each evaluates its part
            (:class:`~zo_opt.distributed.Distributed`); the queries, sequentially, by default.
        module: the module that owns the parameters; dropout is off in it while losses are evaluated.
        update_rule: how the estimate moves the parameters; plain SGD by default.
        step_control: :class:`~zo_opt.optim.step_control.StepControl` objects applied in order to the projected gradients before the update.
        line_search: tries several lengths of the step before it is taken (SGD only); costs forwards.
        share_prefix: compute the frozen layers below the first trainable once for all evaluations of a step; needs ``module``, and a
            closure that does not look into those layers (:class:`~zo_opt.prompts.shared_prefix.SharedPrefix`).
        max_failed_steps: this many steps in a row without any finite loss raise :class:`~zo_opt.errors.NonFiniteLossError`.
        privacy: differential privacy of the examples (:class:`~zo_opt.privacy.GaussianPrivacy`); the closure then returns a loss for each
            example, and the losses that ``step`` and the records give are nan, for they are not private.

    Raises:
        ZOError: on impossible arguments.
    """

    name = "zeroth-order"
    # Tensors of the parameters' shapes that the method keeps, and what they start as.
    slot_values: ClassVar[dict[str, float]] = {}
    # Whether the move is along the step's own directions as they were evaluated, so that a line search can try it.
    searchable = True
    own_update_rule: ClassVar[bool] = False  # the method is an update rule and takes no other
    own_directions: ClassVar[bool] = False  # the method is (also) a choice of directions
    lr_is_a_length: ClassVar[bool] = False  # lr is in parameter units a step, whatever the gradient's scale

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        directions: str | Directions = "gaussian",
        query_schedule: QuerySchedule | None = None,
        steps_per_epoch: int = 1,
        query_mode: str = "sequential",
        distributed: Distributed | None = None,
        module: nn.Module | None = None,
        update_rule: UpdateRule | None = None,
        step_control: Sequence[StepControl] = (),
        line_search: LineSearch | None = None,
        share_prefix: bool = False,
        max_failed_steps: int = 10,
        privacy: GaussianPrivacy | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ZOError(f"{name}={value} is not possible; give a finite number of at least 0.")
        if not 0 < zo_eps < float("inf"):
            raise ZOError(f"zo_eps={zo_eps} is not possible; give a positive perturbation scale such as 1e-3.")
        mode, ranks = query_modes.resolve(query_mode, distributed, module)
        if share_prefix and module is None:
            raise ZOError(
                "share_prefix=True needs the model whose layers are shared; pass module=model to the optimizer."
            )
        if steps_per_epoch < 1:
            raise ZOError(
                f"steps_per_epoch={steps_per_epoch} is not possible; give ceil(examples / batch size), at least 1."
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.zo_eps, self.seed = zo_eps, seed
        self.directions = get_directions(directions)
        self.query_schedule = query_schedule if query_schedule is not None else constant_queries(1)
        self.steps_per_epoch, self.query_mode, self.module = steps_per_epoch, query_mode, module
        self._mode, self.ranks, self._limits = mode, ranks, Limits()
        self.update_rule = update_rule if update_rule is not None else SGD()
        self.step_control = tuple(step_control)
        self.line_search = line_search
        if line_search is not None and not (self.update_rule.linear and self.searchable):
            raise ZOError(
                "a line search moves along the step's own estimate; use it with the plain SGD update rule and an optimizer "
                "without memory, such as MeZO."
            )
        self.share_prefix = share_prefix
        self.max_failed_steps = max_failed_steps
        self.privacy = privacy
        if privacy is not None and (
            mode != "sequential"
            or ranks is not None
            or line_search is not None
            or type(self)._estimate is not ZerothOrderOptimizer._estimate
        ):
            raise ZOError(
                "privacy clips each example's two-sided difference: use query_mode='sequential' in one process, no line search, and an "
                "optimizer that needs no other losses, such as MeZO or AdaZeta."
            )
        if privacy is not None:
            privacy.attach()
        self.step_count = 0
        self.update_count = 0
        self.history = History()
        self.failed_steps = 0
        self.dropped_queries = 0
        self.last_record: StepRecord | None = None
        self.last_update: Update | None = None
        self._pending: list[tuple[Estimate, Evaluator]] = []
        self._step_directions: StepDirections | None = None
        self._queries = 0
        self._checked = False
        self._trainables: Trainables | None = None
        self._slots: Slots | None = None
        self._pieces: list[tuple[Piece, int, bool]] | None = None
        self._template: StepDirections | None = None
        self._prefix: SharedPrefix | None = None

    @property
    def epoch(self) -> int:
        """e_k = floor(k / steps_per_epoch)."""
        return self.step_count // self.steps_per_epoch

    @torch.no_grad()
    def estimate(self, closure: Callable[..., Any], batch: Any = None) -> Tensor:
        """Evaluate this step's queries on one (micro-)batch, restore the trainables to the bit, remember the result.

        Args:
            closure: returns the loss (scalar tensor or float) without gradients; called with ``batch`` if one is given.
            batch: any nesting of tensors with the example axis first; needed by the modes beyond sequential.

        Returns:
            The mean loss over finite queries, a float32 scalar on the CPU (nan where none was finite).
        """
        trainables = self.trainables()
        if self._pending and self.privacy is not None:
            raise ZOError("with privacy one step() follows each estimate(); evaluate micro-batches within the closure.")
        if not self._pending:  # estimates before one step share their directions, hence their number
            self._queries = self._schedule_queries(batch)
            if self.ranks is not None:
                self.ranks.begin_step(self.step_count, self._plan_in_words(), trainables, batch)
        self._step_directions = self._directions_of(self.step_count)
        perturbed = Perturbed(trainables, self._step_directions, self._transform())
        evaluator = Evaluator(perturbed, closure, batch, self._mode, self.module, self.ranks, limits=self._limits)
        with self._evaluation_mode():
            estimate = self._estimate(evaluator, self._queries)
        self._pending.append((estimate, evaluator))
        return torch.tensor(estimate.loss)

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Tensor | None:  # type: ignore[override]
        """Apply the mean of the estimates made since the last step (a closure given here is estimated first).

        Returns:
            The mean loss of those estimates.

        Raises:
            ZOError: nothing was estimated.
            NonFiniteLossError: no loss was finite, ``max_failed_steps`` times in a row; the trainables are untouched.
        """
        if closure is not None:
            self.estimate(closure, batch)
        loss, update = self._plan()
        self._move(update)
        if not update.coefficients:
            self._count_failure()
        return torch.tensor(loss)

    @torch.no_grad()
    def write_grad(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Tensor:
        """Add the gradient estimate to ``.grad`` of every trainable, for any ``torch.optim`` optimizer to consume.

        Takes the place of ``loss.backward()`` in a first-order loop; this optimizer's own lr, weight decay and update rule
        are not used.

        >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> from zo_opt import MeZO
        >>> spsa, adamw = MeZO([theta], lr=0.0), torch.optim.AdamW([theta], lr=0.05)
        >>> for _ in range(200):
        ...     adamw.zero_grad()
        ...     loss = spsa.write_grad(lambda: theta.square().sum())
        ...     adamw.step()
        >>> bool(theta.abs().max() < 0.1)
        True
        """
        if closure is not None:
            self.estimate(closure, batch)
        loss, update = self._plan()
        self.step_count += 1
        if not update.coefficients:
            self._count_failure()
            return torch.tensor(loss)
        self.failed_steps = 0
        self._prepare(update)
        self._add_grad(update, self._gradient)
        return torch.tensor(loss)

    @torch.no_grad()
    def write_last_grad(self) -> None:
        """Add the gradient estimate that the last ``step`` applied to ``.grad`` of every trainable; zeros if its losses were not finite.

        For what looks at gradients after a step, such as an adapter that scores its parameters by them. Call it right after
        ``step``: where directions depend on the weights (Sparse-MeZO), these are the weights by now.

        Raises:
            ZOError: no step was made yet.

        >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> from zo_opt import MeZO
        >>> optimizer = MeZO([theta], lr=0.5)
        >>> loss = optimizer.step(lambda: theta.square().sum())
        >>> optimizer.write_last_grad()
        >>> torch.allclose(theta + 0.5 * theta.grad, torch.tensor([3.0, -2.0]))
        True
        """
        if self.last_update is None:
            raise ZOError("write_last_grad() was called before a step; call step() first.")
        self._add_grad(self.last_update, self._applied_gradient)

    @torch.no_grad()
    def apply(self, update: Update) -> None:
        """Move the weights as one recorded step did: the second half of ``step``, and all that a replay needs.

        Raises:
            ZOError: the update is not of the next step.
        """
        if update.step != self.step_count or len(update.lrs) != len(self.param_groups):
            raise ZOError(
                f"an update of step {update.step} with {len(update.lrs)} groups cannot be applied at step "
                f"{self.step_count} with {len(self.param_groups)}; apply every step once, in order."
            )
        self.trainables()
        self._move(update)

    @torch.no_grad()
    def redo(self, update: Update, record: StepRecord) -> None:
        """Take a recorded step once more without a forward pass, with all that it left behind: :meth:`apply`, and counts, history and step control.

        Args:
            update: what the journal has of the step.
            record: what the step measured; its ``forwards`` are all that the step took, a line search's included.

        Raises:
            ZOError: they are not of the next step.

        >>> whole, again = (torch.nn.Parameter(torch.tensor([3.0, -2.0])) for _ in range(2))
        >>> from zo_opt import MeZO
        >>> one, other = MeZO([whole], lr=0.1), MeZO([again], lr=0.1)
        >>> for _ in range(3):
        ...     loss = one.step(lambda: whole.square().sum())
        ...     other.redo(one.last_update, one.last_record)
        >>> torch.equal(whole, again), other.history == one.history
        (True, True)
        """
        if record.step != update.step:
            raise ZOError(f"the update is of step {update.step} and the record of step {record.step}; give one step's.")
        self.apply(update)
        self._take_in(record, max(update.lrs))
        if not update.coefficients:
            self.failed_steps += 1

    # --- what methods differ in ---

    def _estimate(self, evaluator: Evaluator, queries: int) -> Estimate:
        """One micro-batch's estimate."""
        if self.privacy is not None:
            return private_two_sided(evaluator, queries, self.zo_eps, self.privacy)
        return two_sided(evaluator, queries, self.zo_eps)

    def _transform(self) -> Callable[[Tensor, int, int, Tensor], Tensor] | None:
        """How directions depend on weights and state (see :class:`~zo_opt.queries.perturbation.Perturbed`)."""
        return None

    def _update(self, estimate: Estimate, coefficients: tuple[float, ...]) -> Update:
        """What the estimate asks for."""
        return Update(self.step_count, self._lrs(), coefficients)

    def _prepare(self, update: Update) -> None:
        """Take in an update before its gradient is asked for: state of the whole axis."""

    def _gradient(
        self, piece: Piece, update: Update, directions: dict[int, StepDirections], scale: float
    ) -> tuple[Tensor, float]:
        """scale * sum_q c_q z_q over a piece, older directions included, as (tensor, factor); not to be changed in place.

        A factor, so that a single direction needs no product of its own.
        """
        transform = self._transform()
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
            if len(terms) == 1:
                return z, coefficient
            total = z * coefficient if total is None else total.add_(z, alpha=coefficient)
        return total if total is not None else torch.zeros(len(piece.values), device=piece.values.device), 1.0

    def _applied_gradient(
        self, piece: Piece, update: Update, directions: dict[int, StepDirections], scale: float
    ) -> tuple[Tensor, float]:
        """What ``_gradient`` gave for an update that was applied, without taking it in again."""
        return self._gradient(piece, update, directions, scale)

    def _progress(self) -> dict[str, Any]:
        """What must survive a restart, as plain values."""
        return {
            "seed": self.seed,
            "step": self.step_count,
            "updates": self.update_count,
            "zo_eps": self.zo_eps,
            "history": asdict(self.history),
            "failed_steps": self.failed_steps,
            "dropped_queries": self.dropped_queries,
            "step_control": [control.state_dict() for control in self.step_control],
            **({"privacy": self.privacy.state_dict()} if self.privacy is not None else {}),
        }

    def _load_progress(self, zo: dict[str, Any]) -> None:
        self.seed, self.step_count, self.zo_eps = int(zo["seed"]), int(zo["step"]), float(zo["zo_eps"])
        self._template = self._step_directions = None  # they know the seed
        self.update_count = int(zo["updates"])
        self.history = History(**zo["history"])
        self.failed_steps, self.dropped_queries = int(zo["failed_steps"]), int(zo["dropped_queries"])
        for control, state in zip(self.step_control, zo["step_control"], strict=True):
            control.load_state_dict(state)
        if (self.privacy is None) == ("privacy" in zo):
            raise ZOError(
                "this state and this optimizer differ in privacy: one has it, the other has not; give it to both."
            )
        if self.privacy is not None:
            self.privacy.load_state_dict(zo["privacy"])

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """torch's state with one more entry, ``"zo"``: everything the next step depends on besides the trainables."""
        if self._pending:
            raise ZOError("state_dict() was called between estimate() and step(); call step() first.")
        return super().state_dict() | {"zo": self._progress()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, to the same bits."""
        if "zo" not in state_dict:
            raise ZOError("this state was not written by a zeroth-order optimizer (it has no entry 'zo').")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        # torch casts state to the parameters' dtype; ours is float32 whatever they are.
        packed = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(packed, (p for g in self.param_groups for p in g["params"]), strict=True):
            for name, tensor in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = tensor.to(parameter.device, copy=True)
        self._pending, self._step_directions, self._slots = [], None, None
        self._load_progress(state_dict["zo"])
        if self.ranks is not None:
            self.ranks.compare_anew()

    def trainables(self) -> Trainables:
        """Unique parameters that require grad, in the order in which directions number them.

        Raises:
            ZOError: there is none, or one holds NaN or infinity before training.
        """
        parameters = list({id(p): p for g in self.param_groups for p in g["params"] if p.requires_grad}.values())
        if self._trainables is None or not self._trainables.is_current(parameters):
            if not parameters:
                raise ZOError("no parameter requires grad; give the optimizer trainable_parameters(model).")
            trainables = Trainables(parameters)
            if not self._checked:
                if not all(piece.values.isfinite().all() for piece in trainables.pieces()):
                    raise ZOError("a trainable holds NaN or infinity before training; load sound weights first.")
                self._checked = True
            self._trainables = trainables
            self._slots = self._pieces = self._template = self._step_directions = None
            if self.share_prefix and self.module is not None:
                self._prefix = SharedPrefix(self.module, parameters)
        return self._trainables

    def slots(self) -> Slots:
        """The method's and the update rule's tensors of the parameters' shapes."""
        if self._slots is None:
            trainables = self.trainables()
            values = dict.fromkeys(self.update_rule.state_names, 0.0) | self.slot_values
            self._slots = Slots(trainables, self.state, values)
        return self._slots

    # --- the machine ---

    def _move(self, update: Update) -> None:
        if update.coefficients:
            self.failed_steps = 0
            self.update_count += 1
            self._prepare(update)
            self._sweep(update)
        if self.privacy is not None:  # of a step that is redone from a record, too
            self.privacy.charge(update.step, len(update.coefficients))
        self.last_update = update
        self.step_count += 1

    def _plan(self) -> tuple[float, Update]:
        """From the pending estimates to the update: dropped queries, records, step control, line search."""
        if not self._pending:
            raise ZOError("step() was called without an estimate; pass a closure, or call estimate(closure) first.")
        estimate, evaluators = combine([e for e, _ in self._pending]), [e for _, e in self._pending]
        record = StepRecord(
            self.step_count, self.epoch, estimate.loss, len(estimate.projected_grads), estimate.dropped,
            estimate.forwards, tuple(estimate.projected_grads.tolist()),
        )  # fmt: skip
        kept = estimate.projected_grads.isfinite()
        self._pending = []
        projected_grads = self._take_in(record, max(self._lrs()))
        if projected_grads is None:
            return estimate.loss, Update(self.step_count, self._lrs(), ())
        weights = estimate.weights[kept] / estimate.weights[kept].sum()
        coefficients = torch.zeros_like(estimate.projected_grads)
        coefficients[kept] = weights * projected_grads
        update = self._update(estimate, tuple(coefficients.tolist()))
        if self.line_search is not None:
            with self._evaluation_mode():
                length, forwards = self.line_search(update.coefficients, self._parameter_lrs(), evaluators)
            self.history.forwards += forwards
            update = Update(update.step, update.lrs, tuple(length * c for c in update.coefficients))
        return estimate.loss, update

    def _take_in(self, record: StepRecord, lr: float) -> Tensor | None:
        """Counts, history and step control after a step's queries; the finite projected gradients as controlled, None if too few."""
        self.last_record = record
        self.history.queries += record.queries
        self.history.forwards += record.forwards
        self.history.observe(record.projected_grads)
        self.dropped_queries += record.dropped
        projected_grads = torch.tensor(record.projected_grads, dtype=torch.float64)
        projected_grads = projected_grads[projected_grads.isfinite()]
        least = max((control.least for control in self.step_control), default=1)
        if len(projected_grads) < min(least, record.queries):
            return None
        for control in self.step_control:
            control.prepare(lr, self.trainables().total)
            projected_grads = control(projected_grads)
        return projected_grads

    def _sweep(self, update: Update) -> None:
        """One walk over the trainables: gradient, decay, update rule, a cache-sized piece at a time."""
        directions, slots, linear = self._all_directions(update), self.slots(), self.update_rule.linear
        for piece, number, decayed in self._grouped_pieces():
            group, lr = self.param_groups[number], update.lrs[number]
            # A linear rule's lr joins the coefficients: with z = +-1 every product is exact, on any device.
            gradient, factor = self._gradient(piece, update, directions, lr if linear else 1.0)
            if lr == 0 and linear:
                continue
            wide = piece.values.dtype in (torch.float32, torch.float64)
            values = piece.values if wide and lr != 0 else piece.values.to(torch.float32, copy=True)
            if group["weight_decay"] and decayed:
                values.mul_(1 - lr * group["weight_decay"])
            state = {name: slots.range(name, piece.start, piece.stop) for name in self.update_rule.state_names}
            if linear:
                self.update_rule.apply(values, gradient, state, factor, self.update_count)
            else:
                self.update_rule.apply(values, gradient * factor, state, lr, self.update_count)
            if lr != 0 and not wide:
                round_into(piece.values, values, Stream(self.seed, update.step, 0), piece.start)

    def _add_grad(self, update: Update, gradient_of: Callable[..., tuple[Tensor, float]]) -> None:
        """Add an update's gradient estimate to ``.grad``, in the parameters' dtype."""
        trainables, directions = self.trainables(), self._all_directions(update)
        for i, parameter in enumerate(trainables.parameters):
            start, memory = trainables.starts[i], trainables.memory(i)
            piece = Piece(start, start + len(memory), memory, i)
            gradient, factor = gradient_of(piece, update, directions, 1.0)
            gradient = (gradient * factor).view(parameter.shape).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _grouped_pieces(self) -> list[tuple[Piece, int, bool]]:
        """The trainables in pieces, each with its parameter group and whether it is decayed."""
        if self._pieces is None:
            trainables = self.trainables()
            labels = list(zip(self._groups(), [len(shape) > 1 for shape in trainables.shapes], strict=True))
            self._pieces = [(piece, *labels[piece.parameter]) for piece in trainables.pieces(labels)]
        return self._pieces

    def _directions_of(self, step: int) -> StepDirections:
        if self._step_directions is not None and self._step_directions.step == step:
            return self._step_directions  # which may keep what the estimate drew
        if self._template is None:
            self._template = StepDirections(self.directions, self.seed, step, self.trainables().parameters)
        return self._template.of_step(step)

    def _all_directions(self, update: Update) -> dict[int, StepDirections]:
        return {step: self._directions_of(step) for step in {update.step, *(s for s, _ in update.older)}}

    def _lrs(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self.param_groups)

    def _groups(self) -> list[int]:
        """The group of each trainable."""
        found: dict[int, int] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                found.setdefault(id(p), number)
        return [found[id(p)] for p in self.trainables().parameters]

    def _parameter_lrs(self) -> Tensor:
        lrs = self._lrs()
        parameters = self.trainables().parameters
        return torch.tensor([lrs[g] for g in self._groups()], device=parameters[0].device)

    def _plan_in_words(self) -> str:
        """What the processes of a run must agree on at a step."""
        return (
            f"{self.name}, seed {self.seed}, {self._queries} queries, zo_eps {self.zo_eps:g}, lr {self._lrs()}, "
            f"{self.trainables().total} trainables"
        )

    def _schedule_queries(self, batch: Any) -> int:
        queries = int(self.query_schedule(self.step_count, self.epoch, self.history))
        if queries < 1:
            raise ZOError(
                f"the query schedule returned {queries} at step {self.step_count}; it must return at least 1."
            )
        if self._mode == "split" and batch is not None:
            return min(queries, batch_size(batch))
        return queries

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Dropout off in both evaluations (arXiv 2305.17333, released code), the frozen prefix shared; all comes back as it was."""
        training = [m for m in self.module.modules() if m.training] if self.module is not None else []
        try:
            for module in training:
                module.training = False
            with self._prefix() if self._prefix is not None else nullcontext():
                yield
        finally:
            for module in training:
                module.training = True

    def _count_failure(self) -> None:
        self.failed_steps += 1
        if self.failed_steps >= self.max_failed_steps:
            raise NonFiniteLossError(
                f"no loss was finite in {self.failed_steps} steps in a row; the trainables keep their last good values. "
                "Lower lr or zo_eps, or run the frozen model in a wider dtype."
            )
