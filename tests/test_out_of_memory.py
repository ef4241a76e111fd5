"""Memory that runs out halves the copies in a forward, and changes nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_query_modes import EPS, SCALES, Net, by_hand, evaluator_of, net_batch, optimizer_of, take

from zo_opt import MeZO, ZOError
from zo_opt.queries.copies import Limits

ERRORS = {
    "an accelerator's": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the allocator's": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "Python's": MemoryError,
}


class Narrow(Net):
    """Holds up to ``room`` copies; ``seen``: the copies of every forward that was tried."""

    def __init__(self, room, error=ERRORS["an accelerator's"]):
        super().__init__()
        self.room, self.error, self.seen = room, error, []

    def forward(self, batch):
        copies = 1
        weight = self.weight
        if torch._C._functorch.is_batchedtensor(weight):
            copies = torch._C._functorch.get_unwrapped(weight).shape[0]
        self.seen.append(copies)
        if copies > self.room:
            raise self.error()
        return super().forward(batch)


def bits(net):
    return [p.detach().clone().view(torch.int64) for p in net.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("mode", ["batched", "split"])
def test_the_chunk_is_halved_and_remembered(error, mode):
    net, plain, batch = Narrow(3, error), Net(), net_batch(8)
    before, limits = bits(net), Limits()
    with torch.no_grad():
        found = evaluator_of(mode, net, net.loss, batch, limits=limits)(8, SCALES)
        slices = [batch] * 8 if mode == "batched" else [take(batch, i, i + 1) for i in range(8)]
        expected = by_hand(plain, plain.loss, slices, 8)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=0)
    assert found.forwards == (16 if mode == "batched" else 2)
    assert found.weights.tolist() == [1] * 8
    assert same(bits(net), before)
    tried = [16, 8, 4] if mode == "batched" else [8, 4]
    assert net.seen[: len(tried)] == tried
    assert set(net.seen[len(tried) :]) == {2}
    net.seen.clear()
    with torch.no_grad():
        evaluator_of(mode, net, net.loss, batch, limits=limits)(8, SCALES)
    assert set(net.seen) == {2}  # not tried again
    net.seen.clear()
    with torch.no_grad():
        evaluator_of(mode, net, net.loss, batch)(8, SCALES)
    assert net.seen[: len(tried)] == tried  # another optimizer finds it out for itself: no run depends on one before it


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_a_resumed_run_with_little_room_has_the_same_bits(mode):
    """Batches of several sizes and numbers of queries: what was found out about one decides nothing about another."""
    sizes = [8, 5, 8, 7, 5, 8]

    def run(net, steps, optimizer=None):
        for step in steps:
            optimizer.step(net.loss, net_batch(sizes[step]))
        return bits(net)

    def new(net):
        schedule = lambda step, epoch, history: 2 + step % 4  # noqa: E731
        return optimizer_of(net, mode, query_schedule=schedule)

    whole, first, second = Narrow(3), Narrow(3), Narrow(3)
    expected = run(whole, range(6), new(whole))
    stopped = new(first)
    run(first, range(3), stopped)
    second.load_state_dict(first.state_dict())
    resumed = new(second)
    resumed.load_state_dict(stopped.state_dict())
    assert same(run(second, range(3, 6), resumed), expected)


@settings(max_examples=40, deadline=None)
@given(
    room=st.integers(1, 9),
    queries=st.integers(1, 9),
    extra=st.integers(0, 5),
    mode=st.sampled_from(["batched", "split"]),
    base=st.booleans(),
)
def test_any_room_queries_and_uneven_slices(room, queries, extra, mode, base):
    """As in a model with room for all: losses, weights, counted forwards; more is never tried than what was halved to."""
    batch, narrow, wide = net_batch(queries + extra), Narrow(room), Net()
    with torch.no_grad():
        found, expected = (
            evaluator_of(mode, net, net.loss, batch)(queries, SCALES, base=base) for net in (narrow, wide)
        )
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.weights, expected.weights)
    assert found.forwards == expected.forwards
    if base:
        torch.testing.assert_close(found.base, expected.base, rtol=1e-9, atol=0)
    fits = [copies for copies in narrow.seen if copies <= room]
    assert sum(fits) == queries * (2 + base) if mode == "split" else sum(fits) == queries * 2 + base
    failed = [copies for copies in narrow.seen if copies > room]
    if mode == "batched" or extra == 0:  # slices of two sizes are tried each
        assert failed == sorted(set(failed), reverse=True)  # each size once


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_where_one_copy_does_not_fit_the_error_comes_out(error, mode):
    net = Narrow(0, error)
    before = bits(net)
    optimizer = optimizer_of(net, mode)
    with pytest.raises(type(error())):
        optimizer.estimate(net.loss, net_batch())
    assert same(bits(net), before)
    assert net.seen[-1] == 1
    net.room = 100
    optimizer.step(net.loss, net_batch())  # and the optimizer goes on
    assert not same(bits(net), before)


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_another_error_is_not_taken_for_it(mode):
    net = Narrow(2, lambda: RuntimeError("the weights are of another dtype"))
    with pytest.warns(UserWarning, match="one by one"):
        evaluator_of(mode, net, net.loss, net_batch())(3, SCALES)
    assert 3 not in net.seen[1:]


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_a_run_with_little_room_is_the_run(mode):
    """Projected gradients, weights and counts over steps with a growing number of queries."""
    runs = []
    for net in (Net(), Narrow(2)):
        optimizer = MeZO(
            net.parameters(), lr=0.05, zo_eps=EPS, module=net, query_mode=mode,
            query_schedule=lambda step, epoch, history: 1 + step,
        )  # fmt: skip
        losses = [float(optimizer.step(net.loss, net_batch(7))) for _ in range(6)]
        runs.append((losses, list(optimizer.last_record.projected_grads), optimizer.history.forwards))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-9)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-6)
    assert runs[1][2] == runs[0][2]


@pytest.mark.parametrize("room", [1, 100])
def test_split_refuses_more_queries_than_examples(room):
    net = Narrow(room)
    with pytest.raises(ZOError, match="5 queries cannot split a batch of 4"):
        evaluator_of("split", net, net.loss, net_batch(4))(5, SCALES)
    assert net.seen == []


def test_what_did_not_fit_on_whole_batches_may_fit_on_slices():
    """Eight slices are one batch: where one copy of the batch fits, so do they."""

    class Rows(Net):
        def forward(self, batch):
            x, seen = batch["x"], len(batch["x"])
            if torch._C._functorch.is_batchedtensor(self.weight):
                seen *= torch._C._functorch.get_unwrapped(self.weight).shape[0]
            self.rows = seen
            if seen > 8:
                raise torch.OutOfMemoryError("out of memory")
            assert x.ndim == 2
            return super().forward(batch)

    net, batch = Rows(), net_batch(8)
    with torch.no_grad():
        evaluator_of("batched", net, net.loss, batch)(2, SCALES)
        net.calls = 0
        evaluator_of("split", net, net.loss, batch)(8, SCALES)
    assert net.calls == 2
