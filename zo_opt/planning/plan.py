"""What a method needs in memory, in closed form: weights, gradients, optimizer state, activations, and the process around them.

Weights, trainables and adapters are counted on the meta device, where tensors have sizes and no values. Activations follow from the
sizes of a layer's linear maps. Nothing is run, so that figures are estimates: ``benchmarks/plan.py`` holds them against real runs.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.adapters import AdapterConfig, AdapterModel, get_adapter_model, trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.models.models import HEADS
from zo_opt.models.precision import bf16_is_fast, set_precision
from zo_opt.optim import OPTIMIZERS
from zo_opt.optim.first_order import FirstOrder
from zo_opt.queries.modes import BATCHED_TOKENS, QUERY_MODES, choose
from zo_opt.queries.substitution import CHUNK as WEIGHT_CHUNK
from zo_opt.system.layers import layer_of
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups
from zo_opt.training.config import TrainConfig
from zo_opt.training.methods import WHOLE_MODEL, Method
from zo_opt.training.recipe import LAYER_SHARE, depth, may_place

PRECISIONS = ("auto", "mixed", "fp32", "bf16")
LOGITS = ("labels", "all")
DEVICES = ("cuda", "cpu")
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Setting:
    """What is common to all methods of a plan.

    Args:
        batch_size: rows a step.
        length: tokens a row.
        precision: mixed, fp32, bf16 (every tensor of the model), or auto: mixed where the device is fast at it.
        device: "cuda" or "cpu": AdamW updates all tensors at once on GPUs and one after another on CPUs.
        head: lm or classification.
        logits: "labels" (the output head at label positions, as zo-opt trains) or "all" (language modelling).
        layers: adapters in the last so many layers; None: in all.
        query_mode: of zeroth-order methods; None: the method's.
    """

    batch_size: int = 16
    length: int = 128
    precision: str = "auto"
    device: str = "cuda"
    head: str = "lm"
    logits: str = "labels"
    layers: int | None = None
    query_mode: str | None = None


@dataclass(frozen=True)
class Footprint:
    """What one method needs, in bytes except ``trainable`` (a number of parameters).

    Attributes:
        trainable: parameters that are trained.
        adapter: what ``save_pretrained`` writes, frozen tensors included.
        weights: the model's tensors, those of adapters included.
        gradients: of all trained parameters; 0 for zeroth-order methods.
        optimizer: what the optimizer keeps from step to step.
        activations: what one step's forward (first order: and backward) pass holds beside them.
        peak: the most bytes of tensors at once in a step.
    """

    trainable: int
    adapter: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def plan_method(skeleton: nn.Module, method: Method, setting: Setting) -> Footprint:
    """What a method needs for a model on the meta device (:func:`make_skeleton`), which is left as it is."""
    raise NotImplementedError
