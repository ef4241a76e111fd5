"""Starting tensor-train adapters where they matter, from forward passes alone.

A direction carries about 1/d of a gradient over d trainables, so few, well placed parameters are what zeroth-order tuning
needs. ``down`` is set to features that tell the classes apart (computed in closed form from hidden states of
training rows), ``up``'s output cores to the directions in which the output head tells the label words apart. What is left
to learn are the mixing cores between them, which start at zero: the model's outputs do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_opt.adapters.tt import TTAdapter
from zo_opt.errors import ZOError
from zo_opt.tensor_train import tt_svd

FEATURES = ("class_means", "components")
FEATURE_SCALE = 0.7  # standard deviation of a feature where it enters tanh: its nearly linear range


@dataclass(frozen=True)
class FeatureMap:
    """x -> x @ weight + bias: weight (H, m), bias (m,). Feature 0 is constant, the rest have zero mean and one scale."""

    weight: Tensor
    bias: Tensor


def class_mean_features(
    x_NH: Tensor, labels_N: Tensor, count: int, *, components: int = 64, shrinkage: float = 0.1
) -> FeatureMap:
    """A constant, the C - 1 Fisher discriminants of the class means, then principal components up to ``count``.

    Discriminants (Fisher 1936) are taken among the leading whitened principal components, with a within-class covariance
    shrunk towards the identity. They use labels, but no gradient.

    Args:
        x_NH: hidden states of N training rows at their label position.
        labels_N: their classes, 0 to C - 1.
        count: features wanted, at least C.
        components: leading principal components in which discriminants are sought.
        shrinkage: what is added to the within-class covariance's diagonal (whitened: total variance 1).
    """
    classes = int(labels_N.max()) + 1
    if count < classes:
        raise ZOError(f"bottleneck={count} is too narrow for {classes} classes; give at least {classes}.")
    whitener_HK, mean_H = _whitener(x_NH, components)
    z_NK = (x_NH.double() - mean_H) @ whitener_HK
    one_hot_NC = torch.nn.functional.one_hot(labels_N, classes).double()
    sizes_C = one_hot_NC.sum(0).clamp(min=1)
    means_CK = (one_hot_NC.T @ z_NK) / sizes_C.unsqueeze(1)
    within_KK = (z_NK - means_CK[labels_N]).T @ (z_NK - means_CK[labels_N]) / len(z_NK)
    factor_KK = torch.linalg.cholesky(within_KK + shrinkage * torch.eye(len(within_KK), dtype=torch.float64))
    scatter_KC = torch.linalg.solve_triangular(
        factor_KK, (means_CK * (sizes_C / len(z_NK)).sqrt().unsqueeze(1)).T, upper=False
    )
    leading_KD = torch.linalg.svd(scatter_KC, full_matrices=False).U[:, : classes - 1]
    discriminants_KD = torch.linalg.solve_triangular(factor_KK.T, leading_KD, upper=True)
    rest_KR = torch.eye(len(within_KK), dtype=torch.float64)[:, : count - classes]
    return _feature_map(x_NH, whitener_HK @ torch.cat([discriminants_KD, rest_KR], dim=1), mean_H, count)


def component_features(x_NH: Tensor, count: int) -> FeatureMap:
    """A constant and the leading whitened principal components: no labels used."""
    whitener_HK, mean_H = _whitener(x_NH, count - 1)
    return _feature_map(x_NH, whitener_HK, mean_H, count)


def label_word_directions(rows_CH: Tensor, scale: float) -> Tensor:
    """Orthogonal directions in which the output head tells the classes apart: (C - 1, H), each of norm ``scale``.

    Args:
        rows_CH: the output head's row of each label's first token (times the final norm's weight where there is one).
        scale: norm of each direction, in units of the hidden states.
    """
    centred_CH = rows_CH.double() - rows_CH.double().mean(0)
    directions_DH: Tensor = torch.linalg.svd(centred_CH, full_matrices=False).Vh[: len(rows_CH) - 1]
    return (directions_DH * scale).float()


@torch.no_grad()
def place(adapter: TTAdapter, features: FeatureMap, directions_DH: Tensor) -> None:
    """Set an adapter's down to the features and its up's output cores to the directions (TT-SVD to their ranks).

    The mixing cores go to zero. ``up``'s rank at the mixing bond must be D (``TTConfig(output_rank=D)``).
    """
    down, up = adapter.down, adapter.up
    split = len(up.in_dims)
    if up.cores[split].shape[0] != len(directions_DH):
        raise ZOError(f"{len(directions_DH)} output directions do not fit output_rank={up.cores[split].shape[0]}.")
    ranks = [core.shape[2] for core in down.cores][:-1]
    weight = features.weight
    for core, value in zip(down.cores, tt_svd(weight, (*down.in_dims, *down.out_dims), ranks), strict=True):
        core.copy_(value)
    if down.bias is not None:
        down.bias.copy_(features.bias)
    outputs = list(up.cores)[split:]
    dims = (len(directions_DH) * up.out_dims[0], *up.out_dims[1:])
    values = tt_svd(directions_DH, dims, [core.shape[2] for core in outputs][:-1])
    for core, value in zip(outputs, values, strict=True):
        core.copy_(value.reshape(core.shape))
    for core in adapter.mixing[:-1]:
        core.copy_(torch.eye(core.shape[0] * core.shape[1], core.shape[2]).reshape(core.shape))
    adapter.start_at_identity()


def _whitener(x_NH: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(H, K) map of centred hidden states to their K leading principal components at unit variance; and the mean."""
    x = x_NH.double().cpu()
    mean_H = x.mean(0)
    _, values, rows_KH = torch.linalg.svd(x - mean_H, full_matrices=False)
    kept = min(components, int((values > 1e-6 * values[0]).sum()))
    return rows_KH[:kept].T * (len(x) ** 0.5 / values[:kept]), mean_H


def _feature_map(x_NH: Tensor, weight_HF: Tensor, mean_H: Tensor, count: int) -> FeatureMap:
    """Scale features to FEATURE_SCALE and put a constant before them; those that the rows cannot give are zero."""
    spread_F = ((x_NH.double().cpu() - mean_H) @ weight_HF).square().mean(0).sqrt()
    weight = torch.nn.functional.pad(weight_HF * (FEATURE_SCALE / spread_F), (1, count - 1 - weight_HF.shape[1]))
    bias = -(mean_H @ weight)
    bias[0] = FEATURE_SCALE
    return FeatureMap(weight.float(), bias.float())
