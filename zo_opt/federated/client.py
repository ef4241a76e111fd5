"""A client of a federated training: from a request to an answer, on rows that never leave it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from zo_opt.errors import ZOError
from zo_opt.federated.messages import Answer, MessageError, Numbers, Request, digest_of
from zo_opt.federated.pool import Pool
from zo_opt.federated.weights import Weights
from zo_opt.privacy import GRID, GaussianPrivacy
from zo_opt.system.checksum import checksum
from zo_opt.system.plain_json import parse
from zo_opt.tasks.batches import BatchOrder

Loss = Callable[[Sequence[int]], Any]


@dataclass
class Memory:
    """What a client keeps from round to round; as bytes it is Flower's to store, on the client.

    Attributes:
        totals: the pool's numbers that it knows, (K,) int64.
        round: they are those before this round; 0: the start's.
        steps: local steps made, which say the next rows.
        last: the last request, by its checksum, and the answer: asked once more, it says the same.
        privacy: the key to the noise and the account of what was released; None without noise.
    """

    totals: Numbers
    round: int = 0
    steps: int = 0
    last: tuple[str, bytes] = ("", b"")
    privacy: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def fresh(cls, pool: Pool) -> Memory:
        """Of a client that knows nothing yet."""
        return cls(np.zeros(pool.size, dtype=np.int64))

    def to_bytes(self) -> bytes:
        """A line of JSON, and the numbers."""
        plain = {
            "round": self.round, "steps": self.steps, "privacy": self.privacy,
            "last": [self.last[0], self.last[1].hex()],
        }  # fmt: skip
        return json.dumps(plain).encode() + b"\n" + self.totals.astype("<i8").tobytes()

    @classmethod
    def of(cls, content: bytes, pool: Pool) -> Memory:
        """What :meth:`to_bytes` gave; of a client that knows nothing where it is damaged or another pool's."""
        try:
            head, _, body = content.partition(b"\n")
            plain, totals = parse(head), np.frombuffer(body, "<i8").astype(np.int64)
            asked, answer = plain["last"]
            if len(totals) != pool.size:
                raise ValueError("another pool")
            return cls(totals, plain["round"], plain["steps"], (asked, bytes.fromhex(answer)), plain["privacy"])
        except (ValueError, KeyError, TypeError):
            return cls.fresh(pool)


class Client:
    """Evaluates its rows along the seeds it is given. Several may share a model, and its weights, in one process.

    Args:
        pool: the pool.
        weights: the tuned weights, at whatever numbers.
        loss: of rows by their numbers, at the weights as they are.
        rows: how many it has.
        batch_size: rows of a local step; all of them where it has fewer.
        seed: of the order of rows.

    >>> pool = Pool(size=64, seeds=2, lr=0.1, clip=10.0)
    >>> theta = torch.nn.Parameter(torch.ones(3))
    >>> client = Client(pool, Weights([theta], pool), lambda rows: theta.square().sum(), rows=4, batch_size=2)
    >>> memory, nothing = Memory.fresh(pool), np.zeros(0, dtype=np.int64)
    >>> request = Request(0, 0, digest_of(memory.totals), nothing, nothing, np.array([5, 9]))
    >>> answer = Answer.of(client.answer(request.to_bytes(pool), memory), pool)
    >>> answer.seeds.tolist(), bool((answer.numbers != 0).all())
    ([5, 9], True)
    """

    def __init__(self, pool: Pool, weights: Weights, loss: Loss, *, rows: int, batch_size: int, seed: int = 0) -> None:
        self.pool, self._weights, self._loss, self._share = pool, weights, loss, pool.weight(rows)
        self._order = BatchOrder([0] * rows, min(batch_size, rows), seed, "shuffled")

    def answer(self, content: object, memory: Memory) -> bytes:
        """An answer to a request, in bytes both; ``memory`` is brought to what the request tells.

        Raises:
            MessageError: it is no request of this pool, or one more than noise was reckoned for.
        """
        request = Request.of(content, self.pool)
        asked = checksum([request.to_bytes(self.pool)], 32)
        if memory.last[0] == asked:
            return memory.last[1]
        nothing = np.zeros(0, dtype=np.int64)
        if not self._catch_up(request, memory):
            return Answer(request.round, nothing, nothing).to_bytes(self.pool)
        numbers = self._numbers(request, memory)
        memory.last = (asked, Answer(request.round, request.seeds, numbers).to_bytes(self.pool))
        memory.steps += len(request.seeds)
        return memory.last[1]

    def _catch_up(self, request: Request, memory: Memory) -> bool:
        """Take in the changes; False, and nothing is known any more, if they do not lead to the server's numbers."""
        totals = memory.totals.copy() if request.since else np.zeros_like(memory.totals)
        totals[request.changed] = request.totals
        if request.since > memory.round or digest_of(totals) != request.digest:
            memory.totals, memory.round = np.zeros_like(totals), 0
            return False
        try:
            self._weights.become(totals)
        except ZOError as error:
            raise MessageError("numbers that no request has") from error
        memory.totals, memory.round = totals, request.round
        return True

    def _numbers(self, request: Request, memory: Memory) -> Numbers:
        """A local step along each seed; what is sent of it is weighed by the client's rows."""
        pool = self.pool
        lr, limit = pool.lr_of(request.round), pool.limit(request.round)
        derivatives = []
        for step, seed in enumerate(request.seeds.tolist(), memory.steps):
            rows = self._order.indices(step)
            found = self._weights.derivative(partial(self._loss, rows), seed)
            clipped = max(-pool.clip, min(pool.clip, found)) if math.isfinite(found) else 0.0
            derivatives.append(clipped)
            self._weights.move(seed, whole(lr * clipped / pool.unit, limit))
        if pool.noise:
            derivatives = self._hidden(derivatives, request.round, memory)
        return np.array([whole(self._share * lr * d / pool.unit, limit) for d in derivatives], dtype=np.int64)

    def _hidden(self, derivatives: list[float], number: int, memory: Memory) -> list[float]:
        """The derivatives of a round, their norm clipped, noise added: the only thing that leaves a client, entered into its account first."""
        pool = self.pool
        account = GaussianPrivacy(pool.clip, pool.noise, examples=1, batch_size=1)
        if memory.privacy is not None:
            account.load_state_dict(memory.privacy)
        if account.spent.get(1, 0) >= pool.rounds:
            raise MessageError(f"{pool.rounds} answers were given, for which the noise was reckoned")
        account.charge(account.spent.get(1, 0), 1)
        memory.privacy = account.state_dict()
        # Counting in grid steps rounds each by half a step at most; the norm stays within clip all the same.
        most = pool.clip * (1 - math.sqrt(len(derivatives)) / (2 * GRID))
        factor = min(1.0, most / max(math.hypot(*derivatives), 1e-300))
        release = account.spent[1]
        return [
            account.release(torch.tensor([d * factor], dtype=torch.float64), release, query)
            for query, d in enumerate(derivatives)
        ]


def whole(value: float, limit: int) -> int:
    """The nearest whole number within a limit.

    >>> whole(2.6, 10), whole(-1e300, 10)
    (3, -10)
    """
    return round(max(-float(limit), min(float(limit), value)))
