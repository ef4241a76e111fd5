"""The layers below the first trainable, computed once for all evaluations that see the same input.

Between the evaluations of a step only the trainables move, so that frozen layers below all of them give the same states
again and again: with trainables in the last k of L layers, an evaluation then costs k/L of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from zo_opt.system.layers import layer_of
from zo_opt.system.replaced import replaced


class SharedPrefix:
    """Frozen first layers of a model's stacks, skipped where their input is what it was.

    That their input is the same is checked entry by entry at every evaluation; what is trained below them, or another batch, is
    therefore never missed. What cannot be seen is a closure that looks into the skipped layers (``output_hidden_states``,
    forward hooks, key-value caches, router losses): it must not share. Layers that do not simply feed each other are run as ever.

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
            cut = index if any(id(p) in moving for p in child.parameters()) else 1 << 30
            stacks[stack] = min(stacks.get(stack, cut), cut)
        found = [_first(module.get_submodule(stack), cut) for stack, cut in stacks.items()]
        # A layer that stands in several places has several inputs in one forward.
        self._stacks = [layers for layers in found if layers and len({*map(id, layers)}) == len(layers)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Share within this context; what was kept is let go at its end."""
        with ExitStack() as stack:
            for layers in self._stacks:
                memory = _Memory(last=len(layers) - 1)
                for index, layer in enumerate(layers):
                    stack.enter_context(replaced(layer, forward=memory.wrap(layer.forward, index)))
            yield


def _first(stack: nn.Module, cut: int) -> list[nn.Module]:
    """The layers numbered below the cut, by name: children() leaves out repetitions."""
    return [m for name, m in stack._modules.items() if m is not None and name.isdigit() and int(name) < cut]


class _Memory:
    """Input and output of one stack's frozen layers, at their last computation."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._seen: tuple[list[_Physical], list[Any]] | None = None  # tensors, everything else
        self._previous: list[tuple[ReferenceType[Tensor], int]] = []  # what the layer below gave, and its version
        self._inputs: list[tuple[ReferenceType[Tensor], int]] = []  # what the first layer took
        self._result: tuple[list[Any], Any] | None = None  # leaves and structure
        self._level = -1
        self._replaying = False

    def wrap(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        """The layer's forward, or what it gave."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                self._enter(args, kwargs)
            elif not self._replaying and self._seen is not None and not self._chained(args, kwargs):
                self._seen = None
            if self._replaying:
                assert self._result is not None
                self._replaying = index < self._last
                leaves, structure = self._result
                return tree_unflatten([_logical(leaf, self._level) for leaf in leaves], structure)
            output = forward(*args, **kwargs)
            if self._seen is not None:
                leaves, structure = tree_flatten(output)
                tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                if any(t.is_inference() for t in tensors):  # their versions are not counted
                    self._seen = None
                elif index < self._last:
                    self._previous = [(ref(t), t._version) for t in tensors]
                else:
                    self._result = [_physical(leaf) for leaf in leaves], structure
            return output

        return remembered

    def _chained(self, args: Any, kwargs: Any) -> bool:
        """Whether a layer takes what the one below gave, as it gave it, and besides what the first layer took: then one may stand for all."""
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        known = [*self._previous, *self._inputs]
        return bool(tensors) and _among(tensors[0], self._previous) and all(_among(tensor, known) for tensor in tensors)

    def _enter(self, args: Any, kwargs: Any) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = [structure, *(leaf for leaf in leaves if isinstance(leaf, bool | int | float | str | None))]
        seen = [_physical(t) for t in tensors]
        if active_fake_mode() is not None or any(s.foreign for s in seen):
            self._seen, self._replaying = None, False
            return
        known = self._seen
        self._replaying = (
            self._result is not None
            and all(leaf.untouched for leaf in self._result[0] if isinstance(leaf, _Physical))
            and known is not None
            and known[1] == plain
            and len(known[0]) == len(seen)
            and all(a.same(b) for a, b in zip(seen, known[0], strict=True))
        )
        self._level = max((torch._C._functorch.maybe_get_level(t) for t in tensors), default=-1)
        if not self._replaying:
            self._seen, self._result = (seen, plain), None
            self._inputs = [(ref(t), t._version) for t in tensors]


def _among(tensor: Tensor, known: Sequence[tuple[ReferenceType[Tensor], int]]) -> bool:
    """Whether it is one of these very tensors, unchanged."""
    return any(tensor is t() and tensor._version == version for t, version in known)


class _Physical:
    """A tensor without ``vmap`` around it: all copies' values, and the axis of copies (None: no copies)."""

    def __init__(self, values: Tensor, axis: int | None) -> None:
        self.values, self.axis = values, axis
        self._version = -1 if values.is_inference() else values._version

    @property
    def foreign(self) -> bool:
        """Transforms within transforms; tangents; tensors whose versions are not counted."""
        return (
            torch._C._functorch.is_functorch_wrapped_tensor(self.values)
            or self.values.is_inference()
            or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(self.values).tangent is not None)
        )

    @property
    def untouched(self) -> bool:
        """Whether nobody has written into it since (a later layer may add to its input in place)."""
        return self.values._version == self._version

    def same(self, other: _Physical) -> bool:
        return (
            other.untouched
            and self.axis == other.axis
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
