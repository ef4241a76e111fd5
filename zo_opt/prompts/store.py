"""Where the states of prompts are kept: in the memory of a device, or in a file."""

from __future__ import annotations

import struct
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.system.files import try_lock

FILE_NAME = "prompt_cache.bin"
_DIGEST = 16  # bytes of it that are kept


class MemoryStore:
    """Hidden states in memory, each under a name, up to a bound.

    Args:
        max_bytes: bound on the states kept.
        device: whose memory.

    >>> store = MemoryStore(64, torch.device("cpu"))
    >>> store.put(b"a", torch.ones(4, 3)), store.put(b"b", torch.ones(4, 3))
    (True, False)
    >>> store.get(b"a").shape, store.get(b"b")
    (torch.Size([4, 3]), None)
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self.max_bytes, self.device = max_bytes, device
        self.bytes = 0
        self.damaged = 0  # states that were read back other than they were written; in memory that is not looked for
        self.notes: list[str] = []
        self._states: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._states

    def put(self, key: bytes, states_SH: Tensor) -> bool:
        """Keep one sequence's states, (S tokens, H hidden); False where there is no room for them."""
        if key not in self:
            if self.bytes + states_SH.nbytes > self.max_bytes:
                return False
            self._states[key] = states_SH.to(self.device, copy=True)
            self.bytes += states_SH.nbytes
        return True

    def get(self, key: bytes) -> Tensor | None:
        """The states kept under a name, (S, H); None where there are none."""
        return self._states.get(key)

    def close(self, *, remove: bool) -> None:
        """Let go of all states."""
        self._states.clear()


class FileStore:
    """Hidden states in a file, each with a digest that is verified whenever they are read.

    The file is a header line with the fingerprint of what made the states, then records one after another: name, tokens, hidden
    size, dtype, half of the SHA-256 of all that and the states; the states' bytes. A record that fails its digest is forgotten and
    counted in ``damaged``. What was cut off (a killed run) is dropped at opening. Once a write fails (a full disk), nothing more is written.

    Args:
        path: the file; made, with its directory, where there is none.
        max_bytes: bound on the file.
        fingerprint: of the model that makes the states. A file with another one is emptied.

    Raises:
        ZOError: the file cannot be opened for writing, or another run has it open.
    """

    device = torch.device("cpu")
    _FIELDS = struct.Struct("<16sIII")
    _DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def __init__(self, path: Path, max_bytes: int, fingerprint: str) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.bytes = 0
        self.damaged = 0
        self.notes: list[str] = []  # sentences for the user
        self._index: dict[bytes, tuple[int, bytes, bytes]] = {}  # name -> where the states begin, fields, digest
        self._broken = False
        header = f"zo_opt.prefix/2 {fingerprint}\n".encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise ZOError(
                f"the prefix cache {path} cannot be written ({error.strerror}); give another prompt_cache_dir."
            ) from error
        if not try_lock(self._file.fileno()):
            self._file.close()
            raise ZOError(f"the prefix cache {path} is in use by another run; give another prompt_cache_dir.")
        finalize(self, self._file.close)  # a run that fails closes nothing itself
        self._read_index(header)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def put(self, key: bytes, states_SH: Tensor) -> bool:
        """Keep one sequence's states, (S tokens, H hidden); False where there is no room for them or writing has failed."""
        if key in self:
            return True
        states = states_SH.detach().cpu().contiguous()
        content = states.view(torch.uint8).numpy().data.cast("B")
        fields = self._FIELDS.pack(key, *states.shape, self._DTYPES.index(states.dtype))
        digest = _digest(fields, content)
        start = self.bytes + len(fields) + len(digest)
        if self._broken or start + len(content) > self.max_bytes or not self._append(fields, digest, content):
            return False
        self._index[key] = (start, fields, digest)
        return True

    def get(self, key: bytes) -> Tensor | None:
        """The states kept under a name, (S, H); None where there are none, or where they are not what was written."""
        if key not in self:
            return None
        start, fields, digest = self._index[key]
        _, tokens, width, kind = self._FIELDS.unpack(fields)
        content = self._read(start, tokens * width * self._DTYPES[kind].itemsize)
        if _digest(fields, content) != digest:
            del self._index[key]
            self.damaged += 1
            return None
        return torch.frombuffer(content, dtype=self._DTYPES[kind]).view(tokens, width)

    def close(self, *, remove: bool) -> None:
        """Close the file, and remove it or leave it for another run."""
        self._file.close()
        self._index.clear()
        if remove:
            self.path.unlink(missing_ok=True)

    def _read_index(self, header: bytes) -> None:
        """Find the records of an earlier run; cut off what is not whole, and all that another model made."""
        size = self.path.stat().st_size
        found = bytes(self._read(0, len(header)))
        if found != header:
            if size:
                self.notes.append(
                    f"the prefix cache {self.path} is of another model or version, or damaged; it is built anew."
                )
            self._file.truncate(0)
            self._append(header)
            return
        offset = len(header)
        while len(head := bytes(self._read(offset, self._FIELDS.size + _DIGEST))) == self._FIELDS.size + _DIGEST:
            fields, digest = head[:-_DIGEST], head[-_DIGEST:]
            key, tokens, width, kind = self._FIELDS.unpack(fields)
            if kind >= len(self._DTYPES):
                break
            start = offset + len(head)
            end = start + tokens * width * self._DTYPES[kind].itemsize
            if end > size:
                break
            if end > self.max_bytes:
                self.notes.append(f"{self.path} holds more than prompt_cache_mb allows; the rest of it is dropped.")
                size = offset
                break
            self._index[key] = (start, fields, digest)
            offset = end
        if offset < size:
            self.notes.append(f"the end of the prefix cache {self.path} is damaged; what is missing is computed anew.")
        self._file.truncate(offset)
        self.bytes = offset

    def _read(self, offset: int, length: int) -> bytearray:
        """So many bytes from there; fewer where the file ends or cannot be read."""
        content = bytearray(length)
        try:
            self._file.seek(offset)
            return content[: self._file.readinto(content)]
        except OSError:
            return bytearray()

    def _append(self, *parts: bytes | memoryview) -> bool:
        """Write at the end; False, and never again, where that fails."""
        try:
            self._file.seek(self.bytes)
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._broken = True
            self.notes.append(
                f"the prefix cache {self.path} could not be written ({error.strerror}); rows not yet in it are computed whole."
            )
            with suppress(OSError):
                self._file.truncate(self.bytes)
            return False
        self.bytes += sum(len(part) for part in parts)
        return True


def _digest(fields: bytes, content: bytearray | memoryview) -> bytes:
    return sha256(b"".join((fields, content))).digest()[:_DIGEST]
