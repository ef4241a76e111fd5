"""Runs of a comparison as forks of the test process: processes of their own, without ten seconds of imports each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (imported once, for all forks)

import zo_opt.training.loop  # noqa: F401


class ForkedRun:
    """As much of ``subprocess.Popen`` as a comparison uses, for ``python -m zo_opt.cli.main ...``.

    ``preexec_fn`` is called in the fork.
    """

    def __init__(
        self,
        command: list[str],
        *,
        stdout: Any,
        env: dict[str, str],
        preexec_fn: Callable[[], Any] = lambda: None,
        **_: Any,
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(command[3:], stdout.fileno(), env, preexec_fn)

    def _run(self, line: list[str], log: int, env: dict[str, str], prepare: Callable[[], Any]) -> None:
        code = 1
        try:
            torch.set_num_threads(torch.get_num_threads())  # torch's pool anew, before threads do it at once and fail
            prepare()
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_DFL)
            os.setsid()
            os.environ.update(env)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            from zo_opt.cli.main import main

            code = main(line)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


FORKING = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedRun})  # in place of the module ``subprocess``
