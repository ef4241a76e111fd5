"""The layers below the first trainable, computed once for all evaluations that see the same input.

Between the evaluations of a step only the trainables move, so that frozen layers below all of them give the same states
again and again: with trainables in the last k of L layers, an evaluation then costs k/L of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zo_opt.layers import layer_of


class SharedPrefix:
    """Frozen first layers of a model's stacks, skipped where their input is what it was.

    That their input is the same is checked entry by entry at every evaluation; what is trained below them, or another batch, is
    therefore never missed. What cannot be seen is a closure that looks into the skipped layers (``output_hidden_states``,
    forward hooks, key-value caches): it must not share.

    Args:
        module: the model.
        trainables: the parameters that move.
    """

    def __init__(self, module: nn.Module, trainables: Sequence[Tensor]) -> None:
        moving = {id(p) for p in trainables}
        stacks: dict[str, int] = {}  # stack -> its first layer that holds a trainable
        for name, child in module.named_modules():
            place = layer_of(name)
            if place is None or name != f"{place[0]}.{place[1]}":
                continue
            stack, index = place
            frozen = not any(id(p) in moving for p in child.parameters())
            stacks.setdefault(stack, index if not frozen else 1 << 30)
            if not frozen:
                stacks[stack] = min(stacks[stack], index)
        self._stacks = [list(module.get_submodule(stack).children())[:cut] for stack, cut in stacks.items() if cut]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Share within this context; what was kept is let go at its end."""
        with ExitStack() as patches:
            for layers in self._stacks:
                memory = _Memory(last=len(layers) - 1)
                for index, layer in enumerate(layers):
                    patches.enter_context(patch.object(layer, "forward", memory.wrap(layer.forward, index)))
            yield


class _Memory:
    """Input and output of one stack's frozen layers, at their last computation."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._seen: list[_Physical] | None = None
        self._result: tuple[list[Any], Any] | None = None  # leaves and structure
        self._level = -1
        self._replaying = False

    def wrap(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        """The layer's forward, or what it gave."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                self._enter(args, kwargs)
            if self._replaying:
                assert self._result is not None
                leaves, structure = self._result
                return tree_unflatten([_logical(leaf, self._level) for leaf in leaves], structure)
            output = forward(*args, **kwargs)
            if index == self._last and self._seen is not None:
                leaves, structure = tree_flatten(output)
                self._result = [_physical(leaf) for leaf in leaves], structure
            return output

        return remembered

    def _enter(self, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        seen = [_physical(t) for t in tensors]
        if any(s is None or torch._C._functorch.is_functorch_wrapped_tensor(s.values) for s in seen):
            self._seen, self._replaying = None, False  # transforms within transforms: not ours
            return
        known = self._seen
        self._replaying = (
            self._result is not None
            and all(leaf.untouched for leaf in self._result[0] if isinstance(leaf, _Physical))
            and known is not None
            and len(known) == len(seen)
            and all(a.same(b) for a, b in zip(seen, known, strict=True))
        )
        self._level = max((torch._C._functorch.maybe_get_level(t) for t in tensors), default=-1)
        if not self._replaying:
            self._seen, self._result = seen, None


class _Physical:
    """A tensor without ``vmap`` around it: all copies' values, and the axis of copies (None: no copies)."""

    def __init__(self, values: Tensor, axis: int | None) -> None:
        self.values, self.axis = values, axis
        self._version = 0 if values.is_inference() else values._version

    @property
    def untouched(self) -> bool:
        """Whether nobody has written into it since (a later layer may add to its input in place)."""
        return self.values.is_inference() or self.values._version == self._version

    def same(self, other: _Physical) -> bool:
        return (
            self.axis == other.axis
            and self.values.shape == other.values.shape
            and self.values.dtype == other.values.dtype
            and torch.equal(self.values, other.values)
        )


def _physical(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if not torch._C._functorch.is_batchedtensor(leaf):
        return _Physical(leaf, None)
    return _Physical(torch._C._functorch.get_unwrapped(leaf), torch._C._functorch.maybe_get_bdim(leaf))


def _logical(leaf: Any, level: int) -> Any:
    if not isinstance(leaf, _Physical):
        return leaf
    if leaf.axis is None:
        return leaf.values
    return torch._C._functorch._add_batch_dim(leaf.values, leaf.axis, level)
