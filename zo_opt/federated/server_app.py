"""The Flower server app: rounds over Flower's grid, each on disk before the next begins."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np

from zo_opt.directions.philox import mix
from zo_opt.federated.flower import TRAIN, Context, Grid, ServerApp, content_of, message_with
from zo_opt.federated.plan import KEY, TRUST, Outline, Plan, plan_text
from zo_opt.federated.server import Record, Server
from zo_opt.federated.tuning import Tuning, planned_examples, tuning
from zo_opt.record.output import output_directory

PAUSE = 0.1  # seconds between two looks for answers
app = ServerApp()
log = logging.getLogger("flwr").info


def main(grid: Grid, context: Context) -> None:
    """All rounds that are not done yet, of the plan that was prepared on this machine."""
    directory = Outline.of(context.run_config.get(KEY)).directory
    plan = Plan.of(plan_text(directory), trust_remote_code=bool(context.run_config.get(TRUST)))
    with output_directory(plan.directory, "the training's directory", resume=True):
        serve(plan, grid, log)


def serve(plan: Plan, grid: Grid, say: Callable[[str], None]) -> Server:
    """Take a training to its end, from wherever it is; the tuned adapter is then in its directory.

    Args:
        plan: the plan.
        grid: Flower's way to the clients.
        say: told what happens.

    Raises:
        ZOError: the model or the checkpoint is not the plan's, or cannot be written.
    """
    rules, directory = plan.rules, plan.directory
    server = Server.load(directory, plan.pool, late=rules.late, say=say)
    tuned = tuning(plan, planned_examples(plan))
    waiting: dict[str, int] = {}  # message -> node
    if server.round:
        say(f"{server.round} of {plan.pool.rounds} rounds are done already")
    while server.round < plan.pool.rounds:
        nodes = sampled(plan, server.round, connected(grid, rules.min_clients))
        requests = server.begin(nodes)
        server.save(directory)
        life = rules.round_timeout * (rules.late + 1)
        messages = [
            message_with(content, dst_node_id=node, message_type=TRAIN, ttl=life) for node, content in requests.items()
        ]
        new = dict(zip(grid.push_messages(messages), requests, strict=True))
        waiting |= new
        gather(grid, server, waiting, set(new), rules.round_timeout)
        last = server.round + 1 == plan.pool.rounds
        record = server.end()
        if last or server.round % rules.eval_rounds == 0:
            record.evaluation = evaluated(tuned, server)
        server.save(directory)
        say(described(record, plan.pool.rounds))
    tuned.weights.become(server.totals)
    tuned.tools.model.save_pretrained(directory)
    say(f"the tuned adapter is in {directory}")
    return server


def connected(grid: Grid, least: int) -> list[int]:
    """The clients that are there, once there are enough of them."""
    while len(nodes := sorted(grid.get_node_ids())) < least:
        time.sleep(PAUSE)
    return nodes


def sampled(plan: Plan, number: int, nodes: list[int]) -> list[int]:
    """Whom a round asks."""
    wanted = min(len(nodes), max(1, math.ceil(plan.rules.fraction * len(nodes))))
    generator = np.random.default_rng(mix(plan.pool.seed, number, len(nodes), 1))
    return sorted(nodes[i] for i in generator.choice(len(nodes), wanted, replace=False))


def gather(grid: Grid, server: Server, waiting: dict[str, int], new: set[str], seconds: float) -> None:
    """Take what comes until all of this round's requests are answered, or time is up; what is missing may come in a later round."""
    end = time.monotonic() + seconds
    while True:
        for reply in grid.pull_messages(list(waiting)):
            asked = reply.metadata.reply_to_message_id
            node = waiting.pop(asked, None)
            if node is not None:
                server.take(node, content_of(reply))
            new.discard(asked)
        if not new or time.monotonic() >= end:
            return
        time.sleep(PAUSE)


def evaluated(tuned: Tuning, server: Server) -> dict[str, object]:
    """The server's own look at the weights."""
    tuned.weights.become(server.totals)
    return tuned.evaluate()


def described(record: Record, rounds: int) -> str:
    """A round in words."""
    words = [f"round {record.round + 1} of {rounds}: {record.answered} answers from {record.asked} clients"]
    words += [f"{record.late} late"] if record.late else []
    words += [f"{record.behind} to be told all"] if record.behind else []
    words += [f"refused: {kind} ({count})" for kind, count in sorted(record.refused.items())]
    if record.evaluation is not None:
        words += [f"{name} {value:.4g}" for name, value in record.evaluation.items() if isinstance(value, float)]
    return ", ".join(words)


app.main()(main)
