"""Trainables moved along directions, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_opt.directions import StepDirections
from zo_opt.errors import ZOError

CHUNK = 1 << 22  # entries handled at a time when directions are redrawn


@dataclass(frozen=True)
class Perturbed:
    """The trainables of one step with their directions.

    Args:
        parameters: unique trainables, in the order in which directions number them.
        directions: the step's directions.
    """

    parameters: Sequence[Tensor]
    directions: StepDirections

    def stacked(self, scales: Sequence[tuple[int, float]]) -> list[Tensor]:
        """Copies of every parameter at ``theta + scale * z_query``, shape (len(scales), *parameter.shape)."""
        copies = []
        for index, parameter in enumerate(self.parameters):
            z = torch.stack([self.directions.slice(q, index, 0, parameter.numel()) * s for q, s in scales])
            copies.append(parameter.detach() + z.view(-1, *parameter.shape).to(parameter.dtype))
        return copies

    @contextmanager
    def restored(self) -> Iterator[list[Tensor]]:
        """Keep the originals and put them back bit for bit, whatever happens inside."""
        originals = [p.detach().clone() for p in self.parameters]
        try:
            yield originals
        finally:
            interrupted: KeyboardInterrupt | None = None
            while True:  # Ctrl-C during the restore itself: finish it first
                try:
                    for parameter, original in zip(self.parameters, originals, strict=True):
                        parameter.copy_(original)
                    break
                except KeyboardInterrupt as interrupt:
                    interrupted = interrupt
            if interrupted is not None:
                raise interrupted

    def move(self, originals: Sequence[Tensor], query: int, scale: float) -> None:
        """Set the parameters to ``original + scale * z_query``, a chunk at a time."""
        for index, (parameter, original) in enumerate(zip(self.parameters, originals, strict=True)):
            for start in range(0, parameter.numel(), CHUNK):
                stop = min(start + CHUNK, parameter.numel())
                z = self.directions.slice(query, index, start, stop).to(parameter.dtype)
                moved = torch.add(flat(original)[start:stop], z, alpha=scale)
                flat(parameter)[start:stop].copy_(moved)


def flat(parameter: Tensor) -> Tensor:
    """The parameter as one axis, sharing its memory."""
    if not parameter.is_contiguous():
        raise ZOError(
            "a trainable is not contiguous in memory; call .contiguous() on it before giving it to the optimizer."
        )
    return parameter.detach().view(-1)
