"""A rank for each layer: checking ``rank_pattern``, and finding one by energy under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache

from torch import nn

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.ranks import search_ranks
from zo_opt.adapters.targets import Target, matches
from zo_opt.adapters.weights import matrix
from zo_opt.errors import ZOError


def search_rank_pattern(
    model: nn.Module, config: AdapterConfig, budget: int, ranks: Sequence[int] = (2, 4, 8, 16, 32)
) -> dict[str, int]:
    """A ``rank_pattern`` for a model: more rank where it holds more of the pretrained weights' energy, within a budget.

    Args:
        model: without adapters; its target weights are read.
        config: a method with a rank; its ``rank`` and ``rank_pattern`` are ignored.
        budget: trainable parameters that all adapters together may have.
        ranks: those to choose from, the ``rank`` of the method each.

    Returns:
        {path of the target: rank}.

    Raises:
        ZOError: the method has no rank, a target is no weight matrix, or the smallest rank everywhere exceeds the budget.

    >>> from dataclasses import replace
    >>> from zo_opt import TTDeltaConfig
    >>> net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    >>> _ = nn.init.ones_(net[1].weight)  # of rank 1
    >>> config = TTDeltaConfig(target_modules=["0", "1"])
    >>> search_rank_pattern(net, config, budget=300, ranks=(1, 2, 4, 8))
    {'0': 8, '1': 1}
    """
    _check_has_rank(config)
    targets = {t.name: t for t in config.find_targets(model)}

    @cache
    def cost(name: str, rank: int) -> int:
        adapter = replace(config, rank=rank, rank_pattern=None).wrap(on_meta(targets[name]), 0).adapter  # type: ignore[call-arg]
        return sum(p.numel() for p in adapter.parameters() if p.requires_grad)

    return search_ranks({name: matrix(t.module) for name, t in targets.items()}, cost, ranks, budget)


def check_rank_pattern(config: AdapterConfig, names: Sequence[str]) -> None:
    """Whether every key means something.

    Raises:
        ZOError: a key that is the end of no adapted module's path, or a method without a rank.
    """
    if not config.rank_pattern:
        return
    if not config.modules_to_tensorize:
        _check_has_rank(config)
    for key in config.rank_pattern:
        if not any(matches(name, key) for name in names):
            raise ZOError(
                f"rank_pattern names {key!r}, which is no adapted module; adapted are {', '.join(names[:4])} ..."
            )


def _check_has_rank(config: AdapterConfig) -> None:
    if "rank" not in {f.name for f in fields(config)}:
        raise ZOError(f"adapters of type {config.adapter_type!r} have no rank; leave rank_pattern and rank search out.")


def on_meta(target: Target) -> Target:
    """The same target without numbers, to count parameters by."""
    sizes = target.in_features, target.out_features
    if target.embedding:
        return replace(target, module=nn.Embedding(*sizes, device="meta"))
    biased = getattr(target.module, "bias", None) is not None
    return replace(target, module=nn.Linear(*sizes, bias=biased, device="meta"))
