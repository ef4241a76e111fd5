"""``zo-opt replay``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from zo_opt.cli.say import print_json, reporter_of
from zo_opt.errors import ZOError
from zo_opt.federated.plan import APP
from zo_opt.federated.replaying import rebuild
from zo_opt.journal import NAME, read_journal, replay
from zo_opt.models.models import pick_device
from zo_opt.record.output import RESULTS_NAME, RUN_NAME, START_NAME, output_directory
from zo_opt.training.run_record import config_of, load_start, read_config, read_record


def run(options: Namespace, command: str) -> None:
    """Rebuild the adapter that a run tuned, from the base model, the adapter's start and the journal."""
    if options.to is None:
        raise ZOError("replay needs --to, a new directory for the adapter.")
    if (options.journal / APP).is_dir():
        _replay_federated(options)
        return
    path: Path = options.journal / NAME if options.journal.is_dir() else options.journal
    run_dir = path.parent
    if not path.exists() and (run_dir / RUN_NAME).is_file() and not (run_dir / START_NAME).exists():
        made = read_config(run_dir, trust_remote_code=options.trust_remote_code)
        queries = ", queries on activations" if made.on_activations else ""
        raise ZOError(
            f"the run in {run_dir} has no journal; runs keep one where queries on weights are all that moves them and the adapter does not "
            f"change on its own (this run: optimizer {made.optimizer_name}, adapter {made.adapter_name}{queries}). Its adapter is in "
            f"{run_dir} itself."
        )
    contents = read_journal(path, options.steps)  # whatever is wrong with it is said before the model is loaded
    if not (run_dir / RUN_NAME).is_file():
        raise ZOError(
            f"{run_dir} holds no {RUN_NAME} beside the journal; give one of a run of zo-opt train, or call "
            "zo_opt.journal.replaying on the model it was written with."
        )
    record = read_record(run_dir)
    config = config_of(record, run_dir / RUN_NAME, trust_remote_code=options.trust_remote_code)
    resolved = record.get("resolved", {})
    if options.steps is None and (run_dir / RESULTS_NAME).exists() and contents.steps < config.most_steps:
        raise ZOError(
            f"{path} ends after {contents.steps} of the run's {config.most_steps} steps: its end was lost; restore it from a copy, "
            f"or give --steps {contents.steps} to take what is left."
        )
    reporter, as_json = reporter_of(options)
    with output_directory(options.to, "--to") as to:
        device = pick_device(options.device or config.device)
        model = load_start(run_dir, config, resolved, device, reporter)
        steps = replay(path, model, steps=options.steps, exact=not options.inexact)
        model.save_pretrained(to)
    reporter.say(f"the adapter after step {steps} of {config.most_steps}, rebuilt on {device.type}, is in {options.to}")
    if as_json:
        print_json({"journal": path, "to": options.to, "steps": steps, "of": config.most_steps, "device": device.type})


def _replay_federated(options: Namespace) -> None:
    """A federated training's journal is its pool's numbers."""
    for name in ("steps", "inexact"):
        if getattr(options, name):
            raise ZOError(f"{name} is of journals of steps, and a federated training has none; leave it out.")
    reporter, as_json = reporter_of(options)
    with output_directory(options.to, "--to") as to:
        rounds, seeds = rebuild(
            options.journal, to, reporter, device=options.device, trust_remote_code=options.trust_remote_code
        )
    reporter.say(
        f"the adapter after {rounds:,} rounds, rebuilt from the numbers of {seeds:,} seeds, is in {options.to}"
    )
    if as_json:
        print_json({"journal": options.journal, "to": options.to, "rounds": rounds, "seeds": seeds})
