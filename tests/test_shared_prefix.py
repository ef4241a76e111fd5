"""Frozen first layers are computed once a step, and nothing else changes: losses and projected gradients to the bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from optimizer_table import NAMES, ROWS
from torch import nn

from zo_opt import MeZO, ZOError, trainable_parameters
from zo_opt.optim import OPTIMIZERS
from zo_opt.optim.line_search import LineSearch
from zo_opt.prompts.shared_prefix import SharedPrefix
from zo_opt.schedules import constant_queries

EPS = 1e-2


def matrix(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """Counts its computations; ``step``: x -> what follows from it."""

    def __init__(self, number, step=None):
        super().__init__()
        self.weight = nn.Parameter(matrix(number, 4, 4))
        self.step, self.calls = step or (lambda layer, x: (x @ layer.weight).tanh()), 0

    def forward(self, x, *args, **kwargs):
        self.calls += 1
        return self.step(self, x, *args, **kwargs)


def one_after_another(layers, x):
    for layer in layers:
        x = layer(x)
    return x


class Stack(nn.Module):
    """An embedding, layers and a head; ``through`` says how states go through the layers."""

    def __init__(self, layers=None, through=one_after_another, trained=(3,), embedding=False, head=False):
        super().__init__()
        self.embedding = nn.Parameter(matrix(100, 5, 4), requires_grad=embedding)
        self.layers = nn.ModuleList(layers if layers is not None else [Layer(i) for i in range(4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Parameter(matrix(101, 4), requires_grad=head)
        self.through = through
        self.norm.requires_grad_(False)
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(number in trained)

    def forward(self, batch):
        x = self.through(self.layers, batch["x"] @ self.embedding)
        return ((self.norm(x) @ self.head) - batch["y"]).square().mean()

    @property
    def calls(self):
        return [layer.calls for layer in self.layers]


def batch_of(seed=0, examples=6):
    return {"x": matrix(seed, examples, 5), "y": matrix(seed + 1, examples)}


def optimizer_of(model, share, name="mezo", queries=3, **options):
    scale = {} if name == "forward-gradient" else {"zo_eps": EPS}
    options = {"lr": 0.05, "query_schedule": constant_queries(queries)} | scale | options
    return OPTIMIZERS[name](trainable_parameters(model), module=model, share_prefix=share, **options)


def steps(model, share, batches, closure=None, **options):
    """Everything that a run gives: losses, projected gradients, weights."""
    optimizer, found = optimizer_of(model, share, **options), []
    for batch in batches:
        loss = optimizer.step(closure(model) if closure else model, batch)
        found.append((float(loss), optimizer.last_record.projected_grads, optimizer.history.forwards))
    return found, [p.detach().clone() for p in trainable_parameters(model)]


def assert_unchanged(make, batches=None, **options):
    """A shared run is the run, to the bit, and it learns from more than zeros."""
    batches = batches or [batch_of(), batch_of()]
    (plain, weights), (shared, shared_weights) = (steps(make(), share, batches, **options) for share in (False, True))
    assert shared == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, shared_weights, strict=True))
    assert all(any(g != 0 for g in grads) for _, grads, _ in plain)


# --- what is saved ---


@pytest.mark.parametrize(("mode", "evaluations"), [("sequential", 6), ("batched", 1), ("split", 2)])
def test_frozen_layers_are_computed_once_a_step(mode, evaluations):
    model = Stack(trained=(2,))
    optimizer = optimizer_of(model, True, query_mode=mode)
    optimizer.step(model, batch_of())
    assert model.calls == [1, 1, evaluations, evaluations]
    optimizer.step(model, batch_of(7))
    assert model.calls == [2, 2, 2 * evaluations, 2 * evaluations]


@pytest.mark.parametrize(
    ("options", "shared"),
    [({"trained": (0,)}, 0), ({"trained": (), "head": True}, 4), ({"trained": (1, 3)}, 1), ({"trained": (3,), "embedding": True}, 0)],
    ids=["the first layer", "a head", "the lowest of two", "the embedding"],
)  # fmt: skip
def test_what_lies_below_the_first_trainable_is_shared(options, shared):
    model = Stack(**options)
    optimizer_of(model, True).step(model, batch_of())
    assert model.calls == [1] * shared + [6] * (4 - shared)
    assert_unchanged(lambda: Stack(**options))


def test_a_trained_norm_shares_all_layers():
    def make():
        model = Stack(trained=())
        model.norm.requires_grad_(True)
        return model

    model = make()
    optimizer_of(model, True).step(model, batch_of())
    assert model.calls == [1, 1, 1, 1]
    assert_unchanged(make)


def test_a_line_search_shares_among_its_own_forwards():
    model = Stack()
    optimizer_of(model, True, line_search=LineSearch((0.0, 1.0, 0.5))).step(model, batch_of())
    assert model.calls == [2, 2, 2, 9]
    assert_unchanged(Stack, line_search=LineSearch((0.0, 1.0, 0.5)))


def test_accumulated_estimates_share_each_its_own():
    runs = []
    for share in (False, True):
        model = Stack()
        optimizer = optimizer_of(model, share, line_search=LineSearch((1.0, 0.5)))
        for _ in range(2):
            for seed in (1, 2, 1):
                optimizer.estimate(model, batch_of(seed))
            loss = float(optimizer.step())
        runs.append((loss, optimizer.last_record.projected_grads, model.layers[3].weight.tolist()))
        assert model.calls == ([48, 48, 48, 48] if not share else [12, 12, 12, 48])
    assert runs[0] == runs[1]


# --- the same bits ---


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer(name):
    options = {k: v for k, v in ROWS[name].options.items() if k != "query_schedule"}
    if name == "grzo":
        options["query_mode"] = "split"
    assert_unchanged(Stack, [batch_of(), batch_of(), batch_of(3), batch_of()], name=name, **options)


MODES = ["sequential", "batched", "split"]


@pytest.mark.parametrize("mode", MODES)
def test_training_mode_and_dropout(mode):
    """Dropout is off in both evaluations; the flags come back."""

    def dropping(layer, x):
        return torch.nn.functional.dropout(x @ layer.weight, 0.5, layer.training).tanh()

    def make():
        return Stack([Layer(i, dropping) for i in range(4)]).train()

    model = make()
    optimizer_of(model, True, query_mode=mode).step(model, batch_of())
    assert all(m.training for m in model.modules())
    assert model.calls[:3] == [1, 1, 1]
    assert_unchanged(make, query_mode=mode)


def in_place(layer, x):
    return x.add_((x @ layer.weight).tanh())


@pytest.mark.parametrize(
    ("where", "mode"), [(0, "sequential"), (1, "sequential"), (2, "split"), (3, "sequential"), (3, "split")]
)
def test_a_layer_that_writes_into_its_input(where, mode):
    assert_unchanged(lambda: Stack([Layer(i, in_place if i == where else None) for i in range(4)]), query_mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_return_tuples_and_mappings(mode):
    def through(layers, x):
        bias = None
        for layer in layers:
            out = layer(x, bias=bias)
            x, bias = out[0]["states"], out[1]
        return x + bias

    def step(layer, x, bias):
        bias = x.mean(-1, keepdim=True) if bias is None else bias
        return {"states": (x @ layer.weight + bias).tanh()}, bias, None, "name"

    def make():
        return Stack([Layer(i, step) for i in range(4)], through)

    assert_unchanged(make, query_mode=mode)
    model = make()
    optimizer_of(model, True, query_mode=mode).step(model, batch_of())
    assert model.calls[:3] == [1, 1, 1]


def test_an_input_that_differs_between_evaluations():
    """A new tensor each time, the same values again, then others."""

    def closure(model):
        evaluations = iter(range(100))
        return lambda batch: model({**batch, "x": batch["x"] + next(evaluations) // 2})

    assert_unchanged(Stack, closure=closure)
    model = Stack()
    optimizer_of(model, True).step(closure(model), batch_of())
    assert model.calls == [3, 3, 3, 6]


def test_two_forwards_an_evaluation():
    def closure(model):
        return lambda batch: model(batch) - model({**batch, "x": -batch["x"]})

    assert_unchanged(Stack, closure=closure)


def test_nan_and_infinity_in_the_input():
    """-inf in a mask is itself; NaN never is, and the step is dropped as without sharing."""
    model = Stack(through=lambda layers, x: one_after_another(layers, x.clamp(-1, 1)))
    batch = batch_of()
    batch["x"][0] = -torch.inf
    with torch.no_grad():
        for share in (False, True):
            assert optimizer_of(model, share).estimate(model, batch).isnan()


def test_experts_are_no_stack():
    """A module list under another name, of which a forward takes some: nothing of it is shared."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([Layer(i) for i in range(4)])
            self.head = nn.Parameter(matrix(101, 4))
            for number, expert in enumerate(self.experts):
                expert.requires_grad_(number in (0, 3))

        def forward(self, batch):
            x = batch["x"][:, :4]
            return (sum(e(x) for e in self.experts) @ self.head - batch["y"]).square().mean()

    model = Experts()
    optimizer_of(model, True).step(model, batch_of())
    assert [e.calls for e in model.experts] == [6] * 4
    assert_unchanged(Experts)


# --- the context ---


def test_forwards_come_back_after_an_exception():
    model = Stack()

    def closure(batch):
        model(batch)
        raise KeyboardInterrupt

    optimizer = optimizer_of(model, True)
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(closure, batch_of())
    assert all("forward" not in vars(layer) for layer in model.modules())
    optimizer.step(model, batch_of())
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_an_exception_within_the_prefix_leaves_nothing_half_remembered():
    def through(layers, x):
        x = layers[0](x)
        if fail:
            fail.pop()
            raise FloatingPointError
        return one_after_another(layers[1:], x)

    fail, model = [True], Stack(through=through)
    prefix, batch = SharedPrefix(model, trainable_parameters(model)), batch_of()
    with torch.no_grad(), prefix():
        with pytest.raises(FloatingPointError):
            model(batch)
        found = [float(model(batch)) for _ in range(2)]
        assert model.calls[:3] == [2, 1, 1]
    with torch.no_grad():
        assert found == [float(model(batch))] * 2


def test_a_forward_of_ones_own_comes_back():
    model = Stack()
    own = model.layers[0].forward
    model.layers[0].forward = own
    optimizer_of(model, True).step(model, batch_of())
    assert vars(model.layers[0])["forward"] is own


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_let_go_after_the_step(mode):
    kept = []

    def watched(layer, x):
        out = (x @ layer.weight).tanh()
        if not torch._C._functorch.is_batchedtensor(out):
            kept.append(weakref.ref(out))
        return out

    model = Stack([Layer(i, watched) for i in range(4)], trained=(3,))
    optimizer = optimizer_of(model, True, query_mode=mode)
    optimizer.step(model, batch_of())
    gc.collect()
    assert [r for r in kept if r() is not None] == []


def test_a_module_is_needed():
    with pytest.raises(ZOError, match="module=model"):
        MeZO(Stack().parameters(), lr=0.1, share_prefix=True)
