"""z with few entries that are not zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.directions.base import Directions, Shapes, Stream
from zo_opt.directions.philox import words
from zo_opt.directions.rademacher import Rademacher

_PER_BLOCK = 16  # 16-bit numbers in a Philox block
KIND = 2


@dataclass(frozen=True)
class Sparse(Directions):
    """z = s m / sqrt(density): signs s, and a mask m that keeps each entry with probability ``density``, fresh for every query.

    Use it where few of many numbers should move in each query.

    E[z z^T] = I. [choice] Sparse-MeZO's mask, which depends on the weights, is :class:`~zo_opt.optim.SparseMeZO`'s. Bits are Philox's.

    Raises:
        ZOError: the density is not in (0, 1].
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(Range(above=0, most=1), density=self.density)

    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        first, last = start // _PER_BLOCK, -(-stop // _PER_BLOCK)
        word = words((stream.seed, 0), (stream.query, stream.step, KIND), first, last - first, device)
        uniform = word.view(torch.int16)[start - _PER_BLOCK * first : stop - _PER_BLOCK * first]
        threshold = max(1, round(self.density * 65536))
        kept = uniform <= threshold - 32769  # at most 32767: int16 cannot be compared with more
        z = Rademacher().draw(stream, shapes, start, stop, device)
        scaled: Tensor = z * kept * float((65536 / threshold) ** 0.5)
        return scaled
