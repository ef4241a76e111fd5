"""VeRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.baselines.vera import VeRA, VeRAConfig
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.peft_format.method import PREFIX, Checkpoint, PeftMethod, take
from zo_opt.errors import ZOError

_SHARED = "base_model."


class VeRAFiles(PeftMethod):
    """``vera_lambda_d``, ``vera_lambda_b`` of each module, ``vera_A`` and ``vera_B`` of all."""

    peft_type: ClassVar[str] = "VERA"
    names: ClassVar[tuple[str, ...]] = ("vera_lambda_d", "vera_lambda_b")
    shared: ClassVar[tuple[str, ...]] = (f"{_SHARED}vera_A", f"{_SHARED}vera_B")
    options: ClassVar[frozenset[str]] = frozenset(
        ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")
    )

    def write(
        self, config: AdapterConfig, adapted: Mapping[str, AdaptedModule]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert isinstance(config, VeRAConfig)
        tensors: dict[str, Tensor] = {}
        rank = 0
        for name, module in adapted.items():
            adapter = module.adapter
            if not isinstance(adapter, VeRA):
                raise self.refusal(name)
            rank = len(adapter.vera_A)
            tensors |= {f"{_SHARED}vera_A": adapter.vera_A, f"{_SHARED}vera_B": adapter.vera_B}
            # PEFT knows one rank for all: entries of d beyond a module's own are zero.
            d = F.pad(adapter.vera_lambda_d, (0, rank - len(adapter.vera_lambda_d)))
            tensors |= {f"{PREFIX}{name}.vera_lambda_d": d, f"{PREFIX}{name}.vera_lambda_b": adapter.vera_lambda_b}
        return tensors, {
            "r": rank,
            "save_projection": True,
            "projection_prng_key": 0,  # of no effect: the factors are saved
            "vera_dropout": 0.0,
            "d_initial": config.d_initial,
        }

    def read(self, checkpoint: Checkpoint) -> tuple[AdapterConfig, dict[str, Tensor]]:
        if len(checkpoint.shared) < len(self.shared):
            raise ZOError(
                "the VeRA checkpoint lacks its shared factors vera_A and vera_B; save it with PEFT's save_projection=True."
            )
        state: dict[str, Tensor] = {}
        for path, parts in checkpoint.parts.items():
            state |= {f"{path}.adapter.{name}": take(parts, name, path, 1) for name in self.names}
        first = next(iter(checkpoint.parts))  # in whose name the model lists them
        a, b = (take(checkpoint.shared, name, "all modules", 2) for name in self.shared)
        state |= {f"{first}.adapter.vera_A": a, f"{first}.adapter.vera_B": b}
        d_initial = checkpoint.number("d_initial", 0.1)
        return VeRAConfig(rank=len(a), d_initial=d_initial, target_modules=checkpoint.targets), state
