"""Shapes of tensor trains, and their dense matrices, against brute force and tensorly."""

from __future__ import annotations

import itertools
import math

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tt_cases import SHAPES, assert_equals_twin, make_cores, normal, trains, twin
from tt_kernels import core_shapes, factorize, reconstruct, tt_linear, useful_ranks

DIMS = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def brute_force_factorizations(size, parts):
    divisors = [d for d in range(2, size + 1) if size % d == 0]
    for length in range(1, parts + 1):
        for combo in itertools.combinations_with_replacement(divisors, length):
            if math.prod(combo) == size:
                yield combo


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 20000), parts=st.integers(1, 5))
def test_factorize_product_order_and_count(size, parts):
    factors = factorize(size, parts)
    assert math.prod(factors) == size
    assert list(factors) == sorted(factors)
    assert 1 <= len(factors) <= parts
    assert all(f > 1 for f in factors) or factors == (1,)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2, 150), parts=st.integers(1, 3))
def test_factorize_makes_the_largest_factor_as_small_as_possible(size, parts):
    assert max(factorize(size, parts)) == min(max(f) for f in brute_force_factorizations(size, parts))


@pytest.mark.parametrize(("size", "parts"), [(-4, 2), (8, 0)])
def test_factorize_refuses_the_impossible(size, parts):
    with pytest.raises(ValueError, match=f"cannot factorise size {size} into {parts} parts; both must be at least 1"):
        factorize(size, parts)


@given(in_dims=DIMS, out_dims=DIMS, rank=st.integers(1, 6))
def test_core_shapes_chain_from_rank_one_to_rank_one(in_dims, out_dims, rank):
    shapes = core_shapes(in_dims, out_dims, rank)
    assert [n for _, n, _ in shapes] == [*in_dims, *out_dims]
    assert shapes[0][0] == shapes[-1][2] == 1
    assert all(left[2] == right[0] == rank for left, right in itertools.pairwise(shapes))


@settings(deadline=None, max_examples=50)
@given(dims=st.lists(st.integers(1, 5), min_size=2, max_size=5), rank=st.integers(1, 40))
def test_useful_ranks_are_the_ranks_of_a_random_tensor(dims, rank):
    """With unbounded ranks: those of a generic dense tensor's unfoldings; bounded ones never exceed the bound."""
    dense = normal(*dims)
    unfoldings = [dense.reshape(math.prod(dims[:k]), -1) for k in range(1, len(dims))]
    assert useful_ranks(dims, 10**6) == [int(torch.linalg.matrix_rank(u)) for u in unfoldings]
    bounded = useful_ranks(dims, rank)
    assert all(1 <= r <= min(rank, full) for r, full in zip(bounded, useful_ranks(dims, 10**6), strict=True))


def test_core_shapes_with_one_rank_a_bond():
    assert core_shapes((2, 3), (4,), (5, 6)) == [(1, 2, 5), (5, 3, 6), (6, 4, 1)]
    with pytest.raises(ValueError, match="3 ranks do not fit 3 dims; give one for each of 2 bonds"):
        core_shapes((2, 3), (4,), (5, 6, 7))


@pytest.mark.parametrize(("in_dims", "out_dims", "ranks"), SHAPES)
def test_matrix_and_layer_equal_tensorly(in_dims, out_dims, ranks):
    cores, x = make_cores(in_dims, out_dims, ranks), normal(9, math.prod(in_dims))
    dense = torch.from_numpy(tensorly.tt_to_tensor([c.numpy() for c in cores])).reshape(x.shape[1], -1)
    torch.testing.assert_close(reconstruct(cores, in_dims, out_dims), dense, rtol=1e-10, atol=1e-13)
    y = tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims)
    torch.testing.assert_close(y, x @ dense, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(train=trains())
def test_the_twin_equals_the_dense_matrix(train):
    """The oracle of the other tests, and the bound it gives, against the definition."""
    in_dims, out_dims, _ = train
    cores, x = make_cores(*train), normal(3, math.prod(in_dims))
    dense = x @ reconstruct(cores, in_dims, out_dims)
    torch.testing.assert_close(twin(x, cores, len(in_dims)), dense, rtol=1e-10, atol=1e-12)
    assert_equals_twin(dense, x, cores, len(in_dims))
    with pytest.raises(AssertionError):
        assert_equals_twin(dense + 1e-9, x, cores, len(in_dims))
