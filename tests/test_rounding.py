"""Stochastic rounding: exact values stay, others go to a neighbour, the mean is exact, and only the position decides.

Statistical bounds are 5 standard errors (two-sided p < 6e-7 a check) of independent steps; seeds are fixed.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zo_opt import MeZO
from zo_opt.directions import Directions, Stream
from zo_opt.optim import Update, apply
from zo_opt.optim.rounding import round_into
from zo_opt.queries.trainables import Trainables

NARROW = [torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
BLOCK = 1 << 18
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # spacing above 1


def rounded(values, dtype, step=0, start=0, seed=3):
    out = torch.empty(len(values), dtype=dtype)
    round_into(out, values.clone(), Stream(seed, step, 0), start)
    return out


def neighbours(values, dtype):
    """The largest number of the dtype not above each value, and the smallest not below it."""
    everything = torch.arange(-(2**15), 2**15).short().view(dtype).float()
    everything = everything[~everything.isnan()].unique()
    above = torch.searchsorted(everything, values.contiguous())
    exact = everything[above.clamp(max=len(everything) - 1)] == values
    return everything[torch.where(exact, above, above - 1)], everything[above]


@both
def test_every_number_of_the_dtype_stays(dtype):
    """All 2^16 bit patterns: zeros of both signs, subnormals, the largest, infinities. NaN stays NaN."""
    patterns = torch.arange(-(2**15), 2**15).short()
    values = patterns.view(dtype)
    number = ~values.isnan()
    for step in range(3):
        out = rounded(values.float(), dtype, step)
        assert torch.equal(out.view(torch.int16)[number], patterns[number])
        assert out[~number].isnan().all()


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@both
@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.one_of(floats, floats.map(lambda x: x % 1e4), floats.map(lambda x: x % 1e-5)), min_size=1))
def test_only_neighbours(dtype, values):
    values = torch.tensor(values, dtype=torch.float32)
    low, high = neighbours(values, dtype)
    for step in range(4):
        out = rounded(values, dtype, step).float()
        assert ((out == low) | (out == high)).all()
        assert ((out.signbit() == values.signbit()) | (out == 0)).all()


@both
def test_beyond_the_largest_number(dtype):
    """It goes to the largest or to infinity, as for nearest rounding: an update that overflows is not hidden."""
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest * 1.0009, -largest * 1.0009, 3e38, -3e38])
    low, high = neighbours(values, dtype)
    out = rounded(values, dtype).float()
    assert ((out == low) | (out == high)).all()


@both
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0, 1e-7], ids=["ones", "small", "large", "tiny"])
def test_the_mean_is_exact_for_every_entry(dtype, scale):
    """200 entries of both signs over 2000 steps; 1e-7 lies among fp16's subnormals."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) * scale
    low, high = neighbours(values, dtype)
    up = torch.stack([rounded(values, dtype, step).float() == high for step in range(2000)]).double().mean(0)
    share = (values.double() - low) / (high.double() - low)
    assert ((up - share).abs() < 5 * (share * (1 - share) / 2000).sqrt() + 2**-16).all()


@both
def test_neighbouring_entries_share_the_load(dtype):
    """The dither of one step covers its range evenly: 1000 equal values are rounded up in their share within 1 %."""
    ulp = ULP[dtype]
    for share in (0.03, 0.25, 0.7):
        up = (rounded(torch.full((1000,), 1 + share * ulp), dtype).float() > 1).double().mean()
        assert abs(float(up) - share) < 0.01


@both
@settings(deadline=None, max_examples=40)
@given(
    base=st.sampled_from([0, 5, BLOCK - 20, 2 * BLOCK - 3]),
    size=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_any_range_is_that_part_of_the_whole(dtype, base, size, cuts):
    values = torch.linspace(-1, 1, 61)[:size]
    whole = rounded(values, dtype, start=base)
    bounds = sorted({0, size, *(min(c, size) for c in cuts)})
    for first, last in pairwise(bounds):
        part = rounded(values[first:last], dtype, start=base + first)
        assert torch.equal(part.view(torch.int16), whole[first:last].view(torch.int16))


@both
def test_long_ranges(dtype):
    values = torch.randn(3 * BLOCK + 77, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, dtype)
    for start, stop in ((1, 3 * BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK - 1, 3 * BLOCK + 77), (BLOCK + 5, BLOCK + 6)):
        assert torch.equal(rounded(values[start:stop], dtype, start=start), whole[start:stop])


@both
def test_streams_decide(dtype):
    """The same seed and step round alike, others do not; blocks of 2^18 entries are shifted by numbers of their own."""
    values = torch.full((500,), 1 + 0.5 * ULP[dtype])
    first = rounded(values, dtype)
    assert torch.equal(rounded(values, dtype), first)
    for other in ({"step": 1}, {"seed": 4}, {"start": BLOCK}):
        assert not torch.equal(rounded(values, dtype, **other), first)


@both
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_of_a_thousandth_of_the_spacing_add_up(dtype, sign):
    """2000 of them move every one of 300 entries by 2 spacings, on average and each within 5 deviations."""
    weight, ulp = torch.full((300,), 1.25, dtype=dtype), ULP[dtype]
    for step in range(2000):
        round_into(weight, weight.float() + sign * ulp / 1000, Stream(0, step, 0), 0)
    moved = (weight.double() - 1.25) / ulp * sign
    deviation = (2000 * 0.001 * 0.999) ** 0.5
    assert ((moved - 2).abs() < 5 * deviation).all()
    assert abs(float(moved.mean()) - 2) < 5 * deviation / 300**0.5


class Ones(Directions):
    name = "ones"

    def draw(self, stream, shapes, start, stop, device):
        return torch.ones(stop - start, device=device)


@both
@pytest.mark.parametrize("small", [True, False], ids=["gathered", "in place"])
def test_an_optimizers_tiny_updates_count(dtype, small, monkeypatch):
    """The same through MeZO's own updates, over two parameters, of which the second's lr is half the first's."""
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    thetas = [nn.Parameter(torch.full((15, 20), 1.25, dtype=dtype)) for _ in range(2)]
    lr = ULP[dtype] / 1000
    optimizer = MeZO([{"params": thetas[0]}, {"params": thetas[1]}], lr=lr, directions=Ones())
    for step in range(1000):
        apply(optimizer, Update(step, (lr, lr / 2), (1.0,)))
    for theta, expected in zip(thetas, (1, 0.5), strict=True):
        moved = (1.25 - theta.detach().double()) / ULP[dtype]
        assert abs(float(moved.mean()) - expected) < 5 * expected**0.5 / 300**0.5
        assert ((moved - expected).abs() < 5 * expected**0.5 + 1).all()


@both
def test_nothing_to_round(dtype):
    assert rounded(torch.empty(0), dtype, start=7).shape == (0,)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    rounded(torch.randn(10, generator=torch.Generator().manual_seed(0)), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
