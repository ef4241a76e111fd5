"""Full fine-tuning: the model's own parameters, trained where they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.targets import Target, in_layers, matches
from zo_opt.adapters.weights import is_quantised
from zo_opt.errors import ZOError


@dataclass(frozen=True)
class FullConfig(AdapterConfig):
    """Every parameter of the model is trained in place, or those of ``layers`` and of the modules that ``target_modules`` names.

    Use it where adapters are not enough; forward passes need no copy of the weights.

    The whole model becomes float32, what stays frozen too. Weights that layers share are trained once and stay shared. Nothing is wrapped,
    so that the pretrained weights are gone: ``unload`` and ``merge_and_unload`` both return the model with what it has learned,
    in float32. ``save_pretrained`` writes all that is trained, and ``load_adapter_model`` puts it into a fresh base model.
    Any optimizer takes it; zeroth-order ones perturb the weights in place and keep no copy of them.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    >>> sum(p.numel() for p in trainable_parameters(get_adapter_model(net, FullConfig())))
    323
    >>> model = get_adapter_model(net, FullConfig(target_modules=["2"]))
    >>> model.trained
    ['2.weight', '2.bias']
    """

    def find_targets(self, model: nn.Module) -> list[Target]:
        return []  # nothing is wrapped

    def in_place(self, model: nn.Module) -> list[str]:
        names = own_parameters(model, self)
        for wanted in self.target_modules or ():
            if not any(within(name, wanted) for name in names):
                raise ZOError(f"target module {wanted!r} matches no module with parameters; name others.")
        if self.target_modules is not None:
            names = [name for name in names if any(within(name, wanted) for wanted in self.target_modules)]
        chosen = [name for name in names if in_layers(model, name, self.layers)]
        if not chosen:
            raise ZOError(f"layers={self.layers!r} leaves no parameter to train; give layers=None for all of them.")
        return chosen


def own_parameters(model: nn.Module, config: AdapterConfig) -> list[str]:
    """All parameters under each of their names, but of modules that are replaced (``modules_to_tensorize``).

    Raises:
        ZOError: one cannot be trained in place, for it holds no floating-point numbers; or weights that are asked for are kept in few bits.
    """
    wanted = config.target_modules
    quantised = next(
        (
            name
            for name, module in model.named_modules()
            if is_quantised(module) and (wanted is None or any(within(f"{name}.weight", one) for one in wanted))
        ),
        None,
    )
    if quantised is not None:
        raise ZOError(
            f"layer {quantised!r} is quantised and cannot be trained in place; load the model without quantisation."
        )
    names = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(within(name, replaced) for replaced in config.modules_to_tensorize or ())
    ]
    for name in names:
        if not model.get_parameter(name).is_floating_point():
            raise ZOError(
                f"parameter {name!r} holds no floating-point numbers and cannot be trained in place; load the model without quantisation."
            )
    return names


def within(parameter: str, module: str) -> bool:
    """Whether a parameter belongs to a module of this name (path ending), or to a module inside one.

    >>> within("model.layers.3.mlp.up_proj.weight", "mlp"), within("model.layers.3.mlp.up_proj.weight", "proj")
    (True, False)
    """
    parts = parameter.split(".")
    return any(matches(".".join(parts[:i]), module) for i in range(1, len(parts)))
