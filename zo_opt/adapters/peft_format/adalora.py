"""AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from zo_opt.adapters.adalora import AdaLoRA, AdaLoRAConfig
from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.peft_format.method import PREFIX, Checkpoint, PeftMethod, take
from zo_opt.errors import ZOError


class AdaLoRAFiles(PeftMethod):
    """``lora_A`` (Q), ``lora_E`` (Lambda) and ``lora_B`` (P). PEFT multiplies by lora_alpha / (init_r + 1e-5), one for all modules."""

    peft_type: ClassVar[str] = "ADALORA"
    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_E", "lora_B")
    options: ClassVar[frozenset[str]] = frozenset(
        (
            *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *("rank_pattern", "qalora_group_size"),
        )
    )

    def write(
        self, config: AdapterConfig, adapted: Mapping[str, AdaptedModule]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert isinstance(config, AdaLoRAConfig)
        adapters: dict[str, AdaLoRA] = {}
        for name, module in adapted.items():
            if not isinstance(module.adapter, AdaLoRA):
                raise self.refusal(name)
            adapters[name] = module.adapter
        rank = max(len(adapter.lora_E) for adapter in adapters.values())
        tensors: dict[str, Tensor] = {}
        for name, adapter in adapters.items():
            # A module of smaller rank gets triplets that are zero; what its own rank scales differently goes into Lambda.
            missing = rank - len(adapter.lora_E)
            e = adapter.lora_E * ((rank + 1e-5) / (adapter.ranknum + 1e-5))
            tensors[f"{PREFIX}{name}.lora_A"] = F.pad(adapter.lora_A, (0, 0, 0, missing))
            tensors[f"{PREFIX}{name}.lora_E"] = F.pad(e, (0, 0, 0, missing))
            tensors[f"{PREFIX}{name}.lora_B"] = F.pad(adapter.lora_B, (0, missing))
        return tensors, {
            "r": rank,
            "init_r": rank,
            "target_r": min(config.target_rank, rank),
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "deltaT": config.interval,
            "orth_reg_weight": config.orthogonality,
            "tinit": 0,  # the phases are over, or another run's to choose
            "tfinal": 0,
            "total_step": config.total_steps or 1,
        }

    def read(self, checkpoint: Checkpoint) -> tuple[AdapterConfig, dict[str, Tensor]]:
        rank = int(checkpoint.number("init_r", 12))
        alpha = checkpoint.number("lora_alpha", 8)
        state: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for path, parts in checkpoint.parts.items():
            a, e, b = (take(parts, name, path, 2) for name in self.names)
            left = _left(checkpoint, path, rank)
            if not len(a) == len(e) == b.shape[1] == left:
                raise ZOError(
                    f"the checkpoint's factors of {path!r} have ranks {len(a)}, {len(e)} and {b.shape[1]}, and its configuration says {left}; "
                    "it is damaged, copy it anew."
                )
            if left == 0:  # PEFT may prune a whole module; here it keeps one triplet, of zeros
                a, e, b = F.pad(a, (0, 0, 0, 1)), F.pad(e, (0, 0, 0, 1)), F.pad(b, (0, 1))
            ranks[path] = len(a)
            state |= {f"{path}.adapter.{name}": tensor for name, tensor in zip(self.names, (a, e, b), strict=True)}
            state[f"{path}.adapter.ranknum"] = a.new_tensor([float(rank)])
        config = AdaLoRAConfig(
            rank=rank,
            target_rank=min(int(checkpoint.number("target_r", 8)), rank),
            alpha=alpha if alpha > 0 else float(rank),
            orthogonality=checkpoint.number("orth_reg_weight", 0.5),
            target_modules=checkpoint.targets,
            rank_pattern={path: r for path, r in ranks.items() if r != rank} or None,
        )
        return config, state


def _left(checkpoint: Checkpoint, path: str, rank: int) -> int:
    """How many triplets the file holds: all, or those that ``rank_pattern`` marks (PEFT leaves pruned ones out)."""
    pattern = checkpoint.values.get("rank_pattern") or {}
    marks = pattern.get(f"{path}.lora_E") if isinstance(pattern, dict) else None
    if marks is None:
        return rank
    if not isinstance(marks, list) or len(marks) != rank or not all(type(mark) is bool for mark in marks):
        raise ZOError(f"the checkpoint's rank_pattern of {path!r} is no list of {rank} truth values; copy it anew.")
    return sum(marks)
