"""Federated tuning by seeds and scalars: accuracy against rounds and bytes, sizes of messages, kills, hostile clients, epsilon.

    python benchmarks/federated.py accuracy --data DIR --task trec --methods federated,central,fedavg --out federated.jsonl
    python benchmarks/federated.py table federated.jsonl
    python benchmarks/federated.py bytes
    python benchmarks/federated.py kills --rounds 50 --fuse 12
    python benchmarks/federated.py hostile --messages 10000
    python benchmarks/federated.py epsilon

DIR holds trec (train.jsonl, test.jsonl) and sst2 (train.tsv, dev.tsv). ``accuracy``: 20 clients, their rows dealt with label skew
(Dirichlet 0.5); spectral gains that act on answers, in the last layers. ``federated`` is zo_opt's server and clients in one process, message by
message, clients weighed by their rows; ``central`` is the same with one client that has all rows and makes all steps of a round, so that adapters,
pool, clip, update and schedule are the same, and token evaluations, too, but for clients with fewer rows than a batch. Learning rates are to be
chosen with ``--validation``, which measures on training rows held out. ``fedavg`` is LoRA on the same layers and
positions by AdamW and backpropagation (counted as two forwards more) on each client, averaged by Flower's own FedAvg strategy. ``bytes`` and
``fedavg`` need Flower. A line of the file is a run; its ``curve`` has a point an evaluation: rounds, token evaluations, bytes of a client to
and fro, accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from learning import tools_of

from zo_opt import trainable_parameters
from zo_opt.federated.client import Client, Memory
from zo_opt.federated.messages import Answer
from zo_opt.federated.pool import Pool
from zo_opt.federated.server import Server
from zo_opt.federated.split import deal
from zo_opt.federated.weights import Weights
from zo_opt.privacy import epsilon_of
from zo_opt.tasks.evaluation import evaluate
from zo_opt.training.stepper import training_loss

DEPTH = 30
Point = dict[str, Any]


class Bench:
    """A task's rows, dealt among clients, and a model with adapters in its last layers."""

    now: Bench | None = None

    def __init__(self, options: argparse.Namespace, adapter: dict[str, Any]) -> None:
        from rich.console import Console

        from zo_opt.record.progress import Reporter

        layers = list(range(DEPTH - options.layers, DEPTH))
        cache = {"prompt_cache": "disk", "prompt_cache_dir": options.cache} if options.cache else {}
        more = {
            "adapter": adapter | {"positions": "answer", "layers": layers}, "optimizer": "mezo", "query_mode": "sequential", "steps": 1,
            "seed": options.seed, "validation": options.validation, "precision": "fp32",
        }  # fmt: skip
        config, self.tools = tools_of(options.task, Path(options.data), more | cache)
        self.tools.record_prompts(config, Path(options.cache or "."), Reporter(Console(quiet=True)))
        Bench.now = self
        self.model, self.rows, self.options = self.tools.model, self.tools.train, options
        self.parameters = trainable_parameters(self.model)
        self.shares = deal(self.rows.labels, options.clients, options.seed, options.skew)
        self.tokens, self.began = 0, time.monotonic()

    @classmethod
    def close(cls) -> None:
        """Let go of the prompts on disk, for the next method."""
        if cls.now is not None and cls.now.tools.prompts is not None:
            store = cls.now.tools.prompts.recorder.store
            if store is not None:
                store.close(remove=False)
        cls.now = None

    def loss(self, indices: list[int], passes: int = 1) -> torch.Tensor:
        """Of these rows, at the weights as they are; a label is one token."""
        self.tokens += passes * len(indices)
        return training_loss(self.model, self.rows, self.rows.batch(indices))

    def point(self, number: int, bytes_: float = 0.0) -> Point:
        """An evaluation on the held-out rows."""
        found = evaluate(self.model, self.tools.held_out, 32)
        point = {
            "round": number, "tokens": self.tokens, "bytes": round(bytes_), "accuracy": round(100 * found.accuracy, 2),
            "loss": round(found.loss, 4), "seconds": round(time.monotonic() - self.began),
        }  # fmt: skip
        print(json.dumps(point), flush=True)
        return point


def federated(options: argparse.Namespace) -> Iterator[Point]:
    """Rounds of seeds and scalars, clients weighed by their rows."""
    bench = Bench(options, {"name": "spectral", "rank": options.rank})
    most = None if options.alike else max(map(len, bench.shares))
    return rounds(bench, bench.shares, options.seeds_a_round, lr=options.lr, most_rows=most)


def central(options: argparse.Namespace) -> Iterator[Point]:
    """All rows in one place: the same rounds, with one client that has all rows and makes all steps, one after the other."""
    bench = Bench(options, {"name": "spectral", "rank": options.rank})
    steps = options.seeds_a_round * math.ceil(options.fraction * options.clients)
    return rounds(bench, [list(range(len(bench.rows)))], steps, lr=options.central_lr)


def rounds(
    bench: Bench, shares: list[list[int]], seeds: int, *, lr: float, most_rows: int | None = None
) -> Iterator[Point]:
    """A training of clients with these rows, message by message."""
    options = bench.options
    pool = Pool(
        size=options.pool, seed=options.seed, seeds=seeds, rounds=options.rounds, lr=lr, clip=options.clip, choice=options.choice,
        most_rows=most_rows,
    )  # fmt: skip
    weights, server = Weights(bench.parameters, pool), Server(pool)
    clients = [
        Client(pool, weights, lambda rows, mine=mine: bench.loss([mine[i] for i in rows]), rows=len(mine), batch_size=options.batch, seed=n)
        for n, mine in enumerate(shares)
    ]  # fmt: skip
    memories = [Memory.fresh(pool) for _ in clients]
    yield bench.point(0)
    for number in range(options.rounds):
        asked = random.Random(number).sample(range(len(clients)), math.ceil(options.fraction * len(clients)))
        for node, content in server.begin(sorted(asked)).items():
            assert server.take(node, clients[node].answer(content, memories[node])) == "accepted"
        server.end()
        if (number + 1) % options.every == 0 or number + 1 == options.rounds:
            weights.become(server.totals)
            sent = sum(r.sent + r.received for r in server.rounds) / len(clients)
            yield bench.point(number + 1, sent if len(clients) > 1 else 0.0)


def fedavg(options: argparse.Namespace) -> Iterator[Point]:
    """LoRA by backpropagation on every client, averaged by Flower."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from local_grid import LocalGrid, wire_bytes

    bench = Bench(options, {"name": "lora", "rank": 8})
    state = dict(zip(map(str, range(len(bench.parameters))), bench.parameters, strict=True))
    counters, points, clients = Counter[int](), [bench.point(0)], {}

    def load(arrays: ArrayRecord) -> None:
        with torch.no_grad():
            for name, value in arrays.to_torch_state_dict().items():
                state[name].copy_(value)

    def train(node: int, message: Message) -> Message:
        load(message.content["arrays"])
        mine, optimizer = (
            bench.shares[node],
            torch.optim.AdamW(bench.parameters, lr=options.fedavg_lr, weight_decay=0.0),
        )
        draw = random.Random(1000 * node + counters[node])
        counters[node] += 1
        for _ in range(options.local_steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                bench.loss(
                    [mine[i] for i in draw.sample(range(len(mine)), min(options.batch, len(mine)))], passes=3
                ).backward()
            optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord({n: p.detach() for n, p in state.items()}),
                "metrics": MetricRecord({"num-examples": len(mine)}),
            }
        )
        return Message(content, reply_to=message)

    for node in range(options.clients):
        clients[node + 1] = lambda message, node=node: train(node, message)
    grid = LocalGrid(clients)

    def look(number: int, arrays: ArrayRecord) -> None:
        if number == 0:
            return
        load(arrays)
        sizes = sum(wire_bytes(a) + wire_bytes(b) for a, b in grid.sent) / options.clients
        bench.bytes += sizes  # type: ignore[attr-defined]
        grid.sent.clear()
        if number % options.fedavg_every == 0 or number == options.fedavg_rounds:
            points.append(bench.point(number, bench.bytes))  # type: ignore[attr-defined]

    bench.bytes = 0.0  # type: ignore[attr-defined]
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=options.clients)
    start = ArrayRecord({name: p.detach() for name, p in state.items()})
    strategy.start(grid, start, num_rounds=options.fedavg_rounds, evaluate_fn=look)
    yield from points


METHODS = {
    "federated": federated,
    "central": central,
    "fedavg": fedavg,
}


def accuracy(options: argparse.Namespace) -> None:
    """Run what is asked for, and append a line a run."""
    torch.set_num_threads(1)
    for method in options.methods.split(","):
        print(method, flush=True)
        start = time.monotonic()
        with torch.no_grad():
            curve = list(METHODS[method](options))
        Bench.close()
        plain = {k: v for k, v in vars(options).items() if k not in ("run", "out", "data", "cache", "methods")}
        run = {"method": method, "options": plain, "curve": curve, "seconds": round(time.monotonic() - start)}
        with Path(options.out).open("a") as file:
            file.write(json.dumps(run) + "\n")


def table(options: argparse.Namespace) -> None:
    """The runs of a file, a line each."""
    print("| set | method | rounds | token evaluations | bytes a client | accuracy, start to end | s |")
    print("|---|---|---|---|---|---|---|")
    for line in Path(options.file).read_text().splitlines():
        run = json.loads(line)
        curve, last = run["curve"], run["curve"][-1]
        shown = ", ".join(f"{p['accuracy']:.1f}" for p in curve)
        print(
            f"| {run['options']['task']} | {run['method']} | {last['round']} | {last['tokens']:,} | {last['bytes']:,} | {shown} | {run['seconds']} |"
        )


def bytes_(options: argparse.Namespace) -> None:
    """Messages as Flower puts them on the wire: a round of all clients, and one that was away for 50 rounds."""
    for size in (1024, 4096):
        _bytes_of(size)


def _bytes_of(size: int) -> None:
    from local_grid import message_with, wire_bytes

    def wrapped(content: bytes, node: int) -> Any:
        message = message_with(content, dst_node_id=2**63 + node, message_type="train", ttl=1200.0)
        message.metadata.__dict__["_message_id"] = "f" * 64  # as long as a SuperLink's
        return message

    pool = Pool(size=size, seeds=4, rounds=60, lr=1e-2, clip=5.0)
    parameter = torch.nn.Parameter(torch.zeros(256))
    weights, target = Weights([parameter], pool), torch.randn(256, generator=torch.Generator().manual_seed(0))

    def loss(_: Any) -> torch.Tensor:
        return (parameter.detach() - target).square().sum()

    server, memories = Server(pool), [Memory.fresh(pool) for _ in range(20)]
    clients = [Client(pool, weights, loss, rows=8, batch_size=4, seed=n) for n in range(20)]
    sent, received, catch_up = 0, 0, 0
    for number in range(52):
        for node, content in server.begin([n for n in range(20) if n != 7 or number in (0, 51)]).items():
            request, answer = wrapped(content, node), clients[node].answer(content, memories[node])
            if number == 51 and node == 7:
                catch_up = wire_bytes(request)
            else:
                sent = max(sent, wire_bytes(request))
            received = max(received, wire_bytes(message_with(answer, reply_to=request)))
            server.take(node, answer)
        same = np.array_equal(memories[7].totals, server.totals)
        server.end()
    print(
        f"K {size}: to a client and round {sent} bytes (bar {16 * 20 * pool.seeds + 512}), from it {received} (bar {16 * pool.seeds + 512}); "
        f"caught up after 50 rounds with {catch_up} (bar {16 * size + 512}), the same numbers: {same}"
    )


def kills(options: argparse.Namespace) -> None:
    """Servers and clients in processes of their own, ended by SIGKILL at random instants."""
    rng, context = random.Random(options.seed), get_context("fork")
    pool = Pool(size=256, seeds=4, rounds=options.rounds, lr=1e-2, clip=50.0)
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        directory, memories = Path(place), {n: Memory.fresh(pool).to_bytes() for n in range(6)}
        done, totals = 0, np.zeros(pool.size, dtype=np.int64).tobytes()
        while done < pool.rounds:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(directory, pool, theirs))
            process.start()
            theirs.close()  # so that its end is seen at once
            fuse = time.monotonic() + rng.uniform(0.0, options.fuse)
            found = ours.recv()
            if found[0] < done or (found[0] == done and found[1] != totals):
                seen["lost rounds"] += 1
            done, totals = found
            while process.is_alive() or ours.poll():
                if time.monotonic() > fuse:
                    os.kill(process.pid or 0, signal.SIGKILL)
                    process.join()
                    seen["servers killed"] += 1
                    break
                if not ours.poll(0.001):
                    continue
                try:
                    what, *rest = ours.recv()
                except EOFError:
                    break
                if what == "asks":
                    _ask(rest[0], memories, pool, ours, rng, seen, context)
                else:
                    done, totals = rest
            process.join()
        server = Server.load(directory, pool)
        weights = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(64))
        Weights([weights[0]], pool).become(server.totals)
        Weights([weights[1]], pool).become(np.frombuffer(totals, dtype=np.int64))
        seen["rounds"] = server.round
        print(
            json.dumps(
                dict(seen) | {"lost rounds": seen["lost rounds"], "same weights at the end": torch.equal(*weights)}
            )
        )
        if seen["lost rounds"] or not torch.equal(*weights):
            sys.exit(1)


def _serve(directory: Path, pool: Pool, pipe: Any) -> None:
    server = Server.load(directory, pool, say=lambda _: None)
    pipe.send((server.round, server.totals.tobytes()))
    while server.round < pool.rounds:
        requests = server.begin(list(range(6)))
        server.save(directory)
        pipe.send(("asks", requests))
        for node, content in pipe.recv().items():
            server.take(node, content)
        server.end()
        server.save(directory)
        pipe.send(("done", server.round, server.totals.tobytes()))


def _ask(
    requests: Any, memories: Any, pool: Pool, pipe: Any, rng: random.Random, seen: Counter[str], context: Any
) -> None:
    answers = {}
    for node, content in requests.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_client, args=(node, content, memories[node], pool, theirs))
        process.start()
        theirs.close()
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0, 0.03))
            os.kill(process.pid, signal.SIGKILL)
            seen["clients killed"] += 1
            if rng.random() < 0.5:  # its node with it
                memories[node] = Memory.fresh(pool).to_bytes()
        try:
            answers[node], memories[node] = ours.recv()
        except (EOFError, ConnectionResetError):
            answers[node] = None
        process.join()
    try:
        pipe.send(answers)
    except BrokenPipeError:
        seen["answers to a dead server"] += 1


def _client(node: int, content: bytes, memory: bytes, pool: Pool, pipe: Any) -> None:
    theta = torch.nn.Parameter(torch.ones(64))
    client = Client(
        pool,
        Weights([theta], pool),
        lambda rows: (theta.detach() - node).square().sum(),
        rows=8,
        batch_size=4,
        seed=node,
    )
    known = Memory.of(memory, pool)
    pipe.send((client.answer(content, known), known.to_bytes()))


def hostile(options: argparse.Namespace) -> None:
    """Answers bent at random: what became of them, and how far the weights moved."""
    rng, pool = (
        random.Random(options.seed),
        Pool(size=256, seeds=4, rounds=10**6, lr=1e-2, clip=5.0, lr_schedule="constant"),
    )
    server, kinds, foreign, worst = Server(pool), Counter[str](), 0, 0.0
    theta = torch.nn.Parameter(torch.zeros(64))
    weights = Weights([theta], pool)
    other = Pool(size=256, seeds=4, rounds=10**6, lr=2e-2, clip=5.0)
    for _ in range(options.messages // 20):
        requests = server.begin([1, 2])
        given = server.pool.draw(server.round, 2, None)[0]
        for number in range(20):
            content: Any = bent(rng, pool, other, server.round, given, number)
            try:
                kinds[server.take(rng.choice([1, 2, 3]), content)] += 1
            except Exception as error:
                foreign += 1
                print(type(error), error)
        before = theta.detach().clone()
        weights.become(server.totals + 0)
        server.end()
        weights.become(server.totals)
        worst = max(worst, float((theta.detach() - before).abs().max()) / (len(requests) * pool.bound(0)))
    print(
        json.dumps(
            {
                "messages": sum(kinds.values()) + foreign,
                "foreign errors": foreign,
                "largest move over the bound": round(worst, 3),
                **kinds,
            }
        )
    )
    if foreign or worst > 1:
        sys.exit(1)


def bent(rng: random.Random, pool: Pool, other: Pool, number: int, seeds: Any, kind: int) -> Any:
    """A message that a client might send to harm."""
    limit = pool.limit(number)
    plain = Answer(number, seeds, np.array([rng.choice([-limit, limit]) for _ in seeds]))
    content = plain.to_bytes(pool)
    choices: list[Any] = [
        content, plain.to_bytes(other), Answer(rng.randrange(2**32), seeds, plain.numbers).to_bytes(pool),
        Answer(number, seeds[::-1].copy(), plain.numbers).to_bytes(pool),
        Answer(number, seeds, plain.numbers * rng.randrange(2, 2**40)).to_bytes(pool),

        Answer(number, seeds[:0], plain.numbers[:0]).to_bytes(pool), content[: rng.randrange(len(content))],
        content + rng.randbytes(rng.randrange(1, 99)),
        rng.randbytes(rng.randrange(200)), None, "text", 1.5, [], {"z": content}, math.nan,
        bytes(b ^ (rng.random() < 0.05) * rng.randrange(256) for b in content), content[:16] + np.full(4, np.nan).tobytes() + content[48:],
    ]  # fmt: skip
    return choices[kind % len(choices)] if rng.random() < 0.5 else rng.choice(choices)


def epsilon(options: argparse.Namespace) -> None:
    """Of all a client's answers, beside the closed form of composed Gaussian mechanisms (Balle & Wang, arXiv 1805.06530)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    for noise, rounds in ((1.0, 1), (4.0, 50), (10.0, 100), (20.0, 400)):
        mu = math.sqrt(rounds) / noise

        def delta(eps: float, mu: float = mu) -> float:
            return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))

        exact = brentq(lambda eps: delta(eps) - 1e-5, 1e-6, 200)
        found = epsilon_of(noise, {1: rounds}, 1e-5, examples=1, batch_size=1)
        print(f"noise {noise:g}, {rounds} answers: epsilon {found:.4f}, closed form {exact:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    run = kinds.add_parser("accuracy")
    run.add_argument("--task", default="trec")
    run.add_argument("--methods", default="federated,central,fedavg")
    run.add_argument("--data", default="data")
    run.add_argument("--cache", help="a directory in which prompts are kept for the next run")
    run.add_argument("--out", default="federated.jsonl")
    run.add_argument("--choice", default="uniform")
    run.add_argument("--alike", action="store_true", help="every client counts alike, whatever its rows")
    run.add_argument("--validation", action="store_true", help="measure on training rows held out, to choose options")
    for name, value in {
        "clients": 20, "rounds": 60, "seeds_a_round": 2, "batch": 64, "layers": 8, "rank": 16, "pool": 1024, "seed": 0, "every": 10,
        "fedavg_rounds": 10, "fedavg_every": 2, "local_steps": 4,
    }.items():  # fmt: skip
        run.add_argument(f"--{name}", type=int, default=value)
    for name, number in {
        "skew": 0.5, "lr": 2e-2, "central_lr": 2e-2, "clip": 5.0, "fraction": 1.0, "fedavg_lr": 1e-3,
    }.items():  # fmt: skip
        run.add_argument(f"--{name}", type=float, default=number)
    run.set_defaults(run=accuracy)
    shown = kinds.add_parser("table")
    shown.add_argument("file")
    shown.set_defaults(run=table)
    kinds.add_parser("bytes").set_defaults(run=bytes_)
    killed = kinds.add_parser("kills")
    killed.add_argument("--rounds", type=int, default=50)
    killed.add_argument("--seed", type=int, default=0)
    killed.add_argument("--fuse", type=float, default=1.0, help="a server is killed after so many seconds at most")
    killed.set_defaults(run=kills)
    bad = kinds.add_parser("hostile")
    bad.add_argument("--messages", type=int, default=10_000)
    bad.add_argument("--seed", type=int, default=0)
    bad.set_defaults(run=hostile)
    kinds.add_parser("epsilon").set_defaults(run=epsilon)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
