"""The inner activations of a model's adapters: observed, shifted, and the way from them to the adapters' parameters.

Shape suffixes: N sequences, T answer tokens, C copies, D inner activations of all sites, R of one, I inputs, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_opt.adapters.adapted import Probe, Staged
from zo_opt.adapters.layout import Layout
from zo_opt.errors import ZOError
from zo_opt.system.replaced import replaced

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


FEWEST_AT_ONCE, MOST_AT_ONCE = 4, 32  # queries in one forward
TOKENS_AT_ONCE = 512  # of all of them: more is no faster, and takes memory


@dataclass(frozen=True)
class Observed:
    """One evaluation at the weights.

    Attributes:
        loss: what the closure returned, without gradient.
        end_NTH: the body's output at the answer positions, which the loss is made from.
        slope_NTH: the loss's exact gradient there; None where the closure's value has none (a reward).
        inputs: of each site its input, (N, T, I); of what is written, with a forward a token, the mean over these (N, 1, I).
        beyond: exact gradients of what is trained behind the body's output (a new head).
        valid_NT: which answer positions there are.
        layout: of the forward.
    """

    loss: Any
    end_NTH: Tensor
    slope_NTH: Tensor | None
    inputs: Sequence[Tensor]
    beyond: Sequence[Tensor | None]
    valid_NT: Tensor
    layout: Layout

    @property
    def at_once(self) -> int:
        """Queries in one forward: the same for any number of processes, so that they compute the same bits."""
        return max(FEWEST_AT_ONCE, min(MOST_AT_ONCE, TOKENS_AT_ONCE // max(self.end_NTH[..., 0].numel(), 1)))

    def tokens(self, copies: int) -> int:
        """Tokens that a forward of so many copies runs."""
        return self.layout.tokens(int(self.valid_NT.sum()), copies)


class ActivationSites:
    """Where a model's inner activations are: :class:`~zo_opt.queries.activations.Sites` of adapters at answer positions.

    Args:
        model: its adapters act from the answer on.

    Raises:
        ZOError: they act everywhere, have no inner activation, or something is trained that the way back does not reach.
    """

    def __init__(self, model: AdapterModel) -> None:
        if model.answers is None or model.positions is None:
            raise ZOError(
                "queries on activations need adapters that act from the answer on: each token would need directions of its own; give the "
                "adapter positions='answer'."
            )
        self._answers = model.answers
        body = {id(module) for module in self._answers.body.modules()}
        within = {name: module.adapter for name, module in model.adapted_modules().items() if id(module) in body}
        self._adapters: list[Staged] = [a for a in within.values() if isinstance(a, Staged) and a.inner_features]
        if len(self._adapters) < len(within) or not within:
            kind = model.adapter_config.adapter_type
            raise ZOError(f"adapter {kind!r} has no inner activation to query; take tt, tt-lora or lora.")
        ends = list(accumulate(adapter.inner_features for adapter in self._adapters))
        self._slices = [slice(end - a.inner_features, end) for end, a in zip(ends, self._adapters, strict=True)]
        self.width = ends[-1]
        self._inputs = [_input_side(adapter) for adapter in self._adapters]
        own = {id(p) for name in within for p in model.wrapped.get_submodule(name).parameters()}
        before = (m for m in self._answers.body.modules() if isinstance(m, nn.Embedding))
        inside = {id(p) for m in (*self._answers.recorder.layers, *before) for p in m.parameters()}
        self._beyond = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        if lost := [n for n, p in model.wrapped.named_parameters() if p.requires_grad and id(p) in inside - own]:
            raise ZOError(
                f"{lost[0]} is trained, which queries on activations do not reach; leave it out of what is trained."
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that :meth:`gradients` has a gradient for."""
        return [*(p for side in self._inputs for p in side), *self._beyond]

    def observe(self, call: Callable[[], Any]) -> Observed:
        """One evaluation at the weights, with the exact gradient of its loss from the body's output on.

        Raises:
            ZOError: the model was not run, or several times and not as it is when it writes; or an adapter was not reached.
        """
        ends: list[Tensor] = []
        inputs: list[list[Tensor]] = [[] for _ in self._adapters]

        def end(hidden_CNTH: Tensor) -> Tensor:
            ends.append(hidden_CNTH.detach().requires_grad_())
            return ends[-1]

        def seeing(site: int) -> Probe:
            def probe(x: Tensor, h: Tensor) -> Tensor:
                if not self._answers.trying:
                    inputs[site].append(self._answers.layout.take(x)[0])
                return h

            return probe

        probes = [seeing(site) for site in range(len(self._adapters))]
        with torch.enable_grad(), warnings.catch_warnings(), self._probed(probes, ended=end):
            # Of a closure that returns a float.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
            loss = call()
            total = loss.sum() if isinstance(loss, Tensor) else None
        differentiable = total is not None and total.requires_grad
        writes = len(ends) > 1 and not differentiable and all(x.shape[2] == 1 for x in ends)
        if len(ends) != 1 and not writes:
            raise ZOError(
                f"the closure ran the model {len(ends)} times; with queries on activations it is to run it once, unless it writes text "
                "and returns numbers without a gradient."
            )
        hidden_NTH, valid = ends[0][0], self._answers.layout.valid_NT
        if valid is None:
            valid = torch.ones(hidden_NTH.shape[:2], dtype=torch.bool, device=hidden_NTH.device)
        if not all(inputs):
            raise ZOError("an adapter was not reached by the closure's forward; adapt modules that the model runs.")
        grads: tuple[Tensor | None, ...] = (None,)
        if total is not None and differentiable:
            grads = torch.autograd.grad(total, [ends[0], *self._beyond], allow_unused=True)
        return Observed(
            loss.detach() if isinstance(loss, Tensor) else loss,
            hidden_NTH.detach(),
            None if grads[0] is None else grads[0][0],
            # The shift is the same at every token that is written; its derivative is shared out among them.
            [torch.cat(x, 1).mean(1, keepdim=True) if writes else x[0] for x in inputs],
            list(grads[1:]),
            valid,
            self._answers.layout,
        )

    def ends(self, call: Callable[[], Any], shifts_CNTD: Tensor) -> Tensor:
        """The body's output at shifted inner activations, (C, N, T, H); the rest of the closure is not run."""
        with self._probed(self._shifting(shifts_CNTD), copies=len(shifts_CNTD)):
            return self._answers.end_of(call)

    def loss(self, call: Callable[[], Any], shift_NTD: Tensor) -> Any:
        """What the closure returns at shifted inner activations."""
        with torch.no_grad(), self._probed(self._shifting(shift_NTD.unsqueeze(0)), ended=lambda hidden: hidden):
            return call()

    def gradients(self, observed: Observed, delta_NTD: Tensor) -> list[Tensor]:
        """For each of :attr:`parameters` the gradient that dL/dh (N, T, D) amounts to: exact within the adapters."""
        found: list[Tensor] = []
        for adapter, x, side, where in zip(self._adapters, observed.inputs, self._inputs, self._slices, strict=True):
            with torch.enable_grad():
                h = adapter.inner(x.float())
                found += torch.autograd.grad(h, side, delta_NTD[..., where].to(h.dtype))
        beyond = zip(observed.beyond, self._beyond, strict=False)
        return [*found, *(torch.zeros_like(p) if g is None else g for g, p in beyond)]

    def _shifting(self, shifts_CNTD: Tensor) -> list[Probe]:
        def shifting(where: slice) -> Probe:
            def probe(_x: Tensor, h: Tensor) -> Tensor:
                if self._answers.trying:
                    return h
                return h + self._answers.layout.put(shifts_CNTD[..., where].to(h.dtype), h)

            return probe

        return [shifting(where) for where in self._slices]

    @contextmanager
    def _probed(self, probes: Sequence[Probe], **of_answers: Any) -> Iterator[None]:
        """Within this context adapters have these probes, and the forward from the answer on these attributes."""
        with ExitStack() as stack:
            stack.enter_context(replaced(self._answers, **of_answers))
            for adapter, probe in zip(self._adapters, probes, strict=True):
                stack.enter_context(replaced(adapter, probe=probe))
            yield


def _input_side(adapter: Staged) -> list[nn.Parameter]:
    """The trained parameters of an adapter's input side.

    Raises:
        ZOError: others of it are trained too, or none is.
    """
    side = [p for p in adapter.input_side() if p.requires_grad]
    if not side or len(side) < sum(p.requires_grad for p in adapter.parameters()):
        raise ZOError(
            "queries on activations reach the input side of an adapter alone, and its output side is trained as well; give the adapter "
            "trainable='input'."
        )
    return side
