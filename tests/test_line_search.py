"""Trying a step before taking it."""

from __future__ import annotations

import math

import pytest
import torch
from optimizer_problem import BATCH, Model, bits, examples_of, flat, make, relative_error, same
from optimizer_table import NAMES, build

from zo_opt import ZOError
from zo_opt.optim import Adam, LineSearch


def gradient_of_a_step(model, **options):
    """The estimate that the first step moves along."""
    copy = Model()
    make(copy, lr=1.0, **options).step(copy, BATCH)
    return flat(model) - flat(copy)


def losses_along(model, moves):
    values, found = flat(model), []
    probe = Model(torch.float64)
    for move in moves:
        torch.nn.utils.vector_to_parameters(values.double() + move.double(), probe.parameters())
        found.append(float(probe(BATCH).detach()))
    return found


@pytest.mark.parametrize("lr", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("multipliers", [(0.0, 1.0), (0.0, 1.0, -1.0), (1.0, 0.5, 0.25, 0.1, 0.0), (2.0, 1.0)])
def test_the_best_multiplier_is_taken(lr, multipliers):
    model, start = Model(), flat(Model())
    optimizer = make(model, lr=lr, line_search=LineSearch(multipliers))
    optimizer.step(model, BATCH)
    moves = [-m * lr * gradient_of_a_step(Model()) for m in multipliers]
    losses = losses_along(Model(), moves)
    expected = start + moves[losses.index(min(losses))]
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-5 * max(1, lr))
    assert optimizer.history.forwards == 2 + len(multipliers)


def test_a_bad_step_is_rejected_to_the_bit():
    """However large lr is, the loss never rises."""
    model = Model()
    optimizer = make(model, lr=3.0, line_search=LineSearch())
    rejected, loss = 0, losses_along(model, [torch.zeros(())])[0]
    for _ in range(20):
        before = bits(model)
        optimizer.step(model, BATCH)
        rejected += same(bits(model), before)
        loss, previous = losses_along(model, [torch.zeros(())])[0], loss
        assert loss <= previous
    assert 0 < rejected < 20


def test_a_rejected_step_still_decays():
    model = Model()
    make(model, lr=0.1, weight_decay=0.5, line_search=LineSearch((0.0,))).step(model, BATCH)
    torch.testing.assert_close(model.w.detach(), Model().w.detach() * 0.95)
    assert torch.equal(model.b, Model().b)


def test_ties_go_to_the_multiplier_named_first():
    for multipliers in [(0.0, 1.0), (1.0, 0.0)]:
        model = Model()
        # a slope between the two sides, and the same loss at every candidate
        losses = iter([2.0, 1.0, 5.0, 5.0])
        make(model, line_search=LineSearch(multipliers)).step(lambda losses=losses: next(losses))
        assert same(bits(model), bits(Model())) == (multipliers[0] == 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_candidates_without_a_finite_loss_are_left(bad):
    model = Model()
    losses = iter([2.0, 1.0, bad, 9.0])
    make(model, line_search=LineSearch((1.0, 0.0))).step(lambda: next(losses))
    assert same(bits(model), bits(Model()))
    losses = iter([2.0, 1.0, bad, bad])
    make(model, line_search=LineSearch((1.0, 2.0))).step(lambda: next(losses))
    assert same(bits(model), bits(Model()))


def test_every_micro_batch_is_searched():
    whole, parts = Model(), Model()
    one, four = (make(m, lr=0.3, line_search=LineSearch((1.0, 0.5, 0.25, 0.0))) for m in (whole, parts))
    for _ in range(4):
        one.step(whole, BATCH)
        for i in range(0, 8, 2):
            four.estimate(parts, examples_of(BATCH, slice(i, i + 2)))
        four.step()
    assert relative_error(flat(parts), flat(whole)) < 1e-6
    assert four.history.forwards == 4 * one.history.forwards == 4 * 4 * (2 + 4)


WITH_MEMORY = (
    "hizoo",
    "mezo-svrg",
    "zo-kalman",
    "agzo",
    "p-gap",
)  # their steps are not along the directions that a search would try
SEARCHED = [n for n in NAMES if n not in ("zo-sign", "zo-momentum", "zo-adam", "zo-conservative", *WITH_MEMORY)]


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_optimizers_with_a_memory_refuse_a_search(name):
    with pytest.raises(ZOError, match="line_search"):
        build(name, Model(), line_search=LineSearch())


@pytest.mark.parametrize("name", SEARCHED)
def test_the_candidate_that_was_seen_is_the_one_taken(name):
    """Of every optimizer, with groups that have their own lr."""
    model, seen = Model(), []

    def closure(batch):
        seen.append((flat(model), model(batch).detach()))
        return model(batch)

    groups = [{"params": [model.w], "lr": 0.01}, {"params": [model.b], "lr": 0.05}]
    optimizer = build(name, model, params=groups, weight_decay=0.0, line_search=LineSearch((1.0, 0.3)))
    for _ in range(3):
        optimizer.step(closure, BATCH)
        best = min(seen[-2:], key=lambda pair: pair[1])[0]
        torch.testing.assert_close(flat(model), best, rtol=1e-6, atol=1e-7)


def test_the_update_holds_what_was_taken():
    model = Model()
    optimizer = make(model, lr=0.3, line_search=LineSearch((0.25,)))
    optimizer.step(model, BATCH)
    assert optimizer.last_update.coefficients == pytest.approx([0.25 * optimizer.last_record.projected_grads[0]])


def test_only_plain_sgd_is_searched():
    with pytest.raises(ZOError, match="plain SGD"):
        make(Model(), update_rule=Adam(), line_search=LineSearch())
    with pytest.raises(ZOError, match="multiplier"):
        LineSearch(())


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_that_changes_nothing(name):
    """With the multiplier 1 alone the steps are those without a search."""
    model, plain = Model(), Model()
    optimizer, other = build(name, model, line_search=LineSearch((1.0,))), build(name, plain)
    for _ in range(6):
        optimizer.step(model, BATCH)
        other.step(plain, BATCH)
    assert relative_error(flat(model), flat(plain)) < 1e-6


def test_an_exception_in_the_search_leaves_the_weights():
    """On any call; and the next step is the one that would have been taken."""
    model, plain = Model(), Model()
    optimizer, calls, fail_at = build("zo-conservative", model), [], math.inf

    def closure(batch):
        calls.append(1)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return model(batch)

    optimizer.step(closure, BATCH)
    before = bits(model)
    for n in range(1, 6):
        calls.clear()
        fail_at = n
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure, BATCH)
        assert same(bits(model), before)
        assert optimizer.step_count == 1
    fail_at = math.inf
    optimizer.step(closure, BATCH)
    other = build("zo-conservative", plain)
    for _ in range(2):
        other.step(plain, BATCH)
    assert same(bits(model), bits(plain))
