"""The journal of a run: what every step did to the weights, in a line of text, so that replaying it rebuilds them to the bit.

>>> import tempfile
>>> from zo_opt import MeZO
>>> from zo_opt.journal import replay
>>> theta, again = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
>>> _ = again.load_state_dict(theta.state_dict())
>>> path = Path(tempfile.mkdtemp()) / "journal"
>>> optimizer = MeZO(theta.parameters(), lr=0.05, directions="rademacher")
>>> with Journal.create(path, optimizer, theta) as journal:
...     for _ in range(20):
...         loss = optimizer.step(lambda: theta.weight.square().sum())
...         journal.append(optimizer.last_update)
>>> replay(path, again), torch.equal(theta.weight, again.weight)
(20, True)

Into a loop of somebody else (the Trainer's) it goes as a hook:
``optimizer.register_step_post_hook(lambda *_: journal.append(optimizer.last_update))``.

What is rebuilt, and where. Every optimizer of :data:`~zo_opt.optim.OPTIMIZERS` but ``agzo`` can be replayed on the kind of device and the version
of torch that it was trained with. With Rademacher directions and the SGD rule any device gives the same bits: directions are integer
arithmetic, products with +-1 are exact, and sums round alike everywhere. Other rules (Adam) round as the device does, and native
Gaussian directions are other numbers on other devices; a replay that comes out otherwise than training is refused. Weights that
somebody else moves (``write_grad`` with another optimizer, an average of weights) cannot be replayed; ``append`` and ``replay`` say so.

The format is described in :mod:`zo_opt.journal.format`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from zo_opt.errors import ZOError
from zo_opt.journal.format import Contents, Header, make_line, read_journal
from zo_opt.journal.provenance import (
    check_described,
    describe,
    device_type,
    frozen_state,
    progress,
    tuned_names,
)
from zo_opt.optim import Update, ZerothOrderOptimizer
from zo_opt.system.checksum import fingerprint
from zo_opt.system.files import GrowingFile, write_atomically

NAME = "journal"


class Journal:
    """An append-only file with a line a step. Use as a context manager; made by ``create`` or ``open``.

    A line is one write to the end of the file, without buffers: a process that is killed loses nothing it appended. ``seal`` brings
    all to the disk, so that a power cut loses nothing either.
    """

    def __init__(self, path: Path, optimizer: ZerothOrderOptimizer, model: nn.Module, contents: Contents) -> None:
        self.path, self.steps = path, contents.steps
        self._optimizer, self._model = optimizer, model
        self._checksum = contents.checksum
        self._sealed = self.steps if self.steps in contents.weights or not contents.updates else -1
        # The newest step that stands alone: what control variates refer to.
        self._alone = next((u for u in reversed(contents.updates) if u.coefficients and not u.older), None)
        self._file = GrowingFile(path, contents.end)

    @classmethod
    def create(cls, path: str | Path, optimizer: ZerothOrderOptimizer, model: nn.Module) -> Self:
        """A new journal, before the first step.

        Args:
            path: a file that does not exist.
            optimizer: as it will be used; its seed, directions, update rule, weight decay and parameters must stay.
            model: owns the optimizer's parameters; all its weights are fingerprinted.

        Raises:
            ZOError: the file exists or cannot be written; or the optimizer has state that the journal would lack.
        """
        path = Path(path)
        if path.exists():
            raise ZOError(f"{path} exists already; give another path, or go on with it by Journal.open.")
        if optimizer.own_directions:
            raise ZOError(
                f"{optimizer.method.name!r} takes its directions from what forwards show, which a journal has not; save the weights themselves."
            )
        tuned = tuned_names(optimizer, model)
        if optimizer.state_dict()["state"]:
            raise ZOError(
                f"{optimizer.method.name} has state from {optimizer.step_count} earlier steps that a new journal would lack; begin "
                "the journal with the run, or go on with the run's own by Journal.open."
            )
        header = Header(
            optimizer=describe(optimizer, model),
            start=progress(optimizer),
            frozen=fingerprint(frozen_state(model, tuned.values())),
            tuned=fingerprint(tuned),
            device=device_type(optimizer),
            torch=str(torch.__version__),
        )
        checksum, line = make_line(vars(header), "")
        write_atomically(path, line)
        return cls(path, optimizer, model, Contents(header, end=len(line), checksum=checksum))

    @classmethod
    def open(cls, path: str | Path, optimizer: ZerothOrderOptimizer, model: nn.Module, *, cut: bool = False) -> Self:
        """Go on with a journal, where the optimizer stands (after ``replay``, or with a checkpoint loaded). A torn last line is removed.

        Args:
            path: the file.
            optimizer: as in training.
            model: owns the optimizer's parameters.
            cut: remove the journal's steps beyond the optimizer's, to do them again; they may even be damaged.

        Raises:
            ZOError: damaged; of another optimizer or other weights; or it has fewer or (without ``cut``) more steps.
        """
        path = Path(path)
        contents = read_journal(path, optimizer.step_count if cut else None)
        if contents.steps != optimizer.step_count:
            raise ZOError(
                f"{path} holds steps up to {contents.steps}, but the optimizer has done {optimizer.step_count}; replay the "
                "journal or load the checkpoint that fits it first, or pass cut=True to drop later steps and do them again."
            )
        check_described(contents.header.optimizer, optimizer, model)
        if contents.differs(contents.steps, tuned_names(optimizer, model)):
            raise ZOError(
                f"the tuned weights are not those that {path} has after {contents.steps} steps; load the checkpoint that fits it."
            )
        return cls(path, optimizer, model, contents)

    def append(self, update: Update | None) -> None:
        """Record a step that the optimizer took (its ``last_update``).

        Raises:
            ZOError: it is not the step after the last recorded one, or the file cannot be written.
        """
        if update is None:
            raise ZOError(
                "the optimizer has taken no step to record: write_grad leaves the weights to another optimizer, which no "
                "journal can replay; save the weights themselves."
            )
        if update.step != self.steps:
            raise ZOError(
                f"{self.path} goes on with step {self.steps}, but the update is of step {update.step}; append every step once, "
                "in order (steps taken by write_grad cannot be replayed)."
            )
        alone = (self._alone.step, self._alone.coefficients) if self._alone is not None else None
        older = [step if (step, numbers) == alone else [step, numbers] for step, numbers in update.older]
        row: list[Any] = [update.step, update.lrs, update.coefficients, update.curvatures, older, update.lost]
        while len(row) > 3 and not row[-1]:
            row.pop()
        self._write(row)
        self.steps += 1
        if update.coefficients and not update.older:
            self._alone = update

    def seal(self) -> None:
        """Record a fingerprint of the tuned weights, which a replay must meet, and bring all to the disk. Nothing if just done.

        Raises:
            ZOError: the optimizer has taken a step that was not appended, or the file cannot be written.
        """
        if self._optimizer.step_count != self.steps:
            raise ZOError(
                f"the optimizer has done {self._optimizer.step_count} steps and {self.path} holds steps up to {self.steps}; "
                "append every step before the journal is sealed or closed."
            )
        if self._sealed != self.steps:
            self._write({"steps": self.steps, "weights": fingerprint(tuned_names(self._optimizer, self._model))})
            self._sealed = self.steps
        self._file.sync()

    def close(self) -> None:
        """Seal and close."""
        try:
            self.seal()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:  # not sealed: who knows where the weights are
            self._file.close()

    def _write(self, content: Any) -> None:
        checksum, line = make_line(content, self._checksum)
        self._file.append(line.removesuffix(b"\n"))
        self._checksum = checksum
