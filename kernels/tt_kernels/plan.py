"""Which contraction of a tensor train costs the least: counted operations and bytes against a device's roofline.

A contraction is a way to cut the train into groups of neighbouring cores. Each group is merged into one core, then the groups are
applied to the tokens from left to right. Two groups cut where inputs end: the *pair*. One group: *full* reconstruction.
A group for every core: *core by core*. All else: *partial*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from tt_kernels.shapes import core_shapes

MAX_CORES = 8  # beyond it only the pair, full and core by core are weighed: 2^(cores - 1) cuts are too many


@dataclass(frozen=True)
class Device:
    """What a device does in a second, to one digit: only the order of the plans hangs on it.

    Attributes:
        flops: multiplications and additions.
        bytes: moved to or from memory.
        launch: seconds that one operation takes however small it is.
    """

    flops: float
    bytes: float
    launch: float


# The CPU's were fitted on one core: half of the plans chosen were the fastest ones measured, the worst took 1.15 times as long
# (benchmarks/tensor_train.py).
DEVICES = {"cpu": Device(1e11, 1e10, 1.6e-5), "cuda": Device(5e13, 2e12, 8e-6)}
MARGIN = 0.65  # of the pair's time: what another plan must promise to stay below, for the count is a rough one


@dataclass(frozen=True)
class Plan:
    """A contraction and what it costs.

    Attributes:
        groups: how many neighbouring cores are merged together, from the left.
        inputs: how many cores belong to input dims.
        flops: operations of merges and products together (a multiplication and an addition are two).
        bytes: read and written by them.
        seconds: the roofline's estimate.
    """

    groups: tuple[int, ...]
    inputs: int
    flops: int
    bytes: int
    seconds: float

    @property
    def kind(self) -> str:
        """pair, full, core by core or partial."""
        cores = sum(self.groups)
        if self.groups == pair_of(self.inputs, cores):
            return "pair"
        if len(self.groups) == 1:
            return "full"
        return "core by core" if len(self.groups) == cores else "partial"

    def __str__(self) -> str:
        return f"{self.kind} {self.groups}: {self.flops:,} FLOPs, {self.bytes:,} bytes, {self.seconds * 1e6:.0f} us"


def pair_of(inputs: int, cores: int) -> tuple[int, ...]:
    """The groups of the pair (of one matrix, where all cores are on one side)."""
    return (inputs, cores - inputs) if 0 < inputs < cores else (cores,)


def plan(
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    tt_ranks: int | Sequence[int],
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merged: bool = False,
) -> Plan:
    """The cheapest contraction of a train with a batch of tokens.

    Args:
        in_dims, out_dims: factors of the layer's input and output size.
        tt_ranks: ranks of the bonds between cores, or one for all.
        tokens: rows of x.
        dtype: of x.
        device: where it runs; kinds other than cpu and cuda are taken as cuda.
        merged: merges are paid for elsewhere (cached, or once a step).

    >>> plan((8, 8, 16), (8, 8), 5, tokens=1024).kind
    'pair'
    >>> plan((8, 8), (8, 8), 64, tokens=4096).kind  # the pair would be wider than the matrix
    'full'
    """
    return _plan(*_key(in_dims, out_dims, tt_ranks, tokens, dtype, device, merged))


def plans(
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    tt_ranks: int | Sequence[int],
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merged: bool = False,
) -> tuple[Plan, ...]:
    """Every contraction that is weighed, the pair first."""
    return _plans(*_key(in_dims, out_dims, tt_ranks, tokens, dtype, device, merged))


Key = tuple[tuple[int, ...], tuple[int, ...], int | tuple[int, ...], int, int, str, bool]


def _key(
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    tt_ranks: int | Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    merged: bool,
) -> Key:
    ranks = tt_ranks if isinstance(tt_ranks, int) else tuple(tt_ranks)
    kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
    return tuple(in_dims), tuple(out_dims), ranks, tokens, dtype.itemsize, kind, merged


@lru_cache(maxsize=1024)
def _plan(*key: Any) -> Plan:
    weighed = _plans(*key)
    best, pair = min(weighed, key=lambda p: p.seconds), weighed[0]
    return best if best.seconds < MARGIN * pair.seconds else pair


@lru_cache(maxsize=64)
def _plans(
    in_dims: tuple[int, ...],
    out_dims: tuple[int, ...],
    ranks: int | tuple[int, ...],
    tokens: int,
    itemsize: int,
    device: str,
    merged: bool,
) -> tuple[Plan, ...]:
    shapes = core_shapes(in_dims, out_dims, ranks)
    inputs = len(in_dims)
    return tuple(
        _cost(shapes, groups, inputs, tokens, itemsize, DEVICES[device], merged) for groups in _cuts(shapes, inputs)
    )


def _cuts(shapes: Sequence[tuple[int, int, int]], inputs: int) -> Iterator[tuple[int, ...]]:
    cores = len(shapes)
    pair = pair_of(inputs, cores)
    yield pair
    if cores > MAX_CORES:
        yield from {(cores,), (1,) * cores} - {pair}
        return
    for bits in range(1 << (cores - 1)):
        ends = [k + 1 for k in range(cores - 1) if bits >> k & 1] + [cores]
        groups = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
        if groups != pair:
            yield groups


def _cost(
    shapes: Sequence[tuple[int, int, int]],
    groups: tuple[int, ...],
    inputs: int,
    tokens: int,
    itemsize: int,
    device: Device,
    merged: bool,
) -> Plan:
    flops = moved = launches = 0
    seconds = 0.0

    def operation(f: int, b: int) -> None:
        nonlocal flops, moved, launches, seconds
        flops, moved = flops + f, moved + b
        seconds += device.launch + max(f / device.flops, b / device.bytes)

    pair = 0 < inputs < len(shapes) and groups == pair_of(inputs, len(shapes))
    rows, rest = tokens, prod(n for _, n, _ in shapes[:inputs])  # state (rows, rank, rest): rest = inputs still to come
    first = 0
    for size in groups:
        group = shapes[first : first + size]
        rank = group[0][0]
        for a, b, c in () if merged else _merges(group, from_right=pair and first > 0):
            operation(2 * a * b * c, 4 * (a * b + b * c + a * c))
        taken = prod(n for _, n, _ in group[: max(0, inputs - first)])
        made = prod(n for _, n, _ in group[max(0, inputs - first) :])
        last, rest = group[-1][2], rest // taken
        inner, outer = rank * taken, made * last
        operation(2 * rows * inner * outer * rest, itemsize * (rows * rest * (inner + outer) + inner * outer))
        rows *= made
        first += size
    return Plan(groups, inputs, flops, moved, seconds)


def _merges(group: Sequence[tuple[int, int, int]], from_right: bool) -> Iterator[tuple[int, int, int]]:
    """Products (a, b) @ (b, c) that merge neighbouring cores: from the right, as the pair's outputs are, or from the left."""
    if from_right:
        columns = group[-1][1] * group[-1][2]
        for r, n, s in reversed(group[:-1]):
            yield r * n, s, columns
            columns *= n
    else:
        rows = group[0][0] * group[0][1]
        for r, n, s in group[1:]:
            yield rows, r, n * s
            rows *= n
