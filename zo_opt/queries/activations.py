"""Queries on inner activations: what an estimator asks of a model whose adapters can be observed and shifted.

Shape suffixes: N sequences, T answer tokens, C copies, D inner activations of all sites, I inputs of one, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from zo_opt.errors import ZOError


class Observed(Protocol):
    """One evaluation at the weights.

    Attributes:
        loss: what the closure returned, without gradient.
        end_NTH: the body's output at the answer positions, which the loss is made from.
        slope_NTH: the loss's exact gradient there; None where the closure's value has none (a reward).
        valid_NT: which answer positions there are.
    """

    @property
    def loss(self) -> Any: ...
    @property
    def end_NTH(self) -> Tensor: ...  # noqa: N802
    @property
    def slope_NTH(self) -> Tensor | None: ...  # noqa: N802
    @property
    def valid_NT(self) -> Tensor: ...  # noqa: N802

    @property
    def at_once(self) -> int:
        """Queries in one forward."""

    def tokens(self, copies: int) -> int:
        """Tokens that a forward of so many copies runs."""


class Sites(Protocol):
    """A model's inner activations: one vector of ``width`` entries for each answer position, over all its adapters."""

    width: int

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What :meth:`gradients` has a gradient for."""

    def observe(self, call: Callable[[], Any]) -> Observed:
        """One evaluation at the weights."""

    def ends(self, call: Callable[[], Any], shifts_CNTD: Tensor) -> Tensor:
        """The body's output with inner activations shifted, (C, N, T, H)."""

    def loss(self, call: Callable[[], Any], shift_NTD: Tensor) -> Any:
        """What the closure returns with inner activations shifted."""

    def gradients(self, observed: Any, delta_NTD: Tensor) -> list[Tensor]:
        """From dL/dh to the parameters' gradients."""


def sites_of(module: nn.Module | None) -> Sites:
    """The inner activations of a model.

    Raises:
        ZOError: it has none.
    """
    make = getattr(module, "activation_sites", None)
    if make is None:
        raise ZOError(
            "queries on activations need the model that has the adapters; give the optimizer module=get_adapter_model(...)."
        )
    sites: Sites = make()
    return sites
