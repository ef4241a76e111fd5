"""Rank search against brute force and against dense low-rank approximations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from zo_opt.adapters.ranks import energy, search_ranks

from zo_opt import ZOError

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)
RANKS = st.sets(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(shapes, seed):
    return {f"layer{k}": noise(*shape, seed=seed + k) for k, shape in enumerate(shapes)}


def lora_cost(weights):
    return lambda name, rank: rank * sum(weights[name].shape)


def total_energy(weights, chosen):
    return sum(energy(weights[name], [rank])[0] for name, rank in chosen.items())


def total_cost(cost, chosen):
    return sum(cost(name, rank) for name, rank in chosen.items())


def brute_force(weights, cost, ranks, budget):
    options = (dict(zip(weights, choice, strict=True)) for choice in itertools.product(ranks, repeat=len(weights)))
    return max(total_energy(weights, chosen) for chosen in options if total_cost(cost, chosen) <= budget)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_energy_is_what_the_best_approximation_keeps(rows, columns, seed):
    weight = noise(rows, columns, seed=seed)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for rank, value in zip(range(1, 11), energy(weight, range(1, 11)), strict=True):
        lost = (weight - u[:, :rank] * s[:rank] @ vh[:rank]).square().sum() / weight.square().sum()
        assert value == pytest.approx(1 - float(lost), abs=1e-12)  # float64
    assert energy(weight, [min(rows, columns), 50]) == [1.0, 1.0]
    assert energy(weight.T, [1]) == pytest.approx(energy(weight, [1]), abs=1e-12)


def test_energy_in_low_precision_and_of_extremes():
    weight = noise(12, 7)
    assert energy(weight.bfloat16(), [3]) == energy(weight.bfloat16().double(), [3])
    assert energy(torch.nn.Parameter(weight), [3]) == energy(weight, [3])
    assert energy(torch.zeros(3, 4), [1, 2]) == [1.0, 1.0]
    assert energy(weight * 1e-30, [3]) == pytest.approx(energy(weight, [3]), abs=1e-12)
    assert energy(torch.diag(torch.tensor([1.0, 1e-4])), [1])[0] == pytest.approx(1 - 1e-8, abs=1e-14)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 4), ranks=RANKS, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_equal_prices_give_the_optimum(count, ranks, share, seed):
    """Square layers of one size and ranks one apart: every raise costs the same."""
    ranks = range(min(ranks), max(ranks) + 1)
    weights = layers([(6, 6)] * count, seed)
    cost = lora_cost(weights)
    least, most = (total_cost(cost, dict.fromkeys(weights, r)) for r in (ranks[0], ranks[-1]))
    budget = round(least + share * (most - least))
    chosen = search_ranks(weights, cost, ranks, budget)
    assert total_cost(cost, chosen) <= budget
    assert total_energy(weights, chosen) == pytest.approx(brute_force(weights, cost, ranks, budget), abs=1e-11)


@settings(deadline=None, max_examples=100)
@given(shapes=SHAPES, ranks=RANKS, share=st.floats(0, 1), quadratic=st.booleans(), seed=st.integers(0, 99))
def test_unequal_prices_miss_the_optimum_by_less_than_one_raise(shapes, ranks, share, quadratic, seed):
    """A linear cost (LoRA) and a convex one (tensor trains)."""
    weights = layers(shapes, seed)
    linear = lora_cost(weights)
    cost = (lambda name, rank: linear(name, rank) * rank) if quadratic else linear
    least, most = (total_cost(cost, dict.fromkeys(weights, r)) for r in (min(ranks), max(ranks)))
    budget = round(least + share * (most - least))
    chosen = search_ranks(weights, cost, ranks, budget)
    assert list(chosen) == list(weights)
    assert total_cost(cost, chosen) <= budget
    best, found = brute_force(weights, cost, ranks, budget), total_energy(weights, chosen)
    left_out = [
        energy(weights[name], [higher])[0] - energy(weights[name], [rank])[0]
        for name, rank in chosen.items()
        if (higher := min((r for r in ranks if r > rank), default=None))
    ]
    assert best - max(left_out, default=0) - 1e-11 <= found <= best + 1e-11
    # what is left of the budget pays for no further raise that gains anything
    for name, rank in chosen.items():
        higher = min((r for r in ranks if r > rank), default=rank)
        if energy(weights[name], [higher])[0] - energy(weights[name], [rank])[0] > 1e-11:
            assert total_cost(cost, chosen | {name: higher}) > budget


@settings(deadline=None, max_examples=60)
@given(
    shapes=SHAPES,
    ranks=RANKS,
    prices=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    steps=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_each_prefix_of_the_raises_is_the_optimum_for_its_own_cost(shapes, ranks, prices, steps, seed):
    """Fox 1966: budgets at which no raise was left out. A slow twin takes the raises one after another."""
    weights = layers(shapes, seed)
    each = dict(zip(weights, prices, strict=False))

    def cost(name, rank):
        return each[name] * rank

    ordered = sorted(ranks)
    chosen = dict.fromkeys(weights, ordered[0])
    for _ in range(steps):
        raises = {
            name: (energy(weights[name], [higher])[0] - energy(weights[name], [rank])[0])
            / (cost(name, higher) - cost(name, rank))
            for name, rank in chosen.items()
            if (higher := next((r for r in ordered if r > rank), None))
        }
        best = max(raises, key=lambda name: raises[name], default=None)
        if best is None or raises[best] < 1e-9:
            break
        chosen[best] = next(r for r in ordered if r > chosen[best])
    budget = total_cost(cost, chosen)
    assert total_energy(weights, chosen) == pytest.approx(brute_force(weights, cost, ranks, budget), abs=1e-11)
    assert search_ranks(weights, cost, ranks, budget) == chosen


def test_many_cheap_raises_win_over_a_dear_one_that_gains_more():
    """0.25 for 30 parameters, or three times 0.2 for 10 each."""
    weights = {"dear": torch.eye(4), **{f"cheap{k}": torch.eye(5) for k in range(3)}}
    prices = {name: 30 if name == "dear" else 10 for name in weights}
    chosen = search_ranks(weights, lambda name, rank: prices[name] * rank, (1, 2), 90)
    assert chosen == {"dear": 1, "cheap0": 2, "cheap1": 2, "cheap2": 2}


def test_ties_go_to_the_layer_named_first():
    weight = noise(5, 5)
    for names in (("a", "b", "c"), ("c", "b", "a")):
        chosen = search_ranks(dict.fromkeys(names, weight), lambda name, rank: rank, (1, 2, 3), 5)
        assert list(chosen.items()) == [(names[0], 2), (names[1], 2), (names[2], 1)]


def test_no_parameter_is_spent_for_nothing():
    """Rank 1 matrices, zero matrices and ranks above the matrix gain nothing; a raise that is free is taken."""
    weights = {"one": torch.ones(6, 6), "zero": torch.zeros(6, 6), "thin": noise(2, 6), "rich": noise(6, 6)}
    chosen = search_ranks(weights, lambda name, rank: 12 * rank, (1, 2, 4), 10**6)
    assert chosen == {"one": 1, "zero": 1, "thin": 2, "rich": 4}
    assert search_ranks({"a": noise(4, 4)}, lambda name, rank: 7, (1, 2, 3), 7) == {"a": 3}


def test_a_raise_that_does_not_fit_leaves_room_for_smaller_ones():
    weights = {"large": torch.eye(4), "small": torch.eye(8)}
    prices = {"large": 100, "small": 60}
    assert search_ranks(weights, lambda name, rank: prices[name] * rank, (1, 2), 240) == {"large": 1, "small": 2}


@settings(deadline=None, max_examples=30)
@given(shapes=SHAPES, ranks=RANKS)
def test_the_least_budget_is_the_one_named(shapes, ranks):
    weights = layers(shapes, 0)
    cost = lora_cost(weights)
    least = min(ranks) * sum(map(sum, shapes))
    assume(least > 0)
    with pytest.raises(ZOError, match=f"give at least {least}"):
        search_ranks(weights, cost, ranks, least - 1)
    assert set(search_ranks(weights, cost, ranks, least).values()) == {min(ranks)}


@pytest.mark.parametrize(
    ("weights", "cost", "ranks", "message"),
    [
        ({}, lambda name, rank: rank, (1,), "no layers"),
        ({"a": torch.ones(2, 2)}, lambda name, rank: rank, (), "ranks"),
        ({"a": torch.ones(2, 2)}, lambda name, rank: rank, (0, 1), "at least 1"),
        ({"a": torch.ones(2, 2)}, lambda name, rank: rank, (1.5,), "whole numbers"),
        ({"a": torch.ones(2, 2)}, lambda name, rank: -rank, (1, 2), "cost of a falls"),
        ({"a": torch.ones(4)}, lambda name, rank: rank, (1, 2), "needs a matrix"),
        ({"a": torch.ones(4, 0)}, lambda name, rank: rank, (1, 2), "needs a matrix"),
        ({"a": torch.full((2, 2), float("nan"))}, lambda name, rank: rank, (1, 2), "NaN"),
    ],
)
def test_mistakes_are_named(weights, cost, ranks, message):
    with pytest.raises(ZOError, match=message):
        search_ranks(weights, cost, ranks, 100)
