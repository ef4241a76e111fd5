"""The server's side: what clients are asked, what is taken of their answers, and the K numbers, on disk before a round counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zo_opt.adapters.storage import read_tensors
from zo_opt.errors import ZOError
from zo_opt.federated.messages import Answer, MessageError, Numbers, Request, digest_of
from zo_opt.federated.pool import Pool
from zo_opt.federated.weights import check_totals
from zo_opt.record import checkpoint
from zo_opt.system.files import write_atomically

ACCEPTED, BEHIND = "accepted", "behind"


@dataclass
class Node:
    """What the server knows of a client.

    Attributes:
        round: it has the numbers before this round; 0: nothing.
        asked: how often it was asked.
        answered: the last round of which an answer of its own was taken; -1: none.
    """

    round: int = 0
    asked: int = 0
    answered: int = -1


@dataclass
class Record:
    """A round, as the report has it.

    Attributes:
        round: its number.
        asked, answered, late, behind: clients; late ones were asked in a round before.
        refused: why -> how many answers.
        sent, received: bytes of requests, and of answers that were taken.
        evaluation: of the weights after it, on the server's own rows; None where there was none.
    """

    round: int
    asked: int = 0
    answered: int = 0
    late: int = 0
    behind: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    received: int = 0
    evaluation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"refused": dict(self.refused)}


class Server:
    """Sums per seed, and which client knows which of them.

    A round is ``begin``, ``take`` for each answer, ``end``. On disk is the state at the last ``begin`` or ``end``: a server that is killed goes on
    from there, and loses the answers of the round in flight at most.

    Args:
        pool: the pool.
        late: rounds after its own in which an answer is still taken.

    >>> pool = Pool(size=16, seeds=2, lr=0.1, clip=1.0)
    >>> server = Server(pool)
    >>> requests = server.begin([7, 8])
    >>> seeds = Request.of(requests[7], pool).seeds
    >>> answer = Answer(0, seeds, np.array([5, -3])).to_bytes(pool)
    >>> server.take(7, answer), server.take(7, answer), server.take(8, answer), server.take(8, b"nonsense")
    ('accepted', 'answered before', 'other seeds than given', 'another length')
    >>> server.end().answered, server.totals[seeds].tolist()
    (1, [5, -3])
    """

    def __init__(self, pool: Pool, *, late: int = 1) -> None:
        self.pool, self._late = pool, late
        self.round = 0
        self.totals, self.magnitudes, self.uses = (np.zeros(pool.size, dtype=np.int64) for _ in range(3))
        self.changed = np.zeros(pool.size, dtype=np.int64)  # the round after which the number is what it is
        self.nodes: dict[int, Node] = {}
        self.rounds: list[Record] = []
        self._given: dict[tuple[int, int], Numbers] = {}  # (round, node) -> its seeds
        self._sums = np.zeros(pool.size, dtype=np.int64)  # of the round in flight
        self._now = Record(0)

    def begin(self, nodes: list[int]) -> dict[int, bytes]:
        """The requests of the next round.

        Args:
            nodes: whom to ask.

        Raises:
            ZOError: all rounds are done.
        """
        if self.round >= self.pool.rounds:
            raise ZOError(f"all {self.pool.rounds} rounds are done; prepare a training of more.")
        self._now, self._sums[:] = Record(self.round, asked=len(nodes)), 0
        self._given = {
            key: seeds for key, seeds in self._given.items() if self.round - self._late <= key[0] < self.round
        }
        drawn = self.pool.draw(self.round, len(nodes), self.pool.odds(self.magnitudes, self.uses))
        digest, requests = digest_of(self.totals), {}
        for node, seeds in zip(nodes, drawn, strict=True):
            known = self.nodes.setdefault(node, Node())
            known.asked += 1
            changed = np.flatnonzero(self.changed > known.round)
            request = Request(self.round, known.round, digest, changed, self.totals[changed], seeds)
            requests[node] = request.to_bytes(self.pool)
            self._given[self.round, node] = seeds
        self._now.sent = sum(map(len, requests.values()))
        return requests

    def take(self, node: int, content: object) -> str:
        """Take an answer in: "accepted", "behind" (it will be told all), or why it is refused. Whatever it is, nothing is raised."""
        try:
            answer = Answer.of(content, self.pool)
            self._check(node, answer)
        except MessageError as error:
            self._now.refused[error.kind] += 1
            return error.kind
        known = self.nodes[node]
        if len(answer.seeds) == 0:
            known.round = 0
            self._now.behind += 1
            return BEHIND
        # Another's answer may be on its way: a client asked before and after was brought up to date before.
        known.round, known.answered = max(known.round, answer.round), answer.round
        np.add.at(self._sums, answer.seeds, answer.numbers)
        np.add.at(self.magnitudes, answer.seeds, np.abs(answer.numbers))
        np.add.at(self.uses, answer.seeds, 1)
        self._now.answered += 1
        self._now.late += answer.round < self.round
        self._now.received += len(content) if isinstance(content, bytes) else 0
        return ACCEPTED

    def end(self, evaluation: dict[str, Any] | None = None) -> Record:
        """Close the round: its sums are added to the pool's numbers.

        Raises:
            ZOError: the numbers are beyond what is exact.
        """
        totals = self.totals + self._sums
        check_totals(totals)
        self.totals, self.round = totals, self.round + 1
        self.changed[self._sums != 0] = self.round
        self._now.evaluation = evaluation
        self.rounds.append(self._now)
        return self._now

    def _check(self, node: int, answer: Answer) -> None:
        """Whether this answer is one that this client was asked for, within all bounds.

        Raises:
            MessageError: it is not.
        """
        if answer.round > self.round or answer.round < self.round - self._late:
            raise MessageError("another round")
        seeds = self._given.get((answer.round, node))
        if seeds is None:
            raise MessageError("not asked")
        if self.nodes[node].answered >= answer.round:
            raise MessageError("answered before")
        if len(answer.seeds) and not np.array_equal(answer.seeds, seeds):
            raise MessageError("other seeds than given")
        limit = self.pool.limit(answer.round)
        if ((answer.numbers > limit) | (answer.numbers < -limit)).any():
            raise MessageError("beyond the limit")

    # --- on disk ---

    def save(self, directory: Path) -> None:
        """Write all to a checkpoint; the one before is kept.

        Raises:
            ZOError: it cannot be written; the earlier ones are as they were.
        """
        arrays = {"totals": self.totals, "magnitudes": self.magnitudes, "uses": self.uses, "changed": self.changed}
        plain = {
            "format": checkpoint.FORMAT, "pool": self.pool.to_dict(), "zo": {"step": self.round},
            "nodes": {str(number): list(vars(node).values()) for number, node in self.nodes.items()},
            "rounds": [record.to_dict() for record in self.rounds],
        }  # fmt: skip
        parts = checkpoint.sealed({name: torch.from_numpy(array) for name, array in arrays.items()}, plain)
        write_atomically(directory / checkpoint.NAME, *parts, previous=directory / checkpoint.PREVIOUS_NAME)

    @classmethod
    def load(cls, directory: Path, pool: Pool, *, late: int = 1, say: Any = print) -> Server:
        """Go on from a checkpoint; from the start where there is none.

        Raises:
            ZOError: none verifies, or it is of another pool.
        """
        server = cls(pool, late=late)
        if not any((directory / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS_NAME)):
            return server
        path = checkpoint.newest(directory, say)
        plain, tensors = checkpoint.read_state(path), read_tensors(path)
        try:
            if plain["pool"] != pool.to_dict():
                raise ZOError(f"{path} is of another pool; prepare a new directory, or give the one that fits.")
            for name in ("totals", "magnitudes", "uses", "changed"):
                array = tensors[name].numpy()
                if array.shape != (pool.size,) or array.dtype != np.int64:
                    raise TypeError(f"{name} is of another shape")
                setattr(server, name, array.copy())
            server.round = int(plain["zo"]["step"])
            server.nodes = {int(number): Node(*values) for number, values in plain["nodes"].items()}
            server.rounds = [Record(**record | {"refused": Counter(record["refused"])}) for record in plain["rounds"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ZOError(f"{path} is none of a federated training ({error}); restore it from a copy.") from error
        return server
