"""Directions: known answers, any slice in any order, independence, moments, and the global random state left alone.

Every statistical bound is 5 standard errors (two-sided p < 6e-7 a check); seeds are fixed, so a pass stays a pass.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt.directions import DIRECTIONS, StepDirections, Stream, get_directions, philox
from zo_opt.errors import ZOError

CPU = torch.device("cpu")
NAMES = sorted(DIRECTIONS)
N = 100_000
STREAM = Stream(seed=3, step=5, query=2, parameter=1)


def draw(name, stream=STREAM, start=0, stop=N):
    return get_directions(name).slice(stream, start, stop, CPU)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123's kat_vectors, philox 4x32 10."""
    words = philox([torch.tensor([c], dtype=torch.int64) for c in counter], key)[0]
    assert [f"{w:08x}" for w in words.tolist()] == expected


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype(name):
    z = draw(name, start=7, stop=20)
    assert z.shape == (13,)
    assert z.dtype == torch.float32
    assert draw(name, start=4, stop=4).shape == (0,)


def test_rademacher_is_plus_or_minus_one():
    assert set(draw("rademacher").tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_slice_is_that_part_of_the_whole(name, data):
    size = data.draw(st.sampled_from([1, 15, 127, 129, 1000, 70_000, 140_000]))
    bounds = st.integers(0, size)
    slices = data.draw(st.lists(st.tuples(bounds, bounds).map(sorted), min_size=1, max_size=5))
    whole = draw(name, stop=size)
    for start, stop in slices:  # in whatever order they come
        assert torch.equal(draw(name, start=start, stop=stop), whole[start:stop])


@pytest.mark.parametrize("name", NAMES)
def test_slices_at_block_edges(name):
    whole = draw(name, stop=200_000)
    for edge in (1 << 16, 2 << 16, 128, 65_536 + 128):
        for start, stop in ((edge - 1, edge + 1), (edge - 3, edge), (edge, edge + 3), (edge - 70_000, edge + 70_000)):
            first, last = max(start, 0), min(stop, 200_000)
            assert torch.equal(draw(name, start=first, stop=last), whole[first:last])


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5), queries=st.integers(1, 4), step=st.integers(0, 10**9)
)
def test_whole_equals_the_slices(name, sizes, queries, step):
    kind = get_directions(name)
    whole = kind.whole(11, step, queries, sizes, CPU)
    assert whole.shape == (queries, sum(sizes))
    for q in range(queries):
        parts = [kind.slice(Stream(11, step, q, i), 0, n, CPU) for i, n in enumerate(sizes)]
        assert torch.equal(whole[q], torch.cat(parts))


@pytest.mark.parametrize("name", NAMES)
def test_kept_directions_equal_redrawn_ones(name):
    parameters = [torch.zeros(3, 50), torch.zeros(170)]
    kept, redrawn = (StepDirections(get_directions(name), 1, 2, parameters) for _ in range(2))
    kept.keep(3)
    for query in range(4):  # the last one was not kept
        for parameter in (0, 1):
            ours, theirs = (d.slice(query, parameter, 20, 140) for d in (kept, redrawn))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_few_queries_kept_before_many(name):
    """A second, larger request must not change what was drawn for the first queries."""
    directions = StepDirections(get_directions(name), 1, 2, [torch.zeros(40)])
    directions.keep(1)
    first = directions.slice(0, 0, 0, 40).clone()
    directions.keep(5)
    assert torch.equal(directions.slice(0, 0, 0, 40), first)


@pytest.mark.parametrize("name", NAMES)
def test_same_stream_same_bits(name):
    assert torch.equal(draw(name), draw(name))


OTHERS = {
    "seed": STREAM._replace(seed=4),
    "far seed": STREAM._replace(seed=2**62),
    "negative seed": STREAM._replace(seed=-1),
    "step": STREAM._replace(step=6),
    "query": STREAM._replace(query=3),
    "parameter": STREAM._replace(parameter=2),
    "step and seed exchanged": STREAM._replace(seed=STREAM.step, step=STREAM.seed),
    "query and parameter exchanged": STREAM._replace(query=STREAM.parameter, parameter=STREAM.query),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", OTHERS)
def test_other_streams_are_uncorrelated(name, other):
    ours, theirs = draw(name).double(), draw(name, OTHERS[other]).double()
    assert abs(float((ours * theirs).mean())) < 5 / N**0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lag", [1, 2, 31, 32, 64, 128, 65_536])
def test_entries_are_uncorrelated_with_their_neighbours(name, lag):
    z = draw(name).double()
    assert abs(float((z[:-lag] * z[lag:]).mean())) < 5 / (N - lag) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_mean_zero_and_variance_one(name):
    z = draw(name).double()
    assert abs(float(z.mean())) < 5 / N**0.5
    square = z.square()
    assert abs(float(square.mean()) - 1) <= 5 * float(square.std()) / N**0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_has_mean_zero_and_variance_one(name):
    """Over queries, entry by entry: no position is biased (bound: 5 standard errors over 2000 queries)."""
    z = get_directions(name).whole(0, 0, 2000, [7, 6], CPU).double()
    assert z.mean(0).abs().max() < 5 / 2000**0.5
    assert ((z.square().mean(0) - 1).abs() <= 5 * z.square().std(0) / 2000**0.5).all()
    correlations = (z.T @ z / 2000).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 2000**0.5


def test_gaussian_is_gaussian():
    """Fourth moment 3 and third moment 0, within 5 standard errors (variances 96 and 15)."""
    z = draw("gaussian").double()
    assert abs(float(z.pow(4).mean()) - 3) < 5 * (96 / N) ** 0.5
    assert abs(float(z.pow(3).mean())) < 5 * (15 / N) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw(name)
    get_directions(name).whole(0, 0, 2, [40, 3], CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize("name", NAMES)
def test_global_seed_has_no_influence(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = draw(name, stop=100)
        torch.manual_seed(2)
        assert torch.equal(draw(name, stop=100), first)


def test_get_directions():
    kind = DIRECTIONS["rademacher"]
    assert get_directions("rademacher") is kind
    assert get_directions(kind) is kind
    with pytest.raises(ZOError, match="gaussian"):
        get_directions("cauchy")
