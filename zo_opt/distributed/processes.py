"""Several processes on one run: what they share, and how they find each other.

Every rank holds the whole model, draws the same directions from the same seeds and applies the same update, so that the weights stay
equal bit for bit without being sent: losses are all that ranks exchange (:class:`~zo_opt.distributed.ranks.Ranks`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from zo_opt.errors import RankError, ZOError, reason_of

WITHIN = ("sequential", "batched", "split", "auto")


@dataclass(frozen=True)
class Distributed:
    """How ranks share the work of ``query_mode="distributed"``.

    Args:
        share: ``"queries"``: all ranks are given the same batch and take turns at the points to evaluate; the weights equal
            those of one process to the bit (within: sequential). ``"data"``: each rank is given rows of its own (or none) and evaluates all
            points on them; losses are means weighted by rows. ``"2x4"``: both; two groups share the queries, the four ranks
            of a group the data (rank = 4 * group + place).
        within: how a rank evaluates its part: sequential, batched, split (with shared queries alone) or auto.
        check_every: steps between comparisons of the trainables (SHA-256) and, where it is shared, of the batch; the first step
            of a process always compares.
        timeout: seconds for which rank 0 waits for the slowest rank before it stops the run. A rank that has ended is noticed at once.

    Raises:
        ZOError: a value that is not possible.

    >>> Distributed(share="2x4").grid(8)
    (2, 4)
    """

    share: str = "queries"
    within: str = "sequential"
    check_every: int = 100
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.share not in ("queries", "data") and not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.share):
            raise ZOError(
                f'share={self.share!r} is not known; give "queries", "data", or a grid such as "2x4" (query groups x data ranks).'
            )
        if self.within not in WITHIN:
            raise ZOError(f"within={self.within!r} is not known; choose one of {', '.join(WITHIN)}.")
        if self.within == "split" and self.share != "queries":
            raise ZOError('within="split" gives every direction rows of its own already; use it with share="queries".')
        if self.check_every < 1 or not self.timeout > 0:
            raise ZOError(f"check_every={self.check_every} and timeout={self.timeout} must be above 0.")

    def grid(self, ranks: int) -> tuple[int, int]:
        """Groups that share the queries, and ranks in a group that share the data.

        Raises:
            ZOError: the grid asked for has another number of ranks.
        """
        if self.share in ("queries", "data"):
            return (ranks, 1) if self.share == "queries" else (1, ranks)
        groups, members = map(int, self.share.split("x"))
        if groups * members != ranks:
            raise ZOError(f"share={self.share!r} is a grid of {groups * members} ranks; there are {ranks}.")
        return groups, members


def part_of(total: int, parts: int, index: int) -> tuple[int, int]:
    """The range of one of ``parts`` contiguous parts, whose sizes differ by at most one.

    >>> [part_of(5, 3, i) for i in range(3)]
    [(0, 1), (1, 3), (3, 5)]
    """
    return total * index // parts, total * (index + 1) // parts


def world_size() -> int:
    """Processes that a launcher such as torchrun started together; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, each with a GPU of its own where there are some; nothing for a process alone."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # A process that ends is noticed whatever the timeout; rank 0 may evaluate for long while the others wait.
    try:
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as error:
        raise ZOError(
            f"WORLD_SIZE={world_size()} asks for several processes, which do not find each other ({reason_of(error)}); "
            "start them with torchrun, or unset WORLD_SIZE."
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet() -> None:
    """Return when every process has come here; at once where there is one.

    Raises:
        RankError: one of them is gone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    try:
        dist.barrier()
    except RuntimeError as lost:
        raise RankError("another rank is gone before the next step; look at what it said.") from lost
