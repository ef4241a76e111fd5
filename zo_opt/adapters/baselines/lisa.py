"""LISA: a few layers at a time, drawn anew every so many steps (arXiv 2403.17919)."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.full import own_parameters
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.targets import Target, in_layers
from zo_opt.errors import ZOError
from zo_opt.system.layers import layer_of

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


@dataclass(frozen=True)
class LISAConfig(AdapterConfig):
    """gamma random layers are trained in place for K steps, then others are drawn; what is outside of the layers always is.

    Use it to train a whole model by backpropagation, with the optimizer's memory of a few layers.

    Source: arXiv 2403.17919, algorithm 1. gamma is ``blocks``, K is ``interval``. Outside of the layers are embeddings, the final norm and the
    head. [choice] Exactly gamma layers are drawn, uniformly and without replacement, as in the authors' code; in the paper each is drawn
    with probability gamma / N. K = 20 is that code's. ``layers`` says which layers may be drawn; the others stay frozen.

    Call ``model.step(global_step)`` after every optimizer step. The first layers are active at once, and those of any later step follow
    from ``seed`` and the step alone. A layer that is not active has no gradient and does not require one, so that neither momentum nor weight
    decay moves it. The memory saved is the optimizer's: its state for a layer is dropped when the layer's turn is over and begins
    anew when it comes again. Our zeroth-order optimizers count updates for all parameters at once, for which bias correction
    begins anew with all state.

    As in :class:`~zo_opt.FullConfig` the whole model becomes float32, the pretrained weights are gone, and files hold all that may be trained.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.ModuleDict({"head": nn.Linear(8, 2), "layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(6))})
    >>> model = get_adapter_model(net, LISAConfig(blocks=2, interval=5))
    >>> sum(p.numel() for p in trainable_parameters(model)), sum(p.numel() for p in model.parameters() if p.requires_grad)
    (450, 162)
    """

    blocks: int = option(2, "layers that are trained at a time (gamma)")
    interval: int = option(20, "optimizer steps after which others are drawn (K)")
    seed: int = option(0, "of the layers drawn", SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is not None:
            raise ZOError("adapter 'lisa' trains whole layers; leave target_modules out, and say which by layers.")

    def find_targets(self, model: nn.Module) -> list[Target]:
        return []  # nothing is wrapped

    def in_place(self, model: nn.Module) -> list[str]:
        names = own_parameters(model, self)
        inside = {name: place for name in names if (place := layer_of(name)) is not None}
        drawn = [name for name in inside if in_layers(model, name, self.layers)]
        count = len({inside[name] for name in drawn})
        if count < self.blocks:
            raise ZOError(
                f"blocks={self.blocks} layers cannot be drawn from {count}; give fewer blocks, or a model with numbered layers."
            )
        return [name for name in names if name not in inside or name in drawn]

    def schedule(self, model: AdapterModel) -> LISASchedule:
        return LISASchedule(model, self)


class LISASchedule(AdapterSchedule):
    """Which layers require grad."""

    def __init__(self, model: AdapterModel, config: LISAConfig) -> None:
        self._model = weakref.ref(model)  # which owns this
        self._config = config
        self._blocks: dict[tuple[str, int], list[nn.Parameter]] = defaultdict(list)
        for name in model.trained:
            if (place := layer_of(name)) is not None and in_layers(model.wrapped, name, config.layers):
                self._blocks[place].append(model.wrapped.get_parameter(name))
        self._period = torch.tensor(0)
        self._activate()

    def step(self, global_step: int) -> None:
        period = (global_step + 1) // self._config.interval
        if period == int(self._period):
            return
        self._period.fill_(period)
        if over := self._activate():
            model = self._model()
            for optimizer in model.optimizers if model is not None else ():
                _forget(optimizer, over)

    def state(self) -> dict[str, Tensor]:
        return {"period": self._period}

    def restored(self) -> None:
        self._activate()

    def _activate(self) -> list[nn.Parameter]:
        """Make the layers of the period the active ones; the parameters whose turn is over."""
        generator = torch.Generator().manual_seed(self._config.seed_of(int(self._period)))
        drawn = torch.randperm(len(self._blocks), generator=generator)[: self._config.blocks].tolist()
        over = []
        for number, parameters in enumerate(self._blocks.values()):
            for parameter in parameters:
                if number not in drawn and parameter.requires_grad:
                    over.append(parameter)
                    parameter.grad = None  # a gradient left over would let the optimizer move it
                parameter.requires_grad_(number in drawn)
        return over


def _forget(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Drop an optimizer's state of parameters that it no longer moves."""
    gone = {id(p) for p in parameters}
    if not any(id(p) in gone for group in optimizer.param_groups for p in group["params"]):
        return
    if hasattr(optimizer, "update_count"):
        # Ours count the updates of all parameters at once (and a filter's state spans them all): bias correction would take state that
        # is new for old, and the step be several times as long as lr says.
        optimizer.state.clear()
        optimizer.update_count = 0
    else:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
