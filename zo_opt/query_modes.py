"""How the losses of one step's directions are evaluated: a choice of cost, never a different algorithm.

``losses(scales)`` of each mode returns the loss at ``theta + scale * z_q`` for every query q and scale. Nothing here knows
of estimators or update rules. Whatever happens inside, the trainables come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.copies import Copies, as_scalar
from zo_opt.errors import ZOError
from zo_opt.nesting import batch_size, map_tensors, tokens
from zo_opt.perturbation import Perturbed

QUERY_MODES = ("sequential", "batched", "split", "auto")
BATCHED_TOKENS = 512  # tokens in one forward beyond which copies gain nothing on a CPU (measured)


@dataclass(frozen=True)
class Losses:
    """Losses of one evaluation.

    Attributes:
        values: float64, shape (queries, scales).
        weights: float64, shape (queries,): the share of the batch that each direction saw, times queries; ones unless split.
        forwards: forward passes spent, one for each evaluation of the loss on one whole batch.
    """

    values: Tensor
    weights: Tensor
    forwards: int


def sequential(
    perturbed: Perturbed, closure: Callable[..., Any], batch: Any, queries: int, scales: Sequence[float]
) -> Losses:
    """One forward after another, perturbing in place: works on every module and every kind of forward."""
    values = torch.full((queries, len(scales)), torch.nan, dtype=torch.float64)
    perturbed.directions.keep(queries)
    with perturbed.restored() as originals:
        for q in range(queries):
            for s, scale in enumerate(scales):
                perturbed.move(originals, q, scale)
                values[q, s] = as_scalar(closure() if batch is None else closure(batch))
    return Losses(values, torch.ones(queries, dtype=torch.float64), queries * len(scales))


def batched(
    perturbed: Perturbed,
    closure: Callable[..., Any],
    batch: Any,
    queries: int,
    scales: Sequence[float],
    module: nn.Module,
) -> Losses:
    """All perturbed copies see the whole batch, several in one forward (``vmap``)."""
    runner = Copies(module, perturbed, closure)
    points = [(q, s) for q in range(queries) for s in scales]
    chunk = max(1, BATCHED_TOKENS // max(1, tokens(batch)))
    values = [runner(points[i : i + chunk], batch, split=False) for i in range(0, len(points), chunk)]
    weights = torch.ones(queries, dtype=torch.float64)
    return Losses(torch.cat(values).view(queries, len(scales)), weights, len(points))


def split(
    perturbed: Perturbed,
    closure: Callable[..., Any],
    batch: Any,
    queries: int,
    scales: Sequence[float],
    module: nn.Module,
) -> Losses:
    """The queries partition the batch: direction q sees the q-th slice alone; one forward for each scale in all.

    Slices are contiguous and differ in size by at most one example.
    """
    examples = batch_size(batch)
    if queries > examples:
        raise ZOError(
            f"{queries} queries cannot split a batch of {examples} examples; lower max_queries or raise the batch."
        )
    runner = Copies(module, perturbed, closure)
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

        slices = map_tensors(cut, batch)
        for s, scale in enumerate(scales):
            values[first:last, s] = runner([(q, scale) for q in range(first, last)], slices, split=True)
    return Losses(values, weights, len(scales))


def choose(batch: Any, module: nn.Module | None, parameters: Sequence[Tensor]) -> str:
    """What ``"auto"`` means here: batched where many small forwards would be launched, sequential elsewhere."""
    small = sum(p.numel() for p in parameters) <= 1 << 20
    if module is None or batch is None or not small:
        return "sequential"
    return "batched" if 2 * tokens(batch) <= BATCHED_TOKENS else "sequential"
