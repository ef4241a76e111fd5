"""Optimizers over whole models: the steps of gathered trainables to the bit, no copy of the weights, nothing lost in bf16."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from allocator import allocated
from tiny_models import build, padded_batch
from torch import nn

from zo_opt import MeZO
from zo_opt.directions import DIRECTIONS, StepDirections
from zo_opt.optim import OPTIMIZERS
from zo_opt.queries import perturbation
from zo_opt.queries.substitution import Substitution
from zo_opt.queries.trainables import Trainables
from zo_opt.schedules import constant_queries

MIB = 2**20


@pytest.fixture
def whole(monkeypatch):
    """Every model is a large one."""
    monkeypatch.setattr(Trainables, "SMALL", 0)


def net_of(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 5)).to(dtype)


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))


def loss_of(net, x=X):
    return lambda: net(x.to(net[0].weight.dtype)).double().square().mean()


def bits(parameters):
    return [p.detach().clone().view(torch.uint8) for p in parameters]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trained(net, name="mezo", steps=6, **options):
    scale = {} if name == "forward-gradient" else {"zo_eps": 0.05}
    optimizer = OPTIMIZERS[name](net.parameters(), **{"lr": 0.01, "seed": 4, "module": net} | scale | options)
    losses = [float(optimizer.step(lambda x: loss_of(net, x)(), X)) for _ in range(steps)]
    return bits(net.parameters()), losses, optimizer


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adamw"}))
def test_every_optimizer_takes_the_steps_of_gathered_trainables(name, monkeypatch):
    """Losses and weights to the bit; matrices decay, vectors do not."""
    expected, losses, _ = trained(net_of(), name, weight_decay=0.1)
    monkeypatch.setattr(Trainables, "SMALL", 0)
    found, theirs, optimizer = trained(net_of(), name, weight_decay=0.1)
    assert optimizer.trainables().flat is None
    assert theirs == losses
    assert same(found, expected)
    assert not same(found, bits(net_of().parameters()))


@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kept", [0, 1 << 23])
def test_every_direction_in_every_dtype(directions, dtype, kept, monkeypatch):
    """The same steps, whether directions are kept or redrawn and whether the model is large or small."""
    options = {"directions": directions, "query_schedule": constant_queries(2), "steps": 3, "lr": 1e-3}
    expected, losses, _ = trained(net_of(dtype), **options)
    monkeypatch.setattr(Trainables, "SMALL", 0)
    monkeypatch.setattr(StepDirections, "KEPT", kept)
    found, theirs, _ = trained(net_of(dtype), **options)
    assert theirs == losses
    assert same(found, expected)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_transformers(name, monkeypatch):
    """Tied weights, poolers that the loss does not see, masks: two steps to the bit."""
    finals = []
    for small in (1 << 23, 0):
        monkeypatch.setattr(Trainables, "SMALL", small)
        model, batch = build(name), padded_batch(name)
        optimizer = MeZO(model.parameters(), lr=1e-3, zo_eps=1e-2, module=model, query_schedule=constant_queries(2))
        finals.append(([float(optimizer.step(lambda b, m=model: m(**b).loss, batch)) for _ in range(2)], bits(model.parameters())))  # fmt: skip
    assert finals[0][0] == finals[1][0]
    assert same(finals[0][1], finals[1][1])


@pytest.mark.usefixtures("whole")
def test_groups_have_their_own_rates():
    """A group with lr 0 stays to the bit."""
    net = net_of()
    before = bits(net.parameters())
    optimizer = MeZO([{"params": net[0].parameters(), "lr": 0.0}, {"params": net[3].parameters()}], lr=0.01)
    optimizer.step(loss_of(net))
    assert same(bits(net[0].parameters()), before[:2])
    assert not same(bits(net[3].parameters()), before[4:])


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("directions", ["rademacher", "gaussian"])
def test_a_thousand_steps_of_nothing(directions):
    """lr 0: 2000 evaluations leave every bit, of weights next to zero and of zeros of either sign, too."""
    net = net_of(torch.bfloat16)
    with torch.no_grad():
        net[0].bias[:4] = torch.tensor([0.0, -0.0, 1e-38, -3e38])
        net[0].weight[0, :3] = torch.tensor([1e-40, -1e-40, 65504.0])
    before = bits(net.parameters())
    optimizer = MeZO(net.parameters(), lr=0, zo_eps=1e-3, directions=directions)
    losses = {float(optimizer.step(loss_of(net))) for _ in range(1000)}
    assert len(losses) > 1
    assert same(bits(net.parameters()), before)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_is_learned(dtype):
    """Steps far below the spacing of bf16 halve the loss of a whole model as in float32."""
    net = net_of(dtype)
    optimizer = MeZO(net.parameters(), lr=0.01, zo_eps=0.02, seed=1)
    losses = [float(optimizer.step(loss_of(net))) for _ in range(250)]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


@pytest.mark.usefixtures("whole")
def test_two_forwards_a_query():
    net, calls = net_of(), []

    def loss():
        calls.append(1)
        return net(X).square().mean()

    optimizer = MeZO(net.parameters(), lr=0.01, query_schedule=constant_queries(3))
    for _ in range(2):
        optimizer.step(loss)
    assert len(calls) == 12 + 1 == optimizer.history.forwards  # the first closure is tried twice


@pytest.mark.usefixtures("whole")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_takes_the_same_steps():
    """What no torch function sees is found once and moved in place from then on."""
    expected, losses, _ = trained(net_of())
    net = net_of()
    traced, calls = torch.jit.trace(net, X), []

    def loss():
        calls.append(1)
        return traced(X).double().square().mean()

    optimizer = MeZO(net.parameters(), lr=0.01, zo_eps=0.05, seed=4)
    assert [float(optimizer.step(loss)) for _ in range(6)] == losses
    assert same(bits(net.parameters()), expected)
    assert len(calls) == 2 * 6 + 1 + 1  # the first closure is tried twice


def test_an_expert_that_the_first_batch_does_not_need(monkeypatch):
    """Not seen at first, hence moved in place: its steps are those of small trainables all the same."""
    finals = []
    for small in (1 << 23, 0):
        monkeypatch.setattr(Trainables, "SMALL", small)
        net = net_of()
        optimizer = MeZO(net.parameters(), lr=0.01, zo_eps=0.05)

        def loss(net=net, optimizer=optimizer):
            h = net[2](net[0](X).tanh())
            return h.square().mean() + (net[3](h).square().mean() if optimizer.step_count else h.sum())

        finals.append(([float(optimizer.step(loss)) for _ in range(3)], bits(net.parameters())))
    assert optimizer.trainables().opaque == {4, 5}
    assert finals[0][0] == finals[1][0]
    assert same(finals[0][1], finals[1][1])


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_can_be_taken_again(error):
    """Nothing was moved; the step taken afterwards is the one that was missed."""
    expected, _, _ = trained(net_of(), steps=3)
    net = net_of()
    optimizer = MeZO(net.parameters(), lr=0.01, zo_eps=0.05, seed=4)
    optimizer.step(loss_of(net))
    before, calls = bits(net.parameters()), []

    def interrupted():
        calls.append(1)
        loss = loss_of(net)()
        if len(calls) == 2:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(interrupted)
    assert same(bits(net.parameters()), before)
    for _ in range(2):
        optimizer.step(loss_of(net))
    assert same(bits(net.parameters()), expected)


@pytest.mark.usefixtures("whole")
def test_a_parameter_without_entries():
    net = net_of()
    net.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    for directions in sorted(DIRECTIONS):
        optimizer = MeZO(net.parameters(), lr=0.01, directions=directions)
        optimizer.step(loss_of(net))
        optimizer.write_grad(loss_of(net))


@pytest.mark.usefixtures("whole")
def test_global_random_state_is_left_alone():
    net = net_of()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trained(net)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


# --- memory ---


def test_peak_sees_what_is_allocated():
    def call():
        a = torch.zeros(MIB)
        b = a + 1
        del a
        b.add_(1)
        return (b + 1).sum()

    assert 8 * MIB <= allocated(call) < 8.1 * MIB


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
def test_no_copy_of_the_model(directions, monkeypatch):
    """Five layers of 4 MiB: an estimate needs the layer in use and a bound of 8 MiB (two thirds of it for Philox in float64)."""
    monkeypatch.setattr(StepDirections, "KEPT", 0)  # up to 32 MiB of directions are kept otherwise
    net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(5)])
    optimizer = MeZO(net.parameters(), lr=1e-6, directions=directions)
    x = torch.ones(2, 1024)
    assert allocated(lambda: optimizer.estimate(lambda: net(x).square().mean())) < (4 + 8) * MIB
    assert allocated(optimizer.step) < 8.5 * MIB


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_less_than_a_layer(directions, layer, monkeypatch):
    """A layer of 16 MiB in chunks of 1 MiB needs less than half of itself."""
    monkeypatch.setattr(StepDirections, "KEPT", 0)
    monkeypatch.setattr(perturbation, "Substitution", functools.partial(Substitution, chunk=1 << 18))
    net = nn.Linear(1024, 4096, bias=False) if layer == "linear" else nn.Embedding(4096, 1024)
    x = torch.ones(2, 1024) if layer == "linear" else torch.arange(0, 4096, 100)
    optimizer = MeZO(net.parameters(), lr=1e-6, directions=directions)
    assert allocated(lambda: optimizer.estimate(lambda: net(x).square().mean())) < 8 * MIB


@pytest.mark.usefixtures("whole")
def test_a_copy_only_of_what_is_moved_in_place():
    net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(3)])
    view, x = net[1].weight.detach(), torch.ones(2, 1024)
    optimizer = MeZO(net.parameters(), lr=1e-6, directions="rademacher")
    closure = lambda: (net[2](net[0](x)) @ view).square().mean()  # noqa: E731
    optimizer.estimate(closure)
    assert optimizer.trainables().opaque == {2, 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepDirections, "KEPT", 0)
        optimizer._directions._kept.clear()
        assert allocated(lambda: optimizer.estimate(closure)) < (4 + 4 + 8) * MIB
