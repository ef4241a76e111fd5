"""zo_opt.tensor_train against dense tensors and tensorly, in float64; relative errors are Frobenius."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tensorly
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorly.tt_tensor import TTTensor
from tt_kernels import core_shapes, reconstruct, useful_ranks

from zo_opt import ZOError
from zo_opt.tensor_train import from_tensorly, to_tensorly, tt_svd

EXACT = 1e-10  # float64 against float64
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7])  # ones and primes
SEEDS = st.integers(0, 1000)


@st.composite
def trains(draw, dims=None, most=6):
    """Cores of random dims and of a rank of its own at every bond, useful or not."""
    dims = dims or draw(st.lists(SIZES, min_size=1, max_size=most))
    ranks = draw(st.lists(st.integers(1, 5), min_size=len(dims) - 1, max_size=len(dims) - 1))
    return make(dims, ranks, draw(SEEDS))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(dims, ranks, seed=0):
    return [noise(*shape, seed=seed + k) for k, shape in enumerate(core_shapes(dims, (), ranks))]


def dims_of(cores):
    return tuple(core.shape[1] for core in cores)


def ranks_of(cores):
    return [core.shape[2] for core in cores[:-1]]


def dense(cores):
    """By tensorly: the oracle of everything here."""
    return torch.tensor(tensorly.tt_to_tensor([core.numpy() for core in cores]))


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# --- TT-SVD


@settings(deadline=None, max_examples=60)
@given(cores=trains())
@example(cores=make((7,), ()))
@example(cores=make((1, 1, 1), (2, 2)))
@example(cores=make((5, 1, 7, 1, 2, 3), (5, 5, 3, 3, 2)))
def test_svd_at_the_trains_own_ranks_gives_its_tensor_back(cores):
    values = dense(cores)
    again = tt_svd(values, dims_of(cores), ranks_of(cores), dtype=torch.float64)
    assert ranks_of(again) == useful_ranks(dims_of(cores), ranks_of(cores))
    assert error(dense(again), values) < EXACT


def test_svd_at_ranks_is_quasi_optimal():
    """|X - train|^2 <= sum over bonds of the best rank-r error of that unfolding (Oseledets 2011, theorem 2.2)."""
    dims, ranks = (4, 5, 3, 4), (2, 3, 2)
    values = noise(*dims)
    cores = tt_svd(values, dims, ranks, dtype=torch.float64)
    best = [torch.linalg.svdvals(values.reshape(math.prod(dims[: k + 1]), -1))[r:] for k, r in enumerate(ranks)]
    assert ranks_of(cores) == list(ranks)
    lost = float((dense(cores) - values).square().sum())
    assert (
        max(float(b.square().sum()) for b in best) <= lost <= sum(float(b.square().sum()) for b in best) * (1 + EXACT)
    )


def test_svd_of_any_layout_dtype_and_device():
    values = noise(6, 4).T
    assert not values.is_contiguous()
    cores = tt_svd(values.requires_grad_(), (4, 2, 3), 24)
    assert all(core.dtype == torch.float32 and not core.requires_grad for core in cores)
    assert error(dense(cores).double().reshape(4, 6), values.detach()) < 1e-6  # float32
    half = tt_svd(values.detach().bfloat16(), (4, 6), 4, dtype=torch.float64)
    assert error(dense(half), values.detach().bfloat16().double()) < EXACT


def test_a_zero_tensor():
    assert not dense(tt_svd(torch.zeros(24), (2, 3, 4), 2)).any()


@pytest.mark.parametrize(
    ("values", "dims", "options", "message"),
    [
        (torch.ones(6), (2, 4), {"ranks": 2}, "6 entries"),
        (torch.ones(6), (), {"ranks": 2}, r"dims=\(\)"),
        (torch.ones(0), (2, 0), {"ranks": 2}, r"dims=\(2, 0\)"),
        (torch.ones(6), (2, 3), {"ranks": (2, 2)}, "each of 1 bonds"),
        (torch.ones(6), (2, 3), {"ranks": 0}, "at least 1"),
        (torch.ones(6), (2, 3), {"ranks": (1.5,)}, "whole number"),
        (torch.tensor([1.0, math.nan]), (2, 1), {"ranks": 1}, "NaN"),
        (torch.tensor([1.0, math.inf]), (2, 1), {"ranks": 1}, "infinite"),
    ],
)
def test_svd_refuses_what_is_not_possible(values, dims, options, message):
    with pytest.raises(ZOError, match=message):
        tt_svd(values, dims, **options)


# --- tensorly's own forms


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ([], "no cores"),
        ([torch.ones(1, 2, 3), torch.ones(2, 3, 1)], "core 1 has shape"),
        ([torch.ones(2, 2, 1)], "core 0 has shape"),
        ([torch.ones(1, 2)], "core 0 has shape"),
        ([torch.ones(1, 0, 1)], "core 0 has shape"),
        ([torch.ones(1, 2, 3)], "ends in rank 1"),
        ([torch.full((1, 2, 1), math.nan)], "NaN"),
    ],
)
def test_what_is_not_a_train_is_refused(cores, message):
    for call in (to_tensorly, lambda c: from_tensorly([x.numpy() for x in c])):
        with pytest.raises(ZOError, match=message):
            call(cores)


@settings(deadline=None, max_examples=40)
@given(cores=trains())
def test_tensorly_and_back_is_exact(cores):
    train = to_tensorly(cores)
    assert isinstance(train, TTTensor)
    assert (train.shape, train.rank) == (dims_of(cores), (1, *ranks_of(cores), 1))
    assert error(torch.tensor(train.to_tensor()), dense(cores)) == 0
    assert all(torch.equal(a, b) for a, b in zip(from_tensorly(train), cores, strict=True))
    train[0][:] = 0  # a copy
    assert cores[0].any()


def test_dtypes_through_tensorly():
    for dtype, kept in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        cores = [core.to(dtype).requires_grad_() for core in make((2, 3), 2)]
        assert [core.dtype for core in from_tensorly(to_tensorly(cores))] == [kept] * 2


# --- tensorly's backend is its user's


def calls():
    """Everything that touches tensorly, each from torch cores to torch cores."""
    cores = make((2, 3, 4), 2)
    tt_svd(dense_by_torch(cores), (2, 3, 4), 2)
    return tt_svd(dense_by_torch(from_tensorly(to_tensorly(cores))), (2, 3, 4), 2)


def dense_by_torch(cores):
    return reconstruct(cores, dims_of(cores), ())


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_importing_leaves_the_backend_alone():
    script = (
        "import zo_opt.tensor_train, zo_opt.adapters.spectrum, sys; assert 'tensorly' not in sys.modules;"
        "import tensorly; assert tensorly.get_backend() == 'numpy'; tensorly.set_backend('pytorch');"
        "import zo_opt.adapters.tt_linear; assert tensorly.get_backend() == 'pytorch'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
def test_no_call_switches_the_backend_of_any_thread(backend):
    """A thread with a backend of its own keeps it; threads that have none keep the global one, numpy."""

    def in_a_thread_of_its_own_backend():
        tensorly.set_backend(backend, local_threadsafe=True)
        cores = calls()
        return tensorly.get_backend(), cores

    here = calls()
    found, there = in_thread(in_a_thread_of_its_own_backend)
    assert found == backend
    assert tensorly.get_backend() == in_thread(tensorly.get_backend) == "numpy"
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_the_backend_is_given_back_after_an_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no convergence")

    def run():
        tensorly.set_backend("pytorch", local_threadsafe=True)
        with pytest.raises(RuntimeError, match="no convergence"):
            tt_svd(torch.ones(6), (2, 3), 1)
        return tensorly.get_backend()

    monkeypatch.setattr("tensorly.decomposition.tensor_train", fail)
    assert in_thread(run) == "pytorch"
    assert in_thread(tensorly.get_backend) == "numpy"


def test_other_threads_see_no_switch_while_a_call_runs(monkeypatch):
    seen = []

    def look(values, rank):
        seen.extend([tensorly.get_backend(), in_thread(tensorly.get_backend)])
        return real(values, rank)

    real = tensorly.decomposition.tensor_train
    monkeypatch.setattr("tensorly.decomposition.tensor_train", look)
    tensorly.set_backend("pytorch")
    try:
        tt_svd(torch.ones(6), (2, 3), 1)
        assert seen == ["numpy", "pytorch"]
        assert tensorly.get_backend() == in_thread(tensorly.get_backend) == "pytorch"
    finally:
        tensorly.set_backend("numpy")


def test_conversions_speak_the_users_backend():
    def run():
        tensorly.set_backend("pytorch", local_threadsafe=True)
        cores = make((2, 3, 4), 2)
        return to_tensorly(cores).to_tensor(), dense_by_torch(cores)

    tensor, expected = in_thread(run)
    assert isinstance(tensor, torch.Tensor)
    assert error(tensor.reshape(6, 4), expected.reshape(6, 4)) < EXACT
