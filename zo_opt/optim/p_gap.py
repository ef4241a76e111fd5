"""P-GAP: directions aligned with a low-rank estimate of the gradient (arXiv 2510.18228)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import copysign, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.directions import Directions, Gaussian, Stream
from zo_opt.directions.spanned import Spanned, fresh_factor
from zo_opt.optim.choices import Method
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.records import Update
from zo_opt.queries.nesting import most_directions

Triplets = tuple[Tensor, Tensor, Tensor]  # U (m, r), sigma (r,), V (n, r)


class PGAP(ZerothOrderOptimizer):
    """theta <- theta - lr * mean_q g_q z_q along z_W = U C V^T, where U diag(sigma) V^T is the rank-r part of an estimate of W's gradient.

    Use it on whole models for many steps, where the leading directions of the gradient change slowly.

    C = C' - (<S, C'> - xi sqrt(delta) ||S||) / ||S||^2 * S with S = diag(sigma) and C' (r, r) Gaussian, so that <S, C> = xi sqrt(delta) ||S||, xi a
    fair sign: the part along the estimate has a fixed length, the part across it is random. Every ``interval`` steps the estimate is
    the mean of ``probes`` two-sided queries along Gaussian directions. 2Q forwards, 2 probes in those steps.

    Source: arXiv 2510.18228, as summaries of it report (the paper itself was not at hand): the constraint, 10 probes every 100 steps, ranks
    128 to 512 for whole models. [choice] delta = 1: C then has the second moments of C', so that the mean of <G, z> z is the projected
    gradient; the paper's is not known here. [choice] xi is the sign of <S, C'>, which is fair and independent of the rest. [choice] A step of
    probes moves along its own estimate, as MeZO-SVRG's snapshots do: so estimates of micro-batches add up, and a journal
    has all that a replay needs. [choice] Parameters of one axis, and all while there is no estimate, get Gaussian entries; a matrix that comes
    in (LISA) has all probed anew. Keeps (m + n + 1) r float32 numbers a matrix. Other arguments as in
    :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`.

    Args:
        rank: r, at most a matrix's own.
        interval: steps from one estimate of the gradient to the next.
        probes: queries of that estimate.
        delta: squared length of a direction's part along the estimate.

    >>> w, target = torch.nn.Parameter(torch.zeros(4, 3)), torch.ones(4, 3)
    >>> optimizer = PGAP([w], lr=0.05, rank=1, interval=20, probes=10, seed=0)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: (w - target).square().sum())
    >>> bool(loss < 0.1)
    True
    """

    method = Method(
        "p-gap", {"lr": 1e-6}, frozenset({"directions", "line_search"}), ("rank", "interval", "probes", "delta")
    )
    own_estimates: ClassVar[bool] = True  # other queries than its schedule's
    axis_state: ClassVar[frozenset[str]] = frozenset({"u", "sigma", "v"})  # of ranks of their own

    def __init__(
        self,
        params: Iterable[Any],
        *,
        rank: int = 128,
        interval: int = 100,
        probes: int = 10,
        delta: float = 1.0,
        **options: Any,
    ) -> None:
        check_numbers(Range(least=1, whole=True), rank=rank, interval=interval, probes=probes)
        check_numbers(Range(least=0), delta=delta)
        super().__init__(params, **options)
        self.rank, self.interval, self.probes, self.delta = rank, interval, probes, delta

    def probing(self, step: int) -> bool:
        """Whether the gradient is estimated anew in this step."""
        return step % self.interval == 0 or any("sigma" not in self.state[p] for _, p in self._matrices())

    def distribution(self, step: int) -> Directions:
        if self.probing(step):
            return Gaussian()
        kept = {i: self.state[p] for i, p in self._matrices()}
        found = {i: tuple(state[name].cpu() for name in ("u", "sigma", "v")) for i, state in kept.items()}
        return Aligned(found, self.delta)

    def forwards(self, step: int, queries: int) -> int:
        return super().forwards(step, self.probes if step % self.interval == 0 else queries)

    def _scheduled_queries(self, batch: Any) -> int:
        if not self.probing(self.step_count):
            return super()._scheduled_queries(batch)
        return min(self.probes, most_directions(batch)) if self.mode == "split" and batch is not None else self.probes

    def prepare(self, update: Update) -> None:
        if not self.probing(update.step):
            return
        directions, starts = self.directions_of(update.step), self.trainables().starts
        for i, matrix in self._matrices():
            first, last = starts[i], starts[i] + matrix.numel()
            gradient = torch.zeros(last - first, device=matrix.device)
            for query in update.kept:
                gradient.add_(directions.range(query, first, last), alpha=update.coefficients[query])
            u, sigma, v = leading(gradient.view(len(matrix), -1), self.rank)
            self.state[matrix] |= {"u": u, "sigma": sigma, "v": v}

    def _matrices(self) -> list[tuple[int, Tensor]]:
        return [(i, p) for i, p in enumerate(self.trainables().parameters) if p.ndim > 1]


class Aligned(Spanned):
    """z_W = U C V^T.

    Args:
        triplets: number of a parameter -> its gradient's, as estimated.
        delta: squared length of z_W along U diag(sigma) V^T.
    """

    def __init__(self, triplets: Mapping[int, Any], delta: float) -> None:
        self._triplets, self._delta = triplets, delta

    def factors(self, stream: Stream, parameter: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        if parameter not in self._triplets:
            return None
        u, sigma, v = self._triplets[parameter]
        c = fresh_factor(stream, parameter, len(sigma), len(sigma))
        length = float(sigma.norm())
        if length > 0:
            s = sigma / length
            along = float(s @ c.diagonal())
            c.diagonal().sub_(s, alpha=along - copysign(sqrt(self._delta), along))
        return u, c @ v.T


def leading(gradient: Tensor, rank: int) -> Triplets:
    """The leading singular triplets of a matrix (m, n), float32, from the smaller Gram matrix in float64.

    [choice] Signs are such that the largest entry of each vector of the smaller side is positive.
    """
    tall = gradient.shape[0] > gradient.shape[1]
    g = (gradient.T if tall else gradient).double()
    small = torch.linalg.eigh(g @ g.T).eigenvectors.flip(1)[:, :rank]
    small = small * torch.where(small.gather(0, small.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    large, r = torch.linalg.qr(g.T @ small)
    large = large * torch.where(r.diagonal() < 0, -1.0, 1.0)
    u, v = (large, small) if tall else (small, large)
    return u.float().contiguous(), r.diagonal().abs().float(), v.float().contiguous()
