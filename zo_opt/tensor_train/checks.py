"""What every function on trains shares: checking what was given, and cutting a bond."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_opt.errors import ZOError

Ranks = int | Sequence[int]


def check_dims(dims: Sequence[int], name: str = "dims") -> tuple[int, ...]:
    """The dims as a tuple; ZOError unless they are one or more whole numbers of at least 1."""
    if not dims or any(type(n) is not int or n < 1 for n in dims):
        raise ZOError(f"{name}={tuple(dims)} is not possible; give one or more whole numbers of at least 1.")
    return tuple(dims)


def check_cores(cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores in float64 on the CPU, without gradient; ZOError unless they are a train of finite numbers."""
    if not cores:
        raise ZOError("no cores were given; a train has at least one, of shape (1, n, 1).")
    rank = 1
    for k, core in enumerate(cores):
        if core.ndim != 3 or core.shape[0] != rank or 0 in core.shape:
            raise ZOError(f"core {k} has shape {tuple(core.shape)}; give ({rank}, n, r), each at least 1.")
        if not core.isfinite().all():
            raise ZOError(f"core {k} holds NaN or infinite values; give finite numbers.")
        rank = core.shape[2]
    if rank != 1:
        raise ZOError(f"the last core has shape {tuple(cores[-1].shape)}; a train ends in rank 1.")
    return [core.detach().double().cpu() for core in cores]


def check_bound(bonds: int, ranks: Ranks | None, tolerance: float | None) -> list[int] | None:
    """One rank a bond, or None where the tolerance decides; ZOError unless exactly one of the two is given and possible."""
    if (ranks is None) == (tolerance is None):
        given = "neither was" if ranks is None else "both were"
        raise ZOError(f"give either ranks or a tolerance; {given} given.")
    if tolerance is not None:
        if not 0 <= tolerance < 1:
            raise ZOError(f"tolerance={tolerance} is not possible; give a relative error of at least 0 and below 1.")
        return None
    listed = [ranks] * bonds if isinstance(ranks, int) else list(ranks or ())
    if len(listed) != bonds or any(type(r) is not int or r < 1 for r in listed):
        raise ZOError(
            f"ranks={ranks} is not possible; give a whole number, or one for each of {bonds} bonds, at least 1."
        )
    return listed


def bond_error(tolerance: float, norm: float, bonds: int) -> float:
    """What may be cut at each bond so that all cuts together stay within the tolerance: Oseledets 2011, theorem 2.2."""
    return tolerance * norm / math.sqrt(max(bonds, 1))


def cut(matrix_MN: Tensor, rank: int | None, error: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best U_MR @ V_RN of at most ``rank``, or of the least rank (at least 1) within a Frobenius ``error``.

    U has orthonormal columns. Shape suffixes: M rows, N columns, K all singular values, R those kept.
    """
    u_MK, s_K, v_KN = torch.linalg.svd(matrix_MN, full_matrices=False)
    if rank is None:
        lost_K = s_K.square().flip(0).cumsum(0).flip(0).sqrt()  # entry k: the error when k values are kept
        rank = max(1, int((lost_K > error).sum()))
    return u_MK[:, :rank], s_K[:rank, None] * v_KN[:rank]
