"""tt_kernels: every result against the dense matrix, in float64, and against tensorly."""

from __future__ import annotations

import itertools
import math

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tt_kernels import core_shapes, factorize, merge_cores, reconstruct, tt_linear, useful_ranks

DIMS = st.lists(st.integers(1, 7), min_size=1, max_size=4)
SHAPES = [  # in_dims, out_dims, rank
    ((2, 3), (4, 5), 3),
    ((7, 11), (13,), 5),  # primes
    ((4, 4), (4, 4), 1),  # rank 1
    ((1, 3, 1), (1, 2), 2),  # dims of 1
    ((6,), (8,), 4),  # one core a side
    ((6,), (2, 2, 2), 3),
    ((1,), (1,), 1),
]


def make_cores(in_dims, out_dims, rank, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = core_shapes(in_dims, out_dims, rank)
    # scaled so that the weight's entries are of order 1 / sqrt(inputs), whatever the ranks
    paths = rank ** (len(shapes) - 1)
    std = (math.prod(in_dims) * paths) ** (-0.5 / len(shapes))
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * std).to(dtype) for s in shapes]


def make_x(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual, expected, rtol):
    """Relative to the largest entry: single entries may cancel."""
    return (actual - expected).abs().max() <= rtol * expected.abs().max()


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


@pytest.mark.parametrize(
    ("size", "parts", "expected"),
    [(4096, 3, (16, 16, 16)), (1024, 3, (8, 8, 16)), (64, 3, (4, 4, 4)), (64, 2, (8, 8)), (97, 3, (97,)), (1, 4, (1,))],
)
def test_factorize_gives_the_published_shapes(size, parts, expected):
    assert factorize(size, parts) == expected


@pytest.mark.parametrize(("size", "parts"), [(0, 2), (-4, 2), (8, 0)])
def test_factorize_refuses_the_impossible(size, parts):
    with pytest.raises(ValueError, match="at least 1"):
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
    dense = make_x(*dims)
    unfoldings = [dense.reshape(math.prod(dims[:k]), -1) for k in range(1, len(dims))]
    assert useful_ranks(dims, 10**6) == [int(torch.linalg.matrix_rank(u)) for u in unfoldings]
    bounded = useful_ranks(dims, rank)
    assert all(1 <= r <= min(rank, full) for r, full in zip(bounded, useful_ranks(dims, 10**6), strict=True))


def test_core_shapes_with_one_rank_a_bond():
    assert core_shapes((2, 3), (4,), (5, 6)) == [(1, 2, 5), (5, 3, 6), (6, 4, 1)]
    with pytest.raises(ValueError, match="3 ranks do not fit 3 dims"):
        core_shapes((2, 3), (4,), (5, 6, 7))


@pytest.mark.parametrize(("in_dims", "out_dims", "rank"), SHAPES)
def test_reconstruct_equals_tensorly(in_dims, out_dims, rank):
    cores = make_cores(in_dims, out_dims, rank)
    full = tensorly.tt_to_tensor([c.numpy() for c in cores])
    dense = torch.from_numpy(full).reshape(math.prod(in_dims), math.prod(out_dims))
    torch.testing.assert_close(reconstruct(cores, in_dims, out_dims), dense, rtol=1e-10, atol=1e-13)


@settings(deadline=None, max_examples=60)
@given(in_dims=DIMS, out_dims=DIMS, rank=st.integers(1, 5), seed=st.integers(0, 100))
def test_merge_cores_is_the_dense_matrix_as_a_pair(in_dims, out_dims, rank, seed):
    cores = make_cores(in_dims, out_dims, rank, seed=seed)
    a_RM, b_NR = merge_cores(cores, len(in_dims))
    assert a_RM.shape == (rank, math.prod(in_dims))
    assert b_NR.shape == (math.prod(out_dims), rank)
    assert close(a_RM.T @ b_NR.T, reconstruct(cores, in_dims, out_dims), 1e-10)


@settings(deadline=None, max_examples=60)
@given(
    in_dims=DIMS,
    out_dims=DIMS,
    rank=st.integers(1, 5),
    leading=st.lists(st.integers(1, 3), max_size=3),
    biased=st.booleans(),
)
def test_tt_linear_equals_dense(in_dims, out_dims, rank, leading, biased):
    cores = make_cores(in_dims, out_dims, rank)
    x, bias = make_x(*leading, math.prod(in_dims)), make_x(math.prod(out_dims), seed=2) if biased else None
    y = tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims, bias=bias)
    dense = x @ reconstruct(cores, in_dims, out_dims) + (bias if biased else 0)
    assert y.shape == (*leading, math.prod(out_dims))
    assert close(y, dense, 1e-10)


@pytest.mark.parametrize(("in_dims", "out_dims", "rank"), SHAPES)
def test_tt_linear_equals_tensorly(in_dims, out_dims, rank):
    cores, x = make_cores(in_dims, out_dims, rank), make_x(9, math.prod(in_dims))
    dense = torch.from_numpy(tensorly.tt_to_tensor([c.numpy() for c in cores])).reshape(x.shape[1], -1)
    assert close(tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims), x @ dense, 1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("in_dims", "out_dims", "rank"), [*SHAPES, ((16, 16, 16), (4, 4, 4), 5)])
def test_tt_linear_in_low_precision(in_dims, out_dims, rank, dtype, rtol):
    """fp32: some tens of roundings of 6e-8; bf16: up to six of 4e-3."""
    cores, x = make_cores(in_dims, out_dims, rank, dtype=dtype), make_x(7, math.prod(in_dims), dtype=dtype)
    y = tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims)
    dense = x.double() @ reconstruct([c.double() for c in cores], in_dims, out_dims)
    assert y.dtype == dtype
    assert close(y.double(), dense, rtol)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6)])
def test_no_tokens(shape):
    y = tt_linear(torch.zeros(shape), make_cores((2, 3), (4,), 2, dtype=torch.float32), in_dims=(2, 3), out_dims=(4,))
    assert y.shape == (*shape[:-1], 4)


def test_non_contiguous_input_and_cores():
    cores, x = make_cores((2, 3), (4, 5), 3), make_x(6, 8).T
    strided = [c.permute(2, 1, 0).contiguous().permute(2, 1, 0) for c in cores]
    assert not x.is_contiguous()
    assert not strided[1].is_contiguous()
    y = tt_linear(x, strided, in_dims=(2, 3), out_dims=(4, 5))
    torch.testing.assert_close(y, x @ reconstruct(cores, (2, 3), (4, 5)), rtol=1e-10, atol=1e-12)


def test_unequal_ranks():
    cores = [make_x(1, 2, 3), make_x(3, 3, 7), make_x(7, 4, 2), make_x(2, 5, 1)]
    x = make_x(5, 6, seed=3)
    y = tt_linear(x, cores, in_dims=(2, 3), out_dims=(4, 5))
    torch.testing.assert_close(y, x @ reconstruct(cores, (2, 3), (4, 5)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("in_dims", "out_dims", "rank"), [((2, 3), (2, 2), 2), ((3,), (2,), 2), ((2, 1), (3,), 1)])
def test_gradients(in_dims, out_dims, rank):
    cores = [c.requires_grad_() for c in make_cores(in_dims, out_dims, rank)]
    x, bias = make_x(2, math.prod(in_dims)).requires_grad_(), make_x(math.prod(out_dims), seed=2).requires_grad_()

    def run(x, bias, *cores):
        return tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims, bias=bias)

    assert torch.autograd.gradcheck(run, (x, bias, *cores))


GOOD = ((1, 2, 3), (3, 3, 3), (3, 4, 1))


@pytest.mark.parametrize(
    ("shapes", "in_dims", "out_dims", "message"),
    [
        (GOOD[:2], (2, 3), (4,), "2 cores do not fit 3 dims"),
        ((*GOOD, (1, 1, 1)), (2, 3), (4,), "4 cores do not fit 3 dims"),
        (((2, 2, 3), *GOOD[1:]), (2, 3), (4,), r"core 0 has shape \(2, 2, 3\)"),
        ((GOOD[0], (2, 3, 3), GOOD[2]), (2, 3), (4,), "core 1 has shape"),
        ((GOOD[0], (3, 5, 3), GOOD[2]), (2, 3), (4,), "core 1 has shape"),
        ((GOOD[0], (9, 3), GOOD[2]), (2, 3), (4,), "core 1 has shape"),
        ((*GOOD[:2], (3, 4, 2)), (2, 3), (4,), "rank 2"),
        ((), (), (), "0 cores do not fit 0 dims"),
    ],
)
def test_wrong_cores_are_refused(shapes, in_dims, out_dims, message):
    x = torch.zeros(5, math.prod(in_dims))
    with pytest.raises(ValueError, match=message):
        tt_linear(x, [torch.zeros(s) for s in shapes], in_dims=in_dims, out_dims=out_dims)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(5, 7), None, "7 features"),
        (torch.zeros(5, 6), torch.zeros(5), "bias"),
        (torch.zeros(5, 6), torch.zeros(1, 4), "bias"),
        (torch.zeros(5, 6, dtype=torch.float64), None, "float64"),
        (torch.zeros(5, 6), torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.zeros(()), None, "features|axes|scalar|shape"),
    ],
    ids=["features", "bias size", "bias axes", "core dtype", "bias dtype", "no axis"],
)
def test_wrong_inputs_are_refused(x, bias, message):
    with pytest.raises(ValueError, match=message):
        tt_linear(x, [torch.zeros(s) for s in GOOD], in_dims=(2, 3), out_dims=(4,), bias=bias)
