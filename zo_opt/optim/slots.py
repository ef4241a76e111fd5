"""Tensors that an optimizer keeps beside the trainables, reachable by ranges of the trainables' axis."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_opt.queries.trainables import Trainables


class Slots:
    """float32 tensors of the parameters' shapes in ``optimizer.state``; side by side in one buffer where the parameters are.

    Args:
        trainables: the parameters.
        state: the optimizer's state; missing tensors are made, present ones are kept.
        values: what each named slot starts as.
    """

    def __init__(
        self, trainables: Trainables, state: Mapping[Tensor, dict[str, Any]], values: Mapping[str, float]
    ) -> None:
        self._trainables, self._state = trainables, state
        self._buffers: dict[str, Tensor] = {}
        for name, value in values.items():
            for parameter in trainables.parameters:
                if name not in state[parameter]:
                    state[parameter][name] = torch.full(parameter.shape, value, device=parameter.device)
                elif state[parameter][name].device != parameter.device:  # of a model that was moved
                    state[parameter][name] = state[parameter][name].to(parameter.device)
            if trainables.flat is not None:
                buffer = torch.cat([state[p][name].reshape(-1) for p in trainables.parameters])
                for parameter, part in zip(trainables.parameters, buffer.split(trainables.sizes), strict=True):
                    state[parameter][name] = part.view(parameter.shape)
                self._buffers[name] = buffer

    def range(self, name: str, start: int, stop: int) -> Tensor:
        """The slot's own memory along a range (within one parameter, unless they are gathered): float32, (stop - start,)."""
        if name in self._buffers:
            return self._buffers[name][start:stop]
        starts = self._trainables.starts
        number = bisect_right(starts, start) - 1
        memory: Tensor = self._state[self._trainables.parameters[number]][name].view(-1)
        return memory[start - starts[number] : stop - starts[number]]
