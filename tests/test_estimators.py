"""The statistical oracle: on a quadratic the mean of many estimates is the gradient, with the covariance of theory."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import f as f_distribution
from torch import nn

from zo_opt import MeZO
from zo_opt.directions import DIRECTIONS, get_directions
from zo_opt.estimators import Estimate, combine, two_sided
from zo_opt.query_modes import Losses
from zo_opt.schedules import constant_queries

ESTIMATES = 4000
CURVATURE = torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1, 1.5], dtype=torch.float64)) + 0.2
START = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=torch.float64)
GRADIENT = CURVATURE @ START
D = len(START)


def hotelling_p(samples, error):
    """p-value of Hotelling's T^2 test that this error of a mean of n rows (n, d) is chance; covariance from the rows."""
    n, d = samples.shape
    t2 = n * error @ torch.linalg.solve(samples.T.cov(), error)
    return float(f_distribution.sf((n - d) / (d * (n - 1)) * float(t2), d, n - d))


def one_query_estimates(name):
    """g_q z_q of ESTIMATES single queries at START, and the gradient that the optimizer applied: their mean."""
    theta = nn.Parameter(START.clone())
    optimizer = MeZO([theta], lr=1.0, zo_eps=1e-2, seed=7, directions=name, query_schedule=constant_queries(ESTIMATES))
    optimizer.step(lambda: 0.5 * theta @ CURVATURE @ theta)
    g = torch.tensor(optimizer.last_record.projected_grads, dtype=torch.float64)
    z = get_directions(name).whole(7, 0, ESTIMATES, [D], theta.device).double()
    return g[:, None] * z, START - theta.detach()


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_the_mean_of_single_queries_is_the_gradient(name):
    """Hotelling's T^2 at 99.9 %; the same test must reject a gradient 20 % too long, so that it can fail."""
    estimates, applied = one_query_estimates(name)
    torch.testing.assert_close(applied, estimates.mean(0), rtol=1e-5, atol=1e-6)
    assert hotelling_p(estimates, applied - GRADIENT) > 1e-3
    assert hotelling_p(estimates, applied - 1.2 * GRADIENT) < 1e-3


@pytest.mark.parametrize(("name", "factor"), [("gaussian", D + 1), ("rademacher", D - 1)])
def test_the_variance_is_that_of_theory(name, factor):
    """E|g z - grad|^2 = (d + 1)|grad|^2 for Gaussian, (d - 1)|grad|^2 for Rademacher; 99.9 % interval of the mean."""
    estimates, _ = one_query_estimates(name)
    squares = (estimates - GRADIENT).square().sum(1)
    expected = factor * float(GRADIENT.square().sum())
    assert abs(float(squares.mean()) - expected) < 3.29 * float(squares.std()) / ESTIMATES**0.5


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
@pytest.mark.parametrize("examples", [2 * ESTIMATES, 2 * ESTIMATES + 1000], ids=["even", "uneven"])
def test_split_is_unbiased_for_a_mean_over_examples(name, examples):
    """Each direction sees its own slice. The applied step is the full batch's gradient within its 99.9 % region."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, D, generator=generator, dtype=torch.float64) + torch.arange(D) / 3
    x[: examples // 3] *= 3  # the larger slices (if any) hold other examples than the rest: a wrong weight would show
    y = torch.randn(examples, generator=generator, dtype=torch.float64)
    model = nn.Linear(D, 1, bias=False).double()
    model.weight.data.copy_(START[None])

    def loss(b):
        return 0.5 * (model(b["x"]).squeeze(-1) - b["y"]).square().mean()

    optimizer = MeZO(
        model.parameters(), lr=1.0, zo_eps=1e-2, seed=1, directions=name, module=model, query_mode="split",
        query_schedule=constant_queries(ESTIMATES),
    )  # fmt: skip
    optimizer.step(loss, {"x": x, "y": y})
    applied = START - model.weight.detach()[0]

    size, larger = divmod(examples, ESTIMATES)
    rows = torch.tensor([size + 1] * larger + [size] * (ESTIMATES - larger))
    residual_gradients = (x @ START - y)[:, None] * x
    full = residual_gradients.mean(0)
    slice_gradients = torch.stack([s.mean(0) for s in residual_gradients.split(rows.tolist())])
    g = torch.tensor(optimizer.last_record.projected_grads, dtype=torch.float64)
    z = get_directions(name).whole(1, 0, ESTIMATES, [D], x.device).double()
    torch.testing.assert_close(g, (slice_gradients * z).sum(1), rtol=1e-4, atol=1e-4)  # exact but for z in fp32

    weights = rows * ESTIMATES / examples
    estimates = weights[:, None] * (g[:, None] * z - slice_gradients)  # independent, mean zero, one a slice
    assert hotelling_p(estimates, applied - full) > 1e-3
    assert hotelling_p(estimates, applied - 1.3 * full) < 1e-3


def losses(*values, weights=None):
    rows = torch.tensor(values, dtype=torch.float64)
    w = torch.ones(len(rows), dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    return Losses(rows, w, rows.numel())


def test_two_sided_formula():
    asked = []

    def evaluate(queries, scales):
        asked.append((queries, tuple(scales)))
        return losses([3.0, 1.0], [0.5, 1.5])

    estimate = two_sided(evaluate, 2, 0.25)
    assert asked == [(2, (0.25, -0.25))]
    assert estimate.projected_grads.tolist() == [4.0, -2.0]  # (loss_pos - loss_neg) / (2 zo_eps)
    assert estimate.loss == pytest.approx(1.5)
    assert (estimate.forwards, estimate.dropped) == (4, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_a_query_without_finite_losses_is_dropped(bad, position):
    row = [1.0, 1.0]
    row[position] = bad
    estimate = two_sided(lambda q, s: losses([3.0, 1.0], row), 2, 0.5)
    assert estimate.dropped == 1
    assert estimate.projected_grads[0] == 2.0
    assert math.isnan(estimate.projected_grads[1])
    assert estimate.loss == 2.0


def test_no_finite_query():
    estimate = two_sided(lambda q, s: losses([math.inf, math.inf], [math.nan, 1.0]), 2, 0.5)
    assert estimate.dropped == 2
    assert math.isnan(estimate.loss)


def test_combine_is_the_mean_and_keeps_drops():
    grads = [torch.tensor(g, dtype=torch.float64) for g in ([1.0, 2.0], [3.0, math.nan])]
    both = combine([Estimate(0.5, grads[0], torch.ones(2), 4), Estimate(1.5, grads[1], torch.ones(2), 4)])
    assert both.projected_grads[0] == 2.0
    assert both.dropped == 1
    assert (both.loss, both.forwards) == (1.0, 8)
