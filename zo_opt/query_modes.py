"""How the losses of one step's directions are evaluated: a choice of cost, never a different algorithm.

An :class:`Evaluator` gives the loss at ``theta + scale * z_q`` for every query q and scale. Nothing here knows of estimators or
update rules. Whatever happens inside, the trainables come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.copies import Copies
from zo_opt.directions import Stream
from zo_opt.errors import ZOError
from zo_opt.nesting import batch_size, map_tensors, tokens
from zo_opt.perturbation import Perturbed, Point

QUERY_MODES = ("sequential", "batched", "split", "auto")
BATCHED_TOKENS = 512  # tokens in one forward beyond which copies gain nothing on a CPU (measured)


@dataclass(frozen=True)
class Losses:
    """Losses of one evaluation.

    Attributes:
        values: float64, shape (queries, scales).
        weights: float64, shape (queries,): the share of the batch that each direction saw, times queries; ones unless split.
        forwards: forward passes spent, one for each evaluation of the loss on one whole batch.
        base: float64, shape (queries,): the loss at the weights on what each query saw; None unless asked for.
        seeds: what names each query's direction.
    """

    values: Tensor
    weights: Tensor
    forwards: int
    base: Tensor | None = None
    seeds: tuple[Stream, ...] = ()


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one closure on one batch, at points along one step's directions.

    Args:
        perturbed: trainables and directions.
        closure: returns the loss; called with ``batch`` if there is one.
        batch: any nesting of tensors, example axis first; the modes beyond sequential need it.
        mode: sequential, batched, split or auto.
        module: owner of the trainables; the modes beyond sequential need it.
    """

    perturbed: Perturbed
    closure: Callable[..., Any]
    batch: Any = None
    mode: str = "sequential"
    module: nn.Module | None = None

    def __call__(
        self, queries: int, scales: Sequence[float], *, base: bool = False, anchor: Tensor | None = None
    ) -> Losses:
        """The losses at ``theta + scale * z_q``, and those at ``theta`` if ``base``; ``anchor`` takes theta's place.

        Raises:
            ZOError: the mode does not fit what was given.
        """
        mode = self.mode if self.mode != "auto" else choose(self.batch, self.module, self.perturbed.trainables.total)
        if mode == "split":
            values, weights, forwards = self._split(queries, (*scales, 0.0) if base else scales, anchor)
            base_values = values[:, -1] if base else None
            values = values[:, : len(scales)]
        else:
            points = [Point(((q, s),), anchor=anchor) for q in range(queries) for s in scales]
            points = [Point(anchor=anchor)] * base + points
            found = self._batched(points) if mode == "batched" else self.at(points)
            base_values = found[0].expand(queries) if base else None
            values = found[int(base) :].view(queries, len(scales))
            weights, forwards = torch.ones(queries, dtype=torch.float64), len(points)
        seeds = tuple(self.perturbed.directions.stream(q) for q in range(queries))
        return Losses(values, weights, forwards, base_values, seeds)

    def at(self, points: Sequence[Point]) -> Tensor:
        """Losses on the whole batch, one forward after another: works on every module and closure. float64, (points,)."""
        closure, batch = self.closure, self.batch
        call = closure if batch is None else lambda: closure(batch)
        return torch.tensor(list(self.perturbed.losses(call, points)), dtype=torch.float64)

    def _copies(self) -> Copies:
        if self.batch is None:
            raise ZOError(f'query_mode="{self.mode}" needs the batch: call step(lambda b: model(**b).loss, batch).')
        assert self.module is not None
        return Copies(self.module, self.perturbed, self.closure)

    def _batched(self, points: Sequence[Point]) -> Tensor:
        """All perturbed copies see the whole batch, several in one forward (``vmap``)."""
        run = self._copies()
        chunk = max(1, BATCHED_TOKENS // max(1, tokens(self.batch)))
        values = [run(points[i : i + chunk], self.batch, split=False) for i in range(0, len(points), chunk)]
        return torch.cat(values)

    def _split(self, queries: int, scales: Sequence[float], anchor: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """The queries partition the batch: direction q sees the q-th slice alone; one forward for each scale in all.

        Slices are contiguous and differ in size by at most one example.
        """
        run = self._copies()
        examples = batch_size(self.batch)
        if queries > examples:
            raise ZOError(
                f"{queries} queries cannot split a batch of {examples} examples; lower max_queries or raise the batch."
            )
        values = torch.empty(queries, len(scales), dtype=torch.float64)
        weights = torch.empty(queries, dtype=torch.float64)
        # The first `larger` slices have one example more; vmap wants equal slices, so each size is a call of its own.
        size, larger = divmod(examples, queries)
        for first, last, rows, offset in ((0, larger, size + 1, 0), (larger, queries, size, larger * (size + 1))):
            if first == last:
                continue
            weights[first:last] = rows * queries / examples
            count = last - first

            def cut(x: Tensor, offset: int = offset, count: int = count, rows: int = rows) -> Tensor:
                pieces: Tensor = x[offset : offset + count * rows].unflatten(0, (count, rows))
                return pieces

            slices = map_tensors(cut, self.batch)
            for s, scale in enumerate(scales):
                points = [Point(((q, scale),), anchor=anchor) for q in range(first, last)]
                values[first:last, s] = run(points, slices, split=True)
        return values, weights, len(scales)


def choose(batch: Any, module: nn.Module | None, trainables: int) -> str:
    """What ``"auto"`` means here: batched where many small forwards would be launched, sequential elsewhere."""
    if module is None or batch is None or trainables > 1 << 20:
        return "sequential"
    return "batched" if 2 * tokens(batch) <= BATCHED_TOKENS else "sequential"
