"""Rounding float32 values to bf16 or fp16 so that small updates are not lost: up or down at random, right on average."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from zo_opt.directions.base import Stream
from zo_opt.directions.philox import WORDS, words

_LENGTH = 1 << 18  # entries that share a Philox word: a chunk of the sweep
_PERIOD = 1 << 16
_GOLDEN = 40503  # 2^16 / golden ratio, odd: its multiples modulo 2^16 visit every value once
_KIND = 7


def round_into(out: Tensor, values: Tensor, stream: Stream, start: int) -> None:
    """Round each value to one of its two neighbours in ``out``'s dtype, with probabilities that make the mean exact.

    Values that the dtype holds exactly stay as they are. The dither of entry i is 40503 (u + i) mod 2^16 with a Philox word u for
    every 2^18 entries: uniform for each entry, a function of the stream and the position alone.

    Source: stochastic rounding, Gupta et al., arXiv 1502.02551; here with a golden-ratio dither.

    Args:
        out: bfloat16 or float16, shape (n,).
        values: float32, shape (n,); overwritten.
        stream: names the step.
        start: position of the first value on the trainables' axis.
    """
    first, last = start // _LENGTH, -(-(start + len(values)) // _LENGTH)
    word = words((stream.seed, 0), (stream.query, stream.step, _KIND), first, last - first, torch.device("cpu"))
    pattern = _pattern(values.device)
    for block, shift in enumerate((word[::WORDS] & 0xFFFF).tolist(), start=first):
        lo, hi = max(start, block * _LENGTH) - start, min(start + len(values), (block + 1) * _LENGTH) - start
        at = shift + start + lo - block * _LENGTH
        _round_block(out[lo:hi], values[lo:hi], pattern[at : at + hi - lo])


def _round_block(out: Tensor, values: Tensor, dither: Tensor) -> None:
    if out.dtype == torch.bfloat16:  # the low 16 bits of a float32 are the fraction between two bf16 neighbours
        out.copy_(values.view(torch.int32).add_(dither).bitwise_and_(-65536).view(torch.float32))
        return
    nearest = values.to(out.dtype)
    # Neighbours in magnitude: the bits of a float are ordered like its magnitude.
    bits = nearest.view(torch.int16)
    low = torch.where(nearest.float().abs() > values.abs(), bits - 1, bits)
    high = low + 1
    low_value, high_value = low.view(out.dtype).float().abs(), high.view(out.dtype).float().abs()
    share = (values.abs() - low_value) / (high_value - low_value)
    out.view(torch.int16).copy_(torch.where(dither < share * 65536, high, low))


@lru_cache(maxsize=8)
def _pattern(device: torch.device) -> Tensor:
    """A block and a period more, so that it can start anywhere."""
    return (torch.arange(_LENGTH + _PERIOD, device=device) * _GOLDEN & 0xFFFF).int()
