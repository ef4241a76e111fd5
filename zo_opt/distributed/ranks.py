"""A process among the ranks of a run: it evaluates its part of a step's losses and gets all of them.

An exchange is a star: each rank sends rank 0 its losses in one message of fixed size, rank 0 puts them together and answers every rank
with all of them. So a rank that is gone or late is known by its number, and every rank computes from the same numbers. Always over
gloo, whatever backend the run uses otherwise: losses are numbers on the CPU by then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from zo_opt.distributed.processes import Distributed, part_of, world_size
from zo_opt.errors import RankError, ZOError
from zo_opt.queries.nesting import batch_size, map_tensors
from zo_opt.queries.trainables import Trainables

T = TypeVar("T")
# Of a message, int64 numbers: status, plan, checksums of trainables and batch, rows, stop; then losses (their bits).
HEADER, SLOTS, TEXT_BYTES = 6, 32, 1024
FINE, FAILED, MISTAKE, UNLIKE = 0, 1, 2, 3
TAG = 2606  # of our messages among others that a program may send


class Ranks:
    """This process among the ranks of a run; one without others where no process group was made.

    Attributes:
        stop_wanted: set to a number above 0 to ask all ranks to stop; sent with the next losses.
        stop: the largest number that any rank asked with, the same on all ranks after every step.
        bytes_sent: bytes handed to torch.distributed so far.
    """

    def __init__(self, options: Distributed) -> None:
        self.options = options
        self.stop_wanted = self.stop = self.bytes_sent = 0
        self._known: tuple[int, int, int, int] | None = None
        self._group: Any = None  # for losses: the run's own where that is gloo
        self._plan, self._step, self._sums, self._compared = "", 0, (0, 0), -1

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._place()[0]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._place()[1]

    def rows(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's rows of a batch (or of their numbers): all of them unless the data is shared; may be none."""
        rank, _, _, members = self._place()
        first, last = part_of(len(rows), members, rank % members)
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
        self._sums = (
            (_checksum(piece.values for piece in trainables.pieces()), _batch_checksum(batch)) if due else (0, 0)
        )

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
        rank, size, groups, members = self._place()
        if size == 1:
            self.stop = self.stop_wanted
            return run(0, points)
        first, last = part_of(points, groups, rank // members)
        values, rows, error = torch.zeros((last - first) * width, dtype=torch.float64), 1, None
        try:
            if members > 1 and batch is not None:
                rows = batch_size(batch)
            if first < last and rows:
                values = run(first, last)
        except BaseException as raised:  # Ctrl-C, too: the others must not wait for this rank
            error = raised
        message = self._message(FAILED if error is not None else FINE, rows, values)
        plan = f"{self._plan}, {points} x {width} losses"
        message[1] = crc32(plan.encode())
        sizes = [width * (b - a) for a, b in (part_of(points, groups, r // members) for r in range(size))]
        try:
            if rank:
                found = self._ask(message, values, sum(sizes) // members, plan, error)
            else:
                found = self._answer(message, values, sizes, plan, error)
        except (RankError, ZOError):
            if error is None:
                raise
        except RuntimeError:
            raise error or RankError(f"a rank is gone at step {self._step}; look at what the others said.") from None
        if error is not None:
            raise error
        if self._sums != (0, 0):
            self._compared, self._sums = self._step, (0, 0)
        return found

    # --- rank 0 ---

    def _answer(self, own: Tensor, values: Tensor, sizes: list[int], plan: str, error: BaseException | None) -> Tensor:
        """Collect, check, put together, answer."""
        size = self.size
        messages = torch.zeros(size, HEADER + SLOTS, dtype=torch.int64)
        messages[0] = own
        problem = (FAILED, f"rank 0 failed at step {self._step} ({_described(error)}).") if error is not None else None
        gone: set[int] = set()
        pending = [(rank, self._receiving(messages[rank], rank)) for rank in range(1, size)]
        for rank, work in pending:
            try:
                work.wait(self._patience)
            except RuntimeError as lost:
                gone.add(rank)
                problem = problem or (FAILED, self._loss_of(rank, lost))
        heads = messages[:, :HEADER].tolist()
        for rank in range(1, size):
            if heads[rank][0] == FAILED:
                text = self._receive(torch.empty(TEXT_BYTES, dtype=torch.uint8), rank)
                problem = problem or (FAILED, f"rank {rank} failed at step {self._step} ({_read(text)}).")
            elif heads[rank][1] != heads[0][1]:
                problem = problem or (UNLIKE, f"rank {rank} does not do what rank 0 does: {plan}.")
        problem = problem or self._differences(heads)
        total = torch.zeros(0, dtype=torch.float64)
        if problem is None:
            losses = messages[:, HEADER:].view(torch.float64)
            parts = [values, *(_widened(losses[rank], sizes[rank]) for rank in range(1, size))]
            total = self._together(heads, parts)
        answer = self._message(problem[0] if problem else FINE, 0, total)
        answer[5] = stop = max(head[5] for head in heads)
        replies = [answer, _written(problem[1])] if problem else [answer]
        sent: list[tuple[int, Any]] = []
        for rank in range(1, size):
            try:
                sent += [(rank, self._send(reply, rank)) for reply in replies if rank not in gone]
            except RuntimeError as lost:
                problem = problem or (FAILED, self._loss_of(rank, lost))
        for rank, work in sent:
            try:
                work.wait()
            except RuntimeError as lost:
                problem = problem or (FAILED, self._loss_of(rank, lost))
        if problem:
            raise _problem(*problem)
        self.stop = stop
        return self._complete(heads, parts, total)

    def _complete(self, heads: list[list[int]], parts: list[Tensor], total: Tensor) -> Tensor:
        """What one message has no place for: the others' further losses to rank 0, all further losses from there."""
        for rank, part in enumerate(parts):
            if rank and len(part) > SLOTS:
                try:
                    self._receive(part[SLOTS:], rank)
                except RuntimeError as lost:
                    raise RankError(self._loss_of(rank, lost)) from None
        if len(total) > SLOTS:
            total = self._together(heads, parts)
            self._broadcast(total[SLOTS:])
        return total

    def _differences(self, heads: list[list[int]]) -> tuple[int, str] | None:
        """What keeps healthy ranks from going on together."""
        members = self._place()[3]
        for rank, head in enumerate(heads):
            if head[2] != heads[0][2]:
                if self._compared < 0:
                    return MISTAKE, (
                        f"the trainables of rank {rank} differ from rank 0's before the first step; load the same weights, with the "
                        "same seed and on the same kind of machine, on all ranks."
                    )
                return FAILED, (
                    f"the trainables of rank {rank} differ from rank 0's at step {self._step}; they were the same at step "
                    f"{self._compared}. Resume from a checkpoint up to there, and look after that machine."
                )
            if head[3] != heads[rank % members][3]:
                return MISTAKE, (
                    f"rank {rank} was given another batch than rank {rank % members}; ranks that share queries see the same rows: "
                    'give them the same batch, or share="data".'
                )
        if not any(head[4] for head in heads):
            return MISTAKE, "no rank was given a row; leave out empty batches."
        return None

    def _together(self, heads: list[list[int]], parts: list[Tensor]) -> Tensor:
        """The losses of each group's points: means over its members, weighted by their rows."""
        _, size, _, members = self._place()
        if members == 1:
            return torch.cat(parts)
        found = []
        for first in range(0, size, members):
            present = [r for r in range(first, first + members) if heads[r][4]]
            weight = sum(heads[r][4] for r in present)
            found.append(sum((parts[r] * (heads[r][4] / weight) for r in present), torch.zeros_like(parts[first])))
        return torch.cat(found)

    # --- the others ---

    def _ask(self, message: Tensor, values: Tensor, total: int, plan: str, error: BaseException | None) -> Tensor:
        """Send what this rank has, get all losses."""
        try:
            sent = [self._send(message, 0)]
            if error is not None:
                sent.append(self._send(_written(_described(error)), 0))
            answer = self._receive(torch.empty_like(message), 0)
            if int(answer[0]) != FINE:
                text = _read(self._receive(torch.empty(TEXT_BYTES, dtype=torch.uint8), 0))
                raise _problem(int(answer[0]), text, f" On rank {self.rank}: {plan}.")
            if len(values) > SLOTS:
                sent.append(self._send(values[SLOTS:], 0))
            for work in sent:
                work.wait()
            found = torch.empty(total, dtype=torch.float64)
            found[:SLOTS] = answer[HEADER : HEADER + min(SLOTS, total)].view(torch.float64)
            self._broadcast(found[SLOTS:])
        except RankError:
            raise
        except RuntimeError as lost:
            raise RankError(self._loss_of(0, lost)) from None
        self.stop = int(answer[5])
        return found

    # --- messages ---

    def _message(self, status: int, rows: int, values: Tensor) -> Tensor:
        message = torch.zeros(HEADER + SLOTS, dtype=torch.int64)
        message[0], message[2], message[3], message[4], message[5] = status, *self._sums, rows, self.stop_wanted
        first = values[:SLOTS]
        message[HEADER : HEADER + len(first)] = first.contiguous().view(torch.int64)
        return message

    def _send(self, tensor: Tensor, rank: int) -> Any:
        self.bytes_sent += tensor.nbytes
        return dist.isend(tensor.contiguous(), rank, group=self._group, tag=TAG)

    def _receive(self, tensor: Tensor, rank: int) -> Tensor:
        self._receiving(tensor, rank).wait(self._patience)
        return tensor

    def _receiving(self, tensor: Tensor, rank: int) -> Any:
        return dist.irecv(tensor, rank, group=self._group, tag=TAG)

    @property
    def _patience(self) -> timedelta:
        """The others wait twice as long as rank 0, which then says who is late."""
        return timedelta(seconds=self.options.timeout * (2 if self.rank else 1))

    def _broadcast(self, rest: Tensor) -> None:
        """From rank 0 to all."""
        if len(rest):
            self.bytes_sent += rest.nbytes if self.rank == 0 else 0
            dist.broadcast(rest, 0, group=self._group)

    def _loss_of(self, rank: int, lost: RuntimeError) -> str:
        if re.search(r"timed? ?out", str(lost), re.IGNORECASE):
            return f"rank {rank} sent nothing for {self.options.timeout:g} s at step {self._step}; look whether it still runs."
        return f"rank {rank} is gone at step {self._step}: its process ended or its connection broke; look at what it said."

    def _place(self) -> tuple[int, int, int, int]:
        """Rank, ranks, query groups, ranks in a group."""
        if self._known is None:
            rank, size = 0, 1
            if dist.is_available() and dist.is_initialized():
                rank, size = dist.get_rank(), dist.get_world_size()
                self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
            elif world_size() > 1:
                raise ZOError(
                    f"this is one of {world_size()} processes that do not know of each other yet; call "
                    "torch.distributed.init_process_group() before the first step."
                )
            self._known = (rank, size, *self.options.grid(size))
        return self._known


def _widened(losses: Tensor, size: int) -> Tensor:
    """The losses of one message, with room for those that do not fit in it."""
    if size <= SLOTS:
        return losses[:size]
    wide = losses.new_zeros(size)
    wide[:SLOTS] = losses
    return wide


def _checksum(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """The first 8 bytes of the SHA-256 of the tensors' bytes, as int64."""
    digest = sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _batch_checksum(batch: Any) -> int:
    tensors: list[Tensor] = []
    map_tensors(tensors.append, batch)
    return _checksum(tensors)


def _problem(status: int, text: str, own: str = "") -> Exception:
    """What rank 0 found, as an exception; ``own``: what this rank is doing."""
    if status == UNLIKE:
        return ZOError(f"{text}{own} Give all ranks the same options, data and number of steps.")
    return ZOError(text) if status == MISTAKE else RankError(text)


def _described(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[: TEXT_BYTES // 2]


def _written(text: str) -> Tensor:
    content = text.encode()[:TEXT_BYTES]
    return torch.frombuffer(bytearray(content.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)


def _read(text: Tensor) -> str:
    return bytes(text.numpy()).rstrip(b"\0").decode(errors="ignore")
