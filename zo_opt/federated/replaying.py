"""A tuned adapter from its start and a pool's numbers alone."""

from __future__ import annotations

from pathlib import Path

from zo_opt.adapters import trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.federated.plan import Outline, plan_text
from zo_opt.federated.server import Server
from zo_opt.federated.weights import Weights
from zo_opt.models.models import pick_device
from zo_opt.record.output import RUN_NAME, START_NAME
from zo_opt.record.progress import Reporter
from zo_opt.system.checksum import fingerprint
from zo_opt.training.run_record import config_of, load_start, read_record


def rebuild(
    directory: Path, to: Path, reporter: Reporter, *, device: str | None = None, trust_remote_code: bool = False
) -> tuple[int, int]:
    """Write the adapter of a training's last round, to the bit; returns its rounds and the seeds that were used.

    Args:
        directory: the training's.
        to: where the adapter goes.
        reporter: told what happens.
        device: cpu, cuda or auto; the training's if None.
        trust_remote_code: let the base model's own Python code run.

    Raises:
        ZOError: there is no training, or no round of it; or its start or numbers are damaged.
    """
    pool = Outline.of(plan_text(directory)).pool
    server = Server.load(directory, pool, say=reporter.say)
    if not server.round:
        raise ZOError(f"the training in {directory} has done no round yet; its start is in {directory / START_NAME}.")
    record = read_record(directory)
    config = config_of(record, directory / RUN_NAME, trust_remote_code=trust_remote_code)
    model = load_start(directory, config, record.get("resolved", {}), pick_device(device or config.device), reporter)
    if fingerprint(model.trainable_state()) != pool.start:
        raise ZOError(f"{directory / START_NAME} is not what the training began with; restore it from a copy.")
    Weights(trainable_parameters(model), pool).become(server.totals)
    model.save_pretrained(to)
    return server.round, int((server.uses > 0).sum())
