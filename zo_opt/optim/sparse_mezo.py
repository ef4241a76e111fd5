"""Sparse-MeZO: only entries of small magnitude are perturbed and updated (arXiv 2402.15751)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.optim.choices import Method
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.queries.perturbation import Transform
from zo_opt.queries.trainables import Trainables


class SparseMeZO(ZerothOrderOptimizer):
    """theta <- theta - lr * mean_q g_q (m * z_q), perturbed along m * z_q, with m_i = 1 where |theta_i| <= h, else 0.

    Use it on whole models; small weights are said to bear larger steps. In our comparison it learned less than MeZO.

    Source: arXiv 2402.15751, algorithm 1. h is one number a parameter: the ``density`` quantile of its magnitudes when training
    starts; the mask follows the current weights and is never stored. [choice] A parameter with h = 0 (LoRA's B starts as
    zeros) is tuned whole: its entries would leave the mask with their first step. Other arguments as in
    :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`.

    Args:
        density: share of entries to tune, in (0, 1].

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0, 0.5, 0.1]))
    >>> optimizer = SparseMeZO([theta], lr=0.05, density=0.5, seed=0)
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> theta[:2].tolist(), bool(theta[2:].abs().max() < 1e-2)
    ([3.0, -2.0], True)
    """

    method = Method("sparse-mezo", {"lr": 1e-6}, frozenset(), ("density",))

    def __init__(self, params: Iterable[Any], *, density: float = 0.25, **options: Any) -> None:
        check_numbers(Range(above=0, most=1), density=density)
        super().__init__(params, **options)
        self.density = density
        self.thresholds: Tensor | None = None
        self._thresholds: dict[Tensor, float] = {}

    def trainables(self) -> Trainables:
        previous = self._trainables
        trainables = super().trainables()
        if trainables is not previous:
            for i, parameter in enumerate(trainables.parameters):
                if parameter not in self._thresholds:
                    kept = max(1, round(self.density * trainables.sizes[i]))
                    threshold = float(trainables.memory(i).abs().float().kthvalue(kept).values)
                    self._thresholds[parameter] = threshold if threshold > 0 else float("inf")
            found = [self._thresholds[p] for p in trainables.parameters]
            self.thresholds = torch.tensor(found, device=trainables.parameters[0].device)
        return trainables

    def transform(self) -> Transform:
        trainables, thresholds = self._trainables, self.thresholds  # asked for in every piece of a sweep: no new check
        assert trainables is not None
        assert thresholds is not None

        def masked(z: Tensor, start: int, stop: int, weights: Tensor) -> Tensor:
            return z * (weights.abs().float() <= trainables.spread(thresholds, start, stop))

        return masked

    def progress(self) -> dict[str, Any]:
        self.trainables()
        known = {i: self._thresholds[p] for i, p in enumerate(self._all_parameters()) if p in self._thresholds}
        return super().progress() | {"thresholds": {str(i): str(t) for i, t in known.items()}}

    def load_progress(self, zo: dict[str, Any]) -> None:
        super().load_progress(zo)
        parameters = self._all_parameters()
        self._thresholds = self._thresholds | {parameters[int(i)]: float(t) for i, t in zo["thresholds"].items()}
        self._trainables = None  # found anew, with these thresholds

    def _all_parameters(self) -> list[Tensor]:
        """Those included that are not trained at present (LISA)."""
        return [p for group in self.param_groups for p in group["params"]]
