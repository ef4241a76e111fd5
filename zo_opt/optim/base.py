"""The machine that every zeroth-order optimizer shares: estimate -> step control -> update rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_opt import perturbation, query_modes
from zo_opt.directions import Directions, StepDirections, get_directions
from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.estimators import Estimate, combine, two_sided
from zo_opt.nesting import batch_size
from zo_opt.optim.step_control import StepControl
from zo_opt.optim.update_rules import SGD, UpdateRule
from zo_opt.perturbation import Perturbed
from zo_opt.query_modes import Losses
from zo_opt.schedules import History, QuerySchedule, constant_queries


@dataclass(frozen=True)
class StepRecord:
    """What the last step did: for logs, never needed by the mathematics."""

    step: int
    epoch: int
    loss: float
    queries: int
    dropped: int
    forwards: int
    projected_grads: tuple[float, ...]


class ZerothOrderOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose gradients come from forward passes.

    Two phases: ``estimate`` perturbs, queries and restores; ``step`` applies the mean of the estimates made since the last step.
    Estimates made before one step share their directions, so that accumulation over k micro-batches of equal size
    equals one k times larger batch (in split mode in expectation). Works with parameter groups and every torch lr scheduler.

    Args:
        params: parameters or groups; those that do not require grad are left alone. Groups may differ in ``lr`` and ``weight_decay``.
        lr: learning rate, in parameter units per unit of gradient (SGD) or parameter units per step (Adam).
        zo_eps: perturbation scale, in parameter units.
        weight_decay: decoupled decay; applied to parameters of two axes or more, not to biases and norms.
        seed: all directions follow from it; the global random state is never touched.
        directions: ``"gaussian"``, ``"rademacher"`` or a :class:`~zo_opt.directions.Directions`.
        query_schedule: ``(step, epoch, history) -> queries``; see :mod:`zo_opt.schedules`.
        steps_per_epoch: steps in an epoch, ceil(D / B); tells schedules the epoch.
        query_mode: ``"sequential"``, ``"batched"``, ``"split"`` or ``"auto"``; all but the first need ``module`` and a batch.
        module: the module that owns the parameters; dropout is off in it while losses are evaluated.
        update_rule: how the estimate moves the parameters; plain SGD by default.
        step_control: :class:`~zo_opt.optim.step_control.StepControl` objects applied in order to the projected gradients before the update.
        max_failed_steps: this many steps in a row without any finite loss raise :class:`~zo_opt.errors.NonFiniteLossError`.

    Raises:
        ZOError: on impossible arguments.
    """

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
        module: nn.Module | None = None,
        update_rule: UpdateRule | None = None,
        step_control: Sequence[StepControl] = (),
        max_failed_steps: int = 10,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ZOError(f"{name}={value} is not possible; give a finite number of at least 0.")
        if not 0 < zo_eps < float("inf"):
            raise ZOError(f"zo_eps={zo_eps} is not possible; give a positive perturbation scale such as 1e-3.")
        if query_mode not in query_modes.QUERY_MODES:
            raise ZOError(
                f"query_mode={query_mode!r} is not known; choose one of {', '.join(query_modes.QUERY_MODES)}."
            )
        if query_mode in ("batched", "split") and module is None:
            raise ZOError(
                f"query_mode={query_mode!r} replaces the module's trainables; pass module=model to the optimizer."
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
        self.update_rule = update_rule if update_rule is not None else SGD()
        self.step_control = tuple(step_control)
        self.max_failed_steps = max_failed_steps
        self.step_count = 0
        self.update_count = 0
        self.history = History()
        self.failed_steps = 0
        self.dropped_queries = 0
        self.last_record: StepRecord | None = None
        self._pending: list[Estimate] = []
        self._step_directions: StepDirections | None = None
        self._queries = 0
        self._trainables_checked = False

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
        parameters = [p for _, p in self._trainables()]
        if not self._pending:  # estimates before one step share their directions, hence their number
            self._queries = self._schedule_queries(batch)
        if self._step_directions is None:
            self._step_directions = StepDirections(self.directions, self.seed, self.step_count, parameters)
        perturbed = Perturbed(parameters, self._step_directions)
        with self._evaluation_mode():
            estimate = two_sided(self._evaluator(perturbed, closure, batch), self._queries, self.zo_eps)
        self._pending.append(estimate)
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
        if not self._pending:
            raise ZOError("step() was called without an estimate; pass a closure, or call estimate(closure) first.")
        assert self._step_directions is not None
        estimate, directions = combine(self._pending), self._step_directions
        record = StepRecord(
            self.step_count, self.epoch, estimate.loss, len(estimate.projected_grads), estimate.dropped,
            estimate.forwards, tuple(estimate.projected_grads.tolist()),
        )  # fmt: skip
        kept = estimate.projected_grads.isfinite()
        self.last_record = record
        self.history.queries += record.queries
        self.history.forwards += record.forwards
        self.dropped_queries += record.dropped
        self._pending, self._step_directions = [], None
        if not kept.any():
            self.step_count += 1
            self._count_failure()
            return torch.tensor(estimate.loss)
        self.failed_steps = 0
        weights = estimate.weights[kept] / estimate.weights[kept].sum()
        projected_grads = estimate.projected_grads[kept]
        for control in self.step_control:
            projected_grads = control(projected_grads)
        coefficients = dict(zip(kept.nonzero().flatten().tolist(), (weights * projected_grads).tolist(), strict=True))
        self.update_count += 1
        self._update(coefficients, directions)
        self.step_count += 1
        return torch.tensor(estimate.loss)

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
        self._pending, self._step_directions = [], None
        zo = state_dict["zo"]
        self.seed, self.step_count, self.zo_eps = int(zo["seed"]), int(zo["step"]), float(zo["zo_eps"])
        self.update_count = int(zo["updates"])
        self.history = History(**zo["history"])
        self.failed_steps, self.dropped_queries = int(zo["failed_steps"]), int(zo["dropped_queries"])
        for control, state in zip(self.step_control, zo["step_control"], strict=True):
            control.load_state_dict(state)

    def _progress(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "step": self.step_count,
            "updates": self.update_count,
            "zo_eps": self.zo_eps,
            "history": asdict(self.history),
            "failed_steps": self.failed_steps,
            "dropped_queries": self.dropped_queries,
            "step_control": [control.state_dict() for control in self.step_control],
        }

    def _trainables(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Unique parameters that require grad, each with its group; the position numbers their directions."""
        seen: set[int] = set()
        trainables = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    trainables.append((group, parameter))
        if not self._trainables_checked:
            for _, parameter in trainables:
                if not parameter.isfinite().all():
                    raise ZOError("a trainable holds NaN or infinity before training; load sound weights first.")
            self._trainables_checked = True
        if not trainables:
            raise ZOError("no parameter requires grad; give the optimizer trainable_parameters(model).")
        return trainables

    def _schedule_queries(self, batch: Any) -> int:
        queries = int(self.query_schedule(self.step_count, self.epoch, self.history))
        if queries < 1:
            raise ZOError(
                f"the query schedule returned {queries} at step {self.step_count}; it must return at least 1."
            )
        if self.query_mode == "split" and batch is not None:
            return min(queries, batch_size(batch))
        return queries

    def _evaluator(
        self, perturbed: Perturbed, closure: Callable[..., Any], batch: Any
    ) -> Callable[[int, Sequence[float]], Losses]:
        mode = self.query_mode
        if mode == "auto":
            mode = query_modes.choose(batch, self.module, perturbed.parameters)
        if mode == "sequential":
            return lambda queries, scales: query_modes.sequential(perturbed, closure, batch, queries, scales)
        if batch is None:
            raise ZOError(f'query_mode="{mode}" needs the batch: call step(lambda b: model(**b).loss, batch).')
        run = {"batched": query_modes.batched, "split": query_modes.split}[mode]
        module = self.module
        assert module is not None
        return lambda queries, scales: run(perturbed, closure, batch, queries, scales, module)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Dropout off in both evaluations (arXiv 2305.17333, released code); the flags come back as they were."""
        training = [m for m in self.module.modules() if m.training] if self.module is not None else []
        try:
            for module in training:
                module.training = False
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

    def _update(self, coefficients: dict[int, float], directions: StepDirections) -> None:
        """One sweep: for each chunk, g = sum_q coefficient_q z_q, decay, update rule."""
        for index, (group, parameter) in enumerate(self._trainables()):
            state = self._state_of(parameter)
            flat = perturbation.flat(parameter)
            for start in range(0, parameter.numel(), perturbation.CHUNK):
                stop = min(start + perturbation.CHUNK, parameter.numel())
                gradient = torch.zeros(stop - start, device=parameter.device)
                for query, coefficient in coefficients.items():
                    gradient.add_(directions.slice(query, index, start, stop), alpha=coefficient)
                chunk = flat[start:stop]
                if group["weight_decay"] and parameter.ndim > 1:
                    chunk.mul_(1 - group["lr"] * group["weight_decay"])
                chunks = {name: tensor.view(-1)[start:stop] for name, tensor in state.items()}
                self.update_rule.apply(chunk, gradient, chunks, group["lr"], self.update_count)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        for name in self.update_rule.state_names:
            if name not in state:
                state[name] = torch.zeros(parameter.shape, device=parameter.device)
        return state
