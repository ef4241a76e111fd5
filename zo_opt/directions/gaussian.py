"""z ~ N(0, I): with torch's native generator (fast), or from Philox (portable)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_opt.directions.base import Directions, Shapes, Stream
from zo_opt.directions.philox import WORDS, mix, words

BLOCK = 1 << 16


@dataclass(frozen=True)
class Gaussian(Directions):
    """z ~ N(0, I), drawn with torch's native generator: fast; the bits differ between CPU and CUDA, and between versions of torch.

    Use it to follow publications, which draw normal entries.

    Entries come in blocks of 2^16, each with a seed of its own, so that a range costs at most its own blocks.
    """

    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        return normal(stream, start, stop, device)


@dataclass(frozen=True)
class PhiloxGaussian(Directions):
    """z ~ N(0, I) by Box and Muller's transform of Philox words: the same on every device, to the rounding of log and cos.

    Use it where normal entries must be the same on CPU and GPU.

    Four times slower than the native generator. One 64-bit word gives two entries (the transform is evaluated in float64).
    """

    _PER_BLOCK: ClassVar[int] = 2 * WORDS

    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        first, last = start // self._PER_BLOCK, -(-stop // self._PER_BLOCK)
        word = words((stream.seed, 0), (stream.query, stream.step, KIND), first, last - first, device)
        u = ((word & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
        angle = (word >> 32 & 0xFFFFFFFF).double() * (2 * torch.pi * 2.0**-32)
        radius = (-2 * u.log()).sqrt()
        z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten()
        return z[start - self._PER_BLOCK * first : stop - self._PER_BLOCK * first].float()


KIND = 1  # tells this use of Philox from others of the same (seed, step, query)


def normal(name: tuple[int, ...], start: int, stop: int, device: torch.device) -> Tensor:
    """Entries of the native Gaussian sequence of that name: float32, shape (stop - start,)."""
    generator = torch.Generator(device)
    first, last = start // BLOCK, -(-stop // BLOCK)
    # On the CPU a draw of 16 m entries is a prefix of any longer one; on CUDA only equal sizes agree.
    length = -(-stop // 16) * 16 - first * BLOCK if device.type == "cpu" else (last - first) * BLOCK
    out = torch.empty(max(length, 0), device=device)
    for block in range(first, last):
        generator.manual_seed(mix(*name, block))
        out[(block - first) * BLOCK : (block + 1 - first) * BLOCK].normal_(generator=generator)
    return out[start - first * BLOCK : stop - first * BLOCK]
