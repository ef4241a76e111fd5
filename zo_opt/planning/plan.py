"""What a method needs in memory, in closed form: weights, gradients, optimizer state, activations, and the process around them.

Weights, trainables and adapters are counted on the meta device, where tensors have sizes and no values. Activations follow from the
sizes of a layer's linear maps. Nothing is run, so that figures are estimates: ``benchmarks/plan.py`` holds them against real runs.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import nn

from zo_opt.adapters import AdapterModel, get_adapter_model, trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.models.models import pick_device
from zo_opt.models.precision import bf16_is_fast, set_precision
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.optim.zo_kalman import ZOKalman
from zo_opt.planning.activations import Shape, at_once, kept
from zo_opt.queries.modes import copies_at_once, is_worth_batching
from zo_opt.queries.substitution import CHUNK
from zo_opt.queries.trainables import Trainables
from zo_opt.schedules import History
from zo_opt.system.layers import layer_of
from zo_opt.training.build_optimizer import make_optimizer
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import WHOLE_MODEL
from zo_opt.training.recipe import answer_adapter

FLOAT = 4  # bytes of a float32
# Bits a weight, scales and zero points included: of layers, of embedding and head (None: left as they are).
QUANTISED = {"int8": (8, 8), "int4": (5, 8), "bnb-int8": (8, None), "bnb-nf4": (4.127, None)}


@dataclass(frozen=True)
class Setting:
    """What is common to all methods of a plan.

    Args:
        batch_size: rows a step.
        length: tokens a row.
        precision: mixed, fp32, bf16 (every tensor of the model), or auto: mixed where the device is fast at it.
        device: auto (CUDA where there is one), cuda or cpu: AdamW updates all tensors at once on GPUs and one after another on CPUs.
        head: lm or classification.
        logits: labels (the output head at label positions, as zo-opt trains) or all (language modelling).
        layers: adapters in the last so many layers; None: in all.
        query_mode: of zeroth-order methods; None: the method's.
        quantise: the frozen base in few bits, as in ``zo-opt train``; None: in full.
    """

    batch_size: PositiveInt = 16
    length: PositiveInt = 128
    precision: str = "auto"
    device: str = "auto"
    head: str = "lm"
    logits: str = "labels"
    layers: PositiveInt | None = None
    query_mode: str | None = None
    quantise: str | None = None

    @property
    def taken_device(self) -> torch.device:
        """What auto stands for."""
        return pick_device("auto") if self.device == "auto" else torch.device(self.device)

    @property
    def taken_precision(self) -> str:
        """What auto stands for."""
        if self.precision != "auto":
            return self.precision
        return "mixed" if self.taken_device.type == "cuda" or bf16_is_fast(self.taken_device) else "fp32"


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
        loading: the most while the model is read (on CPUs: the mapped checkpoint beside weights of another dtype that are made of it).
        saving: the most while a checkpoint is written, which on CPUs takes three more copies of what is saved.
    """

    trainable: int
    adapter: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    loading: int
    saving: int

    def process(self, base: int) -> int:
        """Bytes that a process takes, with ``base`` for what it takes before anything is loaded."""
        return base + max(self.peak, self.loading, self.saving)


def plan_method(skeleton: nn.Module, config: TrainConfig, setting: Setting) -> Footprint:
    """What a method needs for a model.

    Args:
        skeleton: a model on the meta device, without adapters, float32 (:func:`~zo_opt.planning.skeleton.make_skeleton`); left as it is.
        config: the run's options, of which the adapter and the optimizer matter.
        setting: what is common to all methods.

    Raises:
        ZOError: the method does not fit the model or the setting.

    >>> from zo_opt.training.pairings import get_pairing
    >>> from zo_opt.planning.skeleton import make_skeleton, read_config
    >>> skeleton = make_skeleton(read_config("smollm2-135m-instruct"), "lm", "")
    >>> found = plan_method(skeleton, get_pairing("mezo:tt-lora").config(), Setting(batch_size=2, length=32, precision="fp32"))
    >>> found.weights - found.adapter  # four bytes for each of 134,515,008 parameters, and sixty-four frequencies
    538060288
    """
    shape, config = Shape.of(skeleton), _with(config, setting)
    model = _adapted(deepcopy(skeleton), config, setting)
    trained = trainable_parameters(model)
    trainable, gradient = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    weights = _weights(model, setting)
    width = 2 if setting.taken_precision == "bf16" else FLOAT
    tokens = setting.batch_size * setting.length
    logits = FLOAT * shape.vocabulary * (tokens if setting.logits == "all" else setting.batch_size)
    gradients = 0
    if config.zeroth_order:
        machine = make_optimizer(config, model, trained, lr=1e-3, steps_per_epoch=1)
        assert isinstance(machine, ZerothOrderOptimizer)
        optimizer = _state(machine, trainable)
        schedule = machine.choices.query_schedule
        queries = max(schedule(step, step, History()) for step in (0, config.most_steps))
        batched = min(_batched(config, setting, trainable), 2 * queries)
        forward = max(1, batched) * (tokens * width * at_once(shape, setting.length) + logits * 5 // 2)
        copies = queries if config.mode == "split" else batched or 1
        # Adapters: their copies (one to restore from, or all perturbed ones), the directions. Whole models: a large weight's part at a time.
        small = trainable <= Trainables.SMALL
        activations = forward + (gradient * copies + FLOAT * trainable * queries if small else FLOAT * CHUNK)
        peak = weights + optimizer + activations
    else:
        moving = [p for p in trained if p.requires_grad]  # LISA: a few layers at a time
        gradients = sum(p.nbytes for p in moving)
        optimizer = 2 * FLOAT * sum(p.numel() for p in moving)  # AdamW's two moments
        # Logits in the model's dtype and in float32, their softmax and its gradient.
        activations = tokens * width * kept(shape, model, setting.length) + 4 * logits
        # The most is there where the backward pass begins, with the head's gradient, or where AdamW moves the weights, with temporary copies:
        # of all of them on GPUs, of one on CPUs.
        head = max((p.nbytes for p in moving if tuple(p.shape) == (shape.vocabulary, shape.hidden)), default=0)
        update = gradients + (gradients if setting.taken_device.type == "cuda" else 2 * max(p.nbytes for p in moving))
        peak = weights + optimizer + max(activations + head, update)
    adapter = sum(t.nbytes for t in model.adapter_state().values())
    dtype = getattr(skeleton.config, "dtype", None) or torch.float32  # of the checkpoint, if the config says so
    checkpoint = dtype.itemsize * sum(p.numel() for p in skeleton.parameters())
    on_cpu = setting.taken_device.type == "cpu"
    # Weights of the checkpoint's own dtype stay mapped; others are made of it.
    loading = weights + (checkpoint if on_cpu and weights < checkpoint else 0)
    saving = weights + optimizer + (3 * (adapter + optimizer) if on_cpu else 0)
    return Footprint(trainable, adapter, weights, gradients, optimizer, activations, peak, loading, saving)


def _adapted(model: Any, config: TrainConfig, setting: Setting) -> AdapterModel:
    """The model in the precision it is kept in, with its adapters."""
    if setting.taken_precision == "bf16":
        model.bfloat16()
    else:
        precision = "fp32" if config.adapter_name in WHOLE_MODEL else setting.taken_precision
        set_precision(model, precision, setting.taken_device)
    if config.on_answers:
        return get_adapter_model(model, answer_adapter(config, model))
    layers = None if config.adapter_name in WHOLE_MODEL else setting.layers
    return get_adapter_model(model, config.make_adapter(layers=layers, total_steps=config.most_steps, seed=0))


def _with(config: TrainConfig, setting: Setting) -> TrainConfig:
    """The options in the setting, for a run of many steps: schedules are at their most."""
    mode: Any = setting.query_mode or config.query_mode
    return replace(
        config,
        query_mode=mode if config.zeroth_order else None,
        batch_size=setting.batch_size,
        head=setting.head,  # type: ignore[arg-type]
        steps=10_000,
        lr=None,
    )


def _state(machine: ZerothOrderOptimizer, trainable: int) -> int:
    """Bytes of what a zeroth-order optimizer and its update rule keep of the trainables' shapes."""
    if isinstance(machine, ZOKalman):
        if trainable > machine.LIMIT:
            raise ZOError(f"the Kalman filter takes up to {machine.LIMIT} trainables; there are {trainable:,}.")
        return FLOAT * trainable * (trainable + 1)
    return FLOAT * trainable * len({*machine.choices.update_rule.state_names, *machine.slot_values})


def _batched(config: TrainConfig, setting: Setting, trainable: int) -> int:
    """Copies of the trainables in one forward; 0 where they take turns."""
    copies = copies_at_once(setting.taken_device.type, setting.batch_size * setting.length)
    batched = config.mode == "batched" or (config.mode == "auto" and is_worth_batching(copies, trainable))
    return copies if batched else 0


def _weights(model: AdapterModel, setting: Setting) -> int:
    """Bytes of all tensors, each once, less what quantising the base saves."""
    total = float(sum({id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values()))
    if setting.quantise is not None:
        layers, rest = QUANTISED[setting.quantise]
        bits = {
            id(module.weight): (module.weight, layers if layer_of(name) else rest)
            for name, module in model.wrapped.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.requires_grad
        }
        total -= sum(w.numel() * (w.itemsize - each / 8) for w, each in bits.values() if each is not None)
    return int(total)
