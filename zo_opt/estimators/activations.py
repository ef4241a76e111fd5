"""Estimators whose queries shift inner activations of adapters instead of weights.

Shape suffixes: N sequences, T answer tokens, M = valid answer positions, Q queries, D inner activations, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.directions import StepDirections
from zo_opt.errors import ZOError
from zo_opt.estimators.base import Estimate, Estimator
from zo_opt.estimators.feedback import Feedback, spsa
from zo_opt.queries.activations import Observed, Sites, sites_of
from zo_opt.queries.losses import as_scalar, taken
from zo_opt.queries.modes import Evaluator

TRIES = 3  # of the scale of shifts, before the first step
LOOKED_AT = 20  # steps after which it is clear whether the mean Jacobian foretells anything
FORETOLD = 0.05  # of the derivatives' squares: 0.1 to 0.24 on labels, 0.02 on a chat


@dataclass(frozen=True)
class Measured:
    """What a step's queries said, of those that were finite.

    Attributes:
        v_QMD: directions.
        y_QM: the loss's derivatives along them.
        s_QMH: responses of the body's output z; None where the loss is a number.
        e_MH: dL/dz; None with it.
        own: whether y is each position's own.
    """

    v_QMD: Tensor
    y_QM: Tensor
    s_QMH: Tensor | None
    e_MH: Tensor | None
    own: bool


@dataclass(frozen=True)
class Activations(Estimator):
    """dL/dh of the adapters' inner activations h by SPSA, on to the parameters by the exact chain rule within each adapter.

    Use it for adapters on answers, where nothing should be remembered from step to step.

    Every answer position has directions of its own, so that a query splits the batch for nothing. The closure is run once at the
    weights; if it returns a loss that torch can differentiate from the body's output on, a query is one shifted forward up to there,
    and the rest is exact. If it returns a number, or one a sequence (a reward), a query is a shifted run of the closure. Differences are
    one-sided: what is wanted moves linearly in zo_eps to first order, and the even part cancels on average. A closure that writes runs the
    model once a token: then a direction serves for all that is written of a sequence.

    ``zo_eps`` is how far a query moves the body's output, as a share of it (root mean squares over all answer positions): the shift that
    does so is found before the first step, for it hangs on the model, its sizes and its sites. In bf16 it must stand out of the noise.

    Source: node perturbation, Ren et al., arXiv 2210.03310, section 3; here with the loss's own end exact.
    """

    forwards_per_query: ClassVar[int] = 1
    forwards_per_step: ClassVar[int] = 1
    forwards_at_start: ClassVar[int] = TRIES
    query_modes: ClassVar[tuple[str, ...] | None] = ("sequential", "distributed")
    gives_gradient: ClassVar[bool] = True

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        if evaluate.ranks is not None and evaluate.ranks.options.share != "queries":
            raise ZOError(
                f"share={evaluate.ranks.options.share!r} averages losses over rows of several processes, and activations belong to rows; with "
                "queries on activations share queries."
            )
        sites = sites_of(evaluate.module)
        closure, batch = evaluate.closure, evaluate.batch
        call = lambda: taken(closure() if batch is None else closure(batch))  # noqa: E731
        seen = sites.observe(call)
        valid_NT = seen.valid_NT
        if seen.slope_NTH is not None:  # the answer's last token says nothing of the loss
            valid_NT = valid_NT & (seen.slope_NTH != 0).any(-1)
        v_QNTD = self._directions(evaluate, queries, (*valid_NT.shape, sites.width)).to(seen.end_NTH.device)
        tries = 0
        if "shift" not in evaluate.memory:
            evaluate.memory["shift"], tries = _shift(sites, call, seen, v_QNTD[:1], zo_eps), TRIES
        shift = float(evaluate.memory["shift"])
        e_MH: Tensor | None = None
        s_QMH: Tensor | None = None
        if seen.slope_NTH is not None:
            s_QNTH = self._responses(evaluate, sites, call, seen, v_QNTD, shift)
            e_MH, s_QMH = seen.slope_NTH[valid_NT].float(), s_QNTH[:, valid_NT]
            y_QM = torch.einsum("mh,qmh->qm", e_MH.double(), s_QMH)
        else:
            y_QM = self._differences(evaluate, sites, call, seen, v_QNTD, shift)
        # A number of the whole batch, or of a sequence with several positions, is no position's own.
        own = s_QMH is not None or (_is_a_row_each(seen.loss, len(valid_NT)) and bool((valid_NT.sum(1) == 1).all()))
        v_QMD = v_QNTD[:, valid_NT]
        loss = as_scalar(seen.loss.float().mean() if isinstance(seen.loss, Tensor) else seen.loss)
        finite = y_QM.isfinite().all(1) & torch.tensor(loss).isfinite()
        slopes_Q = torch.where(finite, y_QM.sum(1), torch.nan)
        gradient = None
        if bool(finite.any()):
            measured = Measured(v_QMD[finite], y_QM[finite], None if s_QMH is None else s_QMH[finite], e_MH, own)
            delta_NTD = torch.zeros(*valid_NT.shape, sites.width, dtype=torch.float64, device=valid_NT.device)
            delta_NTD[valid_NT] = self.delta(evaluate.memory, measured).to(delta_NTD.device)
            gradient = _on_axis(evaluate, sites, sites.gradients(seen, delta_NTD))
        ones, forwards = torch.ones(queries, dtype=torch.float64), queries + 1 + tries
        parts = v_QNTD.split(seen.at_once if s_QMH is not None else 1)
        tokens = (1 + tries) * seen.tokens(1) + sum(seen.tokens(len(part)) for part in parts)
        return Estimate(loss, slopes_Q.cpu(), ones, forwards, gradient=gradient, tokens=tokens)

    def delta(self, memory: dict[str, Tensor], measured: Measured) -> Tensor:
        """dL/dh, (M, D) float64.

        Args:
            memory: what the estimator keeps from step to step, by name.
            measured: this step's.
        """
        return spsa(measured.v_QMD, measured.y_QM)

    def _directions(self, evaluate: Evaluator, queries: int, shape: tuple[int, ...]) -> Tensor:
        """v (Q, N, T, D): what the optimizer's directions are over an axis of these entries."""
        of_weights = evaluate.perturbed.directions
        kind, axis = of_weights.kind, torch.empty(shape)
        step = StepDirections(kind, of_weights.seed, of_weights.step, [axis.flatten()])
        return torch.stack([step.range(query, 0, axis.numel()).view(shape) for query in range(queries)])

    def _responses(
        self, evaluate: Evaluator, sites: Sites, call: Callable[[], Any], seen: Observed, v_QNTD: Tensor, shift: float
    ) -> Tensor:
        """s (Q, N, T, H) float64: the difference quotient of the body's output along each direction."""
        parts = v_QNTD.split(seen.at_once)
        width = seen.at_once * seen.end_NTH.numel()

        def run(first: int, last: int) -> Tensor:
            found = [torch.empty(0, dtype=torch.float64)]
            for v in parts[first:last]:
                moved = (sites.ends(call, shift * v).double() - seen.end_NTH.double()) / shift
                found.append(torch.nn.functional.pad(moved.flatten().cpu(), (0, width - moved.numel())))
            return torch.cat(found)

        found = evaluate.over_ranks(len(parts), run, width=width)
        return found[: v_QNTD.shape[0] * seen.end_NTH.numel()].view(-1, *seen.end_NTH.shape).to(v_QNTD.device)

    def _differences(
        self, evaluate: Evaluator, sites: Sites, call: Callable[[], Any], seen: Observed, v_QNTD: Tensor, shift: float
    ) -> Tensor:
        """y (Q, M) float64 from what the closure returns: one number, or one a sequence, the mean of which is the loss."""
        sequences, tokens = seen.valid_NT.shape
        here_N = _row_values(seen.loss, sequences)

        def run(first: int, last: int) -> Tensor:
            found = [(_row_values(sites.loss(call, shift * v), sequences) - here_N) / shift for v in v_QNTD[first:last]]
            return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

        count = len(v_QNTD)
        y_QN = evaluate.over_ranks(count, run, width=sequences)
        y_QNT = y_QN.view(count, sequences, 1).expand(-1, -1, tokens).to(seen.valid_NT.device)
        return y_QNT[:, seen.valid_NT]


@dataclass(frozen=True)
class LearnedFeedback(Activations):
    """:class:`Activations` that remembers: the mean Jacobian from inner activations to the body's output, and how positions differ from it.

    Use it for adapters on answers that are labels; it is the default of ``zo-opt train`` there. On texts the mean Jacobian foretells next to
    nothing, and what it says wrong is the same in every step: :class:`Activations` learns them. After 20 steps a warning says so.

    The equations stand in :mod:`zo_opt.estimators.feedback`. Where the closure returns a number without gradient there is no Jacobian to
    learn, and the prior alone serves. What it remembers is part of the optimizer's state; a run cannot be replayed from
    projected gradients alone.

    Args:
        forgetting: what measurements of the step before count.
        ridge: of the regression, in measurements.
        rate: of expectation maximisation; 0: the mean Jacobian alone.
        noise: variance of a measurement, as a share of what the mean leaves open.
        unbiased: the mean as a control variate, and SPSA of what it leaves open, in place of the prior.

    Raises:
        ZOError: impossible values.
    """

    forgetting: float = 0.98
    ridge: float = 300.0
    rate: float = 0.1
    noise: float = 0.01
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_numbers(Range(least=0, most=1), forgetting=self.forgetting, rate=self.rate)
        check_numbers(Range(above=0), ridge=self.ridge, noise=self.noise)

    def delta(self, memory: dict[str, Tensor], measured: Measured) -> Tensor:
        if not measured.own:
            return super().delta(memory, measured)
        v_QMD, y_QM, s_QMH, e_MH = measured.v_QMD.cpu(), measured.y_QM.cpu(), measured.s_QMH, measured.e_MH
        width, hidden = v_QMD.shape[-1], 0 if s_QMH is None else s_QMH.shape[-1]
        if "products_DD" not in memory:
            memory.update(vars(Feedback.fresh(width, hidden, self.ridge)))
        feedback = Feedback(*(memory[name] for name in ("products_DD", "responses_DH", "spread_DD")))
        if s_QMH is None or e_MH is None:
            mean_MD = torch.zeros(v_QMD.shape[1:], dtype=torch.float64)
            size_M = torch.ones(len(mean_MD), dtype=torch.float64)
        else:
            if len(v_QMD) < width:  # else the queries tell all, and a mean is not needed
                self._look(memory, feedback, v_QMD, y_QM, e_MH.cpu())
            feedback.learn(v_QMD, s_QMH.cpu(), self.forgetting)
            size_M = e_MH.double().norm(dim=1).cpu()
            mean_MD = feedback.mean(e_MH.cpu())
        if self.unbiased:
            found = mean_MD + spsa(v_QMD, y_QM - torch.einsum("qmd,md->qm", v_QMD.double(), mean_MD))
        elif self.rate == 0:
            found = mean_MD
        else:
            there = size_M > 0
            unit_M = torch.where(there, size_M, 1.0)
            shares_M = size_M / size_M.sum().clamp(min=1e-300)
            u_MD = feedback.posterior(mean_MD / unit_M[:, None], v_QMD, y_QM / unit_M, shares_M, self.rate, self.noise)
            found = u_MD * unit_M[:, None] * there[:, None]
        memory.update(vars(feedback))
        return found

    def _look(self, memory: dict[str, Tensor], feedback: Feedback, v_QMD: Tensor, y_QM: Tensor, e_MH: Tensor) -> None:
        """Warn, once, where the mean of the steps before says next to nothing of what is measured after; later steps are not looked at."""
        known = memory.get("foretold", torch.zeros(3, dtype=torch.float64))
        if known[2] == LOOKED_AT:
            return
        y_QM, foretold_QM = y_QM.double(), torch.einsum("qmd,md->qm", v_QMD.double(), feedback.mean(e_MH))
        now = [(y_QM - foretold_QM).square().sum(), y_QM.square().sum(), torch.ones((), dtype=torch.float64)]
        memory["foretold"] = sums = known + torch.stack(now)
        left, all_, steps = sums.tolist()
        if steps == LOOKED_AT and all_ - left < FORETOLD * all_:
            warnings.warn(
                f"learned feedback foretold {max(1 - left / all_, 0):.0%} of what {LOOKED_AT} steps measured, and may lead to a higher loss; "
                'give estimator="activations".',
                stacklevel=2,
            )


def _shift(sites: Sites, call: Callable[[], Any], seen: Observed, v_CNTD: Tensor, share: float) -> Tensor:
    """The scale of shifts that moves the body's output by this share of itself; float64.

    Raises:
        ZOError: no shift moves it.
    """
    shift, valid = share, seen.valid_NT
    for _ in range(TRIES):
        moved = (sites.ends(call, shift * v_CNTD)[0] - seen.end_NTH)[valid].double()
        ratio = float(moved.norm() / seen.end_NTH[valid].double().norm())
        if not 0 < ratio < float("inf"):
            raise ZOError(
                "shifting the adapters' inner activations does not move the model's output; adapt other modules."
            )
        # Far from the linear range a step to it must not be trusted; noise of a narrow dtype looks like a response.
        shift *= min(max(share / ratio, 0.1), 10.0)
    return torch.tensor(shift, dtype=torch.float64)


def _on_axis(evaluate: Evaluator, sites: Sites, gradients: list[Tensor]) -> Tensor:
    """Gradients of the sites' parameters along the optimizer's axis, float32.

    Raises:
        ZOError: the optimizer has parameters that the sites do not reach.
    """
    found = {id(p): g for p, g in zip(sites.parameters, gradients, strict=True)}
    trainables = evaluate.perturbed.trainables.parameters
    if missing := sum(id(p) not in found for p in trainables):
        raise ZOError(
            f"{missing} of the optimizer's parameters are not in the module given; pass the module that owns them."
        )
    return torch.cat([found[id(p)].float().flatten() for p in trainables])


def _row_values(value: Any, sequences: int) -> Tensor:
    """What a closure returned, as each sequence's share of the loss, (N,) float64; one number is that of the whole batch for each.

    A row may be several sequences (one a label), which stand together.
    """
    if isinstance(value, Tensor) and value.ndim == 1 and len(value) > 0 and sequences % len(value) == 0:
        return (value.detach().double().cpu() / len(value)).repeat_interleave(sequences // len(value))
    return torch.full((sequences,), as_scalar(value), dtype=torch.float64)


def _is_a_row_each(value: Any, sequences: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (sequences,)
