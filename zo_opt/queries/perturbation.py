"""Losses at other points than the weights, and the weights bit for bit what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_opt.directions import StepDirections
from zo_opt.queries.losses import as_scalar
from zo_opt.queries.substitution import Substitution
from zo_opt.queries.trainables import CHUNK, Trainables

Transform = Callable[[Tensor, int, int, Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    """theta + sum_q scale_q z_q.

    Attributes:
        scales: (query, scale) pairs.
        factors: a factor for every parameter, on all scales (learning rates of groups); None: 1.
        anchor: other values of the whole axis to start from, in place of the weights, float32.
    """

    scales: tuple[tuple[int, float], ...] = ()
    factors: Tensor | None = None
    anchor: Tensor | None = None


@dataclass(frozen=True)
class Perturbed:
    """The trainables of one step with their directions.

    Small trainables are moved in place, with a copy to restore them from. Large ones are not touched at all: while the closure
    runs, torch functions are given perturbed values in their place (:class:`~zo_opt.queries.substitution.Substitution`), so that there
    is nothing to restore and no copy of the weights. Large trainables that no torch function asked for at the first
    evaluation (those of a scripted or compiled module) are moved in place, too.

    Args:
        trainables: the parameters.
        directions: the step's directions.
        transform: (z, start, stop, weights there) -> the direction to use in place of z, for methods whose directions depend
            on the weights or on the optimizer's state.
    """

    trainables: Trainables
    directions: StepDirections
    transform: Transform | None = None

    def direction(self, query: int, start: int, stop: int, origin: Tensor) -> Tensor:
        """A range of one query's direction, given the unperturbed weights there: float32; not to be changed in place."""
        z = self.directions.range(query, start, stop)
        return z if self.transform is None else self.transform(z, start, stop, origin)

    def values(self, point: Point, start: int, stop: int, origin: Tensor, out: Tensor | None = None) -> Tensor:
        """The trainables at a point, in their dtype, shape (stop - start,); ``origin``: the unperturbed weights there.

        Rounded once from float32 (float64 weights: from float64).
        """
        if out is None:
            out = torch.empty_like(origin)
        for lo in range(0, stop - start, CHUNK):
            hi = min(lo + CHUNK, stop - start)
            self._values(point, start + lo, start + hi, origin[lo:hi], out[lo:hi])
        return out

    def _values(self, point: Point, start: int, stop: int, origin: Tensor, out: Tensor) -> None:
        """``values`` for a range that fits in the cache."""
        base = origin if point.anchor is None else point.anchor[start:stop]
        if out.dtype == torch.float64:
            base = base.double()  # an anchor is float32; what is added to it must not be rounded to that
        wide = out.dtype in (torch.float32, torch.float64)
        total = out if wide else torch.empty(stop - start, device=out.device)
        factors = None if point.factors is None else self.trainables.spread(point.factors, start, stop)
        source = base if wide else base.float()
        for query, scale in point.scales:
            if scale == 0:
                continue
            z = self.direction(query, start, stop, origin)
            source = torch.add(source, z if factors is None else z * factors, alpha=scale, out=total)
        if source is not out:
            out.copy_(source)

    def stacked(self, points: Sequence[Point]) -> list[Tensor]:
        """Copies of every parameter at each point, shape (len(points), *parameter.shape)."""
        trainables = self.trainables
        if trainables.flat is not None:
            flat = trainables.flat
            return trainables.split(torch.stack([self.values(p, 0, trainables.total, flat) for p in points]))
        copies = []
        for i, (start, size) in enumerate(zip(trainables.starts, trainables.sizes, strict=True)):
            origin = trainables.memory(i)
            rows = torch.stack([self.values(p, start, start + size, origin) for p in points])
            copies.append(rows.view(len(points), *trainables.shapes[i]))
        return copies

    def losses(self, call: Callable[[], Any], points: Sequence[Point]) -> Iterator[float]:
        """The loss at one point after another."""
        if self.trainables.small:
            with self.restored() as originals:
                for point in points:
                    self._move(originals, point)
                    yield as_scalar(call())
            return
        for point in points:
            yield self._loss_by_substitution(call, point)

    def _loss_by_substitution(self, call: Callable[[], Any], point: Point) -> float:
        trainables = self.trainables
        if not point.scales and point.anchor is None:
            return as_scalar(call())

        def values(number: int, lo: int, hi: int) -> Tensor:
            start = trainables.starts[number]
            return self.values(point, start + lo, start + hi, trainables.memory(number)[lo:hi])

        def replacement(number: int) -> Tensor:
            return values(number, 0, trainables.sizes[number]).view(trainables.shapes[number])

        opaque = trainables.opaque or frozenset()
        index = {key: i for key, i in trainables.index.items() if i not in opaque}
        with self.restored(opaque) as originals:
            self._move(originals, point)
            with Substitution(index, replacement, values) as substitution:
                loss = as_scalar(call())
        if trainables.opaque is None:
            trainables.opaque = frozenset(index.values()) - substitution.seen
            if trainables.opaque:
                return self._loss_by_substitution(call, point)
        return loss

    @contextmanager
    def restored(self, numbers: frozenset[int] | None = None) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Keep copies of some (or all) parameters and put them back bit for bit, whatever happens inside.

        Yields:
            start on the axis -> (memory, copy).
        """
        trainables = self.trainables
        if numbers is None and trainables.flat is not None:
            memories = {0: trainables.flat}
        else:
            numbers = frozenset(range(len(trainables.parameters))) if numbers is None else numbers
            memories = {trainables.starts[i]: trainables.memory(i) for i in sorted(numbers)}
        originals = {start: (memory, memory.clone()) for start, memory in memories.items()}
        try:
            yield originals
        finally:
            interrupted: KeyboardInterrupt | None = None
            while True:  # Ctrl-C during the restore itself: finish it first
                try:
                    for memory, copy in originals.values():
                        memory.copy_(copy)
                    break
                except KeyboardInterrupt as interrupt:
                    interrupted = interrupt
            if interrupted is not None:
                raise interrupted

    def _move(self, originals: dict[int, tuple[Tensor, Tensor]], point: Point) -> None:
        for start, (memory, copy) in originals.items():
            self.values(point, start, start + len(memory), copy, out=memory)
