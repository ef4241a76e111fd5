"""What a server and its clients agree on: a pool of seeds, and how a derivative along one of them moves the weights.

Source: FedKSeed, Qin et al., arXiv 2312.06353. With K seeds s_j of directions z_j, all that training ever does to the weights is

    w = w0 - unit * sum_j A_j z_j,

where A_j is the sum of what was sent for seed j. [choice] Directions are signs (Rademacher), what is sent are whole numbers, and ``unit`` is a
power of two: the sum is exact in whatever order answers come, on every device, and w is rounded once. So weights are a function of the
K numbers A and of nothing else, and the sums can be formed under the masks of secure aggregation.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from zo_opt.directions.philox import mix
from zo_opt.errors import ZOError
from zo_opt.system.checksum import checksum

MOST_SEEDS = 1 << 20  # of a pool
MOST_TOTAL = 1 << 53  # of sum_j |A_j|: up to there sums of whole numbers are exact in float64
STEPS = 20  # bits of a derivative that is as large as ``clip``
TAIL = 6.0  # noise beyond so many standard deviations is cut, on the client's side: 2e-9 of all
_ID_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The pool, and the rules of a round.

    Args:
        size: K, seeds in the pool.
        seed: of the pool: direction j is that of step j of a run with this seed.
        seeds: directions that a client evaluates in a round, one after the other, each followed by its own local step.
        rounds: of the whole training.
        lr: learning rate of a local step, in parameter units per unit of gradient.
        lr_schedule: over the rounds: linear (to zero), cosine (to zero) or constant.
        zo_eps: perturbation scale, in parameter units.
        clip: bound on a derivative along a direction; with noise, on the norm of a client's derivatives of a round.
        noise: standard deviation of what a client adds to each derivative, in units of ``clip``; 0: nothing.
        choice: how seeds are drawn: uniform, or magnitude (:meth:`odds`).
        most_rows: rows from which on a client counts fully (:meth:`weight`); None: every client does.
        start: fingerprint of the weights to be tuned, as training begins.
        base: fingerprint of the frozen model's.

    Raises:
        ZOError: on impossible values.

    >>> pool = Pool(size=64, lr=0.5, clip=2.0, rounds=10, seeds=4)
    >>> pool.unit == 2.0**-20, pool.limit(0), pool.limit(5), pool.bound(0)
    (True, 1048576, 524288, 4.0)
    """

    size: int = 1024
    seed: int = 0
    seeds: int = 4
    rounds: int = 100
    lr: float = 1e-3
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    zo_eps: float = 1e-2
    clip: float = 5.0
    noise: float = 0.0
    choice: Literal["uniform", "magnitude"] = "uniform"
    most_rows: int | None = None
    start: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        counts = {"size": MOST_SEEDS, "seeds": 1 << 16, "rounds": 1 << 31}
        for name, most in (counts if self.most_rows is None else counts | {"most_rows": 1 << 31}).items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ZOError(f"{name}={value!r} is not possible; give a whole number from 1 to {most:,}.")
        for name in ("lr", "zo_eps", "clip"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ZOError(f"{name}={value!r} is not possible; give a positive number.")
        if type(self.noise) not in (int, float) or not 0 <= self.noise < 1e6:
            raise ZOError(f"noise={self.noise!r} is not possible; give a number from 0 on, in units of clip.")
        if self.noise and self.most_rows is not None:
            raise ZOError(
                "most_rows lets a client's answers tell how many rows it has, which privacy hides; leave out one of the two."
            )
        for name, known in (("lr_schedule", ("linear", "cosine", "constant")), ("choice", ("uniform", "magnitude"))):
            if getattr(self, name) not in known:
                raise ZOError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(known)}.")

    @cached_property
    def id(self) -> bytes:
        """What names this pool in messages, 8 bytes: whoever has another one has another id."""
        return bytes.fromhex(checksum([json.dumps(asdict(self), sort_keys=True).encode()], _ID_DIGITS))

    @cached_property
    def unit(self) -> float:
        """How far a 1 moves the weights, along each entry of a direction: a power of two."""
        return float(2.0 ** (math.floor(math.log2(self.lr * self.clip)) - STEPS))

    def lr_of(self, number: int) -> float:
        """The learning rate of a round, counted from 0."""
        share = min(number / self.rounds, 1.0)
        factor = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[self.lr_schedule]
        return self.lr * factor

    def weight(self, rows: int) -> float:
        """How much a client of so many rows counts, from 0 to 1: in proportion to them, as in FedAvg (arXiv 1602.05629), fully from most_rows on.

        The client applies it to what it sends. So nobody is told a number of rows, and whoever claims many counts no more than fully.

        >>> pool = Pool(most_rows=300)
        >>> pool.weight(3), pool.weight(300), pool.weight(10**9), Pool().weight(3)
        (0.01, 1.0, 1.0, 1.0)
        """
        return 1.0 if self.most_rows is None else min(rows, self.most_rows) / self.most_rows

    def limit(self, number: int) -> int:
        """The largest whole number, up or down, that an answer of a round can have for one seed, of a client that counts fully."""
        return math.ceil(self.lr_of(number) * self.clip * (1 + TAIL * self.noise) / self.unit)

    def bound(self, number: int) -> float:
        """How far one client's answer of a round can move any single weight, whatever the client does, in parameter units."""
        return self.seeds * self.limit(number) * self.unit

    def odds(self, magnitudes: np.ndarray[Any, Any], uses: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Each seed's probability to be drawn, (K,) float64; None: all alike.

        With ``choice="magnitude"`` (FedKSeed-Pro, section 4.3): the softmax of the seeds' mean absolute numbers, [choice] scaled to lie
        between 0 and 1, so that no seed is e times likelier than another; a seed not used yet counts as the mean of the others.

        Args:
            magnitudes: sum of the absolute numbers that were sent for each seed, (K,) int64.
            uses: how often each was sent, (K,) int64.
        """
        used = uses > 0
        if self.choice == "uniform" or not used.any():
            return None
        mean = np.zeros(self.size)
        mean[used] = magnitudes[used] / uses[used]
        mean[~used] = mean[used].mean()
        spread = mean.max() - mean.min()
        scaled = np.exp((mean - mean.min()) / spread) if spread > 0 else np.ones(self.size)
        found: np.ndarray[Any, Any] = scaled / scaled.sum()
        return found

    def draw(self, number: int, clients: int, odds: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        """The seeds of a round's clients, (clients, seeds) uint32; no seed twice in a round where the pool is large enough.

        A function of the pool, the round, the number of clients and the odds: a round that is done again has the same seeds.
        """
        generator = np.random.default_rng(mix(self.seed, number, clients))
        wanted = clients * self.seeds
        drawn = generator.choice(self.size, size=wanted, replace=wanted > self.size, p=odds)
        return drawn.astype(np.uint32).reshape(clients, self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which the constructor takes back."""
        return asdict(self)
