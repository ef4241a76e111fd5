"""Checkpoints: one safetensors file, atomic, verified by SHA-256, holding everything the next step depends on; and the one before.

The metadata of the file holds ``state`` (JSON: counts, the run's record) and ``sha256``, the digest of the whole file with that
digest's own 64 digits taken as zeros. A checkpoint that does not verify is never used: :func:`newest` says so and takes the one
before it, from which the journal, or the same steps once more, lead to the same bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.adapters.model import restore_schedule
from zo_opt.adapters.storage import read_tensors, restore
from zo_opt.errors import ZOError
from zo_opt.optim import CountingOptimizer
from zo_opt.system.checksum import checksum
from zo_opt.system.files import write_atomically

NAME = "checkpoint.safetensors"
PREVIOUS_NAME = "checkpoint.previous.safetensors"
FORMAT = "zo_opt.checkpoint/2"
_KEY, _ZEROS = b'"sha256":"', b"0" * 64  # quotes within the state are escaped: nothing else reads so
_BLOCK = 1 << 20


def save_checkpoint(
    path: Path,
    model: AdapterModel,
    optimizer: CountingOptimizer,
    lr_scheduler: Any,
    extra: dict[str, Any],
) -> None:
    """Write adapters and optimizer tensors, with the rest as JSON in the file's metadata; what was there is kept as the checkpoint before.

    Raises:
        ZOError: it cannot be written; the earlier ones are as they were.
    """
    state = optimizer.state_dict()
    tensors = _weights(model)
    for index, slots in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    tensors |= {f"memory.{name}": tensor for name, tensor in state.get("memory", {}).items()}
    plain = {
        "format": FORMAT,
        "zo": state["zo"],
        "param_groups": state["param_groups"],
        "lr_scheduler": {k: v for k, v in lr_scheduler.state_dict().items() if k != "lr_lambdas"},
        "extra": extra,
    }
    mode = 0o600 if state["zo"].get("estimator") else 0o644  # the key to the noise is in there
    write_atomically(path, *sealed(tensors, plain), previous=path.with_name(PREVIOUS_NAME), mode=mode)


def save_weights(path: Path, model: AdapterModel) -> None:
    """Write a model's adapters and what changes in them over a run, and nothing else.

    Raises:
        ZOError: it cannot be written.
    """
    write_atomically(path, *sealed(_weights(model), {"format": FORMAT}))


def load_weights(path: Path, model: AdapterModel) -> None:
    """Put back what :func:`save_weights` wrote.

    Raises:
        ZOError: missing, damaged, or of another model.
    """
    verify(path)
    with _of_strangers(path):
        _restore_model(model, read_tensors(path), path)


def sealed(tensors: dict[str, Tensor], plain: dict[str, Any]) -> tuple[memoryview, bytes, memoryview]:
    """The bytes of a checkpoint file, in three parts: tensors and plain values, with the digest of them all in the middle."""
    tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
    content = safetensors_bytes(tensors, {"state": json.dumps(plain), "sha256": _ZEROS.decode()})
    start, view = content.index(_KEY + _ZEROS) + len(_KEY), memoryview(content)
    return view[:start], checksum([content], digits=64).encode(), view[start + len(_ZEROS) :]


def newest(directory: Path, say: Callable[[str], None]) -> Path:
    """The newest checkpoint of a run that verifies.

    Args:
        directory: the run's output_dir.
        say: told of one that does not.

    Raises:
        ZOError: there is none, or none verifies.
    """
    found = [path for name in (NAME, PREVIOUS_NAME) if (path := directory / name).is_file()]
    if not found:
        raise ZOError(f"{directory} holds no {NAME}; give the output_dir of an interrupted run, or leave --resume out.")
    errors = []
    for path in found:
        try:
            verify(path)
        except ZOError as error:
            errors.append(error)
            continue
        if errors:
            say(f"{found[0]} is damaged; the run goes on from the checkpoint before it, after step {step_of(path)}.")
        return path
    raise errors[0]


def close(directory: Path, *, goes_on: bool) -> None:
    """At a run's end: its last checkpoint stays where it can go on with more steps; of a private run it would give the noise away."""
    for name in (PREVIOUS_NAME,) if goes_on else (PREVIOUS_NAME, NAME):
        (directory / name).unlink(missing_ok=True)


def load_checkpoint(
    path: Path,
    model: AdapterModel,
    optimizer: CountingOptimizer,
    lr_scheduler: Any,
) -> dict[str, Any]:
    """Put a checkpoint back; returns what was saved as ``extra``.

    Raises:
        ZOError: missing, damaged, or of another model or optimizer.
    """
    plain = read_state(path)
    with _of_strangers(path):
        tensors = read_tensors(path)
        _restore_model(model, tensors, path)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, slot = name.split(".")
            state.setdefault(int(index), {})[slot] = tensor
        memory = _under("memory.", tensors)
        optimizer.load_state_dict(
            {"state": state, "param_groups": plain["param_groups"], "zo": plain["zo"], "memory": memory}
        )
        lr_scheduler.load_state_dict(plain["lr_scheduler"] | {"lr_lambdas": [None] * len(plain["param_groups"])})
        extra: dict[str, Any] = plain["extra"]
        return extra


def _weights(model: AdapterModel) -> dict[str, Tensor]:
    tensors = {f"adapter.{n}": t for n, t in model.adapter_state().items()}
    return tensors | {f"schedule.{n}": t for n, t in model.schedule_state().items()}


def _restore_model(model: AdapterModel, tensors: dict[str, Tensor], path: Path) -> None:
    restore(model.adapter_state(), _under("adapter.", tensors), f"the checkpoint {path}")
    restore_schedule(model, _under("schedule.", tensors), f"the checkpoint {path}")


def step_of(path: Path) -> int:
    """The number of steps that a checkpoint has done."""
    with _of_strangers(path):
        return int(read_state(path)["zo"]["step"])


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON part, not verified.

    Raises:
        ZOError: it cannot be read, or another version wrote it.
    """
    with _of_strangers(path):
        with safe_open(path, framework="pt") as file:
            plain = dict(json.loads(file.metadata()["state"]))
        if plain["format"] != FORMAT:
            raise ZOError(f"{path} was not written by this version of zo_opt.")
        return plain


def verify(path: Path) -> None:
    """Whether every byte of a checkpoint is what was written.

    Raises:
        ZOError: it is damaged, or another version wrote it.
    """
    read_state(path)
    with _of_strangers(path), path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
        found = re.search(_KEY + b"([0-9a-f]{64})", header)
        if found is None:
            raise ValueError("its sha256 is missing")
        start, stop = found.span(1)
        blocks = iter(lambda: file.read(_BLOCK), b"")
        if checksum(chain([header[:start], _ZEROS, header[stop:]], blocks), digits=64) != found[1].decode():
            raise ValueError("its sha256 is another than when it was written")


@contextmanager
def _of_strangers(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes fail, in one sentence."""
    try:
        yield
    except ZOError:
        raise
    except (
        SafetensorError,
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ZOError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); delete it and start anew, or restore it from a copy."
        ) from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
