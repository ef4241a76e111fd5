"""What a step cannot be taken with is one sentence, and nothing has moved: not a parameter, a state, or a random generator."""

from __future__ import annotations

import copy
import math
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optimizer_problem import BATCH, Model, make
from optimizer_table import NAMES, build
from torch import nn

from zo_opt import MeZO, ZOError
from zo_opt.optim import Backpropagation


def everything(optimizer):
    """Bits of parameters and state, and of all global generators."""
    tensors = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    state = [(name, t.clone()) for s in optimizer.state.values() for name, t in s.items()]
    plain = {k: v for k, v in optimizer.state_dict().items() if k != "state"}
    return tensors, state, repr(plain), torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return repr(one) == repr(other)


def refused(optimizer, call, sentence):
    before = everything(optimizer)
    with pytest.raises(ZOError, match=sentence) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert alike(everything(optimizer), before)


def two():
    return nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.full((4,), 2.0))


def total(*parameters):
    return lambda: sum(p.double().square().sum() for p in parameters)


# --- parameters ---


def view_of(p):
    return nn.Parameter(p.data.view(-1))


def made_for_inference():
    with torch.inference_mode():
        return nn.Parameter(torch.ones(2))


ODD = {
    "complex": (lambda p: nn.Parameter(torch.ones(2, dtype=torch.complex64)), "is complex .torch.complex64.*view_as_real"),
    "float8": (lambda p: nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn; train parameters in"),
    "without values": (lambda p: nn.Parameter(torch.ones(2, device="meta")), "has no values .device meta."),
    "a view": (view_of, "two trainables share memory"),
    "a part": (lambda p: nn.Parameter(p.data[1:]), "two trainables share memory"),
    "tied by .data": (lambda p: nn.Parameter(p.data), "two trainables share memory"),
    "lazy": (lambda p: nn.LazyLinear(2).weight, "has no shape yet"),
    "sparse": (lambda p: nn.Parameter(torch.eye(2).to_sparse()), "is torch.sparse_coo; train a dense one"),
    "made for inference": (lambda p: made_for_inference(), "was made under torch.inference_mode"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_parameters_that_cannot_be_moved(odd):
    other, sentence = ODD[odd]
    p, _ = two()
    optimizer = MeZO([p, other(p)], lr=0.1)
    address = p.data_ptr()
    with pytest.raises(ZOError, match=sentence):
        optimizer.step(total(p))
    assert torch.equal(p, torch.ones(3, 2)) and p.data_ptr() == address


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize(
    "change",
    [
        lambda p, q: q.requires_grad_(False),
        lambda p, q: [p.requires_grad_(False), q.requires_grad_(False)],
        lambda p, q: setattr(q, "data", torch.full((2, 2), 2.0)),
        lambda p, q: setattr(q, "data", q.data.view(2, 2)),
        lambda p, q: setattr(q, "data", q.data.double()),
    ],
    ids=["frozen", "all frozen", "another shape", "a view of it", "another dtype"],
)
def test_a_change_between_estimate_and_step(change, rule):
    p, q = two()
    optimizer = MeZO([p, q], lr=0.1, update_rule=rule)
    optimizer.step(total(p, q))
    before = everything(optimizer)
    optimizer.estimate(total(p, q))
    data, trained = [p.data, q.data], [p.requires_grad, q.requires_grad]
    change(p, q)
    with pytest.raises(ZOError, match=r"no longer those|no parameter requires grad|has shape|has no values"):
        optimizer.step()
    for x, old, requires in zip((p, q), data, trained, strict=True):
        x.data = old
        x.requires_grad_(requires)
    assert alike(everything(optimizer), before)
    optimizer.step(total(p, q))  # and it goes on


def test_one_thawed_between_estimate_and_step():
    p, q = two()
    q.requires_grad_(False)
    optimizer = MeZO([p, q], lr=0.1)
    optimizer.estimate(total(p))
    q.requires_grad_(True)
    with pytest.raises(ZOError, match="no longer those"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 2)) and optimizer.step_count == 0
    optimizer.estimate(total(p))
    q.requires_grad_(False)
    with pytest.raises(ZOError, match="no longer those"):
        optimizer.estimate(total(p))  # of another micro-batch


def test_a_shape_that_changes_between_steps():
    p, q = two()
    optimizer = MeZO([p, q], lr=0.1, update_rule="adam")
    optimizer.step(total(p, q))
    old = q.data
    q.data = old.view(2, 2)
    with pytest.raises(ZOError, match=r"shape \(4,\) has shape \(2, 2\) after 1 steps"):
        optimizer.step(total(p, q))
    assert torch.equal(q.data.view(4), old)


@pytest.mark.parametrize(
    "params", [[], None, nn.Linear(2, 2), torch.ones(2), {"weight": 1}, [[nn.Parameter(torch.ones(2))]], [{"lr": 1.0}]]
)
def test_what_is_no_list_of_parameters(params):
    with pytest.raises(ZOError, match=r"these params are not possible .*give trainable_parameters"):
        MeZO(params, lr=0.1)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, None, "0.1", torch.ones(2)], ids=str)
def test_a_group_that_cannot_be_moved(name, value):
    """As it was given, or as a scheduler left it."""
    p, q = two()
    optimizer = MeZO([{"params": [p], name: value}, {"params": [q]}], lr=0.1)
    refused(optimizer, lambda: optimizer.step(total(p, q)), f"{name}=.* is not possible; give a number of at least 0")
    optimizer = MeZO([p, q], lr=0.1)
    optimizer.step(total(p, q))
    optimizer.param_groups[0][name] = value
    refused(optimizer, lambda: optimizer.step(total(p, q)), f"{name}=.* is not possible; give a number of at least 0")


@pytest.mark.parametrize("name", ["zo_eps", "learning_rate", "betas"])
def test_an_option_of_a_group_that_no_step_looks_at(name):
    with pytest.raises(ZOError, match=f"a parameter group has '{name}', which no step looks at"):
        MeZO([{"params": two(), name: 0.5}], lr=0.1)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_steps_within_inference_mode_are_those_outside(rule):
    weights = []
    for within in (True, False):
        p, q = two()
        optimizer = MeZO([p, q], lr=0.1, update_rule=rule)
        for step in range(3):
            with torch.inference_mode(within and step < 2):
                optimizer.step(total(p, q))
        total(p, q)().backward()  # the weights can still be trained otherwise
        weights.append([p.detach(), q.detach(), p.grad])
    assert alike(*weights)


# --- states of others ---


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"name": "zo-momentum"}, "method='zo-momentum'.*'mezo'"),
        ({"name": "hizoo"}, "method='hizoo'"),
        ({"name": "adamw"}, "method='adamw'"),
        ({"directions": "rademacher"}, "directions=.*rademacher.*gaussian"),
        ({"query_schedule": {"name": "constant", "queries": 3}}, "query_schedule=.*3"),
        ({"update_rule": "adam"}, "update_rule=.*adam.*sgd"),
        ({"step_control": "clip"}, "step_control="),
        ({"line_search": (0.0, 1.0)}, "line_search="),
        ({"estimator": "one-sided"}, "estimator="),
        ({"shapes": [(3, 2), (5,)]}, r"momentum of shape \(5,\) for a parameter of shape \(4,\)"),
        ({"shapes": [(3, 2)]}, "other parameter groups"),
    ],
    ids=str,
)
def test_a_state_of_another(other, sentence):
    from zo_opt.optim import OPTIMIZERS

    options = dict(other)
    shapes = options.pop("shapes", [(3, 2), (4,)])
    rule = {"update_rule": "momentum"} if "shapes" in other else {}
    theirs = [nn.Parameter(torch.ones(s)) for s in shapes]
    giver = OPTIMIZERS[options.pop("name", "mezo")](theirs, lr=0.1, **options, **rule)
    giver.step(lambda *_: sum(p.square().sum() for p in theirs))
    p, q = two()
    optimizer = MeZO([p, q], lr=0.2, **rule)
    optimizer.step(total(p, q))
    refused(optimizer, lambda: optimizer.load_state_dict(giver.state_dict()), sentence)
    optimizer.step(total(p, q))


def test_a_damaged_state_changes_nothing():
    p, q = two()
    optimizer = MeZO([p, q], lr=0.2, update_rule="adam")
    optimizer.step(total(p, q))
    for damage in (
        {"history": {"queries": 1, "more": 2}},
        {"updates": "many"},
        {"step_control": [{}, {}]},
        {"step": None},
    ):
        state = optimizer.state_dict()
        state["zo"] = state["zo"] | damage
        refused(optimizer, lambda state=state: optimizer.load_state_dict(state), "does not fit the optimizer")


def test_a_longer_run_goes_on_with_its_state():
    def of(steps):
        return MeZO(two(), lr=0.1, query_schedule={"name": "linear", "end": 4, "steps": steps})

    of(20).load_state_dict(of(10).state_dict())


# --- options ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1.5}, "seed=1.5 is not possible; give a whole number"),
        ({"seed": None}, "seed=None"),
        ({"seed": "7"}, "seed='7'"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**64}, "at most 64 bits"),
        ({"lr": None}, "lr=None is not possible; give a number"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"zo_eps": None}, "zo_eps=None"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch=2.5"),
        ({"max_failed_steps": None}, "max_failed_steps=None"),
    ],
    ids=str,
)
def test_options_of_other_types(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        MeZO(two(), **{"lr": 0.1} | options)


def test_a_numpy_seed_is_the_number():
    found = []
    for seed in (3, np.int64(3), np.uint8(3)):
        p, q = two()
        MeZO([p, q], lr=0.1, seed=seed).step(total(p, q))
        found.append(p.detach())
    assert alike(found[0], found[1]) and alike(found[0], found[2])


# --- what closures return ---

RETURNED = {
    "a tuple": (lambda x: (x, 1), "a tuple of 2; return one of them, the loss"),
    "a list": (lambda x: [x], "a list of 1"),
    "a dictionary": (lambda x: {"loss": x, "logits": x}, "a dict with the keys loss, logits; return the loss in it"),
    "text": (lambda x: "3.5", "the text '3.5'; return the loss"),
    "nothing": (lambda x: None, "None; return the loss"),
    "an output without labels": (lambda x: SimpleNamespace(loss=None), "a SimpleNamespace whose loss is None; give the model labels"),
    "a complex tensor": (lambda x: x + 1j, "a complex tensor .torch.complex"),
    "a complex number": (lambda x: 1 + 2j, r"the complex number \(1\+2j\)"),
    "a numpy complex number": (lambda x: np.complex64(1j), "the complex number"),
    "several": (lambda x: x.expand(3), r"a tensor of shape \(3,\)"),
    "a numpy array": (lambda x: np.ones(3), r"an array of shape \(3,\)"),
    "an object": (lambda x: object(), "a object; return the loss"),
    "a class": (lambda x: float, "a type; return the loss"),
    "a tensor without values": (lambda x: torch.empty((), device="meta"), "a meta tensor; return the loss as a plain one"),
}  # fmt: skip
LOSSES = {
    "a tensor": lambda x: x,
    "one entry": lambda x: x.view(1),
    "one entry of two axes": lambda x: x.view(1, 1),
    "a float": float,
    "a numpy number": np.float64,
    "a numpy array": lambda x: np.array([[float(x)]]),
    "a model's output": lambda x: SimpleNamespace(loss=x, logits=x),
}


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_closures_that_return_something_else(returned, mode):
    value, sentence = RETURNED[returned]
    model = Model()
    optimizer = make(model, query_mode=mode)
    refused(optimizer, lambda: optimizer.step(lambda b: value(model(b)), BATCH), f"the closure returned {sentence}")


@pytest.mark.parametrize("returned", LOSSES)
def test_closures_that_return_a_loss(returned):
    def after(value):
        model = Model()
        optimizer = make(model)
        for _ in range(3):
            optimizer.step(lambda b: value(model(b)), BATCH)
        return [p.detach().clone() for p in model.parameters()]

    assert alike(after(LOSSES[returned]), after(float))


def test_closures_that_do_the_optimizers_work():
    model = Model()
    optimizer = make(model)

    def as_torch_has_it():
        optimizer.zero_grad()
        loss = model(BATCH)
        loss.backward()
        return loss

    refused(optimizer, lambda: optimizer.step(as_torch_has_it), "the closure asks for gradients")
    for within in (optimizer.step, optimizer.estimate):
        refused(
            optimizer, lambda within=within: optimizer.step(lambda: within(model, BATCH)), "calls its own optimizer"
        )
    optimizer.step(model, BATCH)


def test_a_batch_without_a_closure_or_examples():
    model = Model()
    optimizer = make(model, query_mode="split")
    refused(optimizer, lambda: optimizer.step(None, BATCH), "a batch and no closure|without an estimate")
    refused(optimizer, lambda: optimizer.step(model, {k: v[:0] for k, v in BATCH.items()}), "the batch has no examples")


@pytest.mark.parametrize("queries", [1.5, "3", None, math.nan, True], ids=str)
def test_a_schedule_that_gives_no_whole_number(queries):
    model = Model()
    optimizer = make(model, query_schedule=lambda step, epoch, history: queries)
    refused(
        optimizer, lambda: optimizer.step(model, BATCH), "the query schedule returned .* whole number of at least 1"
    )


@pytest.mark.parametrize("kind", ["mezo", "adamw"])
def test_a_loss_in_place_of_a_closure(kind):
    model = Model()
    optimizer = make(model) if kind == "mezo" else Backpropagation(model.parameters(), lr=0.1)
    for given in (model(BATCH), 1.5):
        refused(optimizer, lambda given=given: optimizer.step(given), "given in place of a closure.*step.lambda: model")


def test_backpropagation_takes_an_outputs_loss():
    model = Model()
    optimizer = Backpropagation(model.parameters(), lr=0.1)
    refused(optimizer, lambda: optimizer.step(lambda b: (model(b), 1), BATCH), "a tuple of 2")
    refused(optimizer, lambda: optimizer.step(lambda b: model(b).detach(), BATCH), "a loss without a gradient")
    refused(optimizer, lambda: optimizer.step(lambda b: 0.5, BATCH), "a number; return one loss")
    optimizer.step(lambda b: SimpleNamespace(loss=model(b)), BATCH)


# --- losses that are finite and too large ---


@pytest.mark.parametrize("rule", ["sgd", "adam", "amsgrad", "momentum", "sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e16, 1e30, 1e39, 1e200, 1e308])
def test_a_step_is_whole_or_not_at_all(scale, dtype, rule):
    """Whatever the size of finite losses, weights and state stay finite, and a step that is not taken is counted."""
    p, q = (nn.Parameter(x.detach().to(dtype)) for x in two())
    optimizer = MeZO([p, q], lr=1e-3, update_rule=rule, max_failed_steps=99)
    for _ in range(4):
        before = [p.detach().clone(), q.detach().clone()]
        failed = optimizer.failed_steps
        optimizer.step(
            lambda: scale * min(1.0, float(p.detach().double().square().sum() + q.detach().double().sum()) / 20)
        )
        tensors = [p, q, *(t for s in optimizer.state.values() for t in s.values())]
        assert all(bool(t.isfinite().all()) for t in tensors)
        if optimizer.failed_steps > failed:
            assert alike([p.detach(), q.detach()], before)


def test_a_large_loss_with_a_small_difference_is_measured():
    p, q = two()
    optimizer = MeZO([p, q], lr=1e-3)
    optimizer.step(lambda: 1e39 + 1e26 * float(p.detach().double().sum()))
    assert optimizer.dropped_queries == 1  # 1e26 per unit is beyond what a step can be made of
    optimizer.step(lambda: 1e39)
    assert optimizer.failed_steps == 0 and optimizer.last_record.loss == 1e39


# --- closures that draw random numbers ---


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x).square().mean()


X = torch.linspace(-1, 1, 24).view(6, 4)


def own_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda net: net(X + 0.1 * torch.rand(X.shape, generator=generator))


RANDOM = {
    "dropout": (Net(nn.Dropout(0.5)), lambda net: net(X)),
    "little dropout": (Net(nn.Dropout(0.001)), lambda net: net(X.repeat(400, 1))),
    "functional dropout": (Net(), lambda net: net(nn.functional.dropout(X, 0.3))),
    "noise": (Net(), lambda net: net(X + 1e-6 * torch.randn(X.shape))),
    "numpy's generator": (Net(), lambda net: net(X * np.random.rand())),
    "Python's generator": (Net(), lambda net: net(X[random.randrange(6) :])),
    "a generator of its own": (Net(), own_generator()),
    "a float": (Net(nn.Dropout(0.5)), lambda net: float(net(X))),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_a_closure_that_is_random_is_refused(name):
    net, closure = RANDOM[name]
    net = copy.deepcopy(net).train()
    random.seed(1)  # of few possible draws two may be alike
    optimizer = MeZO(net.parameters(), lr=0.1)
    refused(optimizer, lambda: optimizer.step(lambda: closure(net)), "two losses at one point.*dropout.*module=model")
    assert net.training


def test_a_random_closure_is_refused_beside_a_module_too():
    net = Net()
    optimizer = MeZO(net.parameters(), lr=0.1, module=net)
    refused(optimizer, lambda: optimizer.step(lambda: net(nn.functional.dropout(X, 0.3))), "two losses at one point")


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8), nn.InstanceNorm1d(6, track_running_stats=True), nn.SyncBatchNorm(8)], ids=str
)
def test_running_statistics_do_not_move(layer):
    def buffers():
        return [b.clone() for b in net.buffers()]

    net = Net(copy.deepcopy(layer)).train()
    optimizer, before = MeZO(net.parameters(), lr=0.1), buffers()
    refused(optimizer, lambda: optimizer.step(lambda: net(X)), f"{type(layer).__name__} in training mode.*module=model")
    assert alike(buffers(), before)
    optimizer = MeZO(net.parameters(), lr=0.1, module=net)
    if not isinstance(layer, nn.SyncBatchNorm):  # for GPUs alone
        for _ in range(3):
            optimizer.step(lambda: net(X))
        assert alike(buffers(), before) and net.training


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [(nn.Dropout(0.5), "two losses at one point"), (nn.BatchNorm1d(8), "BatchNorm1d in training mode")],
    ids=str,
)
@pytest.mark.parametrize("resumed", [False, True])
def test_training_mode_that_comes_back_later(layer, sentence, resumed):
    """As after an evaluation that ends in model.train(), or in a new process that forgot model.eval()."""
    net = Net(copy.deepcopy(layer)).eval()
    optimizer = MeZO(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.step(lambda: net(X))
    if resumed:
        state, optimizer = optimizer.state_dict(), MeZO(net.parameters(), lr=0.1)
        optimizer.load_state_dict(state)
    forwards = optimizer.history.forwards
    net.train()
    refused(optimizer, lambda: optimizer.step(lambda: net(X)), sentence)
    net.eval()
    optimizer.step(lambda: net(X))
    assert optimizer.history.forwards == forwards + 2  # the same count in one process and in two


def test_what_module_or_eval_makes_of_dropout():
    """The same steps; and what the look at the first closure cost."""
    weights, forwards = [], []
    for given in (True, False):
        net = copy.deepcopy(RANDOM["dropout"][0]).train(given)
        optimizer = MeZO(net.parameters(), lr=0.1, **({"module": net} if given else {}))
        calls = 0

        def closure(net=net):
            nonlocal calls
            calls += 1
            return net(X)

        for step in range(3):
            optimizer.step(closure)
            assert optimizer.last_record.forwards == optimizer.forwards(step, 1)
        weights.append([p.detach().clone() for p in net.parameters()])
        forwards.append(calls)
        assert calls == optimizer.history.forwards
    assert alike(*weights) and forwards == [6, 7]


def test_a_seeded_closure_may_draw():
    net = Net()

    def closure():
        torch.manual_seed(5)
        return net(X + torch.randn(X.shape))

    optimizer = MeZO(net.parameters(), lr=0.1)
    optimizer.step(closure)
    assert optimizer.history.forwards == 3


# --- copies ---


@pytest.mark.parametrize("rule", ["as it is", "scheduled"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", [*NAMES, "adamw"])
def test_a_copy_goes_on_as_the_original(name, way, rule):
    model = Model()
    optimizer = Backpropagation(model.parameters(), lr=0.1) if name == "adamw" else build(name, model)
    if rule == "scheduled":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(4):
        optimizer.step(model, BATCH)
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert alike([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()])
    for _ in range(4):
        optimizer.step(model, BATCH)
        copied.step(other, BATCH)
    assert alike(everything(copied), everything(optimizer))
    assert all(a is b for a, b in zip(other.parameters(), copied.param_groups[0]["params"], strict=True))


def test_no_copy_between_estimate_and_step():
    p, q = two()
    optimizer = MeZO([p, q], lr=0.1)
    optimizer.estimate(total(p, q))
    with pytest.raises(ZOError, match=r"between estimate\(\) and step"):
        copy.deepcopy(optimizer)
