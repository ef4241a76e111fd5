"""An adapter beside, before or behind a frozen base layer: every adapted module and the one way forward through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zo_opt.adapters.positions import Positions
from zo_opt.adapters.weights import matrix, set_matrix


class AdaptedModule(nn.Module, ABC):
    """A base layer with an adapter; stands where the base layer stood.

    Every forward goes through :meth:`forward`: a kind of adapter says what happens to the input (``before``) and to the output (``after``).
    Attributes that the model's own code asks of the wrapped module (``weight``, ``in_features``) are answered by it.
    Nothing is ever written to the base layer but by ``merge``: ``base_layer`` is the plain module to the bit.
    """

    kind: ClassVar[str]
    merged: ClassVar[str] = "weight"  # the base layer's parameter that merge() writes
    positions: Positions | None = None  # where in a sequence it acts; None: everywhere

    def __init__(self, base_layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's function with the adapter's; x and what is given besides are the base layer's arguments."""
        if self.positions is not None and self.positions.asleep:
            return self.base_layer(x, *args, **kwargs)
        where = None if self.positions is None else self.positions.at(x)
        entering = self.before(x)
        if where is not None and entering is not x:
            entering = torch.where(where, entering, x)
        out = self.base_layer(entering, *args, **kwargs)
        leaving = self.after(x, out)
        return leaving if where is None or leaving is out else torch.where(where, leaving, out)

    def before(self, x: Tensor) -> Tensor:
        """What enters the base layer instead of x."""
        return x

    def after(self, x: Tensor, out: Any) -> Any:
        """What leaves instead of the base layer's ``out``."""
        return out

    @abstractmethod
    def merge(self) -> nn.Module:
        """Fold the adapter into the base layer's weight and return the base layer."""

    def start_from_weight(self) -> None:
        """Set what starts from the base layer's weight (a decomposition, which takes seconds). Not called before loading.

        Raises:
            ZOError: the weight cannot be read as a matrix.
        """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        return self.kind


Probe = Callable[[Tensor, Tensor], Tensor]


class Staged(nn.Module):
    """An adapter in two stages: its input side gives the inner activation h (..., R) of x, its output side what is made of it.

    Attributes:
        inner_features: R; 0: it has no such stages.
        probe: sees x and h, and gives the h that the output side gets.
    """

    inner_features = 0
    probe: Probe | None = None

    def inner(self, x: Tensor) -> Tensor:
        """The input side's function, float32."""
        raise NotImplementedError(f"{type(self).__name__} has no inner activation")

    def input_side(self) -> list[nn.Parameter]:
        """The parameters that :meth:`inner` uses."""
        return []

    def staged(self, x: Tensor) -> Tensor:
        """The inner activation, as the probe wants it."""
        h = self.inner(x)
        return h if self.probe is None else self.probe(x, h)


class Delta(Staged, ABC):
    """A float32 linear map x (..., in) -> (..., out), or token ids (...) -> (..., out), that is added to a base layer's."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """The same map as a matrix, (in, out) float32; row i is what token id i adds in an embedding."""

    def start_from(self, layer: nn.Module) -> None:
        """Set what starts from the base layer's weight; the map stays zero."""


class ParallelAdapter(AdaptedModule):
    """``base_layer(x) + adapter(x)``, summed in float32, in the dtype that the base layer gives.

    >>> class Double(Delta):
    ...     def forward(self, x): return 2 * x
    ...     def dense(self): return 2 * torch.eye(3)
    >>> layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    >>> adapted = ParallelAdapter(layer, Double())
    >>> before = adapted(x)
    >>> torch.allclose(adapted.merge()(x), before)
    True
    """

    kind: ClassVar[str] = "parallel"
    adapter: Delta

    def __init__(self, base_layer: nn.Module, adapter: Delta) -> None:
        super().__init__(base_layer, adapter)
        # Embeddings that multiply what they look up (BART's, Gemma's) multiply a merged delta too.
        self._scaled = isinstance(base_layer, nn.Embedding) and hasattr(base_layer, "embed_scale")

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        delta: Tensor = self.adapter(x.float() if x.is_floating_point() else x)
        if self._scaled:
            scale: Any = self.base_layer.embed_scale
            delta = delta * scale
        return self.add(out, delta).to(out.dtype)

    def add(self, out: Tensor, delta: Tensor) -> Tensor:
        """The base layer's output and the adapter's as one."""
        return out + delta

    def start_from_weight(self) -> None:
        self.adapter.start_from(self.base_layer)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        set_matrix(self.base_layer, self.sum())
        return self.base_layer

    def sum(self) -> Tensor:
        """The weight with the map added, (in, out), at least float32."""
        weight = matrix(self.base_layer)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.adapter.dense()


class SerialAdapter(AdaptedModule):
    """``base_layer(adapter(x))`` (position "before") or ``adapter(base_layer(x))`` (position "after")."""

    kind: ClassVar[str] = "serial"

    def __init__(self, base_layer: nn.Module, adapter: nn.Module, position: str) -> None:
        super().__init__(base_layer, adapter)
        self.position = position

    def before(self, x: Tensor) -> Tensor:
        return self.adapter(x) if self.position == "before" else x

    def after(self, x: Tensor, out: Any) -> Any:
        return self.adapter(out) if self.position == "after" else out

    def merge(self) -> nn.Module:
        raise NotImplementedError("ask the configuration's check_mergeable() first")

    def extra_repr(self) -> str:
        return f"serial, {self.position} the base layer"


class Draw:
    """Initial tensors of an adapter, float32: drawn on the CPU one after the other, then moved; on the meta device none are drawn.

    >>> draw = Draw(torch.device("cpu"), seed=0)
    >>> draw.uniform(2, 3).shape, draw.normal(2).shape
    (torch.Size([2, 3]), torch.Size([2]))
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device, self._generator = device, torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """In [-1, 1)."""
        if self._device.type == "meta":
            return torch.empty(shape, device=self._device)
        return (2 * torch.rand(shape, generator=self._generator, dtype=torch.float32) - 1).to(self._device)

    def normal(self, *shape: int) -> Tensor:
        """Standard Gaussian."""
        if self._device.type == "meta":
            return torch.empty(shape, device=self._device)
        return torch.randn(shape, generator=self._generator, dtype=torch.float32).to(self._device)


def numbers(device: torch.device, *shape: int, value: float = 0.0, trained: bool = True) -> nn.Parameter:
    """A float32 parameter of one value."""
    return nn.Parameter(torch.full(shape, value, device=device, dtype=torch.float32), requires_grad=trained)
