"""Which zo_eps, lr and precision a model, adapter and task can bear: measured, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters import trainable_parameters
from zo_opt.diagnosis import EPS_GRID
from zo_opt.diagnosis.trials import Trial, best_trial, try_learning_rates
from zo_opt.directions import DIRECTIONS, StepDirections
from zo_opt.errors import ZOError
from zo_opt.estimators import TwoSided, TwoSidedWithCurvature, directional_derivative
from zo_opt.queries.copies import Limits
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.nesting import map_tensors
from zo_opt.queries.perturbation import Perturbed
from zo_opt.queries.trainables import Trainables
from zo_opt.record.progress import Reporter, Tracker
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import Examples, load_examples
from zo_opt.training.recipe import lr_is_a_length
from zo_opt.training.setup import Tools, build_tools


@dataclass(frozen=True)
class Form:
    """What one precision gives at every zo_eps, along the same directions and examples.

    Attributes:
        precision: "fp32" or "mixed".
        correlations: of the projected gradients with the exact ones.
        errors: root mean square of the difference, relative to the exact ones.
        ties: share of queries whose two losses were equal to the bit.
        dropped: share of queries with a loss that was not finite.
    """

    precision: str
    correlations: tuple[float, ...]
    errors: tuple[float, ...]
    ties: tuple[float, ...]
    dropped: tuple[float, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, and what follows.

    Attributes:
        eps_grid: the perturbation scales.
        forms: the precision asked for, and fp32 beside it.
        reference: where the exact projected gradients come from.
        queries, trainables: how many.
        slope: root mean square of the exact projected gradients.
        curvature: mean second derivative z^T H z along the directions.
        roughness: its mean absolute value, which takes its place where the mean is not positive.
        zo_eps: recommended.
        lr, step: what follows from slope and curvature: lr for SGD with one query a step, step for rules whose lr is in parameter units
            a step (Adam, sign, fzoo, grzo).
        trials: short trainings with that learning rate and smaller ones; empty where none was asked for.
        advice: sentences.
    """

    eps_grid: tuple[float, ...]
    forms: tuple[Form, ...]
    reference: str
    queries: int
    trainables: int
    slope: float
    curvature: float
    roughness: float
    zo_eps: float
    lr: float
    step: float
    trials: tuple[Trial, ...]
    advice: tuple[str, ...]


def diagnose(
    config: TrainConfig,
    reporter: Reporter,
    *,
    queries: int = 48,
    eps_grid: Sequence[float] = EPS_GRID,
    trial_steps: int = 0,
) -> Diagnosis:
    """Projected gradients over a grid of zo_eps against exact ones, and curvature, one direction an example; then short trainings.

    Raises:
        ZOError: a mistake in the options or files; or no finite loss anywhere.
    """
    asked = "--estimator two-sided " if config.on_activations else ""
    config = replace(config, prompt_cache_mb=0, estimator=config.estimator or "two-sided")  # queries on weights
    config.check()
    if queries < 2 or len(eps_grid) == 0 or min(eps_grid) <= 0:
        raise ZOError("diagnose needs at least 2 queries and positive values in eps_grid.")
    examples = load_examples(config, reporter)
    exact = build_tools(replace(config, precision="fp32"), examples, reporter)
    chosen = _same_adapters(config, examples, reporter, exact)
    forms = [exact] if chosen is None else [chosen, exact]
    probes = [_Probe(config, tools, queries) for tools in forms]
    with reporter.track("measuring", queries * (1 + 2 * len(eps_grid) * len(forms)), "losses") as tracker:
        reference, source = probes[-1].exact(tracker)
        measured = [[probe.projected_grads(eps, tracker) for eps in eps_grid] for probe in probes]
        found = tuple(_compare(t.precision, grads, reference) for t, grads in zip(forms, measured, strict=True))
        zo_eps = best_zo_eps(eps_grid, found[0].correlations)
        curvature, roughness = probes[-1].curvature(max(zo_eps, 1e-2))
    slope = float(reference[reference.isfinite()].square().mean().sqrt())
    bend = curvature if curvature > 0 else max(roughness, 1e-12)
    lr, step = 1 / bend, slope / bend
    trials: list[Trial] = []
    tools = forms[0]
    if (
        trial_steps and not config.private and tools.model.schedule is None
    ):  # an adapter that changes could not be put back
        most = step if lr_is_a_length(config) else lr
        trials = try_learning_rates(replace(config, zo_eps=zo_eps), tools, most, trial_steps, reporter)
    result = Diagnosis(
        tuple(eps_grid), found, source, queries, probes[0].trainables.total, slope, curvature, roughness, zo_eps, lr, step,
        tuple(trials), (),
    )  # fmt: skip
    return replace(result, advice=tuple(advise(result, length=lr_is_a_length(config), asked=asked)))


class _Probe:
    """One model in one precision, with fixed directions and examples."""

    def __init__(self, config: TrainConfig, tools: Tools, queries: int) -> None:
        self._tools, self._size = tools, min(config.batch_size, len(tools.train), queries)
        self._kind, self._seed = DIRECTIONS.make(config.directions or "rademacher"), config.seed
        self._batches = -(-queries // self._size)
        self.trainables, self._limits = Trainables(trainable_parameters(tools.model)), Limits()

    def _evaluators(self) -> list[Evaluator]:
        tools = self._tools
        found = []
        for step in range(self._batches):
            directions = StepDirections(self._kind, self._seed, step, self.trainables.parameters)
            indices = [(step * self._size + i) % len(tools.train) for i in range(self._size)]
            perturbed = Perturbed(self.trainables, directions)
            batch = tools.train.batch(indices)
            found.append(Evaluator(perturbed, self._loss, batch, "split", tools.model, limits=self._limits))
        return found

    def _loss(self, batch: Any) -> Tensor:
        return self._tools.train.loss(self._tools.model, batch)

    @torch.no_grad()
    def projected_grads(self, zo_eps: float, tracker: Tracker) -> Tensor:
        """float64, (batches * size,); nan where a loss was not finite."""
        grads = []
        for evaluator in self._evaluators():
            grads.append(TwoSided()(evaluator, self._size, zo_eps).projected_grads)
            tracker.advance(2 * self._size)
        return torch.cat(grads)

    @torch.no_grad()
    def exact(self, tracker: Tracker) -> tuple[Tensor, str]:
        """By forward-mode differentiation; by differences at zo_eps 1e-2 where the model has none."""
        try:
            grads = []
            for evaluator in self._evaluators():
                for query in range(self._size):
                    example = map_tensors(itemgetter(slice(query, query + 1)), evaluator.batch)
                    call = partial(self._loss, example)
                    grads.append(directional_derivative(evaluator.perturbed, call, query)[1])
                    tracker.advance(1)
            return torch.tensor(grads, dtype=torch.float64), "forward-mode derivatives in fp32"
        except ZOError:
            return self.projected_grads(1e-2, tracker), "differences in fp32 at zo_eps 0.01"

    @torch.no_grad()
    def curvature(self, zo_eps: float) -> tuple[float, float]:
        """Mean and mean absolute value of z^T H z over directions and examples."""
        found = [TwoSidedWithCurvature()(e, self._size, zo_eps).curvatures for e in self._evaluators()]
        curvatures = torch.cat([c for c in found if c is not None])
        finite = curvatures[curvatures.isfinite()]
        return float(finite.mean()), float(finite.abs().mean())


def _same_adapters(config: TrainConfig, examples: Examples, reporter: Reporter, exact: Tools) -> Tools | None:
    """The model in the precision asked for, with the fp32 model's adapters; None where that is fp32."""
    tools = build_tools(config, examples, reporter)
    if tools.precision == "fp32":
        return None
    theirs = exact.model.adapter_state()
    for name, ours in tools.model.adapter_state().items():
        ours.data.copy_(theirs[name].data)
    return tools


def _compare(precision: str, measured: Sequence[Tensor], reference: Tensor) -> Form:
    columns: list[tuple[float, float, float, float]] = []
    for grads in measured:
        kept = grads.isfinite() & reference.isfinite()
        a, b = grads[kept], reference[kept]
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1]) if len(a) > 1 else float("nan")
        error = float(((a - b).square().mean() / b.square().mean()).sqrt())
        ties = float((a == 0).double().mean()) if len(a) else float("nan")
        columns.append((correlation, error, ties, 1 - float(kept.double().mean())))
    return Form(precision, *zip(*columns, strict=True))


def best_zo_eps(eps_grid: Sequence[float], correlations: Sequence[float]) -> float:
    """The middle of the zo_eps within half a percent of the best correlation: far from rounding and from curvature."""
    finite = [c for c in correlations if not isnan(c)]
    if not finite:
        raise ZOError(
            "no projected gradient was finite, or all were zero, at any zo_eps; check the model and its dtype."
        )
    near = sorted(e for e, c in zip(eps_grid, correlations, strict=True) if c >= max(finite) - 0.005)
    return near[len(near) // 2]


def advise(d: Diagnosis, *, length: bool, asked: str = "") -> list[str]:
    """What follows from the figures, a sentence each.

    Args:
        d: the figures.
        length: whether lr is how far a step goes.
        asked: options of a run beside zo_eps and lr that make it the one that was measured.
    """
    lines = [_why_zo_eps(d)]
    form, at = d.forms[0], d.eps_grid.index(d.zo_eps)
    if form.correlations[at] < 0.9:
        lines.append("Every zo_eps loses much of the gradient to rounding or curvature: expect slow progress.")
    if len(d.forms) > 1 and d.forms[1].correlations[at] - form.correlations[at] > 0.02:
        lines.append(f"--precision fp32 would give {max(d.forms[1].correlations):.3f}.")
    if max(form.ties) > 0.1:
        drowned = [f"{e:g}" for e, t in zip(d.eps_grid, form.ties, strict=True) if t > 0.1]
        lines.append(
            f"Differences drown in rounding (equal losses in over 10 % of queries) at zo_eps {', '.join(drowned)}."
        )
    if max(form.dropped) > 0:
        lines.append(f"Up to {max(form.dropped):.0%} of the losses were not finite.")
    if d.curvature <= 0:
        lines.append(
            "The loss is not convex along random directions here; what follows takes the curvature's absolute value."
        )
    best = best_trial(d.trials)
    given = [] if best is None else [f"Give zo-opt train: {asked}--zo_eps {d.zo_eps:g} --lr {best.lr:g}"]
    return [*lines, _why_lr(d, length), *given]


def _why_zo_eps(d: Diagnosis) -> str:
    """The zo_eps advised, and what is wrong with smaller and larger ones."""
    form, at = d.forms[0], d.eps_grid.index(d.zo_eps)
    said = f"zo_eps {d.zo_eps:g}: slopes from two losses agree with the exact ones (correlation {form.correlations[at]:.3f} in {form.precision})"
    worse = [(e, c) for e, c in zip(d.eps_grid, form.correlations, strict=True) if c < form.correlations[at] - 0.05]
    smaller, larger = ([(e, c) for e, c in worse if (e < d.zo_eps) == below] for below in (True, False))
    if smaller:
        said += f"; at {smaller[-1][0]:g} and below rounding drowns them ({smaller[-1][1]:.2f})"
    if larger:
        said += f"; from {larger[0][0]:g} on the loss is no straight line between its two points ({larger[0][1]:.2f})"
    return f"{said}."


def _why_lr(d: Diagnosis, length: bool) -> str:
    """The learning rate advised: that which training was seen to learn with, where it was tried."""
    curvature = d.curvature if d.curvature > 0 else d.roughness
    reason = f"slope {d.slope:.2g} over curvature {curvature:.2g}" if length else f"1 / curvature, {curvature:.2g}"
    most = d.step if length else d.lr
    if not d.trials:
        return f"lr at most {most:.2g} ({reason}), less where batches are small; it was not tried."
    steps, before = len(d.trials[0].losses), d.trials[0].before
    tried = "; ".join(f"{t.lr:g}: {t.after:.3g}" for t in d.trials)
    seen = f"loss on training rows {before:.3g} before, and after {steps} steps with lr {tried}"
    best = best_trial(d.trials)
    if best is None:
        return f"No lr tried is good ({seen}); more queries a step or larger batches may be what is missing."
    much = "" if best is d.trials[0] else f"; {most:.2g} ({reason}) would hold without the noise of small batches"
    return f"lr {best.lr:g}: {seen}{much}."
