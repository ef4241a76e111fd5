"""Directions: any range in any order, independence, moments, each distribution's own promises, no global random state.

Every statistical bound is 5 standard errors (two-sided p < 6e-7 a check); seeds are fixed, so a pass stays a pass.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt.directions import (
    DIRECTIONS,
    LowRank,
    Sparse,
    StepDirections,
    Stream,
    Subspace,
    low_rank,
    sphere,
)
from zo_opt.directions.base import MatrixDirections, numel, pieces
from zo_opt.directions.philox import philox
from zo_opt.errors import ZOError

CPU = torch.device("cpu")
NAMES = sorted(DIRECTIONS)
PLAIN = ["gaussian", "philox-gaussian", "rademacher", "sparse", "sphere"]  # entries know nothing of matrices
ISOTROPIC = [*PLAIN, "sign-flip"]  # E[z z^T] = I for parameters of every shape
N = 100_000
STREAM = Stream(seed=3, step=5, query=2)

# Numbers, vectors, matrices, 3-d; some without entries.
shapes_of_parameters = (
    st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5)
    .map(tuple)
    .filter(lambda shapes: sum(map(numel, shapes)) > 0)
)


def draw(kind, shapes=((N,),), stream=STREAM, start=0, stop=None):
    stop = sum(map(numel, shapes)) if stop is None else stop
    return DIRECTIONS.make(kind).draw(stream, shapes, start, stop, CPU)


def forget():
    """Nothing remembered from earlier draws."""
    for remembered in (low_rank._normal, low_rank._orthonormal, sphere._factor):
        remembered.cache_clear()


# --- ranges ---


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(shapes=shapes_of_parameters, data=st.data())
def test_any_range_is_that_part_of_the_whole(name, shapes, data):
    whole = draw(name, shapes)
    total = sum(map(numel, shapes))
    assert whole.shape == (total,)
    assert whole.dtype == torch.float32
    bounds = st.integers(0, total)
    for start, stop in data.draw(st.lists(st.tuples(bounds, bounds).map(sorted), min_size=1, max_size=4)):
        forget()
        part = draw(name, shapes, start=start, stop=stop)
        assert part.shape == (stop - start,)
        assert torch.equal(part, whole[start:stop])


LARGE = ((3, 5), (300, 700), (7,), (70_001,), (2, 40_001), (3, 130, 200))
EDGES = [15, 16, 128, 256, 1 << 16, 2 << 16, 65_536 + 256, 15 + 93 * 700, 210_015, 210_022, 280_023, 320_024, 360_025]


@pytest.mark.parametrize("name", NAMES)
def test_ranges_at_block_edges(name):
    """Edges of Philox blocks, of blocks of 2^16 entries and of rows, and of parameters."""
    whole = draw(name, LARGE)
    for edge in EDGES:
        for first, last in ((edge - 1, edge + 1), (edge - 3, edge), (edge, edge + 3), (edge, edge), (edge, 260_000)):
            start, stop = min(first, last), max(first, last)
            forget()
            assert torch.equal(draw(name, LARGE, start=start, stop=stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 7, 256, 1 << 16, N])
def test_empty_ranges(name, at):
    assert draw(name, start=at, stop=at).shape == (0,)


@given(shapes=shapes_of_parameters, data=st.data())
def test_pieces_cover_a_range_once(shapes, data):
    starts = np.cumsum([0, *map(numel, shapes)]).tolist()
    start, stop = data.draw(st.tuples(*[st.integers(0, starts[-1])] * 2).map(sorted))
    covered = [starts[i] + entry for i, lo, hi in pieces(shapes, start, stop) for entry in range(lo, hi)]
    assert covered == list(range(start, stop))


# --- the directions of one step ---


@pytest.mark.parametrize("name", NAMES)
def test_kept_directions_equal_redrawn_ones(name):
    parameters = [torch.zeros(3, 50), torch.zeros(170)]
    kept, redrawn = (StepDirections(DIRECTIONS.make(name), 1, 2, parameters) for _ in range(2))
    redrawn.KEPT = 0
    kept.KEPT = 3 * 320
    for query in (2, 0, 3, 1):  # the fourth is one too many
        for start, stop in ((0, 320), (20, 140), (140, 160), (150, 320), (150, 150)):
            assert torch.equal(kept.range(query, start, stop), redrawn.range(query, start, stop))
    assert (len(kept._kept), len(redrawn._kept)) == (3, 0)
    assert kept.stream(3) == (1, 2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_few_queries_kept_before_many(name):
    """A larger request must not change what was drawn for the first queries."""
    directions = StepDirections(DIRECTIONS.make(name), 1, 2, [torch.zeros(40)])
    first = directions.range(0, 0, 40).clone()
    directions.range(5, 0, 40)
    assert torch.equal(directions.range(0, 0, 40), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [0, 1 << 23])
def test_the_empty_range_at_the_end(name, kept):
    """A last parameter without entries asks for it."""
    directions = StepDirections(DIRECTIONS.make(name), 1, 2, [torch.zeros(256), torch.zeros(0)])
    directions.KEPT = kept
    assert directions.range(0, 256, 256).shape == (0,)


def test_directions_of_an_older_step():
    """Also of kept ones: nothing of this step is taken for them."""
    directions = StepDirections(DIRECTIONS.make("gaussian"), 1, 5, [torch.zeros(40)])
    now = directions.range(0, 0, 40)
    older = directions.of_step(2)
    assert older.stream(3) == (1, 2, 3)
    assert torch.equal(older.range(0, 0, 40), draw("gaussian", ((40,),), Stream(1, 2, 0)))
    assert torch.equal(directions.range(0, 0, 40), now)
    assert torch.equal(now, draw("gaussian", ((40,),), Stream(1, 5, 0)))


# --- which stream gives what ---


@pytest.mark.parametrize("name", NAMES)
def test_same_stream_same_bits(name):
    first = draw(name, LARGE)
    forget()
    assert torch.equal(draw(name, LARGE), first)


OTHERS = {
    "seed": lambda seed: Stream(seed + 1, 5, 2),
    "far seed": lambda seed: Stream(seed + 2**62, 5, 2),
    "negative seed": lambda seed: Stream(-seed - 1, 5, 2),
    "step": lambda seed: Stream(seed, 6, 2),
    "far step": lambda seed: Stream(seed, 50_005, 2),
    "query": lambda seed: Stream(seed, 5, 3),
    "step and seed exchanged": lambda seed: Stream(5, seed, 2),
    "step and query exchanged": lambda seed: Stream(seed, 2, 5),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", OTHERS)
def test_other_streams_are_uncorrelated(name, other):
    """z . z' over 100 seeds has mean zero, also where streams share a factor (sign-flip's Z, low-rank's V, subspace's U and V)."""
    shapes = ((4, 6), (9,))
    products = []
    for seed in range(100, 200):
        ours, theirs = draw(name, shapes, Stream(seed, 5, 2)), draw(name, shapes, OTHERS[other](seed))
        products.append(float(ours.double() @ theirs.double()))
    mean, error = np.mean(products), np.std(products) / len(products) ** 0.5
    assert abs(mean) < 5 * error
    assert error > 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", sorted(set(OTHERS) - {"step and seed exchanged"}))
def test_other_streams_share_no_vector(name, other):
    """Over 100 000 entries of a vector (sign-flip: products of |z|, too, would agree, but not z)."""
    ours, theirs = draw(name).double(), draw(name, stream=OTHERS[other](STREAM.seed)).double()
    squares = (ours * theirs).square()
    assert abs(float((ours * theirs).mean())) < 5 * float(squares.mean()) ** 0.5 / N**0.5


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_equal_shape_differ(name):
    z = draw(name, ((20, 30), (20, 30), (600,), (600,))).view(4, 600).double()
    correlations = torch.corrcoef(z) - torch.eye(4)
    assert correlations.abs().max() < 0.4


# --- moments ---


@pytest.mark.parametrize("name", NAMES)
def test_mean_zero_and_variance_one_of_a_vector(name):
    z = draw(name).double()
    square = z.square()
    assert abs(float(z.mean())) < 5 / N**0.5
    assert abs(float(square.mean()) - 1) <= 5 * float(square.std()) / N**0.5 + 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lag", [1, 2, 16, 31, 64, 128, 256, 65_536])
def test_entries_are_uncorrelated_with_their_neighbours(name, lag):
    z = draw(name).double()
    products = z[:-lag] * z[lag:]
    assert abs(float(products.mean())) < 5 * float(products.square().mean() / len(products)) ** 0.5


VARYING = {
    "seed": (NAMES, lambda i: Stream(i, 5, 2)),
    "step": ([*PLAIN, "sign-flip"], lambda i: Stream(3, i, 2)),
    "query": (PLAIN, lambda i: Stream(3, 5, i)),
}


@pytest.mark.parametrize(("varying", "name"), [(v, name) for v, (names, _) in VARYING.items() for name in names])
def test_second_moments_entry_by_entry(varying, name):
    """E[z] = 0 and E[z z^T] = I over 1000 seeds (steps, queries). Per matrix low-rank has r I and subspace I r^2 / (m n)."""
    shapes = ((2, 3), (1, 2, 2), (4,))
    variance = torch.ones(14, dtype=torch.float64)
    if name == "low-rank":
        variance[:10] = 2
    if name == "subspace":  # min(32, 2, 3) = 2 and min(32, 1, 4) = 1
        variance[:6], variance[6:10] = 4 / 6, 1 / 4
    z = torch.stack([draw(name, shapes, VARYING[varying][1](i)) for i in range(1000)]).double()
    assert (z.mean(0).abs() <= 5 * z.std(0) / 1000**0.5).all()
    products = z[:, :, None] * z[:, None, :]
    bound = 5 * products.std(0) / 1000**0.5 + 1e-6
    assert ((products.mean(0) - variance.diag()).abs() <= bound).all()


# --- the distributions' own promises ---


@pytest.mark.parametrize("name", ["gaussian", "philox-gaussian", "sign-flip"])
def test_gaussian_is_gaussian(name):
    """Third and fourth moments 0 and 3 (variances 15 and 96); shares beyond 1, 2 and 3 standard deviations."""
    z = draw(name, ((400, 250),)).double()
    assert abs(float(z.pow(3).mean())) < 5 * (15 / N) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 5 * (96 / N) ** 0.5
    for bound in (1, 2, 3):
        share = float(torch.special.erfc(torch.tensor(bound / 2**0.5, dtype=torch.float64)))
        assert abs(float((z.abs() > bound).double().mean()) - share) < 5 * (share * (1 - share) / N) ** 0.5


def test_philox_gaussian_is_box_and_mullers():
    """Two entries from one word: radius from its low half, angle from its high half."""
    word = int(philox([torch.tensor([c]) for c in (1, 2, 5, 1)], (3, 0))[0, 0]) % 2**64
    radius = (-2 * np.log((word % 2**32 + 0.5) / 2**32)) ** 0.5
    angle = 2 * np.pi * (word >> 32) / 2**32
    expected = [radius * np.cos(angle), radius * np.sin(angle)]
    assert draw("philox-gaussian", stop=2).tolist() == pytest.approx(expected, rel=1e-6)


def test_rademacher_is_the_documented_bit():
    """Entry i: bit i mod 256 of the block with counter (i // 256 + 1, query, step, 0), set for -1. Journals depend on it."""
    z = draw("rademacher", stop=600)
    assert set(z.tolist()) == {-1.0, 1.0}
    for i in (0, 1, 63, 64, 130, 255, 256, 599):
        block = philox([torch.tensor([c]) for c in (i // 256 + 1, 2, 5, 0)], (3, 0))[0]
        bit = int(block[i % 256 // 64]) >> i % 64 & 1
        assert z[i] == 1 - 2 * bit


@pytest.mark.parametrize("shapes", [((1,),), ((7,),), ((3, 5), (2, 2, 2)), ((400, 250), (33,))])
def test_sphere_has_its_radius(shapes):
    total = sum(map(numel, shapes))
    assert float(draw("sphere", shapes).double().square().sum()) == pytest.approx(total, rel=1e-6)


def test_sphere_is_uniform():
    """E[z_i^4] = 3 d / (d + 2) and E[z_i^2 z_j^2] = d / (d + 2), unlike a Gaussian's 3 and 1; d = 3."""
    z = torch.stack([draw("sphere", ((3,),), Stream(i, 0, 0)) for i in range(2000)]).double()
    for values, expected in ((z[:, 0] ** 4, 9 / 5), (z[:, 0] ** 2 * z[:, 1] ** 2, 3 / 5)):
        assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / 2000**0.5


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_sparse_keeps_its_share(density):
    z = draw(Sparse(density)).double()
    kept = z != 0
    assert abs(float(kept.double().mean()) - density) < 5 * (density * (1 - density) / N) ** 0.5 + 2**-17
    assert float((z[kept].abs() * density**0.5 - 1).abs().max()) < 2**-17 / density
    assert abs(float(z[kept].sign().mean())) < 5 / int(kept.sum()) ** 0.5


def test_sparse_masks_are_fresh_for_every_query():
    """They agree on density^2 of the entries."""
    both = (draw(Sparse(0.1)) != 0) & (draw(Sparse(0.1), stream=STREAM._replace(query=3)) != 0)
    assert abs(float(both.double().mean()) - 0.01) < 5 * (0.01 * 0.99 / N) ** 0.5


def test_sparse_with_nothing_left_out_is_rademacher():
    assert torch.equal(draw(Sparse(1.0)), draw("rademacher"))


def test_sparse_with_hardly_anything_kept():
    """A density below what 16 bits can tell is the smallest they can."""
    z = draw(Sparse(1e-6), ((1 << 20,),))
    assert 0 < int((z != 0).sum()) < 50


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_impossible_densities(density):
    with pytest.raises(ZOError, match="density"):
        Sparse(density)


@pytest.mark.parametrize("kind", [LowRank, Subspace])
@pytest.mark.parametrize("bad", [{"rank": 0}, {"interval": 0}])
def test_impossible_ranks(kind, bad):
    with pytest.raises(ZOError, match="at least 1"):
        kind(**bad)


def matrix(kind, stream, shape=(12, 10)):
    return draw(kind, ((3,), shape), stream)[3:].view(shape[0], -1).double()


def rank(matrix_):
    """Singular values above what float32's rounding leaves."""
    singular = torch.linalg.svdvals(matrix_)
    return int((singular > 1e-5 * singular[0]).sum())


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("shape", [(12, 10), (9, 3, 5)])
def test_low_rank_is_of_low_rank(r, shape):
    assert rank(matrix(LowRank(rank=r), STREAM, shape)) == r


@pytest.mark.parametrize("r", [1, 2, 4])
def test_low_rank_variance(r):
    """r for every entry, over 2000 seeds: U V^T without 1 / r (arXiv 2410.07698), and as declared."""
    squares = torch.stack([matrix(LowRank(rank=r), Stream(i, 0, 0), (3, 4)) for i in range(2000)]).square()
    assert ((squares.mean(0) - r).abs() < 5 * squares.std(0) / 2000**0.5).all()
    assert (LowRank(rank=r).variance((3, 4)), LowRank(rank=r).variance((3,))) == (r, 1)


def test_low_rank_keeps_v_for_an_interval():
    """Equal rows' span within it, another after; V is the query's own, U fresh in every step."""
    kind = LowRank(rank=2, interval=4)
    steps = [matrix(kind, Stream(1, step, 0)) for step in range(9)]
    assert [rank(torch.cat(steps[a:b])) for a, b in ((0, 4), (4, 8), (3, 5), (7, 9))] == [2, 2, 4, 4]
    assert rank(torch.cat(steps[:2], dim=1)) == 4
    assert rank(torch.cat([steps[0], matrix(kind, Stream(1, 0, 1))])) == 4
    assert rank(torch.cat([steps[0], matrix(kind, Stream(2, 0, 0))])) == 4


@pytest.mark.parametrize(
    ("r", "shape", "expected"), [(3, (12, 10), 3), (32, (12, 10), 10), (2, (9, 3, 5), 2), (8, (2, 40), 2)]
)
def test_subspace_is_of_its_rank(r, shape, expected):
    assert rank(matrix(Subspace(rank=r), STREAM, shape)) == expected


def test_subspace_stays_for_an_interval():
    """All steps and queries of an interval lie in one span of rows and one of columns; the next interval has others."""
    kind = Subspace(rank=3, interval=4)
    interval = [matrix(kind, Stream(1, step, query)) for step in range(4) for query in range(3)]
    after = matrix(kind, Stream(1, 4, 0))
    for dim in (0, 1):
        assert rank(torch.cat(interval, dim=dim)) == 3
        assert rank(torch.cat([interval[0], after], dim=dim)) == 6


def test_subspace_factors_are_orthonormal_and_the_core_is_gaussian():
    """With U and V from the span, U^T z V is a rotated Z: |z|^2 is chi-squared with r^2 = 9 degrees of freedom over 1000 steps."""
    kind = Subspace(rank=3, interval=10_000)
    z = torch.stack([matrix(kind, Stream(1, step, 0)) for step in range(1000)])
    u, v = torch.linalg.svd(torch.cat(list(z[:9]), dim=1))[0][:, :3], torch.linalg.svd(torch.cat(list(z[:9])))[2][:3]
    torch.testing.assert_close(u @ (u.T @ z @ v.T) @ v, z, rtol=0, atol=1e-5)
    squares = z.square().sum((1, 2))
    assert abs(float(squares.mean()) - 9) < 5 * (18 / 1000) ** 0.5
    core = (u.T @ z @ v.T).flatten(1)
    products = core[:, :, None] * core[:, None, :]
    assert ((products.mean(0) - torch.eye(9)).abs() < 5 * products.std(0) / 1000**0.5).all()
    assert kind.rank == 3


def test_subspaces_are_uniform():
    """E[U U^T] = I r / m and E[V V^T] = I r / n over 1000 seeds, seen through projections; no column sign is preferred."""
    left = []
    for seed in range(1000):
        u = low_rank._orthonormal(seed, 0, 0, low_rank._U, rows=5, columns=2).double()
        torch.testing.assert_close(u.T @ u, torch.eye(2).double(), rtol=0, atol=1e-5)
        left.append(u)
    u = torch.stack(left)
    projections = u @ u.mT
    assert ((projections.mean(0) - torch.eye(5) * 2 / 5).abs() < 5 * projections.std(0) / 1000**0.5).all()
    assert (u.mean(0).abs() < 5 * u.std(0) / 1000**0.5).all()


def test_sign_flips_are_rank_one():
    """z_q / z_0 is a matrix of signs of rank one (a row of signs times a column of them); for vectors it is signs."""
    first, other = (draw("sign-flip", ((40, 30), (2, 5, 3), (50,)), STREAM._replace(query=q)).double() for q in (0, 4))
    ratio = other / first
    assert set(ratio.tolist()) == {-1.0, 1.0}
    assert rank(ratio[:1200].view(40, 30)) == 1
    assert rank(ratio[1200:1230].view(2, 15)) == 1
    assert abs(float(ratio[1230:].mean())) < 1


@pytest.mark.parametrize("other", ["seed", "step"])
def test_sign_flips_share_nothing_beyond_the_step(other):
    first, second = (draw("sign-flip", ((40, 30),), s).double().abs() for s in (STREAM, OTHERS[other](STREAM.seed)))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / 1200**0.5


@pytest.mark.parametrize("name", ["low-rank", "subspace", "sign-flip"])
def test_a_third_axis_belongs_to_the_columns(name):
    """(m, a, b) is drawn as (m, a b) [choice]."""
    assert torch.equal(draw(name, ((6, 3, 4), (5,))), draw(name, ((6, 12), (5,))))


def test_rows_do_not_depend_on_the_size_of_blocks_asked_for():
    """Matrices larger than a block of rows: whole blocks are multiplied, whatever the range."""
    assert all(issubclass(DIRECTIONS[n], MatrixDirections) for n in set(NAMES) - set(PLAIN))
    whole = draw("low-rank", ((700, 300),))
    rows = MatrixDirections.BLOCK // 300
    first = draw("low-rank", ((700, 300),), start=rows * 300 - 5, stop=rows * 300 + 5)
    assert torch.equal(first, whole[rows * 300 - 5 : rows * 300 + 5])


# --- everything else ---


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name):
    forget()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw(name, ((40, 3), (5,)))
    StepDirections(DIRECTIONS.make(name), 1, 2, [torch.zeros(40)]).range(1, 0, 40)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize("name", NAMES)
def test_global_seed_has_no_influence(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = draw(name, ((5, 8), (60,)))
        forget()
        torch.manual_seed(2)
        assert torch.equal(draw(name, ((5, 8), (60,))), first)


def test_directions_by_name():
    kind = DIRECTIONS.make("rademacher")
    assert type(kind) is DIRECTIONS["rademacher"]
    assert DIRECTIONS.make(kind) is kind
    with pytest.raises(ZOError, match="gaussian"):
        DIRECTIONS.make("cauchy")
