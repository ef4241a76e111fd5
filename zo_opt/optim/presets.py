"""Named methods that only preset choices. Each function returns what it presets; called by its name, it makes the optimizer.

>>> import torch
>>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
>>> optimizer = AdaZeta([theta], lr=0.05, seed=0, steps_per_epoch=20)
>>> for _ in range(300):
...     loss = optimizer.step(lambda: theta.square().sum())
>>> bool(theta.abs().max() < 1e-2), optimizer.last_record.queries
(True, 2)
>>> optimizer.choices.query_schedule
AdaZetaQueries(alpha=0.85, beta=0.4, max_queries=15, min_queries=1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from zo_opt.choices import option_names
from zo_opt.directions import LowRank, Rademacher, SignFlip, Subspace
from zo_opt.estimators import ForwardMode, OneSided
from zo_opt.optim.choices import Method
from zo_opt.optim.line_search import LineSearch
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.step_control import DivideBySpread
from zo_opt.optim.update_rules import AMSGrad, Momentum, Sign
from zo_opt.schedules import AdaZetaQueries, ConstantQueries, EveryExample

Choose = Callable[..., dict[str, Any]]


class Preset:
    """A named set of choices. Called with parameters and options, it makes a :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`.

    It takes the method's own options, those of :class:`~zo_opt.optim.choices.Choices` that it does not fix, and those of
    :class:`~zo_opt.optim.choices.Setting`.

    Attributes:
        method: name, presets with the own options' defaults, and what cannot be given.
        choose: own options -> presets.
    """

    def __init__(self, name: str, choose: Choose, fixes: Iterable[str]) -> None:
        self.choose = choose
        self.method = Method(name, choose(), frozenset(fixes), tuple(option_names(choose)))
        for attribute in ("__doc__", "__name__", "__qualname__", "__module__"):
            setattr(self, attribute, getattr(choose, attribute))

    def __call__(self, params: Iterable[Any], **options: Any) -> ZerothOrderOptimizer:
        own = {name: options.pop(name) for name in self.method.own if name in options}
        method = Method(self.method.name, self.choose(**own), self.method.fixes, self.method.own)
        return ZerothOrderOptimizer(params, method, **options)


def preset(name: str, *fixes: str) -> Callable[[Choose], Preset]:
    """Decorator: a function that returns presets becomes the method of that name; ``fixes``: choices that cannot be given."""
    return lambda choose: Preset(name, choose, fixes)


@preset("mezo")
def MeZO() -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr * mean_q g_q z_q, with g_q from two forward passes along the seeded direction z_q.

    Use it first, and as what others are compared with: it keeps nothing but the weights.

    Source: arXiv 2305.17333, algorithms 1 and 2. Released values: whole model lr 1e-6, zo_eps 1e-3 (the defaults here); LoRA
    lr 1e-4, zo_eps 1e-2. One query a step unless a schedule is given.
    """
    return {"lr": 1e-6}


@preset("adazeta")
def AdaZeta() -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr * (1/Q_k) sum_q g_q z_q with Q_k = min(max(int(alpha * e_k^beta), 1), Q_max).

    Use it with tensor-train adapters and many epochs, so that its schedule has time to grow.

    Source: arXiv 2406.18060, algorithm 1 and section 3.3. Released values are the defaults (alpha 0.85, beta 0.4, Q_max 15, lr 1e-4,
    zo_eps 1e-3, weight decay 0.01).
    """
    return {"lr": 1e-4, "weight_decay": 0.01, "query_schedule": AdaZetaQueries()}


@preset("zo-sign", "update_rule")
def ZOSign() -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr * sign(mean_q g_q z_q): every entry moves by lr, in parameter units.

    Use it where the scale of gradients is not known: each number moves by lr, whatever the loss says.

    Source: Liu et al., "signSGD via zeroth-order oracle", ICLR 2019; in ZO-Bench, arXiv 2402.11592.
    """
    return {"lr": 1e-6, "update_rule": Sign()}


@preset("zo-momentum", "update_rule")
def ZOMomentum(beta: float = 0.9) -> dict[str, Any]:  # noqa: N802
    """m <- beta m + mean_q g_q z_q;  theta <- theta - lr * m.

    Use it where single estimates are noisy and there is room for one more number for each trained one.

    Source: ZO-SGD-MMT in ZO-Bench, arXiv 2402.11592; the convention is :class:`~zo_opt.optim.Momentum`'s.

    Args:
        beta: decay of the momentum, in [0, 1).
    """
    return {"lr": 1e-6, "update_rule": Momentum(beta)}


@preset("zo-adam", "update_rule")
def ZOAdam(beta1: float = 0.9, beta2: float = 0.999, adam_eps: float = 1e-8) -> dict[str, Any]:  # noqa: N802
    """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- max(w, v);  theta <- theta - lr * m / (sqrt(w) + eps).

    Use it for comparison with published ZO-AdaMM; plain steps with a tuned lr are hard to beat.

    g = mean_q g_q z_q. Source: ZO-AdaMM, arXiv 1910.06513, algorithm 1 (no bias correction); ZO-Bench's ZO-Adam.

    Args:
        beta1, beta2: decays, in [0, 1).
        adam_eps: added to the denominator.
    """
    return {"lr": 1e-4, "update_rule": AMSGrad(beta1, beta2, adam_eps)}


@preset("zo-conservative", "line_search", "update_rule")
def ZOConservative() -> dict[str, Any]:  # noqa: N802
    """theta <- argmin of the loss over {theta, theta - lr g, theta + lr g}, g = mean_q g_q z_q.

    Use it where a bad step costs much: it looks at the loss before it moves.

    Source: ZO-SGD-Cons in ZO-Bench, arXiv 2402.11592, after Kim et al., arXiv 2109.13391. Three forwards a step more than MeZO.
    [choice] Weight decay is applied after the choice.
    """
    return {"lr": 1e-6, "line_search": LineSearch((0.0, 1.0, -1.0))}


@preset("lozo", "directions")
def LOZO(rank: int = 2, interval: int = 50) -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr * mean_q g_q z_q / r, z_W = U V^T for every matrix W, with U fresh in every step and V kept for nu steps.

    Use it on whole models, whose gradients are nearly of low rank.

    Source: arXiv 2410.07698, algorithm 1 (losses at W +- zo_eps U V^T, without 1/r); parameters of one axis get Gaussian directions.

    Args:
        rank: r.
        interval: nu, in steps.
    """
    return {"lr": 1e-6, "directions": LowRank(rank, interval)}


@preset("subzero", "directions")
def SubZero(rank: int = 32, interval: int = 500) -> dict[str, Any]:  # noqa: N802
    """MeZO along z_W = U Z V^T for every matrix W, U and V with orthonormal columns refreshed every F steps, Z (r, r) fresh.

    Use it on whole models for many steps, where a subspace of each matrix is searched before the next is drawn.

    Source: arXiv 2410.08989, algorithm 1; parameters of one axis get Gaussian directions.

    Args:
        rank: r.
        interval: F, in steps.
    """
    return {"lr": 1e-6, "directions": Subspace(rank, interval)}


@preset("fzoo", "estimator")
def FZOO() -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr / (N sigma) * sum_i (l_i - l_0) z_i, sigma = std(l_i), z_i of signs: N + 1 forwards a step.

    Use it where a forward pass over several copies is cheap: one-sided queries cost half, and the spread sets the step's length.

    Source: arXiv 2506.09034, algorithm 1. Not divided by zo_eps: lr is in parameter units a step, up to 1 / sqrt(N). N is the query
    schedule, at least 2; 8 by default. In split mode l_0 is that of the query's slice and sigma the spread of the differences.
    """
    return {
        "lr": 1e-5,
        "estimator": OneSided(),
        "directions": Rademacher(),
        "query_schedule": ConstantQueries(8),
        "step_control": (DivideBySpread(),),
    }


@preset("grzo")
def GRZO() -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr * mean_i d_i / std(d) * z_i, d_i the two-sided difference of example i along its own direction z_i.

    Use it where the batch has many rows: each has a direction of its own, for two forward passes in all.

    Source: arXiv 2606.02857. Directions are sign-flip factorised (:class:`~zo_opt.directions.SignFlip`); query mode is split
    with as many queries as examples (a schedule given here may ask for fewer). lr is in parameter units a step. Needs ``module``.
    """
    return {
        "lr": 1e-5,
        "directions": SignFlip(),
        "query_schedule": EveryExample(),
        "query_mode": "split",
        "step_control": (DivideBySpread(),),
    }


@preset("forward-gradient", "estimator", "zo_eps")
def ForwardGradient() -> dict[str, Any]:  # noqa: N802
    """theta <- theta - lr * mean_q (dL/dtheta . z_q) z_q, the derivative exact: no zo_eps, no backward pass.

    Use it to see what exact derivatives along directions would give; it needs a model that torch can differentiate forward.

    Source: Baydin et al., arXiv 2202.08587; in ZO-Bench, arXiv 2402.11592. Needs a model whose operations all have forward-mode
    derivatives and a closure that returns the loss as a tensor. Counted as two forwards a query; activations carry tangents,
    twice the memory of a forward. Sequential only.
    """
    return {"lr": 1e-6, "estimator": ForwardMode()}
