"""Federated tuning without Flower: numbers to weights, requests to answers, what a server takes, what is promised of all of it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Sentiment, run_main
from scipy.optimize import brentq
from scipy.stats import norm

from zo_opt import ZOError, load_run
from zo_opt.directions import Rademacher, Stream
from zo_opt.federated.client import Client, Memory
from zo_opt.federated.messages import Answer, MessageError, Request, digest_of
from zo_opt.federated.plan import Outline, Plan, plan_text
from zo_opt.federated.pool import Pool
from zo_opt.federated.prepare import spent
from zo_opt.federated.server import Server
from zo_opt.federated.split import deal
from zo_opt.federated.weights import Weights
from zo_opt.record import checkpoint

POOL = Pool(size=64, seed=3, seeds=4, rounds=60, lr=0.005, clip=40.0)
SIZE = 50
NOTHING = np.zeros(0, dtype=np.int64)


def quadratic(
    pool: Pool, clients: int = 5, rows: Sequence[int] = (8,) * 5
) -> tuple[torch.nn.Parameter, list[Client], list[Memory]]:
    """Clients that each want the weights elsewhere."""
    theta = torch.nn.Parameter(torch.zeros(SIZE))
    weights = Weights([theta], pool)
    targets = torch.randn(clients, SIZE, generator=torch.Generator().manual_seed(0)) + 1

    def loss(n: int) -> torch.Tensor:
        return (theta.detach().double() - targets[n]).square().sum()

    found = [
        Client(pool, weights, lambda _, n=n: loss(n), rows=own, batch_size=4)
        for n, own in zip(range(clients), rows, strict=True)
    ]
    return theta, found, [Memory.fresh(pool) for _ in found]


def play(server: Server, clients: list[Client], memories: list[Memory], nodes: list[int]) -> dict[int, bytes]:
    """A round in which everybody does what they should."""
    requests = server.begin(nodes)
    for node, content in requests.items():
        assert server.take(node, clients[node].answer(content, memories[node])) == "accepted"
    server.end()
    return requests


# --- numbers and weights ---


def test_weights_are_the_formula_to_the_bit_whatever_the_way() -> None:
    """Against the sum in numpy's int64, from numbers that no float32 can hold."""
    rng, start = np.random.default_rng(0), torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    totals = rng.integers(-(2**40), 2**40, POOL.size)
    z = [Rademacher().draw(Stream(3, j, 0), ((SIZE,),), 0, SIZE, torch.device("cpu")) for j in range(POOL.size)]
    exact = (np.stack([d.numpy() for d in z]).astype(np.int64) * totals[:, None]).sum(0)
    expected = (start.double().numpy() - POOL.unit * exact).astype(np.float32)
    one, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    Weights([one], POOL).become(totals)
    wandering = Weights([other], POOL)
    for j in rng.permutation(POOL.size):
        wandering.move(int(j), int(rng.integers(-9, 9)))
    wandering.become(totals)
    assert np.array_equal(one.detach().numpy(), expected)
    assert torch.equal(one, other)


def test_what_weights_refuse() -> None:
    with pytest.raises(ZOError, match="float32"):
        Weights([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], POOL)
    weights = Weights([torch.nn.Parameter(torch.zeros(3))], POOL)
    with pytest.raises(ZOError, match="2\\^53"):
        weights.become(np.full(POOL.size, 2**48))
    assert not weights.totals.any()


def test_a_local_step_is_the_papers() -> None:
    """w <- w - lr g z, g the two-sided difference at the weights of the step before; written out in float64."""
    theta, clients, memories = quadratic(POOL)
    requests = Server(POOL).begin([0, 1])
    answer = Answer.of(clients[1].answer(requests[1], memories[1]), POOL)
    target = (torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0)) + 1)[1].double()
    w = torch.zeros(SIZE, dtype=torch.float64)
    for seed, number in zip(answer.seeds.tolist(), answer.numbers.tolist(), strict=True):
        z = Rademacher().draw(Stream(3, seed, 0), ((SIZE,),), 0, SIZE, torch.device("cpu")).double()
        g = ((w + POOL.zo_eps * z - target).square().sum() - (w - POOL.zo_eps * z - target).square().sum()) / 0.02
        g = float(g.clamp(-POOL.clip, POOL.clip))
        assert number == pytest.approx(POOL.lr * g / POOL.unit, rel=1e-3, abs=20)
        w -= POOL.lr * g * z
    assert torch.allclose(theta.detach().double(), w, atol=1e-3)


def test_seeds_are_drawn_by_magnitude() -> None:
    """FedKSeed-Pro: the likelier the larger a seed's numbers were; one that was never used counts as the mean."""
    pool = replace(POOL, choice="magnitude")
    magnitudes, uses = np.zeros(64, dtype=np.int64), np.zeros(64, dtype=np.int64)
    assert pool.odds(magnitudes, uses) is None
    magnitudes[:3], uses[:3] = (10, 60, 80), (1, 2, 2)  # means 10, 30, 40
    odds = pool.odds(magnitudes, uses)
    assert odds is not None
    assert odds.sum() == pytest.approx(1)
    assert odds[1] / odds[0] == pytest.approx(math.exp(20 / 30))
    assert odds[2] / odds[0] == pytest.approx(math.e)
    assert odds[9] / odds[0] == pytest.approx(math.exp((80 / 3 - 10) / 30))
    heavy = np.full(64, 1e-6)
    heavy[5] = 1
    assert 5 in pool.draw(0, 4, heavy / heavy.sum())
    assert len(set(pool.draw(7, 16, None).flatten().tolist())) == 64
    assert pool.draw(0, 99, None).shape == (99, 4)


# --- rounds ---


def test_a_training_learns_with_clients_that_come_and_go() -> None:
    theta, clients, memories = quadratic(POOL)
    server, rng = Server(POOL), random.Random(0)
    mean = (torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0)) + 1).mean(0)
    before = (theta.detach() - mean).norm()
    for _ in range(POOL.rounds):
        requests = server.begin(sorted(rng.sample(range(5), 3)))
        for node, content in requests.items():
            answer = clients[node].answer(content, memories[node])
            if rng.random() < 0.8:  # else it has dropped out after the work
                assert server.take(node, answer) == "accepted"
        server.end()
    Weights([again := torch.nn.Parameter(torch.zeros(SIZE))], POOL).become(server.totals)
    assert (again.detach() - mean).norm() < 0.5 * before


def test_clients_count_by_their_rows() -> None:
    """What a client sends is its share of what it would send alone; the sum is FedAvg's, in whatever order and on whatever way."""
    rows, weighed = (3, 30, 300), replace(POOL, most_rows=300)
    _, clients, memories = quadratic(weighed, 3, rows)
    _, alone, _ = quadratic(POOL, 3, rows)
    server, other = Server(weighed), Server(weighed)
    staying = Weights([stayed := torch.nn.Parameter(torch.zeros(SIZE))], weighed)
    for _ in range(3):
        answers = {n: clients[n].answer(content, memories[n]) for n, content in server.begin([0, 1, 2]).items()}
        other.begin([0, 1, 2])
        if not server.round:
            for n, content in Server(POOL).begin([0, 1, 2]).items():
                full = Answer.of(alone[n].answer(content, Memory.fresh(POOL)), POOL).numbers
                found = Answer.of(answers[n], weighed).numbers
                assert np.abs(found - full * rows[n] / 300).max() <= 0.51
                assert np.abs(full).max() > 10_000
        assert [server.take(n, answers[n]) for n in (0, 1, 2)] == [other.take(n, answers[n]) for n in (2, 0, 1)]
        server.end()
        other.end()
        staying.become(server.totals)
        assert np.array_equal(server.totals, other.totals)
    clients[1].answer(server.begin([1])[1], memories[1])
    assert np.array_equal(memories[1].totals, server.totals)
    Weights([again := torch.nn.Parameter(torch.zeros(SIZE))], weighed).become(server.totals)
    clients[2].answer(other.begin([2])[2], memories[2])
    staying.become(memories[2].totals)
    assert torch.equal(again, stayed)
    assert again.abs().max() > 0


def test_a_client_that_claims_many_rows_counts_no_more_than_fully() -> None:
    pool = replace(POOL, most_rows=300, clip=1e-3)  # every derivative is cut
    _, clients, memories = quadratic(pool, 3, (300, 301, 30_000))
    server = Server(pool)
    for n, content in server.begin([0, 1, 2]).items():
        answer = clients[n].answer(content, memories[n])
        assert np.abs(Answer.of(answer, pool).numbers).max() <= pool.limit(0) == replace(pool, most_rows=None).limit(0)
        assert server.take(n, answer) == "accepted"
    for wrong in (0, -3, 1.5, True):
        with pytest.raises(ZOError, match="most_rows"):
            replace(pool, most_rows=wrong)


def test_a_client_away_for_50_rounds_comes_back_to_the_same_bits() -> None:
    _, clients, memories = quadratic(POOL)
    server = Server(POOL)
    requests = play(server, clients, memories, [0, 1, 2, 3, 4])
    for _ in range(50):
        requests = play(server, clients, memories, [0, 1, 2, 3])
        assert max(map(len, requests.values())) <= 16 * 4 * POOL.seeds + 512
    caught_up = server.begin([0, 4])
    assert len(caught_up[4]) <= 16 * POOL.size + 512
    found = []
    for node in (0, 4):
        _, fresh, _ = quadratic(POOL)  # in a process of its own
        memory = Memory.of(memories[node].to_bytes(), POOL)
        fresh[node].answer(caught_up[node], memory)
        Weights([again := torch.nn.Parameter(torch.zeros(SIZE))], POOL).become(memory.totals)
        found.append(again)
    assert torch.equal(*found)
    assert bool((found[0] != 0).all())


def test_a_client_that_lost_what_it_knew_is_told_all() -> None:
    _, clients, memories = quadratic(POOL)
    server = Server(POOL)
    for _ in range(2):
        play(server, clients, memories, [0, 1])
    memories[0] = Memory.of(b"damaged", POOL)
    requests = server.begin([0, 1])
    assert server.take(0, clients[0].answer(requests[0], memories[0])) == "behind"
    server.end()
    play(server, clients, memories, [0, 1])
    assert np.array_equal(memories[0].totals, memories[1].totals)


def test_late_answers_are_taken_once_and_for_a_while() -> None:
    _, clients, memories = quadratic(POOL)
    server = Server(POOL, late=1)
    old = {n: clients[n].answer(c, memories[n]) for n, c in server.begin([0, 1, 2]).items()}
    server.end()
    server.begin([2])
    assert [server.take(0, old[0]), server.take(0, old[0])] == ["accepted", "answered before"]
    record = server.end()
    assert (record.answered, record.late, record.refused) == (1, 1, {"answered before": 1})
    server.begin([2])
    assert server.take(1, old[1]) == "another round"
    given = Answer.of(old[0], POOL)
    assert np.array_equal(server.totals[given.seeds], given.numbers)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_server_loses_the_round_in_flight_alone(tmp_path: Path, seed: int) -> None:
    """Taken down and read again at any point of any round; the checkpoint of a half-written end is damaged, too."""
    _, clients, memories = quadratic(POOL)
    rng, server, sums = random.Random(seed), Server(POOL), np.zeros(POOL.size, dtype=np.int64)

    def killed() -> bool:
        nonlocal server
        if rng.random() > 0.15:
            return False
        server = Server.load(tmp_path, POOL, say=lambda _: None)
        return True

    done = 0
    while done < 20:
        requests, taken = server.begin([0, 1, 2]), []
        server.save(tmp_path)
        for node, content in requests.items():
            if rng.random() < 0.1:
                memories[node] = Memory.fresh(POOL)
            answer = clients[node].answer(content, memories[node])
            if server.take(node, answer) == "accepted":
                taken.append(Answer.of(answer, POOL))
        if killed():
            assert server.round == done
            continue
        server.end()
        server.save(tmp_path)
        done += 1
        for answer in taken:
            sums[answer.seeds] += answer.numbers
        killed()
        assert server.round == done
        assert np.array_equal(server.totals, sums)
    content = bytearray((tmp_path / checkpoint.NAME).read_bytes())
    content[-1] ^= 1
    (tmp_path / checkpoint.NAME).write_bytes(content)
    assert Server.load(tmp_path, POOL, say=lambda _: None).round == done - 1
    with pytest.raises(ZOError, match="another pool"):
        Server.load(tmp_path, replace(POOL, lr=0.006), say=lambda _: None)


# --- those who mean harm ---


def bent(rng: random.Random, content: bytes, pool: Pool) -> object:
    """An honest answer, or request, changed in some way."""
    flipped = bytes(b ^ (rng.random() < 0.03) * rng.randrange(256) for b in content)
    return rng.choice([
        content, flipped, content[: rng.randrange(len(content))], content + rng.randbytes(rng.randrange(1, 40)), rng.randbytes(rng.randrange(99)),
        content[:16] + np.full(4, np.nan).tobytes() + content[48:], content.replace(pool.id, replace(pool, seed=9).id), None, "text", 2.5, [content],
    ])  # fmt: skip


def test_ten_thousand_hostile_answers_move_the_weights_no_further_than_said() -> None:
    pool, rng = replace(POOL, rounds=10**6, lr_schedule="constant"), random.Random(0)
    theta = torch.nn.Parameter(torch.zeros(SIZE))
    server, weights, kinds = Server(pool), Weights([theta], pool), set()
    limit = pool.limit(0)
    for _ in range(500):
        seeds = {node: Request.of(content, pool).seeds for node, content in server.begin([1, 2]).items()}
        for _ in range(20):
            node = rng.choice([1, 2])
            numbers = np.array([rng.choice([-limit, limit, 0, 2 * limit, -(2**62)]) for _ in range(4)])
            content = Answer(rng.choice([server.round, 0]), seeds[rng.choice([1, 2])], numbers).to_bytes(pool)
            kinds.add(server.take(rng.choice([node, 3]), bent(rng, content, pool)))
        before = theta.detach().clone()
        server.end()
        weights.become(server.totals)
        assert (theta.detach() - before).abs().max() <= 2 * pool.bound(0) * (1 + 1e-6)
    assert kinds == {
        "accepted", "not asked", "answered before", "another pool", "another length", "no bytes", "beyond the limit", "another round",
        "other seeds than given", *({"behind"} & kinds),
    }  # fmt: skip
    assert sum(sum(record.refused.values()) for record in server.rounds) > 5000


def test_hostile_requests_do_a_client_no_harm() -> None:
    theta, clients, memories = quadratic(POOL)
    server, rng = Server(POOL), random.Random(1)
    play(server, clients, memories, [0, 1])
    honest = server.begin([0])[0]
    for _ in range(1000):
        try:
            clients[0].answer(bent(rng, honest, POOL), memories[0])
        except MessageError:
            continue
    assert theta.isfinite().all()


def test_messages_come_back_from_bytes() -> None:
    request = Request(5, 2, b"12345678", np.array([1, 9]), np.array([-(2**50), 7]), np.array([3, 4]))
    again = Request.of(request.to_bytes(POOL), POOL)
    assert (again.round, again.since, again.digest) == (5, 2, b"12345678")
    assert [again.changed.tolist(), again.totals.tolist(), again.seeds.tolist()] == [[1, 9], [-(2**50), 7], [3, 4]]


# --- privacy ---


def test_epsilon_is_that_of_the_closed_form() -> None:
    """All answers of a client together are one Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    for noise, answers in ((1.0, 1), (5.0, 50)):
        mu = math.sqrt(answers) / noise

        def excess(eps: float, mu: float = mu) -> float:
            return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - 1e-5

        exact = brentq(excess, 1e-3, 100)
        assert exact <= spent(replace(POOL, noise=noise), answers, 1e-5) <= 1.02 * exact


def test_noise_and_clip_are_those_that_are_reckoned_with() -> None:
    """The mean of many releases has the clipped norm, their spread is noise * clip; nothing more is said than was reckoned for."""
    pool = replace(POOL, noise=0.5, clip=1.0, rounds=400, lr_schedule="constant")
    _, clients, memories = quadratic(pool)
    released = []
    for number in range(pool.rounds):
        request = Request(number, 0, digest_of(np.zeros(64, dtype=np.int64)), NOTHING, NOTHING, np.array([1, 2, 3, 4]))
        content = clients[0].answer(request.to_bytes(pool), memories[0])
        assert clients[0].answer(request.to_bytes(pool), memories[0]) == content  # asked once more
        released.append(Answer.of(content, pool).numbers * pool.unit / pool.lr)
    values = np.stack(released)
    # Four means of 400 with standard error 0.025; a standard deviation of 1600 with relative error 0.018: five of each.
    assert np.linalg.norm(values.mean(0)) == pytest.approx(1.0, abs=0.13)
    assert values.std(0).mean() == pytest.approx(0.5, rel=0.09)
    request = Request(0, 0, digest_of(np.zeros(64, dtype=np.int64)), NOTHING, NOTHING, np.array([5]))
    with pytest.raises(MessageError, match="400 answers were given"):
        clients[0].answer(request.to_bytes(pool), memories[0])


# --- rows, plans, commands ---


def test_label_skew_gives_each_row_to_one_client() -> None:
    labels = [i % 6 for i in range(600)]
    skewed = deal(labels, 20, 0, 0.1)
    assert sorted(row for mine in skewed for row in mine) == list(range(600))
    kinds = [len({labels[row] for row in mine}) for mine in skewed]
    assert np.mean(kinds) < np.mean([len({labels[row] for row in mine}) for mine in deal(labels, 20, 0, 100.0)])
    assert skewed == deal(labels, 20, 0, 0.1) != deal(labels, 20, 1, 0.1)
    with pytest.raises(ZOError, match="cannot be dealt"):
        deal(labels, 601, 0)


@pytest.fixture(scope="module")
def line(tiny_model_dir: Path, sentiment_files: Sentiment) -> Callable[..., list[str]]:
    def command(directory: Path, **changes: object) -> list[str]:
        options = {
            "model_name_or_path": tiny_model_dir, "train_file": sentiment_files.train, "eval_file": sentiment_files.eval,
            "template": "{text} It was", "verbalizers": "terrible,great", "device": "cpu", "precision": "fp32", "rounds": 3,
            "pool_size": 32, "output_dir": directory,
        } | changes  # fmt: skip
        return ["federated", "prepare", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]

    return command


@pytest.mark.parametrize("adapter", ["spectral", "full", "lora"])
def test_a_training_is_prepared_tuned_reported_and_rebuilt(
    line: Callable[..., list[str]], tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's and a client's own parts, without what Flower does between them."""
    from zo_opt.federated.tuning import planned_examples, tuning

    directory = tmp_path / "fed"
    assert run_main(line(directory, adapter=adapter, privacy_epsilon=8)) == 0
    plan = Plan.of(plan_text(directory))
    assert plan.pool.noise > 1
    found = tuning(plan, planned_examples(plan))
    server, memory = Server(plan.pool), Memory.fresh(plan.pool)
    client = Client(plan.pool, found.weights, found.loss, rows=len(found.tools.train), batch_size=8)
    for _ in range(3):
        assert server.take(5, client.answer(server.begin([5])[5], memory)) == "accepted"
        server.end()
    server.save(directory)
    found.weights.become(server.totals)
    found.tools.model.save_pretrained(directory)
    capsys.readouterr()
    assert run_main(["federated", "report", "--output_dir", str(directory), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rounds"], report["answered"]) == (3, 3)
    assert 7.5 < report["epsilon"] <= 8.0
    assert run_main(["replay", str(directory), "--to", str(tmp_path / "again")]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()
    assert load_run(directory).evaluate().rows == len(found.tools.held_out)


@pytest.mark.parametrize(("changes", "said"), [
    ({"lr": 0}, "lr=0 moves nothing"),
    ({"fraction": 2}, "fraction=2.0 is not possible"),
    ({"optimizer": "mezo"}, "--optimizer is not known"),
    ({"steps": 3}, "--steps is not known"),
    ({"adapter": "adalora"}, "changes on its own"),
    ({"privacy_epsilon": 1, "privacy_noise": 1}, "leave one out"),
    ({"privacy_epsilon": 1, "most_rows": 9}, "leave out one of the two"),
])  # fmt: skip
def test_mistakes_are_sentences(
    line: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    said: str,
) -> None:
    assert run_main(line(tmp_path / "fed", **changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "fed").exists()


def test_mistakes_of_reports_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["federated"], "say what to do"),
        (["federated", "report"], "needs --output_dir"),
        (["federated", "report", "--output_dir", str(tmp_path)], "holds no federated training"),
        (["federated", "report", "--output_dir", str(tmp_path), "--rounds", "3"], "rounds was given"),
        (["federated", "prepare"], "needs --output_dir"),
    ):
        assert run_main(words) == 2
        assert said in capsys.readouterr().err


def test_plans_of_strangers(line: Callable[..., list[str]], tmp_path: Path) -> None:
    """Changed at random: read, or refused in a sentence; code is not run unasked."""
    assert run_main(line(tmp_path / "fed")) == 0
    text, rng = plan_text(tmp_path / "fed"), random.Random(0)
    for _ in range(300):
        at = rng.randrange(len(text))
        try:
            Outline.of(
                text[:at] + rng.choice(["", "0", "{", '"', "null", "-1", "1e999"]) + text[at + rng.randrange(3) :]
            )
        except ZOError:
            continue
    plain = json.loads(text)
    plain["config"]["adapter"] = "evil:Adapter"
    with pytest.raises(ZOError, match="names code outside zo_opt"):
        Plan.of(json.dumps(plain))


def test_a_quantised_base(line: Callable[..., list[str]], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from zo_opt.federated.tuning import planned_examples, tuning

    assert run_main(line(tmp_path / "fed", quantise="int8", adapter="lora")) == 0
    plan = Plan.of(plan_text(tmp_path / "fed"))
    found = tuning(plan, planned_examples(plan))
    client = Client(plan.pool, found.weights, found.loss, rows=len(found.tools.train), batch_size=8)
    server = Server(plan.pool)
    assert server.take(0, client.answer(server.begin([0])[0], Memory.fresh(plan.pool))) == "accepted"
