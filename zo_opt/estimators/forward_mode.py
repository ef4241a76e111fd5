"""The exact derivative along each direction, by forward-mode automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_opt.errors import ZOError, reason_of
from zo_opt.estimators.base import Estimate, Estimator, estimate_of
from zo_opt.queries.losses import taken
from zo_opt.queries.modes import Evaluator, Losses
from zo_opt.queries.perturbation import Perturbed
from zo_opt.queries.substitution import Substitution


@dataclass(frozen=True)
class ForwardMode(Estimator):
    """g_q = dL/dtheta . z_q, exact: no zo_eps, no truncation error.

    Use it to tell the noise of directions from the error of zo_eps: it has no zo_eps.

    Source: Baydin et al., arXiv 2202.08587. Counted as two forwards a query: the values and their tangents.

    Raises:
        ZOError: the model has an operation without forward-mode derivative, or the loss does not depend on a trainable
            through torch functions.
    """

    query_modes: ClassVar[tuple[str, ...] | None] = ("sequential", "auto")
    differentiates: ClassVar[bool] = True

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        closure, batch = evaluate.closure, evaluate.batch
        call = closure if batch is None else lambda: closure(batch)
        found = [directional_derivative(evaluate.perturbed, call, query) for query in range(queries)]
        values, projected_grads = (torch.tensor(x, dtype=torch.float64) for x in zip(*found, strict=True))
        projected_grads = torch.where(projected_grads.isfinite() & values.isfinite(), projected_grads, torch.nan)
        ones = torch.ones(queries, dtype=torch.float64)
        return estimate_of(Losses(values[:, None], ones, 2 * queries), projected_grads, values)


def directional_derivative(perturbed: Perturbed, call: Callable[[], Any], query: int) -> tuple[float, float]:
    """The loss, and its exact derivative along one direction.

    Raises:
        ZOError: as said of :class:`ForwardMode`.
    """
    trainables = perturbed.trainables

    def dual(number: int) -> Tensor:
        if not torch._C._is_fwd_grad_enabled():  # inside a torch.autograd.Function: the tangent would be lost
            raise NotImplementedError("a torch.autograd.Function takes a trainable itself: no forward AD through it")
        start, memory = trainables.starts[number], trainables.memory(number)
        z = perturbed.direction(query, start, start + len(memory), memory).to(memory.dtype)
        shape = trainables.shapes[number]
        value: Tensor = forward_ad.make_dual(memory.view(shape), z.view(shape))
        return value

    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it loads its derivatives
        try:
            # The fused attention kernels have no forward-mode derivative.
            with sdpa_kernel(SDPBackend.MATH), Substitution(trainables.index, dual):
                loss = taken(call())
        except (NotImplementedError, RuntimeError) as error:
            if not any(name in str(error) for name in ("forward AD", "forward mode AD", "forward-mode")):
                raise
            raise ZOError(
                f"an operation of this model has no forward-mode derivative ({reason_of(error)}); "
                "use an optimizer that needs losses alone, such as MeZO."
            ) from error
        tangent = forward_ad.unpack_dual(loss).tangent if isinstance(loss, Tensor) else None
        if tangent is None or not isinstance(loss, Tensor):
            raise ZOError(
                "the closure's loss carries no derivative; return a tensor that torch functions make from the "
                "trainables, or use an optimizer that needs losses alone, such as MeZO."
            )
        if loss.numel() != 1:
            raise ZOError(f"the closure returned a tensor of shape {tuple(loss.shape)}; return one loss (a scalar).")
        return float(forward_ad.unpack_dual(loss).primal), float(tangent)
