"""Differential privacy of the training rows: each row's derivative along a direction is clipped, and noise is added to their sum.

Source: DPZero, arXiv 2310.09639 (algorithm 2, per-example clipping of the scalar and scalar noise); DP-ZO, arXiv 2401.04343. The
directions are public and drawn without looking at rows, so the noisy scalars are all that the weights know of the rows, and all
that has to be accounted for. Epsilon comes from the package ``dp-accounting``. What is promised, and what is not, is in docs/how-to/privacy.md.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import shake_256
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_opt.errors import ZOError

GRID = (
    1 << 12
)  # steps in which a clipped derivative is counted: sums are whole numbers, so that no rounding depends on a row
INTERVAL = 1e-3  # of the accountant's privacy losses, rounded up: epsilon is an upper bound, some 1 % above the limit
_TAILS = 2.0**-53


@dataclass
class GaussianPrivacy:
    """How one run's rows are sampled, clipped and hidden, and what that has cost so far.

    A step sees each of ``examples`` rows with probability ``batch_size / examples``, independently (Poisson sampling: :meth:`batch`),
    and releases for each of its Q directions z the scalar (sum_i clip(d_i, +-clip) + clip * noise_multiplier * N(0, 1)) / batch_size, d_i row
    i's two-sided difference along z. One row more or less changes Q of these sums by at most ``clip`` each, so a step is a
    Poisson-sampled Gaussian mechanism of noise multiplier noise_multiplier / sqrt(Q).

    Noise and samples come from ``key``, by SHAKE-256: whoever knows it can remove the noise. The key is drawn from the system's
    entropy, not from a run's seed, and is part of ``state_dict``: keep checkpoints to yourself. A step that is done again after a
    restart uses the same noise if its sum is the same, and other noise if it is not.

    Args:
        clip: bound on one row's derivative along a direction, in units of loss per unit of the parameters.
        noise_multiplier: standard deviation of the noise on a sum, in units of ``clip``.
        examples: rows in all; taken as public.
        batch_size: expected rows a step; at most all rows.
        key: 32 bytes that nobody else knows; drawn if not given.

    Raises:
        ZOError: on impossible arguments.

    >>> privacy = GaussianPrivacy(clip=1.0, noise_multiplier=2.0, examples=100, batch_size=20)
    >>> theta = torch.nn.Parameter(torch.zeros(2))
    >>> rows = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) + 1
    >>> from zo_opt import MeZO
    >>> optimizer = MeZO([theta], lr=0.1, privacy=privacy)
    >>> for step in range(20):
    ...     batch = rows[privacy.batch(step)]
    ...     _ = optimizer.step(lambda: (batch - theta).square().sum(dim=1))  # a loss for each row
    >>> privacy.spent
    {1: 20}
    """

    clip: float
    noise_multiplier: float
    examples: int
    batch_size: int
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    spent: dict[int, int] = field(default_factory=dict, init=False)  # queries of a step -> steps that had so many
    _steps: int = field(default=0, init=False, repr=False)
    _asked: set[int] = field(default_factory=set, init=False, repr=False)  # steps whose sample was asked for
    _released: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)  # step -> its sums
    _attached: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ZOError(f"privacy: {name}={value!r} is not possible; give a positive number.")
        check_sampling(self.examples, self.batch_size)
        if not isinstance(self.key, bytes) or len(self.key) < 16:
            raise ZOError("privacy: the key must be at least 16 secret bytes; leave it out to have one drawn.")

    def __getstate__(self) -> None:
        raise ZOError(
            "a GaussianPrivacy was copied, and what both copies release would be accounted for once; make one for each run, or go on with "
            "its state_dict()."
        )

    def attach(self) -> None:
        """Take into use by an optimizer.

        Raises:
            ZOError: another one uses it; their steps would have the same numbers and be accounted for once.
        """
        if self._attached:
            raise ZOError(
                "this GaussianPrivacy belongs to another optimizer; make one for each run, and add their epsilons."
            )
        self._attached = True

    def batch(self, step: int) -> list[int]:
        """The rows of a step, by number, ascending; there may be none. The same in every call."""
        self._asked.add(step)
        drawn = self._uniforms(f"rows {step}", self.examples)
        return [int(i) for i in np.flatnonzero(drawn < self.batch_size / self.examples)]

    def check_rows(self, step: int, rows: int) -> None:
        """Whether a step may be taken on so many rows: those of :meth:`batch`, which alone are accounted for.

        Raises:
            ZOError: the step's sample was not asked for, or is of another size.
        """
        if step not in self._asked:
            raise ZOError(
                f"privacy: step {step} saw {rows} rows without batch({step}) being asked for; take the rows of each step from privacy.batch(step), "
                "for only they are accounted for."
            )
        if rows != (expected := len(self.batch(step))):
            raise ZOError(
                f"privacy: step {step} saw {rows} rows, and batch({step}) has {expected}; give the closure exactly those rows, one loss "
                "each: anything else is not accounted for."
            )

    def release_all(self, derivatives: Sequence[Tensor], step: int) -> list[float]:
        """The noisy means of the rows' derivatives along each of a step's directions, entered into the account before they are given.

        Args:
            derivatives: one for each direction, any float dtype, shape (rows,).
            step: number of the step.

        Raises:
            ZOError: they are not of the rows of :meth:`batch`.
        """
        for rows in {len(values) for values in derivatives}:
            self.check_rows(step, rows)
        sums = [self.clipped_sum(values) for values in derivatives]
        again = self._released.get(step)
        if step < self._steps and again != sums:  # other sums than before: it tells something new
            self.spent[len(sums)] = self.spent.get(len(sums), 0) + 1
        self.charge(step, len(sums))
        self._released[step] = sums
        return [self.release(values, step, query) for query, values in enumerate(derivatives)]

    def release(self, derivatives: Tensor, step: int, query: int) -> float:
        """The noisy mean of the rows' derivatives along one direction; the only thing that leaves a step.

        Args:
            derivatives: any float dtype, shape (rows,). A value that is not a number counts as 0, an infinite one as ``clip``.
            step: number of the step.
            query: number of the direction.
        """
        total = self.clipped_sum(derivatives)
        # The sum is part of the name: noise is used again only where that tells nobody anything new.
        uniform = float(self._uniforms(f"noise {step} {query} {total}", 1)[0]) + _TAILS / 2
        noise = round(self.noise_multiplier * GRID * NormalDist().inv_cdf(min(uniform, 1 - _TAILS)))
        return (total + noise) / GRID * self.clip / self.batch_size

    def clipped_sum(self, derivatives: Tensor) -> int:
        """The sum of the clipped derivatives in units of clip / GRID: at most GRID more or less with one row more or less."""
        ratios = derivatives.detach().to("cpu", torch.float64) / self.clip
        ratios = ratios.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1)
        return int((ratios * GRID).round().to(torch.int64).sum())

    def charge(self, step: int, queries: int) -> None:
        """Enter a step into the account; one that is there already is the same step done again (:meth:`release_all` sees to others)."""
        if step >= self._steps:
            self.spent[queries] = self.spent.get(queries, 0) + 1
            self._steps = step + 1

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon of all that was released so far, at this delta; rows added or removed.

        Raises:
            ZOError: delta is not between 0 and 1, or ``dp-accounting`` is not installed.

        >>> privacy = GaussianPrivacy(clip=1.0, noise_multiplier=4.0, examples=100, batch_size=1)  # arXiv 1607.00133: 1.26
        >>> privacy.spent[1] = 10_000
        >>> round(privacy.epsilon(1e-5), 2)
        0.96
        """
        return epsilon_of(self.noise_multiplier, self.spent, delta, examples=self.examples, batch_size=self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The account and the key, as plain values. Secret."""
        return {
            "key": self.key.hex(),
            "setting": self._setting(),
            "steps": self._steps,
            "spent": {str(q): n for q, n in self.spent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ZOError: it is the account of other noise or other rows, which would price these steps wrongly.
        """
        if state.get("setting") != self._setting():
            raise ZOError(
                f"privacy: the state is of clip, noise multiplier, rows and batch size {state.get('setting')}, not {self._setting()}; "
                "go on with those and with the same rows."
            )
        key, steps = bytes.fromhex(state["key"]), int(state["steps"])
        if key == self.key and steps <= self._steps:
            return  # an earlier state of this run: what was released since then stays released, and in the account
        self.key, self._steps = key, steps
        self.spent = {int(q): int(n) for q, n in state["spent"].items()}
        self._released = {}

    def _setting(self) -> list[float]:
        return [self.clip, self.noise_multiplier, self.examples, self.batch_size]

    def _uniforms(self, name: str, count: int) -> Any:
        """Numbers from 0 to 1, multiples of 2^-53, that follow from the key and the name."""
        content = shake_256(len(self.key).to_bytes(2, "big") + self.key + name.encode()).digest(8 * count)
        return (np.frombuffer(content, dtype="<u8") >> np.uint64(11)) * _TAILS


def epsilon_of(
    noise_multiplier: float, steps: Mapping[int, int], delta: float, *, examples: int, batch_size: int
) -> float:
    """Epsilon of steps of :class:`GaussianPrivacy`, from privacy loss distributions (``dp-accounting``): an upper bound.

    Args:
        noise_multiplier: as there.
        steps: number of queries -> how many steps have so many.
        delta: between 0 and 1; well below 1 / examples.
        examples: rows in all.
        batch_size: expected rows a step.

    >>> round(epsilon_of(1.0, {1: 100}, 1e-5, examples=1000, batch_size=10), 2)
    0.72
    """
    check_delta(delta)
    if not any(steps.values()):
        return 0.0
    accounting = _accounting()
    event = _event(accounting, noise_multiplier, steps, batch_size / examples)
    bounds = []
    for accountant in (_exact(accounting), _quick(accounting)):  # both are upper bounds
        accountant.compose(event)
        bounds.append(float(accountant.get_epsilon(delta)))
    return min(bounds)


def noise_for(epsilon: float, delta: float, steps: Mapping[int, int], *, examples: int, batch_size: int) -> float:
    """The least noise multiplier (to 2 %) with which these steps stay within epsilon; arguments as for :func:`epsilon_of`.

    Raises:
        ZOError: epsilon is not positive, or so small that no noise is found.

    >>> sigma = noise_for(2.0, 1e-5, {1: 100}, examples=1000, batch_size=10)
    >>> 0.65 < sigma < 0.8, epsilon_of(sigma, {1: 100}, 1e-5, examples=1000, batch_size=10) <= 2.0
    (True, True)
    """
    check_epsilon(epsilon)
    check_delta(delta)
    check_sampling(examples, batch_size)
    accounting = _accounting()

    def search(accountant: Callable[[], Any], bracket: Any, tolerance: float) -> float:
        def event(noise: float) -> Any:
            return _event(accounting, noise, steps, batch_size / examples)

        return float(accounting.calibrate_dp_mechanism(accountant, event, epsilon, delta, bracket, tol=tolerance))

    try:
        bound = search(lambda: _quick(accounting), accounting.LowerEndpointAndGuess(0.05, 2.0), 0.01)
    except Exception as error:  # its own kinds of error, which it does not export
        raise ZOError(
            f"privacy: no noise is found that keeps {sum(steps.values())} steps within epsilon={epsilon} at delta={delta} ({error}); "
            "give a larger epsilon, or fewer steps."
        ) from error
    try:
        return search(lambda: _exact(accounting), accounting.ExplicitBracketInterval(0.8 * bound, bound), 0.02 * bound)
    except ValueError:  # less than a fifth too much, or too fine for INTERVAL
        return bound


def check_sampling(examples: int, batch_size: int) -> None:
    """Whether so many rows can be sampled.

    Raises:
        ZOError: they cannot.
    """
    if type(examples) is not int or type(batch_size) is not int or not 1 <= batch_size <= examples:
        raise ZOError(
            f"privacy: batch_size={batch_size!r} of {examples!r} rows is not possible; give at least 1 and at most all rows."
        )


def check_delta(delta: float) -> None:
    """Whether delta is between 0 and 1.

    Raises:
        ZOError: it is not.
    """
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
        raise ZOError(f"privacy: delta={delta!r} is not possible; give a number well below 1 / rows, such as 1e-5.")


def check_epsilon(epsilon: float) -> None:
    """Whether epsilon is a positive number.

    Raises:
        ZOError: it is not.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
        raise ZOError(f"privacy: epsilon={epsilon!r} is not possible; give a positive number, such as 4.")


def _event(accounting: Any, noise_multiplier: float, steps: Mapping[int, int], rate: float) -> Any:
    """The steps in the words of ``dp-accounting``: the queries of a step share one sample, so they are one Gaussian mechanism."""

    def step(queries: int) -> Any:
        gaussian = accounting.GaussianDpEvent(noise_multiplier / math.sqrt(queries))
        return accounting.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian

    return accounting.ComposedDpEvent(
        [accounting.SelfComposedDpEvent(step(q), count) for q, count in sorted(steps.items()) if count]
    )


def _exact(accounting: Any) -> Any:
    return accounting.pld.PLDAccountant(
        accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=INTERVAL
    )


def _quick(accounting: Any) -> Any:
    """Renyi's bound: looser by some per cent, and many times faster."""
    return accounting.rdp.RdpAccountant([*range(2, 33), 40, 48, 64, 96, 128, 256])


def _accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ZOError("epsilon is computed by dp-accounting; install it with pip install 'zo-opt[privacy]'.") from error
    return dp_accounting
