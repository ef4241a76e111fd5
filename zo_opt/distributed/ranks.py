"""A process among the ranks of a run: it evaluates its part of a step's losses and gets all of them.

An exchange is a monitored barrier, at which rank 0 learns who is gone or late, and an all_gather of one message a rank: every rank sees
all of them, and decides the same. Always over gloo, whatever backend the run uses otherwise: losses are numbers on the CPU by then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zo_opt.distributed.processes import Distributed, part_of, world_size
from zo_opt.errors import RankError, ZOError
from zo_opt.queries.nesting import batch_size, map_tensors, tokens
from zo_opt.queries.trainables import Trainables
from zo_opt.system.checksum import checksum, fingerprint

T = TypeVar("T")
SLOTS, TEXT_BYTES = 32, 1024  # for losses in a message; of what a rank says


class _Head(NamedTuple):
    """What a rank's message begins with, as int64 numbers; losses (their bits) follow. ``plan``, ``trainables``, ``batch``: checksums."""

    failed: int
    plan: int
    trainables: int
    batch: int
    rows: int
    tokens: int
    stop: int


_HEAD = len(_Head._fields)


class Ranks:
    """This process among the ranks of a run; one without others where no process group was made.

    Attributes:
        stop_wanted: set to a number above 0 to ask all ranks to stop; sent with the next losses.
        stop: the largest number that any rank asked with, the same on all ranks after every step.
        tokens: of the last batch, those of all ranks' rows; None where there are no others.
    """

    def __init__(self, options: Distributed) -> None:
        self.options = options
        self.stop_wanted = self.stop = 0
        self.tokens: int | None = None
        self._plan, self._step, self._sums, self._compared = "", 0, (0, 0), -1

    @property
    def rank(self) -> int:
        """This process's number."""
        return dist.get_rank() if self.size > 1 else 0

    @property
    def size(self) -> int:
        """How many ranks there are.

        Raises:
            ZOError: a launcher started several, which do not know of each other yet.
        """
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
        if world_size() > 1:
            raise ZOError(
                f"this is one of {world_size()} processes that do not know of each other yet; call "
                "torch.distributed.init_process_group() before the first step."
            )
        return 1

    def rows(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's rows of a batch (or of their numbers): all of them unless the data is shared; may be none."""
        _, members = self.options.grid(self.size)
        first, last = part_of(len(rows), members, self.rank % members)
        return rows[first:last]

    def compare_anew(self) -> None:
        """Compare the trainables at the next step, whichever it is."""
        self._compared = -1

    def begin_step(self, step: int, plan: str, trainables: Trainables, batch: Any) -> None:
        """Told before the first losses of a step.

        Args:
            step: its number.
            plan: all that ranks must agree on, in words.
            trainables: compared with the other ranks' where that is due.
            batch: compared, too, unless each rank has rows of its own.
        """
        due = self.size > 1 and (self._compared < 0 or step % self.options.check_every == 0)
        self._step, self._plan = step, f"step {step}, {plan}, share={self.options.share!r}" + due * " (compared)"
        self._sums = (0, 0)
        if due:
            rows: list[Tensor] = []
            map_tensors(rows.append, batch)
            self._sums = (_sum(piece.values for piece in trainables.pieces()), _sum(rows))

    def losses(self, points: int, batch: Any, run: Callable[[int, int], Tensor], *, width: int = 1) -> Tensor:
        """All losses, of which this rank evaluates a part: float64, shape (points * width,), the same bits on all ranks.

        Args:
            points: how many points there are.
            batch: what this rank was given; where the data is shared, a rank with no rows evaluates nothing.
            run: (first, last) -> losses at these points, shape ((last - first) * width,).
            width: losses a point.

        Raises:
            ZOError: ranks do not do the same, or no rank has a row.
            RankError: another rank failed.
        """
        rank, size = self.rank, self.size
        groups, members = self.options.grid(size)
        if size == 1:
            self.stop = self.stop_wanted
            return run(0, points)
        group = self._group()  # made before a rank can be late
        spans = [part_of(points, groups, r // members) for r in range(size)]
        first, last = spans[rank]
        values, rows, seen, failure = torch.zeros((last - first) * width, dtype=torch.float64), 1, 0, None
        try:
            if members > 1 and batch is not None:
                rows = batch_size(batch)
            seen = tokens(batch) if batch is not None and rows else 0
            if first < last and rows:
                values = run(first, last)
        except BaseException as raised:  # Ctrl-C, too: the others must not wait for this rank
            failure = raised
        plan = f"{self._plan}, {points} x {width} losses"
        head = _Head(
            int(failure is not None), _number(checksum([plan.encode()])), *self._sums, rows, seen, self.stop_wanted
        )
        widest = max(width * (b - a) for a, b in spans)
        try:
            heads, losses = self._exchange(
                group, head, plan if failure is None else _described(failure), values, widest
            )
        except (RankError, ZOError) as problem:
            failure = failure or problem
        except (RuntimeError, ValueError) as lost:  # ValueError: of a group that was left when a rank was lost
            failure = failure or self._loss(str(lost))
        if failure is not None:
            raise failure
        self.stop = max(head.stop for head in heads)
        self.tokens = sum(head.tokens for head in heads[:members])
        if self._sums != (0, 0):
            self._compared, self._sums = self._step, (0, 0)
        parts = [row[: width * (b - a)] for row, (a, b) in zip(losses, spans, strict=True)]
        return _together(parts, [head.rows for head in heads], members)

    def _group(self) -> Any:
        """A gloo group of all ranks, in which rank 0 waits for ``timeout`` seconds, and the others for rank 0 twice as long."""
        try:
            return _gloo(dist.group.WORLD, 2 * self.options.timeout)
        except RuntimeError as lost:
            raise self._loss(str(lost)) from lost

    def _exchange(self, group: Any, head: _Head, text: str, values: Tensor, widest: int) -> tuple[list[_Head], Tensor]:
        """All ranks' heads, and their losses, shape (ranks, at least ``widest``); ``text``: what this rank does, or why it failed."""
        try:
            dist.monitored_barrier(group, timedelta(seconds=self.options.timeout))
        except RuntimeError as lost:
            said = str(lost)
            gone = None if "failed to pass" in said or self.rank else _unreachable(group)
            dist.destroy_process_group(group)  # so that the others do not wait for a rank that this one knows is gone
            raise self._loss(said if gone is None else f"Rank {gone} failed to pass: {said}") from lost
        message = torch.zeros(_HEAD + SLOTS, dtype=torch.int64)
        message[:_HEAD] = torch.tensor(head)
        message[_HEAD:].view(torch.float64)[: len(values)] = values[:SLOTS]
        messages = _gathered(message, group)
        heads = [_Head(*numbers) for numbers in messages[:, :_HEAD].tolist()]
        if any(other.failed or other.plan != head.plan for other in heads):
            texts = [
                bytes(row).rstrip(b"\0").decode(errors="ignore") for row in _gathered(_written(text), group).numpy()
            ]
            raise self._disagreement(heads, texts)
        self._compare(heads)
        losses = messages[:, _HEAD:].view(torch.float64)
        if widest > SLOTS:
            rest = torch.zeros(widest - SLOTS, dtype=torch.float64)
            rest[: max(0, len(values) - SLOTS)] = values[SLOTS:]
            losses = torch.cat([losses, _gathered(rest, group)], dim=1)
        return heads, losses

    def _disagreement(self, heads: list[_Head], texts: list[str]) -> Exception:
        """The first rank that failed, or that does something else than rank 0."""
        for rank, head in enumerate(heads):
            if head.failed:
                return RankError(f"rank {rank} failed at step {self._step} ({texts[rank]}).")
        rank = next(rank for rank, head in enumerate(heads) if head.plan != heads[0].plan)
        return ZOError(
            f"rank {rank} does not do what rank 0 does: {texts[0]}. On rank {rank}: {texts[rank]}. Give all ranks the same options, "
            "data and number of steps."
        )

    def _compare(self, heads: list[_Head]) -> None:
        """Whether healthy ranks can go on together.

        Raises:
            ZOError: they were given other weights or rows than they should.
            RankError: the weights were the same and are no longer.
        """
        _, members = self.options.grid(self.size)
        for rank, head in enumerate(heads):
            if head.trainables != heads[0].trainables and self._compared < 0:
                raise ZOError(
                    f"the trainables of rank {rank} differ from rank 0's before the first step; load the same weights, with the "
                    "same seed and on the same kind of machine, on all ranks."
                )
            if head.trainables != heads[0].trainables:
                raise RankError(
                    f"the trainables of rank {rank} differ from rank 0's at step {self._step}; they were the same at step "
                    f"{self._compared}. Resume from a checkpoint up to there, and look after that machine."
                )
            if head.batch != heads[rank % members].batch:
                raise ZOError(
                    f"rank {rank} was given another batch than rank {rank % members}; ranks that share queries see the same rows: "
                    'give them the same batch, or share="data".'
                )
        if not any(head.rows for head in heads):
            raise ZOError("no rank was given a row; leave out empty batches.")

    def _loss(self, said: str) -> RankError:
        """Whom torch.distributed missed."""
        found = re.search(r"Rank (\d+) failed to pass", said)
        if found is None:
            return RankError(
                f"the exchange of step {self._step} broke off: a rank is gone or late; look at what the others said, rank 0 first."
            )
        if re.search(r"timed? ?out", said, re.IGNORECASE):
            return RankError(
                f"rank {found[1]} sent nothing for {self.options.timeout:g} s at step {self._step}; look whether it still runs."
            )
        return RankError(
            f"rank {found[1]} is gone at step {self._step}: its process ended or its connection broke; look at what it said."
        )


@cache
def _gloo(world: Any, timeout: float) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def _gathered(tensor: Tensor, group: Any) -> Tensor:
    """A row of every rank's."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor, group=group)
    return torch.stack(found)


def _unreachable(group: Any) -> int | None:
    """The first rank whose connection is closed: the barrier does not name one that ended before it began."""
    for rank in range(1, dist.get_world_size()):
        try:
            dist.isend(torch.zeros(1), group=group, group_dst=rank)
        except RuntimeError:
            return rank
    return None


def _together(parts: list[Tensor], rows: list[int], members: int) -> Tensor:
    """The losses of each group's points: means over its members, weighted by their rows."""
    if members == 1:
        return torch.cat(parts)
    found = []
    for first in range(0, len(parts), members):
        present = [r for r in range(first, first + members) if rows[r]]
        weight = sum(rows[r] for r in present)
        found.append(sum((parts[r] * (rows[r] / weight) for r in present), torch.zeros_like(parts[first])))
    return torch.cat(found)


def _sum(tensors: Iterable[Tensor]) -> int:
    return _number(fingerprint({f"{number:09}": tensor for number, tensor in enumerate(tensors)}))


def _number(digits: str) -> int:
    """The beginning of a checksum, as an int64."""
    return int(digits[:15], 16)


def _described(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[: TEXT_BYTES // 2]


def _written(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)
