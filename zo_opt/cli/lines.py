"""Results one after the other, each a line of JSON, to a new file or to the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.system.files import GrowingFile


class Lines:
    """Where a command's lines go. The file is made with its first line, and whole lines are all that is ever in it.

    Args:
        out: the file; standard output if None.

    Raises:
        ZOError: the file is there already, is of another kind, or its directory is not there.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._file: GrowingFile | None = None
        if out is None:
            return
        if out.suffix != ".jsonl":
            raise ZOError(f"--out {out} is no file of lines of JSON; give a name that ends in .jsonl.")
        if out.exists():
            raise ZOError(f"--out {out} exists already; give another name.")
        if not out.parent.is_dir():
            raise ZOError(f"the directory {out.parent} of --out does not exist; create it first.")

    def write(self, values: dict[str, Any]) -> None:
        """One line.

        Raises:
            ZOError: the file cannot be written.
        """
        line = json.dumps(values, ensure_ascii=False)
        if self._out is None:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            return
        if self._file is None:
            self._file = GrowingFile(self._out)
        self._file.append(line.encode())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.sync()
            self._file.close()
