"""How the losses of one step's directions are evaluated: a choice of cost, never a different algorithm.

``losses(scales)`` of each mode returns the loss at ``theta + scale * z_q`` for every query q and scale. Nothing here knows
of estimators or update rules. Whatever happens inside, the trainables come back bit for bit.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_opt.directions import StepDirections
from zo_opt.errors import ZOError

QUERY_MODES = ("sequential", "batched", "split", "auto")
CHUNK = 1 << 22  # entries perturbed at a time when directions are redrawn
_UNMAPPABLE: WeakSet[nn.Module] = WeakSet()  # models on which vmap failed once: warned about, then run copy by copy
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


@dataclass(frozen=True)
class Perturbed:
    """The trainables of one step with their directions.

    Args:
        parameters: unique trainables, in the order in which directions number them.
        directions: the step's directions.
        scale: ``zo_eps``-free multiplier of each parameter's direction; ones unless a method says otherwise.
    """

    parameters: Sequence[Tensor]
    directions: StepDirections

    def stacked(self, scales: Sequence[tuple[int, float]]) -> list[Tensor]:
        """Copies of every parameter at ``theta + scale * z_query``, shape (len(scales), *parameter.shape)."""
        copies = []
        for index, parameter in enumerate(self.parameters):
            z = torch.stack([self.directions.slice(q, index, 0, parameter.numel()) * s for q, s in scales])
            copies.append(parameter.detach() + z.view(-1, *parameter.shape).to(parameter.dtype))
        return copies

    @contextmanager
    def restored(self) -> Iterator[list[Tensor]]:
        """Keep the originals and put them back bit for bit, whatever happens inside."""
        originals = [p.detach().clone() for p in self.parameters]
        try:
            yield originals
        finally:
            for parameter, original in zip(self.parameters, originals, strict=True):
                parameter.copy_(original)

    def move(self, originals: Sequence[Tensor], query: int, scale: float) -> None:
        """Set the parameters to ``original + scale * z_query``, a chunk at a time."""
        for index, (parameter, original) in enumerate(zip(self.parameters, originals, strict=True)):
            for start in range(0, parameter.numel(), CHUNK):
                stop = min(start + CHUNK, parameter.numel())
                z = self.directions.slice(query, index, start, stop).to(parameter.dtype)
                moved = torch.add(flat(original)[start:stop], z, alpha=scale)
                flat(parameter)[start:stop].copy_(moved)


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
                values[q, s] = _scalar(closure() if batch is None else closure(batch))
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
    runner = _Copies(module, perturbed, closure)
    points = [(q, s) for q in range(queries) for s in scales]
    chunk = max(1, BATCHED_TOKENS // max(1, _tokens(batch)))
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
    runner = _Copies(module, perturbed, closure)
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
    return "batched" if 2 * _tokens(batch) <= BATCHED_TOKENS else "sequential"


def batch_size(batch: Any) -> int:
    """Examples in a batch: the common first axis of all its tensors."""
    sizes: set[int] = set()
    map_tensors(lambda x: sizes.add(x.shape[0] if x.ndim else -1), batch)
    if len(sizes) != 1 or -1 in sizes:  # -1: a tensor without axes
        raise ZOError(
            f"the batch's tensors have first axes {sorted(sizes)}; give one tensor or more, all with the example axis first."
        )
    return sizes.pop()


def map_tensors(fn: Callable[[Tensor], Any], batch: Any) -> Any:
    """Apply ``fn`` to every tensor of a nesting of mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        return {k: map_tensors(fn, v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [map_tensors(fn, v) for v in batch])
    return batch


class _Copies:
    """Runs the closure on several copies of the trainables in one forward."""

    def __init__(self, module: nn.Module, perturbed: Perturbed, closure: Callable[..., Any]) -> None:
        # Every place that holds a parameter, each module once: functional_call's own tying restores a module that has
        # two names with the copies instead of the parameters.
        names: dict[int, list[str]] = {}
        for prefix, owner in module.named_modules(prefix="module"):
            for name, p in owner.named_parameters(recurse=False, remove_duplicate=False):
                names.setdefault(id(p), []).append(f"{prefix}.{name}")
        missing = sum(id(p) not in names for p in perturbed.parameters)
        if missing:
            raise ZOError(
                f"{missing} of the optimizer's parameters are not in the module given; pass the module that owns them."
            )
        self._names = [names[id(p)] for p in perturbed.parameters]
        self._perturbed = perturbed
        self._closure = _ClosureModule(module, closure)

    def __call__(self, points: Sequence[tuple[int, float]], batch: Any, *, split: bool) -> Tensor:
        """Losses at ``theta + scale * z_query`` for each (query, scale): float64, shape (len(points),)."""
        self._perturbed.directions.keep(1 + max(q for q, _ in points))
        stacked = zip(self._names, self._perturbed.stacked(points), strict=True)
        copies = {name: copy for names, copy in stacked for name in names}
        tensors = Leaves(batch)

        def loss(parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
            value = functional_call(self._closure, parameters, (tensors.rebuild(leaves),), tie_weights=False)
            return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)

        failure: Exception | None = None
        if not self._closure.unmappable:
            try:
                with _masks_without_branches(), _attention_that_maps(tensors.leaves):
                    run = vmap(loss, in_dims=(0, 0 if split and tensors.leaves else None), randomness="same")
                    return run(copies, tensors.leaves).double().cpu()
            except (RuntimeError, ValueError) as error:
                if isinstance(error, ZOError) or "out of memory" in str(error).lower():
                    raise
                failure = error
        values = [
            _scalar(
                loss({k: v[i] for k, v in copies.items()}, [x[i] for x in tensors.leaves] if split else tensors.leaves)
            )
            for i in range(len(points))
        ]
        if failure is not None:  # one by one it works, so that vmap is to blame and not the closure
            self._closure.give_up(failure)
        return torch.tensor(values, dtype=torch.float64)


class Leaves:
    """A batch taken apart into its tensors, to be rebuilt around others."""

    def __init__(self, batch: Any) -> None:
        self.leaves: list[Tensor] = []
        self._batch = map_tensors(self._take, batch)

    def _take(self, tensor: Tensor) -> _Slot:
        self.leaves.append(tensor)
        return _Slot(len(self.leaves) - 1)

    def rebuild(self, leaves: Sequence[Tensor]) -> Any:
        """The same nesting around other tensors."""
        return _fill(self._batch, leaves)


@dataclass(frozen=True)
class _Slot:
    index: int


def _fill(tree: Any, leaves: Sequence[Tensor]) -> Any:
    if isinstance(tree, _Slot):
        return leaves[tree.index]
    if isinstance(tree, dict):
        return {k: _fill(v, leaves) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return _like(tree, [_fill(v, leaves) for v in tree])
    return tree


def _like(sequence: Any, values: list[Any]) -> Any:
    """A sequence of the same type; a named tuple takes its values one by one."""
    return type(sequence)(*values) if hasattr(sequence, "_fields") else type(sequence)(values)


class _ClosureModule(nn.Module):
    """A closure over a module as a module, so that ``functional_call`` can replace the module's parameters."""

    def __init__(self, module: nn.Module, closure: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._closure = (closure,)  # in a tuple: a closure that is a module must not become a submodule

    def forward(self, batch: Any) -> Any:
        return self._closure[0](batch)

    @property
    def unmappable(self) -> bool:
        return self.module in _UNMAPPABLE

    def give_up(self, error: Exception) -> None:
        _UNMAPPABLE.add(self.module)
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"copies of this model cannot share a forward ({reason}); evaluating them one by one.", stacklevel=6
        )


@contextmanager
def _masks_without_branches() -> Iterator[None]:
    """Let transformers build attention masks as it does when traced: without reading the padding mask's values.

    Its shortcut for batches without padding is a branch on data, which ``vmap`` cannot follow.
    """
    masking = sys.modules.get("transformers.masking_utils")
    original = getattr(masking, "is_tracing", None)
    if masking is None or original is None:
        yield
        return
    masking.is_tracing = lambda tensor=None: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking.is_tracing = original  # type: ignore[attr-defined]


def _attention_that_maps(leaves: Sequence[Tensor]) -> AbstractContextManager[None]:
    """On the CPU the fused attention kernel has no batching rule: ``vmap`` would run it copy by copy."""
    if any(x.device.type != "cpu" for x in leaves):
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def _tokens(batch: Any) -> int:
    """Tokens in a batch: entries of its largest integer tensor, or examples where there is none."""
    counts = [1]
    map_tensors(lambda x: counts.append(x.shape[0] if x.is_floating_point() and x.ndim else x.numel()), batch)
    return max(counts)


def flat(parameter: Tensor) -> Tensor:
    """The parameter as one axis, sharing its memory."""
    if not parameter.is_contiguous():
        raise ZOError(
            "a trainable is not contiguous in memory; call .contiguous() on it before giving it to the optimizer."
        )
    return parameter.detach().view(-1)


def _scalar(loss: Any) -> float:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ZOError(f"the closure returned a tensor of shape {tuple(loss.shape)}; return one loss (a scalar).")
        return float(loss.detach())
    if loss is None:
        raise ZOError("the closure returned None; return the loss (a float or a scalar tensor).")
    return float(loss)
