"""An adapter and what moves it, by the name of their paper, and at which learning rate: what users compare as methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zo_opt.adapters import ADAPTERS
from zo_opt.choices import did_you_mean
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import BACKPROPAGATION, WHOLE_MODEL

OF_WEIGHTS = {"estimator": "two-sided"}


@dataclass(frozen=True)
class Pairing:
    """An optimizer and an adapter: one row of a comparison.

    Attributes:
        name: the name asked for.
        optimizer: "adamw" (backpropagation) or a name of :data:`~zo_opt.optim.OPTIMIZERS`.
        adapter: a name of :data:`~zo_opt.adapters.ADAPTERS`.
        options: other options of ``zo-opt train`` that go with them.
        adapter_options: options of the adapter that do.
    """

    name: str
    optimizer: str
    adapter: str
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter_options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> TrainConfig:
        """Its options, and others."""
        return TrainConfig(
            **{
                "adapter": {"name": self.adapter, **self.adapter_options},
                "optimizer": self.optimizer,
                **self.options,
                **changes,
            }
        )


PAIRINGS: dict[str, Pairing] = {
    pairing.name: pairing
    for pairing in (
        *(
            Pairing(name, BACKPROPAGATION, name)
            for name in (
                *("full", "bitfit", "lora", "dora", "adalora", "lora-fa", "vera", "aflora", "lisa", "lamda", "lamda++"),
                *("adapter", "spectral"),
            )
        ),
        Pairing("lora+", BACKPROPAGATION, "lora", {"loraplus_lr_ratio": 16.0}),
        Pairing("loretta", BACKPROPAGATION, "tt"),
        # MeZO as published but for the learning rate's schedule: one Gaussian query a step, the same for all examples, plain SGD.
        *(
            Pairing(name, optimizer, adapter, {"query_mode": "auto", "directions": "gaussian", "step_control": "none"})
            for name, optimizer, adapter in (("mezo", "mezo", "full"), ("mezo-lora", "mezo", "lora"))
        ),
        Pairing("sparse-mezo", "sparse-mezo", "full", {"query_mode": "auto"}),
        *(Pairing(name, name, "full", {"query_mode": "auto", "step_control": "none"}) for name in ("agzo", "p-gap")),
        # Its own start from the first batch, one-sided differences and Adam.
        Pairing(
            "zo-act",
            "mezo",
            "zo-act",
            {
                "query_mode": "auto",
                "directions": "gaussian",
                "step_control": "none",
                "estimator": "one-sided",
                "update_rule": "adam",
            },
        ),
        # The paper's own start and schedule; its queries split over the batch, which makes them free.
        Pairing("adazeta", "adazeta", "tt"),
        # Of zo-opt train: queries on activations with learned feedback (docs/methods/learning.md), and the same adapters by backpropagation.
        Pairing("adazeta-feedback", "adazeta", "tt-lora"),
        Pairing("tt-lora-answers", BACKPROPAGATION, "tt-lora", adapter_options={"positions": "answer"}),
    )
}

# Orders of magnitude to start a search from, found on SmolLM2-135M in a few dozen steps (benchmarks/results/compare-sst2).
FIRST_ORDER_LR: Mapping[str, float] = {
    "full": 6e-5, "lisa": 6e-5, "adapter": 1e-3, "lamda": 2e-3, "lamda++": 2e-3, "tt": 1e-2, "tt-lora": 1e-2,
    "lora-fa": 1e-2, "adalora": 2e-2, "aflora": 6e-2, "spectral": 6e-2, "vera": 1e-1,
}  # fmt: skip
LOW_RANK_LR = 4e-3
ADAPTER_SGD_LR = 2e-2
# Zeroth-order SGD on whole models: the noise of an estimate grows with the parameters, and the step that is stable falls with them.
# 1e-6 for a model of 10^10 parameters is MeZO's (arXiv 2305.17333).
WHOLE_MODEL_SGD_LR_TIMES_PARAMETERS = 1e4
WHOLE_MODEL_LR = 1e-4


def get_pairing(name: str) -> Pairing:
    """The pairing of that name, or ``optimizer:adapter`` for any two.

    Raises:
        ZOError: it is not known.

    >>> get_pairing("lora+").optimizer, get_pairing("fzoo:tt-lora").adapter
    ('adamw', 'tt-lora')
    """
    if name in PAIRINGS:
        return PAIRINGS[name]
    parts = name.split(":")
    for i in range(1, len(parts)):  # either may be the user's own, with a colon in its name
        optimizer, adapter = ":".join(parts[:i]), ":".join(parts[i:])
        if (optimizer in OPTIMIZERS or ":" in optimizer) and (adapter in ADAPTERS or ":" in adapter):
            OPTIMIZERS.find(optimizer)
            ADAPTERS.find(adapter)
            return Pairing(
                name, optimizer, adapter, OF_WEIGHTS if (optimizer, adapter) == ("adazeta", "tt-lora") else {}
            )
    if len(parts) == 2:
        (ADAPTERS if parts[0] in OPTIMIZERS else OPTIMIZERS).find(parts[1] if parts[0] in OPTIMIZERS else parts[0])
    raise ZOError(
        f"method {name!r} is not known; choose of {', '.join(PAIRINGS)}, or give optimizer:adapter.{did_you_mean(name, PAIRINGS)}"
    )


def default_lr(optimizer: str, adapter: str, *, adam: bool, parameters: int) -> float:
    """Where nothing else is known.

    Args:
        optimizer: "adamw" or a zeroth-order one.
        adapter: its name.
        adam: whether the update's length is lr whatever the gradient's.
        parameters: of the model.

    >>> default_lr("mezo", "full", adam=False, parameters=10**10)
    1e-06
    """
    if optimizer == BACKPROPAGATION:
        return FIRST_ORDER_LR.get(adapter, LOW_RANK_LR)
    if adapter in WHOLE_MODEL:
        return WHOLE_MODEL_LR if adam else min(WHOLE_MODEL_SGD_LR_TIMES_PARAMETERS / parameters, WHOLE_MODEL_LR)
    return 1e-2 if adam else ADAPTER_SGD_LR
