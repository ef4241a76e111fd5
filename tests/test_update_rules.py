"""Update rules, one property each; their formulas are held to the twins in test_optimizers.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from optimizer_problem import BATCH, TOTAL, Model, Ones, bits, flat, make, same
from torch import nn

from zo_opt import ZOError
from zo_opt.directions import DIRECTIONS, StepDirections
from zo_opt.optim import UPDATE_RULES, Adam, AMSGrad, Momentum
from zo_opt.queries import trainables


def sloped(slope):
    """Along directions of ones over one number, the estimate is the slope."""
    theta = nn.Parameter(torch.zeros(1))
    return theta, lambda: float(slope() * theta.double())


@pytest.mark.parametrize("rule", sorted(UPDATE_RULES))
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_first_move(rule, scale):
    """Sign and Adam do not see the scale of the loss; AMSGrad, without bias correction, moves by (1-b1)/sqrt(1-b2) of it."""
    theta, closure = sloped(lambda: scale)
    make_rule = UPDATE_RULES[rule]
    optimizer = make(None, params=[theta], lr=1e-3, directions=Ones(), update_rule=make_rule())
    optimizer.step(closure)
    expected = {"sgd": scale, "momentum": scale, "sign": 1, "adam": 1, "amsgrad": 0.1 / math.sqrt(0.001)}[rule]
    assert float(theta.detach()) == pytest.approx(-1e-3 * expected, rel=1e-5)


def test_momentum_in_the_long_run():
    """[choice] No damping: lr / (1 - beta) of a constant gradient."""
    theta, closure = sloped(lambda: 2.0)
    optimizer = make(None, params=[theta], lr=1e-3, directions=Ones(), update_rule=Momentum(0.8))
    for _ in range(60):
        before = float(theta.detach())
        optimizer.step(closure)
    assert before - float(theta.detach()) == pytest.approx(1e-3 * 2 / (1 - 0.8), rel=1e-3)


def test_momentum_is_torchs():
    """torch.optim.SGD's convention."""
    model, theirs = Model(), Model()
    optimizer = make(model, update_rule=Momentum(0.7))
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.7)
    for step in range(5):
        optimizer.step(model, BATCH)
        z = StepDirections(DIRECTIONS.make("gaussian"), 5, step, list(model.parameters())).range(0, 0, TOTAL)
        grads = [torch.empty_like(p) for p in theirs.parameters()]
        nn.utils.vector_to_parameters(z * optimizer.last_record.projected_grads[0], grads)
        for p, g in zip(theirs.parameters(), grads, strict=True):
            p.grad = g
        sgd.step()
    torch.testing.assert_close(flat(model), flat(theirs), rtol=1e-5, atol=1e-6)


def test_amsgrad_never_forgets_the_largest():
    """After one large gradient the moves stay small, where Adam's grow again."""
    moves = {}
    for rule in (AMSGrad(0.0, 0.9), Adam(0.0, 0.9)):
        slope = [1e3]
        theta, closure = sloped(lambda slope=slope: slope[0])
        optimizer = make(None, params=[theta], lr=1e-3, directions=Ones(), update_rule=rule)
        optimizer.step(closure)
        slope[0] = 1.0
        for _ in range(200):
            before = float(theta.detach())
            optimizer.step(closure)
        moves[type(rule)] = before - float(theta.detach())
    assert moves[AMSGrad] < 1e-5
    assert moves[Adam] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("rule", [Adam, AMSGrad])
@pytest.mark.parametrize("options", [{"beta1": 1.0}, {"beta2": -0.1}])
def test_impossible_adam(rule, options):
    with pytest.raises(ZOError, match=next(iter(options))):
        rule(**options)


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan])
def test_impossible_momentum(beta):
    with pytest.raises(ZOError, match="beta"):
        Momentum(beta)


def test_adams_bias_correction_counts_updates_not_failed_steps():
    """The first update ever made is lr * sign(g), however many steps failed before it."""
    model = Model()
    optimizer = make(model, update_rule=Adam(), lr=0.01)
    for _ in range(3):
        optimizer.step(lambda: math.nan)
    optimizer.step(model, BATCH)
    moved = (flat(model) - flat(Model())).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("small", [True, False])
def test_a_rademacher_step_of_one_query_rounds_once(small, monkeypatch):
    """theta <- fp32(theta - fp32(lr * g) * z): what a journal's replay on another device rests on."""
    if not small:
        monkeypatch.setattr(trainables.Trainables, "SMALL", 0)
    model = Model()
    optimizer = make(model, lr=0.0123, directions="rademacher")
    kind = DIRECTIONS.make("rademacher")
    for step in range(20):
        before = flat(model).double().numpy()
        optimizer.step(model, BATCH)
        z = StepDirections(kind, 5, step, list(model.parameters())).range(0, 0, TOTAL).double().numpy()
        move = np.float64(np.float32(0.0123 * optimizer.last_record.projected_grads[0]))
        # a float64 sum of two float32 numbers of about the same size is exact, so that this rounds once
        assert (flat(model).numpy() == (before - move * z).astype(np.float32)).all()


@pytest.mark.parametrize("rule", sorted(UPDATE_RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_is_float32_whatever_the_weights_are(rule, dtype):
    model = Model(dtype)
    optimizer = make(model, update_rule=UPDATE_RULES[rule]())
    optimizer.step(model, BATCH)
    names = UPDATE_RULES[rule].state_names
    for p in model.parameters():
        assert optimizer.state[p].keys() == set(names)
        assert all(optimizer.state[p][n].shape == p.shape for n in names)
        assert all(optimizer.state[p][n].dtype == torch.float32 for n in names)


@pytest.mark.parametrize("rule", sorted(UPDATE_RULES))
def test_without_lr_state_goes_on_and_weights_stay(rule):
    """A warm-up from zero gathers momentum."""
    model = Model()
    optimizer = make(model, lr=0.0, update_rule=UPDATE_RULES[rule]())
    optimizer.step(model, BATCH)
    assert same(bits(model), bits(Model()))
    assert all(t.abs().max() > 0 for p in model.parameters() for t in optimizer.state[p].values())
