"""How copies and answer tokens lie in what a layer of a model sees.

Shape suffixes: N sequences, S tokens, T answer tokens, C copies, R features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Axis = Literal["tokens", "rows"]


@dataclass(frozen=True)
class Layout:
    """One forward's.

    Attributes:
        axis: copies stand side by side among the tokens, (N, before + C T, .), or are rows of their own, (C N, S, .).
        copies: C.
        sequences: N.
        places_NT: answer positions in the sequences, S where there is none; None: a layer sees answer positions alone.
        valid_NT: which answer positions there are; None: all.
        before: tokens before the copies, which belong to none.
        others_NS: which tokens of the rows are no copy's answer, and run all the same: once, or if copies are rows once a copy; None: none.
    """

    axis: Axis
    copies: int
    sequences: int
    places_NT: Tensor | None = None
    valid_NT: Tensor | None = None
    before: int = 0
    others_NS: Tensor | None = None

    def tokens(self, answers: int, copies: int) -> int:
        """Real tokens that a forward of so many copies runs, of rows with so many answer positions."""
        others = 0 if self.others_NS is None else int(self.others_NS.sum())
        return others * (1 if self.axis == "tokens" else copies) + answers * copies

    def take(self, x: Tensor) -> Tensor:
        """What a layer sees at the answer positions, (C, N, T, R); some layers (OPT's) see all tokens on one axis."""
        if self.axis == "tokens":
            x_NKR = x.reshape(self.sequences, -1, x.shape[-1])[:, self.before :]
            return x_NKR.reshape(self.sequences, self.copies, -1, x.shape[-1]).transpose(0, 1)
        x_CNSR = x.reshape(self.copies, self.sequences, -1, x.shape[-1])
        if self.places_NT is None:
            return x_CNSR
        places = self.places_NT[None, :, :, None].expand(self.copies, -1, -1, x.shape[-1])
        return F.pad(x_CNSR, (0, 0, 0, 1)).gather(2, places)

    def put(self, value_CNTR: Tensor, like: Tensor) -> Tensor:
        """Values at the answer positions in the shape of ``like`` (..., any), zero elsewhere: (..., R)."""
        features = value_CNTR.shape[-1]
        value = value_CNTR
        if self.axis == "tokens":
            value = F.pad(value.transpose(0, 1).flatten(1, 2), (0, 0, self.before, 0))
        if self.places_NT is not None:
            tokens = like.shape[:-1].numel() // (self.copies * self.sequences)
            places = self.places_NT[None, :, :, None].expand(self.copies, -1, -1, features)
            value = value.new_zeros(self.copies, self.sequences, tokens + 1, features).scatter(2, places, value)[
                :, :, :-1
            ]
        return value.reshape(*like.shape[:-1], features)
