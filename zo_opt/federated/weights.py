"""Tuned weights as a function of the pool's whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_opt.directions import Rademacher, StepDirections, Stream
from zo_opt.errors import ZOError
from zo_opt.estimators import TwoSided
from zo_opt.federated.pool import MOST_TOTAL, Pool
from zo_opt.queries.copies import Limits
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.perturbation import Perturbed
from zo_opt.queries.trainables import Trainables


class Weights:
    """w = w0 - unit * sum_j A_j z_j, to the same bits for the same A, whatever came before and on whatever device.

    Besides the weights themselves w0 (float32) and the sum (float64, exact) are kept: 12 bytes an entry more. Going from one A to another
    costs a direction for each seed whose number differs.

    Args:
        parameters: the weights to be tuned, float32, as training begins: w0.
        pool: the pool.

    Raises:
        ZOError: other dtypes.

    >>> pool = Pool(size=8, lr=0.1, clip=1.0)
    >>> one, other = (torch.nn.Parameter(torch.arange(5.0)) for _ in range(2))
    >>> first, second = Weights([one], pool), Weights([other], pool)
    >>> for seed, number in ((3, 70_000), (1, -5), (3, 9)):
    ...     first.move(seed, number)
    >>> second.become(np.array([0, -5, 0, 70_009, 0, 0, 0, 0]))
    >>> torch.equal(one, other), bool((one != torch.arange(5.0)).all())
    (True, True)
    """

    def __init__(self, parameters: Sequence[Tensor], pool: Pool) -> None:
        if wrong := next((p.dtype for p in parameters if p.dtype != torch.float32), None):
            raise ZOError(
                f"a tuned weight is {wrong}; federated tuning takes float32, the frozen ones may be of any type."
            )
        self.pool, self.totals = pool, np.zeros(pool.size, dtype=np.int64)
        self._trainables = Trainables(parameters)
        self._pieces = list(self._trainables.pieces())
        self._start = [piece.values.clone() for piece in self._pieces]
        self._sums = [torch.zeros_like(values, dtype=torch.float64) for values in self._start]

    @torch.no_grad()
    def move(self, seed: int, number: int) -> None:
        """A_seed += number.

        Raises:
            ZOError: the numbers are beyond what is exact.
        """
        totals = self.totals.copy()
        totals[seed] += number
        self.become(totals)

    @torch.no_grad()
    def become(self, totals: np.ndarray[Any, Any]) -> None:
        """Take on the weights of these numbers A, (K,) int64.

        Raises:
            ZOError: the numbers are beyond what is exact.
        """
        check_totals(totals)
        changed = [(int(j), int(totals[j] - self.totals[j])) for j in np.flatnonzero(totals != self.totals)]
        if not changed:
            return
        for piece, start, total in zip(self._pieces, self._start, self._sums, strict=True):
            for seed, number in changed:
                z = self._draw(seed, piece.start, piece.stop, piece.values.device)
                total.add_(z, alpha=number)  # whole numbers: exact, in whatever order
            piece.values.copy_(start.double().sub_(total, alpha=self.pool.unit))  # rounded once
        self.totals = totals.copy()

    @torch.no_grad()
    def derivative(self, loss: Callable[[], Any], seed: int) -> float:
        """(loss(w + zo_eps z) - loss(w - zo_eps z)) / (2 zo_eps) along a seed's direction; nan where one of them is not finite."""
        step = StepDirections(Rademacher(), self.pool.seed, seed, self._trainables.parameters)
        evaluate = Evaluator(Perturbed(self._trainables, step), loss, limits=Limits())
        return TwoSided()(evaluate, 1, self.pool.zo_eps).projected_grads.item()

    def _draw(self, seed: int, start: int, stop: int, device: torch.device) -> Tensor:
        return Rademacher().draw(Stream(self.pool.seed, seed, 0), self._trainables.shapes, start, stop, device)


def check_totals(totals: np.ndarray[Any, Any]) -> None:
    """Whether these numbers are such that their sums are exact.

    Raises:
        ZOError: they are not.
    """
    if int(np.abs(totals.astype(np.float64)).sum()) >= MOST_TOTAL:
        raise ZOError(
            "the sums of what clients sent are beyond 2^53, where they are no longer exact; prepare a training with fewer rounds."
        )
