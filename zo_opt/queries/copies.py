"""Several copies of a module's trainables in one forward: ``vmap`` over ``functional_call``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from zo_opt.errors import ZOError, reason_of
from zo_opt.queries.folded_attention import folded_attention
from zo_opt.queries.losses import as_scalar, taken
from zo_opt.queries.nesting import Leaves
from zo_opt.queries.perturbation import Perturbed, Point
from zo_opt.system.replaced import replaced


@dataclass
class Limits:
    """What one optimizer's evaluations have run into. It ends with the optimizer: no run depends on another.

    Attributes:
        mappable: whether copies of the model can share a forward; False once ``vmap`` failed.
        chunks: (copies in all, shapes of the batch) -> copies that fitted in one forward, where more ran out of memory. Nothing of other
            shapes is concluded from it, so that a resumed run finds the same.
    """

    mappable: bool = True
    chunks: dict[tuple[Any, ...], int] = field(default_factory=dict)


class Copies:
    """Runs the closure on several copies of the trainables in one forward."""

    def __init__(self, module: nn.Module, perturbed: Perturbed, closure: Callable[..., Any], limits: Limits) -> None:
        names = _names(module)
        missing = sum(id(p) not in names for p in perturbed.trainables.parameters)
        if missing:
            raise ZOError(
                f"{missing} of the optimizer's parameters are not in the module given; pass the module that owns them."
            )
        self._names = [names[id(p)] for p in perturbed.trainables.parameters]
        self._perturbed, self._limits = perturbed, limits
        self._closure = _ClosureModule(module, closure)

    def __call__(self, points: Sequence[Point], batch: Any, *, split: bool) -> Tensor:
        """Losses at each point: float64, shape (len(points),); ``split``: each on its own part of the batch, whose first axis counts the points."""
        stacked = self._perturbed.stacked(points)
        copies = {name: copy for names, copy in zip(self._names, stacked, strict=True) for name in names}
        tensors = Leaves(batch)

        def loss(parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
            value = taken(functional_call(self._closure, parameters, (tensors.rebuild(leaves),), tie_weights=False))
            if isinstance(value, Tensor) and value.numel() == 1:
                return value.reshape(())
            return torch.tensor(as_scalar(value), dtype=torch.float64)

        failure: Exception | None = None
        if self._limits.mappable:
            try:
                with masks_without_branches(), folded_attention():
                    run = vmap(loss, in_dims=(0, 0 if split and tensors.leaves else None), randomness="same")
                    return run(copies, tensors.leaves).double().cpu()
            except (RuntimeError, ValueError) as error:
                if isinstance(error, ZOError) or out_of_memory(error):
                    raise
                failure = error
        values = []
        for i in range(len(points)):
            leaves = [x[i] for x in tensors.leaves] if split else tensors.leaves
            values.append(as_scalar(loss({name: copy[i] for name, copy in copies.items()}, leaves)))
        if failure is not None:  # one by one it works, so that vmap is to blame and not the closure
            self._limits.mappable = False
            reason = reason_of(failure)
            warnings.warn(
                f"copies of this model cannot share a forward ({reason}); evaluating them one by one.", stacklevel=2
            )
        return torch.tensor(values, dtype=torch.float64)


def out_of_memory(error: BaseException) -> bool:
    """torch's own error on accelerators, its allocator's sentence on CPUs, or Python's."""
    said = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in said or "can't allocate" in said
    )


def _names(module: nn.Module) -> dict[int, list[str]]:
    """Every place that holds a parameter, each module once.

    functional_call's own tying restores a module that has two names with the copies instead of the parameters. A walk of our own,
    for named_modules takes as long as a layer's forward.
    """
    found: dict[int, list[str]] = {}
    seen, pending = {id(module)}, [("module", module)]
    while pending:
        prefix, owner = pending.pop()
        for name, p in owner._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append(f"{prefix}.{name}")
        for name, child in owner._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append((f"{prefix}.{name}", child))
    return found


class _ClosureModule(nn.Module):
    """A closure over a module as a module, so that ``functional_call`` can replace the module's parameters."""

    def __init__(self, module: nn.Module, closure: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._closure = (closure,)  # in a tuple: a closure that is a module must not become a submodule

    def forward(self, batch: Any) -> Any:
        return self._closure[0](batch)


@contextmanager
def masks_without_branches() -> Iterator[None]:
    """Let transformers build attention masks as it does when traced: without reading the padding mask's values.

    Its shortcut for batches without padding is a branch on data, which ``vmap`` cannot follow.
    """
    with ExitStack() as patches:
        for name in ("transformers.masking_utils", "transformers.modeling_attn_mask_utils"):
            masking = sys.modules.get(name)
            for question in ("is_tracing", "is_torchdynamo_compiling"):  # in 5.x, in 4.57
                if hasattr(masking, question):
                    patches.enter_context(replaced(masking, **{question: lambda tensor=None: True}))
                    break
        yield
