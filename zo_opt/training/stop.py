"""SIGINT and SIGTERM: stop at once where nothing is lost by it, after the step while training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

_SAID = b"\nzo-opt: stopping after this step; Ctrl-C once more stops at once\n"


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; ``exit_code`` is 128 + the signal.

    Args:
        output_dir: of the run.
        signum: the signal.
        after: how far it has come.
        command: what was run.
        begun: whether it left a checkpoint.
    """

    def __init__(
        self, output_dir: Path, signum: int, *, after: str = "", command: str = "train", begun: bool = True
    ) -> None:
        how = f"continue with: zo-opt {command} --output_dir {output_dir} --resume"
        if not begun:
            after, how = " before the first step", "nothing was trained yet; give the same command again"
        super().__init__(f"stopped{after}; {how}")
        self.exit_code = 128 + signum


class StopRequest(KeyboardInterrupt):
    """A signal asked the process to stop, now."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class StopSignals:
    """Takes both signals while it is entered: as an exception, or as a request that the loop looks at.

    Attributes:
        signum: the first signal that came; None if none did.

    >>> with StopSignals() as stop, stop.held():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.signum == signal.SIGTERM
    ...     stop.signum = None  # dealt with
    True
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._take)
        except ValueError:  # not in the main thread: signals are somebody else's
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, a first signal only sets ``signum``; a second one stops at once."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signum is not None:
            raise StopRequest(self.signum)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        first = self.signum is None
        self.signum = signum if self.signum is None else self.signum
        if not (self._held and first):
            raise StopRequest(self.signum)
        if signum == signal.SIGINT:
            os.write(2, _SAID)  # a signal's handler must not wait for a console
