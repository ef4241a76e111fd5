"""AdaLoRA's allocation of ranks as functions on tensors (arXiv 2303.10512, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_opt.adapters.sensitivity import Phases, cubic


def budget(step: int, initial: int, target: int, phases: Phases) -> int:
    """b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3 in triplets, rounded down (equation 12).

    Args:
        step: t, from 0.
        initial, target: b_0 and b_T, triplets of all matrices together.

    >>> [budget(t, 24, 16, Phases(2, 4, 10)) for t in range(10)]
    [24, 24, 24, 19, 17, 16, 16, 16, 16, 16]
    """
    return int((initial - target) * cubic(step, phases) + target)


def triplet_scores(s_lambda_R1: Tensor, s_P_OR: Tensor, s_Q_RI: Tensor) -> Tensor:
    """S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij) (equation 7): (r,) from the entries' scores."""
    return s_lambda_R1.view(-1) + (s_Q_RI.mean(dim=1) + s_P_OR.mean(dim=0))


def keep(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Which triplets stay: those whose score is above that of the best one that has to go.

    [code] Triplets that share this score go with it, so that fewer than ``kept`` may stay.

    Args:
        scores: (r,) of each matrix.
        kept: how many may stay in all matrices together.

    Returns:
        (r,) bool for each matrix.

    >>> [m.tolist() for m in keep([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])], 2)]
    [[True, False], [True, False]]
    """
    together = torch.cat([s.cpu() for s in scores])
    gone = len(together) - kept
    if gone <= 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    threshold = float(together.kthvalue(gone).values)
    return [s > threshold for s in scores]
