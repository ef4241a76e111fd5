"""A Flower grid within one process: messages go to functions, and their replies may be dropped or come late."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from zo_opt.federated.flower import message_with

# What Flower's runtime sets before it runs an app.
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@dataclass
class LocalGrid(Grid):
    """What a server app sees of its clients.

    Attributes:
        clients: node id -> what answers its messages.
        delay: (node, message number) -> looks for replies before it is there; None: it never is.
        sent: messages as they were sent, and their replies.
    """

    clients: dict[int, Callable[[Message], Message]]
    delay: Callable[[int, int], int | None] = lambda node, number: 0
    sent: list[tuple[Message, Message]] = field(default_factory=list)
    _due: list[tuple[int, Message]] = field(default_factory=list)

    def set_run(self, run: Any) -> None:
        """Of no use here."""

    @property
    def run(self) -> Any:
        """Of no use here."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Of no use here: Flower's own is deprecated."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """All of them."""
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Each is answered at once, whenever the reply may then be seen; what fails is Flower's error, as from a real client."""
        names = []
        for message in messages:
            name = str(uuid4())
            message.metadata.__dict__["_message_id"] = name
            names.append(name)
            node = message.metadata.dst_node_id
            wait = self.delay(node, len(self.sent))
            try:
                reply = self.clients[node](message)
            except Exception as error:
                reply = Message(Error(code=2, reason=str(error)), reply_to=message)
            self.sent.append((message, reply))
            if wait is not None:
                self._due.append((wait, reply))
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are due."""
        wanted = set(message_ids)
        found = [m for wait, m in self._due if wait <= 0 and m.metadata.reply_to_message_id in wanted]
        self._due = [(wait - 1, m) for wait, m in self._due if m not in found]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """What Flower's strategies call."""
        return self.pull_messages(self.push_messages(messages))


def wire_bytes(message: Message) -> int:
    """Bytes of a message with all that is in it, as Flower puts it on the wire."""

    def size(part: Any) -> int:
        return len(part.deflate()) + sum(size(child) for child in (part.children or {}).values())

    return size(message)


__all__ = ["LocalGrid", "message_with", "wire_bytes"]
