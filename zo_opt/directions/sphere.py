"""z uniform on the sphere of radius sqrt(d)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zo_opt.directions.base import Directions, Shapes, Stream, numel
from zo_opt.directions.gaussian import normal

_CHUNK = 1 << 18


@dataclass(frozen=True)
class Sphere(Directions):
    """z = sqrt(d) x / ||x||, x ~ N(0, I) over all d trainables, so that E[z z^T] = I and ||z||^2 = d exactly.

    Use it where every direction should have the same length.

    Source: Flaxman et al., arXiv cs/0408007. The norm costs one more draw of the whole direction, remembered while it is in use.
    """

    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        return normal((*stream, 2), start, stop, device) * _factor(stream, sum(map(numel, shapes)), device)


@lru_cache(maxsize=256)
def _factor(stream: Stream, total: int, device: torch.device) -> float:
    square = 0.0
    for start in range(0, total, _CHUNK):
        square += float(normal((*stream, 2), start, min(start + _CHUNK, total), device).double().square().sum())
    return float((total / square) ** 0.5)
