"""Hidden states of the frozen part below the first adapter, computed once an example.

With adapters in the last k of L layers those states never change, so that a forward pass costs k/L of its layers.
Kept in memory up to a bound; examples beyond it are computed as without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from zo_opt.adapters import AdapterModel
from zo_opt.adapters.targets import layer_of


class PrefixCache:
    """States after the last layer below all adapters, unpadded, float32 or as the model computes them.

    Args:
        model: a model with adapters in one stack of layers, none in the first.
        max_bytes: bound on the states kept.
    """

    def __init__(self, model: AdapterModel, max_bytes: int) -> None:
        cut = first_adapted_layer(model)
        assert cut is not None, "ask first_adapted_layer() before building a cache"
        stack, self.cut = cut
        self._layers: list[nn.Module] = list(model.wrapped.get_submodule(stack).children())
        self.depth = len(self._layers)
        self._model, self._max_bytes = model, max_bytes
        self._states: dict[int, list[Tensor]] = {}
        self.bytes = 0
        self.recorded_examples = 0

    @torch.no_grad()
    def record(self, keys: Sequence[int], inputs: dict[str, Tensor], mask_BCS: Tensor) -> None:
        """Run the layers below the cut on a batch and keep each example's states.

        Args:
            keys: a number for each of the B examples.
            inputs: the model's arguments, examples and labels flattened, (B * C, S).
            mask_BCS: attention mask; where it is 0 nothing is kept.
        """
        captured: list[Tensor] = []

        def capture(_module: nn.Module, _args: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)
            raise _PrefixDoneError

        handle = self._layers[self.cut - 1].register_forward_hook(capture)
        try:
            self._model(**inputs)
        except _PrefixDoneError:
            pass
        finally:
            handle.remove()
        states = captured[0].unflatten(0, mask_BCS.shape[:2])
        self.recorded_examples += len(keys)
        for key, rows, masks in zip(keys, states, mask_BCS, strict=True):
            kept = [row[mask.bool()].clone() for row, mask in zip(rows, masks, strict=True)]
            size = sum(t.numel() * t.element_size() for t in kept)
            if self.bytes + size <= self._max_bytes and key not in self._states:
                self._states[key] = kept
                self.bytes += size

    @property
    def full(self) -> bool:
        """Whether examples were left out for want of room."""
        return self.recorded_examples > len(self._states)

    def batch(self, keys: Sequence[int], mask_BCS: Tensor) -> Tensor | None:
        """States of a batch padded as its mask is, (B, C, S, hidden); None where one of them is not kept."""
        rows = [self._states.get(key) for key in keys]
        lengths = mask_BCS.sum(-1).tolist()
        # A batch that mixes label words of one and of several tokens asks for other sequences than were recorded.
        if any(r is None or [len(t) for t in r] != n for r, n in zip(rows, lengths, strict=True)):
            return None
        first = self._states[keys[0]][0]
        out = first.new_zeros(*mask_BCS.shape, first.shape[-1])
        for b, key in enumerate(keys):
            for c, state in enumerate(self._states[key]):
                out[b, c][mask_BCS[b, c].bool()] = state
        return out

    @contextmanager
    def replay(self, states: Tensor) -> Iterator[None]:
        """Within this context the layers below the cut return the given states, (B * C, S, hidden), at no cost."""

        def passed(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            return hidden

        with ExitStack() as stack:
            for layer in self._layers[: self.cut - 1]:
                stack.enter_context(patch.object(layer, "forward", passed))
            stack.enter_context(patch.object(self._layers[self.cut - 1], "forward", lambda *_a, **_k: states))
            yield


def first_adapted_layer(model: AdapterModel) -> tuple[str, int] | None:
    """(stack, index) of the lowest adapted layer, where everything below it is frozen and a cache can be cut; else None."""
    places = [layer_of(name) for name in model.adapted]
    if not places or any(place is None for place in places) or model.config.is_encoder_decoder:
        return None
    stacks = {place[0] for place in places if place is not None}
    lowest = min(place[1] for place in places if place is not None)
    if len(stacks) != 1 or lowest == 0:
        return None
    return stacks.pop(), lowest


class _PrefixDoneError(Exception):
    pass
