"""z = +1 or -1 with equal probability: one Philox bit an entry, the same on every device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.directions.base import Directions, Shapes, Stream
from zo_opt.directions.philox import words

_PER_BLOCK = 256  # bits
KIND = 0


@dataclass(frozen=True)
class Rademacher(Directions):
    """z = +1 or -1 with equal probability: bits of Philox-4x64-10.

    Use it by default: it is the fastest, and the only one whose journals replay to the bit on every device.

    Entry i is bit i mod 256 of the block with counter (i // 256 + 1, query, step, 0) under the key (seed, 0).
    """

    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        return signs((stream.seed, 0), (stream.query, stream.step, KIND), start, stop, device)


def signs(key: tuple[int, int], counter: tuple[int, int, int], start: int, stop: int, device: torch.device) -> Tensor:
    """Bits ``start`` to ``stop`` of a Philox sequence as +1 (clear) and -1 (set): float32, shape (stop - start,)."""
    first, last = start // _PER_BLOCK, -(-stop // _PER_BLOCK)
    bytes_ = words(key, counter, first, last - first, device).view(torch.uint8)
    # One table row of eight signs a byte: the fastest way from bits to floats in plain torch (measured).
    z = F.embedding(bytes_.int(), _signs_of_bytes(device)).flatten()
    return z[start - _PER_BLOCK * first : stop - _PER_BLOCK * first]


@lru_cache(maxsize=8)
def _signs_of_bytes(device: torch.device) -> Tensor:
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return 1.0 - 2.0 * bits.float()
