"""Differential privacy of the training rows."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import beta, kstest, norm

from zo_opt import AdaZeta, GaussianPrivacy, MeZO, ZOError
from zo_opt.adapters.storage import WEIGHTS_NAME
from zo_opt.optim import FZOO, LineSearch, redo
from zo_opt.privacy import GRID, epsilon_of, noise_for
from zo_opt.schedules import constant_queries
from zo_opt.training import private

KEY = bytes(range(32))


def privacy(**changes: Any) -> GaussianPrivacy:
    options: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.0, "examples": 100, "batch_size": 20, "key": KEY}
    return GaussianPrivacy(**options | changes)


# --- epsilon ---


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism of sensitivity 1 (arXiv 1805.06530, theorem 8)."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize(
    ("sigma", "queries", "steps"), [(1.0, 1, 1), (4.0, 1, 1), (4.0, 4, 1), (10.0, 1, 25), (20.0, 4, 25)]
)
def test_without_sampling_epsilon_is_the_gaussian_mechanisms(sigma: float, queries: int, steps: int) -> None:
    """T steps of Q queries along the same rows are one Gaussian mechanism of noise sigma / sqrt(Q T)."""
    exact = gaussian_epsilon(sigma / math.sqrt(queries * steps), 1e-5)
    found = epsilon_of(sigma, {queries: steps}, 1e-5, examples=50, batch_size=50)
    assert exact <= found <= 1.02 * exact  # rounded up at most: INTERVAL


def test_with_sampling_epsilon_is_within_the_published_bound() -> None:
    """arXiv 1607.00133, section 3.2: rate 0.01, noise 4, 10,000 steps; 1.26 by the moments accountant, whose bound is looser."""
    found = epsilon_of(4.0, {1: 10_000}, 1e-5, examples=100, batch_size=1)
    assert 0.7 * 1.26 < found < 1.26


@pytest.mark.parametrize(("epsilon", "steps"), [(1.0, {1: 500}), (2.0, {1: 20, 3: 20})])
def test_the_noise_found_keeps_within_epsilon_and_is_not_wasteful(epsilon: float, steps: dict[int, int]) -> None:
    sampling = {"examples": 1000, "batch_size": 16}
    noise = noise_for(epsilon, 1e-5, steps, **sampling)
    assert epsilon_of(noise, steps, 1e-5, **sampling) <= epsilon < epsilon_of(0.95 * noise, steps, 1e-5, **sampling)


def test_nothing_released_costs_nothing() -> None:
    assert privacy().epsilon(1e-5) == 0


# --- the mechanism ---


VALUES = st.floats(width=64)  # infinities and nan among them


@settings(max_examples=200)
@given(rows=st.lists(VALUES, max_size=20), one=VALUES, clip=st.floats(1e-6, 1e6))
def test_one_row_moves_the_sum_by_one_clip_at_most(rows: list[float], one: float, clip: float) -> None:
    hidden = privacy(clip=clip)
    without, with_it = (hidden.clipped_sum(torch.tensor(r, dtype=torch.float64)) for r in (rows, [one, *rows]))
    assert abs(with_it - without) <= GRID
    if math.isfinite(one):  # and it is counted: to half a step of the grid
        assert abs((with_it - without) / GRID - max(-1.0, min(1.0, one / clip))) <= 0.5001 / GRID


def test_noise_is_gaussian() -> None:
    """10,000 releases of an empty batch: mean and variance within 5 standard errors, and the whole distribution by Kolmogorov-Smirnov."""
    hidden, count = privacy(clip=2.0, noise_multiplier=3.0, batch_size=20), 10_000
    found = np.array([hidden.release(torch.zeros(0), step, 0) for step in range(count)]) * 20
    assert abs(found.mean()) < 5 * 6 / math.sqrt(count)
    assert abs(found.var() / 36 - 1) < 5 * math.sqrt(2 / count)
    assert kstest(found, "norm", args=(0, 6)).pvalue > 1e-6


def test_noise_differs_between_queries_steps_keys_and_sums_and_is_repeated_otherwise() -> None:
    hidden, zero = privacy(batch_size=1), torch.zeros(1)
    first = hidden.release(zero, 0, 0)
    assert first == privacy(batch_size=1).release(zero, 0, 0)
    others = [
        hidden.release(zero, 0, 1),
        hidden.release(zero, 1, 0),
        privacy(batch_size=1, key=bytes(32)).release(zero, 0, 0),
        hidden.release(torch.ones(1), 0, 0) - 1.0,
    ]
    assert len({first, *others}) == 5


def test_rows_are_sampled_independently() -> None:
    """Sizes of 4000 batches as binomial, each row and each pair of neighbouring rows as often as they should: 5 standard errors."""
    hidden, steps = privacy(examples=50, batch_size=10), 4000
    seen = np.zeros((steps, 50))
    for step in range(steps):
        seen[step, hidden.batch(step)] = 1
    sizes, rate = seen.sum(axis=1), 0.2
    assert abs(sizes.mean() - 10) < 5 * math.sqrt(8 / steps)
    assert abs(sizes.var() / 8 - 1) < 5 * math.sqrt(2 / steps)
    for share, expected in ((seen.mean(axis=0), rate), ((seen[:, 1:] * seen[:, :-1]).mean(axis=0), rate**2)):
        assert np.abs(share - expected).max() < 5 * math.sqrt(expected * (1 - expected) / steps)
    assert hidden.batch(7) == privacy(examples=50, batch_size=10).batch(7)
    assert privacy(batch_size=100).batch(0) == list(range(100))


def test_keys_are_drawn_anew_and_never_shown() -> None:
    one, other = (GaussianPrivacy(clip=1.0, noise_multiplier=1.0, examples=10, batch_size=2) for _ in range(2))
    assert one.key != other.key and len(one.key) == 32
    assert one.key.hex() not in repr(one) and repr(one.key) not in repr(one)


# --- in an optimizer ---

ROWS = torch.randn(100, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([1.0, -1.0, 0.5])


def distances(theta: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: (rows - theta).square().sum(dim=1)


def run(steps: int, hidden: GaussianPrivacy, rows: torch.Tensor = ROWS, **options: Any) -> tuple[torch.Tensor, MeZO]:
    theta = torch.nn.Parameter(torch.zeros(3))
    optimizer = MeZO([theta], **{"lr": 0.03, "directions": "rademacher", "privacy": hidden, **options})
    for step in range(steps):
        assert optimizer.step(distances(theta), rows[hidden.batch(step)]).isnan()
    return theta.detach(), optimizer


def test_it_learns_at_a_moderate_epsilon() -> None:
    """The mean of 100 rows to 0.3 in each of three coordinates, whose spread is 1, at epsilon 8."""
    theta, optimizer = run(200, hidden := privacy(clip=5.0, noise_multiplier=2.2))
    assert (theta - ROWS.mean(dim=0)).abs().max() < 0.3
    assert hidden.epsilon(1e-3) <= 8.0 and hidden.spent == {1: 200}
    assert optimizer.dropped_queries == 0 and optimizer.last_record is not None
    assert math.isnan(optimizer.last_record.loss)


def test_almost_without_noise_it_is_mezo() -> None:
    """Full batches, no clipping: plain MeZO to the grid's rounding."""
    plain = torch.nn.Parameter(torch.zeros(3))
    mezo = MeZO([plain], lr=0.03, directions="rademacher")
    for _ in range(50):
        mezo.step(lambda: distances(plain)(ROWS).mean())
    theta, _ = run(50, privacy(clip=100.0, noise_multiplier=1e-6, batch_size=100))
    assert torch.allclose(theta, plain, atol=100 / GRID)


def test_a_batch_without_rows_is_noise_alone() -> None:
    hidden = privacy(examples=10, batch_size=1)
    empty = next(step for step in range(100) if not hidden.batch(step))
    theta, optimizer = run(empty + 1, hidden, ROWS[:10])
    assert theta.isfinite().all() and optimizer.last_update is not None
    assert optimizer.last_update.coefficients == (privacy(examples=10, batch_size=1).release(torch.zeros(0), empty, 0),)


def test_losses_that_are_not_finite_drop_nothing() -> None:
    """Whether a query is dropped would depend on a single row."""
    rows = ROWS.clone()
    rows[3], rows[4] = torch.nan, torch.inf
    theta, optimizer = run(20, privacy(batch_size=100), rows)
    assert theta.isfinite().all() and optimizer.dropped_queries == 0


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    whole, _ = run(12, hidden := privacy())
    half = torch.nn.Parameter(torch.zeros(3))
    optimizer = MeZO([half], lr=0.03, directions="rademacher", privacy=(first := privacy()))
    for step in range(7):
        optimizer.step(distances(half), ROWS[first.batch(step)])
    state, half = optimizer.state_dict(), torch.nn.Parameter(half.detach().clone())
    again = GaussianPrivacy(
        clip=1.0, noise_multiplier=1.0, examples=100, batch_size=20
    )  # another key until the state is loaded
    optimizer = MeZO([half], lr=0.03, directions="rademacher", privacy=again)
    optimizer.load_state_dict(state)
    for step in range(7, 12):
        optimizer.step(distances(half), ROWS[again.batch(step)])
    assert torch.equal(half, whole)
    assert again.spent == hidden.spent == {1: 12}


def test_redone_steps_are_accounted_for_once() -> None:
    _, optimizer = run(1, hidden := privacy())
    assert optimizer.last_update is not None and optimizer.last_record is not None
    theta, other = torch.nn.Parameter(torch.zeros(3)), privacy()
    copy = MeZO([theta], lr=0.03, directions="rademacher", privacy=other)
    redo(copy, optimizer.last_update, optimizer.last_record)
    assert other.spent == hidden.spent == {1: 1}
    other.charge(0, 1)
    assert other.spent == {1: 1}


def test_queries_of_a_step_are_one_release() -> None:
    theta = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdaZeta([theta], lr=0.01, query_schedule=constant_queries(3), privacy=(hidden := privacy()))
    optimizer.step(lambda: distances(theta)(ROWS[hidden.batch(0)]))
    assert hidden.spent == {3: 1} and optimizer.last_record is not None
    assert optimizer.last_record.forwards == 7  # one of them to see that the closure is not random


def linear_case(**options: Any) -> MeZO:
    model = torch.nn.Linear(2, 1)
    return MeZO(model.parameters(), lr=0.1, module=model, privacy=privacy(), **options)


def wrong_closure(value: Any) -> None:
    linear_case().step(lambda: value)


def sampled(optimizer: MeZO) -> torch.Tensor:
    assert optimizer.setting.privacy is not None
    return torch.zeros(len(optimizer.setting.privacy.batch(optimizer.step_count)))


def twice() -> None:
    optimizer = linear_case()
    optimizer.estimate(lambda: sampled(optimizer))
    optimizer.estimate(lambda: sampled(optimizer))


def shared() -> None:
    hidden = privacy()
    for _ in range(2):
        MeZO([torch.nn.Parameter(torch.zeros(1))], privacy=hidden)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: privacy(clip=0), "clip=0 is not possible"),
        (lambda: privacy(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
        (lambda: privacy(noise_multiplier=math.nan), "noise_multiplier=nan"),
        (lambda: privacy(batch_size=101), "batch_size=101 of 100 rows"),
        (lambda: privacy(batch_size=0), "batch_size=0 of 100 rows"),
        (lambda: privacy(key=b"short"), "at least 16 secret bytes"),
        (lambda: privacy().epsilon(1.0), "delta=1.0"),
        (lambda: noise_for(-1.0, 1e-5, {1: 1}, examples=10, batch_size=1), "epsilon=-1.0"),
        (lambda: wrong_closure(torch.tensor(1.0)), r"a tensor of shape \(\).*a loss for each example"),
        (lambda: wrong_closure(1.0), "returned float.*a loss for each example"),
        (lambda: wrong_closure(torch.zeros(2, 2)), r"shape \(2, 2\)"),
        (lambda: linear_case(query_mode="split"), "privacy clips.*query_mode='sequential'"),
        (lambda: linear_case(query_mode="batched"), "privacy clips.*query_mode='sequential'"),
        (lambda: linear_case(line_search=LineSearch()), "privacy clips.*no line search"),
        (lambda: FZOO([torch.nn.Parameter(torch.zeros(1))], privacy=privacy()), "such as MeZO or AdaZeta"),
        (twice, "one step.. follows each estimate"),
        (shared, "belongs to another optimizer"),
    ],
)
def test_mistakes(wrong: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ZOError, match=sentence):
        wrong()


# --- on the command line ---

Options = Callable[..., list[str]]
PRIVATE = {
    "privacy_noise": 1.0,
    "privacy_clip": 5,
    "query_mode": None,
    "query_schedule": None,
    "queries": None,
    "steps": 6,
}


def test_a_private_run(toy_options: Options, tmp_path: Path) -> None:
    """It ends in a report that says what it cost; the key and raw losses are in no file that stays."""
    out = tmp_path / "out"
    assert run_main(toy_options(**PRIVATE | {"output_dir": out, "batch_size": 2})) == 0
    results = json.loads((out / "results.json").read_text())
    expected = epsilon_of(1.0, {1: 6}, 1e-5, examples=64, batch_size=2)
    assert results["privacy"].startswith(f"epsilon {expected:.3g} at delta 1e-05 for one training row added or removed")
    assert results["privacy"] in (out / "report.md").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [None] * 6
    assert all(len(line["projected_grads"]) == 1 for line in lines)
    assert results["queries"] == 6 and results["dropped"] == 0
    assert not list(out.glob("checkpoint*"))
    assert not any(b'"key"' in path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert (
        run_main(["replay", str(out), "--to", str(tmp_path / "again")]) == 0
    )  # the journal knows all that moved the weights
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (out / WEIGHTS_NAME).read_bytes()


def test_a_private_run_that_was_killed_goes_on_with_the_same_noise(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its fourth step; the key to the rest is in the checkpoint."""
    monkeypatch.setattr("secrets.token_bytes", lambda count: bytes([7] * count))
    options = toy_options(**PRIVATE | {"save_steps": 2, "batch_size": 4, "output_dir": tmp_path / "whole"})
    assert run_main(options) == 0
    options[-1] = str(tmp_path / "killed")
    original = private.private_step

    def dies(optimizer: Any, *rest: Any) -> None:
        if optimizer.step_count == 4:
            raise SystemError("killed")
        original(optimizer, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr("zo_opt.training.stepper.private_step", dies)
        run_main(options)
    monkeypatch.setattr(
        "secrets.token_bytes", lambda count: bytes([8] * count)
    )  # not used: the key is in the checkpoint
    assert run_main(["train", "--output_dir", str(tmp_path / "killed"), "--resume"]) == 0
    whole, killed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert whole["privacy"] == killed["privacy"]
    assert (tmp_path / "whole" / WEIGHTS_NAME).read_bytes() == (tmp_path / "killed" / WEIGHTS_NAME).read_bytes()


def test_epsilon_decides_the_noise(toy_options: Options, tmp_path: Path) -> None:
    options = PRIVATE | {"privacy_noise": None, "privacy_epsilon": 2, "steps": 3, "output_dir": tmp_path / "out"}
    assert run_main(toy_options(**options)) == 0
    found = float(json.loads((tmp_path / "out" / "results.json").read_text())["privacy"].split()[1])
    assert 1.8 < found <= 2.0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"privacy_clip": None}, "needs --privacy_clip"),
        ({"privacy_epsilon": 1}, "both given"),
        ({"privacy_noise": None}, "privacy_clip was given without"),
        ({"privacy_noise": 0}, "privacy_noise=0"),
        ({"privacy_delta": 0}, "delta=0"),
        ({"privacy_delta": 0.1}, "promises nothing to one of 64 rows"),
        ({"batch_size": 65}, "batch_size=65 of 64"),
        ({"optimizer": "adamw"}, "optimizer='adamw' uses the rows otherwise"),
        ({"optimizer": "mezo-svrg"}, "optimizer='mezo-svrg' uses the rows otherwise"),
        ({"query_mode": "split"}, "query_mode='split' cannot be used with privacy"),
        ({"query_schedule": "variance"}, "queries depend on what was measured"),
        ({"objective": "accuracy"}, "objective='accuracy' cannot be used with privacy"),
        ({"batch_order": "balanced"}, "batch_order='balanced'"),
        ({"task": "lm", "template": None, "verbalizers": None}, "running text"),
    ],
)
def test_mistakes_on_the_command_line(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any], sentence: str
) -> None:
    assert run_main(toy_options(**PRIVATE | {"output_dir": tmp_path / "out"} | wrong)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("zo-opt: error: ") and error.endswith(".\n")
    assert not (tmp_path / "out").exists()


def test_a_state_goes_on_with_its_own_noise_and_rows_alone() -> None:
    state = privacy().state_dict()
    privacy().load_state_dict(state)
    for other in ({"clip": 2.0}, {"noise_multiplier": 8.0}, {"examples": 10_000}, {"batch_size": 10}):
        with pytest.raises(ZOError, match="clip, noise multiplier, rows"):
            privacy(**other).load_state_dict(state)


def test_private_and_other_states_do_not_mix() -> None:
    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(3))]

    plain, private_one = MeZO(parameters(), lr=0.1), MeZO(parameters(), lr=0.1, privacy=privacy())
    for one, other in ((plain, private_one), (private_one, plain)):
        with pytest.raises(ZOError, match="differ in privacy"):
            one.load_state_dict(other.state_dict())


def test_privacy_can_be_given_again_after_a_refused_optimizer() -> None:
    given = privacy()
    with pytest.raises(ZOError, match="sequential"):
        MeZO([torch.nn.Parameter(torch.zeros(3))], lr=0.1, query_mode="auto", privacy=given)
    MeZO([torch.nn.Parameter(torch.zeros(3))], lr=0.1, privacy=given)


# --- batches that were not accounted for ---


def test_the_whole_data_in_the_place_of_a_sample() -> None:
    """Twenty steps on all 1000 rows at the price of one in a hundred: epsilon 28.4, not 0.455."""
    hidden = GaussianPrivacy(1.0, 1.0, 1000, 10)
    theta = torch.nn.Parameter(torch.zeros(3))
    optimizer = MeZO([theta], lr=0.1, privacy=hidden)
    rows = ROWS.repeat(10, 1)
    with pytest.raises(ZOError, match=r"step 0 saw 1000 rows without batch\(0\) being asked for"):
        optimizer.step(distances(theta), rows)
    with pytest.raises(ZOError, match=rf"saw 1000 rows, and batch\(0\) has {len(hidden.batch(0))}"):
        optimizer.step(distances(theta), rows)
    assert torch.equal(theta.detach(), torch.zeros(3)) and hidden.spent == {} and hidden.epsilon(1e-5) == 0
    assert 28.3 < epsilon_of(1.0, {1: 20}, 1e-5, examples=1000, batch_size=1000) < 28.5


WRONG_ROWS: dict[str, Callable[[GaussianPrivacy, int], list[int]]] = {
    "fixed size": lambda hidden, step: [(20 * step + i) % 100 for i in range(20)],
    "one row more": lambda hidden, step: [*hidden.batch(step), 0],
    "rows repeated": lambda hidden, step: 2 * hidden.batch(step),
    "a micro-batch": lambda hidden, step: hidden.batch(step)[::2],
    "always the first sample": lambda hidden, step: hidden.batch(0),
    "those of the next step": lambda hidden, step: hidden.batch(step + 1),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_other_rows_than_the_sample(wrong: str) -> None:
    """What cannot be told by its size at once is told within a few steps; nothing of that step is released."""
    theta, hidden = torch.nn.Parameter(torch.zeros(3)), privacy()
    optimizer = MeZO([theta], lr=0.03, privacy=hidden)
    with pytest.raises(ZOError, match=r"privacy: step \d+ saw \d+ rows"):
        for step in range(20):
            before, spent = theta.detach().clone(), dict(hidden.spent)
            optimizer.step(distances(theta), ROWS[WRONG_ROWS[wrong](hidden, step)])
    assert torch.equal(theta.detach(), before) and hidden.spent == spent


def test_what_is_released_anew_is_accounted_for_anew() -> None:
    """A run that is taken back in its process and goes on otherwise has released both; the same once more tells nothing."""
    theta, hidden = torch.nn.Parameter(torch.zeros(3)), privacy()
    optimizer = MeZO([theta], lr=0.03, privacy=hidden)
    start, weights = optimizer.state_dict(), theta.detach().clone()
    grads = []
    for scale, spent in ((1.0, 3), (1.0, 3), (0.5, 6)):
        theta.data.copy_(weights)
        optimizer.load_state_dict(start)
        for step in range(3):
            rows = ROWS[hidden.batch(step)]
            optimizer.step(lambda rows=rows, scale=scale: scale * distances(theta)(rows))
        grads.append(optimizer.last_record.projected_grads)  # type: ignore[union-attr]
        assert hidden.spent == {1: spent}
    assert grads[0] == grads[1] != grads[2]


def test_copies_and_adaptive_schedules_are_refused() -> None:
    hidden = privacy()
    optimizer = MeZO([torch.nn.Parameter(torch.zeros(3))], lr=0.1, privacy=hidden)
    for thing in (hidden, optimizer):
        for copied in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(ZOError, match="accounted for once"):
                copied(thing)
    with pytest.raises(ZOError, match="cannot depend on what was measured"):
        MeZO([torch.nn.Parameter(torch.zeros(3))], lr=0.1, privacy=privacy(), query_schedule="variance")


# --- an attack ---


def clopper_pearson(hits: int, trials: int, confidence: float) -> tuple[float, float]:
    """Bounds on a probability, each at this confidence."""
    low = 0.0 if hits == 0 else float(beta.ppf(1 - confidence, hits, trials - hits + 1))
    return low, 1.0 if hits == trials else float(beta.ppf(confidence, hits + 1, trials - hits))


def attacked(delta: float, trials: int, **options: Any) -> tuple[float, float]:
    """A lower bound on epsilon, from telling runs with one row from runs without it, and the epsilon that is claimed.

    The other rows have no slope, the target's is clipped: the worst case that the account is about. Who attacks knows directions,
    sampling rate and all releases, and takes the likelihood ratio. Half of the runs choose its threshold, the other half count;
    each of both error rates is bounded at 99 %, so that the bound holds in 98 % of tests.
    """
    scores: dict[bool, list[float]] = {}
    claimed = 0.0
    for member in (False, True):
        scores[member] = []
        for trial in range(trials):
            hidden = GaussianPrivacy(clip=1.0, key=f"{member} {trial} and sixteen".encode(), **options)
            theta = torch.nn.Parameter(torch.zeros(1))
            optimizer = MeZO(
                [theta],
                lr=0.0,
                directions="rademacher",
                privacy=hidden,
                query_schedule={"name": "constant", "queries": 2},
                seed=1,
            )
            rate, sigma, score = hidden.batch_size / hidden.examples, hidden.noise_multiplier, 0.0
            for step in range(3):
                slopes = torch.tensor([float(member and row == 0) for row in hidden.batch(step)])
                optimizer.step(lambda slopes=slopes, theta=theta: 100 * slopes * theta.detach())
                signs = [float(optimizer.directions_of(step).range(q, 0, 1)) for q in range(2)]
                sums = np.array(optimizer.last_update.coefficients) * 2 * hidden.batch_size  # type: ignore[union-attr]
                along = float(sums @ np.array(signs)) / sigma**2 - 2 / (2 * sigma**2)
                score += math.log(1 - rate + rate * math.exp(min(along, 500))) if rate < 1 else along
            scores[member].append(score)
        claimed = hidden.epsilon(delta)

    def bound(first: list[float], second: list[float], threshold: float) -> float:
        """Epsilon at least, if FPR and TPR of score > threshold are what was counted."""
        high = clopper_pearson(sum(s > threshold for s in first), len(first), 0.99)[1]
        low = clopper_pearson(sum(s > threshold for s in second), len(second), 0.99)[0]
        return math.log((low - delta) / high) if low > delta else 0.0

    half = trials // 2
    without, with_it = scores[False], scores[True]
    best = max(sorted(without[:half] + with_it[:half]), key=lambda t: bound(without[:half], with_it[:half], t))
    return max(0.0, bound(without[half:], with_it[half:], best)), claimed


@pytest.mark.parametrize(("batch_size", "noise"), [(4, 2.5), (2, 1.2)], ids=["all rows", "every other"])
def test_an_attack_stays_below_epsilon(batch_size: int, noise: float) -> None:
    found, claimed = attacked(1e-2, 400, noise_multiplier=noise, examples=4, batch_size=batch_size)
    assert 0.1 < found <= claimed < 5


@pytest.mark.parametrize("fault", ["a quarter of the noise", "rows clipped at five times the clip"])
def test_the_attack_finds_noise_that_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release, clipped = GaussianPrivacy.release, GaussianPrivacy.clipped_sum

    def quieter(self: GaussianPrivacy, derivatives: torch.Tensor, step: int, query: int) -> float:
        total = self.clipped_sum(derivatives) / GRID / self.batch_size
        return total + (release(self, derivatives, step, query) - total) / 4

    if fault.startswith("rows"):
        monkeypatch.setattr(GaussianPrivacy, "clipped_sum", lambda self, d: 5 * clipped(self, d))
    else:
        monkeypatch.setattr(GaussianPrivacy, "release", quieter)
    found, claimed = attacked(1e-2, 240, noise_multiplier=3.0, examples=4, batch_size=4)
    assert found > claimed
