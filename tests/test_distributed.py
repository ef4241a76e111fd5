"""Several ranks on one step: the same bits as one process, few bytes between them, and no rank left waiting for another."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optimizer_problem import BATCH, Model, examples_of, flat, make, make_batch
from optimizer_table import NAMES, build

from zo_opt import MeZO, ZOError
from zo_opt.distributed import Distributed, RankError, part_of
from zo_opt.errors import NonFiniteLossError
from zo_opt.optim import Adam, ClipProjectedGrads
from zo_opt.schedules import constant_queries

PATIENCE = 120  # seconds for a test's ranks on a busy machine


@pytest.fixture
def ranks(tmp_path):
    """(how many, work) -> what work(rank) returned on each, as JSON does; work runs in forks of this process, joined over gloo."""
    children = []
    course(1)  # what torch imports with the first optimizer, imported once for all forks

    def run(count, work):
        number = len(children)
        for rank in range(count):
            children.append(os.fork())
            if children[-1] == 0:
                _child(work, rank, count, tmp_path, number)
        deadline = time.monotonic() + PATIENCE
        for pid in children[number:]:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                assert time.monotonic() < deadline, "a rank still waits"
                time.sleep(0.01)
        results = [tmp_path / f"{number}-{rank}.json" for rank in range(count)]
        found = [json.loads(path.read_text()) if path.exists() else None for path in results]
        assert not (failed := [f["traceback"] for f in found if isinstance(f, dict) and "traceback" in f]), failed[0]
        return found

    yield run
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def _child(work, rank, count, directory, number):
    try:
        dist.init_process_group("gloo", init_method=f"file://{directory}/join-{number}", rank=rank, world_size=count)
        result = work(rank)
    except BaseException:
        result = {"traceback": traceback.format_exc()}
    try:
        path = directory / f"{number}-{rank}.json"
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").rename(path)
    finally:
        os._exit(0)


def raised(call):
    """The kind and sentence of what a call raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def course(steps=8, name="mezo", batch_of=lambda step, optimizer: BATCH, **options):
    """The weights after every tenth step and at the end, and all that the optimizer counts."""
    model = Model()
    optimizer = make(model, name, **({"query_schedule": constant_queries(3)} | options))
    losses, weights = [], []
    for step in range(steps):
        losses.append(float(optimizer.step(model, batch_of(step, optimizer))))
        if step % 10 == 0:
            weights.append(flat(model).tolist())
    return {"weights": [*weights, flat(model).tolist()], "losses": losses, "history": asdict(optimizer.history)}


@pytest.fixture(scope="module")
def alone():
    """What one process found, once it did."""
    return {}


@pytest.mark.parametrize("count", [2, 4])
def test_500_steps_equal_one_process_to_the_bit(ranks, count, alone):
    """The numbers of queries change, so that with four ranks some have nothing to do at times."""

    def train(**options):
        control = [ClipProjectedGrads(3.0)]
        schedule = lambda step, epoch, history: 1 + step % 3  # noqa: E731
        return course(500, "adazeta", query_schedule=schedule, update_rule=Adam(), step_control=control, **options)

    if not alone:
        alone.update(train())
    assert alone["losses"][-1] < 0.8 * alone["losses"][0]
    assert ranks(count, lambda rank: train(query_mode="distributed")) == [alone] * count


def test_every_optimizer_equals_one_process(ranks):
    names = [name for name in NAMES if name not in ("forward-gradient", "agzo")]  # both refuse several processes

    def weights(name, **options):
        model = Model()
        optimizer = build(name, model, **options)
        for _ in range(4):
            optimizer.step(model, BATCH)
        return flat(model).tolist()

    def shared(name):
        within = "split" if name == "grzo" else "sequential"
        return weights(name, query_mode="distributed", distributed=Distributed(within=within))

    first, second = ranks(2, lambda rank: {name: shared(name) for name in names})
    assert first == second
    alone = {name: weights(name) for name in names}
    # Split copies run in other numbers at once, which may round otherwise.
    assert first.pop("grzo") == pytest.approx(alone.pop("grzo"), rel=1e-6)
    assert first == alone


def test_forward_gradients_are_refused():
    with pytest.raises(ZOError, match="query_mode='distributed' does not apply to estimator 'forward-mode'"):
        build("forward-gradient", Model(), query_mode="distributed")


def test_without_a_process_group_it_is_one_process():
    assert course(query_mode="distributed") == course()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ZOError, match="init_process_group"):
        course(query_mode="distributed")


@pytest.mark.parametrize("share", ["data", "2x2"])
def test_shared_rows_equal_the_whole_batch_to_rounding(ranks, share):
    """Batches of 8, 5 and 1 rows for four ranks (or two halves): uneven parts, and empty ones."""
    batches = [make_batch(size) for size in (8, 5, 1)]

    def mine(step, optimizer):
        batch = batches[step % 3]
        return examples_of(batch, list(optimizer.ranks.rows(range(len(batch["x"])))))

    options = {"query_mode": "distributed", "distributed": Distributed(share=share)}
    found = ranks(4, lambda rank: course(30, batch_of=mine, **options))
    assert found[1:] == found[:1] * 3
    alone = course(30, batch_of=lambda step, _: batches[step % 3])
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert found[0]["weights"][-1] == pytest.approx(alone["weights"][-1], rel=1e-5, abs=1e-6)
    assert [found[0]["history"][n] for n in ("forwards", "tokens")] == [
        alone["history"][n] for n in ("forwards", "tokens")
    ]


@pytest.mark.parametrize("within", ["split", "batched", "auto"])
def test_modes_within_a_rank(ranks, within):
    options = {"query_mode": "distributed", "distributed": Distributed(within=within)}
    found = ranks(3, lambda rank: course(5, **options))
    alone = course(5, query_mode=within)
    assert found[1:] == found[:1] * 2
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert [found[0]["history"][n] for n in ("forwards", "tokens")] == [
        alone["history"][n] for n in ("forwards", "tokens")
    ]


def test_bytes_between_ranks(ranks, monkeypatch):
    """Counted where torch.distributed takes them: at most 32 bytes a query and a constant, from every rank in every step."""
    queries, constant = (1, 40, 240), 8 * (7 + 32)  # what a message says besides losses, and the losses it has room for

    def sent(rank):
        counted, gather = [], dist.all_gather
        monkeypatch.setattr(
            dist, "all_gather", lambda found, tensor, **k: (counted.append(tensor.nbytes), gather(found, tensor, **k))
        )
        for other in ("broadcast", "isend", "send", "all_reduce", "all_gather_object"):
            monkeypatch.setattr(dist, other, None)  # and by no other way
        found = []
        for share in ("queries", "data"):
            model = Model()
            options = {"query_mode": "distributed", "distributed": Distributed(share=share)}
            optimizer = make(model, query_schedule=lambda step, *_: queries[step], **options)
            for _ in queries:
                counted.clear()
                optimizer.step(model, BATCH)
                found.append(sum(counted))
        return found

    for found in ranks(4, sent):
        assert all(n <= 32 * q + constant for n, q in zip(found, 2 * queries, strict=True)), found
        assert found[0] == constant  # one query


def test_a_loss_that_is_not_finite_on_one_rank_is_the_same_decision_on_all(ranks):
    def work(rank):
        model = Model()
        options = {"query_mode": "distributed", "query_schedule": constant_queries(2), "max_failed_steps": 1}
        optimizer = make(model, **options)
        bad = {1: [1], 2: [0], 4: [0, 1]}  # step -> ranks
        closure = lambda b: float("nan") if rank in bad.get(optimizer.step_count, []) else model(b)  # noqa: E731
        for _ in range(4):
            optimizer.step(closure, BATCH)
        end = flat(model).tolist()
        return [
            end,
            optimizer.dropped_queries,
            raised(lambda: optimizer.step(closure, BATCH)),
            flat(model).tolist() == end,
        ]

    first, second = ranks(2, work)
    assert first == second
    assert first[1] == 2
    assert first[2][0] == NonFiniteLossError.__name__
    assert first[3]


def test_a_rank_that_fails_is_named_and_the_others_can_go_on(ranks):
    def work(rank):
        model = Model()
        optimizer = make(model, query_mode="distributed", query_schedule=constant_queries(40))

        def closure(batch):
            if failing == [rank]:
                raise ValueError("no more\npaper")
            return model(batch)

        heard = []
        for failing in ([], [1], [], [0], []):  # noqa: B007 (the closure reads it)
            before = flat(model)
            error = raised(lambda: optimizer.step(closure, BATCH))
            heard.append(error)
            assert error is None or torch.equal(flat(model), before)
        return [heard, flat(model).tolist()]

    found = ranks(3, work)
    own = ["ValueError", "no more\npaper"]
    theirs = [["RankError", f"rank {r} failed at step {s} (ValueError: no more paper)."] for r, s in ((1, 1), (0, 2))]
    assert [heard for heard, _ in found] == [
        [None, theirs[0], None, own, None], [None, own, None, theirs[1], None], [None, theirs[0], None, theirs[1], None]
    ]  # fmt: skip
    assert [weights for _, weights in found] == [course(3, query_schedule=constant_queries(40))["weights"][-1]] * 3


@pytest.mark.parametrize(("victim", "late"), [(0, 0.0), (2, 0.0), (2, 1.0)])
def test_a_rank_that_is_killed_stops_the_others(ranks, victim, late):
    """``late``: seconds after its death at which rank 0 looks."""

    def work(rank):
        model = Model()
        optimizer = make(model, query_mode="distributed", query_schedule=constant_queries(6))

        def closure(batch):
            if (rank, optimizer.step_count) == (victim, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(late * (rank == 0 and optimizer.step_count == 2))
            return model(batch)

        error = raised(lambda: [optimizer.step(closure, BATCH) for _ in range(5)])
        again = raised(lambda: optimizer.step(closure, BATCH))
        return [*error, again[0], optimizer.step_count]

    found = ranks(3, work)
    assert found[victim] is None
    for kind, sentence, again, steps in (f for f in found if f is not None):
        assert (kind, again, steps) == (RankError.__name__, RankError.__name__, 2)
        assert "step 2" in sentence and "look at what" in sentence
    if victim != 0:  # whom rank 0 misses it names
        assert found[0][1].startswith(f"rank {victim} is gone at step 2: its process ended")


def test_a_rank_that_hangs_is_named(ranks):
    def work(rank):
        model = Model()
        optimizer = make(model, query_mode="distributed", distributed=Distributed(timeout=1.0))
        closure = lambda b: (time.sleep(6 * (rank == 1)), model(b))[1]  # noqa: E731
        return raised(lambda: optimizer.step(closure, BATCH))

    found = ranks(3, work)
    assert found[0] == ["RankError", "rank 1 sent nothing for 1 s at step 0; look whether it still runs."]
    for error in found[1:]:
        assert error[0] == "RankError"
        assert "step 0 broke off" in error[1] and "rank 0 first" in error[1]


MISTAKES = {
    "seed": "ZOError: rank 1 does not do what rank 0 does: .*seed 5,.*options",
    "queries": "ZOError: rank 1 does not do what rank 0 does: .* 3 queries",
    "weights": "ZOError: the trainables of rank 1 differ from rank 0's before the first step",
    "batch": "ZOError: rank 1 was given another batch than rank 0.*share=",
    "empty": "ZOError: no rank was given a row",
    "grid": "ZOError: share='3x2' is a grid of 6 ranks; there are 2",
    "drift": "RankError: the trainables of rank 1 differ from rank 0's at step 6; they were the same at step 3",
    "drift after loading": "ZOError: the trainables of rank 1 differ from rank 0's before the first step",
}


def test_ranks_that_do_not_do_the_same_are_refused(ranks):
    def work(rank):
        return {
            mistake: ": ".join(raised(lambda mistake=mistake: make_mistake(mistake, rank)) or [])
            for mistake in MISTAKES
        }

    def make_mistake(mistake, rank):
        model, odd = Model(), rank == 1
        if mistake == "weights" and odd:
            model.b.data[3] = torch.nextafter(model.b.data[3], torch.tensor(9.0))
        share = {"empty": "data", "grid": "3x2"}.get(mistake, "queries")
        optimizer = make(
            model, seed=6 if mistake == "seed" and odd else 5, query_mode="distributed",
            query_schedule=constant_queries(200 if mistake == "queries" and odd else 3),
            distributed=Distributed(share=share, check_every=3),
        )  # fmt: skip
        batch = (
            make_batch(0 if mistake == "empty" else 7) if (mistake == "batch" and odd) or mistake == "empty" else BATCH
        )
        for step in range(8):
            optimizer.step(model, batch)
            if "drift" in mistake and odd and step == 4:
                model.w.data[0, 0] += 1e-3
            if mistake == "drift after loading" and step == 4:
                optimizer.load_state_dict(optimizer.state_dict())

    first, second = ranks(2, work)
    for mistake, sentence in MISTAKES.items():
        for found in (first[mistake], second[mistake]):
            assert re.match(sentence, found), (mistake, found)
    assert "On rank 1: step 0, mezo, seed 6," in second["seed"]


def test_all_ranks_stop_after_the_same_step(ranks):
    def work(rank):
        model = Model()
        optimizer = make(model, query_mode="distributed")
        while not optimizer.ranks.stop:
            optimizer.ranks.stop_wanted = 15 * (rank == 1 and optimizer.step_count == 3)
            optimizer.step(model, BATCH)
        return [optimizer.step_count, optimizer.ranks.stop]

    assert ranks(2, work) == [[4, 15]] * 2


def test_a_run_of_several_processes_survives_death_and_resumes_with_other_numbers(tmp_path, toy_options, monkeypatch):
    """Two ranks, one killed; three, one asked to end; then one alone: the adapter of an uninterrupted run, to the bit."""
    from conftest import run_main
    from forked_runs import ForkedRun

    from zo_opt.training.stepper import Stepper

    original = Stepper.step
    accidents = {2: signal.SIGKILL, 4: signal.SIGTERM}  # step -> what the last rank meets

    def accident(stepper, stop):
        optimizer = stepper.optimizer
        last = optimizer.ranks is not None and optimizer.ranks.rank == optimizer.ranks.size - 1
        if last and optimizer.step_count == optimizer.ranks.size + (optimizer.ranks.size == 3):
            signal.raise_signal(accidents[optimizer.step_count])
        original(stepper, stop)

    monkeypatch.setattr(Stepper, "step", accident)

    def launch(count, line):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        logs = [tmp_path / f"{count}-{rank}.log" for rank in range(count)]
        runs = []
        for rank, log in enumerate(logs):
            env = address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            with log.open("w") as stdout:
                runs.append(ForkedRun(["python", "-m", "zo_opt.cli.main", *line], stdout=stdout, env=env))
        return [run.wait() for run in runs], [log.read_text() for log in logs]

    options = {"save_steps": 4, "report_to": "none"}
    line = toy_options(output_dir=tmp_path / "out", budget_forwards=27, **options)  # of which a step takes four
    codes, logs = launch(2, line)
    assert codes == [1, -signal.SIGKILL], logs
    assert "zo-opt: training failed: rank 1 is gone at step 2: its process ended" in logs[0]
    codes, logs = launch(3, [*line, "--resume", "--rank_check_every", "1"])
    assert codes == [128 + signal.SIGTERM] * 3, logs
    assert "stopped after step 5" in logs[0]
    assert logs[1:] == [""] * 2  # one rank talks
    assert run_main([*line, "--resume"]) == 0
    assert run_main(toy_options(output_dir=tmp_path / "alone", steps=6, **options)) == 0
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "alone")]
    assert adapters[0] == adapters[1]


def test_options_of_ranks_reach_them():
    from zo_opt.training import TrainConfig

    config = TrainConfig(share="2x2", query_mode="distributed", rank_timeout=7.5, rank_check_every=3)
    assert config.make_distributed() == Distributed("2x2", "sequential", check_every=3, timeout=7.5)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"optimizer": "adamw", "query_mode": None, "query_schedule": None, "queries": None, "output_dir": "out"}, "without torchrun"),
    ({}, "need --output_dir"),
    ({"prompt_cache": "disk", "output_dir": "out"}, "one process's file"),
])  # fmt: skip
def test_what_several_processes_cannot_do(changes, sentence, toy_options, monkeypatch, capsys):
    from conftest import run_main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_main(toy_options(**changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("zo-opt (rank 1): error: ")
    assert sentence in error
    assert not Path("out").exists()


def test_other_commands_are_one_process(monkeypatch, capsys, tmp_path):
    from conftest import run_main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_main(["schedule", "--out", str(tmp_path / "x.png")]) == 2
    assert "zo-opt schedule is one process; start it without torchrun." in capsys.readouterr().err


@pytest.mark.parametrize(("options", "sentence"), [
    ({"share": "rows"}, "share='rows' is not known"),
    ({"share": "0x2"}, "share='0x2' is not known"),
    ({"within": "distributed"}, "within='distributed' is not known"),
    ({"within": "split", "share": "data"}, "rows of its own"),
    ({"check_every": 0}, "above 0"),
    ({"timeout": -1.0}, "above 0"),
])  # fmt: skip
def test_impossible_options(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        Distributed(**options)


def test_options_without_the_mode_are_refused():
    with pytest.raises(ZOError, match='give query_mode="distributed"'):
        make(Model(), distributed=Distributed())
    with pytest.raises(ZOError, match="module=model"):
        MeZO(Model().parameters(), query_mode="distributed", distributed=Distributed(within="split"))


@pytest.mark.parametrize(("total", "parts"), [(0, 3), (2, 5), (17, 4), (1000, 7)])
def test_parts_cover_everything_once(total, parts):
    found = [part_of(total, parts, i) for i in range(parts)]
    assert [i for a, b in found for i in range(a, b)] == list(range(total))
    assert max(b - a for a, b in found) - min(b - a for a, b in found) <= 1
