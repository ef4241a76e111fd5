"""Query modes are a choice of cost: batched gives sequential's losses, split those of each slice alone."""

from __future__ import annotations

import random
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny_models import build, padded_batch, perturb
from torch import nn

from zo_opt import MeZO, TTConfig, ZOError, get_adapter_model, trainable_parameters
from zo_opt.directions import DIRECTIONS, StepDirections, Stream
from zo_opt.queries import modes
from zo_opt.queries.copies import Limits
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.perturbation import Perturbed, Point
from zo_opt.queries.trainables import Trainables
from zo_opt.schedules import constant_queries

MODELS = ["llama", "bert", "opt", "gpt2", "t5"]
EPS = 5e-2
SCALES = (EPS, -EPS)


def adapted(name):
    model = get_adapter_model(build(name), TTConfig(rank=2, bottleneck=4))
    perturb(trainable_parameters(model))
    return model


def evaluator_of(mode, model, closure, batch, directions="gaussian", limits=None):
    trainables = Trainables(trainable_parameters(model))
    perturbed = Perturbed(trainables, directions_of(model, directions))
    return Evaluator(perturbed, closure, batch, mode, model, limits=limits or Limits())


def directions_of(model, name="gaussian"):
    return StepDirections(DIRECTIONS.make(name), 0, 0, trainable_parameters(model))


@torch.no_grad()
def by_hand(model, closure, batches, queries, scales=SCALES, anchor=None, directions="gaussian"):
    """Loss of query q at theta + scale * z_q on ``batches[q]``, z drawn straight from zo_opt.directions."""
    parameters = trainable_parameters(model)
    originals = [p.detach().clone() for p in parameters]
    sizes, shapes = [p.numel() for p in parameters], tuple(tuple(p.shape) for p in parameters)
    theta = torch.cat([p.flatten() for p in originals]) if anchor is None else anchor
    values = torch.empty(queries, len(scales), dtype=torch.float64)
    for q in range(queries):
        z = DIRECTIONS.make(directions).draw(Stream(0, 0, q), shapes, 0, sum(sizes), theta.device)
        for s, scale in enumerate(scales):
            for p, part in zip(parameters, (theta + scale * z).split(sizes), strict=True):
                p.copy_(part.view_as(p))
            values[q, s] = float(closure(batches[q]))
    for p, original in zip(parameters, originals, strict=True):
        p.copy_(original)
    return values


@torch.no_grad()
def run(mode, model, closure, batch, queries, **options):
    """Losses, and the weights bit for bit what they were."""
    before = [p.detach().clone() for p in trainable_parameters(model)]
    losses = evaluator_of(mode, model, closure, batch)(queries, SCALES, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, trainable_parameters(model), strict=True))
    return losses


def take(batch, start, stop):
    return {k: v[start:stop] for k, v in batch.items()}


def assert_same_losses(actual, expected):
    """1e-5 relative, and the losses along different directions must differ by far more than that."""
    assert float(expected.std() / expected.mean().abs()) > 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_losses_on_the_whole_batch(name, mode):
    model, batch = adapted(name), padded_batch(name)

    def closure(b):
        return model(**b).loss

    losses = run(mode, model, closure, batch, 3)
    assert losses.values.dtype == torch.float64
    assert losses.forwards == 6
    assert losses.weights.tolist() == [1, 1, 1]
    assert losses.base is None
    assert_same_losses(losses.values, by_hand(model, closure, [batch] * 3, 3))


@pytest.mark.parametrize("name", MODELS)
def test_batched_in_several_chunks(name, monkeypatch):
    model, batch = adapted(name), padded_batch(name)
    whole = run("batched", model, lambda b: model(**b).loss, batch, 3).values
    monkeypatch.setitem(modes.BATCHED_TOKENS, "cpu", 4 * padded_batch(name)["input_ids"].numel())
    chunked = run("batched", model, lambda b: model(**b).loss, batch, 3)
    torch.testing.assert_close(chunked.values, whole, rtol=1e-5, atol=0)
    assert chunked.forwards == 6


@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
@pytest.mark.parametrize("mode", ["sequential", "batched"])
@pytest.mark.parametrize("small", [True, False], ids=["gathered", "in place"])
def test_losses_along_every_kind_of_direction(directions, mode, small, monkeypatch):
    """Gathered trainables and large ones, which are never moved, are evaluated at the same points."""
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    net, batch = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double(), net_batch()
    perturb(net.parameters())

    def closure(b):
        return net(b["x"]).square().mean()

    with torch.no_grad():
        found = evaluator_of(mode, net, closure, batch, directions)(3, SCALES).values
    torch.testing.assert_close(found, by_hand(net, closure, [batch] * 3, 3, directions=directions), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
@pytest.mark.parametrize("small", [True, False], ids=["gathered", "in place"])
def test_the_loss_at_the_weights(mode, small, monkeypatch):
    """On what each query saw: the whole batch, or its slice. One forward more, whatever the number of queries."""
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    net, batch = Net(), net_batch()
    losses = run(mode, net, net.loss, batch, 3, base=True)
    slices = [take(batch, i, i + 2) for i in (0, 2, 4)] if mode == "split" else [batch] * 3
    with torch.no_grad():
        assert losses.base.tolist() == pytest.approx([float(net.loss(b)) for b in slices], rel=1e-6)
    torch.testing.assert_close(losses.values, by_hand(net, net.loss, slices, 3), rtol=1e-6, atol=0)
    assert losses.forwards == (3 if mode == "split" else 7)
    assert losses.weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
@pytest.mark.parametrize("small", [True, False], ids=["gathered", "in place"])
@pytest.mark.parametrize("base", [False, True])
def test_losses_around_other_weights(mode, small, base, monkeypatch):
    """An anchor takes the weights' place in every mode, also for the loss in the middle."""
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    net, batch = Net(), net_batch()
    anchor = torch.tensor([0.5, -1.0, 2.0])
    losses = run(mode, net, net.loss, batch, 3, anchor=anchor, base=base)
    slices = [take(batch, i, i + 2) for i in (0, 2, 4)] if mode == "split" else [batch] * 3
    expected = by_hand(net, net.loss, slices, 3, (*SCALES, 0.0), anchor)
    torch.testing.assert_close(losses.values, expected[:, :2], rtol=1e-6, atol=0)
    if base:
        torch.testing.assert_close(losses.base, expected[:, 2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("small", [True, False], ids=["gathered", "in place"])
def test_points_of_several_directions_with_factors(small, monkeypatch):
    """theta + sum_q scale_q factor_p z_q: what a line search asks for."""
    monkeypatch.setattr(Trainables, "SMALL", (1 << 23) * small)
    net = nn.Linear(3, 2).double()
    evaluator = evaluator_of("sequential", net, lambda b: net(b["x"]).square().mean(), net_batch())
    factors = torch.tensor([0.5, 2.0])
    points = [Point(((0, 0.1), (2, -0.3)), factors), Point(((1, 0.0), (1, 0.2)), factors), Point()]
    with torch.no_grad():
        found = evaluator.at(points).tolist()
    z = torch.stack([directions_of(net).range(q, 0, 8) for q in range(3)]).double() * torch.tensor(
        [0.5] * 6 + [2.0] * 2
    )
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    for value, move in zip(found, (0.1 * z[0] - 0.3 * z[2], 0.2 * z[1], 0 * z[0]), strict=True):
        weight, bias = (theta + move).split([6, 2])
        expected = torch.nn.functional.linear(net_batch()["x"], weight.view(2, 3), bias).square().mean()
        assert value == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
def test_perturbed_weights(dtype, directions):
    """The same bits however they are cut, with kept directions or redrawn ones; within half a spacing of the exact sum."""
    parameters = [nn.Parameter(torch.randn(1000, 300, generator=torch.Generator().manual_seed(0)))]
    origin, point = parameters[0].detach().to(dtype).flatten(), Point(((0, 1e-3),))
    kept, redrawn = (StepDirections(DIRECTIONS.make(directions), 0, 0, parameters) for _ in range(2))
    redrawn.KEPT = 0
    whole = Perturbed(Trainables(parameters), kept).values(point, 0, 300_000, origin)
    assert whole.dtype == dtype
    move = 1e-3 * kept.range(0, 0, 300_000).double()
    exact = origin.double() + move
    spacing = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    product = (
        torch.finfo(torch.promote_types(dtype, torch.float32)).eps * move.abs()
    )  # itself rounded before it is added
    half = 1.001 if dtype == torch.float64 else 0.501  # float64's exact sum is rounded itself
    assert ((whole.double() - exact).abs() <= half * spacing + product).all()
    for each in (kept, redrawn):
        perturbed = Perturbed(Trainables(parameters), each)
        for start, stop in ((0, 300_000), (0, 7), (5, 262_150), (262_139, 300_000), (100, 101)):
            part = perturbed.values(point, start, stop, origin[start:stop])
            assert torch.equal(part, whole[start:stop])


def slice_sizes(examples, queries):
    size, larger = divmod(examples, queries)
    return [size + 1] * larger + [size] * (queries - larger)


SPLITS = [(name, *split) for name in MODELS for split in ((16, 15), (7, 3))] + [
    ("llama", 6, 3),
    ("llama", 4, 1),
    ("llama", 4, 4),
]


@pytest.mark.parametrize(("name", "examples", "queries"), SPLITS)
def test_split_equals_each_slice_alone(name, examples, queries):
    """Slices are contiguous and differ by at most one example; weights are their shares of the batch, times queries."""
    model, batch = adapted(name), padded_batch(name, examples)

    def closure(b):
        return model(**b).loss

    sizes = slice_sizes(examples, queries)
    stops = torch.tensor(sizes).cumsum(0).tolist()
    slices = [take(batch, stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    losses = run("split", model, closure, batch, queries)
    assert losses.forwards == 2
    torch.testing.assert_close(losses.weights, torch.tensor(sizes).double() * queries / examples)
    assert_same_losses(losses.values, by_hand(model, closure, slices, queries))


class Net(nn.Module):
    """Counts its evaluations."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, generator=generator, dtype=dtype))
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        return ((batch["x"] @ self.weight).tanh() - batch["y"]).square().mean()

    def loss(self, batch):
        return self(batch)


def net_batch(examples=6):
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(examples, 3, generator=generator), torch.randn(examples, generator=generator)
    return {"x": x.double(), "y": y.double()}


def optimizer_of(net, mode="sequential", queries=3, **options):
    options = {"lr": 0.1, "zo_eps": EPS, "module": net, "query_schedule": constant_queries(queries)} | options
    return MeZO(net.parameters(), query_mode=mode, **options)


@pytest.mark.parametrize(("mode", "forwards"), [("sequential", 6), ("batched", 6), ("split", 2)])
def test_forwards_are_counted(mode, forwards):
    net = Net()
    optimizer = optimizer_of(net, mode)
    for _ in range(2):
        optimizer.step(net.loss, net_batch())
    assert optimizer.last_record.forwards == forwards
    assert optimizer.history.forwards == 2 * forwards
    assert optimizer.history.queries == 6
    if mode == "sequential":
        assert net.calls == 2 * forwards


@pytest.mark.parametrize("mode", ["batched", "auto"])
def test_a_run_equals_sequential(mode):
    final = {}
    for each in ("sequential", mode):
        net = Net()
        optimizer = optimizer_of(net, each)
        losses = [float(optimizer.step(net.loss, net_batch())) for _ in range(10)]
        final[each] = net.weight.detach().clone(), losses
    torch.testing.assert_close(final[mode][0], final["sequential"][0], rtol=1e-5, atol=0)
    assert final[mode][1] == pytest.approx(final["sequential"][1], rel=1e-6)
    assert final[mode][1][-1] < 0.9 * final[mode][1][0]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_auto_gives_sequentials_losses(name):
    model, batch, losses = adapted(name), padded_batch(name), {}
    for mode in ("sequential", "auto"):
        optimizer = MeZO(
            trainable_parameters(model), lr=0, zo_eps=EPS, module=model, query_mode=mode,
            query_schedule=constant_queries(3),
        )  # fmt: skip
        losses[mode] = float(optimizer.estimate(lambda b: model(**b).loss, batch))
    assert losses["auto"] == pytest.approx(losses["sequential"], rel=1e-5)


def test_auto_needs_neither_module_nor_batch():
    net = Net()
    auto, plain = (
        float(MeZO(net.parameters(), lr=0, query_mode=m).step(lambda: net(net_batch()))) for m in ("auto", "sequential")
    )
    assert auto == plain


def test_batched_with_tied_parameters():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    perturb(net.parameters())

    def closure(b):
        return net(b["x"]).square().mean()

    sequential, batched = (run(mode, net, closure, net_batch(), 3).values for mode in ("sequential", "batched"))
    torch.testing.assert_close(batched, sequential, rtol=1e-6, atol=0)


class LossOf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch)


class Shared(nn.Module):
    """The same module under two names, the same parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.again = self.first
        self.tied = nn.Linear(3, 3).double()
        self.tied.weight = self.first.weight

    def forward(self, batch):
        return self.tied(self.again(self.first(batch["x"]).tanh()).tanh()).square().mean()


@pytest.mark.parametrize("mode", ["batched", "split"])
@pytest.mark.parametrize(
    ("make", "wrap"),
    [(Net, lambda n: n), (Net, LossOf), (Shared, lambda n: n.forward)],
    ids=["the module is the closure", "a module around it is the closure", "shared submodules"],
)
def test_the_modules_own_parameters_stay_in_it(mode, make, wrap):
    """The very objects, so that the optimizer goes on moving the weights that the model uses."""
    net = make()
    owned = {n: m._parameters.copy() for n, m in net.named_modules(remove_duplicate=False)}
    optimizer = optimizer_of(net, mode)
    optimizer.step(wrap(net), net_batch())
    for name, module in net.named_modules(remove_duplicate=False):
        for key, parameter in owned[name].items():
            assert module._parameters[key] is parameter, f"{name}.{key} was replaced"


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_shared_submodules_give_the_losses_by_hand(mode):
    net, batch = Shared(), net_batch()

    def closure(b):
        return net(b)

    expected = by_hand(
        net, closure, [batch] * 3 if mode == "batched" else [take(batch, i, i + 2) for i in (0, 2, 4)], 3
    )
    torch.testing.assert_close(run(mode, net, closure, batch, 3).values, expected, rtol=1e-6, atol=0)


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize("mode", ["batched", "split"])
@pytest.mark.parametrize(
    "pack",
    [lambda b: (b["x"], b["y"]), lambda b: [b["x"], {"y": b["y"]}], lambda b: Pair(**b), lambda b: ("name", b["x"], None, b["y"])],
    ids=["tuple", "nested", "namedtuple", "with other values"],
)  # fmt: skip
def test_any_nesting_of_tensors(mode, pack):
    net, seen = Net(), []

    def closure(batch):
        seen.append(type(batch))
        tensors = [v for v in batch if isinstance(v, torch.Tensor | dict)]
        y = tensors[1]["y"] if isinstance(tensors[1], dict) else tensors[1]
        return net({"x": tensors[0], "y": y})

    packed = run(mode, net, closure, pack(net_batch()), 3).values
    torch.testing.assert_close(packed, run(mode, net, net.loss, net_batch(), 3).values)
    assert set(seen) == {type(pack(net_batch()))}


class Unmappable(Net):
    """Branches on a value that depends on the trainables: vmap cannot follow."""

    def forward(self, batch):
        loss = super().forward(batch)
        return loss * 2 if float(loss.detach()) > 0 else loss


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_what_vmap_cannot_run_is_run_one_by_one_with_one_warning(mode):
    net, plain = Unmappable(), Net()
    optimizer = optimizer_of(net, mode, lr=0, queries=4)
    expected = optimizer_of(plain, mode, lr=0, queries=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss = optimizer.step(net.loss, net_batch(7))
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert "one by one" in str(caught[0].message)
    assert float(loss) == pytest.approx(
        2 * float([expected.step(plain.loss, net_batch(7)) for _ in range(3)][-1]), rel=1e-6
    )
    grads = torch.tensor(optimizer.last_record.projected_grads)
    torch.testing.assert_close(grads, 2 * torch.tensor(expected.last_record.projected_grads), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_a_mistake_in_the_closure_is_not_blamed_on_vmap(mode):
    """It comes out as it is, without a warning, and the model's next batch still shares a forward."""
    net = Net()
    optimizer = optimizer_of(net, mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="size"):  # the batch's features do not fit the weight
            optimizer.estimate(net.loss, {"x": torch.ones(6, 5).double(), "y": torch.ones(6).double()})
    assert caught == []
    net.calls = 0
    optimizer.step(net.loss, net_batch())
    assert net.calls <= 2  # one forward for all copies (split: one for each scale)


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_dropout_is_off_and_the_flags_come_back(mode):
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    net[0].eval()
    losses = [
        float(
            MeZO(net.parameters(), lr=0, module=net, query_mode=mode).estimate(
                lambda b: net(b["x"]).mean(), net_batch()
            )
        )
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert [m.training for m in net.modules()] == [True, False, True, True]


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_flags_come_back_after_an_exception(mode):
    net = Net().train()

    def closure(batch):
        assert not net.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer_of(net, mode).estimate(closure, net_batch())
    assert net.training


@pytest.mark.parametrize("mode", ["sequential", "batched", "split", "auto"])
def test_global_random_state_is_left_alone(mode):
    net = Net()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    optimizer_of(net, mode).step(net.loss, net_batch())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_a_module_is_needed(mode):
    with pytest.raises(ZOError, match="module="):
        MeZO(Net().parameters(), lr=0.1, query_mode=mode)


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_a_batch_is_needed(mode):
    net = Net()
    with pytest.raises(ZOError, match="batch"):
        optimizer_of(net, mode).step(lambda: net(net_batch()))


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_the_module_must_own_the_parameters(mode):
    net, other = Net(), Net()
    with pytest.raises(ZOError, match="1 of the optimizer's parameters"):
        MeZO(net.parameters(), lr=0.1, query_mode=mode, module=other).step(net.loss, net_batch())


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(6, 3).double(), "y": torch.ones(5).double()},
        {"x": "no tensor at all"},
        {"x": torch.ones(6, 3).double(), "y": torch.tensor(1.0).double()},
    ],
    ids=["axes disagree", "no tensor", "no axis"],
)
def test_split_refuses_a_batch_without_a_common_first_axis(batch):
    net = Net()
    with pytest.raises(ZOError, match=r"axis|axes"):
        optimizer_of(net, "split").estimate(net.loss, batch)


def test_split_takes_no_more_queries_than_examples():
    """One direction sees at least one example: a schedule that asks for more gets as many as there are."""
    net = Net()
    optimizer = optimizer_of(net, "split", queries=15)
    optimizer.step(net.loss, net_batch(4))
    assert optimizer.last_record.queries == 4


def test_unknown_mode_is_refused():
    with pytest.raises(ZOError, match="sequential"):
        optimizer_of(Net(), "quantum")


@pytest.mark.parametrize("loss", [torch.ones(2), None], ids=["vector", "nothing"])
def test_a_closure_that_returns_no_loss_is_refused(loss):
    with pytest.raises(ZOError, match="closure returned"):
        optimizer_of(Net()).estimate(lambda: loss)


def test_a_trainable_that_is_not_contiguous_is_refused():
    theta = nn.Parameter(torch.ones(3, 4).T)
    with pytest.raises(ZOError, match="contiguous"):
        MeZO([theta], lr=0.1).step(theta.sum)
    assert torch.equal(theta, torch.ones(4, 3))
