"""The order of examples: a pure function of seed and step, so that a resumed run sees what an uninterrupted one sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch

from zo_opt.errors import ZOError

Order = Literal["balanced", "shuffled"]
ORDERS = get_args(Order)


class BatchOrder:
    """Which examples make up the batch of a step.

    "shuffled": each epoch is a fresh permutation. "balanced": classes take turns slot by slot, each running
    through fresh permutations of its own examples. [choice] In split mode a direction then sees as many examples of
    each class as possible, and the part of the gradient that all examples share (a shift towards one
    label) cancels instead of drowning the rest.

    Args:
        labels: each example's class.
        batch_size: examples in a batch.
        seed: of the permutations.
        order: "balanced" or "shuffled".
    """

    def __init__(self, labels: Sequence[int], batch_size: int, seed: int, order: str = "balanced") -> None:
        if order not in ORDERS:
            raise ZOError(f"batch_order={order!r} is not known; choose one of {', '.join(ORDERS)}.")
        if batch_size < 1:
            raise ZOError(f"batch_size={batch_size} is not possible; give a whole number of at least 1.")
        self.batch_size, self._seed = batch_size, seed
        self.steps_per_epoch = -(-len(labels) // batch_size)
        groups = sorted(set(labels)) if order == "balanced" else [None]
        self._groups = [[i for i, label in enumerate(labels) if g is None or label == g] for g in groups]

    def indices(self, step: int) -> list[int]:
        """The examples of one batch, by number."""
        chosen = []
        for slot in range(step * self.batch_size, (step + 1) * self.batch_size):
            turn, which = divmod(slot, len(self._groups))
            group = self._groups[which]
            epoch, place = divmod(turn, len(group))
            chosen.append(group[_permutation(len(group), self._seed, which, epoch)[place]])
        return chosen


@lru_cache(maxsize=64)
def _permutation(size: int, seed: int, group: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + group) * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()
