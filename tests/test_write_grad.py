"""Gradient estimates for any ``torch.optim`` optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from optimizer_problem import BATCH, Model, bits, closure_of, examples_of, flat, make, relative_error, same
from optimizer_table import NAMES, ROWS, build

from zo_opt import NonFiniteLossError, ZOError
from zo_opt.queries import trainables
from zo_opt.schedules import constant_queries

LINEAR = [n for n in NAMES if n not in ("zo-sign", "zo-momentum", "zo-adam")]


@pytest.mark.parametrize("name", LINEAR)
def test_with_sgd_it_takes_the_optimizers_own_steps(name):
    ours, theirs = Model(), Model()
    own, writer = build(name, ours, weight_decay=0.0), build(name, theirs)
    sgd = torch.optim.SGD(theirs.parameters(), lr=ROWS[name].options.get("lr", 0.02))
    for _ in range(8):
        expected = own.step(ours, BATCH)
        sgd.zero_grad()
        loss = writer.write_grad(theirs, BATCH)
        sgd.step()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert relative_error(flat(theirs), flat(ours)) <= 1e-6
    assert writer.last_record.step == own.last_record.step == 7
    assert writer.history.forwards == own.history.forwards


@pytest.mark.parametrize("name", ["zo-sign", "zo-momentum", "zo-adam"])
def test_update_rules_do_not_enter(name):
    """Nor lr, nor weight decay."""
    model, plain = Model(), Model()
    build(name, model, lr=7.0, weight_decay=3.0).write_grad(model, BATCH)
    make(plain, lr=0.0).write_grad(plain, BATCH)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert same(bits(model), bits(Model()))


def test_it_is_right_on_average():
    """The mean over many directions is the gradient that autograd gives: relative error sqrt((d + 1) / queries) = 0.17, doubled."""
    model = Model()
    make(model, query_schedule=constant_queries(1500), zo_eps=1e-3).write_grad(model, BATCH)
    estimate = torch.cat([p.grad.flatten() for p in model.parameters()])
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(model(BATCH), model.parameters())])
    assert relative_error(estimate, exact) < 0.34


@pytest.mark.parametrize("small", [True, False])
def test_adamw_trains_with_it(small, monkeypatch):
    if not small:
        monkeypatch.setattr(trainables.Trainables, "SMALL", 0)
    model = Model()
    writer = make(model, query_schedule=constant_queries(2))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=150)
    first = float(model(BATCH).detach())
    for _ in range(150):
        adamw.zero_grad()
        writer.write_grad(closure_of(model))
        adamw.step()
        scheduler.step()
    assert float(model(BATCH).detach()) < 0.8 * first


def test_it_adds_to_what_is_there_and_can_be_zeroed():
    model = Model()
    writer = make(model)
    model.w.grad = torch.full_like(model.w, 7.0)
    writer.write_grad(model, BATCH)
    plain = Model()
    make(plain).write_grad(plain, BATCH)
    torch.testing.assert_close(model.w.grad, plain.w.grad + 7)
    assert torch.equal(model.b.grad, plain.b.grad)
    for to_none in (False, True):
        torch.optim.SGD(model.parameters(), lr=1.0).zero_grad(set_to_none=to_none)
        assert (model.w.grad is None) if to_none else bool((model.w.grad == 0).all())
        writer.write_grad(model, BATCH)
        assert model.w.grad.abs().max() > 0
    writer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_with_backward_in_one_loss():
    """A differentiable part and one that is not: both gradients add up."""
    model = Model()
    model.w.square().sum().backward()
    exact = model.w.grad.clone()
    make(model).write_grad(model, BATCH)
    plain = Model()
    make(plain).write_grad(plain, BATCH)
    torch.testing.assert_close(model.w.grad, exact + plain.w.grad)


def test_micro_batches_are_estimated_first():
    whole, parts = Model(), Model()
    make(whole).write_grad(whole, BATCH)
    writer = make(parts)
    for i in range(0, 8, 2):
        writer.estimate(parts, examples_of(BATCH, slice(i, i + 2)))
    writer.write_grad()
    torch.testing.assert_close(parts.w.grad, whole.w.grad, rtol=1e-4, atol=1e-6)


def test_every_call_takes_its_own_directions():
    model = Model()
    writer = make(model)
    writer.write_grad(model, BATCH)
    first = model.w.grad.clone()
    writer.zero_grad()
    writer.write_grad(model, BATCH)
    assert not torch.allclose(model.w.grad, first)
    with pytest.raises(ZOError, match="without an estimate"):
        writer.write_grad()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_have_the_weights_dtype_and_shape(dtype):
    model = Model(dtype)
    make(model).write_grad(model, BATCH)
    assert all(p.grad.dtype == dtype and p.grad.shape == p.shape for p in model.parameters())
    plain = Model()
    make(plain).write_grad(plain, BATCH)
    torch.testing.assert_close(model.w.grad.float(), plain.w.grad, rtol=0.1, atol=0.1)


def test_frozen_parameters_get_none():
    model = Model()
    model.w.requires_grad_(False)
    make(model).write_grad(model, BATCH)
    assert model.w.grad is None
    assert model.b.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_losses_that_are_not_finite_never_reach_a_gradient(name):
    """They are counted, and too many stop the run, as with the optimizer's own step."""
    model = Model()
    writer = build(name, model, max_failed_steps=3)
    writer.write_grad(model, BATCH)
    before = copy.deepcopy([p.grad for p in model.parameters()])
    state = copy.deepcopy([dict(writer.state[p]) for p in model.parameters()])

    def broken(batch):
        return model(batch) * math.nan

    for _ in range(2):
        assert math.isnan(float(writer.write_grad(broken, BATCH)))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    for p, kept in zip(model.parameters(), state, strict=True):
        assert all(torch.equal(writer.state[p][n], t) for n, t in kept.items())
    assert writer.dropped_queries > 0
    with pytest.raises(NonFiniteLossError, match="3 steps"):
        writer.write_grad(broken, BATCH)


@pytest.mark.parametrize("name", NAMES)
def test_it_continues_from_a_state_to_the_same_bits(name):
    model = Model()
    writer = build(name, model)
    for _ in range(2):
        writer.write_grad(model, BATCH)
    state = copy.deepcopy(writer.state_dict())
    writer.zero_grad()
    writer.write_grad(model, BATCH)
    resumed = Model()
    second = build(name, resumed, seed=77)
    second.load_state_dict(state)
    second.write_grad(resumed, BATCH)
    assert torch.equal(resumed.w.grad, model.w.grad)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sparse-mezo"])  # its mask follows the weights, which moved
def test_the_last_steps_estimate(name):
    """Twins: one steps and writes what it applied, the other writes in place of a step. Nothing else may differ."""
    ours, theirs = Model(), Model()
    own, writer = build(name, ours, lr=1e-6), build(name, theirs, lr=1e-6)
    own.step(ours, BATCH)
    state = copy.deepcopy(dict(own.state))
    own.write_last_grad()
    writer.write_grad(theirs, BATCH)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(own.state[a][n], t) for n, t in state.get(a, {}).items() if isinstance(t, torch.Tensor))
    assert own.step_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_writing_it_changes_nothing_that_follows(name):
    one, other = Model(), Model()
    quiet, writing = build(name, one), build(name, other)
    for _ in range(3):
        quiet.step(one, BATCH)
        writing.step(other, BATCH)
        writing.write_last_grad()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
        writing.zero_grad()
    assert same(bits(one), bits(other))


def test_it_is_zero_where_no_loss_was_finite_and_needs_a_step():
    model = Model()
    writer = make(model)
    with pytest.raises(ZOError, match="before a step"):
        writer.write_last_grad()
    writer.step(lambda batch: model(batch) * math.nan, BATCH)
    writer.write_last_grad()
    assert all(not p.grad.any() for p in model.parameters())
