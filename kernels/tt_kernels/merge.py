"""Trains merged into pairs of matrices: one train, or all layers of a model in one chain.

Shape suffixes: M = prod in_dims, N = prod out_dims, R the rank in the middle of the train, L layers.
Cores may have leading axes, the same on all cores of a train: such as the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pair:
    """y = x @ A @ B + bias.

    Where N > M the bias is carried as one more rank: A has a zero column whose product starts at one, B has the bias as its last
    row. A bias added the usual way is a pass of its own over the large output, which takes as long as the products
    (measured: 1.3 to 1.7 times faster with it folded in, at 64 -> 1024).

    Attributes:
        a_MR: (..., M, R).
        b_RN: (..., R, N).
        start_R: (R,) or None: what ``x @ a_MR`` is added to.
        bias_N: (..., N) or None: what is added at the end.
    """

    a_MR: Tensor
    b_RN: Tensor
    start_R: Tensor | None = None
    bias_N: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, M) -> (T, N), of a pair without leading axes."""
        h = x @ self.a_MR if self.start_R is None else torch.addmm(self.start_R, x, self.a_MR)
        return h @ self.b_RN if self.bias_N is None else torch.addmm(self.bias_N, h, self.b_RN)

    def to(self, dtype: torch.dtype) -> Pair:
        """The pair in another dtype."""
        if self.a_MR.dtype == dtype:
            return self
        parts = (self.a_MR, self.b_RN, self.start_R, self.bias_N)
        return Pair(*(None if t is None else t.to(dtype) for t in parts))  # type: ignore[arg-type]

    def __getitem__(self, layer: int) -> Pair:
        """One layer of a pair with a leading axis."""
        bias = None if self.bias_N is None else self.bias_N[layer]
        return Pair(self.a_MR[layer], self.b_RN[layer], self.start_R, bias)


def merge_pair(cores: Sequence[Tensor], inputs: int, bias: Tensor | None = None) -> Pair:
    """Contract a train into a pair, W_MN = A_MR @ B_RN, in float32 at least.

    Args:
        cores: shapes (..., r_{k-1}, n_k, r_k), the input dims' cores first.
        inputs: how many of them belong to input dims.
        bias: (..., N) or None.

    Returns:
        The pair, in the cores' dtype.

    >>> import torch
    >>> pair = merge_pair([torch.ones(1, 2, 3), torch.ones(3, 4, 1)], 1)
    >>> pair.a_MR.shape, pair.b_RN.shape
    (torch.Size([2, 3]), torch.Size([3, 4]))
    """
    dtype = cores[0].dtype
    if autocast_dtype(cores[0]) is not None:
        with torch.autocast(cores[0].device.type, enabled=False):
            return merge_pair(cores, inputs, bias)
    if any(core.dtype in LOW for core in cores):
        return merge_pair([c.float() for c in cores], inputs, None if bias is None else bias.float()).to(dtype)
    left, right = cores[:inputs], cores[inputs:]
    a_MR, b_RN = _merge_left(left or _one(right)), _merge_right(right or _one(left))
    if bias is None or b_RN.shape[-1] <= a_MR.shape[-2]:
        return Pair(a_MR, b_RN, None, bias)
    start_R = F.pad(a_MR.new_zeros(a_MR.shape[-1]), (0, 1), value=1.0)
    return Pair(F.pad(a_MR, (0, 1)), torch.cat([b_RN, bias.unsqueeze(-2)], dim=-2), start_R)


def _one(cores: Sequence[Tensor]) -> list[Tensor]:
    """What stands for a side without dims: a core of one entry, 1."""
    return [cores[0].new_ones(*cores[0].shape[:-3], 1, 1, 1)]


def _merge_left(cores: Sequence[Tensor]) -> Tensor:
    """Cores (..., r_{k-1}, n_k, r_k) from rank 1 on -> (..., prod n_k, R)."""
    a = cores[0].flatten(-3, -2)
    for core in cores[1:]:
        a = (a @ core.flatten(-2)).reshape(*core.shape[:-3], -1, core.shape[-1])
    return a


def _merge_right(cores: Sequence[Tensor]) -> Tensor:
    """Cores (..., r_{k-1}, n_k, r_k) down to rank 1 -> (..., R, prod n_k)."""
    b = cores[-1].flatten(-2)
    for core in reversed(cores[:-1]):
        b = (core.flatten(-3, -2) @ b).reshape(*core.shape[:-2], -1)
    return b


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would narrow this tensor to; None where it leaves it alone."""
    kind = tensor.device.type
    if (
        tensor.dtype == torch.float64
        or not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
    ):
        return None
    return torch.get_autocast_dtype(kind)


class MergeCache:
    """The pairs of many trains of equal shapes, merged in one batched chain, and again only when an entry has changed.

    What is compared are the cores' entries, not version counters, which writes through ``.data`` and numpy escape: a result is never
    stale. On an accelerator a comparison would wait for the device and cost more than the merge, so that
    there every call merges.

    >>> import torch
    >>> layers = [[torch.ones(1, 2, 3), torch.ones(3, 4, 1)] for _ in range(5)]
    >>> cache = MergeCache()
    >>> with torch.no_grad():
    ...     pairs = cache(layers, 1)
    ...     print(cache(layers, 1) is pairs)
    ...     _ = layers[0][0].data.mul_(2)
    ...     print(cache(layers, 1) is pairs)
    True
    False
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []
        self._inputs = -1
        self._pairs: list[Pair] = []

    def __call__(
        self, layers: Sequence[Sequence[Tensor]], inputs: int, biases: Sequence[Tensor] | None = None
    ) -> list[Pair]:
        """A pair for each of L trains; kept from call to call only where gradients are off.

        Args:
            layers: L lists of cores (..., r_{k-1}, n_k, r_k), shapes alike from layer to layer.
            inputs: how many cores belong to input dims.
            biases: L biases (..., N), or None.
        """
        stacked = [torch.stack(list(column)) for column in zip(*layers, strict=True)]
        if biases is not None:
            stacked.append(torch.stack(list(biases)))
        comparable = all(map(_comparable, stacked))
        alike = comparable and inputs == self._inputs and len(stacked) == len(self._seen)
        if alike and all(map(_same, stacked, self._seen)):
            return self._pairs
        cores, bias = (stacked, None) if biases is None else (stacked[:-1], stacked[-1])
        merged = merge_pair(cores, inputs, bias)
        pairs = [merged[i] for i in range(len(layers))]
        if comparable:
            self._seen, self._pairs, self._inputs = stacked, pairs, inputs
        return pairs


def _comparable(tensor: Tensor) -> bool:
    """Whether entries can be compared and are all there is: no device to wait for, no gradients, copies or tangents."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and forward_ad._current_level < 0
    )


def _same(new: Tensor, old: Tensor) -> bool:
    """Whether all bits are: as 64-bit words where they fill them, which is 2 to 5 times faster than as numbers."""
    if new.shape != old.shape or new.dtype != old.dtype:
        return False
    if new.numel() * new.element_size() % 8 == 0:
        new, old = new.flatten().view(torch.int64), old.flatten().view(torch.int64)
    return torch.equal(new, old)
