"""How the losses of one step's directions are evaluated: a choice of cost, never a different algorithm.

An :class:`Evaluator` gives the loss at ``theta + scale * z_q`` for every query q and scale. Nothing here knows of estimators or
update rules. Whatever happens inside, the trainables come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zo_opt.directions import Stream
from zo_opt.distributed import Distributed
from zo_opt.distributed.ranks import Ranks
from zo_opt.errors import ZOError
from zo_opt.queries.copies import Copies, out_of_memory, unmappable
from zo_opt.queries.nesting import batch_size, map_tensors, tokens
from zo_opt.queries.perturbation import Perturbed, Point
from zo_opt.system import memory

QUERY_MODES = ("sequential", "batched", "split", "distributed", "auto")
# Tokens in one forward beyond which copies gain nothing: measured on a CPU (benchmarks/query_modes.py); on a GPU launches are
# what copies save, and a guess until it is measured there.
BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}
MEMORY_SHARE = 0.8  # of a GPU's memory that weights and copies may take

_fitting: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # tokens that fitted, where more ran out of memory


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
        ranks: the processes that share the points, each in this mode.
    """

    perturbed: Perturbed
    closure: Callable[..., Any]
    batch: Any = None
    mode: str = "sequential"
    module: nn.Module | None = None
    ranks: Ranks | None = None

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
            found = self._shared(points, self._batched) if mode == "batched" else self.at(points)
            base_values = found[0].expand(queries) if base else None
            values = found[int(base) :].view(queries, len(scales))
            weights, forwards = torch.ones(queries, dtype=torch.float64), len(points)
        seeds = tuple(self.perturbed.directions.stream(q) for q in range(queries))
        return Losses(values, weights, forwards, base_values, seeds)

    def at(self, points: Sequence[Point]) -> Tensor:
        """Losses on the whole batch, one forward after another: works on every module and closure. float64, (points,)."""
        return self._shared(points, self._sequential)

    def _shared(self, points: Sequence[Point], run: Callable[[Sequence[Point]], Tensor]) -> Tensor:
        """Losses at all points, of which this process evaluates its part."""
        if self.ranks is None:
            return run(points)
        return self.ranks.losses(len(points), self.batch, lambda first, last: run(points[first:last]))

    def _sequential(self, points: Sequence[Point]) -> Tensor:
        closure, batch = self.closure, self.batch
        call = closure if batch is None else lambda: closure(batch)
        return torch.tensor(list(self.perturbed.losses(call, points)), dtype=torch.float64)

    def predicted_memory(self, points: Sequence[Point]) -> int:
        """Bytes that one forward of the copies at these points will take above the weights, found without running it."""
        copies, trainables = self._copies(), self.perturbed.trainables.parameters

        def run() -> None:
            # Uninitialised copies: directions drawn here would be fake, and be kept for the step.
            stacked = [p.new_empty(len(points), *p.shape) for p in trainables]
            copies.run(stacked, self.batch, split=False)

        return memory.predicted_peak(run)

    def _copies(self) -> Copies:
        if self.batch is None:
            raise ZOError(f'query_mode="{self.mode}" needs the batch: call step(lambda b: model(**b).loss, batch).')
        assert self.module is not None
        return Copies(self.module, self.perturbed, self.closure)

    def _batched(self, points: Sequence[Point]) -> Tensor:
        """All perturbed copies see the whole batch, several in one forward (``vmap``)."""
        run = self._copies()
        return self._in_chunks(
            len(points),
            self._copies_at_once(points),
            tokens(self.batch),
            lambda first, last: run(points[first:last], self.batch, split=False),
        )

    @property
    def _device_kind(self) -> str:
        kind = self.perturbed.trainables.parameters[0].device.type
        return kind if kind in BATCHED_TOKENS else "cuda"

    def _in_chunks(self, total: int, chunk: int, size: int, run: Callable[[int, int], Tensor]) -> Tensor:
        """``run`` over ranges of at most ``chunk``, and of half as many whenever memory runs out; ``size``: tokens that one copy sees."""
        assert self.module is not None
        if self.module in _fitting:
            chunk = max(1, min(chunk, _fitting[self.module] // max(1, size)))
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
            chunk = (last - first) // 2
            _fitting[self.module] = chunk * max(1, size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return torch.cat(values)

    def _copies_at_once(self, points: Sequence[Point]) -> int:
        """How many copies share a forward: as many as gain something and fit."""
        assert self.module is not None
        chunk = max(1, BATCHED_TOKENS[self._device_kind] // max(1, tokens(self.batch)))
        if self._device_kind == "cpu" or min(chunk, len(points)) == 1:
            return chunk  # a few hundred tokens fit where the weights do
        try:
            one, two = self.predicted_memory(points[:1]), self.predicted_memory(points[:2])
        except RuntimeError:  # the closure looks at values: run out of memory, then halve
            return chunk
        # Of what there is, not of what is free now: the chunk decides the last bits, and the same seed must give the same.
        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        room = MEMORY_SHARE * memory.total_memory(self.perturbed.trainables.parameters[0].device) - weights - one
        return max(1, min(chunk, 1 + int(room // max(1, two - one))))

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

        if self.ranks is None:
            values = evaluate(0, queries)
        else:
            values = self.ranks.losses(queries, self.batch, evaluate, width=len(scales))
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

        slice_tokens = tokens(slices) // count
        chunk = max(1, BATCHED_TOKENS[self._device_kind] // max(1, slice_tokens))
        return self._in_chunks(count, chunk, slice_tokens, part)


def resolve(query_mode: str, distributed: Distributed | None, module: nn.Module | None) -> tuple[str, Ranks | None]:
    """An optimizer's query mode as the mode in which this process evaluates, and the processes that it shares the work with.

    Raises:
        ZOError: the mode is not known, or what it needs is not there.
    """
    if query_mode not in QUERY_MODES:
        raise ZOError(f"query_mode={query_mode!r} is not known; choose one of {', '.join(QUERY_MODES)}.")
    mode, ranks = query_mode, None
    if query_mode == "distributed":
        distributed = distributed if distributed is not None else Distributed()
        mode, ranks = distributed.within, Ranks(distributed)
    elif distributed is not None:
        raise ZOError(f'distributed was given with query_mode={query_mode!r}; give query_mode="distributed" with it.')
    if mode in ("batched", "split") and module is None:
        raise ZOError(f"query_mode={mode!r} replaces the module's trainables; pass module=model to the optimizer.")
    return mode, ranks


def choose(batch: Any, module: nn.Module | None, trainables: int) -> str:
    """What ``"auto"`` means here: batched where many small forwards would be launched, sequential elsewhere.

    A rule on sizes, not a stopwatch: the same seed must give the same bits.
    """
    if module is None or batch is None or trainables > 1 << 20 or unmappable(module):
        return "sequential"
    device = next((p.device.type for p in module.parameters()), "cpu")
    limit = BATCHED_TOKENS.get(device, BATCHED_TOKENS["cuda"])
    # Two copies that just fill a forward gain nothing; four do (benchmarks/query_modes.py, grid).
    return "batched" if 4 * tokens(batch) <= limit else "sequential"
