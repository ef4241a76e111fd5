"""Files that are either whole or absent, and files that grow by whole lines."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import lock_descriptor

from zo_opt.errors import ZOError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, *parts: bytes | memoryview, previous: Path | None = None, mode: int = 0o644) -> None:
    """Write, fsync, rename, fsync the directory: a reader, or who comes after a crash, sees the old file or the new one, never a part.

    Args:
        path: the file; its directory is made where there is none.
        parts: the content.
        previous: the name under which the file that was there is kept.
        mode: its permissions.

    Raises:
        ZOError: the disk is full, or the directory cannot be written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            if previous is not None and path.exists():
                _keep(path, previous)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, so that the first one is there all the time; where the file system cannot, another name."""
    link = path.with_name(f".{previous.name}.previous")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
        return
    os.replace(link, previous)
    link.unlink(missing_ok=True)  # renaming does nothing where both are names of one file already


def unfinished(directory: Path, *names: str) -> list[Path]:
    """What a killed process left of files that it was writing."""
    return [path for name in names for path in directory.glob(f".{name}.????????")]


def _sync_directory(directory: Path) -> None:
    """Bring names of files to the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file; False if another process has it. The lock ends with the process, or when the file is closed.

    True where the system or the file system has no locks.
    """
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return True


def cannot_write(path: Path, error: OSError) -> ZOError:
    """What to say of a write that failed."""
    if error.errno in _FULL:
        return ZOError(
            f"{path} cannot be written (the disk is full: {error.strerror}); what was there before is untouched. Make room and resume."
        )
    return ZOError(
        f"{path} cannot be written ({error.strerror}); what was there before is untouched. Give a path that can."
    )


class GrowingFile:
    """A file to whose end whole lines are written, each in one write without buffers: a killed process loses nothing of them.

    Args:
        path: made where there is none.
        size: bytes to keep; the rest is cut off. None: all.

    Raises:
        ZOError: it cannot be written.

    >>> path = Path(tempfile.mkdtemp()) / "lines"
    >>> file = GrowingFile(path)
    >>> file.append(b"one line")
    >>> file.close()
    >>> path.read_bytes()
    b'one line\\n'
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(path, flags, 0o644)
            if size is not None:
                os.ftruncate(self._descriptor, size)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, line: bytes) -> None:
        """Write a line, or nothing.

        Raises:
            ZOError: the disk is full; or somebody else has written to the file or deleted it.
        """
        line += b"\n"
        try:
            status = os.fstat(self._descriptor)
            if status.st_size != self._size or status.st_nlink == 0:
                raise ZOError(
                    f"{self.path} was changed or deleted by somebody else; two runs must not share a directory."
                )
            if os.write(self._descriptor, line) < len(line):
                os.ftruncate(self._descriptor, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._size += len(line)

    def sync(self) -> None:
        """Bring all to the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)
