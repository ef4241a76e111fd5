"""TensorBoard, Weights & Biases and others, through the trackers that come with accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError

NONE = "none"


def check_trackers(names: str) -> list[str]:
    """The trackers in a comma-separated list.

    Raises:
        ZOError: one is not known to accelerate, or its package is not installed.

    >>> check_trackers("none")
    []
    """
    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", NONE)]
    if not wanted:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # type: ignore[import-untyped]

    installed = {str(name) for name in get_available_trackers()}
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join((NONE, *sorted(LOGGER_TYPE_TO_CLASS)))
            raise ZOError(f"report_to={name!r} is not known; choose from {known}, with commas between.")
        accelerates_own = LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking"
        if name not in installed and accelerates_own:
            raise ZOError(
                f"report_to={name!r} needs a package that is not installed; install it with pip, or leave it out."
            )
    return wanted


class Trackers:
    """The trackers of one run. One that fails is said so of and left out from then on: no run ends for its sake.

    Args:
        names: as ``check_trackers`` gives them.
        output_dir: names the run; local files go to a folder of it that has the tracker's name.
        options: shown as the run's options.
        run_id: of the run, so that a resumed one goes on in the same record.
        first: the first step that will be logged; a local record of later ones (of a killed run) is dropped.
        say: told of a tracker that fails.
    """

    def __init__(
        self, names: Sequence[str], output_dir: Path, options: Mapping[str, Any], run_id: str, first: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._say = say
        self._trackers: dict[str, Any] = {}
        special: dict[str, dict[str, Any]] = {  # what some trackers can be told more
            "tensorboard": {"purge_step": first},
            "wandb": {"name": output_dir.name, "dir": str(output_dir), "id": run_id, "resume": "allow"},
        }
        for name in names:
            self._try(name, partial(self._start, name, output_dir, options, special.get(name, {})))

    def log_step(self, line: Mapping[str, Any]) -> None:
        """What metrics.jsonl says of a step."""
        names = ("loss", "lr", "queries", "dropped", "forwards", "seconds")
        self._log({f"train/{name}": line[name] for name in names if line[name] is not None}, line["step"])

    def log_evaluation(self, values: Mapping[str, float | None], step: int) -> None:
        """Metrics on the held-out rows after so many steps."""
        numbers = {f"eval/{n}": v for n, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._log(numbers, step)

    def close(self) -> None:
        """Let them finish."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)
        self._trackers = {}

    def _log(self, values: dict[str, Any], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, values, step=step))

    def _start(self, name: str, output_dir: Path, options: Mapping[str, Any], special: Mapping[str, Any]) -> None:
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which accelerate's logger asks for
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = (name, str(output_dir)) if kind.requires_logging_directory else ("zo-opt",)
        tracker = kind(*place, **special)
        getattr(tracker, "start", lambda: None)()  # older versions start when they are made
        if name != "tensorboard":  # which would make a folder of each start
            tracker.store_init_configuration({k: v for k, v in options.items() if v is not None})
        self._trackers[name] = tracker

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"{name} failed ({reason}); the run goes on without it.")
