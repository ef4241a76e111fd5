"""Numbers in documents are what a command prints from a stored result: verify them all, or bring them up to date.

    python benchmarks/figures.py            # names the blocks that differ; exit code 1 if there are any
    python benchmarks/figures.py --write    # writes what the commands print now

A block of numbers stands between two comments. The first is the command that prints it:

    <!-- python benchmarks/tables.py plan -->

    | method | foretold | measured |
    ...

    <!-- end -->
"""

from __future__ import annotations

import argparse
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^<!-- python (?P<command>benchmarks/\S+\.py[^\n]*) -->\n(?P<text>.*?)^<!-- end -->", re.M | re.S)


def documents() -> list[Path]:
    """The documents that have numbers."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def printed(command: str) -> str:
    """What a command prints, run in this process, which has imported what the commands before needed."""
    script, *arguments = shlex.split(command)
    with _as_script(script, arguments), redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return f"\n{said.getvalue().strip()}\n\n"


@contextmanager
def _as_script(script: str, arguments: list[str]) -> Iterator[None]:
    """Arguments, path and working directory as Python sets them for a script."""
    argv, path, here = sys.argv, sys.path[:], Path.cwd()
    sys.argv, sys.path[0] = [script, *arguments], str((ROOT / script).parent)
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(here)
        sys.argv, sys.path[:] = argv, path


def renewed(text: str) -> str:
    """A document with its blocks as their commands print them now.

    Every comment that names a script must begin a block.

    Raises:
        ValueError: a block has no end.
    """
    if len(BLOCK.findall(text)) != text.count("<!-- python benchmarks/"):
        raise ValueError("a block of numbers has no <!-- end --> on a line of its own.")
    return BLOCK.sub(
        lambda b: f"<!-- python {b['command']} -->\n{printed(b['command'])}<!-- end -->",
        text,
    )


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write what the commands print now")
    write = parser.parse_args().write
    stale = []
    for path in documents():
        text = path.read_text()
        if (new := renewed(text)) != text:
            stale.append(path)
            print(f"{path.relative_to(ROOT)}: {'written' if write else 'differs from what its commands print'}")
            if write:
                path.write_text(new)
    if stale and not write:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
