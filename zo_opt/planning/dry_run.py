"""Training steps on the meta device: the true code, on tensors that have sizes and lifetimes but no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from zo_opt.directions import rademacher
from zo_opt.directions.philox import WORDS
from zo_opt.queries import folded_attention
from zo_opt.queries.copies import masks_without_branches
from zo_opt.queries.substitution import Substitution
from zo_opt.queries.trainables import Trainables
from zo_opt.system.memory import LiveBytes

_aten = torch.ops.aten
_attention = (
    F.scaled_dot_product_attention
)  # itself: in torch.nn.functional another stands for it while copies share a forward


class DryRun(LiveBytes):
    """Counts the bytes of tensors, and answers where the code reads a value that a meta tensor does not have.

    A truth value is true (all entries are finite, two tensors are equal); numbers differ from one reading to the next, so that the
    losses of a query differ and the weights are moved. Host tensors, such as projected gradients, are real.

    >>> with DryRun() as run:
    ...     x = torch.ones(1000, device="meta")
    ...     y = float((x * 2).sum())
    >>> run.peak  # x, its double, the sum
    8004
    """

    def __init__(self) -> None:
        super().__init__()
        self._read = 0
        self._known: dict[Any, Any] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is _aten._local_scalar_dense.default:
                return self._answer(first).item()
            if func is _aten.equal.default:
                return True
            if func is _aten._to_copy.default and _to_host(kwargs.get("device")):
                return self._answer(first).to(kwargs.get("dtype") or first.dtype)
        return self._remembered(func, args, kwargs)

    def _remembered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives on meta tensors, asked of torch (in Python, slowly) once for arguments of the same sizes."""
        key = _described((func, args, tuple(kwargs.items())))
        if key is None or any(r.alias_info is not None for r in func._schema.returns):
            return func(*args, **kwargs)
        if key not in self._known:
            out = func(*args, **kwargs)
            known = isinstance(out, Tensor) and out.is_meta and not _shares(out, (args, kwargs))
            self._known[key] = (out.shape, out.stride(), out.dtype) if known else None
            return out
        if (known := self._known[key]) is None:
            return func(*args, **kwargs)
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _answer(self, unknown: Tensor) -> Tensor:
        """A tensor on the host that takes the place of an unknown one."""
        if not unknown.is_floating_point():
            return torch.ones(unknown.shape, dtype=unknown.dtype)
        self._read += 1
        return 1 + torch.arange(self._read, self._read + unknown.numel(), dtype=unknown.dtype).remainder(7).view(
            unknown.shape
        )


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """Within this context meta tensors can be trained; masks are built as for rows of different lengths, attention is fused."""
    with ExitStack() as stack:
        stack.enter_context(masks_without_branches())
        stack.enter_context(patch.object(Trainables, "_gather", _gather))
        stack.enter_context(patch.object(Trainables, "spread", _spread))
        stack.enter_context(patch.object(Substitution, "_rows", _rows))
        stack.enter_context(patch.object(rademacher, "words", _words))
        stack.enter_context(
            patch.object(torch, "is_autocast_enabled", lambda *_: False)
        )  # which refuses to speak of meta tensors
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _fused))
        stack.enter_context(patch.object(folded_attention, "_original", _fused))
        yield stack.enter_context(DryRun())


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel for CPUs: it keeps the output and a number a row and head, as those of GPUs do.

    On the meta device torch itself falls back to attention that keeps all scores.
    """
    plain = query.is_meta and query.ndim == 4
    if not plain or (attn_mask is not None and attn_mask.requires_grad):  # no fused kernel differentiates the mask
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch itself does, in every layer
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, zero, zero - torch.inf)
    out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


def _gather(self: Trainables) -> Tensor | None:
    """Trainables in one buffer, as they are on devices: tensors without values have no addresses by which the true code looks for overlaps."""
    if len({(p.dtype, p.device) for p in self.parameters}) > 1:
        return None
    flat = torch.cat([p.detach().view(-1) for p in self.parameters])
    for parameter, part in zip(self.parameters, flat.split(self.sizes), strict=True):
        parameter.data = part.view(parameter.shape)
    return flat


def _spread(_self: Trainables, values: Tensor, start: int, stop: int) -> Tensor:
    """A value an entry of a range, whose sizes torch would read from a tensor."""
    return values.new_empty(stop - start)


def _rows(self: Substitution, number: int, ids: Tensor, weight: Tensor) -> Tensor:
    """An embedding's perturbed rows, as if every token were another."""
    assert self._values is not None
    rows, columns = weight.shape
    out = weight.new_empty(min(ids.numel(), rows), columns)
    self._values(number, 0, min(rows, max(1, (1 << 16) // columns)) * columns)
    return F.embedding(ids, out)


def _words(_key: Any, _counter: Any, _first: int, blocks: int, device: torch.device) -> Tensor:
    """Bits of a direction, without the hundreds of operations that they take on a device."""
    return torch.empty(WORDS * blocks, dtype=torch.int64, device=device)


def _described(value: Any) -> Any:
    """Sizes in place of tensors; None where there is more to it."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, tuple | list):
        parts = tuple(_described(v) for v in value)
        return None if any(p is None for v, p in zip(value, parts, strict=True) if v is not None) else parts
    return None if isinstance(value, torch.Generator) else (type(value), value)


def _shares(out: Tensor, given: Any) -> bool:
    """Whether a result is one of the arguments in another shape, which some operations' schemas do not say."""
    memories = {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, Tensor)}
    return out.untyped_storage()._cdata in memories


def _to_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"
