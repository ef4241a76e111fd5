"""AdaZeta's schedule is the published formula; every schedule keeps its promises; bad settings are refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt.errors import ZOError
from zo_opt.schedules import (
    SCHEDULES,
    History,
    RunLength,
    adazeta_queries,
    budget_queries,
    constant_queries,
    cosine_queries,
    derived_beta,
    for_run,
    linear_queries,
    simulate,
    stepwise_queries,
    variance_queries,
)
from zo_opt.schedules.base import SIGNAL_DECAY

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


# The contract of every schedule, over the table. name -> (its arguments, the most queries they allow)


@st.composite
def floor_and_ceiling(draw):
    most = draw(st.integers(1, 40))
    return draw(st.integers(1, most)), most


@st.composite
def constant_arguments(draw):
    queries = draw(st.integers(1, 40))
    return {"queries": queries}, queries


@st.composite
def adazeta_arguments(draw):
    least, most = draw(floor_and_ceiling())
    return {"alpha": draw(OPEN), "beta": draw(OPEN), "max_queries": most, "min_queries": least}, most


@st.composite
def ramp_arguments(draw):
    start, end = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return {"start": start, "end": end, "steps": draw(st.integers(1, 60))}, max(start, end)


@st.composite
def stepwise_arguments(draw):
    milestones = {0: draw(st.integers(1, 40))} | draw(
        st.dictionaries(st.integers(1, 60), st.integers(1, 40), max_size=5)
    )
    return {"milestones": milestones}, max(milestones.values())


@st.composite
def budget_arguments(draw):
    steps, cost, fixed = draw(st.integers(1, 60)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    forwards = steps * (cost + fixed) + draw(st.integers(0, 500))
    most = forwards // cost
    return {"forwards": forwards, "steps": steps, "forwards_per_query": cost, "forwards_per_step": fixed}, most


@st.composite
def variance_arguments(draw):
    least, most = draw(floor_and_ceiling())
    return {"min_queries": least, "max_queries": most}, most


ARGUMENTS = {
    "every-example": st.just(({}, 1 << 30)),
    "constant": constant_arguments(),
    "adazeta": adazeta_arguments(),
    "linear": ramp_arguments(),
    "cosine": ramp_arguments(),
    "stepwise": stepwise_arguments(),
    "budget": budget_arguments(),
    "variance": variance_arguments(),
}
SIGNALS = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


def test_every_schedule_is_tested():
    assert ARGUMENTS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=100)
@given(data=st.data(), signals=SIGNALS, steps_per_epoch=st.integers(1, 10))
def test_queries_are_whole_and_within_bounds(name, data, signals, steps_per_epoch):
    arguments, most = data.draw(ARGUMENTS[name])
    queries = simulate(SCHEDULES[name](**arguments), len(signals), steps_per_epoch, signals=signals)
    assert all(type(q) is int and 1 <= q <= most for q in queries)
    assert len(queries) == len(signals)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), signals=SIGNALS, steps_per_epoch=st.integers(1, 10), stop=st.integers(0, 60))
def test_a_resumed_run_continues_as_if_it_had_not_stopped(name, data, signals, steps_per_epoch, stop):
    """At any step, a new schedule made from the same arguments and a history that went through JSON."""
    arguments, _ = data.draw(ARGUMENTS[name])
    uninterrupted = simulate(SCHEDULES[name](**arguments), len(signals), steps_per_epoch, signals=signals)
    schedule, history, queries = SCHEDULES[name](**arguments), History(), []
    for step, signal in enumerate(signals):
        if step == stop:
            schedule, history = SCHEDULES[name](**arguments), History(**json.loads(json.dumps(asdict(history))))
        queries.append(schedule(step, step // steps_per_epoch, history))
        history.queries += queries[-1]
        history.forwards += 2 * queries[-1]
        history.observe([math.sqrt(signal)])
    assert queries == uninterrupted


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), step=st.integers(0, 10**9), forwards=st.integers(0, 10**9), signal=st.floats(0, 1e300))
def test_a_schedule_remembers_nothing_and_changes_nothing(name, data, step, forwards, signal):
    arguments, most = data.draw(ARGUMENTS[name])
    schedule, history = SCHEDULES[name](**arguments), History(7, forwards, signal, max(signal, 1.0))
    before = asdict(history)
    first = schedule(step, step, history)
    schedule(0, 0, History())
    assert schedule(step, step, history) == first
    assert 1 <= first <= most
    assert asdict(history) == before


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), steps=st.integers(1, 60), steps_per_epoch=st.integers(1, 60))
def test_every_name_makes_a_schedule_from_options(name, data, steps, steps_per_epoch):
    least, most = data.draw(floor_and_ceiling())
    bounds = {"min_queries": least, "max_queries": most, "start": least, "end": most}
    schedule = for_run(SCHEDULES.make(name, **bounds), RunLength(steps, steps_per_epoch))
    queries = simulate(schedule, steps, steps_per_epoch)
    assert SCHEDULES.make(json.loads(json.dumps(SCHEDULES.plain(schedule)))) == schedule
    if name in ("adazeta", "linear", "cosine", "stepwise", "variance"):
        assert all(least <= q <= most for q in queries)


# Growth


@pytest.mark.parametrize("ramp", [linear_queries, cosine_queries])
@settings(deadline=None, max_examples=100)
@given(start=st.integers(1, 100), end=st.integers(1, 100), steps=st.integers(2, 200))
def test_ramps_go_one_way_from_start_to_end(ramp, start, end, steps):
    queries = simulate(ramp(start, end, steps), steps + 5)
    assert (queries[0], queries[steps - 1 :]) == (start, [end] * 6)
    assert queries == sorted(queries, reverse=start > end)


@settings(deadline=None, max_examples=100)
@given(start=st.integers(1, 50), end=st.integers(1, 50), steps=st.integers(2, 100), data=st.data())
def test_ramps_are_their_formulas_to_the_nearest_query(start, end, steps, data):
    step = data.draw(st.integers(0, steps - 1))
    progress = step / (steps - 1)
    linear = start + (end - start) * progress
    cosine = start + (end - start) * (1 - math.cos(math.pi * progress)) / 2
    assert abs(linear_queries(start, end, steps)(step, 0, History()) - linear) <= 0.5 + 1e-9
    assert abs(cosine_queries(start, end, steps)(step, 0, History()) - cosine) <= 0.5 + 1e-9


@given(levels=st.lists(st.integers(1, 40), min_size=1, max_size=6), data=st.data())
def test_stepwise_holds_each_level_until_the_next(levels, data):
    later = data.draw(st.lists(st.integers(1, 50), min_size=len(levels) - 1, max_size=len(levels) - 1, unique=True))
    milestones = dict(zip([0, *sorted(later)], levels, strict=True))
    queries = simulate(stepwise_queries(milestones), 60)
    assert queries == [milestones[max(m for m in milestones if m <= step)] for step in range(60)]
    if levels == sorted(levels):
        assert queries == sorted(queries)


def test_stepwise_takes_milestones_in_any_order():
    assert simulate(stepwise_queries({2: 5, 0: 3}), 4) == [3, 3, 5, 5]


# beta of the released code


@settings(deadline=None, max_examples=200)
@given(alpha=st.floats(0.01, 0.99), epochs=st.integers(1, 10**6), num=st.integers(1, 50))
def test_derived_beta_reaches_the_end_or_is_refused(alpha, epochs, num):
    if alpha * epochs > num:
        beta = derived_beta(alpha, epochs, num)
        assert 0 < beta < 1
        assert alpha * epochs**beta == pytest.approx(num)
        adazeta_queries(alpha, beta)
    else:
        with pytest.raises(ZOError, match=f"{epochs} epochs"):
            derived_beta(alpha, epochs, num)


def test_derived_beta_says_how_many_epochs_it_takes():
    """20 / 0.85 = 23.5."""
    with pytest.raises(ZOError, match="at least 24;"):
        derived_beta(0.85, 23)
    assert derived_beta(0.85, 24) == pytest.approx(math.log(20 / 0.85) / math.log(24))


def test_beta_is_derived_from_the_runs_epochs():
    schedule = for_run(adazeta_queries(beta="derived"), RunLength(steps=200, steps_per_epoch=2))
    assert schedule.beta == derived_beta(0.85, 100)
    with pytest.raises(ZOError, match="beta"):
        adazeta_queries(beta="derived")(0, 0, History())


# Budgets


@settings(deadline=None, max_examples=200)
@given(drawn=budget_arguments())
def test_budget_spends_all_that_buys_queries(drawn):
    arguments, _ = drawn
    forwards, steps, cost, fixed = arguments.values()
    queries = simulate(budget_queries(**arguments), steps, 1, cost, fixed)
    spent = sum(queries) * cost + steps * fixed
    assert spent == forwards - (forwards - steps * fixed) % cost
    assert max(queries) - min(queries) <= 1  # as evenly as whole queries allow
    assert queries == sorted(queries)


@settings(deadline=None, max_examples=100)
@given(steps=st.integers(2, 50), extra=st.integers(0, 100), data=st.data())
def test_budget_corrects_what_cost_more_or_less(steps, extra, data):
    """Unforeseen costs, as long as they leave a query a step, are made up for by the end."""
    forwards = 2 * (3 * steps + extra)
    schedule, history = budget_queries(forwards, steps), History()
    for step in range(steps):
        cost = 2 * schedule(step, 0, history)
        if step < steps - 1:
            room = forwards - history.forwards - cost - 2 * (steps - 1 - step)
            cost += 2 * data.draw(st.integers(-1, max(min(room // 2, 3), -1)))
        history.forwards += cost
    assert history.forwards == forwards


def test_budget_spent_before_its_time_still_takes_a_query():
    assert budget_queries(100, 10)(5, 0, History(forwards=100)) == 1
    assert budget_queries(100, 10)(10, 0, History(forwards=100)) == 1


def test_budget_refuses_less_than_a_query_a_step():
    assert simulate(budget_queries(20, 10), 10) == [1] * 10
    with pytest.raises(ZOError, match=r"forwards=19 .* costs 20; .* at most 9 steps"):
        budget_queries(19, 10)
    with pytest.raises(ZOError, match="costs 30"):
        budget_queries(20, 10, forwards_per_query=2, forwards_per_step=1)


# Variance, and what a history observes

GRADS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(observations=st.lists(GRADS, min_size=1, max_size=20))
def test_signal_is_the_average_of_mean_squares_seeded_by_the_first(observations):
    history, signal, peak = History(), 0.0, 0.0
    for grads in observations:
        history.observe(grads)
        mean_square = sum(g * g for g in grads) / len(grads)
        signal = SIGNAL_DECAY * signal + (1 - SIGNAL_DECAY) * mean_square if peak else mean_square
        peak = max(peak, signal)
    assert history.signal == pytest.approx(signal, rel=1e-9)
    assert history.peak_signal == pytest.approx(peak, rel=1e-9)


@given(grads=st.lists(st.floats(), max_size=8))
def test_observing_takes_finite_values_alone_and_stays_finite(grads):
    mixed, kept = History(), History()
    mixed.observe(grads)
    kept.observe([g for g in grads if math.isfinite(g * g)])
    assert mixed == kept
    assert math.isfinite(mixed.signal)


@pytest.mark.parametrize("grads", [[], [math.nan], [math.inf, -math.inf], [1e200]])
def test_observing_nothing_finite_changes_nothing(grads):
    history = History(signal=2.0, peak_signal=3.0)
    history.observe(grads)
    assert history == History(signal=2.0, peak_signal=3.0)


def test_history_of_an_older_checkpoint():
    assert History(**{"queries": 3, "forwards": 6}) == History(3, 6, 0.0, 0.0)


@settings(deadline=None, max_examples=200)
@given(bounds=floor_and_ceiling(), peak=st.floats(1e-300, 1e300), fall=st.floats(1, 1e6))
def test_variance_keeps_queries_times_signal(bounds, peak, fall):
    least, most = bounds
    queries = variance_queries(least, most)(0, 0, History(signal=peak / fall, peak_signal=peak))
    assert least <= queries <= most
    if queries < most:
        assert queries == math.ceil(least * (peak / (peak / fall)))


@settings(deadline=None, max_examples=100)
@given(bounds=floor_and_ceiling(), first=st.floats(0, 1), second=st.floats(0, 1))
def test_variance_never_falls_as_the_signal_falls(bounds, first, second):
    schedule = variance_queries(*bounds)
    weak, strong = sorted((first, second))
    at = {s: schedule(0, 0, History(signal=s, peak_signal=1.0)) for s in (weak, strong)}
    assert at[weak] >= at[strong]


def test_variance_begins_at_the_floor_and_ends_at_the_ceiling():
    schedule = variance_queries(3, 12)
    assert schedule(0, 0, History()) == 3
    assert schedule(9, 0, History(signal=0.0, peak_signal=1.0)) == 12
    assert schedule(9, 0, History(signal=5e-324, peak_signal=1e300)) == 12
    assert simulate(schedule, 3) == [3, 3, 3]


# Mistakes

WRONG = {
    "constant of a fraction": (lambda: constant_queries(2.5), "queries=2.5"),
    "beta for no epochs": (lambda: derived_beta(0.85, 0), "epochs=0"),
    "beta for no queries": (lambda: derived_beta(0.85, 100, 0), "queries_at_end=0"),
    "beta for another alpha": (lambda: derived_beta(1.5, 100), "alpha=1.5"),
    "linear from none": (lambda: linear_queries(0, 5, 10), "start=0"),
    "linear to none": (lambda: linear_queries(5, 0, 10), "end=0"),
    "cosine over nothing": (lambda: cosine_queries(1, 5, 0), "steps=0"),
    "no milestones": (lambda: stepwise_queries({}), "milestones"),
    "milestones that begin late": (lambda: stepwise_queries({10: 2}), "begin at step 0"),
    "milestones before the run": (lambda: stepwise_queries({-1: 2, 0: 2}), "begin at step 0"),
    "milestone without queries": (lambda: stepwise_queries({0: 1, 5: 0}), r"milestones\[5\]=0"),
    "budget of nothing": (lambda: budget_queries(0, 10), "forwards=0"),
    "budget with free queries": (lambda: budget_queries(10, 10, forwards_per_query=0), "forwards_per_query=0"),
    "budget with a refund": (lambda: budget_queries(10, 10, 2, forwards_per_step=-1), "forwards_per_step=-1"),
    "variance upside down": (lambda: variance_queries(9, 3), "min_queries=9"),
    "variance without queries": (lambda: variance_queries(0, 3), "min_queries=0"),
    "a simulation of nothing": (lambda: simulate(constant_queries(), 0), "steps=0"),
    "epochs of nothing": (lambda: simulate(constant_queries(), 5, 0), "steps_per_epoch=0"),
    "too few signals": (lambda: simulate(constant_queries(), 5, signals=[1.0]), "1 signals"),
    "an unknown name": (lambda: SCHEDULES.make("bogus"), "'bogus'.*constant, adazeta.*variance"),
    "options of no run": (lambda: RunLength(5, 0), "steps_per_epoch=0"),
    "milestones of another form": (lambda: stepwise_queries("0=1"), "'0=1'"),
    "milestones with a fraction": (lambda: stepwise_queries("0:1.5"), r"'0:1\.5'"),
    "a milestone with too much": (lambda: stepwise_queries("0:1:2"), "step:queries"),
    "a milestone twice": (lambda: stepwise_queries("0:1,0:2"), "twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused_with_one_sentence(name):
    make, what = WRONG[name]
    with pytest.raises(ZOError, match=what) as caught:
        make()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 1000])
def test_default_milestones_fit_any_run(steps):
    schedule = for_run(stepwise_queries(start=1, end=15), RunLength(steps))
    assert schedule.milestones[max(schedule.milestones)] == 15
    assert simulate(schedule, steps)[-1] == 15
