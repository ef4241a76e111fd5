"""Rows dealt among clients that are simulated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zo_opt.directions.philox import mix
from zo_opt.errors import ZOError


def deal(labels: Sequence[int], clients: int, seed: int, concentration: float | None = None) -> list[list[int]]:
    """The rows of each client, by number; each row is one client's, and no client is without any.

    Args:
        labels: each row's label.
        clients: how many.
        seed: of the deal.
        concentration: of the Dirichlet distribution from which each label's shares among the clients are drawn (label skew, Hsu et al.,
            arXiv 1909.06335): the smaller, the fewer labels a client has. None: evenly.

    Raises:
        ZOError: there are fewer rows than clients.

    >>> [len(rows) for rows in deal([0, 1] * 50, 4, seed=0)]
    [25, 25, 25, 25]
    >>> dealt = deal([0, 1] * 50, 4, seed=0, concentration=0.5)
    >>> sorted(row for rows in dealt for row in rows) == list(range(100)), min(map(len, dealt)) > 0
    (True, True)
    """
    if len(labels) < clients:
        raise ZOError(f"{len(labels)} rows cannot be dealt among {clients} clients; give more rows, or fewer clients.")
    generator = np.random.default_rng(mix(seed, clients))
    if concentration is None:
        order = generator.permutation(len(labels)).tolist()
        return [sorted(order[client::clients]) for client in range(clients)]
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        rows = generator.permutation([row for row, found in enumerate(labels) if found == label])
        shares = generator.dirichlet([concentration] * clients)
        bounds = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for mine, part in zip(dealt, np.split(rows, bounds), strict=True):
            mine.extend(part.tolist())
    for mine in dealt:  # who has none gets one of whoever has most
        if not mine:
            mine.append(max(dealt, key=len).pop())
    return [sorted(mine) for mine in dealt]
