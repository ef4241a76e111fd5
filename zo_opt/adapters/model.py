"""A frozen model with adapters in it: inject, list the trainables, save, load, remove."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_opt.adapters import storage
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.serial import SerialAdapter
from zo_opt.adapters.targets import find_targets
from zo_opt.errors import ZOError


class AdapterModel(nn.Module):
    """A model whose targets are wrapped by adapters. Calls and unknown attributes go to the wrapped model."""

    def __init__(self, wrapped: nn.Module, config: AdapterConfig, adapted: Sequence[str]) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.adapter_config = config
        self.adapted = list(adapted)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The trainables by their path in the wrapped model."""
        return {n: p.detach() for n, p in self.wrapped.named_parameters() if p.requires_grad}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Everything the frozen model does not have: the adapters' tensors, frozen ones included, and modules_to_save."""
        adapters = [m.adapter for m in self.wrapped.modules() if isinstance(m, SerialAdapter)]
        own = {id(p) for adapter in adapters for p in adapter.parameters()}
        return {n: p.detach() for n, p in self.wrapped.named_parameters() if p.requires_grad or id(p) in own}

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (the adapters alone, to the bit)."""
        base = getattr(getattr(self.wrapped, "config", None), "_name_or_path", None)
        storage.save(Path(directory), self.adapter_config, self.adapter_state(), base or None)

    def merge_and_unload(self) -> nn.Module:
        """Fold the adapters into the weights and return the plain model.

        Raises:
            ZOError: the adapters have a nonlinearity between their factors, so that no weight equals them.
        """
        kinds = {type(self.wrapped.get_submodule(n)) for n in self.adapted}
        if SerialAdapter in kinds:
            raise ZOError(
                f"adapters of type {self.adapter_config.adapter_type!r} are serial with a nonlinearity and cannot be merged into "
                "the weights; keep them attached (load_adapter_model), or call unload() to remove them."
            )
        return self.unload()

    def unload(self) -> nn.Module:
        """Remove the adapters and return the model, frozen; ``modules_to_save`` keep what they learned."""
        for name in self.adapted:
            adapted = self.wrapped.get_submodule(name)
            if isinstance(adapted, SerialAdapter):
                _replace(self.wrapped, name, adapted.base_layer)
        return self.wrapped

    def trainable_summary(self) -> str:
        """One line: how many parameters are trained, of how many, in how many adapters."""
        trained = sum(p.numel() for p in trainable_parameters(self))
        total = sum(p.numel() for p in self.parameters())
        adapters = "1 adapter" if len(self.adapted) == 1 else f"{len(self.adapted)} adapters"
        return f"{trained:,} trainable parameters of {total:,} ({100 * trained / total:.2g} %) in {adapters}"


def get_adapter_model(model: nn.Module, config: AdapterConfig) -> AdapterModel:
    """Freeze a model and put adapters into it. The model is changed in place; the outputs are not.

    Args:
        model: any module; for architectures of transformers the targets have defaults.
        config: the method and where it goes, such as ``TTConfig(rank=5, bottleneck=64)``.

    Returns:
        The model with adapters. Trainables are float32 whatever the model's dtype.

    Raises:
        ZOError: nothing matches, no default for this architecture, or the model has adapters already.
    """
    if isinstance(model, AdapterModel) or any(isinstance(m, SerialAdapter) for m in model.modules()):
        raise ZOError("this model has adapters already; call unload() on it before adding others.")
    names = config.target_modules
    if names is None:
        model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        names = config.default_targets(model_type)
        if names is None:
            raise ZOError(
                f"there are no default targets for model type {model_type or type(model).__name__!r}; give target_modules=[...]."
            )
    targets = find_targets(model, names, config.layers)
    saved = [module for name in config.modules_to_save or () for module in _named(model, name)]
    model.requires_grad_(False)
    for number, target in enumerate(targets):
        _replace(model, target.name, config.wrap(target, number))
    for module in saved:
        _train_whole(module)
    return AdapterModel(model, config, [t.name for t in targets])


def load_adapter_model(model: nn.Module, directory: str | Path) -> AdapterModel:
    """Put a saved adapter into its base model, to the bit.

    Raises:
        ZOError: files missing or damaged, or made for a model of other shapes.
    """
    config, tensors = storage.load(Path(directory))
    adapted = get_adapter_model(model, config)
    try:
        storage.restore(adapted.adapter_state(), tensors, f"the adapter in {directory}")
    except ZOError:
        adapted.unload()
        raise
    return adapted


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad, each once."""
    return [p for p in model.parameters() if p.requires_grad]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    modules = [m for n, m in model.named_modules() if n == name or n.endswith("." + name)]
    if not modules:
        raise ZOError(f"module_to_save {name!r} matches nothing in this model.")
    return modules


def _train_whole(module: nn.Module) -> None:
    """Train a module in float32; inside a model of another dtype its inputs and outputs are cast."""
    dtype = next(module.parameters()).dtype
    module.float().requires_grad_(True)
    if dtype != torch.float32:

        def cast(x: Any, to: torch.dtype) -> Any:
            return x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        module.register_forward_pre_hook(lambda _, args: tuple(cast(x, torch.float32) for x in args))
        module.register_forward_hook(lambda _, args, output: cast(output, dtype))
