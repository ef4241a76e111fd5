"""Schedules that follow the step alone: constant, ramps, steps; and as many queries as there are examples."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zo_opt.errors import ZOError
from zo_opt.schedules.adazeta import MAX_QUERIES
from zo_opt.schedules.base import History, RunLength, Schedule, check_whole


@dataclass(frozen=True)
class ConstantQueries(Schedule):
    """The same number of queries in every step.

    Use it first: it is the plainest.

    Raises:
        ZOError: fewer than one query.

    >>> ConstantQueries(4)(100, 3, History())
    4
    """

    queries: int = 1

    def __post_init__(self) -> None:
        check_whole(queries=self.queries)

    def __call__(self, step: int, epoch: int, history: History) -> int:
        return self.queries


@dataclass(frozen=True)
class EveryExample(Schedule):
    """As many queries as the batch has examples: for ``query_mode="split"``, which gives each an example of its own.

    Use it with split queries and GRZO.
    """

    needs_split: ClassVar[bool] = True

    def __call__(self, step: int, epoch: int, history: History) -> int:
        return 1 << 30


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: int = 1
    end: int = MAX_QUERIES
    steps: int | None = None

    def __post_init__(self) -> None:
        check_whole(start=self.start, end=self.end, **({} if self.steps is None else {"steps": self.steps}))

    def for_run(self, length: RunLength) -> _Ramp:
        return self if self.steps is not None else replace(self, steps=length.steps)

    @property
    def _last(self) -> int:
        """The last step of the ramp, at least 1 so that it can be divided by."""
        if self.steps is None:
            raise ZOError("the ramp of queries does not know the run's length; give steps.")
        return max(self.steps - 1, 1)


class LinearQueries(_Ramp):
    """From ``start`` queries in step 0 evenly to ``end`` in step ``steps - 1``, to the nearest whole number; then ``end``.

    Use it to grow (or shrink) the number of queries evenly.

    Args:
        start, end: queries, at least 1.
        steps: of the ramp; the run's if not given.

    Raises:
        ZOError: fewer than one query or step.

    >>> [LinearQueries(1, 4, steps=7)(step, 0, History()) for step in (0, 1, 2, 3, 4, 5, 6, 100)]
    [1, 2, 2, 3, 3, 4, 4, 4]
    """

    def __call__(self, step: int, epoch: int, history: History) -> int:
        start, end, last = self.start, self.end, self._last
        # floor(start + (end - start) * step / last + 1/2) in whole numbers, which never round the wrong way.
        return start + (2 * (end - start) * min(step, last) + last) // (2 * last)


class CosineQueries(_Ramp):
    """From ``start`` to ``end`` along half a cosine: slow at both ends, fast in the middle; then ``end``.

    Use it to grow late and quickly, with few queries for a longer while at the start.

    Q = start + (end - start) * (1 - cos(pi * step / (steps - 1))) / 2, to the nearest whole number. Arguments as in
    :class:`LinearQueries`.

    >>> [CosineQueries(1, 9, steps=9)(step, 0, History()) for step in range(9)]
    [1, 1, 2, 3, 5, 7, 8, 9, 9]
    """

    def __call__(self, step: int, epoch: int, history: History) -> int:
        progress = (1 - math.cos(math.pi * min(step, self._last) / self._last)) / 2
        return math.floor(self.start + (self.end - self.start) * progress + 0.5)


@dataclass(frozen=True)
class StepwiseQueries(Schedule):
    """So many queries from each milestone on.

    Use it where you know at which step more queries are needed.

    Args:
        milestones: step -> queries, the first step 0; or as text, ``step:queries`` with commas between. If not given: four
            even levels from ``start`` to ``end``, a quarter of the run each.
        start, end: queries of the first and the last level, without milestones.

    Raises:
        ZOError: step 0 is missing, a step is negative, or fewer than one query.

    >>> [StepwiseQueries({0: 1, 100: 4, 200: 16})(step, 0, History()) for step in (0, 99, 100, 250)]
    [1, 1, 4, 16]
    >>> StepwiseQueries().for_run(RunLength(steps=1000)).milestones
    {0: 1, 250: 5, 500: 10, 750: 15}
    """

    milestones: Mapping[int, int] | str | None = None
    start: int = field(default=1, kw_only=True)
    end: int = field(default=MAX_QUERIES, kw_only=True)

    def __post_init__(self) -> None:
        check_whole(start=self.start, end=self.end)
        if self.milestones is None:
            return
        given = parse_milestones(self.milestones) if isinstance(self.milestones, str) else self.milestones
        if not isinstance(given, Mapping):
            raise ZOError(
                f"milestones={given!r} is not possible; give a mapping of steps to queries, such as {{0: 1, 100: 4}}."
            )
        milestones = {int(step): given[step] for step in sorted(given, key=int)}  # JSON has its keys as text
        if not milestones or next(iter(milestones)) != 0:
            raise ZOError(f"milestones={milestones} do not begin at step 0; say how many queries the run starts with.")
        for step, queries in milestones.items():
            check_whole(**{f"milestones[{step}]": queries})
        object.__setattr__(self, "milestones", milestones)

    def for_run(self, length: RunLength) -> StepwiseQueries:
        if self.milestones is not None:
            return self
        steps = {quarter: length.steps * quarter // 4 for quarter in range(4)}  # fewer in a run of fewer steps
        levels = {steps[q]: self.start + (self.end - self.start) * q // 3 for q in range(4)}
        return replace(self, milestones=levels)

    def __call__(self, step: int, epoch: int, history: History) -> int:
        if not isinstance(self.milestones, Mapping):
            raise ZOError("the milestones follow from the run's length, which is not known here; give milestones.")
        levels = list(self.milestones.values())
        return levels[bisect_right(list(self.milestones), step) - 1]


def parse_milestones(text: str) -> dict[int, int]:
    """``step:queries`` pairs, comma separated.

    Raises:
        ZOError: not of that form, or a step twice.

    >>> parse_milestones("0:1, 250:4")
    {0: 1, 250: 4}
    """
    pairs = [pair.split(":") for pair in text.split(",")]
    try:
        milestones = {int(step): int(queries) for step, queries in pairs}
    except ValueError:
        raise ZOError(f"milestones={text!r} is not of the form step:queries,step:queries, such as 0:1,250:4.") from None
    if len(milestones) < len(pairs):
        raise ZOError(f"milestones={text!r} names a step twice; give each step once.")
    return milestones
