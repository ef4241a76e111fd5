"""The linear layer whose weight is a tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tt_kernels import Pair, core_shapes, factorize, merge_pair, tt_linear, useful_ranks

from zo_opt.tensor_train import tt_svd


class TTLinear(nn.Module):
    """A linear layer whose weight is a tensor train: x (..., prod in_dims) -> (..., prod out_dims), float32.

    The train is float32 cores (r_{k-1}, n_k, r_k) of a matrix (prod in_dims, prod out_dims), the input dims' cores first.

    >>> layer = TTLinear((2, 3), (2, 2), 2, bias=True, device=torch.device("cpu"))
    >>> layer.reset(torch.Generator().manual_seed(0))
    >>> layer
    TTLinear(in_dims=(2, 3), out_dims=(2, 2), ranks=[2, 2, 2], bias=True)
    >>> layer(torch.ones(5, 6)).shape, layer.dense().shape
    (torch.Size([5, 4]), torch.Size([6, 4]))
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dims: Sequence[int],
        ranks: int | Sequence[int],
        *,
        bias: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_dims, self.out_dims = tuple(in_dims), tuple(out_dims)
        shapes = core_shapes(in_dims, out_dims, ranks)
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(s, device=device)) for s in shapes)
        self.pair: Pair | None = None  # the merged cores, while a forward of the whole model has merged them
        self.bias = nn.Parameter(torch.zeros(math.prod(out_dims), device=device)) if bias else None

    @property
    def ranks(self) -> list[int]:
        """One for each bond between two cores."""
        return [core.shape[2] for core in self.cores][:-1]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Gaussian cores such that an entry of the matrix has variance 1 / prod(in_dims). Drawn on the CPU."""
        variance = 1 / math.prod(self.in_dims)
        paths = math.prod(core.shape[2] for core in self.cores)
        std = (variance / paths) ** (0.5 / len(self.cores))
        for core in self.cores:
            core.copy_(torch.randn(core.shape, generator=generator) * std)

    @torch.no_grad()
    def start_at_zero(self, generator: torch.Generator) -> None:
        """The zero matrix: the largest core is zero, cores before it have orthogonal columns and cores behind it orthogonal rows, of norm 2.

        [choice] So the first step can go in as many directions as one core has entries, and its entries are coordinates of the matrix: one
        lr fits all sizes. With a small core at zero, a rank's worth of random features is all that can be learned at first. The norm
        makes the other cores' entries large beside Adam's steps, which turn them slowly.
        """
        largest = max(range(len(self.cores)), key=lambda i: self.cores[i].numel())
        for i, core in enumerate(self.cores):
            drawn = torch.randn(core.shape, generator=generator, dtype=torch.float64)
            if i == largest:
                core.zero_()
            elif i < largest:
                core.copy_(2 * torch.linalg.qr(drawn.flatten(0, 1))[0].view(core.shape))
            else:
                core.copy_(2 * torch.linalg.qr(drawn.flatten(1).T)[0].T.reshape(core.shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.pair is not None:
            y_TN = self.pair(x.reshape(-1, x.shape[-1]))
            return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])
        return tt_linear(x, list(self.cores), in_dims=self.in_dims, out_dims=self.out_dims, bias=self.bias)

    @torch.no_grad()
    def decompose(self, matrix_MN: Tensor) -> None:
        """Set the cores to the TT-SVD (Oseledets 2011, algorithm 1) of a matrix at the train's own ranks.

        [choice] The cores are scaled to one norm an entry, for all are perturbed alike; TT-SVD leaves the norm in the last.
        """
        cores = tt_svd(matrix_MN, (*self.in_dims, *self.out_dims), self.ranks, dtype=torch.float64)
        sizes = torch.stack([core.square().mean().sqrt() for core in cores])
        # The geometric mean over all cores; of a zero matrix nothing can be scaled.
        common = sizes.log().mean().exp() if bool((sizes > 0).all()) else None
        for core, value, size in zip(self.cores, cores, sizes, strict=True):
            core.copy_(value if common is None else value * (common / size))

    def dense(self) -> Tensor:
        """The matrix, (prod in_dims, prod out_dims), float32."""
        pair = merge_pair(list(self.cores), len(self.in_dims))
        return pair.a_MR @ pair.b_RN

    def extra_repr(self) -> str:
        return f"in_dims={self.in_dims}, out_dims={self.out_dims}, ranks={self.ranks}, bias={self.bias is not None}"

    def __repr__(self) -> str:  # the cores' shapes follow from these: a line each would be noise
        return f"{type(self).__name__}({self.extra_repr()})"


def useful_train(
    in_dims: Sequence[int], out_dims: Sequence[int], rank: int, *, bias: bool, device: torch.device
) -> TTLinear:
    """A train of one inner rank, or less where a bond cannot use so much."""
    return TTLinear(in_dims, out_dims, useful_ranks((*in_dims, *out_dims), rank), bias=bias, device=device)


def tt_dims(size: int) -> tuple[int, ...]:
    """Factors of a layer's size, ascending: ceil(log16(size)) of them or fewer, as equal as possible.

    [choice] This gives the published shapes of Llama-2-7B, RoBERTa-base and -large (arXiv 2406.18060).

    >>> tt_dims(4096), tt_dims(1024), tt_dims(768), tt_dims(97), tt_dims(1)
    ((16, 16, 16), (8, 8, 16), (8, 8, 12), (97,), (1,))
    """
    return factorize(size, max(digits(size - 1), 1))


def digits(number: int) -> int:
    """Hexadecimal digits of a number, none of 0: floor(log16(number)) + 1.

    >>> digits(15), digits(16), digits(0)
    (1, 2, 0)
    """
    return -(-number.bit_length() // 4)
