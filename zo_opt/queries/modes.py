"""How the losses of one step's directions are evaluated: a choice of cost, never a different algorithm.

An :class:`Evaluator` gives the loss at ``theta + scale * z_q`` for every query q and scale. Nothing here knows of estimators or
update rules. Whatever happens inside, the trainables come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from zo_opt.distributed import Distributed
from zo_opt.distributed.ranks import Ranks
from zo_opt.errors import ZOError
from zo_opt.queries.copies import Copies, Limits, out_of_memory
from zo_opt.queries.nesting import batch_size, map_tensors, shapes, tokens
from zo_opt.queries.perturbation import Perturbed, Point
from zo_opt.schedules import QueryMode

QUERY_MODES: tuple[str, ...] = get_args(QueryMode)
# Tokens in one forward beyond which copies gain nothing: measured on a CPU (benchmarks/query_modes.py); on a GPU launches are
# what copies save, and a guess until it is measured there.
BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Losses:
    """Losses of one evaluation.

    Attributes:
        values: float64, shape (queries, scales).
        weights: float64, shape (queries,): the share of the batch that each direction saw, times queries; ones unless split.
        forwards: forward passes spent, one for each evaluation of the loss on one whole batch.
        base: float64, shape (queries,): the loss at the weights on what each query saw; None unless asked for.
    """

    values: Tensor
    weights: Tensor
    forwards: int
    base: Tensor | None = None


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one closure on one batch, at points along one step's directions.

    Args:
        perturbed: trainables and directions.
        closure: returns the loss; called with ``batch`` if there is one.
        batch: any nesting of tensors, example axis first; the modes beyond sequential need it.
        mode: sequential, batched, split or auto.
        module: owner of the trainables; the modes beyond sequential need it.
        ranks: the processes that share the points, each in this mode.
        limits: what the optimizer's earlier evaluations ran into, and what this one adds to it.
        memory: what the optimizer's estimator keeps from step to step, by name.
    """

    perturbed: Perturbed
    closure: Callable[..., Any]
    batch: Any = None
    mode: str = "sequential"
    module: nn.Module | None = None
    ranks: Ranks | None = None
    limits: Limits = field(kw_only=True)
    memory: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    def __call__(
        self, queries: int, scales: Sequence[float], *, base: bool = False, anchor: Tensor | None = None
    ) -> Losses:
        """The losses at ``theta + scale * z_q``, and those at ``theta`` if ``base``; ``anchor`` takes theta's place.

        Raises:
            ZOError: the mode does not fit what was given.
        """
        mode = self._chosen if self.mode == "auto" else self.mode
        if mode == "split":
            values, weights, forwards = self._split(queries, (*scales, 0.0) if base else scales, anchor)
            base_values = values[:, -1] if base else None
            values = values[:, : len(scales)]
        else:
            points = [Point(((q, s),), anchor=anchor) for q in range(queries) for s in scales]
            points = [Point(anchor=anchor)] * base + points
            found = self._shared(points, self._batched) if mode == "batched" else self.at(points)
            base_values = found[0].expand(queries) if base else None
            values = found[int(base) :].view(queries, len(scales))
            weights, forwards = torch.ones(queries, dtype=torch.float64), len(points)
        return Losses(values, weights, forwards, base_values)

    @property
    def tokens(self) -> int:
        """Tokens of the batch, each of which a forward takes through the adapted part; 0 where no batch is given."""
        if self.ranks is not None and self.ranks.tokens is not None:
            return self.ranks.tokens  # known after the losses: each rank may have rows of its own
        return 0 if self.batch is None else tokens(self.batch)

    def at(self, points: Sequence[Point]) -> Tensor:
        """Losses on the whole batch, one forward after another: works on every module and closure. float64, (points,)."""
        return self._shared(points, self._sequential)

    def _shared(self, points: Sequence[Point], run: Callable[[Sequence[Point]], Tensor]) -> Tensor:
        """Losses at all points, of which this process evaluates its part."""
        return self.over_ranks(len(points), lambda first, last: run(points[first:last]))

    def over_ranks(self, count: int, run: Callable[[int, int], Tensor], *, width: int = 1) -> Tensor:
        """What ``run`` gives over 0 to ``count``, of which this process runs its part: float64, (count * width,).

        Args:
            count: how many there are.
            run: (first, last) -> numbers of these, ((last - first) * width,).
            width: numbers of each.
        """
        return run(0, count) if self.ranks is None else self.ranks.losses(count, self.batch, run, width=width)

    def _sequential(self, points: Sequence[Point]) -> Tensor:
        closure, batch = self.closure, self.batch
        call = closure if batch is None else lambda: closure(batch)
        return torch.tensor(list(self.perturbed.losses(call, points)), dtype=torch.float64)

    @property
    def _chosen(self) -> str:
        """What ``"auto"`` stands for here."""
        possible = self.module is not None and self.batch is not None and self.limits.mappable
        if possible and is_worth_batching(self._copies_at_once(tokens(self.batch)), self.perturbed.trainables.total):
            return "batched"
        return "sequential"

    def _copies_at_once(self, tokens: int) -> int:
        return copies_at_once(self.perturbed.trainables.parameters[0].device.type, tokens)

    def _copies(self) -> Copies:
        if self.batch is None:
            raise ZOError(f'query_mode="{self.mode}" needs the batch: call step(lambda b: model(**b).loss, batch).')
        assert self.module is not None
        return Copies(self.module, self.perturbed, self.closure, self.limits)

    def _batched(self, points: Sequence[Point]) -> Tensor:
        """All perturbed copies see the whole batch, several in one forward (``vmap``)."""
        run, batch = self._copies(), self.batch
        return self._in_chunks(
            len(points), batch, tokens(batch), lambda first, last: run(points[first:last], batch, split=False)
        )

    def _in_chunks(self, total: int, batch: Any, size: int, run: Callable[[int, int], Tensor]) -> Tensor:
        """``run`` over ranges as long as gains something, and half as long whenever memory runs out; ``size``: tokens that one copy sees."""
        key, chunks = (total, shapes(batch)), self.limits.chunks
        chunk = chunks.get(key, self._copies_at_once(size))
        values: list[Tensor] = []
        first = 0
        while first < total:
            last = min(total, first + chunk)
            try:
                values.append(run(first, last))
                first = last
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or last - first == 1:
                    raise
            # Outside of the handler, so that the failed forward's tensors are let go.
            chunks[key] = chunk = (last - first) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return torch.cat(values)

    def _split(self, queries: int, scales: Sequence[float], anchor: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """The queries partition the batch: direction q sees the q-th slice alone; one forward for each scale in all.

        Slices are contiguous and differ in size by at most one example.
        """
        copies = self._copies()
        examples = batch_size(self.batch)
        if queries > examples:
            raise ZOError(
                f"{queries} queries cannot split a batch of {examples} examples; lower max_queries or raise the batch."
            )
        # The first `larger` slices have one example more; vmap wants equal slices, so each size is a call of its own.
        size, larger = divmod(examples, queries)
        parts = ((0, larger, size + 1, 0), (larger, queries, size, larger * (size + 1)))
        weights = torch.cat(
            [torch.full((b - a,), rows * queries / examples, dtype=torch.float64) for a, b, rows, _ in parts]
        )

        def evaluate(lo: int, hi: int) -> Tensor:
            """Losses of queries lo to hi, all scales of one after another."""
            found = [
                self._slices(copies, max(a, lo), min(b, hi), rows, start + (max(a, lo) - a) * rows, scales, anchor)
                for a, b, rows, start in parts
                if max(a, lo) < min(b, hi)
            ]
            return torch.cat(found).view(-1)

        values = self.over_ranks(queries, evaluate, width=len(scales))
        return values.view(queries, len(scales)), weights, len(scales)

    def _slices(
        self, run: Copies, first: int, last: int, size: int, start: int, scales: Sequence[float], anchor: Tensor | None
    ) -> Tensor:
        """Losses of queries first to last on slices of equal size, the first at row ``start``: (queries, scales)."""
        count = last - first
        slices = map_tensors(lambda x: x[start : start + count * size].unflatten(0, (count, size)), self.batch)

        def part(lo: int, hi: int) -> Tensor:
            # All scales on the same rows in turn: their prefix is shared.
            rows = map_tensors(lambda x: x[lo:hi], slices)
            points = [[Point(((first + q, scale),), anchor=anchor) for q in range(lo, hi)] for scale in scales]
            return torch.stack([run(p, rows, split=True) for p in points], dim=1)

        return self._in_chunks(count, slices, tokens(slices) // count, part)


def resolve(query_mode: str, distributed: Distributed | None, module: nn.Module | None) -> tuple[str, Ranks | None]:
    """An optimizer's query mode as the mode in which this process evaluates, and the processes that it shares the work with.

    Raises:
        ZOError: what the mode needs is not there.
    """
    mode, ranks = query_mode, None
    if query_mode == "distributed":
        distributed = distributed if distributed is not None else Distributed()
        mode, ranks = distributed.within, Ranks(distributed)
    elif distributed is not None:
        raise ZOError(f'distributed was given with query_mode={query_mode!r}; give query_mode="distributed" with it.')
    if mode in ("batched", "split") and module is None:
        raise ZOError(f"query_mode={mode!r} replaces the module's trainables; pass module=model to the optimizer.")
    return mode, ranks


def copies_at_once(device: str, tokens: int) -> int:
    """How many copies of a batch of so many tokens gain something from sharing a forward on this kind of device."""
    return max(1, BATCHED_TOKENS.get(device, BATCHED_TOKENS["cuda"]) // max(1, tokens))


def is_worth_batching(copies: int, trainables: int) -> bool:
    """What ``"auto"`` means: batched where many small forwards would be launched, sequential elsewhere.

    A rule on sizes, not a stopwatch: the same seed must give the same bits. Two copies that just fill a forward gain nothing; four do
    (benchmarks/query_modes.py, grid).
    """
    return copies >= 4 and trainables <= 1 << 20
