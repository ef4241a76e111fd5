"""MeZO-SVRG: variance reduction by a snapshot (arXiv 2404.08080)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.errors import ZOError
from zo_opt.estimators import Estimate, control_variate
from zo_opt.optim.choices import Method
from zo_opt.optim.counting import check_closure
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.records import Update
from zo_opt.optim.repeatable import Repeatable
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.trainables import Trainables


class MeZOSVRG(ZerothOrderOptimizer):
    """theta <- theta - lr * (mean_q (g_q(theta) - g_q(theta~)) z_q + G), G the estimate at the snapshot theta~ on a large batch.

    Use it where the batch's noise is larger than the directions' noise, and a large batch can be run now and then.

    Every ``interval`` steps theta~ <- theta, and the step is G's own. Between, g_q(theta) and g_q(theta~) are taken on the same
    mini-batch along the same direction: four forwards a query. Source: arXiv 2404.08080, algorithm 1; [choice] one lr for both
    kinds of step. Keeps a float32 copy of the trainables. Other arguments as in
    :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`; not in split mode with ``full_closure``.

    Args:
        interval: steps between snapshots.
        full_closure: the loss on the large batch; without it the snapshot step's own batch serves [choice].

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = MeZOSVRG([theta], lr=0.02, interval=2, seed=0)
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 0.1)
    True
    """

    method = Method("mezo-svrg", {"lr": 1e-6}, frozenset({"estimator", "line_search"}), ("interval", "full_closure"))
    own_estimates: ClassVar[bool] = True
    own_gradient: ClassVar[bool] = True
    slot_values: ClassVar[Mapping[str, float]] = {"snapshot": 0.0}

    def __init__(
        self,
        params: Iterable[Any],
        *,
        interval: int = 2,
        full_closure: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        check_numbers(Range(least=1, whole=True), interval=interval)
        if full_closure is not None:
            check_closure(full_closure)
        super().__init__(params, **options)
        if full_closure is not None and self.choices.query_mode != "sequential":
            raise ZOError('a full_closure takes no batch, so that it needs query_mode="sequential".')
        self.interval, self.full_closure = interval, full_closure
        self.snapshot_step = -1
        self.snapshot_coefficients: tuple[float, ...] = ()
        self._snapshot_of: Trainables | None = None

    @property
    def _snapshot_due(self) -> bool:
        # Trainables may change as training goes on (LISA): what came in has no snapshot yet.
        new = self._snapshot_of is not self.trainables()
        return self.step_count % self.interval == 0 or not self.snapshot_coefficients or new

    def estimate_from(self, evaluator: Evaluator, queries: int) -> Estimate:
        zo_eps = self.choices.zo_eps
        if not self._snapshot_due:
            return control_variate(evaluator, self._anchor(), queries, zo_eps)
        if self.full_closure is None:
            return self.choices.estimator(evaluator, queries, zo_eps)
        if self.pending:  # another micro-batch of a step that does not need it
            done = self.pending[0][0]
            return Estimate(done.loss, done.projected_grads, done.weights, 0)
        closure = evaluator.closure
        closure = closure.of(self.full_closure) if isinstance(closure, Repeatable) else self.full_closure
        return self.choices.estimator(Evaluator(evaluator.perturbed, closure, limits=evaluator.limits), queries, zo_eps)

    def forwards(self, step: int, queries: int) -> int:
        return super().forwards(step, queries) * (1 if step % self.interval == 0 else 2)

    def update_from(self, estimate: Estimate, update: Update) -> Update:
        older = () if self._snapshot_due else ((self.snapshot_step, self.snapshot_coefficients),)
        return replace(update, older=older)

    def prepare(self, update: Update) -> None:
        if not update.older:
            slots = self.slots()
            for piece in self.trainables().pieces():
                slots.range("snapshot", piece.start, piece.stop).copy_(piece.values)
            self.snapshot_step, self.snapshot_coefficients = update.step, update.coefficients
            self._snapshot_of = self.trainables()

    def _anchor(self) -> Tensor:
        slots = self.slots()
        return torch.cat([slots.range("snapshot", p.start, p.stop) for p in self.trainables().pieces()])

    def progress(self) -> dict[str, Any]:
        snapshot = {
            "step": self.snapshot_step,
            "coefficients": list(self.snapshot_coefficients),
            "current": self._snapshot_of is self.trainables(),
        }
        return super().progress() | {"snapshot": snapshot}

    def load_progress(self, zo: dict[str, Any]) -> None:
        super().load_progress(zo)
        self.snapshot_step = int(zo["snapshot"]["step"])
        self.snapshot_coefficients = tuple(zo["snapshot"]["coefficients"])
        self._snapshot_of = self.trainables() if zo["snapshot"]["current"] else None
