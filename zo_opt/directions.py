"""The only place where randomness is drawn: seed -> direction ``z``.

A direction is a function of (seed, step, query, parameter, index range) and of nothing else: any slice of it can
be drawn alone, in any order, on any rank, and the global random state is never touched. Both distributions
here have zero mean and unit variance in every entry, independent between entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from zo_opt.errors import ZOError

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


class Stream(NamedTuple):
    """Which random numbers: of which run (``seed``), step, query and parameter."""

    seed: int
    step: int
    query: int
    parameter: int


class Directions(ABC):
    """A distribution of directions."""

    name: str

    @abstractmethod
    def slice(self, stream: Stream, start: int, stop: int, device: torch.device) -> Tensor:
        """Entries ``start`` to ``stop`` of one parameter's flattened direction: float32, shape (stop - start,)."""

    def whole(self, seed: int, step: int, queries: int, sizes: Sequence[int], device: torch.device) -> Tensor:
        """All parameters' directions side by side: float32, shape (queries, sum of sizes); equal to the slices."""
        rows = [
            torch.cat([self.slice(Stream(seed, step, q, i), 0, n, device) for i, n in enumerate(sizes)])
            for q in range(queries)
        ]
        return torch.stack(rows)


class Gaussian(Directions):
    """z ~ N(0, I), drawn with torch's native generator (fast; the bits differ between CPU and CUDA).

    Entries come in blocks of 2^16, each with a seed of its own, so that a slice costs at most its own blocks.
    """

    name = "gaussian"
    BLOCK = 1 << 16

    def slice(self, stream: Stream, start: int, stop: int, device: torch.device) -> Tensor:
        out = torch.empty(stop - start, device=device)
        generator = torch.Generator(device)
        for block in range(start // self.BLOCK, -(-stop // self.BLOCK)):
            first = block * self.BLOCK
            lo, hi = max(start - first, 0), min(stop - first, self.BLOCK)
            # On the CPU a draw of 16 m entries is a prefix of any longer one; on CUDA only equal sizes agree.
            length = -(-hi // 16) * 16 if device.type == "cpu" else self.BLOCK
            generator.manual_seed(_hash(*stream, block))
            draw = torch.randn(length, generator=generator, device=device)
            out[first + lo - start : first + hi - start] = draw[lo:hi]
        return out


class Rademacher(Directions):
    """z = +1 or -1 with equal probability: the bits of Philox-4x32-10, the same on every device.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Entry i is bit i mod 128 of
    the block with counter (i // 128, parameter, query) under a key made of (seed, step).
    """

    name = "rademacher"

    def slice(self, stream: Stream, start: int, stop: int, device: torch.device) -> Tensor:
        first = start // 128
        block = torch.arange(first, -(-stop // 128), device=device)
        parameter = torch.full_like(block, stream.parameter)
        bits = _philox_bits(_hash(stream.seed, stream.step), block, parameter, torch.full_like(block, stream.query))
        return _signs(bits.flatten()[start - 128 * first : stop - 128 * first])

    def whole(self, seed: int, step: int, queries: int, sizes: Sequence[int], device: torch.device) -> Tensor:
        block, parameter, keep = _layout(tuple(sizes), device)
        query = torch.arange(queries, device=device).unsqueeze(1).expand(queries, len(block))
        bits = _philox_bits(_hash(seed, step), block.expand_as(query), parameter.expand_as(query), query)
        return _signs(bits.flatten(1)[:, keep])


DIRECTIONS: dict[str, Directions] = {d.name: d for d in (Gaussian(), Rademacher())}


def get_directions(directions: str | Directions) -> Directions:
    """The distribution of that name (or the given one itself)."""
    if isinstance(directions, Directions):
        return directions
    if directions not in DIRECTIONS:
        raise ZOError(f"directions={directions!r} is not known; choose one of {', '.join(DIRECTIONS)}.")
    return DIRECTIONS[directions]


class StepDirections:
    """The directions of one step over a list of parameters; kept in memory while they are few, redrawn otherwise."""

    KEPT = 1 << 23  # entries: 32 MiB

    def __init__(self, kind: Directions, seed: int, step: int, parameters: Sequence[Tensor]) -> None:
        self._kind, self._seed, self._step, self._parameters = kind, seed, step, list(parameters)
        self._sizes = [p.numel() for p in self._parameters]
        self._kept: tuple[int, Tensor] | None = None

    def keep(self, queries: int) -> None:
        """Draw the directions of the first ``queries`` queries at once, where they are small enough to be kept."""
        devices = {p.device for p in self._parameters}
        if len(devices) != 1 or queries * sum(self._sizes) > self.KEPT:
            return
        if self._kept is None or self._kept[0] < queries:
            whole = self._kind.whole(self._seed, self._step, queries, self._sizes, devices.pop())
            self._kept = (queries, whole)

    def slice(self, query: int, parameter: int, start: int, stop: int) -> Tensor:
        """Entries of one query's direction within one parameter: float32, shape (stop - start,)."""
        if self._kept is not None and query < self._kept[0]:
            offset = sum(self._sizes[:parameter])
            return self._kept[1][query, offset + start : offset + stop]
        stream = Stream(self._seed, self._step, query, parameter)
        return self._kind.slice(stream, start, stop, self._parameters[parameter].device)


def _hash(*words: int) -> int:
    """Mix integers into 63 bits (splitmix64's finaliser, chained), so that neighbouring seeds share nothing."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state >> 1


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10: four int64 tensors holding 32-bit words and a key -> words, shape (..., 4), int64.

    Integer arithmetic alone (products wrap modulo 2^64), hence the same words on every device.

    >>> [f"{w:08x}" for w in philox([torch.zeros(1, dtype=torch.int64)] * 4, (0, 0))[0].tolist()]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (p1 >> 32 & _MASK32) ^ x1 ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ x3 ^ k1, p0 & _MASK32
        k0, k1 = k0 + 0x9E3779B9 & _MASK32, k1 + 0xBB67AE85 & _MASK32
    return torch.stack([x0, x1, x2, x3], dim=-1)


def _philox_bits(key: int, block: Tensor, parameter: Tensor, query: Tensor) -> Tensor:
    """128 bits a block, shape (*block.shape, 128)."""
    counter = [block & _MASK32, block >> 32, parameter, query]
    words = philox(counter, (key & _MASK32, key >> 32))
    shifts = torch.arange(32, device=block.device)
    return (words.unsqueeze(-1) >> shifts & 1).flatten(-2)


def _signs(bits: Tensor) -> Tensor:
    return 1.0 - 2.0 * bits.to(torch.float32)


@lru_cache(maxsize=8)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Block number and parameter number of every Philox block, and which of all the bits are entries."""
    blocks = [-(-n // 128) for n in sizes]
    block = torch.cat([torch.arange(b, device=device) for b in blocks])
    parameter = torch.cat([torch.full((b,), i, device=device) for i, b in enumerate(blocks)])
    firsts = [128 * sum(blocks[:i]) for i in range(len(blocks))]
    keep = torch.cat([torch.arange(f, f + n, device=device) for f, n in zip(firsts, sizes, strict=True)])
    return block, parameter, keep
