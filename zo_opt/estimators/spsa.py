"""Estimators: losses at perturbed points -> derivatives along directions. Pure functions; they know nothing of update rules.

``evaluate`` is anything that maps (queries, scales) to :class:`~zo_opt.queries.modes.Losses`, such as an
:class:`~zo_opt.queries.modes.Evaluator` over a closure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_opt.directions import Stream
from zo_opt.errors import ZOError
from zo_opt.privacy import GaussianPrivacy
from zo_opt.queries.modes import Evaluator, Losses
from zo_opt.queries.perturbation import Perturbed, Point
from zo_opt.queries.substitution import Substitution

Evaluate = Callable[..., Losses]


@dataclass(frozen=True)
class Estimate:
    """What one estimate found.

    Attributes:
        loss: mean loss over the queries with finite losses (nan where there is none).
        projected_grads: float64, shape (queries,); the derivative along each direction, nan where a loss was not finite.
        weights: float64, shape (queries,); the weight of each direction in the mean gradient, ones unless split unevenly.
        forwards: forward passes spent.
        curvatures: float64, shape (queries,): (l+ + l- - 2 l0) / zo_eps^2, the second derivative along each direction; None
            where it was not asked for.
        seeds: (seed, step, query) of each direction.
    """

    loss: float
    projected_grads: Tensor
    weights: Tensor
    forwards: int
    curvatures: Tensor | None = None
    seeds: tuple[Stream, ...] = ()

    @property
    def dropped(self) -> int:
        """Queries whose losses were not finite."""
        return int(self.projected_grads.isnan().sum())

    @property
    def spread(self) -> float:
        """Standard deviation of the finite projected gradients (nan below two of them)."""
        finite = self.projected_grads[self.projected_grads.isfinite()]
        return float(finite.std()) if len(finite) > 1 else float("nan")


def two_sided(evaluate: Evaluate, queries: int, zo_eps: float, *, curvature: bool = False) -> Estimate:
    """Two-sided SPSA: g_q = (L(theta + zo_eps z_q) - L(theta - zo_eps z_q)) / (2 zo_eps).

    Source: Spall 1992; MeZO, arXiv 2305.17333, definition 1. The gradient estimate is the mean of g_q z_q. In split mode with as
    many queries as examples this is GRZO's estimate (arXiv 2606.02857): one direction an example.

    Args:
        evaluate: the losses.
        queries: directions.
        zo_eps: perturbation scale, in parameter units.
        curvature: also evaluate at theta (one more forward), for the second derivatives.

    >>> theta, z = 3.0, 1.0
    >>> def evaluate(queries, scales):
    ...     values = torch.tensor([[(theta + s * z) ** 2 for s in scales]] * queries, dtype=torch.float64)
    ...     return Losses(values, torch.ones(queries, dtype=torch.float64), queries * len(scales))
    >>> round(two_sided(evaluate, 1, 1e-3).projected_grads.item(), 6)
    6.0
    """
    losses = evaluate(queries, (zo_eps, -zo_eps), **({"base": True} if curvature else {}))
    up, down = losses.values.unbind(dim=1)
    curvatures = None
    finite = losses.values.isfinite().all(dim=1)
    if losses.base is not None:
        finite &= losses.base.isfinite()
        curvatures = torch.where(finite, (up + down - 2 * losses.base) / zo_eps**2, torch.nan)
    projected_grads = torch.where(finite, (up - down) / (2 * zo_eps), torch.nan)
    return _estimate(losses, projected_grads, losses.values.mean(dim=1), curvatures)


def one_sided(evaluate: Evaluate, queries: int, zo_eps: float) -> Estimate:
    """One-sided differences from a shared base loss: g_q = (L(theta + zo_eps z_q) - L(theta)) / zo_eps, in Q + 1 forwards.

    Source: FZOO, arXiv 2506.09034. In split mode a step costs two forwards and the base loss is that of the query's slice.
    """
    losses = evaluate(queries, (zo_eps,), base=True)
    assert losses.base is not None
    projected_grads = (losses.values[:, 0] - losses.base) / zo_eps
    projected_grads = torch.where(projected_grads.isfinite(), projected_grads, torch.nan)
    return _estimate(losses, projected_grads, losses.base)


def control_variate(evaluate: Evaluate, anchor: Tensor, queries: int, zo_eps: float) -> Estimate:
    """Two-sided differences at theta less those at ``anchor`` along the same directions: g_q(theta) - g_q(anchor).

    Source: MeZO-SVRG, arXiv 2404.08080, algorithm 1. Four forwards a query.
    """
    here = two_sided(evaluate, queries, zo_eps)
    there = two_sided(lambda q, scales: evaluate(q, scales, anchor=anchor), queries, zo_eps)
    projected_grads = here.projected_grads - there.projected_grads
    return Estimate(
        here.loss, projected_grads, here.weights, here.forwards + there.forwards, seeds=here.seeds
    )  # fmt: skip


def forward_gradient(perturbed: Perturbed, call: Callable[[], Any], queries: Sequence[int]) -> Estimate:
    """The exact derivative along each direction, by forward-mode automatic differentiation: no zo_eps, no truncation error.

    Source: Baydin et al., arXiv 2202.08587. Counted as two forwards a query: the values and their tangents.

    Args:
        perturbed: trainables and directions.
        call: the closure; must return the loss as a tensor.
        queries: numbers of the directions.

    Raises:
        ZOError: the model has an operation without forward-mode derivative, or the loss does not depend on a trainable
            through torch functions.
    """
    trainables = perturbed.trainables
    losses, grads = [], []
    for query in queries:
        with warnings.catch_warnings(), forward_ad.dual_level():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it loads its derivatives

            def dual(number: int, query: int = query) -> Tensor:
                if not torch._C._is_fwd_grad_enabled():  # inside a torch.autograd.Function: the tangent would be lost
                    raise NotImplementedError(
                        "a torch.autograd.Function takes a trainable itself: no forward AD through it"
                    )
                start, memory = trainables.starts[number], trainables.memory(number)
                z = perturbed.direction(query, start, start + len(memory), memory).to(memory.dtype)
                shape = trainables.shapes[number]
                value: Tensor = forward_ad.make_dual(memory.view(shape), z.view(shape))
                return value

            try:
                # The fused attention kernels have no forward-mode derivative.
                with sdpa_kernel(SDPBackend.MATH), Substitution(trainables.index, dual):
                    loss = call()
            except (NotImplementedError, RuntimeError) as error:
                if not any(name in str(error) for name in ("forward AD", "forward mode AD", "forward-mode")):
                    raise
                raise ZOError(
                    f"an operation of this model has no forward-mode derivative ({str(error).splitlines()[0]}); "
                    "use an optimizer that needs losses alone, such as MeZO."
                ) from error
            tangent = forward_ad.unpack_dual(loss).tangent if isinstance(loss, Tensor) else None
            if tangent is None:
                raise ZOError(
                    "the closure's loss carries no derivative; return a tensor that torch functions make from the "
                    "trainables, or use an optimizer that needs losses alone, such as MeZO."
                )
            if loss.numel() != 1:
                raise ZOError(
                    f"the closure returned a tensor of shape {tuple(loss.shape)}; return one loss (a scalar)."
                )
            losses.append(float(forward_ad.unpack_dual(loss).primal))
            grads.append(float(tangent))
    values, projected_grads = (torch.tensor(x, dtype=torch.float64) for x in (losses, grads))
    projected_grads = torch.where(projected_grads.isfinite() & values.isfinite(), projected_grads, torch.nan)
    seeds = tuple(perturbed.directions.stream(q) for q in queries)
    ones = torch.ones(len(queries), dtype=torch.float64)
    return _estimate(Losses(values[:, None], ones, 2 * len(queries), seeds=seeds), projected_grads, values)


def private_two_sided(evaluator: Evaluator, queries: int, zo_eps: float, privacy: GaussianPrivacy) -> Estimate:
    """Two-sided differences of every example, of which only clipped and noisy sums are released.

    Source: DPZero, arXiv 2310.09639, algorithm 2. The raw losses stay here: the estimate's loss is nan, and no query is dropped.

    Args:
        evaluator: its closure returns a loss for each example, shape (examples,), each of which depends on no other example.
        queries: directions.
        zo_eps: perturbation scale, in parameter units.
        privacy: clips and hides.

    Raises:
        ZOError: the closure's losses are no vector, or of another length on the other side.
    """
    directions = evaluator.perturbed.directions
    found: list[Tensor] = []

    def call() -> float:
        losses = evaluator.closure() if evaluator.batch is None else evaluator.closure(evaluator.batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            shape = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ZOError(
                f"the closure returned {shape}; with privacy it must return a loss for each example, a tensor of shape (examples,)."
            )
        found.append(losses.detach().double())
        return 0.0

    points = [Point(((query, scale),)) for query in range(queries) for scale in (zo_eps, -zo_eps)]
    losses = []
    for _ in evaluator.perturbed.losses(call, points):
        losses.append(found[-1])  # the first point may have been evaluated twice
        found.clear()
    if len({len(values) for values in losses}) > 1:
        raise ZOError("the closure returned losses of different numbers of examples within a step; give it one batch.")
    privacy.charge(directions.step, queries)
    grads = [
        privacy.release((up - down) / (2 * zo_eps), directions.step, query)
        for query, (up, down) in enumerate(zip(losses[::2], losses[1::2], strict=True))
    ]
    ones, seeds = torch.ones(queries, dtype=torch.float64), tuple(directions.stream(q) for q in range(queries))
    return Estimate(float("nan"), torch.tensor(grads, dtype=torch.float64), ones, 2 * queries, None, seeds)


def combine(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates along the same directions (micro-batches of equal size); a query dropped in one is dropped."""
    losses = [e.loss for e in estimates if e.loss == e.loss]
    curvatures = [e.curvatures for e in estimates if e.curvatures is not None]
    return Estimate(
        sum(losses) / len(losses) if losses else float("nan"),
        torch.stack([e.projected_grads for e in estimates]).mean(dim=0),
        torch.stack([e.weights for e in estimates]).mean(dim=0),
        sum(e.forwards for e in estimates),
        torch.stack(curvatures).mean(dim=0) if curvatures else None,
        estimates[0].seeds,
    )


def _estimate(
    losses: Losses, projected_grads: Tensor, loss_of_query: Tensor, curvatures: Tensor | None = None
) -> Estimate:
    weights = losses.weights * projected_grads.isfinite()
    mean = (loss_of_query.nan_to_num(0, 0, 0) * weights).sum() / weights.sum()
    return Estimate(float(mean), projected_grads, losses.weights, losses.forwards, curvatures, losses.seeds)
