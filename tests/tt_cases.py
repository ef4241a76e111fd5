"""Trains, tokens, a slow twin and error bounds for the tests of ``tt_kernels``."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from tt_kernels import core_shapes

SHAPES = [  # in_dims, out_dims, ranks
    ((2, 3), (4, 5), 3),
    ((7, 11), (13,), 5),  # primes
    ((4, 4), (4, 4), 1),  # rank 1
    ((1, 3, 1), (1, 2), 2),  # dims of 1
    ((6,), (8,), 4),  # one core a side
    ((6,), (2, 2, 2), 3),
    ((2, 3), (4, 5), (4, 2, 7)),
    ((1,), (1,), 1),
    ((3, 2, 2), (), 3),  # all on one side
    ((), (2, 3, 2), 3),
]
# Rounding errors are bounded by CONSTANT * unit roundoff * the same contraction of absolute values. Six cores and as many products
# round a dozen times in bf16 and fp16; sums of at most some hundred terms err by a few units in the wider formats.
CONSTANT = 16
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


@st.composite
def trains(draw, cores=5, rank=6):
    """in_dims, out_dims and a rank for each bond: 1s, primes, one core, all cores on one side."""
    dims = draw(st.lists(st.sampled_from((1, 1, 2, 3, 4, 5, 7)), min_size=1, max_size=cores))
    inputs = draw(st.integers(0, len(dims)))
    bonds = len(dims) - 1
    ranks = draw(st.lists(st.integers(1, rank), min_size=bonds, max_size=bonds))
    return tuple(dims[:inputs]), tuple(dims[inputs:]), tuple(ranks)


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_cores(in_dims, out_dims, ranks, *, dtype=torch.float64, seed=0, lead=()):
    """Scaled so that an output is of order 1, whatever sizes and ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = core_shapes(in_dims, out_dims, ranks)
    paths = math.prod(in_dims) * math.prod(last for _, _, last in shapes)
    std = paths ** (-0.5 / len(shapes))
    return [(torch.randn(*lead, *s, generator=generator, dtype=torch.float64) * std).to(dtype) for s in shapes]


def twin(x, cores, inputs, bias=None):
    """Core after core by einsum in float64: x (..., M) -> (..., N)."""
    z = x.double().reshape(-1, 1, x.shape[-1])  # t tokens, r rank, m inputs still to come
    for core in cores[:inputs]:
        z = torch.einsum("trnm,rns->tsm", z.unflatten(2, (core.shape[1], -1)), core.double())
    z = z.transpose(1, 2)  # t tokens, j outputs so far, r rank
    for core in cores[inputs:]:
        z = torch.einsum("tjr,rns->tjns", z, core.double()).flatten(1, 2)
    y = z.reshape(*x.shape[:-1], z.shape[1])
    return y if bias is None else y + bias.double()


def assert_equals_twin(y, x, cores, inputs, bias=None):
    """Within the bound of the dtype of y."""
    assert y.dtype in ROUNDOFF
    assert y.device == x.device
    expected = twin(x, cores, inputs, bias)
    assert y.shape == expected.shape
    bound = twin(x.abs(), [core.abs() for core in cores], inputs, None if bias is None else bias.abs())
    excess = (y.double() - expected).abs() - CONSTANT * ROUNDOFF[y.dtype] * bound
    assert y.numel() == 0 or excess.max() <= 0
