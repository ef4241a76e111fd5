"""Batches: any nesting of mappings, lists and tuples with tensors at the leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zo_opt.errors import ZOError


def batch_size(batch: Any) -> int:
    """Examples in a batch: the common first axis of all its tensors."""
    sizes: set[int] = set()
    map_tensors(lambda x: sizes.add(x.shape[0] if x.ndim else -1), batch)
    if len(sizes) != 1 or -1 in sizes:  # -1: a tensor without axes
        raise ZOError(
            f"the batch's tensors have first axes {sorted(sizes)}; give one tensor or more, all with the example axis first."
        )
    return sizes.pop()


def most_directions(batch: Any) -> int:
    """Directions among which a batch can be split: one an example."""
    if not (examples := batch_size(batch)):
        raise ZOError("the batch has no examples; leave empty batches out.")
    return examples


def map_tensors(fn: Callable[[Tensor], Any], batch: Any) -> Any:
    """Apply ``fn`` to every tensor of a nesting of mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        return {k: map_tensors(fn, v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [map_tensors(fn, v) for v in batch])
    return batch


def tokens(batch: Any) -> int:
    """Tokens in a batch: entries of its largest integer tensor, or examples where there is none."""
    counts = [1]
    map_tensors(lambda x: counts.append(x.shape[0] if x.is_floating_point() and x.ndim else x.numel()), batch)
    return max(counts)


def shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's tensors, in order."""
    found: list[tuple[int, ...]] = []
    map_tensors(lambda x: found.append(tuple(x.shape)), batch)
    return tuple(found)


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
