"""LoRA+: the factor B learns faster than A (arXiv 2402.12354). Parameter groups, for any optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from zo_opt.adapters.model import trainable_parameters
from zo_opt.adapters.options import check_positive
from zo_opt.errors import ZOError

# B of LoRA, LoRA-FA, DoRA and AdaLoRA, and the vector that stands on that side in VeRA; in PEFT's models and in ours.
_B = ("lora_B", "vera_lambda_b")


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, lr_embedding: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups with lr_B = ratio * lr_A (arXiv 2402.12354, section 4), for any optimizer, zeroth-order ones included.

    ``lr * ratio`` goes to matrices named ``lora_B`` and to all parameters of one axis (DoRA's magnitudes, VeRA's vectors, biases of modules that
    are trained whole), ``lr_embedding`` to everything in adapters of embeddings, ``lr`` to the rest: the rule of the authors' code and of
    PEFT's ``create_loraplus_optimizer``. [choice] Parameters of one axis have no weight decay here (PEFT decays those that are no biases or norms).
    Tensor trains have no B of their own: their cores' rates are left alone, and a model of them is refused.

    Args:
        model: with adapters of this package or of PEFT (``peft.get_peft_model``).
        lr: learning rate of A and of all that has no other.
        ratio: of B's learning rate to A's; the paper proposes 16.
        lr_embedding: learning rate of adapters of embeddings.
        weight_decay: of parameters of two axes or more.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``; empty ones are left out.

    Raises:
        ZOError: an impossible number, or no factor B in the model that would learn at the ratio.

    >>> import torch
    >>> from zo_opt import LoRAConfig, get_adapter_model
    >>> model = get_adapter_model(nn.Sequential(nn.Linear(64, 32)), LoRAConfig(rank=4, target_modules=["0"]))
    >>> optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-4))
    >>> [(group["lr"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
    [(0.0001, [(4, 64)]), (0.0016, [(32, 4)])]
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("lr_embedding", lr_embedding)):
        check_positive(name, value)
    if weight_decay != 0:
        check_positive("weight_decay", weight_decay)
    trained = {id(p) for p in trainable_parameters(model)}
    named = {n: p for n, p in model.named_parameters() if id(p) in trained}
    embedded = _in_embeddings(model)
    if not any(part in _B for n, p in named.items() if id(p) not in embedded for part in n.split(".")):
        raise ZOError(
            "LoRA+ gives the ratio to factors named lora_B of linear layers, and this model trains none; give it a LoRA "
            "(LoRAConfig, LoRAFAConfig, DoRAConfig, AdaLoRAConfig, VeRAConfig), or use the optimizer without lora_plus_groups."
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        fast = parameter.ndim == 1 or any(part in _B for part in name.split("."))
        rate = lr_embedding if id(parameter) in embedded else lr * ratio if fast else lr
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _in_embeddings(model: nn.Module) -> set[int]:
    """ids of the parameters of adapters whose base layer is an embedding."""
    return {
        number
        for module in model.modules()
        if isinstance(base := getattr(module, "base_layer", None), nn.Embedding)
        for number in {id(p) for p in module.parameters()} - {id(p) for p in base.parameters()}
    }
