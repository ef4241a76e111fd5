"""Philox-4x64-10: random words as a pure function of a counter, the same on every device.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Integer arithmetic alone. numpy ships the
same generator in C, which is an order of magnitude faster on a CPU: it is used there, and held to be bit-equal by a test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

WORDS = 4  # 64-bit words in a block


def words(key: tuple[int, int], counter: tuple[int, int, int], first: int, blocks: int, device: torch.device) -> Tensor:
    """The 64-bit words of ``blocks`` consecutive blocks: int64 (two's complement), shape (4 * blocks,).

    Block i has the counter (i + 1, *counter).

    >>> cpu = torch.device("cpu")
    >>> torch.equal(words((1, 2), (3, 4, 5), 7, 2, cpu), words((1, 2), (3, 4, 5), 0, 9, cpu)[28:])
    True
    """
    if blocks == 0:  # numpy gives it a stride of 0, which cannot be viewed in other units
        return torch.empty(0, dtype=torch.int64, device=device)
    if device.type == "cpu":
        # numpy counts up before it draws, so that the counter given is the block's own less one.
        state = np.array([first, *(c & _MASK64 for c in counter)], dtype=np.uint64)
        generator = np.random.Philox(key=np.array([k & _MASK64 for k in key], dtype=np.uint64), counter=state)
        return torch.from_numpy(generator.random_raw(WORDS * blocks).view(np.int64))
    block = torch.arange(first + 1, first + 1 + blocks, device=device)
    rest = [torch.full_like(block, _signed(c)) for c in counter]
    return philox([block, *rest], key).flatten()


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> Tensor:
    """Four int64 tensors (64-bit words, two's complement) and a key -> words, shape (..., 4), int64; any device.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{w & 2**64 - 1:016x}" for w in philox([zero] * 4, (0, 0))[0].tolist()]
    ['16554d9eca36314c', 'db20fe9d672d0fdc', 'd7e772cee186176b', '7e68b68aec7ba23b']
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ _signed(k0), low1, high0 ^ x3 ^ _signed(k1), low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return torch.stack([x0, x1, x2, x3], dim=-1)


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned product, by four 32-bit products (int64 wraps modulo 2^64)."""
    x0, x1, m0, m1 = x & _MASK32, x >> 32 & _MASK32, m & _MASK32, m >> 32
    low, mid0, mid1 = x0 * m0, x0 * m1, x1 * m0
    carry = (low >> 32 & _MASK32) + (mid0 & _MASK32) + (mid1 & _MASK32)
    high = x1 * m1 + (mid0 >> 32 & _MASK32) + (mid1 >> 32 & _MASK32) + (carry >> 32)
    return high, x * _signed(m)


def _signed(word: int) -> int:
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word


def mix(*integers: int) -> int:
    """Mix integers into 63 bits (splitmix64's finaliser, chained), so that neighbouring seeds share nothing."""
    state = 0
    for word in integers:
        state = (state ^ (word & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state >> 1
