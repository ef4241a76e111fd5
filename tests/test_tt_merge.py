"""Merges: the pair is the dense matrix, a bias may be folded into it, and what the cache returns is never stale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from tt_cases import ROUNDOFF, assert_equals_twin, make_cores, normal, trains, twin
from tt_kernels import MergeCache, core_shapes, merge_pair

from zo_opt import MeZO

TRAIN = ((2, 3), (4, 5), 3)
INPUTS = len(TRAIN[0])
DTYPES = st.sampled_from(list(ROUNDOFF))


def parts(pair):
    return [t for t in (pair.a_MR, pair.b_RN, pair.start_R, pair.bias_N) if t is not None]


def same(pair, other):
    return len(parts(pair)) == len(parts(other)) and all(map(torch.equal, parts(pair), parts(other)))


def layers_of(count=3, train=TRAIN, dtype=torch.float32):
    return [make_cores(*train, dtype=dtype, seed=s) for s in range(count)]


def assert_fresh(pairs, layers, biases=None, inputs=INPUTS):
    """Each pair is its layer's, as the cores are now. To rounding, not to the bit: a batched product may sum in another order."""
    assert len(pairs) == len(layers)
    for k, (pair, cores) in enumerate(zip(pairs, layers, strict=True)):
        expected = merge_pair(cores, inputs, None if biases is None else biases[k])
        for a, b in zip(parts(pair), parts(expected), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=8 * ROUNDOFF[a.dtype] * float(b.abs().max()))


# --- pairs ---


@settings(deadline=None, max_examples=100)
@given(train=trains(), tokens=st.integers(0, 9), dtype=DTYPES, biased=st.booleans())
def test_the_pair_is_the_dense_matrix(train, tokens, dtype, biased):
    in_dims, out_dims, _ = train
    cores, x = make_cores(*train, dtype=dtype), normal(tokens, math.prod(in_dims), dtype=dtype)
    bias = normal(math.prod(out_dims), dtype=dtype, seed=2) if biased else None
    pair = merge_pair(cores, len(in_dims), bias)
    assert {t.dtype for t in parts(pair)} == {dtype}
    rank = cores[len(in_dims) - 1].shape[2] if in_dims else 1
    folded = biased and math.prod(out_dims) > math.prod(in_dims)
    assert pair.a_MR.shape == (math.prod(in_dims), rank + folded)
    assert pair.b_RN.shape == (rank + folded, math.prod(out_dims))
    assert (pair.start_R is not None) == folded
    assert (pair.bias_N is not None) == (biased and not folded)
    eye = torch.eye(math.prod(in_dims), dtype=dtype)
    assert_equals_twin(pair.a_MR @ pair.b_RN, eye, cores, len(in_dims))
    assert_equals_twin(pair(x), x, cores, len(in_dims), bias)


def test_a_folded_bias_is_added_as_it_is():
    """Where x is zero the output is the bias to the bit; elsewhere it equals the bias added afterwards, in every dtype."""
    train = ((2, 2), (3, 5), 3)
    for dtype, roundoff in ROUNDOFF.items():
        cores, bias, x = make_cores(*train, dtype=dtype), normal(15, dtype=dtype, seed=2), normal(6, 4, dtype=dtype)
        pair, plain = merge_pair(cores, 2, bias), merge_pair(cores, 2)
        assert pair.bias_N is None
        assert torch.equal(pair(torch.zeros_like(x)), bias.expand(6, 15))
        found, added = pair(x).double(), plain(x).double() + bias.double()
        assert (found - added).abs().max() <= 8 * roundoff * added.abs().max()
        assert not torch.equal(pair(x), plain(x))


@settings(deadline=None, max_examples=50)
@given(train=trains(cores=4, rank=4), layers=st.integers(1, 3), dtype=DTYPES, biased=st.booleans())
def test_a_leading_axis_of_layers(train, layers, dtype, biased):
    """As many trains, and each taken out."""
    in_dims, out_dims, _ = train
    cores = make_cores(*train, dtype=dtype, lead=[layers])
    bias = normal(layers, math.prod(out_dims), dtype=dtype, seed=2) if biased else None
    x = normal(4, math.prod(in_dims), dtype=dtype)
    pair = merge_pair(cores, len(in_dims), bias)
    for k in range(layers):
        own_bias = None if bias is None else bias[k]
        assert_equals_twin(pair[k](x), x, [core[k] for core in cores], len(in_dims), own_bias)


def test_gradients_through_a_pair():
    for train in (((2, 2), (2, 1), 2), ((2,), (2, 2), 2), ((2, 2), (), 2), ((), (2, 2), 2)):
        cores, bias = make_cores(*train), normal(math.prod(train[1]), seed=2)
        x = normal(3, math.prod(train[0]))
        arguments = [t.requires_grad_() for t in (x, bias, *cores)]
        inputs = len(train[0])
        run = lambda x, bias, *cores, inputs=inputs: merge_pair(cores, inputs, bias)(x)  # noqa: E731
        assert torch.autograd.gradcheck(run, arguments)


def test_to_another_dtype():
    pair = merge_pair(layers_of(1, dtype=torch.float64)[0], INPUTS, normal(20))
    assert pair.to(torch.float64) is pair
    assert {t.dtype for t in parts(pair.to(torch.bfloat16))} == {torch.bfloat16}
    assert torch.equal(pair.to(torch.float32).b_RN, pair.b_RN.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_merged_in_float32(dtype):
    """The pair of bf16 cores is that of the same numbers in float32, rounded once."""
    cores = make_cores((3, 4, 5), (5, 4, 3), 6, dtype=dtype)
    expected = merge_pair([core.float() for core in cores], 3).to(dtype)
    assert same(merge_pair(cores, 3), expected)


# --- the cache ---


def biased_layers():
    layers = layers_of()
    return layers, [normal(20, dtype=torch.float32, seed=10 + k) for k in range(3)]


@torch.no_grad()
def test_equal_cores_are_merged_once():
    layers, biases = biased_layers()
    cache = MergeCache()
    first = cache(layers, INPUTS, biases)
    assert_fresh(first, layers, biases)
    clones = [[core.clone() for core in cores] for cores in layers]
    assert cache(clones, INPUTS, biases) is first
    assert cache(layers, INPUTS) is not first
    assert_fresh(cache(layers, INPUTS), layers)


@pytest.mark.parametrize("dtype", ROUNDOFF)
@torch.no_grad()
def test_one_chain_equals_layer_by_layer(dtype):
    for train in (((8, 8, 16), (4, 4, 4), 5), ((4, 4, 4), (8, 8, 16), 16), ((7, 11), (13,), 5)):
        layers = layers_of(4, train, dtype)
        biases = [normal(math.prod(train[1]), dtype=dtype, seed=10 + k) for k in range(4)]
        assert_fresh(MergeCache()(layers, len(train[0]), biases), layers, biases, len(train[0]))


def flat_layers():
    """Layers whose cores are views of one buffer."""
    shapes = core_shapes(*TRAIN)
    sizes = [math.prod(s) for s in shapes] * 3
    flat = normal(sum(sizes), dtype=torch.float32)
    views = [piece.view(s) for piece, s in zip(flat.split(sizes), shapes * 3, strict=True)]
    return flat, [views[k * len(shapes) : (k + 1) * len(shapes)] for k in range(3)]


def write_in_place(flat, core):
    core.mul_(2)


def write_one_entry(flat, core):
    core[0, 0, 0] += 1e-6


def write_data(flat, core):
    core.data.add_(1)


def write_numpy(flat, core):
    core.numpy()[...] *= 3


def write_data_of_another(flat, core):
    core.data = core.data.clone() + 1


def write_the_buffer(flat, core):
    flat.mul_(1.5)


def write_the_buffer_as_numpy(flat, core):
    flat.numpy()[-1] += 1


def write_the_storage(flat, core):
    storage = core.untyped_storage()
    storage.copy_(torch.ones(flat.shape).untyped_storage())


def write_nan(flat, core):
    core[0, 0, 0] = float("nan")


WRITES = [v for name, v in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_no_write_is_missed(write):
    for mode in (torch.no_grad, torch.inference_mode):
        for place in ((0, 0), (1, 2), (2, 3)):
            assert_write_is_seen(write, mode, place)


def assert_write_is_seen(write, mode, place):
    flat, layers = flat_layers()
    cache = MergeCache()
    with mode():
        before = [[t.clone() for t in parts(pair)] for pair in cache(layers, INPUTS)]
        with torch.inference_mode(False), torch.no_grad():
            write(flat, layers[place[0]][place[1]])
        after = cache(layers, INPUTS)
        expected = [merge_pair(cores, INPUTS) for cores in layers]
        for pair, other in zip(after, expected, strict=True):
            for a, b in zip(parts(pair), parts(other), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)
        changed = [not all(map(torch.equal, old, parts(new))) for old, new in zip(before, after, strict=True)]
        assert changed[place[0]] or "buffer" in write.__name__
        assert any(changed)


@torch.no_grad()
def test_biases_are_watched():
    layers, biases = biased_layers()
    cache = MergeCache()
    first = cache(layers, INPUTS, biases)
    biases[2].numpy()[0] += 1
    assert cache(layers, INPUTS, biases) is not first
    assert_fresh(cache(layers, INPUTS, biases), layers, biases)


@torch.no_grad()
def test_shapes_dtypes_and_numbers_of_layers_change():
    cache, other = MergeCache(), ((2, 3), (4, 5), 2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        for train in (TRAIN, other):
            for count in (3, 1, 2):
                layers = layers_of(count, train, dtype)
                for _ in range(2):
                    assert_fresh(cache(layers, INPUTS), layers)
    # equal numbers in another dtype
    ones = [[torch.ones(s, dtype=torch.bfloat16) for s in core_shapes(*TRAIN)]]
    assert cache(ones, INPUTS)[0].a_MR.dtype == torch.bfloat16
    assert cache([[core.float() for core in cores] for cores in ones], INPUTS)[0].a_MR.dtype == torch.float32


@torch.no_grad()
def test_the_number_of_input_cores_changes():
    cache, layers = MergeCache(), layers_of(2)
    cache(layers, INPUTS)
    assert_fresh(cache(layers, 1), layers, inputs=1)


@torch.no_grad()
def test_autocast_changes_nothing():
    """A merge is float32's, inside as outside; else one that was made inside would be found outside."""
    cache, layers = MergeCache(), layers_of()
    with torch.autocast("cpu", torch.bfloat16):
        inside = cache(layers, INPUTS)
    outside = cache(layers, INPUTS)
    assert_fresh(outside, layers)
    assert_fresh(inside, layers)


class Layers(nn.Module):
    """Trains whose pairs come from one cache at each call."""

    def __init__(self, count=3):
        super().__init__()
        self.cores = nn.ParameterList(nn.Parameter(core) for cores in layers_of(count) for core in cores)
        self.cache = MergeCache()

    def grouped(self):
        cores, length = list(self.cores), len(core_shapes(*TRAIN))
        return [cores[k : k + length] for k in range(0, len(cores), length)]

    def forward(self, x):
        return torch.stack([pair(x) for pair in self.cache(self.grouped(), INPUTS)])

    def expected(self, x):
        return torch.stack([twin(x, [c.detach() for c in cores], INPUTS) for cores in self.grouped()])


X = normal(4, 6, dtype=torch.float32)


def assert_layers_fresh(net):
    torch.testing.assert_close(net(X).double(), net.expected(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foreach", [False, True])
def test_first_order_steps(foreach):
    """With gradients on nothing is kept, and evaluations between the steps see each of them."""
    net = Layers()
    stepper = torch.optim.Adam(net.parameters(), lr=1e-3, foreach=foreach)
    for _ in range(3):
        with torch.no_grad():
            assert_layers_fresh(net)
        net(X).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        stepper.step()
        stepper.zero_grad()
        with torch.no_grad():
            assert_layers_fresh(net)


@pytest.mark.parametrize("mode", ["sequential", "batched", "split"])
def test_forward_only_steps(mode):
    """Every loss of a step is that of the cores as they then are: perturbed, restored and updated through one buffer."""
    cached, merged = Layers(), Layers()
    merged.forward = lambda x: torch.stack([merge_pair(cores, INPUTS)(x) for cores in merged.grouped()])
    losses = []
    for net in (cached, merged):
        optimizer = MeZO(net.parameters(), lr=0.01, zo_eps=0.05, seed=1, module=net, query_mode=mode)
        losses.append([float(optimizer.step(lambda x, net=net: net(x).square().mean(), X)) for _ in range(4)])
        with torch.no_grad():
            assert_layers_fresh(cached)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_load_state_dict_and_copies_of_a_module():
    net, other = Layers(), Layers()
    with torch.no_grad():
        for p in other.parameters():
            p.neg_().add_(0.1)
        assert_layers_fresh(net)
        net.load_state_dict(other.state_dict())
        assert_layers_fresh(net)
        net.load_state_dict(Layers().state_dict(), assign=True)
        assert_layers_fresh(net)
        net.double()
        torch.testing.assert_close(net(X.double()), net.expected(X), rtol=1e-10, atol=1e-11)


def test_grad_mode_between_calls():
    """A pair kept without gradients is not handed out with them, nor one with a graph without."""
    net = Layers()
    for _ in range(2):
        with torch.inference_mode():
            assert_layers_fresh(net)
        with torch.no_grad():
            assert not net(X).requires_grad
        y = net(X)
        assert y.requires_grad
        assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.square().sum(), list(net.parameters())))
    with torch.enable_grad():
        assert_layers_fresh(net)


def stacked_parameters(net, chosen):
    """Three versions of the chosen parameters."""
    named = dict(net.named_parameters())
    return {name: torch.stack([named[name].detach() * s for s in (1.0, -1.0, 0.5)]) for name in chosen}


def assert_vmaps(net, chosen):
    for _ in range(2):
        many = stacked_parameters(net, chosen)
        found = torch.vmap(lambda p: torch.func.functional_call(net, p, (X,)))(many)
        for k in range(3):
            single = torch.func.functional_call(net, {name: t[k] for name, t in many.items()}, (X,))
            torch.testing.assert_close(found[k], single, rtol=1e-4, atol=1e-5)
        assert_layers_fresh(net)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.01)


@pytest.mark.parametrize("gradients", [False, True])
def test_vmap_over_functional_call(gradients):
    net = Layers()
    with torch.set_grad_enabled(gradients):
        assert_vmaps(net, dict(net.named_parameters()))
        assert_vmaps(net, ["cores.0", "cores.4", "cores.8"])  # the first core of each layer
        assert_vmaps(net, ["cores.1", "cores.7"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch's own rules, when first used
@pytest.mark.parametrize(("gradients", "k"), [(False, 0), (False, 5), (True, 2)])
def test_forward_mode_duals(gradients, k):
    """Tangents of a core come through, though its primal is what was kept, and do not stay."""
    net = Layers()
    with torch.set_grad_enabled(gradients):
        assert_layers_fresh(net)
        name, tangent = f"cores.{k}", normal(*net.cores[k].shape, dtype=torch.float32, seed=3)
        layer, place = divmod(k, 4)
        cores = [c.detach() for c in net.grouped()[layer]]
        cores[place] = tangent
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(net.cores[k].detach().clone(), tangent)
            found = forward_ad.unpack_dual(torch.func.functional_call(net, {name: dual}, (X,))).tangent
        torch.testing.assert_close(found[layer].double(), twin(X, cores, INPUTS), rtol=1e-4, atol=1e-5)
        assert torch.equal(found[(layer + 1) % 3], torch.zeros(4, 20))
        assert_layers_fresh(net)
        assert forward_ad._current_level < 0


def test_gradients_by_torch_func():
    net = Layers()
    with torch.no_grad():
        assert_layers_fresh(net)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    loss = lambda p: torch.func.functional_call(net, p, (X,)).square().sum()  # noqa: E731
    found = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(net(X).square().sum(), list(net.parameters()))
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
