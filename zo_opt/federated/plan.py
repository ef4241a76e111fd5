"""A federated training as it was prepared: all that its server and clients need to know, as text."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.federated.options import FederatedConfig
from zo_opt.federated.pool import Pool
from zo_opt.system.plain_json import parse
from zo_opt.tasks.tasks import Task
from zo_opt.training.config import TrainConfig
from zo_opt.training.run_record import config_of, task_in

FORMAT = "zo_opt.federated/1"
KEY = "plan"  # in the configuration of Flower's run
TRUST = "trust-remote-code"  # in that, for the server, and in a client's own: whether code that a plan names may run
APP = "app"  # the folder that flwr run takes
_WHERE = Path("the plan of the federated training")


@dataclass(frozen=True)
class Plan:
    """A training.

    Attributes:
        config: model, task, rows and adapter, as options of a run.
        rules: how rounds go.
        pool: the pool of seeds.
        task: what is learned.
        directory: the server's.
    """

    config: TrainConfig
    rules: FederatedConfig
    pool: Pool
    task: Task
    directory: Path

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "format": FORMAT, "config": self.config.given(), "rules": asdict(self.rules), "pool": self.pool.to_dict(),
                "task": self.task.to_dict(), "directory": str(self.directory),
            }
        )  # fmt: skip

    @classmethod
    def of(cls, text: object, *, trust_remote_code: bool = False) -> Plan:
        """What :meth:`to_text` gave, from a server that may be anybody's.

        Args:
            text: the text.
            trust_remote_code: whether the model's own code, and code that the plan names, may run.

        Raises:
            ZOError: it is no plan, or names code that nobody allowed.
        """
        outline = Outline.of(text)
        config = config_of(outline.plain, _WHERE, trust_remote_code=trust_remote_code)
        task = task_in({"resolved": outline.plain}, _WHERE)
        if task is None:
            raise ZOError(f"{_WHERE} names no task; run the one that zo-opt federated prepared.")
        return cls(config, outline.rules, outline.pool, task, outline.directory)


@dataclass(frozen=True)
class Outline:
    """What of a plan can be read without importing anything that it names.

    Attributes:
        plain: all of it, as plain values.
        rules, pool, directory: of the plan.
    """

    plain: dict[str, Any]
    rules: FederatedConfig
    pool: Pool
    directory: Path

    @classmethod
    def of(cls, text: object) -> Outline:
        """From a plan's text.

        Raises:
            ZOError: it is no plan.
        """
        try:
            plain = parse(text) if isinstance(text, str) else None
            if not isinstance(plain, dict) or plain.get("format") != FORMAT:
                raise ValueError(f"it is no plan of the format {FORMAT!r}")
            rules, pool = FederatedConfig(**plain["rules"]), Pool(**plain["pool"])
            return cls(plain, rules, pool, Path(plain["directory"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ZOError(f"{_WHERE} cannot be read ({error}); run the one that zo-opt federated prepared.") from error


def plan_text(directory: Path) -> str:
    """The text of the plan that was prepared in a directory.

    Raises:
        ZOError: there is none.
    """
    path = directory / APP / "pyproject.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"][KEY]
        return str(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZOError(
            f"{directory} holds no federated training; give the output_dir of zo-opt federated prepare."
        ) from error


def app_files(plan: Plan) -> Mapping[str, str]:
    """The files of the Flower app that runs a plan: apps are zo_opt's, the plan is its configuration."""
    text = json.dumps(plan.to_text())  # a TOML string is written as a JSON one
    return {
        "pyproject.toml": f"""# Written by zo-opt federated prepare; run it with: flwr run {APP}
[project]
name = "zo-opt-federated"
version = "1.0.0"
description = "Federated tuning by seeds and scalars"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "zo-opt"

[tool.flwr.app.components]
serverapp = "zo_opt.federated.server_app:app"
clientapp = "zo_opt.federated.client_app:app"

[tool.flwr.app.config]
{KEY} = {text}
{TRUST} = false
"""
    }
