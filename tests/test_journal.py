"""The journal: replayed to the bit, small, and no damage goes unnoticed."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from zo_opt import MeZO, ZOAdam, ZOError
from zo_opt.directions import DIRECTIONS, Rademacher
from zo_opt.journal import Journal, read_journal, replay
from zo_opt.journal.format import make_line
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES, ClipProjectedGrads, Update, ZerothOrderOptimizer
from zo_opt.schedules import constant_queries

DTYPES = (torch.float32, torch.bfloat16)
SETTINGS = {  # other than the defaults, where a method has settings of its own
    "hizoo": {"smoothing": 0.1},
    "sparse-mezo": {"density": 0.5},
    "lozo": {"rank": 1, "interval": 3},
    "subzero": {"rank": 2, "interval": 3},
    "mezo-svrg": {"interval": 3},
    "zo-kalman": {"memory": 0.9, "noise": 0.5},
    "p-gap": {"rank": 2, "interval": 3, "probes": 2},
    "zo-momentum": {"beta": 0.8},
    "zo-adam": {"beta1": 0.8, "beta2": 0.9, "adam_eps": 1e-3},
}
SPREAD = ("fzoo", "grzo")  # need two finite queries in a step
ZEROTH_ORDER = [name for name in OPTIMIZERS if name not in ("adamw", "agzo")]  # others keep no journal


class Model(nn.Module):
    """A frozen layer and three trainables: two matrices and a vector."""

    def __init__(self, dtype=torch.float32, seed=1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.base.weight.copy_(torch.randn(3, 3, generator=generator))
        self.w = nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(4, generator=generator).to(dtype))
        self.v = nn.Parameter(torch.randn(2, 4, generator=generator).to(dtype))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, batch):
        w, b, v = self.w.float(), self.b.float(), self.v.float()
        return (((self.base(batch["x"]) @ w.T + b).tanh() @ v.T) - batch["y"]).square().sum(1).mean()


def make_batch():
    generator = torch.Generator().manual_seed(2)
    return {"x": torch.randn(8, 3, generator=generator), "y": torch.randn(8, 2, generator=generator)}


BATCH = make_batch()


def make(model, name="mezo", **options):
    groups = [{"params": [model.w, model.b]}, {"params": [model.v], "lr": 0.03, "weight_decay": 0.2}]
    defaults = {"lr": 0.01, "seed": 5, "weight_decay": 0.1, "module": model} | SETTINGS.get(name, {})
    if name != "forward-gradient":
        defaults["zo_eps"] = 0.05
    if name not in SPREAD:
        defaults["query_schedule"] = constant_queries(2)
    return OPTIMIZERS[name](groups, **defaults | options)


def run(optimizer, model, steps, journal=None, *, failing=True, scheduler=None):
    """Train; with ``failing`` step 2 has no finite loss, and in step 3 one query has none."""
    for _ in range(steps):
        step, calls = optimizer.step_count, iter(range(100))

        def closure(b, step=step, calls=calls):
            bad = step == 2 or (step == 3 and next(calls) == 0 and optimizer.method.name not in SPREAD)
            return model(b) * (math.nan if failing and bad else 1.0)

        optimizer.step(closure, BATCH)
        if scheduler is not None:
            scheduler.step()
        if journal is not None:
            journal.append(optimizer.last_update)


def recorded(path, model, optimizer, steps=12, **options):
    with Journal.create(path, optimizer, model) as journal:
        run(optimizer, model, steps, journal, **options)
    return path


def bits(model):
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return [p.detach().clone().view(kinds[p.dtype]) for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A journal of three steps without a seal, and the lines of a sealed one."""
    model = Model()
    optimizer = make(model)
    path = tmp_path_factory.mktemp("small") / "journal"
    journal = Journal.create(path, optimizer, model)
    run(optimizer, model, 3, journal, failing=False)
    plain = path.read_bytes()
    journal.close()
    return plain, path.read_bytes()


# --- replay ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_every_optimizer_is_replayed_to_the_bit(tmp_path, name, dtype):
    """Groups, weight decay, a falling lr, dropped queries, a step without any, bf16 with stochastic rounding."""
    model, start = Model(dtype), Model(dtype)
    optimizer = make(model, name)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    path = recorded(tmp_path / "journal", model, optimizer, scheduler=schedule)
    assert not same(model, start)
    contents = read_journal(path)
    assert len(contents.updates) == 12
    assert contents.updates[2].coefficients == ()
    assert (0.0 in contents.updates[3].coefficients) or name != "mezo"
    for given in (False, True):
        again = copy.deepcopy(start)
        rebuilt = make(again, name) if given else None
        assert replay(path, again, rebuilt) == 12
        assert same(model, again)
        if rebuilt is not None:
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                assert all(torch.equal(optimizer.state[p][k], rebuilt.state[q][k]) for k in optimizer.state.get(p, {}))


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_every_direction_and_rule_is_replayed_to_the_bit(tmp_path, directions, rule):
    model, again = Model(torch.bfloat16), Model(torch.bfloat16)
    clip = (ClipProjectedGrads(1.0),)
    optimizer = make(model, directions=directions, update_rule=UPDATE_RULES[rule](), step_control=clip)
    path = recorded(tmp_path / "journal", model, optimizer, 6)
    assert replay(path, again) == 6
    assert same(model, again)


def test_a_whole_model_without_groups(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).eval()
    model.low = nn.Parameter(torch.ones(3, dtype=torch.float16))  # several dtypes: not gathered in one buffer
    again = copy.deepcopy(model)
    optimizer = MeZO(model.parameters(), lr=0.05)
    with Journal.create(tmp_path / "journal", optimizer, model) as journal:
        for _ in range(5):
            optimizer.step(lambda: model(BATCH["x"]).square().mean() + model.low.float().square().sum())
            journal.append(optimizer.last_update)
    assert replay(tmp_path / "journal", again) == 5
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_weights_after_any_step(tmp_path):
    model, states = Model(), []
    optimizer = make(model, "zo-adam")
    with Journal.create(tmp_path / "journal", optimizer, model) as journal:
        for _ in range(6):
            states.append(copy.deepcopy(model.state_dict()))
            run(optimizer, model, 1, journal)
    for steps, state in enumerate(states):
        again = Model()
        assert replay(tmp_path / "journal", again, steps=steps) == steps
        assert all(torch.equal(again.state_dict()[k], v) for k, v in state.items())
    with pytest.raises(ZOError, match="steps=7"):
        replay(tmp_path / "journal", Model(), steps=7)


@pytest.mark.parametrize("queries", [1, 3])
def test_numpy_alone_replays_rademacher_to_the_bit(tmp_path, queries):
    """A twin that shares no code: any arithmetic that rounds as IEEE 754 says gives the same bits, on any device."""
    model = Model()
    theta = [p.detach().numpy().copy() for p in (model.w, model.b, model.v)]
    optimizer = make(model, directions="rademacher", query_schedule=constant_queries(queries))
    path = recorded(tmp_path / "journal", model, optimizer, 40)
    header, *rows = [json.loads(line[:-14]) for line in lines_of(path)]
    seed, decay = header["optimizer"]["seed"], [g["weight_decay"] for g in header["optimizer"]["groups"]]
    for step, lrs, coefficients, *_ in (row for row in rows if isinstance(row, list)):
        total = [np.zeros_like(t) for t in theta]
        for query, coefficient in enumerate(coefficients):
            if coefficient == 0:
                continue
            words = np.random.Philox(key=[seed, 0], counter=[0, query, step, 0]).random_raw(4)
            flips = np.unpackbits(words.view(np.uint8), bitorder="little")[: 12 + 4 + 8]
            z = np.split(np.float32(1) - 2 * flips.astype(np.float32), [12, 16])
            for i in range(3):
                total[i] += np.float32(lrs[i == 2] * coefficient) * z[i].reshape(theta[i].shape)
        for i in range(3):
            if coefficients and theta[i].ndim > 1:
                theta[i] *= np.float32(1 - lrs[i == 2] * decay[i == 2])
            theta[i] -= total[i]
    for p, t in zip((model.w, model.b, model.v), theta, strict=True):
        assert p.detach().numpy().tobytes() == t.tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rademacher_is_replayed_on_the_other_device(tmp_path, dtype):
    for there, here in (("cpu", "cuda"), ("cuda", "cpu")):
        model, again = Model(dtype).to(there), Model(dtype).to(here)
        optimizer = make(model, directions="rademacher", query_schedule=constant_queries(3))
        batch = {k: v.to(there) for k, v in BATCH.items()}
        with Journal.create(tmp_path / there / "journal", optimizer, model) as journal:
            for _ in range(30):
                optimizer.step(lambda b, model=model: model(b), batch)
                journal.append(optimizer.last_update)
        assert replay(tmp_path / there / "journal", again) == 30
        assert same(model.cpu(), again.cpu())


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_a_journal_is_a_checkpoint(tmp_path, name):
    """Replay, open, go on: weights and journal are those of a run without a break."""
    whole, model = Model(), Model()
    recorded(tmp_path / "whole", whole, make(whole, name), 9, failing=False)
    recorded(tmp_path / "broken", model, make(model, name), 5, failing=False)
    again = Model()
    optimizer = make(again, name)
    replay(tmp_path / "broken", again, optimizer)
    with Journal.open(tmp_path / "broken", optimizer, again) as journal:
        run(optimizer, again, 4, journal, failing=False)
    assert same(whole, again)
    assert read_journal(tmp_path / "broken").updates == read_journal(tmp_path / "whole").updates
    assert replay(tmp_path / "broken", Model()) == 9


def test_as_a_hook(tmp_path):
    model = Model()
    optimizer = make(model)
    with Journal.create(tmp_path / "journal", optimizer, model) as journal:
        optimizer.register_step_post_hook(lambda *_: journal.append(optimizer.last_update))
        run(optimizer, model, 3)
    assert replay(tmp_path / "journal", again := Model()) == 3
    assert same(model, again)


def test_updates_come_back_as_they_were(tmp_path):
    """Every kind of float, and control variates by number or in full."""
    model = Model()
    odd = (0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, -1 / 3, 1e22)
    updates = [
        Update(0, (1e-6, 0.5), odd),
        Update(1, (0.0, 1.0), (0.5,), (2.0,), ((0, odd),)),
        Update(2, (1e-6, 1e-6), ()),
        Update(3, (1e-6, 1e-6), (1.0,), (), ((0, (1.5,)), (1, (0.5,)))),
    ]
    with Journal.create(tmp_path / "journal", make(model), model) as journal:
        for update in updates:
            journal.append(update)
        journal._optimizer.step_count = 4
    assert repr(read_journal(tmp_path / "journal").updates) == repr(updates)
    assert lines_of(tmp_path / "journal")[2].count(b"e-324") == 0  # named, not repeated


# --- size ---


@pytest.mark.parametrize("name", ["mezo", "mezo-svrg", "hizoo", "fzoo"])
def test_a_query_takes_less_than_100_bytes(tmp_path, name):
    """At one query a step (two where the method needs them) and an lr of all digits."""
    model = Model()
    optimizer = OPTIMIZERS[name](
        model.parameters(), lr=0.01, module=model, query_schedule=constant_queries(2 if name in SPREAD else 1),
        **SETTINGS.get(name, {}),
    )  # fmt: skip
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 * math.exp(-step / 7))
    path = recorded(tmp_path / "journal", model, optimizer, 30, failing=False, scheduler=schedule)
    updates, lines = read_journal(path).updates, lines_of(path)[1:-1]
    assert max(len(line) / len(u.coefficients) for line, u in zip(lines, updates, strict=True)) < 100


def test_the_longest_lines_too():
    """Step one million, every number of 17 digits with sign and exponent."""
    lr, longest = 1.2345678901234567e-07, -1.2345678901234567e-05
    for row in ([10**6, [lr], [longest]], [10**6, [lr], [longest], [-longest]], [10**6, [lr], [longest], [], [10**6]]):
        assert len(make_line(row, "0" * 12)[1]) < 100


# --- damage ---


def test_a_line_torn_anywhere(tmp_path, small):
    """Left out, removed before the journal goes on, and what follows is as if nothing had been torn."""
    plain, _ = small
    path = tmp_path / "journal"
    last = plain.splitlines(keepends=True)[-1]
    two, three = Model(), Model()
    optimizers = [make(two), make(three)]
    path.write_bytes(plain)
    replay(path, two, optimizers[0], steps=2)
    replay(path, three, optimizers[1])
    for kept in range(len(last)):
        path.write_bytes(plain[: len(plain) - len(last) + kept])
        assert len(read_journal(path).updates) == 2
        journal = Journal.open(path, optimizers[0], two)
        assert path.read_bytes() == plain[: -len(last)]
        journal.append(optimizers[1].last_update)
        assert path.read_bytes() == plain
        journal._file.close()


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ZOError) as caught:
        read_journal(path)
    assert str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("sealed", [False, True])
def test_every_flipped_bit_is_refused(tmp_path, small, sealed):
    content = small[sealed]
    header = content.index(b"\n") + 1
    for position in range(len(content)):
        for bit in range(8) if position >= header and sealed else (position % 8,):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            text = refused(tmp_path / "journal", bytes(damaged))
            assert "damaged" in text
            if position > header:
                assert "line " in text
                assert "step " in text


def test_lines_removed_repeated_or_swapped_are_refused(tmp_path, small):
    lines = small[1].splitlines(keepends=True)
    assert len(lines) == 5
    for i in range(4):
        refused(tmp_path / "journal", b"".join(lines[:i] + lines[i + 1 :]))
        refused(tmp_path / "journal", b"".join(lines[: i + 1] + lines[i:]))
        refused(tmp_path / "journal", b"".join([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]))
    refused(tmp_path / "journal", b"".join([*lines, lines[-1]]))


def test_a_line_of_another_journal_is_refused(tmp_path, small):
    model = Model()
    other = lines_of(recorded(tmp_path / "other", model, make(model, seed=6), 3))
    lines = small[1].splitlines(keepends=True)
    assert "line 3 (step 1)" in refused(tmp_path / "journal", b"".join([*lines[:2], other[2], *lines[3:]]))
    assert "line 2 (step 0)" in refused(tmp_path / "journal", b"".join([other[0], *lines[1:]]))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n", b"\0" * 100, b'{"format": "zo_opt.journal/1"} 000000000000\n']
)
def test_what_is_no_journal(tmp_path, content):
    assert "is no journal" in refused(tmp_path / "journal", content)


def test_no_file_and_other_formats(tmp_path):
    with pytest.raises(ZOError, match="cannot be read"):
        read_journal(tmp_path / "none")
    with pytest.raises(ZOError, match="cannot be read"):
        read_journal(tmp_path)
    assert "zo_opt.journal/9" in refused(tmp_path / "journal", make_line({"format": "zo_opt.journal/9"}, "")[1])


def test_steps_before_the_damage_can_be_had(tmp_path, small):
    damaged = bytearray(small[0])
    damaged[-20] ^= 1
    assert "line 4 (step 2)" in refused(tmp_path / "journal", bytes(damaged))
    assert replay(tmp_path / "journal", Model(), steps=2) == 2


# --- the wrong model, optimizer or step ---


def changed(change):
    model = Model()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(("model", "what"), [
    (lambda: changed(lambda m: m.base.weight[0, 0].mul_(-1)), "another base model"),
    (lambda: changed(lambda m: m.base.weight.view(torch.int32)[2, 1].bitwise_xor_(1)), "another base model"),
    (lambda: changed(lambda m: m.scale.add_(1)), "another base model"),
    (lambda: changed(lambda m: m.base.to(torch.bfloat16)), "another base model"),
    (lambda: changed(lambda m: m.register_buffer("more", torch.ones(1))), "another base model"),
    (lambda: changed(lambda m: m.b[3].add_(1)), "not those that training began with"),
    (lambda: Model(torch.bfloat16), "not those that training began with"),
    (lambda: changed(lambda m: m.v.requires_grad_(False)), "groups"),
    (lambda: nn.Linear(2, 2), "has no 'w'"),
])  # fmt: skip
def test_a_wrong_model_is_refused_before_anything_changes(tmp_path, small, model, what):
    (tmp_path / "journal").write_bytes(small[1])
    wrong = model()
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(ZOError, match=what):
        replay(tmp_path / "journal", wrong)
    assert all(torch.equal(wrong.state_dict()[k], v) for k, v in before.items())


class Mine(ZerothOrderOptimizer):
    pass


class MyDirections(Rademacher):
    pass


@pytest.mark.parametrize(("optimizer", "what"), [
    (lambda m: make(m, seed=6), "seed: 5 and 6"),
    (lambda m: make(m, "zo-sign"), "method: mezo and zo-sign"),
    (lambda m: make(m, directions="rademacher"), "directions.name: gaussian and rademacher"),
    (lambda m: make(m, update_rule=UPDATE_RULES["adam"]()), "update_rule.name: sgd and adam"),
    (lambda m: make(m, weight_decay=0.3), "weight_decay: 0.1 and 0.3"),
    (lambda m: MeZO(m.parameters(), lr=0.1, seed=5), "groups"),
    (lambda m: Mine(m.parameters(), MeZO.method, lr=0.1, seed=5), "Mine"),
    (lambda m: make(m, directions=MyDirections()), "MyDirections"),
    (lambda m: MeZO(Model().parameters(), lr=0.1, seed=5), "not in the model"),
])  # fmt: skip
def test_another_optimizer_is_refused(tmp_path, small, optimizer, what):
    (tmp_path / "journal").write_bytes(small[1])
    with pytest.raises(ZOError, match=what):
        replay(tmp_path / "journal", model := Model(), optimizer(model))
    assert same(model, Model())


def test_an_optimizer_that_has_begun_is_refused(tmp_path, small):
    (tmp_path / "journal").write_bytes(small[1])
    begun, model = Model(), Model()
    optimizer = make(begun)
    run(optimizer, begun, 1)
    again = make(model)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ZOError, match="step: 0 and 1"):
        replay(tmp_path / "journal", model, again)


@pytest.mark.parametrize("make_own", [
    lambda m: Mine(m.parameters(), lr=0.01), lambda m: make(m, directions=MyDirections()),
])  # fmt: skip
def test_classes_of_ones_own_are_replayed_with_the_optimizer_given(tmp_path, make_own):
    model, again = Model(), Model()
    path = recorded(tmp_path / "journal", model, make_own(model), 4)
    with pytest.raises(ZOError, match="pass it along"):
        replay(path, Model())
    assert replay(path, again, make_own(again)) == 4
    assert same(model, again)


def test_a_journal_begins_with_the_state_that_it_can_rebuild(tmp_path):
    model = Model()
    adam = ZOAdam(model.parameters(), lr=0.01)
    run(adam, model, 2, failing=False)
    with pytest.raises(ZOError, match="has state from 2 earlier steps"):
        Journal.create(tmp_path / "journal", adam, model)
    assert not (tmp_path / "journal").exists()
    plain = MeZO(model.parameters(), lr=0.01)  # keeps nothing: its journal may begin anywhere
    run(plain, model, 2, failing=False)
    start = copy.deepcopy(model)
    recorded(tmp_path / "journal", model, plain, 3, failing=False)
    assert replay(tmp_path / "journal", start) == 3
    assert same(model, start)


def test_steps_that_somebody_else_takes_are_refused(tmp_path):
    model = Model()
    optimizer = make(model)
    journal = Journal.create(tmp_path / "journal", optimizer, model)
    optimizer.write_grad(lambda: model(BATCH))
    with pytest.raises(ZOError, match="write_grad"):
        journal.append(optimizer.last_update)
    run(optimizer, model, 1)
    with pytest.raises(ZOError, match=r"step 0.*step 1.*write_grad"):
        journal.append(optimizer.last_update)
    with pytest.raises(ZOError, match="append every step"):
        journal.close()


def test_a_step_appended_twice_or_left_out_is_refused(tmp_path):
    model = Model()
    optimizer = make(model)
    journal = Journal.create(tmp_path / "journal", optimizer, model)
    run(optimizer, model, 1, journal)
    with pytest.raises(ZOError, match="step 1"):
        journal.append(optimizer.last_update)
    run(optimizer, model, 2)
    with pytest.raises(ZOError, match="step 1"):
        journal.append(optimizer.last_update)


def test_weights_moved_by_somebody_else_are_noticed(tmp_path):
    model, again = Model(), Model()
    optimizer = make(model)
    with Journal.create(tmp_path / "journal", optimizer, model) as journal:
        run(optimizer, model, 3, journal)
        with torch.no_grad():
            model.b.mul_(1.5)
        run(optimizer, model, 3, journal)
    with pytest.raises(ZOError, match=r"something else than the optimizer moved the weights"):
        replay(tmp_path / "journal", Model())
    assert replay(tmp_path / "journal", again, exact=False) == 6
    assert not same(model, again)


def from_elsewhere(path, sealed):
    """The journal as if it had been written on another kind of device, with or without its seals."""
    previous, lines = "", []
    for line in path.read_bytes().splitlines():
        content = json.loads(line[:-13])
        if isinstance(content, dict) and "device" in content:
            content["device"] = "tpu"
        if sealed or not (isinstance(content, dict) and "weights" in content):
            previous, again = make_line(content, previous)
            lines.append(again)
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("sealed", [True, False])
def test_from_another_device(tmp_path, sealed, portable):
    """Refused only where other weights could come out unnoticed."""
    model = Model()
    path = recorded(tmp_path / "journal", model, make(model, directions="rademacher" if portable else "gaussian"), 4)
    from_elsewhere(path, sealed)
    again = Model()
    if sealed or portable:
        assert replay(path, again) == 4
    else:
        with pytest.raises(ZOError, match=r"written on tpu.*unnoticed"):
            replay(path, again)
        assert same(again, Model())
        assert replay(path, again, exact=False) == 4
    assert same(model, again)


# --- writing ---


def test_create_and_open_say_what_is_wrong(tmp_path, small):
    path, model = tmp_path / "journal", Model()
    path.write_bytes(small[1])
    with pytest.raises(ZOError, match="exists already"):
        Journal.create(path, make(model), model)
    with pytest.raises(ZOError, match=r"up to 3.*has done 0"):
        Journal.open(path, make(model), model)
    with pytest.raises(ZOError, match="cannot be written"):
        Journal.create(path / "below", make(model), model)
    replay(path, model, optimizer := make(model))
    model.b.data.add_(1)
    with pytest.raises(ZOError, match="not those that"):
        Journal.open(path, optimizer, model)
    run(optimizer, model, 1)
    for cut in (False, True):
        with pytest.raises(ZOError, match=r"up to 3.*has done 4"):
            Journal.open(path, optimizer, model, cut=cut)
    assert path.read_bytes() == small[1]


def test_cut_drops_later_steps_damaged_or_not(tmp_path, small):
    lines = small[1].splitlines(keepends=True)
    for tail in (b"", b"torn", lines[3], lines[4], b"{bad}\n" + lines[3], lines[3] + b"\0\n\n"):
        path, model = tmp_path / "journal", Model()
        path.write_bytes(b"".join(lines[:3]) + tail)
        whole = tmp_path / "whole"
        whole.write_bytes(small[1])
        replay(whole, model, optimizer := make(model), steps=2)
        with Journal.open(path, optimizer, model, cut=True) as journal:
            run(optimizer, model, 1, journal, failing=False)
        assert path.read_bytes() == small[1]


def test_two_writers_are_refused(tmp_path, small):
    path, model = tmp_path / "journal", Model()
    path.write_bytes(small[0])
    replay(path, model, optimizer := make(model))
    one, two = Journal.open(path, optimizer, model), Journal.open(path, optimizer, model)
    run(optimizer, model, 1)
    one.append(optimizer.last_update)
    with pytest.raises(ZOError, match="somebody else"):
        two.append(optimizer.last_update)
    path.unlink()
    with pytest.raises(ZOError, match="deleted"):
        one.seal()


def test_a_full_disk_leaves_whole_lines(tmp_path, small):
    path, model = tmp_path / "journal", Model()
    path.write_bytes(small[0])
    replay(path, model, optimizer := make(model))
    journal = Journal.open(path, optimizer, model)
    run(optimizer, model, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(small[0]) + 10, limits[1]))
    try:
        with pytest.raises(ZOError, match="disk is full"):
            journal.append(optimizer.last_update)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == small[0]
    journal.append(optimizer.last_update)
    journal.close()
    assert len(read_journal(path).updates) == 4


def test_an_exception_leaves_no_seal(tmp_path):
    model = Model()
    optimizer = make(model)
    with pytest.raises(MemoryError), Journal.create(tmp_path / "journal", optimizer, model) as journal:
        run(optimizer, model, 2, journal)
        raise MemoryError
    contents = read_journal(tmp_path / "journal")
    assert contents.steps == 2
    assert contents.weights == {}


# --- kill -9 ---

CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_journal import BATCH, Journal, Model, make, read_journal, replay
path, model = Path({path!r}), Model()
optimizer = make(model, {name!r})
if path.exists():
    replay(path, model, optimizer)
    journal = Journal.open(path, optimizer, model)
else:
    journal = Journal.create(path, optimizer, model)
print("ready", flush=True)
while optimizer.step_count < 100000:
    optimizer.step(lambda b: model(b), BATCH)
    journal.append(optimizer.last_update)
    if optimizer.step_count % 10 == 0:
        journal.seal()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mezo-svrg"])
def test_kill_9(tmp_path, name):
    """Killed at random points, twice in a row: each time all steps on record are replayed, and it goes on from there."""
    path, rng, steps = tmp_path / "journal", random.Random(name), 0
    script = CHILD.format(tests=str(Path(__file__).parent), path=str(path), name=name)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.02, 0.3))
            process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        contents = read_journal(path)
        assert contents.steps > steps
        steps = contents.steps
        shutil.copy(path, tmp_path / "copy")
        assert replay(path, Model()) == steps
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()  # a replay changes nothing
    model = Model()
    optimizer = make(model, name)
    run(optimizer, model, steps, failing=False)
    again = Model()
    replay(path, again)
    assert same(model, again)
