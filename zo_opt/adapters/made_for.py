"""The base that an adapter was trained on, in a few words that are saved with it: how its numbers are kept, and a checksum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zo_opt.adapters.weights import is_quantised
from zo_opt.system.checksum import fingerprint
from zo_opt.system.layers import layer_of


def precision_of(model: nn.Module) -> str:
    """The form of a model's numbers: what ``set_precision`` brought it into ("mixed", "fp32, int4"), else its weights' dtypes.

    >>> precision_of(nn.Linear(2, 3)), precision_of(nn.Linear(2, 3).bfloat16())
    ('fp32', 'bfloat16')
    """
    if (said := getattr(model, "base_precision", None)) is not None:
        return str(said)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    dtypes = dtypes or {p.dtype for p in model.parameters() if p.is_floating_point()}
    form = "fp32" if dtypes <= {torch.float32} else " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    return f"{form}, quantised" if any(is_quantised(m) for m in model.modules()) else form


def base_checksum(model: nn.Module) -> str | None:
    """Of the frozen vectors (norms, biases) in the layers: every form of a model keeps them, and fine-tuning moves them. None without any.

    They are rounded to bf16, so that a checkpoint in float32 and one in bf16 are the same base.
    """
    vectors = {
        name.replace(".base_layer.", "."): p.detach().to(torch.bfloat16)
        for name, p in model.named_parameters()
        if layer_of(name) and p.ndim == 1 and p.is_floating_point() and not p.requires_grad and ".adapter." not in name
    }
    return fingerprint(vectors) if vectors and not any(v.is_meta for v in vectors.values()) else None


def answers_stand(model: nn.Module) -> str | None:
    """Where answers stand in an encoder whose adapters act on them: "beside" its rows, or "within"; None for other models."""
    answers: Any = getattr(model, "answers", None)
    if answers is None or answers.positions.everywhere or answers.positions.kind != "encoder":
        return None
    return "beside" if answers.stands_beside() else "within"


def differences(saved: Mapping[str, Any], model: Any) -> list[str]:
    """Sentences on how a base differs from the one that an adapter was trained on, as far as that is on record.

    Args:
        saved: {"precision": ..., "checksum": ..., "answers": ...} as saved with the adapter; any may be missing.
        model: the base with the adapter in it (an ``AdapterModel``).
    """
    found, base = [], model.wrapped
    there, here = saved.get("precision"), precision_of(base)
    if there is not None and there != here:
        found.append(
            f"the adapter was trained on a base in {there}, and this one is in {here}: its answers differ from those of the run; "
            f'zo_opt.set_precision(model, "{there}", device) before the adapter is loaded brings the base there.'
        )
    checksum = saved.get("checksum")
    if checksum is not None and checksum != base_checksum(base):
        found.append("the adapter was trained on another base: its norms and biases were others than this model's.")
    if saved and (stand := answers_stand(model)) is not None and (stood := saved.get("answers", "within")) != stand:
        found.append(
            f"the adapter was trained with answers {stood} an encoder's rows, and here they stand {stand} them (another version of zo_opt or "
            "transformers): it computes something else; train it anew."
        )
    return found
