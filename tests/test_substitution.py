"""Losses of large trainables, which are never moved, against those of the same trainables moved in place.

Small and large take different ways to the same points, so that their losses must agree to the bit: chunks of a product and
attention's fused kernel (not used while weights are substituted) may differ in its rounding, and say so.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import build, padded_batch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from zo_opt import ZOError
from zo_opt.directions import DIRECTIONS, StepDirections
from zo_opt.queries import perturbation, trainables
from zo_opt.queries.perturbation import Perturbed, Point
from zo_opt.queries.substitution import Substitution
from zo_opt.queries.trainables import Trainables

SCALES = (0.05, -0.05)
POINTS = [Point(((q, s),)) for q in range(2) for s in SCALES]


def bits(parameters):
    return [p.detach().clone().view(torch.uint8) if p.ndim else p.detach().clone() for p in parameters]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def losses(parameters, call, *, small, directions="gaussian", points=POINTS, found=None):
    """Losses at every point; the weights must come back bit for bit. ``found`` receives the trainables."""
    parameters = list(parameters)
    before = bits(parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainables, "SMALL", (1 << 23) * small)
        ours = Trainables(parameters)
    perturbed = Perturbed(ours, StepDirections(DIRECTIONS.make(directions), 3, 1, parameters))
    values = list(perturbed.losses(call, points))
    assert same(before, bits(parameters))
    if found is not None:
        found.append(ours)
    return values


def agree(parameters, call, *, rtol=0.0, opaque=0, directions="gaussian", points=POINTS):
    """Large trainables give the losses of small ones; that many of them had to be moved in place."""
    parameters, found = list(parameters), []
    large = losses(parameters, call, small=False, directions=directions, points=points, found=found)
    moved = losses(parameters, call, small=True, directions=directions, points=points)
    assert len(set(moved)) > 1, "the loss does not depend on the trainables"
    assert large == pytest.approx(moved, rel=rtol, abs=0) if rtol else large == moved
    assert len(found[0].opaque or ()) == opaque
    return large


@pytest.fixture
def chunks(monkeypatch):
    """Everything is cut: layers into a few rows, perturbations into a few entries."""
    monkeypatch.setattr(perturbation, "Substitution", functools.partial(Substitution, chunk=40))
    monkeypatch.setattr(perturbation, "CHUNK", 7)
    monkeypatch.setattr(trainables, "CHUNK", 11)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


# --- layers ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 8, padding_idx=0)
        self.head = nn.Linear(8, 30)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids)).square().mean()


@dataclass
class Case:
    """How a module is made, what it eats, and how far rounding may differ."""

    make: object
    inputs: object
    rtol: float = 0.0
    chunked: float = 1e-6  # the same where layers are cut


def floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(*shape):
    return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(1))


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(12, 8)).eval()


X = (floats(3, 5, 12),)
CASES = {
    "linear": Case(lambda: nn.Linear(12, 20), X),
    "linear without bias": Case(lambda: nn.Linear(12, 20, bias=False), X),
    "linear on a vector": Case(lambda: nn.Linear(12, 20), (floats(12),)),
    "mlp": Case(lambda: nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 5)), X),
    "bilinear": Case(lambda: nn.Bilinear(12, 4, 6), (floats(3, 12), floats(3, 4))),
    "embedding": Case(lambda: nn.Embedding(30, 8), (ids(4, 6),)),
    "embedding with padding": Case(lambda: nn.Embedding(30, 8, padding_idx=3), (ids(4, 6),)),
    "embedding with a largest norm": Case(lambda: nn.Embedding(30, 8, max_norm=0.5), (ids(4, 6),)),
    "embedding of nothing": Case(lambda: nn.Sequential(nn.Embedding(30, 8), nn.Flatten(0), nn.ConstantPad1d((1, 0), 1.0)), (ids(0),)),
    "embedding bag": Case(lambda: nn.EmbeddingBag(30, 8), (ids(4, 6),)),
    "tied head": Case(Tied, (ids(4, 6),)),
    "layer norm": Case(lambda: nn.LayerNorm(12), X),
    "rms norm": Case(lambda: nn.RMSNorm(12), X),
    "group norm": Case(lambda: nn.GroupNorm(5, 5), X),
    "batch norm": Case(lambda: nn.BatchNorm1d(5).eval(), X),
    "conv1d": Case(lambda: nn.Conv1d(5, 7, 3), X),
    "conv2d": Case(lambda: nn.Conv2d(3, 6, 3, padding=1), (floats(2, 3, 7, 7),)),
    "transposed conv": Case(lambda: nn.ConvTranspose1d(5, 7, 3), X),
    "prelu": Case(nn.PReLU, X),
    "weight norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 8)), X),
    "spectral norm": Case(spectral, X),
    "lstm": Case(lambda: nn.LSTM(12, 8, num_layers=2, bidirectional=True), X),
    # torch itself rounds a GRU otherwise where its weights require no gradient, as substituted ones do not.
    "gru": Case(lambda: nn.GRU(12, 8, batch_first=True), X, 1e-6),
    "rnn": Case(lambda: nn.RNN(12, 8), X),
    "lstm cell": Case(lambda: nn.LSTMCell(12, 8), (floats(4, 12),)),
    "attention": Case(lambda: nn.MultiheadAttention(12, 3, batch_first=True), (*X, *X, *X), 1e-5, 1e-5),
    "attention in training": Case(lambda: nn.MultiheadAttention(12, 3).train(), (*X, *X, *X), 1e-5, 1e-5),
    "attention of other sizes": Case(lambda: nn.MultiheadAttention(12, 3, kdim=12, vdim=12).eval(), (*X, *X, *X), 1e-5, 1e-5),
    "encoder layer": Case(lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval(), X, 1e-5, 1e-5),
    "encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2).eval(), X, 1e-5, 1e-5
    ),
}  # fmt: skip


def loss_of(case, module):
    def loss():
        out = module(*case.inputs)
        while isinstance(out, tuple):
            out = out[0]
        return (out.double() * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).square().sum() + out.double().sum()

    return loss


def module_of(case):
    module = seeded(case.make)
    for p in module.parameters():  # norms start as ones and zeros
        p.data += 0.1 * floats(*p.shape)
    return module.eval() if not module.training else module


DEPENDENT = sorted(set(CASES) - {"embedding of nothing"})


@pytest.mark.parametrize("name", DEPENDENT)
def test_layers(name):
    case = CASES[name]
    module = module_of(case)
    if name != "attention in training":
        module.eval()
    agree(module.parameters(), loss_of(case, module), rtol=case.rtol)


@pytest.mark.parametrize("name", DEPENDENT)
def test_layers_in_chunks(name, chunks):
    case = CASES[name]
    module = module_of(case).eval()
    agree(module.parameters(), loss_of(case, module), rtol=case.chunked)


def test_an_embedding_of_nothing(chunks):
    module = module_of(CASES["embedding of nothing"])
    assert set(losses(module.parameters(), loss_of(CASES["embedding of nothing"], module), small=False)) == {1.25}


@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [False, True])
def test_directions_and_dtypes(directions, dtype, cut, request):
    if cut:
        request.getfixturevalue("chunks")
    net = seeded(lambda: nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 30))).to(dtype)
    rtol = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype] if cut else 0.0
    agree(net.parameters(), lambda: net(ids(4, 6)).double().square().mean(), rtol=rtol, directions=directions)


def test_anchors_and_factors(chunks):
    """Points around other weights, along several directions at once, with factors; and the weights themselves."""
    net = seeded(lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)))
    anchor, factors = floats(9 * 12 + 9 + 9 * 5 + 5), torch.tensor([1.0, 0.5, 0.0, 2.0])
    points = [Point(((0, 0.1),), anchor=anchor), Point(anchor=anchor), Point(((0, 0.1), (3, 0.2)), factors), Point()]
    values = agree(net.parameters(), lambda: net(X[0]).square().mean(), rtol=1e-6, points=points)
    assert values[-1] == pytest.approx(float(net(X[0]).detach().square().mean()), rel=1e-6)


# --- closures that do not go through modules ---


def by_hand(net):
    weights = dict(net.named_parameters())
    first, last = net[0], net[2]
    return {
        "transposed by hand": lambda: F.linear(X[0], last.weight.T @ first.weight.T.T[:5]).square().mean(),
        "named arguments": lambda: F.linear(input=X[0], weight=first.weight, bias=first.bias).square().mean(),
        "bias by name": lambda: F.linear(X[0], first.weight, bias=first.bias).square().mean(),
        "data": lambda: (X[0] @ first.weight.data.t() + first.bias.data).square().mean(),
        "detach": lambda: (X[0] @ first.weight.detach().t()).square().mean(),
        "concatenation": lambda: torch.cat([p.view(-1) for p in net.parameters()]).square().sum(),
        "vector": lambda: nn.utils.parameters_to_vector(net.parameters()).cos().sum(),
        "stack in a tuple": lambda: torch.stack((first.bias, first.bias * 2)).square().sum(),
        "norms": lambda: torch.stack(torch._foreach_norm(list(net.parameters()))).sum(),
        "einsum": lambda: torch.einsum("bsi,oi->bso", X[0], first.weight).square().mean(),
        "addmm": lambda: torch.addmm(first.bias, X[0][0], first.weight.t()).square().mean(),
        "operators": lambda: ((2 * first.weight + 1 - first.weight / 3) ** 2).sum(),  # noqa: PLW0108
        "reflected operators": lambda: (torch.ones(9) @ first.weight).square().sum(),
        "indexing": lambda: first.weight[2:4, ::2].square().sum() + first.bias[3],
        "rows": lambda: sum(row.square().sum() for row in last.weight),
        "python numbers": lambda: float(first.bias.sum()) + first.bias.tolist()[0] + first.bias[1].item(),
        "numpy": lambda: float(np.square(first.weight.detach().numpy()).sum()),
        "numpy's own conversion": lambda: float(np.square(np.asarray(first.bias.data)).sum()),
        "functional_call": lambda: functional_call(net, weights, (X[0],)).square().mean(),
        "functional_call of doubled weights": lambda: functional_call(net, {n: 2 * p for n, p in weights.items()}, (X[0],)).square().mean(),
        "deep copy": lambda: copy_of(net)(X[0]).square().mean(),
        "state dict": lambda: functional_call(net, net.state_dict(), (X[0],)).square().mean(),
        "checkpointing": lambda: torch.utils.checkpoint.checkpoint(net, X[0], use_reentrant=False).square().mean(),
        "another mode around it": lambda: on_the_cpu(net),
    }  # fmt: skip


def copy_of(net):
    import copy

    return copy.deepcopy(net)


def on_the_cpu(net):
    with torch.device("cpu"):
        return net(torch.ones(3, 12)).square().mean()


def plain_net():
    return seeded(lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)))


UNUSED = {
    "transposed by hand": 2, "named arguments": 2, "bias by name": 2,
    "data": 2, "detach": 3, "stack in a tuple": 3, "einsum": 3, "addmm": 2, "operators": 3, "reflected operators": 3,
    "indexing": 2, "rows": 3, "python numbers": 3, "numpy": 3, "numpy's own conversion": 3,
}  # fmt: skip
BY_HAND = sorted(by_hand(plain_net()))


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("cut", [False, True])
def test_closures_by_hand(name, cut, request):
    if cut:
        request.getfixturevalue("chunks")
    net = plain_net()
    call = by_hand(net)[name]
    agree(net.parameters(), call, rtol=1e-6 if cut else 0.0, opaque=UNUSED.get(name, 0))


@pytest.mark.parametrize("cut", [False, True])
def test_a_product_of_two_trainables(cut, request):
    """Both sides are substituted, also where the input is seen elsewhere: prompts through a layer, merged factors."""
    if cut:
        request.getfixturevalue("chunks")
    prompt, layer = nn.Parameter(floats(5, 12)), seeded(lambda: nn.Linear(12, 9))
    call = lambda: layer(prompt).square().mean() + prompt.sum()  # noqa: E731
    agree([prompt, *layer.parameters()], call, rtol=1e-6 if cut else 0.0)


@pytest.mark.parametrize("directions", ["rademacher", "philox-gaussian"])
def test_a_closure_that_maps(directions):
    """Under vmap no native generator can be asked, so that other directions are refused there, by torch."""
    net = plain_net()
    agree(net.parameters(), lambda: torch.vmap(net)(X[0]).square().mean(), directions=directions)


@pytest.mark.parametrize("small", [True, False])
def test_what_a_closure_writes_does_not_stay(small):
    layer = seeded(lambda: nn.Linear(12, 9))

    def call():
        layer.weight.data.clamp_(-0.01, 0.01)
        layer.bias.zero_()
        return layer(X[0]).square().mean()

    losses(layer.parameters(), call, small=small)  # compares the weights' bits before and after


# --- Hugging Face models ---


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers(name, dtype):
    """Whole models; parameters the loss does not use (a pooler) are found at the first evaluation."""
    model, batch = build(name, dtype=dtype), padded_batch(name)
    values = agree(model.parameters(), lambda: model(**batch).loss, directions="rademacher")
    assert len(set(values)) > 1


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_transformers_in_chunks(name, monkeypatch):
    monkeypatch.setattr(perturbation, "Substitution", functools.partial(Substitution, chunk=100))
    model, batch = build(name), padded_batch(name)
    agree(model.parameters(), lambda: model(**batch).loss, rtol=1e-5)


# --- the weights are never written ---


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt])
def test_weights_are_never_written(directions, cut, error, request):
    """Not for a moment, seen through an alias in the middle of the closure; nor when the closure fails."""
    if cut:
        request.getfixturevalue("chunks")
    net = seeded(lambda: nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 9), nn.LayerNorm(9), nn.Linear(9, 30)))
    aliases = [p.detach() for p in net.parameters()]
    before, looks = bits(aliases), []

    def call():
        x = ids(4, 6)
        for layer in net:
            x = layer(x)
            looks.append(same(before, bits(aliases)))
        if error is not None and len(looks) > 8:
            raise error
        return x.square().mean()

    if error is None:
        losses(net.parameters(), call, small=False, directions=directions)
    else:
        with pytest.raises(error):
            losses(net.parameters(), call, small=False, directions=directions)
    assert len(looks) >= 12
    assert all(looks)
    assert same(before, bits(net.parameters()))


def test_buffers_are_left_alone():
    net = seeded(lambda: nn.Sequential(nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(60, 3))).eval()
    net.register_buffer("own", torch.ones(3))
    before = bits(net.buffers())
    agree(net.parameters(), lambda: (net(X[0]) * net.own).square().mean())
    assert same(before, bits(net.buffers()))


def test_frozen_parameters_are_left_alone():
    """Those that the optimizer was not given keep their values in the forward, too."""
    net = plain_net()
    frozen = net[0].weight.detach().clone()
    seen = []

    def call():
        seen.append(torch.equal(net[0].weight.detach(), frozen))
        return net(X[0]).square().mean()

    agree(list(net[2].parameters()), call)
    assert all(seen)


def test_metadata_costs_nothing():
    """Asking for a shape or an address makes no values, and is no use of them."""
    net, made = plain_net(), []
    weight = net[0].weight
    index = {id(p): i for i, p in enumerate(net.parameters())}

    def replacement(number):
        made.append(number)
        return torch.zeros(5)

    with Substitution(index, replacement) as substitution:
        found = (
            weight.shape, weight.dtype, weight.device, weight.ndim, weight.size(0), weight.dim(), weight.numel(), len(weight),
            weight.stride(), weight.is_contiguous(), weight.requires_grad, weight.grad, weight.is_leaf, weight.data_ptr(),
            weight.is_floating_point(), torch.is_floating_point(weight), torch.numel(weight), weight.element_size(), weight.nbytes,
            hash(weight), {weight: 1}[weight], weight.is_cuda, weight.storage_offset(), weight.get_device(), weight._version,
        )  # fmt: skip
        assert not made
        assert not substitution.seen
        assert (weight + 0).shape == (5,)
    assert substitution.seen == {0}
    assert found[0] == (9, 12)
    assert found[13] == weight.data_ptr()


def test_only_what_is_needed_is_made():
    """Large tables in windows of 2^16 entries around the rows asked for, large layers in chunks of rows; small ones whole."""
    table, weight, bias = (
        nn.Parameter(torch.ones(3000, 64)),
        nn.Parameter(torch.ones(70, 10)),
        nn.Parameter(torch.ones(70)),
    )
    made = []

    def values(number, lo, hi):
        made.append((number, lo, hi))
        return torch.full((hi - lo,), 2.0)

    def replacement(number):
        made.append(number)
        return torch.zeros(70)

    with Substitution({id(table): 0, id(weight): 1, id(bias): 2}, replacement, values, chunk=300):
        rows = F.embedding(torch.tensor([[2000, 5], [3, 5]]), table)
        out = F.linear(torch.ones(2, 10), weight, bias)
    assert made == [(0, 3 * 64, 6 * 64), (0, 2000 * 64, 2001 * 64), 2, (1, 0, 300), (1, 300, 600), (1, 600, 700)]
    assert torch.equal(rows, torch.full((2, 2, 64), 2.0))
    assert torch.equal(out, torch.full((2, 70), 20.0))


# --- what no torch function sees ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_is_moved_in_place():
    """Found at the first evaluation, which is done again; from then on its parameters are moved and restored."""
    net = plain_net()
    traced, calls = torch.jit.trace(net, X[0]), []

    def call():
        calls.append(1)
        return traced(X[0]).square().mean()

    agree(net.parameters(), call, opaque=4)
    assert len(calls) == 2 * len(POINTS) + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_part_is_moved_in_place():
    net = plain_net()
    traced = torch.jit.trace(net[0], X[0])
    agree(net.parameters(), lambda: net[2](traced(X[0]).tanh()).square().mean(), opaque=2)


@pytest.mark.parametrize(
    "look",
    [torch.Tensor.detach, lambda p: p.detach().numpy(), lambda p: p.data.view(-1)],
    ids=["alias", "numpy", "view"],
)
def test_values_read_through_an_alias_are_moved_in_place(look):
    net = plain_net()
    view = look(net[0].weight)
    layer = net[2]
    agree(net.parameters(), lambda: float((view**2).sum()) + layer(torch.ones(9)).sum().item(), opaque=2)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_what_is_moved_in_place_is_restored(error):
    net, calls = plain_net(), []
    view = net[0].weight.detach()
    before = bits(net.parameters())

    def call():
        calls.append(float(view.sum()))
        if len(calls) == 4:
            raise error
        return calls[-1]

    with pytest.raises(error):
        losses(net.parameters(), call, small=False)
    assert len(set(calls)) > 2
    assert same(before, bits(net.parameters()))


def test_a_closure_that_returns_no_loss():
    net = plain_net()
    with pytest.raises(ZOError, match="closure returned"):
        losses(net.parameters(), lambda: net(X[0]), small=False)


@pytest.mark.parametrize("bad", [[-1, 3], [3, 30]])
def test_ids_outside_the_vocabulary_are_refused(bad, chunks):
    """Also where only windows of the table are made: never another parameter's values."""
    net = seeded(lambda: nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)))
    with pytest.raises((IndexError, RuntimeError)):
        losses(net.parameters(), lambda: net(torch.tensor(bad)).sum(), small=False)


@pytest.mark.parametrize("compiled_before", [True, False])
def test_a_compiled_module(compiled_before):
    """The losses of the module itself."""
    torch._dynamo.reset()
    net = plain_net()
    compiled = torch.compile(net, backend="eager")
    if compiled_before:
        with torch.no_grad():
            compiled(X[0])
    large = losses(net.parameters(), lambda: compiled(X[0]).square().mean(), small=False)
    assert large == pytest.approx(losses(net.parameters(), lambda: net(X[0]).square().mean(), small=True), rel=1e-6)
    torch._dynamo.reset()


def test_global_random_state_is_left_alone():
    net = plain_net()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    losses(net.parameters(), lambda: net(X[0]).sum(), small=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize("ids", [torch.tensor([[3, 0], [11, 3]]), torch.tensor([-1, 2], dtype=torch.int32)])
def test_rows_of_a_large_weight_are_made_alone(ids):
    """weight[ids], as scorers of label words read an output head; negative numbers count from the end."""
    weight = nn.Parameter(torch.arange(48.0).view(12, 4))
    made = []

    def values(number, lo, hi):
        made.append((lo, hi))
        return (weight.detach().view(-1) + 100)[lo:hi]

    def whole(number):
        raise AssertionError("the whole weight was made")

    with torch.no_grad(), Substitution({id(weight): 0}, whole, values, 16) as substitution:
        rows = weight[ids]
    assert torch.equal(rows, weight.detach()[ids.long()] + 100)
    assert substitution.seen == {0}
    assert made
