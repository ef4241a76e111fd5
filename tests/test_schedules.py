"""AdaZeta's schedule is the published formula; bad settings are refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt.errors import ZOError
from zo_opt.schedules import History, adazeta_queries, constant_queries

OPEN = st.floats(0, 1, exclude_min=True, exclude_max=True)
EPOCHS = st.integers(0, 10**6)


def published(alpha, beta, max_queries, epoch):
    """methods.md: Q_k = min(alpha * e_k^beta, Q_max), integer part, at least 1."""
    return min(max(int(alpha * math.pow(epoch, beta)), 1), max_queries)


@settings(deadline=None, max_examples=200)
@given(alpha=OPEN, beta=OPEN, max_queries=st.integers(1, 100), epoch=EPOCHS, step=st.integers(0, 10**9))
def test_adazeta_is_the_formula(alpha, beta, max_queries, epoch, step):
    queries = adazeta_queries(alpha=alpha, beta=beta, max_queries=max_queries)(step, epoch, History())
    assert isinstance(queries, int)
    assert 1 <= queries <= max_queries
    assert queries == published(alpha, beta, max_queries, epoch)


def test_adazeta_released_values_by_hand():
    """0.85 * e^0.4 reaches 2 at e = 8.5, 3 at 23.4, 15 at 1308.2."""
    schedule = adazeta_queries()
    expected = {0: 1, 1: 1, 8: 1, 9: 2, 23: 2, 24: 3, 1308: 14, 1309: 15, 10**9: 15}
    assert {e: schedule(0, e, History()) for e in expected} == expected


@settings(deadline=None, max_examples=100)
@given(alpha=OPEN, beta=OPEN, max_queries=st.integers(1, 40), first=EPOCHS, second=EPOCHS)
def test_adazeta_never_falls(alpha, beta, max_queries, first, second):
    schedule = adazeta_queries(alpha, beta, max_queries)
    early, late = sorted((first, second))
    assert schedule(0, early, History()) <= schedule(0, late, History())


@settings(deadline=None, max_examples=50)
@given(epoch=EPOCHS, data=st.data())
def test_min_queries_raises_the_floor_only(epoch, data):
    max_queries = data.draw(st.integers(1, 30))
    min_queries = data.draw(st.integers(1, max_queries))
    raised = adazeta_queries(0.85, 0.4, max_queries, min_queries)(0, epoch, History())
    assert raised == max(adazeta_queries(0.85, 0.4, max_queries)(0, epoch, History()), min_queries)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1.5, math.inf, math.nan])
def test_adazeta_refuses_exponents_outside_the_open_interval(name, value):
    with pytest.raises(ZOError, match=name):
        adazeta_queries(**{name: value})


@pytest.mark.parametrize("name", ["max_queries", "min_queries"])
@pytest.mark.parametrize("value", [0, -3])
def test_adazeta_refuses_fewer_than_one_query(name, value):
    with pytest.raises(ZOError, match=name):
        adazeta_queries(**{name: value})


def test_adazeta_refuses_a_floor_above_the_ceiling():
    with pytest.raises(ZOError, match="min_queries=4"):
        adazeta_queries(max_queries=3, min_queries=4)


@given(queries=st.integers(1, 1000), step=st.integers(0, 10**9), epoch=EPOCHS)
def test_constant(queries, step, epoch):
    assert constant_queries(queries)(step, epoch, History()) == queries


def test_constant_refuses_fewer_than_one_query():
    with pytest.raises(ZOError, match="queries=0"):
        constant_queries(0)
