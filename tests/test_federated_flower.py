"""The Flower apps over a grid in one process: learning, late and lost clients, those who mean harm, bytes on the wire."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Sentiment, run_main

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from local_grid import LocalGrid, message_with, wire_bytes

from zo_opt import ZOError, load_run
from zo_opt.adapters.storage import read_tensors
from zo_opt.federated import client_app, server_app
from zo_opt.federated.flower import content_of
from zo_opt.federated.messages import Request
from zo_opt.federated.plan import Plan, plan_text
from zo_opt.federated.server import Server

ROUNDS, CLIENTS = 6, 3


@pytest.fixture(scope="module")
def prepared(
    tiny_model_dir: Path, sentiment_files: Sentiment, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """A new directory with a training that was prepared once."""

    def directory() -> Path:
        path = tmp_path_factory.mktemp("federated") / "fed"
        options = {
            "model_name_or_path": tiny_model_dir, "train_file": sentiment_files.train, "eval_file": sentiment_files.eval,
            "template": "{text} It was", "verbalizers": "terrible,great", "device": "cpu", "precision": "fp32", "rounds": ROUNDS,
            "pool_size": 32, "eval_rounds": 3, "label_skew": 0.5, "min_clients": CLIENTS, "round_timeout": 0.3, "output_dir": path,
        }  # fmt: skip
        assert (
            run_main(["federated", "prepare", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]) == 0
        )
        return path

    return directory


def context(text: str, number: int, node: dict[str, object]) -> Context:
    return Context(1, number, node, RecordDict(), {"plan": text})  # type: ignore[arg-type]


def honest(text: str, number: int, node: dict[str, object] | None = None) -> Callable[[Message], Message]:
    """A client app with a context of its own."""
    own = context(text, number, node or {"partition-id": number - 1, "num-partitions": CLIENTS})
    return lambda message: client_app.app(message, own)


def test_a_training_over_flower(prepared: Callable[[], Path], sentiment_files: Sentiment) -> None:
    directory = prepared()
    text, said = plan_text(directory), []
    clients = {number: honest(text, number) for number in range(1, CLIENTS)}
    clients[CLIENTS] = honest(text, CLIENTS, {"rows": str(sentiment_files.train)})  # which has a file of its own
    plan = Plan.of(text)
    server = server_app.serve(plan, grid := LocalGrid(clients), said.append)
    assert [record.answered for record in server.rounds] == [CLIENTS] * ROUNDS
    assert [record.evaluation is not None for record in server.rounds] == [False, False, True] * 2
    assert said[-1] == f"the tuned adapter is in {directory}"
    for request, reply in grid.sent:
        assert wire_bytes(request) <= 16 * CLIENTS * plan.pool.seeds + 512
        assert wire_bytes(reply) <= 16 * plan.pool.seeds + 512
    assert run_main(["replay", str(directory), "--to", str(directory.parent / "again")]) == 0
    one, other = (read_tensors(d / "adapter_model.safetensors") for d in (directory, directory.parent / "again"))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    last = server.rounds[-1].evaluation
    assert last is not None
    assert load_run(directory).evaluate().accuracy == pytest.approx(last["accuracy"])


def test_a_server_goes_on_where_it_was_killed(prepared: Callable[[], Path]) -> None:
    directory = prepared()
    text = plan_text(directory)
    calls, one = 0, honest(text, 1)

    def failing(message: Message) -> Message:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt  # the server's process ends within its fourth round
        return one(message)

    with pytest.raises(KeyboardInterrupt):
        server_app.serve(
            Plan.of(text), LocalGrid({n: failing if n == 1 else honest(text, n) for n in (1, 2, 3)}), print
        )
    assert Server.load(directory, Plan.of(text).pool).round == 3
    said: list[str] = []
    server = server_app.serve(Plan.of(text), LocalGrid({n: honest(text, n) for n in (1, 2, 3)}), said.append)
    assert said[0] == f"3 of {ROUNDS} rounds are done already"
    # Clients of before have new contexts: they are behind once.
    assert [record.behind for record in server.rounds] == [0, 0, 0, CLIENTS, 0, 0]


def test_clients_that_are_late_lost_or_mean_harm(prepared: Callable[[], Path]) -> None:
    text, rng = plan_text(directory := prepared()), random.Random(0)

    def harmful(message: Message) -> Message:
        request = content_of(message)
        assert isinstance(request, bytes)
        records = rng.choice([
            RecordDict({"z": ConfigRecord({"z": rng.randbytes(64)})}), RecordDict({"z": MetricRecord({"z": 1.0})}), RecordDict(),
            RecordDict({"z": ConfigRecord({"z": "text"})}),
        ])  # fmt: skip
        return Message(records, reply_to=message)

    def crashing(message: Message) -> Message:
        raise RuntimeError("out of memory")

    clients = {1: honest(text, 1), 2: honest(text, 2), 3: harmful, 4: crashing, 5: honest(text, 3)}
    grid = LocalGrid(clients, delay=lambda node, number: {5: 6, 2: None if number > 10 else 0}.get(node, 0))
    server = server_app.serve(Plan.of(text), grid, print)
    assert server.round == ROUNDS
    assert sum(sum(record.refused.values()) for record in server.rounds) >= ROUNDS  # the last may be there too late
    assert sum(record.late for record in server.rounds) >= 1
    assert np.abs(server.totals).max() <= server.pool.limit(0) * ROUNDS * CLIENTS
    assert (directory / "adapter_model.safetensors").is_file()


def test_what_a_client_refuses(prepared: Callable[[], Path]) -> None:
    text = plan_text(prepared())
    request = next(iter(Server(Plan.of(text).pool).begin([1]).values()))
    assert len(Request.of(request, Plan.of(text).pool).seeds) == 4
    message = message_with(request, dst_node_id=1, message_type="train")
    with pytest.raises(ZOError, match="has no rows"):
        client_app.app(message, context(text, 1, {}))
    with pytest.raises(ZOError, match="cannot be read"):
        client_app.app(message, context("nonsense", 1, {}))
