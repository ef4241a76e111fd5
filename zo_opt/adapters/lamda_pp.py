"""LaMDA++: LaMDA whose ranks follow the spectra of the pretrained weights (arXiv 2406.12832)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from zo_opt.adapters.lamda import LaMDAConfig
from zo_opt.adapters.options import option
from zo_opt.adapters.spectrum import energy
from zo_opt.adapters.targets import Target
from zo_opt.adapters.weights import matrix
from zo_opt.errors import ZOError


@dataclass(frozen=True)
class LaMDAPlusPlusConfig(LaMDAConfig):
    """LaMDA with a rank for each matrix from a small set, by E(r) = sum_{i<=r} sigma_i^2 / sum_i sigma_i^2 at the smallest of them.

    Use it as LaMDA, where matrices have spectra of different kinds.

    ``order="easy-first"``: more rank to matrices with a high E, which a low rank hurts less, as the publication's summary has it;
    ``"hard-first"``: to those with a low E. ``rank`` is the budget: the ranks' mean is at most this. How ranks are spread is ours, see
    :func:`allocate_ranks`. The result is written into ``rank_pattern`` (the saved configuration has it); one that is given
    is used as it is. On the meta device, where there are no spectra, every matrix has ``rank``.

    >>> import torch
    >>> from torch import nn
    >>> from zo_opt import get_adapter_model
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> _ = nn.init.ones_(net[0].weight), nn.init.eye_(net[1].weight)  # all energy in one direction; in all alike
    >>> model = get_adapter_model(net, LaMDAPlusPlusConfig(rank=3, ranks=(2, 4), target_modules=["0", "1"]))
    >>> model.adapter_config.rank_pattern
    {'0': 4, '1': 2}
    """

    ranks: Sequence[int] = option((16, 32, 48), "the ranks to choose from")
    order: Literal["easy-first", "hard-first"] = option(
        "easy-first", "which matrices get more: easy-first or hard-first"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks:
            raise ZOError("ranks=[] is not possible; give at least one to choose from.")
        if min(self.ranks) > self.rank:
            raise ZOError(
                f"rank={self.rank} is below the smallest of ranks={list(self.ranks)}; give a smaller one to choose."
            )

    def resolve(self, targets: Sequence[Target]) -> LaMDAPlusPlusConfig:
        weights = {target.name: matrix(target.module) for target in targets}
        if self.rank_pattern is not None or any(weight.is_meta for weight in weights.values()):
            return self
        sign = 1 if self.order == "easy-first" else -1
        scores = {name: sign * energy(weight, [min(self.ranks)])[0] for name, weight in weights.items()}
        return replace(self, rank_pattern=allocate_ranks(scores, self.ranks, self.rank))


def allocate_ranks(scores: Mapping[str, float], ranks: Sequence[int], mean: int) -> dict[str, int]:
    """A rank for each name, rising with its score, whose mean is at most ``mean``.

    [choice] Sorted by score, the names are cut into as many groups of equal size as there are ranks; then all borders are moved
    together, towards high or low scores, to where the most rank fits. Equal scores: the first name gets more.

    >>> scores = {"a": 0.9, "b": 0.5, "c": 0.1, "d": 0.7}
    >>> allocate_ranks(scores, (2, 4), mean=3), allocate_ranks(scores, (2, 4), mean=2)
    ({'a': 4, 'b': 2, 'c': 2, 'd': 4}, {'a': 2, 'b': 2, 'c': 2, 'd': 2})
    """
    choices = sorted(set(ranks))
    names, levels = sorted(scores, key=lambda name: -scores[name]), len(choices)
    count = len(names)

    def moved_by(shift: int) -> list[int]:
        """The ranks in order of scores; a shift of ``count`` is one group's size."""
        places = ((levels * (count - i) - 1 + shift) // count for i in range(count))
        return [choices[min(max(place, 0), levels - 1)] for place in places]

    shifts = range(-levels * count, levels * count + 1)  # from the smallest rank for all to the largest
    best = max((s for s in shifts if sum(moved_by(s)) <= mean * count), default=shifts[0])
    found = dict(zip(names, moved_by(best), strict=True))
    return {name: found[name] for name in scores}
