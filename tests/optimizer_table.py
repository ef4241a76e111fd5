"""One row an optimizer: add one for a new optimizer, and every contract test runs on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optimizer_twins as twins
from optimizer_problem import BATCH, EXAMPLES, LR, Model, make

from zo_opt.directions import LowRank, Subspace
from zo_opt.schedules import constant_queries


@dataclass(frozen=True)
class Row:
    """What an optimizer promises.

    Attributes:
        twin: the published formula; takes a Setting and the number of steps.
        forwards: (step, queries) -> forward passes of that step on one batch.
        options: arguments of its own that make the problem move, the same as the twin's.
        setting: what its twin needs to know besides: directions, queries, rule, weight_decay.
    """

    twin: Callable[..., list[float]]
    options: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    forwards: Callable[[int, int], int] = lambda step, queries: 2 * queries

    @property
    def queries(self):
        return self.setting.get("queries", lambda step: 1)


def adazeta_queries(epoch):
    return min(max(int(0.85 * epoch**0.4), 1), 15)


FOUR, EVERY_EXAMPLE = (lambda step: 4), (lambda step: EXAMPLES)

ROWS = {
    "mezo": Row(twins.mezo),
    "adazeta": Row(twins.mezo, setting={"queries": adazeta_queries, "weight_decay": (0.01, 0.01)}),
    "zo-sign": Row(twins.mezo, setting={"rule": "sign"}),
    "zo-momentum": Row(twins.mezo, {"lr": 0.01}, {"rule": "momentum"}),
    "zo-adam": Row(twins.mezo, setting={"rule": "amsgrad"}),
    "zo-conservative": Row(twins.conservative, {"lr": 0.04}, forwards=lambda step, queries: 2 * queries + 3),
    "sparse-mezo": Row(partial(twins.sparse_mezo, density=0.5), {"density": 0.5, "lr": 0.05}),
    "hizoo": Row(
        partial(twins.hizoo, smoothing=0.05), {"smoothing": 0.05}, forwards=lambda step, queries: 2 * queries + 1
    ),
    "lozo": Row(twins.mezo, {"rank": 2, "interval": 7}, {"directions": LowRank(2, 7)}),
    "subzero": Row(twins.mezo, {"rank": 3, "interval": 7}, {"directions": Subspace(3, 7)}),
    "fzoo": Row(
        twins.fzoo, {"query_schedule": constant_queries(4)}, {"directions": "rademacher", "queries": FOUR},
        forwards=lambda step, queries: queries + 1,
    ),
    "grzo": Row(twins.grzo, {"lr": 0.05}, {"directions": "sign-flip", "queries": EVERY_EXAMPLE}, forwards=lambda step, queries: 2),
    "mezo-svrg": Row(
        partial(twins.mezo_svrg, interval=3), {"interval": 3, "lr": 0.01},
        forwards=lambda step, queries: (2 if step % 3 == 0 else 4) * queries,
    ),
    "forward-gradient": Row(twins.forward_gradient),
    "agzo": Row(
        partial(twins.agzo, rank=2, iterations=2), {"rank": 2, "iterations": 2, "lr": 0.04},
        forwards=lambda step, queries: queries + 1,
    ),
    "p-gap": Row(
        partial(twins.p_gap, rank=3, interval=3, probes=4, delta=0.5),
        {"rank": 3, "interval": 3, "probes": 4, "delta": 0.5},
        {"queries": lambda step: 4 if step % 3 == 0 else 1},
    ),
    "zo-kalman": Row(
        partial(twins.kalman, memory=0.9, noise=0.5), {"memory": 0.9, "noise": 0.5, "lr": 0.2}
    ),
}  # fmt: skip
NAMES = sorted(ROWS)  # backpropagation keeps another contract: tests/test_first_order.py
ONE_QUERY = [name for name in NAMES if ROWS[name].queries(0) == 1]


def build(name, model, **options):
    """The optimizer of a row, with the row's own options."""
    return make(model, name, **(ROWS[name].options | options))


def run(name, steps, model=None, **options):
    """A model after some steps on the whole batch."""
    model = model if model is not None else Model()
    optimizer = build(name, model, **options)
    for _ in range(steps):
        optimizer.step(model, BATCH)
    return model


def setting(name, **options):
    """What the row's twin sees."""
    lr = ROWS[name].options.get("lr", LR)
    return twins.Setting(**({"lr": lambda step: (lr, lr)} | ROWS[name].setting | options))
