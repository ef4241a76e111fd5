"""From responses to random shifts of inner activations to the loss's gradient there: the mathematics, without a model.

An adapter's inner activation h (D entries over all sites) is shifted by zo_eps v at each answer position n, v of +-1, its own for every
position and query. The body's output z moves by s = (z(h + zo_eps v) - z(h)) / zo_eps, and the loss's gradient e = dL/dz is known exactly.
So y = e . s is the loss's derivative along v. Wanted is g = dL/dh, of which every query tells one number, v . g = y:

    SPSA           g = mean_q y_q v_q                                           unbiased; a cosine of about sqrt(Q / D)
    feedback       g = J^T e,  J = argmin sum w |s - J v|^2 + ridge |J|^2       over all positions, queries and steps, with forgetting
    with a prior   g = |e| (m + K (y / |e| - V m)),  m = J^T e / |e|            the mean of g given its Q measurements y
                   K = S V^T (V S V^T + noise I)^-1

The last takes u = g / |e| of a position as a draw from N(m, S): J is the mean Jacobian, and S, how positions differ from it, is learned
with it by expectation maximisation, one step of it a training step. S soon has few large directions, and in those the Q measurements say
nearly all. Each row's own measurement then corrects the mean, where it is certain.

Sources: SPSA, Spall 1992; node perturbation with a learned backward path, Lansdell et al., ICLR 2020; the prior is the factor model of
Dempster, Laird and Rubin 1977 (section 4.7) for draws that are seen through random projections. [choice] One step of EM a training step.

Shape suffixes: M answer positions, Q queries, D inner activations, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Feedback:
    """What is known of the way back, float64.

    Attributes:
        products_DD: ridge I + sum w v v^T.
        responses_DH: sum w v s^T; J^T = products^-1 responses.
        spread_DD: S; without entries before the first step.
    """

    products_DD: Tensor
    responses_DH: Tensor
    spread_DD: Tensor

    @classmethod
    def fresh(cls, width: int, hidden: int, ridge: float) -> Feedback:
        """Before anything is measured."""
        zeros = torch.zeros(width, hidden, dtype=torch.float64)
        return cls(ridge * torch.eye(width, dtype=torch.float64), zeros, torch.empty(0, 0, dtype=torch.float64))

    def learn(self, v_QMD: Tensor, s_QMH: Tensor, forgetting: float) -> None:
        """Take in a step's responses; what was known counts ``forgetting`` times as much as before."""
        v, s = v_QMD.flatten(0, 1).double(), s_QMH.flatten(0, 1).double()
        self.products_DD.mul_(forgetting).addmm_(v.T, v)
        self.responses_DH.mul_(forgetting).addmm_(v.T, s)

    def mean(self, e_MH: Tensor) -> Tensor:
        """J^T e, (M, D) float64."""
        found: Tensor = torch.linalg.solve(self.products_DD, self.responses_DH @ e_MH.double().T)
        return found.T

    def posterior(
        self, mean_MD: Tensor, v_QMD: Tensor, y_QM: Tensor, weights_M: Tensor, rate: float, noise: float
    ) -> Tensor:
        """The mean of u given V u = y, (M, D); and a step of EM for S.

        Args:
            mean_MD: m.
            v_QMD: directions.
            y_QM: derivatives along them.
            weights_M: how much each position counts in S; they add up to 1.
            rate: how far S goes towards what this step says of it.
            noise: variance of a measurement, as a share of what the mean leaves open.
        """
        v_MQD = v_QMD.transpose(0, 1).double()
        open_MQ = y_QM.T.double() - torch.einsum("mqd,md->mq", v_MQD, mean_MD)
        scale = (weights_M.double() @ open_MQ.square()).mean()
        if scale == 0:
            return mean_MD
        width = mean_MD.shape[1]
        if not self.spread_DD.numel():
            self.spread_DD = torch.eye(width, dtype=torch.float64) * (scale / width)
        known_MQD = v_MQD @ self.spread_DD
        seen_MQQ = known_MQD @ v_MQD.transpose(1, 2) + noise * scale * torch.eye(v_MQD.shape[1], dtype=torch.float64)
        gain_MQD = torch.linalg.solve(seen_MQQ, known_MQD)
        move_MD = torch.einsum("mqd,mq->md", gain_MQD, open_MQ)
        # E[u u^T | y] = move move^T + S - S V^T (V S V^T + noise)^-1 V S
        share = weights_M.double().sqrt()[:, None, None]
        told = (known_MQD * share).flatten(0, 1).T @ (gain_MQD * share).flatten(0, 1)
        change = (move_MD.T * weights_M.double()) @ move_MD - (told + told.T) / 2
        self.spread_DD = self.spread_DD + rate * change
        return mean_MD + move_MD


def spsa(v_QMD: Tensor, y_QM: Tensor) -> Tensor:
    """mean_q y_q v_q, (M, D) float64: unbiased for entries of mean 0 and variance 1."""
    return torch.einsum("qm,qmd->md", y_QM.double(), v_QMD.double()) / len(v_QMD)
