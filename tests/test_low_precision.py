"""Weights in bf16 and fp16: what stochastic rounding promises, seen from an optimizer."""

from __future__ import annotations

import pytest
import torch
from optimizer_problem import BATCH, Model, Ones, bits, flat, make, same
from optimizer_table import NAMES, build, run
from torch import nn

from zo_opt.optim import Adam
from zo_opt.queries import trainables

LOW = [torch.bfloat16, torch.float16]
low = pytest.mark.parametrize("dtype", LOW)


@pytest.mark.parametrize(
    ("dtype", "small", "start", "slope", "rule"),
    [
        (torch.bfloat16, True, 1.0, -1.0, None),
        (torch.bfloat16, False, 1.9921875, 1.0, Adam()),
        (torch.float16, True, -1.0, 1.0, None),
    ],
)
def test_small_updates_are_not_lost(dtype, small, start, slope, rule, monkeypatch):
    """Steps of 1/100 ulp, which rounding to the nearest would all lose, drift right on average."""
    if not small:
        monkeypatch.setattr(trainables.Trainables, "SMALL", 0)
    entries, steps = 512, 1000
    theta = nn.Parameter(torch.full((entries,), start, dtype=dtype))
    ulp = torch.finfo(dtype).eps  # between 1 and 2
    # Along ones, the estimate is the slope of the mean entry, the same for all entries; perturbed by an exact 2^-4.
    options = {"zo_eps": 2.0**-4, "directions": Ones()} | ({} if rule is None else {"update_rule": rule})
    optimizer = make(None, params=[theta], lr=ulp / 100, **options)
    for _ in range(steps):
        optimizer.step(lambda: slope * theta.double().mean())
    moved = (theta.detach().double() - start).mean() / ulp
    expected = -slope * steps / 100
    standard_error = (steps * 0.01 * 0.99 / entries) ** 0.5  # of independent roundings
    assert abs(float(moved) - expected) < 5 * standard_error
    assert theta.unique().numel() > 5


@low
def test_rounding_to_the_nearest_would_have_lost_them(dtype):
    """What the test above is about."""
    theta = torch.ones(3, dtype=dtype)
    assert torch.equal(theta - torch.finfo(dtype).eps / 100, theta)


@low
def test_an_update_lands_on_a_neighbour_of_the_exact_result(dtype):
    """And on the exact result where the dtype has it."""
    model, wide = Model(dtype), Model(dtype).float()
    optimizer = make(model, directions="rademacher", lr=0.01)
    optimizer.step(model, BATCH)
    exact = make(wide, directions="rademacher", lr=0.01, zo_eps=1.0)
    move = 0.01 * optimizer.last_record.projected_grads[0]
    exact.step(iter([move * 100 * 2, 0.0]).__next__)  # the same projected gradient
    ours, theirs = flat(model).float(), flat(wide)
    nearest = theirs.to(dtype).float()
    step = torch.finfo(dtype).eps * theirs.abs().clamp(min=1e-3)
    assert ((ours - theirs).abs() < step).all()
    assert (ours != nearest).any()


@low
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_tracks_its_float32_run(dtype, name):
    start = flat(Model()).double()
    wide = Model(dtype).float()  # from the same rounded weights
    run(name, 12, wide)
    model = run(name, 12, Model(dtype))
    moved = (flat(wide).double() - start).norm()
    noise = 0.5 if dtype == torch.bfloat16 else 0.1
    assert (flat(model).double() - flat(wide).double()).norm() < noise * moved


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_twice_and_other_bits_with_another_seed(name):
    first = bits(run(name, 3, Model(torch.bfloat16)))
    assert same(bits(run(name, 3, Model(torch.bfloat16))), first)
    assert not same(bits(run(name, 3, Model(torch.bfloat16), seed=6)), first)


@low
def test_weights_of_several_dtypes(dtype):
    """They cannot stand in one buffer; each is rounded as its own dtype asks."""

    def mixed():
        model = Model()
        model.b.data = model.b.data.to(dtype)
        return model

    model, wide = run("mezo", 10, mixed(), weight_decay=0.1), run("mezo", 10, weight_decay=0.1)
    assert (model.w.dtype, model.b.dtype) == (torch.float32, dtype)
    assert (flat(model).double() - flat(wide).double()).norm() < 0.05 * flat(wide).norm()
    assert same(bits(run("mezo", 10, mixed(), weight_decay=0.1)), bits(model))


@pytest.mark.parametrize("name", NAMES)
def test_float16_weights_do_not_overflow_in_a_step(name):
    """A step beyond what the dtype holds stays a number."""
    model = Model(torch.float16)
    model.w.data[0, 0] = 60000.0
    build(name, model).step(model, BATCH)
    assert all(p.isfinite().all() for p in model.parameters())
