"""What of Flower is used: its apps, and one record of bytes in a message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zo_opt.errors import ZOError

try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ZOError("federated tuning runs on Flower; install it with pip install 'zo-opt[federated]'.") from error

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "z"  # of the record, and of the bytes in it: each byte counts
TRAIN = "train"


def message_with(content: bytes, **where: Any) -> Message:
    """A message of these bytes; ``where``: to whom, or to which one it replies."""
    return Message(RecordDict({NAME: ConfigRecord({NAME: content})}), **where)


def content_of(message: Message) -> object:
    """The bytes in a message; whatever else is there, None."""
    if message.has_error():
        return None
    records: Mapping[str, ConfigRecord] = message.content.config_records
    record = records.get(NAME)
    return None if record is None else record.get(NAME)


__all__ = [
    "TRAIN", "ClientApp", "ConfigRecord", "Context", "Grid", "Message", "RecordDict", "ServerApp", "content_of", "message_with",
]  # fmt: skip
