"""The Flower client app: requests and answers through Flower's messages, what a client knows in Flower's context.

A client's rows are named in its own Flower configuration: ``rows``, a file. Flower's simulation gives ``partition-id`` and ``num-partitions``
instead: the plan's training rows are then dealt among the clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.federated.client import Client, Memory
from zo_opt.federated.flower import ClientApp, ConfigRecord, Context, Message, content_of, message_with
from zo_opt.federated.plan import KEY, TRUST, Plan
from zo_opt.federated.split import deal
from zo_opt.federated.tuning import Tuning, local, own_examples, planned_examples, tuning

MEMORY = "zo_opt.memory"
app = ClientApp()


def train(message: Message, context: Context) -> Message:
    """Answer a request."""
    plan = Plan.of(context.run_config.get(KEY), trust_remote_code=bool(context.node_config.get(TRUST)))
    client = client_of(plan, context.node_config, context.node_id)
    record = context.state.config_records.get(MEMORY)
    stored = None if record is None else record.get(MEMORY)
    memory = Memory.of(stored, plan.pool) if isinstance(stored, bytes) else Memory.fresh(plan.pool)
    answer = client.answer(content_of(message), memory)
    context.state[MEMORY] = ConfigRecord({MEMORY: memory.to_bytes()})
    return message_with(answer, reply_to=message)


def client_of(plan: Plan, node: Mapping[str, Any], number: int) -> Client:
    """The client that a node's configuration describes.

    Raises:
        ZOError: it names no rows, or they do not fit the plan.
    """
    config = plan.config
    if "rows" in node:
        found = _tuning(local(plan, node).to_text(), str(node["rows"]), config.trust_remote_code)
        mine = list(range(len(found.tools.train)))
    elif "partition-id" in node and "num-partitions" in node:
        found = _tuning(plan.to_text(), None, config.trust_remote_code)
        shares = deal(found.tools.train.labels, int(node["num-partitions"]), config.seed, plan.rules.label_skew)
        number = int(node["partition-id"])
        mine = shares[number]
    else:
        raise ZOError(
            "this client has no rows; start it with --node-config 'rows=\"my.jsonl\"' (a file with the columns of the task)."
        )
    return Client(
        plan.pool, found.weights, lambda rows: found.loss([mine[i] for i in rows]),
        rows=len(mine), batch_size=config.batch_size, seed=config.seed + number,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _tuning(plan: str, rows: str | None, trust_remote_code: bool) -> Tuning:
    """One model for all clients that a process simulates, one after the other."""
    made = Plan.of(plan, trust_remote_code=trust_remote_code)
    return tuning(made, planned_examples(made) if rows is None else own_examples(made, Path(rows)))


app.train()(train)
