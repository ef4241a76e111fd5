"""The one checksum of the package: SHA-256 in hexadecimal digits. It finds accidents; anybody can write others that fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor


def checksum(parts: Iterable[bytes | memoryview], digits: int = 12) -> str:
    """The first digits of the SHA-256 of some bytes, one after another: 12 for a line or a record, 64 for a whole file.

    >>> checksum([b"a line"]), checksum([b"a ", b"line"]) == checksum([b"a line"])
    ('31b9ee4a830b', True)
    """
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:digits]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, whatever the device and the order: 32 hexadecimal digits; 1 GB a second.

    >>> one = {"w": torch.zeros(2)}
    >>> fingerprint(one) == fingerprint({"w": torch.zeros(2)}), fingerprint(one) == fingerprint({"w": -torch.zeros(2)})
    (True, False)
    """
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        for part, inner in plain_parts(name, tensor):
            digest.update(f"{part} {inner.dtype} {tuple(inner.shape)}\n".encode())
            digest.update(inner.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def plain_parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the plain ones within one that is made of others, as a quantised checkpoint's are."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from plain_parts(f"{name}.{inner}", getattr(tensor, inner))
