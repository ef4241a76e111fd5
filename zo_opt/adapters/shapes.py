"""Whether a file's tensors are those that its configuration describes: found on the meta device, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.replacement import tensorize
from zo_opt.adapters.targets import find_targets
from zo_opt.errors import ZOError, reason_of


def adapter_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name in ``AdapterModel.adapter_state`` -> shape, of all tensors of the adapters that a configuration asks for.

    Raises:
        ZOError: nothing matches, or sizes that no tensor has.
    """
    targets = [target.on_meta() for target in config.find_targets(model)]
    replaced = (
        [t.on_meta() for t in find_targets(model, config.modules_to_tensorize, None)]
        if config.modules_to_tensorize
        else []
    )
    try:
        modules = config.wrap_all(targets)
        modules |= {t.name: tensorize(t, config.rank_of(t.name, config.tensorize_rank)) for t in replaced}
    except ZOError:
        raise
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        raise ZOError(
            f"the adapter's configuration asks for tensors that there cannot be ({reason_of(error)}); it is damaged, copy it anew."
        ) from error
    found: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, parameter in module.adapter.named_parameters():
            if id(parameter) not in seen:  # several modules may share one, listed under the first
                seen.add(id(parameter))
                found[f"{path}.adapter.{name}"] = tuple(parameter.shape)
    return found


def check_shapes(model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor], what: str) -> None:
    """Whether a file holds all tensors of the adapters, in their shapes. So the adapters take no more memory than the file.

    Raises:
        ZOError: it does not; the sentence names the first that differs.
    """
    # An adapter within an adapted layer has that layer's base_layer in its name.
    shapes = {name.replace(".base_layer.", "."): tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in sorted(adapter_shapes(model, config).items()):
        if (saved := shapes.get(name)) != shape:
            there = "is missing" if saved is None else f"has shape {saved}"
            raise ZOError(f"{what} does not fit this model: {name!r} {there}, expected {shape}.")
