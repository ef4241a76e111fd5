"""What goes over the wire, as bytes: who reads them trusts nothing in them.

Little-endian. A request: the pool's id (8 bytes), its round and the round that the changes count from (4 each), a checksum of all K numbers
after them (8), how many changes and seeds (4 each); then the changes' seeds (4 each) and numbers (8 each), and the seeds to evaluate (4
each). An answer: the pool's id, the round, how many; then seeds (4 each) and numbers (8 each). Without any it says: I have not got what the
changes count from.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from zo_opt.errors import ZOError
from zo_opt.federated.pool import Pool
from zo_opt.system.checksum import checksum

Numbers = np.ndarray[Any, Any]
_REQUEST, _ANSWER = struct.Struct("<8sII8sII"), struct.Struct("<8sII")
PAIR = 12  # bytes of a seed and its number


class MessageError(ZOError):
    """Bytes that are no message of this pool and round; ``kind`` is what is counted."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"a message was refused: {kind}.")
        self.kind = kind


@dataclass(frozen=True)
class Request:
    """What a server asks of a client.

    Attributes:
        round: its number, from 0.
        since: the changes are those since the weights before this round; 0: since the start.
        digest: :func:`digest_of` all numbers after the changes.
        changed: seeds whose number is another than then, (C,) uint32.
        totals: their numbers, (C,) int64.
        seeds: what to evaluate, (S,) uint32.
    """

    round: int
    since: int
    digest: bytes
    changed: Numbers
    totals: Numbers
    seeds: Numbers

    def to_bytes(self, pool: Pool) -> bytes:
        """As above."""
        head = _REQUEST.pack(pool.id, self.round, self.since, self.digest, len(self.changed), len(self.seeds))
        return head + _plain(self.changed, "<u4") + _plain(self.totals, "<i8") + _plain(self.seeds, "<u4")

    @classmethod
    def of(cls, content: object, pool: Pool) -> Request:
        """A request from bytes.

        Raises:
            MessageError: they are none of this pool.
        """
        head, body = _split(content, _REQUEST, pool)
        number, since, digest, changes, seeds = head
        if changes > pool.size or seeds > pool.seeds or len(body) != PAIR * changes + 4 * seeds:
            raise MessageError("another length")
        changed, totals = _pairs(body, changes)
        drawn = np.frombuffer(body, "<u4", seeds, PAIR * changes)
        if since > number or number >= pool.rounds or _beyond(changed, pool) or _beyond(drawn, pool):
            raise MessageError("numbers that no request has")
        return cls(number, since, digest, changed, totals, drawn)


@dataclass(frozen=True)
class Answer:
    """What a client sends: whole numbers for the seeds that it was given, in their order; nothing if it is behind.

    Attributes:
        round: the request's.
        seeds: (S,) uint32.
        numbers: (S,) int64.
    """

    round: int
    seeds: Numbers
    numbers: Numbers

    def to_bytes(self, pool: Pool) -> bytes:
        """As above."""
        head = _ANSWER.pack(pool.id, self.round, len(self.seeds))
        return head + _plain(self.seeds, "<u4") + _plain(self.numbers, "<i8")

    @classmethod
    def of(cls, content: object, pool: Pool) -> Answer:
        """An answer from bytes.

        Raises:
            MessageError: they are none of this pool.
        """
        (number, count), body = _split(content, _ANSWER, pool)
        if count > pool.seeds or len(body) != PAIR * count:
            raise MessageError("another length")
        return cls(number, *_pairs(body, count))


def digest_of(totals: Numbers) -> bytes:
    """A checksum of all K numbers, 8 bytes."""
    return bytes.fromhex(checksum([_plain(totals, "<i8")], 16))


def _split(content: object, head: struct.Struct, pool: Pool) -> tuple[tuple[Any, ...], bytes]:
    """A head's fields without the pool's id, and what follows."""
    if not isinstance(content, bytes):
        raise MessageError("no bytes")
    if len(content) < head.size:
        raise MessageError("another length")
    found, *rest = head.unpack_from(content)
    if found != pool.id:
        raise MessageError("another pool")
    return tuple(rest), content[head.size :]


def _pairs(body: bytes, count: int) -> tuple[Numbers, Numbers]:
    return np.frombuffer(body, "<u4", count), np.frombuffer(body, "<i8", count, 4 * count)


def _beyond(seeds: Numbers, pool: Pool) -> bool:
    return bool((seeds >= pool.size).any())


def _plain(values: Numbers, kind: str) -> bytes:
    return np.ascontiguousarray(values, dtype=kind).tobytes()
