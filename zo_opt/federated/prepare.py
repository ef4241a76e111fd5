"""From options to a prepared federated training: pool, start, record, and the Flower app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from zo_opt.adapters import trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.federated.options import FederatedConfig
from zo_opt.federated.plan import APP, Plan, app_files
from zo_opt.federated.pool import Pool
from zo_opt.federated.tuning import build, prints
from zo_opt.federated.weights import Weights
from zo_opt.privacy import check_delta, epsilon_of, noise_for
from zo_opt.record.output import RUN_NAME, START_NAME, output_directory
from zo_opt.record.progress import Reporter
from zo_opt.system.files import write_atomically
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import load_examples
from zo_opt.training.run_record import new_record, record_bytes

ADAPTER: dict[str, Any] = {"name": "spectral", "positions": "answer"}
LR = 1e-2
# The plain estimator and update: what moves the weights is the pool's. One step, for what is reckoned from their number.
_FIXED: dict[str, Any] = {"optimizer": "mezo", "query_mode": "sequential", "steps": 1}


def prepare(values: Mapping[str, Any], reporter: Reporter, command: str) -> Path:
    """Write all that a training needs into a new directory; returns it.

    Args:
        values: options of :class:`FederatedConfig` and of a run.
        reporter: told what happens.
        command: the command line, for the record.

    Raises:
        ZOError: a mistake in the options, model or rows.
    """
    names = {f.name for f in fields(FederatedConfig)}
    rules = FederatedConfig(**{name: value for name, value in values.items() if name in names})
    given = {name: value for name, value in values.items() if name not in names}
    if "output_dir" not in given:
        raise ZOError("federated prepare needs --output_dir, a new directory for the training.")
    config = TrainConfig.from_dict({"adapter": ADAPTER, "lr": LR} | given | _FIXED)
    config.check()
    if not config.lr:
        raise ZOError("lr=0 moves nothing; give a positive learning rate.")
    if not rules.fraction <= 1:
        raise ZOError(f"fraction={rules.fraction} is not possible; give a share of the clients, from 0 to 1.")
    noise = noise_of(rules, reporter)
    with output_directory(config.output_dir or Path()) as directory:
        examples = load_examples(config, reporter)
        tools = build(config, examples, reporter)
        pool = Pool(
            size=rules.pool_size, seed=config.seed, seeds=rules.seeds_a_round, rounds=rules.rounds, lr=config.lr,
            lr_schedule=config.lr_schedule, zo_eps=config.eps, clip=rules.clip, noise=noise, choice=rules.seed_choice,
            most_rows=rules.most_rows, **prints(tools),
        )  # fmt: skip
        Weights(trainable_parameters(tools.model), pool)  # whether they can be tuned so
        plan = Plan(config, rules, pool, examples.task, directory.resolve())
        tools.model.save_pretrained(directory / START_NAME)
        for name, text in app_files(plan).items():
            write_atomically(directory / APP / name, text.encode())
        record = new_record(config, command, tools, examples.record)
        write_atomically(directory / RUN_NAME, record_bytes(record, examples.record))
        reporter.say(counted(pool))
        reporter.say(f"{tools.model.trainable_summary()}, frozen base in {tools.precision}")
    return directory


def counted(pool: Pool) -> str:
    """How clients count, in words."""
    if pool.most_rows is None:
        return "every client counts alike, however many rows it has (--most_rows weighs them by their rows)"
    return f"a client counts by its rows, fully from {pool.most_rows:,} rows on"


def noise_of(rules: FederatedConfig, reporter: Reporter) -> float:
    """The noise that the options ask for, in units of clip; 0 if they ask for none.

    Raises:
        ZOError: options that do not go together, or no noise that keeps to the epsilon.
    """
    if rules.privacy_epsilon is None:
        return rules.privacy_noise or 0.0
    if rules.privacy_noise is not None:
        raise ZOError(
            "privacy_epsilon and privacy_noise were both given, and one follows from the other; leave one out."
        )
    check_delta(rules.privacy_delta)
    noise = noise_for(rules.privacy_epsilon, rules.privacy_delta, {1: rules.rounds}, examples=1, batch_size=1)
    reporter.say(
        f"noise {noise:.3g} times the clip keeps a client's {rules.rounds:,} answers within epsilon {rules.privacy_epsilon:g}"
    )
    return noise


def spent(pool: Pool, answers: int, delta: float) -> float:
    """Epsilon of a client that gave so many answers; infinite without noise."""
    if not pool.noise:
        return float("inf")
    return epsilon_of(pool.noise, {1: answers}, delta, examples=1, batch_size=1)
