"""Step-size control: what it does to the projected gradients, and to the weights."""

from __future__ import annotations

import math

import pytest
import torch
from optimizer_problem import BATCH, EXAMPLES, TOTAL, Model, Ones, bits, examples_of, flat, make, same
from optimizer_table import NAMES, build

from zo_opt import ZOError
from zo_opt.directions import DIRECTIONS, StepDirections
from zo_opt.optim import ClipProjectedGrads, DivideBySpread, StepControl
from zo_opt.schedules import constant_queries


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


class Hold(StepControl):
    def __call__(self, projected_grads, memory):
        return 0 * projected_grads


def z_of(model, step=0, query=0, directions="gaussian"):
    return StepDirections(DIRECTIONS.make(directions), 5, step, list(model.parameters())).range(query, 0, TOTAL)


def test_clipped_projected_grads_are_those_applied():
    """A projected gradient beyond factor times the running rms moves the weights no further than that."""
    model, scale = Model(), [1.0]
    optimizer = make(model, lr=1.0, step_control=[ClipProjectedGrads(factor=2.0)])
    norms = []
    for step in range(2):
        before = flat(model)
        optimizer.step(lambda: scale[0] * model.w.double().sum())
        norms.append(float((flat(model) - before).norm() / z_of(model, step).norm()))
        assert norms[-1] == pytest.approx(
            abs(optimizer.last_record.projected_grads[0]) if step == 0 else 2 * norms[0], rel=1e-4
        )
        scale[0] = 1e4


def test_clipping_follows_the_running_rms():
    clip, memory = ClipProjectedGrads(factor=2.0, decay=0.75), {}
    assert clip(numbers(3.0, -4.0), memory).tolist() == [3.0, -4.0]
    limit = 2 * math.sqrt(12.5)
    assert clip(numbers(-100.0), memory).tolist() == pytest.approx([-limit])
    assert memory["mean_square"] == pytest.approx(0.75 * 12.5 + 0.25 * limit**2)


def test_clipping_begins_with_the_first_step_that_has_a_signal():
    clip, memory = ClipProjectedGrads(factor=2.0), {}
    assert clip(numbers(0.0, 0.0), memory).tolist() == [0.0, 0.0]
    assert clip(numbers(7.0), memory).tolist() == [7.0]


@pytest.mark.parametrize("options", [{"factor": 0}, {"factor": -1}, {"decay": 1.0}, {"decay": -0.1}])
def test_impossible_clipping(options):
    with pytest.raises(ZOError, match=f"{next(iter(options))}=.* is not possible; give a number"):
        ClipProjectedGrads(**options)


def test_divided_by_the_spread():
    """Which leaves their sample standard deviation at one."""
    grads = numbers(3.0, -1.0, 2.0, 7.0)
    out = DivideBySpread()(grads, {})
    assert float(out.std(correction=1)) == pytest.approx(1)
    torch.testing.assert_close(out / out[0], grads / grads[0])
    assert DivideBySpread()(numbers(0.0, 0.0), {}).tolist() == [0, 0]


@pytest.mark.parametrize("value", [1.0, -0.1, 1e-8])
@pytest.mark.parametrize("noise", [0.0, 1e-16])
def test_the_spread_of_equal_projected_grads_is_no_unit(value, noise):
    """It is zero or a rounding error."""
    out = DivideBySpread()(value * (1 + noise * torch.arange(7, dtype=torch.float64)), {})
    assert (out.abs() <= 10).all()


@pytest.mark.parametrize("name", ["fzoo", "grzo"])
def test_a_coarse_loss_does_not_destroy_the_weights(name):
    """Losses of low precision are often equal to the bit: here one on one side of the weights, another on the other."""
    model = Model()
    optimizer, edge = build(name, model, directions=Ones()), float(model.w[0, 0].detach())
    for _ in range(2):
        optimizer.step(lambda batch: (model.w[0, 0] > edge).double() + 0 * model(batch), BATCH)
    assert len(set(optimizer.last_record.projected_grads)) == 1
    assert (flat(model) - flat(Model())).abs().max() < 1


def test_dividing_by_the_spread_needs_two_queries():
    model = Model()
    before = bits(model)
    optimizer = build("fzoo", model, query_schedule=constant_queries(1))
    with pytest.raises(ZOError, match=r"at least two finite queries.*query schedule"):
        optimizer.step(model, BATCH)
    with pytest.raises(ZOError, match="at least two"):
        build("grzo", model).step(model, examples_of(BATCH, [0]))
    assert same(bits(model), before)


def test_controls_are_applied_in_order():
    """Clipped and then divided is not divided and then clipped."""
    model, other = Model(), Model()
    queries = {"query_schedule": constant_queries(EXAMPLES)}
    clip = {"factor": 0.5}
    make(model, **queries, step_control=[ClipProjectedGrads(**clip), DivideBySpread()]).step(model, BATCH)
    make(other, **queries, step_control=[DivideBySpread(), ClipProjectedGrads(**clip)]).step(other, BATCH)
    length, shorter = ((flat(m) - flat(Model())).norm() for m in (model, other))
    assert shorter < 0.7 * length


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("zo-sign", "zo-adam", "zo-momentum")])
def test_every_linear_optimizer_takes_a_control(name):
    """After its own, where it has one."""
    model = Model()
    optimizer = build(name, model, lr=1.0, weight_decay=0.0, step_control=[Hold()])
    before = bits(model)
    optimizer.step(model, BATCH)
    assert same(bits(model), before)
