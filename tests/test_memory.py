"""What a call will take is known before it runs: held against the allocator's own record."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_query_modes import EPS, Net, adapted, evaluator_of, net_batch, optimizer_of
from tiny_models import build, padded_batch, perturb
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from zo_opt import MeZO, TTLoRAConfig, get_adapter_model, trainable_parameters
from zo_opt.queries import modes
from zo_opt.queries.perturbation import Point
from zo_opt.schedules import constant_queries
from zo_opt.system import memory
from zo_opt.system.memory import predicted_peak, total_memory


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def measured_peak(call):
    """The most bytes allocated at once while it runs, by the allocator's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


X = torch.ones(40, 50)


def dropped_one_after_another():
    x = X
    for _ in range(6):
        x = x + 1  # two at once: the one that is read and the one that is made
    return x


def kept():
    return [X + i for i in range(6)]


def kept_by_a_view():
    return [(X + i)[0] for i in range(6)]


def in_place():
    x = X + 1
    return x.mul_(2).add_(1).clamp_(0, 5)


def views():
    return (X + 1).view(50, 40).T[3:9].unsqueeze(0).expand(70, -1, -1).chunk(2)


def into_a_buffer():
    return torch.add(X, 1, out=torch.empty(40, 50))


def several_results():
    values, indices = X.topk(20)
    return values + 1, indices


CALLS = {
    "dropped": (dropped_one_after_another, 16_000),
    "kept": (kept, 48_000),
    "kept by a view": (kept_by_a_view, 48_000),
    "in place": (in_place, 8_000),
    "views": (views, 8_000),
    "into a buffer": (into_a_buffer, 8_000),
    "several results": (several_results, 12_800),
    "a copy by reshape": (lambda: X.T.reshape(-1), 8_000),
    "narrow": (lambda: X.bfloat16().float(), 12_000),
    "nothing": (lambda: X.T, 0),
    "layer norm": (lambda: F.layer_norm(X, (50,)), 8_320),
    "an index": (lambda: X[torch.zeros(7, dtype=torch.long)], 7 * 200 + 56),
}


@pytest.mark.parametrize(("call", "expected"), CALLS.values(), ids=CALLS)
def test_single_operations(call, expected):
    assert predicted_peak(call) == expected
    assert measured_peak(call) == pytest.approx(expected, abs=64)  # scalars


def test_nothing_is_computed():
    """Nothing that exists is written to, no module changes, no random number is drawn; the closure itself is called."""
    net, called = nn.BatchNorm1d(3).eval(), []
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def call():
        called.append(1)
        net(torch.rand(4, 3))
        return torch.randn(100, generator=generator)

    predicted_peak(call)
    assert called == [1]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_nothing_is_written():
    """A module that counts its calls in a buffer."""
    count = torch.zeros(50)
    predicted_peak(lambda: count.add_(1))
    assert count.tolist() == [0] * 50


@pytest.mark.parametrize(
    "read",
    [lambda x: float(x.sum()), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: (x + 1).numpy(), lambda x: x.tolist()],
    ids=["float", "bool", "mask", "nonzero", "numpy", "list"],
)  # fmt: skip
def test_a_call_that_reads_values_is_refused(read):
    with pytest.raises(RuntimeError):
        predicted_peak(lambda: read(X + 1))
    assert predicted_peak(lambda: X + 1) == 8_000  # and nothing of it stays


def test_an_error_in_the_call_comes_out():
    with pytest.raises(ZeroDivisionError):
        predicted_peak(lambda: 1 // 0)
    assert float((X + 1).sum()) == 4_000  # real again


def test_total_memory():
    free = total_memory(torch.device("cpu"))
    assert isinstance(free, int)
    assert 0 < free < 1 << 50


# --- copies ---


def copies_of(model, batch, count, directions="gaussian"):
    evaluator = evaluator_of("batched", model, lambda b: model(**b).loss, batch, directions)
    return evaluator, [Point(((q, EPS),)) for q in range(count)]


SIZES = [*((name, 2, 33, 5) for name in ("llama", "bert", "opt", "gpt2", "t5")), ("llama", 4, 9, 3), ("bert", 8, 40, 2)]


@pytest.mark.parametrize(("name", "examples", "tokens", "count"), SIZES)
def test_copies_take_what_was_predicted(name, examples, tokens, count):
    """Within 15 %: the bar. What is measured includes the copies, and the directions that they are made from."""
    model, batch = adapted(name), padded_batch(name, examples, tokens)
    predicted = copies_of(model, batch, count)
    (evaluator, points), expected = copies_of(model, batch, count), predicted[0].predicted_memory(predicted[1])
    assert measured_peak(lambda: evaluator._copies()(points, batch, split=False)) == pytest.approx(expected, rel=0.15)


def test_what_is_predicted_grows_with_copies():
    model, batch = adapted("llama"), padded_batch("llama", 4, 30)
    one, two, five = (
        evaluator.predicted_memory(points) for evaluator, points in (copies_of(model, batch, n) for n in (1, 2, 5))
    )
    assert one < two < five
    assert five == pytest.approx(one + 4 * (two - one), rel=0.05)  # what the chunk is computed from


@pytest.mark.parametrize("directions", ["gaussian", "rademacher", "low-rank", "subspace"])
@pytest.mark.parametrize("config", [None, TTLoRAConfig(rank=2, tt_rank=2)], ids=["tt", "tt-lora"])
def test_a_prediction_changes_no_loss(directions, config):
    model = adapted("llama") if config is None else get_adapter_model(build("llama"), config)
    perturb(trainable_parameters(model))
    batch = padded_batch("llama")
    before = [p.clone() for p in trainable_parameters(model)]
    losses = []
    for predict in (False, True):
        evaluator, points = copies_of(model, batch, 3, directions)
        if predict:
            evaluator.predicted_memory(points)
        losses.append(evaluator._batched(points))
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(a, b) for a, b in zip(before, trainable_parameters(model), strict=True))
    assert losses[0].isfinite().all()


# --- the chunk on a device that is not a CPU: the same rule, asked for here ---


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Bytes of the device -> they are what the chunk must fit in."""
    monkeypatch.delitem(modes.BATCHED_TOKENS, "cpu")
    return lambda free: monkeypatch.setattr(memory, "total_memory", lambda device: free)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(3))
        self.layers[:2].requires_grad_(False)
        perturb(self.layers.parameters(), std=1)

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        return x.tanh().mean()


def test_copies_fit_in_the_memory(as_on_a_gpu):
    """The chunk is the largest whose prediction stays within the share of the memory that weights and copies may take."""

    def evaluator(count):
        model = Layers()
        return evaluator_of("batched", model, model, net_batch(200)), [Point(((q, EPS),)) for q in range(count)]

    def chunk():
        some, points = evaluator(7)
        return some._copies_at_once(points)

    for count in (1, 2, 4, 6):
        some, points = evaluator(count)
        weights = sum(p.nbytes for p in some.module.parameters())
        need = some.predicted_memory(points) + weights
        for slack, expected in ((1.05, count), (0.95, max(1, count - 1))):
            as_on_a_gpu(int(slack * need / modes.MEMORY_SHARE))
            assert chunk() == expected, (count, slack)
    as_on_a_gpu(0)  # nothing is left: one copy is tried
    assert chunk() == 1
    as_on_a_gpu(1 << 40)
    assert chunk() >= 7


def test_a_step_after_a_prediction(as_on_a_gpu):
    as_on_a_gpu(1 << 40)
    losses = []
    for mode in ("sequential", "batched"):
        net = Net()
        losses.append([float(optimizer_of(net, mode).step(net.loss, net_batch())) for _ in range(2)])
        losses[-1].append(net.weight.tolist())
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-6)
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-6)


def test_a_closure_that_reads_values_cannot_be_predicted_and_runs(as_on_a_gpu):
    as_on_a_gpu(1 << 40)
    net, batch, losses = Net(), net_batch(), []

    def closure(b):
        # A branch on the batch alone: copies share it, and vmap can follow.
        return net(b) * (2 if float(b["x"].sum()) > -1e9 else 1)

    evaluator = evaluator_of("batched", net, closure, batch)
    with pytest.raises(RuntimeError):
        evaluator.predicted_memory([Point()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("sequential", "batched"):
            losses.append(evaluator_of(mode, net, closure, batch)(3, (EPS, -EPS)).values)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


def test_a_shared_prefix_forgets_the_prediction(as_on_a_gpu):
    as_on_a_gpu(1 << 40)
    losses = []
    for share in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Layers()
        optimizer = MeZO(
            trainable_parameters(model), lr=0, module=model, query_mode="batched", share_prefix=share,
            query_schedule=constant_queries(3),
        )  # fmt: skip
        optimizer._directions_of(0).range(2, 0, 1)  # drawn before any prediction
        losses.append(float(optimizer.step(model, net_batch())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
