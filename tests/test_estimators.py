"""The statistical oracle: on a quadratic the mean of many estimates is the gradient, with the covariance of theory.

And each estimator against its formula, autograd, or a function whose derivatives are known.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import f as f_distribution
from test_activations import on_answers
from test_answer_positions import batch_of
from torch import nn

from zo_opt import MeZO, ZOError, trainable_parameters
from zo_opt.directions import DIRECTIONS, LowRank, StepDirections, Stream
from zo_opt.estimators import (
    ESTIMATORS,
    Estimate,
    ForwardMode,
    OneSided,
    TwoSided,
    TwoSidedWithCurvature,
    combine,
    control_variate,
)
from zo_opt.estimators.activations import TRIES
from zo_opt.queries.copies import Limits
from zo_opt.queries.modes import Evaluator, Losses
from zo_opt.queries.perturbation import Perturbed
from zo_opt.queries.trainables import Trainables
from zo_opt.schedules import constant_queries

ESTIMATES = 1200
CURVATURE = torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1, 1.5], dtype=torch.float64)) + 0.2
START = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=torch.float64)
GRADIENT = CURVATURE @ START
D = len(START)
# On a vector all others are one of these. Sign-flip's queries share Z within a step: only the mean over steps is unbiased.
INDEPENDENT = ["gaussian", "philox-gaussian", "rademacher", "sparse", "sphere"]
# E[z z^T] = I for matrices, too: low-rank has I / r there, subspace a projection.
ISOTROPIC = ["gaussian", "philox-gaussian", "rademacher", "sign-flip", "sparse", "sphere"]


def hotelling_p(samples, error):
    """p-value of Hotelling's T^2 test that this error of a mean of n rows (n, d) is chance; covariance from the rows."""
    n, d = samples.shape
    t2 = n * error @ torch.linalg.solve(samples.T.cov(), error)
    return float(f_distribution.sf((n - d) / (d * (n - 1)) * float(t2), d, n - d))


def draws(name, streams, shape=(D,)):
    kind = DIRECTIONS.make(name)
    z = [kind.draw(s, (shape,), 0, torch.Size(shape).numel(), torch.device("cpu")) for s in streams]
    return torch.stack(z).double()


def queries_of(seed, count=ESTIMATES):
    return [Stream(seed, 0, q) for q in range(count)]


def one_query_estimates(name):
    """g_q z_q of ESTIMATES single queries at START, and the gradient that the optimizer applied: their mean."""
    theta = nn.Parameter(START.clone())
    optimizer = MeZO([theta], lr=1.0, zo_eps=1e-2, seed=7, directions=name, query_schedule=constant_queries(ESTIMATES))
    optimizer.step(lambda: 0.5 * theta @ CURVATURE @ theta)
    g = torch.tensor(optimizer.last_record.projected_grads, dtype=torch.float64)
    return g[:, None] * draws(name, queries_of(7)), START - theta.detach()


@pytest.mark.parametrize("name", INDEPENDENT)
def test_the_mean_of_single_queries_is_the_gradient(name):
    """Hotelling's T^2 at 99.9 %; the same test must reject a gradient 30 % too long, so that it can fail."""
    estimates, applied = one_query_estimates(name)
    torch.testing.assert_close(applied, estimates.mean(0), rtol=1e-5, atol=1e-5)
    assert hotelling_p(estimates, applied - GRADIENT) > 1e-3
    assert hotelling_p(estimates, applied - 1.3 * GRADIENT) < 1e-3


def single_estimates(name, loss, theta, zo_eps, queries=1, steps=ESTIMATES):
    """The gradient estimates of many steps, each of ``queries`` queries, at a matrix ``theta`` of float64."""
    parameter, rows = nn.Parameter(theta.clone()), []
    trainables = Trainables([parameter])
    kind, streams = DIRECTIONS.make(name), [[Stream(11, step, q) for q in range(queries)] for step in range(steps)]
    with torch.no_grad():
        for step in range(steps):
            perturbed = Perturbed(trainables, StepDirections(kind, 11, step, [parameter]))
            rows.append(
                TwoSided()(
                    Evaluator(perturbed, lambda: loss(parameter), limits=Limits()), queries, zo_eps
                ).projected_grads
            )
    z = draws(name, [s for row in streams for s in row], tuple(theta.shape))
    return (torch.stack(rows).flatten()[:, None] * z).view(steps, queries, -1).mean(1)


@pytest.mark.parametrize("name", [*ISOTROPIC, "low-rank"])
def test_estimates_at_a_matrix(name):
    """E[z z^T] = I there, too, over steps (low-rank: r I, r = 2). Hotelling at 99.9 %, as above."""
    kind = LowRank(rank=2, interval=1) if name == "low-rank" else name
    loss = lambda p: 0.5 * p.flatten() @ CURVATURE @ p.flatten()  # noqa: E731
    estimates = single_estimates(kind, loss, START.view(2, 3), 1e-2, steps=800)
    expected = GRADIENT * (2 if name == "low-rank" else 1)
    assert hotelling_p(estimates, estimates.mean(0) - expected) > 1e-3
    assert hotelling_p(estimates, estimates.mean(0) - 1.5 * expected) < 1e-3


def test_subspace_estimates_the_projected_gradient():
    """Given U and V the mean of U Z V^T's estimates is U U^T G V V^T; all lie in that r^2-dimensional space. 99.9 %."""
    gradient = torch.linspace(-1, 2, 40 * 36, dtype=torch.float64).view(40, 36).cos()
    estimates = single_estimates(
        "subspace", lambda p: (p * gradient).sum(), torch.zeros(40, 36).double(), 1e-2, steps=2
    )
    u, _, vt = torch.linalg.svd(estimates[0].view(40, 36))
    assert DIRECTIONS["subspace"]().rank == 32
    u, vt = u[:, :32], vt[:32]
    torch.testing.assert_close(
        u @ (u.T @ estimates[1].view(40, 36) @ vt.T) @ vt, estimates[1].view(40, 36), rtol=0, atol=1e-4
    )
    along = [float((e.view(40, 36) * gradient).sum()) for e in estimates]
    projected = float((u.T @ gradient @ vt.T).square().sum())
    assert all(0 <= a < 25 * projected for a in along)  # g^2, g ~ N(0, |U^T G V|^2): within 5 standard deviations


@pytest.mark.parametrize(("name", "factor"), [("gaussian", D + 1), ("rademacher", D - 1), ("sphere", D - 1)])
@pytest.mark.parametrize("queries", [1, 4])
def test_the_variance_on_a_linear_function_is_that_of_theory(name, factor, queries):
    """E|mean_q g_q z_q - grad|^2 = factor / Q |grad|^2; 99.9 % interval of the mean over 1200 / Q steps.

    (d + 1) for Gaussian directions, (d - 1) for signs and for the sphere (there |z|^2 = d is fixed).
    """
    estimates = single_estimates(name, lambda p: p @ GRADIENT, START, 1e-2, queries, ESTIMATES // queries)
    squares = (estimates - GRADIENT).square().sum(1)
    expected = factor / queries * float(GRADIENT.square().sum())
    assert abs(float(squares.mean()) - expected) < 3.29 * float(squares.std()) / len(squares) ** 0.5


@pytest.mark.parametrize(("name", "fourth"), [("gaussian", 3.0), ("rademacher", 1.0)])
def test_unbiased_for_the_smoothed_loss(name, fourth):
    """L = sum t^4 / 4 with zo_eps = 1, where truncation is no small error.

    E[z_i g] = t_i^3 + zo_eps^2 t_i (E[z^4] + 3 (d - 1) E[z_j^2 z_i^2] ... only j = i survives) = t_i^3 + E[z^4] zo_eps^2 t_i:
    for Gaussian directions the gradient of the smoothed loss. 99.9 %; the plain gradient must be rejected.
    """
    theta = START / 2
    estimates = single_estimates(name, lambda p: p.pow(4).sum() / 4, theta, 1.0)
    smoothed = theta**3 + fourth * theta
    assert hotelling_p(estimates, estimates.mean(0) - smoothed) > 1e-3
    assert hotelling_p(estimates, estimates.mean(0) - theta**3) < 1e-3


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "subspace"])
@pytest.mark.parametrize("examples", [2 * ESTIMATES, 2 * ESTIMATES + 300], ids=["even", "uneven"])
def test_split_is_unbiased_for_a_mean_over_examples(name, examples):
    """Each direction sees its own slice. The applied step is the full batch's gradient within its 99.9 % region."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, D, generator=generator, dtype=torch.float64) + torch.arange(D) / 3
    x[: examples // 3] *= 3  # the larger slices (if any) hold other examples than the rest: a wrong weight would show
    y = torch.randn(examples, generator=generator, dtype=torch.float64)
    model = nn.Linear(D, 1, bias=False).double()
    model.weight.data = START[None].clone()

    def loss(b):
        return 0.5 * (b["x"] @ model.weight.flatten() - b["y"]).square().mean()

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
    z = draws(name, queries_of(1), (1, D))
    torch.testing.assert_close(g, (slice_gradients * z).sum(1), rtol=1e-4, atol=1e-4)  # exact but for z in fp32

    weights = rows * ESTIMATES / examples
    if name == "subspace":  # of a row it has rank 1: z = c v^T with one v for the whole step
        v = z[0] / z[0].norm()
        torch.testing.assert_close(applied, (applied @ v) * v, rtol=1e-4, atol=1e-4)
        return
    estimates = weights[:, None] * (g[:, None] * z - slice_gradients)  # independent, mean zero, one a slice
    assert hotelling_p(estimates, applied - full) > 1e-3
    assert hotelling_p(estimates, applied - 2 * full) < 1e-3


# --- formulas ---


def losses(*values, weights=None, base=None):
    rows = torch.tensor(values, dtype=torch.float64)
    w = torch.ones(len(rows), dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    b = None if base is None else torch.tensor(base, dtype=torch.float64)
    return Losses(rows, w, rows.numel(), b)


def test_two_sided_formula():
    asked = []

    def evaluate(queries, scales):
        asked.append((queries, tuple(scales)))
        return losses([3.0, 1.0], [0.5, 1.5])

    estimate = TwoSided()(evaluate, 2, 0.25)
    assert asked == [(2, (0.25, -0.25))]
    assert estimate.projected_grads.tolist() == [4.0, -2.0]  # (loss_pos - loss_neg) / (2 zo_eps)
    assert estimate.loss == pytest.approx(1.5)
    assert (estimate.forwards, estimate.dropped, estimate.curvatures) == (4, 0, None)


def test_one_sided_formula():
    def evaluate(queries, scales, base):
        assert (queries, tuple(scales), base) == (2, (0.25,), True)
        return losses([3.0], [0.5], base=[1.0, 2.0])

    estimate = OneSided()(evaluate, 2, 0.25)
    assert estimate.projected_grads.tolist() == [8.0, -6.0]  # (loss_pos - loss) / zo_eps
    assert estimate.loss == 1.5


def test_a_weighted_mean_loss():
    assert TwoSided()(lambda q, s: losses([3.0, 1.0], [1.0, 1.0], weights=[1.5, 0.5]), 2, 1.0).loss == 1.75


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, "base"])
@pytest.mark.parametrize("estimator", ["two_sided", "curvature", "one_sided"])
def test_a_query_without_finite_losses_is_dropped(bad, position, estimator):
    row, base = [1.0, 1.0], [2.0, 2.0]
    if position == "base":
        if estimator == "two_sided":
            return
        base[1] = bad
    elif estimator == "one_sided":
        row = [bad]
    else:
        row[position] = bad
    if estimator == "one_sided":
        estimate = OneSided()(lambda q, s, base_=base, **_: losses([3.0], row[:1], base=base_), 2, 0.5)
    else:
        kind = TwoSidedWithCurvature() if estimator == "curvature" else TwoSided()
        estimate = kind(lambda q, s, **_: losses([3.0, 1.0], row, base=base if estimator == "curvature" else None), 2, 0.5)  # fmt: skip
    assert estimate.dropped == 1
    assert estimate.projected_grads[0] == 2.0
    assert math.isnan(estimate.projected_grads[1])
    assert estimate.loss == 2.0
    if estimator == "curvature":
        assert estimate.curvatures[0] == 0
        assert math.isnan(estimate.curvatures[1])


@pytest.mark.parametrize("estimator", [TwoSided(), OneSided()])
def test_no_finite_query(estimator):
    estimate = estimator(
        lambda q, s, **_: losses([math.inf, math.inf], [math.nan, 1.0], base=[math.nan, math.nan]), 2, 0.5
    )
    assert estimate.dropped == 2
    assert math.isnan(estimate.loss)


def test_combine_is_the_mean_and_keeps_drops():
    grads = [torch.tensor(g, dtype=torch.float64) for g in ([1.0, 2.0], [3.0, math.nan])]
    curvatures = [torch.tensor(g, dtype=torch.float64) for g in ([4.0, 2.0], [6.0, math.nan])]
    both = combine([Estimate(loss, g, torch.ones(2), 4, c) for loss, g, c in zip((0.5, 1.5), grads, curvatures, strict=True)])  # fmt: skip
    assert both.projected_grads[0] == 2.0
    assert both.curvatures[0] == 5.0
    assert both.dropped == 1
    assert (both.loss, both.forwards) == (1.0, 8)
    assert (
        combine([Estimate(math.nan, grads[0], torch.ones(2), 4), Estimate(2.0, grads[0], torch.ones(2), 4)]).loss == 2.0
    )


# --- on real functions ---


class Problem:
    """A loss of float64 over a matrix and a vector, its evaluator, and its directions."""

    def __init__(self, loss, mode="sequential", name="gaussian", small=True):
        self.net = nn.Linear(3, 2).double()
        with torch.no_grad():
            for p, part in zip(self.net.parameters(), torch.linspace(-1, 2, 8).double().split([6, 2]), strict=True):
                p.copy_(part.view_as(p))
        self.parameters = list(self.net.parameters())
        self.directions = StepDirections(DIRECTIONS.make(name), 5, 1, self.parameters)
        self.perturbed = Perturbed(Trainables(self.parameters), self.directions)
        self.loss = loss
        self.x = torch.linspace(-2, 1, 18).double().view(6, 3)
        self.evaluator = Evaluator(self.perturbed, lambda x: loss(self.net(x)), self.x, mode, self.net, limits=Limits())

    def theta(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def z(self, query):
        return self.directions.range(query, 0, 8).double()

    def at(self, theta, x=None):
        """The loss at other weights, differentiable."""
        weight, bias = theta.split([6, 2])
        return self.loss(torch.nn.functional.linear(self.x if x is None else x, weight.view(2, 3), bias))

    def slices(self, mode, queries):
        return self.x.split(6 // queries) if mode == "split" else [self.x] * queries


def quadratic(y):
    return (y.square() * torch.tensor([1.0, 3.0])).sum(1).mean()


def smooth(y):
    return y.tanh().square().sum(1).mean()


def derivatives(function, theta):
    return torch.autograd.functional.jacobian(function, theta), torch.autograd.functional.hessian(function, theta)


MODES = ["sequential", "batched", "split"]


@pytest.mark.parametrize("mode", MODES)
def test_curvature_is_exact_on_quadratics(mode):
    """z^T H z and g . z, whatever zo_eps; in split mode those of the query's slice. One forward more for l_0."""
    problem = Problem(quadratic, mode)
    with torch.no_grad():
        estimate = TwoSidedWithCurvature()(problem.evaluator, 3, 0.5)
    for q, x in enumerate(problem.slices(mode, 3)):
        theta, z = problem.theta(), problem.z(q)
        gradient, hessian = derivatives(lambda t, x=x: problem.at(t, x), theta)
        assert estimate.curvatures[q] == pytest.approx(float(z @ hessian @ z), rel=1e-5)
        assert estimate.projected_grads[q] == pytest.approx(float(gradient @ z), rel=1e-5)
    assert estimate.forwards == (3 if mode == "split" else 7)


@pytest.mark.parametrize("mode", MODES)
def test_one_sided_on_quadratics(mode):
    """g . z + zo_eps z^T H z / 2; the loss is that at the weights."""
    problem = Problem(quadratic, mode)
    with torch.no_grad():
        estimate = OneSided()(problem.evaluator, 3, 0.5)
    for q, x in enumerate(problem.slices(mode, 3)):
        theta, z = problem.theta(), problem.z(q)
        gradient, hessian = derivatives(lambda t, x=x: problem.at(t, x), theta)
        expected = gradient @ z + 0.25 * z @ hessian @ z
        assert estimate.projected_grads[q] == pytest.approx(float(expected), rel=1e-5)
    assert estimate.forwards == (2 if mode == "split" else 4)
    assert estimate.loss == pytest.approx(float(problem.at(problem.theta())), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("small", [True, False])
def test_control_variate(mode, small, monkeypatch):
    """Zero at the anchor itself; elsewhere the difference of two estimates along the same directions."""
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    problem = Problem(smooth, mode)
    with torch.no_grad():
        for p in problem.parameters:
            p.copy_(p.float())  # an anchor is float32
        here = control_variate(problem.evaluator, problem.theta().float(), 3, 0.1)
        assert here.projected_grads.tolist() == [0.0, 0.0, 0.0] if mode != "batched" else here.projected_grads.abs().max() < 1e-12  # fmt: skip
        anchor = torch.linspace(1, -1, 8)
        away = control_variate(problem.evaluator, anchor, 3, 0.1)
        assert away.forwards == (4 if mode == "split" else 12)
        assert away.loss == pytest.approx(TwoSided()(problem.evaluator, 3, 0.1).loss)
        for q, x in enumerate(problem.slices(mode, 3)):
            z, points = problem.z(q), (problem.theta(), anchor.double())
            g = [(problem.at(at + 0.1 * z, x) - problem.at(at - 0.1 * z, x)) / 0.2 for at in points]
            assert away.projected_grads[q] == pytest.approx(float(g[0] - g[1]), rel=1e-4)


class Sampler(nn.Module):
    """Many kinds of layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.recurrence = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2).tanh()
        x = self.recurrence(x.flatten(0, 1), x.flatten(0, 1))
        return self.head(x).log_softmax(-1)[:, 3].mean()


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
@pytest.mark.parametrize("small", [True, False])
def test_forward_gradient_is_autograds(name, small, monkeypatch):
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Sampler().double().eval()
    ids = torch.arange(10).view(2, 5)
    net(ids).backward()
    parameters = list(net.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    directions = StepDirections(DIRECTIONS.make(name), 5, 1, parameters)
    perturbed = Perturbed(Trainables(parameters), directions)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        estimate = ForwardMode()(Evaluator(perturbed, lambda: net(ids), limits=Limits()), 3, 1.0)
        loss = float(net(ids))
    expected = [float(gradient @ directions.range(q, 0, len(gradient)).double()) for q in range(3)]
    assert estimate.projected_grads.tolist() == pytest.approx(expected, rel=1e-9)
    assert estimate.loss == pytest.approx(loss, rel=1e-9)
    assert (estimate.forwards, estimate.weights.tolist()) == (6, [1, 1, 1])
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def forward_gradient_of(parameters, loss):
    parameters = list(parameters)
    with torch.no_grad():
        perturbed = Perturbed(Trainables(parameters), StepDirections(DIRECTIONS.make("gaussian"), 0, 0, parameters))
        return ForwardMode()(Evaluator(perturbed, loss, limits=Limits()), 2, 1.0)


class NoTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def own_function_of_activations(theta):
    return NoTangent.apply(theta * theta).sum()


def own_function_of_weights(theta):
    """The rest of the loss has a derivative, which alone would be a wrong one."""
    return NoTangent.apply(theta).sum() + theta.sum()


def bag(theta):
    return torch.nn.functional.embedding_bag(torch.tensor([[0, 1]]), theta).sum()


@pytest.mark.parametrize("loss", [bag, own_function_of_activations, own_function_of_weights])
def test_forward_gradient_names_the_operation_it_cannot_follow(loss):
    theta = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ZOError, match="no forward-mode derivative"):
        forward_gradient_of([theta], lambda: loss(theta))


@pytest.mark.parametrize(
    "loss", [lambda t: float(t.detach().sum()), lambda t: torch.tensor(1.0)], ids=["float", "constant"]
)
def test_forward_gradient_needs_the_loss_as_a_tensor(loss):
    theta = nn.Parameter(torch.ones(3))
    with pytest.raises(ZOError, match="carries no derivative"):
        forward_gradient_of([theta], lambda: loss(theta))


def test_forward_gradient_refuses_several_losses():
    theta = nn.Parameter(torch.ones(3))
    with pytest.raises(ZOError, match="closure returned a tensor of shape"):
        forward_gradient_of([theta], lambda: theta * 2)


def test_forward_gradient_passes_mistakes_on():
    theta = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        forward_gradient_of([theta], lambda: (theta + torch.ones(4)).sum())  # noqa: PLW0108


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_forward_gradient_drops_what_is_not_finite(scale):
    theta = nn.Parameter(torch.ones(3))
    estimate = forward_gradient_of([theta], lambda: (theta * scale).sum())  # noqa: PLW0108
    assert estimate.dropped == 2
    assert math.isnan(estimate.loss)


# --- every estimator ---


def of_quadratic(name, queries=3):
    """An optimizer with the estimator, and its loss x^T A x / 2 at START."""
    theta = nn.Parameter(START.clone())
    optimizer = MeZO([theta], estimator=name, zo_eps=1e-5, seed=4, query_schedule=constant_queries(queries))
    return theta, optimizer, lambda: theta @ CURVATURE @ theta / 2


OF_WEIGHTS = [name for name, kind in ESTIMATORS.items() if not kind.gives_gradient]
OF_ACTIVATIONS = [name for name, kind in ESTIMATORS.items() if kind.gives_gradient]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_every_estimator_finds_the_derivatives_at_the_cost_it_declares(name):
    theta, optimizer, loss = of_quadratic(name)
    expected = [float(GRADIENT @ optimizer.directions_of(0).range(q, 0, D).double()) for q in range(3)]
    optimizer.estimate(loss)
    assert torch.equal(theta.detach(), START)
    optimizer.step()
    record = optimizer.last_record
    assert record.projected_grads == pytest.approx(expected, rel=1e-3)
    assert record.loss == pytest.approx(float(START @ CURVATURE @ START / 2), rel=1e-3)
    assert record.forwards == optimizer.forwards(0, 3)
    kind = ESTIMATORS[name]
    assert ESTIMATORS.make(ESTIMATORS.plain(kind())) == kind()


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_every_estimator_drops_what_is_not_finite(name):
    theta, optimizer, loss = of_quadratic(name)
    optimizer.step(lambda: loss() * math.nan)
    assert optimizer.dropped_queries == 3
    assert torch.equal(theta.detach(), START)


def of_activations(name):
    """An optimizer with the estimator, on a tiny model with adapters that act on answers, and a batch."""
    model = on_answers()
    optimizer = MeZO(
        trainable_parameters(model), lr=0.01, estimator=name, zo_eps=3e-2, directions="rademacher", module=model,
        query_schedule=constant_queries(3),
    )  # fmt: skip
    return model, optimizer, batch_of("left")


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
def test_every_estimator_of_activations_costs_what_it_declares(name):
    """What finds the length of shifts included, before the first step."""
    model, optimizer, batch = of_activations(name)
    with torch.no_grad():
        expected = float(model(**batch).loss)
    records = []
    for _ in range(2):
        optimizer.step(lambda b: model(**b).loss, batch)
        records.append(optimizer.last_record)
    assert records[0].loss == pytest.approx(expected, rel=1e-5)
    assert (
        [r.forwards for r in records] == [optimizer.forwards(0, 3), optimizer.forwards(1, 3)] == [3 + 1 + TRIES, 3 + 1]
    )
    assert len(records[0].projected_grads) == 3
    kind = ESTIMATORS[name]
    assert ESTIMATORS.make(ESTIMATORS.plain(kind())) == kind()


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
def test_every_estimator_of_activations_drops_what_is_not_finite(name):
    model, optimizer, batch = of_activations(name)
    before = [p.clone() for p in trainable_parameters(model)]
    optimizer.step(lambda b: model(**b).loss * math.nan, batch)
    assert optimizer.dropped_queries == 3
    assert all(torch.equal(p, b) for p, b in zip(trainable_parameters(model), before, strict=True))
    assert all(tensor.isfinite().all() for tensor in optimizer.state_dict()["memory"].values())
    optimizer.step(lambda b: model(**b).loss, batch)  # nothing was learned of it
    assert optimizer.dropped_queries == 3
    assert all(p.isfinite().all() for p in trainable_parameters(model))
