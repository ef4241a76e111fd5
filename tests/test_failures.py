"""What may go wrong inside a closure: the weights come back to the bit, bad losses never reach them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from optimizer_problem import BATCH, Model, bits, closure_of, flat, make, make_batch, same
from optimizer_table import NAMES, ROWS, build, run

from zo_opt import NonFiniteLossError, ZOError
from zo_opt.directions import DIRECTIONS, StepDirections
from zo_opt.optim import UPDATE_RULES
from zo_opt.queries import modes as query_modes
from zo_opt.queries import trainables
from zo_opt.schedules import constant_queries

every_optimizer = pytest.mark.parametrize("name", NAMES)

# --- promise 1: whatever happens inside an estimate ---


class Failing:
    """A closure over the model that raises on its ``fail_at``-th call and on all later ones."""

    def __init__(self, model, error=KeyboardInterrupt, fail_at=math.inf):
        self.model, self.error, self.fail_at, self.calls = model, error, fail_at, 0

    def __call__(self, batch=BATCH):
        self.calls += 1
        if self.calls >= self.fail_at:
            raise self.error("on purpose")
        return self.model(batch)


MODES = ["sequential", "batched", "split", "auto"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("error", "dtype"), [
    (RuntimeError, torch.float32), (KeyboardInterrupt, torch.bfloat16), (torch.OutOfMemoryError, torch.float32),
])  # fmt: skip
def test_an_exception_on_any_call_leaves_the_weights_to_the_bit(mode, error, dtype, monkeypatch):
    """And the next step is the one that would have been taken."""
    monkeypatch.setitem(query_modes.BATCHED_TOKENS, "cpu", 16)  # 16 // 8 examples: two copies in one forward
    options = {"query_mode": mode, "query_schedule": constant_queries(3)}
    plain = Model(dtype)
    closure = Failing(plain)
    make(plain, **options).step(closure, BATCH)
    assert closure.calls
    for n in range(1, closure.calls + 1):
        model = Model(dtype)
        owned, before = list(model.parameters()), bits(model)
        optimizer = make(model, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether an error of the closure is warned about is another test's matter
            with pytest.raises(error):
                optimizer.estimate(Failing(model, error, n), BATCH)
        assert all(a is b for a, b in zip(model.parameters(), owned, strict=True))
        assert same(bits(model), before), f"call {n}"
        if mode == "sequential":
            optimizer.step(Failing(model), BATCH)
            assert same(bits(model), bits(plain))


@every_optimizer
@pytest.mark.parametrize(("small", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_after_an_exception_every_optimizer_goes_on_as_if_there_had_been_none(name, small, dtype, monkeypatch):
    """Raised on any call of a step that is not the first."""
    if not small:
        monkeypatch.setattr(trainables.Trainables, "SMALL", 0)
    plain = Model(dtype)
    closure, other = Failing(plain), build(name, plain)
    other.step(closure, BATCH)
    first = closure.calls
    other.step(closure, BATCH)
    model = Model(dtype)
    optimizer = build(name, model)
    optimizer.step(model, BATCH)
    before = bits(model)
    for n in range(1, closure.calls - first + 1):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(Failing(model, fail_at=n), BATCH)
        assert same(bits(model), before), f"call {n}"
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    optimizer.step(model, BATCH)
    assert same(bits(model), bits(plain))


def test_an_exception_in_a_later_micro_batch_keeps_the_earlier_ones():
    model = Model()
    optimizer = make(model)
    before = bits(model)
    optimizer.estimate(model, BATCH)
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(Failing(model, fail_at=1))
    assert same(bits(model), before)
    optimizer.step()
    assert same(bits(model), bits(run("mezo", 1)))


def test_training_flags_come_back_after_an_exception():
    model = Model().train()
    with pytest.raises(KeyboardInterrupt):
        make(model).estimate(Failing(model, fail_at=1))
    assert model.training


# --- promise 6: losses that are not finite ---


def nonfinite_at(model, calls, bad):
    """A closure with a bad loss on the given calls (counted from 0)."""
    count = iter(range(10**9))
    return lambda batch=BATCH: bad if next(count) in calls else float(model(batch))


@pytest.mark.parametrize(("bad", "calls"), [(math.nan, {2}), (math.inf, {3}), (-math.inf, {2, 3})])
def test_a_query_with_a_bad_loss_is_dropped_and_counted(bad, calls):
    """Of four queries the second is lost; the step is the mean of the other three."""
    model = Model()
    optimizer = make(model, lr=0.1, query_schedule=constant_queries(4))
    loss = optimizer.step(nonfinite_at(model, calls, bad))
    record = optimizer.last_record
    assert (record.queries, record.dropped, record.forwards) == (4, 1, 8)
    assert optimizer.dropped_queries == 1
    assert optimizer.failed_steps == 0
    assert math.isfinite(float(loss))
    kept, start = [0, 2, 3], flat(Model())
    z = StepDirections(DIRECTIONS.make("gaussian"), 5, 0, list(model.parameters()))
    mean = sum(record.projected_grads[q] * z.range(q, 0, len(start)) for q in kept) / 3
    torch.testing.assert_close(flat(model), start - 0.1 * mean, rtol=1e-5, atol=1e-6)


CALLS = [n for n in NAMES if n not in ("grzo", "forward-gradient")]  # the others take a float


@pytest.mark.parametrize("name", CALLS)
def test_one_bad_loss_on_any_call_leaves_finite_weights_and_state(name):
    """In a step that is not the first, of three queries (FZOO: four)."""
    options = {} if name == "fzoo" else {"query_schedule": constant_queries(3)}
    for n in range(ROWS[name].forwards(1, 4 if name == "fzoo" else 3)):
        model = Model()
        optimizer = build(name, model, **options)
        optimizer.step(model, BATCH)
        before = flat(model)
        optimizer.step(nonfinite_at(model, {n}, -math.inf))
        assert flat(model).isfinite().all()
        assert (flat(model) - before).abs().max() < 1
        assert all(t.isfinite().all() for s in optimizer.state.values() for t in s.values())
        optimizer.step(model, BATCH)
        assert optimizer.step_count == 3


def test_fzoo_with_one_finite_query_left_has_failed_a_step():
    """It has no spread; a loss that is not finite does not end the run."""
    model = Model()
    optimizer = build("fzoo", model, query_schedule=constant_queries(2), max_failed_steps=3)
    before = bits(model)
    assert math.isfinite(float(optimizer.step(nonfinite_at(model, {2}, math.nan))))
    assert same(bits(model), before)
    assert (optimizer.dropped_queries, optimizer.failed_steps, optimizer.step_count) == (1, 1, 1)
    optimizer.step(model, BATCH)
    assert not same(bits(model), before)
    assert optimizer.failed_steps == 0


def test_a_query_lost_in_one_micro_batch_is_lost_for_the_step():
    model = Model()
    optimizer = make(model, query_schedule=constant_queries(2))
    optimizer.estimate(closure_of(model))
    optimizer.estimate(nonfinite_at(model, {0}, math.nan))
    optimizer.step()
    assert optimizer.last_record.dropped == 1
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_one_bad_example(mode):
    """In split mode it costs the directions that saw it, elsewhere all of them."""
    model, batch = Model(), make_batch(8)
    batch["y"][0, 0] = math.nan
    before = bits(model)
    optimizer = make(model, query_mode=mode, query_schedule=constant_queries(4))
    optimizer.step(model, batch)
    assert optimizer.last_record.dropped == (1 if mode == "split" else 4)
    assert same(bits(model), before) == (mode != "split")
    assert flat(model).isfinite().all()


def test_grzo_loses_the_direction_of_a_bad_example():
    model, batch = Model(), make_batch(8)
    batch["y"][3, 0] = math.nan
    optimizer = build("grzo", model)
    optimizer.step(model, batch)
    assert optimizer.last_record.dropped == 1
    assert math.isnan(optimizer.last_record.projected_grads[3])
    assert flat(model).isfinite().all()
    assert not same(bits(model), bits(Model()))


@every_optimizer
def test_too_many_failed_steps_stop_the_run(name):
    """Nothing moves meanwhile: no decay, no momentum, no state."""
    model = Model()
    optimizer = build(name, model, max_failed_steps=3, weight_decay=0.5)
    optimizer.step(model, BATCH)
    before = bits(model)
    state = {(p, n): t.clone() for p, s in optimizer.state.items() for n, t in s.items()}

    def broken(batch):
        return model(batch) * math.nan

    dropped = optimizer.dropped_queries
    for _ in range(2):
        assert math.isnan(float(optimizer.step(broken, BATCH)))
        dropped += optimizer.last_record.queries
    with pytest.raises(NonFiniteLossError, match="3 steps"):
        optimizer.step(broken, BATCH)
    assert same(bits(model), before)
    assert all(torch.equal(optimizer.state[p][n], t) for (p, n), t in state.items())
    assert optimizer.dropped_queries == dropped + optimizer.last_record.queries


@pytest.mark.parametrize("rule", sorted(UPDATE_RULES))
def test_failed_steps_move_nothing_under_any_rule(rule):
    model = Model()
    optimizer = make(model, weight_decay=0.5, update_rule=UPDATE_RULES[rule]())
    optimizer.step(model, BATCH)
    before = bits(model)
    optimizer.step(lambda: math.inf)
    assert same(bits(model), before)


def test_failed_steps_are_counted_in_a_row():
    model = Model()
    optimizer = make(model, max_failed_steps=2)
    for _ in range(4):
        optimizer.step(lambda: math.nan)
        optimizer.step(model, BATCH)
    assert optimizer.failed_steps == 0
    assert (optimizer.dropped_queries, optimizer.step_count) == (4, 8)


def test_a_failed_step_takes_other_directions_next_time():
    model = Model()
    optimizer = make(model)
    optimizer.step(lambda: math.nan)
    optimizer.step(model, BATCH)
    assert not same(bits(model), bits(run("mezo", 1)))


@every_optimizer
def test_a_run_goes_on_after_a_failed_first_step(name):
    model = Model()
    optimizer = build(name, model)
    optimizer.step(lambda batch: model(batch) * math.inf, BATCH)
    for _ in range(3):
        optimizer.step(model, BATCH)
    assert flat(model).isfinite().all()
    assert not same(bits(model), bits(Model()))


@pytest.mark.parametrize("name", ["hizoo", "zo-kalman"])
def test_a_slope_of_exactly_zero_is_a_measurement(name):
    """And not a query that was lost: losses of low precision are often equal on both sides."""
    model, plain, losses = Model(), Model(), [3.0, 2.0, 1.0, 1.0]
    base = [1.5] if name == "hizoo" else []
    queries = {"query_schedule": constant_queries(2), "lr": 1e-3}
    for m, tie in ((model, losses), (plain, [3.0, 2.0, 1.0 + 1e-9, 1.0])):  # the limit of small slopes
        values = iter([*base, *tie])
        build(name, m, **queries).step(lambda values=values: next(values))
    assert (flat(model) - flat(plain)).abs().max() < 1e-6


def test_a_loss_that_is_no_number():
    model = Model()
    for loss in (None, torch.ones(2)):
        with pytest.raises(ZOError, match="closure returned"):
            make(model).step(lambda loss=loss: loss)
    assert same(bits(model), bits(Model()))
