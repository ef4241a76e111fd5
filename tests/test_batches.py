"""The order of examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_opt import ZOError
from zo_opt.tasks.batches import BatchOrder

LABELS = st.lists(st.integers(0, 2), min_size=2, max_size=40)
SIZES, SEEDS = st.integers(1, 9), st.integers(0, 1000)


def slots(order: BatchOrder, count: int) -> list[int]:
    """The first ``count`` examples in the order in which batches bring them."""
    steps = -(-count // order.batch_size)
    return [i for step in range(steps) for i in order.indices(step)][:count]


@pytest.mark.parametrize("kind", ["balanced", "shuffled"])
@given(labels=LABELS, size=SIZES, seed=SEEDS)
def test_a_pure_function_of_the_step(kind: str, labels: list[int], size: int, seed: int) -> None:
    forwards = [BatchOrder(labels, size, seed, kind).indices(step) for step in range(12)]
    order = BatchOrder(labels, size, seed, kind)
    assert [order.indices(step) for step in reversed(range(12))] == forwards[::-1]
    assert {len(batch) for batch in forwards} == {size}


@given(labels=LABELS, size=SIZES, seed=SEEDS)
def test_each_epoch_is_a_permutation_when_shuffled(labels: list[int], size: int, seed: int) -> None:
    n = len(labels)
    taken = slots(BatchOrder(labels, size, seed, "shuffled"), 4 * n)
    for epoch in range(4):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(labels=LABELS, size=SIZES, seed=SEEDS)
def test_balanced_slots_alternate_classes_and_each_runs_through_permutations(
    labels: list[int], size: int, seed: int
) -> None:
    classes = sorted(set(labels))
    taken = slots(BatchOrder(labels, size, seed), 3 * len(labels) * len(classes))
    assert [labels[i] for i in taken] == [classes[s % len(classes)] for s in range(len(taken))]
    for label in classes:
        own = [i for i, value in enumerate(labels) if value == label]
        turns = [i for i in taken if labels[i] == label]
        for start in range(0, len(turns) - len(own) + 1, len(own)):
            assert sorted(turns[start : start + len(own)]) == own


@pytest.mark.parametrize("kind", ["balanced", "shuffled"])
def test_epochs_and_seeds_differ(kind: str) -> None:
    labels = [0, 1] * 20
    taken = slots(BatchOrder(labels, 8, 0, kind), 80)
    assert taken[:40] != taken[40:]
    assert taken != slots(BatchOrder(labels, 8, 1, kind), 80)


def test_any_seed_will_do() -> None:
    """A date or a time stamp is a usual seed."""
    for seed in (20_260_101, 2**31, 2**63 - 1, -1):
        assert sorted(slots(BatchOrder([0, 1] * 5, 5, seed), 10)) == list(range(10))


def test_steps_per_epoch() -> None:
    """ceil(examples / batch size), as AdaZeta's epoch needs it."""
    for rows, size, steps in ((10, 5, 2), (11, 5, 3), (3, 8, 1), (1, 1, 1)):
        assert BatchOrder([i % 2 for i in range(rows)], size, 0).steps_per_epoch == steps


def test_a_batch_may_be_larger_than_the_table() -> None:
    assert sorted(BatchOrder([0, 1], 4, 0).indices(0)) == [0, 0, 1, 1]


def test_wrong_arguments() -> None:
    with pytest.raises(ZOError, match="batch_order='sorted'"):
        BatchOrder([0, 1], 2, 0, "sorted")
    with pytest.raises(ZOError, match="batch_size=0"):
        BatchOrder([0, 1], 0, 0)
