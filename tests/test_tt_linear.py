"""tt_linear: values in every dtype, derivatives of all kinds, what backward keeps, torch's transforms, the errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from tt_cases import ROUNDOFF, SHAPES, assert_equals_twin, make_cores, normal, trains
from tt_kernels import reconstruct, tt_linear

# torch's own rules of forward-mode differentiation are scripted when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

DTYPES = st.sampled_from(list(ROUNDOFF))
SMALL = ((2, 3), (2, 2), 2)  # the train of the slower checks


def layer(train):
    """(x, bias or None, *cores) -> y"""
    in_dims, out_dims, _ = train
    return lambda x, bias, *cores: tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims, bias=bias)


def inputs_of(train, *lead, dtype=torch.float64, requires_grad=False):
    """x (*lead, M), bias, cores."""
    x, bias = normal(*lead, math.prod(train[0]), dtype=dtype), normal(math.prod(train[1]), dtype=dtype, seed=2)
    tensors = (x, bias, *make_cores(*train, dtype=dtype))
    return tuple(t.requires_grad_(requires_grad) for t in tensors)


def dense(train):
    """The same function by the dense matrix, whose derivatives are autograd's own."""
    return lambda x, bias, *cores: x @ reconstruct(cores, *train[:2]) + bias


def strided(tensor):
    """Equal, with every second entry of larger memory."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2), float("nan"))
    wide[..., ::2] = tensor
    return wide[..., ::2]


# --- values ---


@settings(deadline=None, max_examples=120)
@given(
    train=trains(),
    lead=st.lists(st.integers(0, 3), max_size=3),
    dtype=DTYPES,
    biased=st.booleans(),
    gradients=st.booleans(),
)
@example(train=((2, 3), (4,), 2), lead=[0], dtype=torch.float32, biased=True, gradients=True)
@example(train=((2, 3), (4,), 2), lead=[2, 0], dtype=torch.bfloat16, biased=False, gradients=False)
def test_equals_the_twin(train, lead, dtype, biased, gradients):
    """With and without gradients the same bits."""
    x, bias, *cores = inputs_of(train, *lead, dtype=dtype)
    bias = bias if biased else None
    y = layer(train)(x, bias, *cores)
    assert y.shape == (*lead, math.prod(train[1]))
    assert y.dtype == dtype
    assert_equals_twin(y, x, cores, len(train[0]), bias)
    again = layer(train)(x, bias, *(c.clone().requires_grad_(gradients) for c in cores))
    assert torch.equal(again, y)
    assert again.requires_grad == gradients


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_the_published_sizes(dtype):
    for train in (((8, 8, 16), (4, 4, 4), 5), ((16, 16, 16), (4, 4, 4), 16), ((4, 4, 4), (8, 8, 16), 5)):
        x, bias, *cores = inputs_of(train, 33, dtype=dtype)
        assert_equals_twin(layer(train)(x, bias, *cores), x, cores, 3, bias)


def test_ranks_wider_than_the_matrix():
    """Where the dense matrix would need fewer operations."""
    for train in (((8, 8), (8, 8), 64), ((4, 4), (4, 4), (4, 40, 4))):
        x, bias, *cores = inputs_of(train, 9)
        assert_equals_twin(layer(train)(x, bias, *cores), x, cores, 2, bias)


@settings(deadline=None, max_examples=40)
@given(train=trains(), tokens=st.integers(0, 9))
def test_memory_may_lie_anywhere(train, tokens):
    x, bias, *cores = inputs_of(train, tokens, 2)
    expected = layer(train)(x, bias, *cores)
    others = [
        (strided(x), strided(bias), *map(strided, cores)),
        (x.transpose(0, 1).contiguous().transpose(0, 1), bias, *cores),
        (x, bias, *(c.permute(2, 1, 0).contiguous().permute(2, 1, 0) for c in cores)),
    ]
    for arguments in others:
        torch.testing.assert_close(layer(train)(*arguments), expected, rtol=1e-12, atol=1e-12)
    assert_equals_twin(
        layer(train)(x[:, :1].expand_as(x), bias, *cores), x[:, :1].expand_as(x), cores, len(train[0]), bias
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["in", "out"])
def test_merges_of_low_precision_keep_float32(dtype, side):
    """(1 + u)^2 - (1 + 2u) = u^2: with the square rounded to the cores' dtype on the way the result is 0, and no bound would hold."""
    u = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    first = torch.tensor([[[1 + u, 1]]], dtype=dtype)  # (1, 1, 2)
    second = torch.diag(torch.tensor([1 + u, 1 + 2 * u])).unsqueeze(1).to(dtype)  # (2, 1, 2)
    third = torch.tensor([[[1.0]], [[-1.0]]], dtype=dtype)  # (2, 1, 1)
    cores, ones = [first, second, third], torch.ones(1, 1, 1, dtype=dtype)
    cores = [*cores, ones] if side == "in" else [ones, *cores]
    dims = {"in_dims": (1, 1, 1), "out_dims": (1,)} if side == "in" else {"in_dims": (1,), "out_dims": (1, 1, 1)}
    x = torch.ones(1, 1, dtype=dtype)
    assert tt_linear(x, cores, **dims).item() == u**2


# --- derivatives ---


@pytest.mark.parametrize("train", [SMALL, *SHAPES[3:5], SHAPES[8], SHAPES[9]], ids=str)
def test_first_and_second_derivatives(train):
    x, bias, *cores = inputs_of(train, 2, requires_grad=True)
    assert torch.autograd.gradcheck(layer(train), (x, bias, *cores), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer(train), (x, bias, *cores))


@settings(deadline=None, max_examples=60)
@given(train=trains(), tokens=st.integers(0, 9), biased=st.booleans(), wanted=st.integers(1, 127))
def test_gradients_equal_those_of_the_dense_matrix(train, tokens, biased, wanted):
    """Of any subset of the inputs."""
    x, bias, *cores = inputs_of(train, tokens)
    arguments = [x, *cores] + ([bias] if biased else [])
    chosen = [t for k, t in enumerate(arguments) if wanted >> k & 1] or [x]
    for t in chosen:
        t.requires_grad_()
    dy = normal(tokens, math.prod(train[1]), seed=5)
    found = torch.autograd.grad(layer(train)(x, bias if biased else None, *cores), chosen, dy)
    expected = torch.autograd.grad(dense(train)(x, bias if biased else torch.zeros_like(bias), *cores), chosen, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("train", [SHAPES[6], ((4, 4, 4), (8, 8, 16), 5)], ids=str)
def test_gradients_in_low_precision(train, dtype, rtol):
    """Against float64's from the same bf16 or fp16 numbers, by norm: a gradient passes some five roundings."""
    low = inputs_of(train, 17, dtype=dtype, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in low]
    dy = normal(17, math.prod(train[1]), dtype=dtype, seed=5)
    found = torch.autograd.grad(layer(train)(*low), low, dy)
    expected = torch.autograd.grad(dense(train)(*wide), wide, dy.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= rtol * b.norm()


def test_backward_keeps_x_and_the_cores_alone():
    """Nothing of the size of the pair, the product in the middle or the output; no copy of x."""
    train = ((8, 8, 16), (4, 4, 4), 5)
    x, bias, *cores = inputs_of(train, 3, 3, dtype=torch.float32, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(train)(x, bias, *cores)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *cores)}
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in (x, *cores))


# --- torch's transforms ---


@pytest.mark.parametrize("train", [SMALL, SHAPES[0], SHAPES[8], SHAPES[9]], ids=str)
def test_vmap_over_any_input(train):
    """Over all, and over one at a time, others shared."""
    x, bias, *cores = inputs_of(train, 5)
    batched = [torch.stack([t, 2 * t + 1, -t]) for t in (x, bias, *cores)]
    apply = layer(train)
    expected = torch.stack([apply(*(b[i] for b in batched)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(apply)(*batched), expected, rtol=1e-10, atol=1e-11)
    single = (x, bias, *cores)
    for k, b in enumerate(batched):
        axes = tuple(0 if j == k else None for j in range(len(batched)))
        found = torch.vmap(apply, axes)(*single[:k], b, *single[k + 1 :])
        expected = torch.stack([apply(*single[:k], b[i], *single[k + 1 :]) for i in range(3)])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_gradients_of_each_example():
    """vmap of grad, grad of vmap, and plain autograd through vmap."""
    x, bias, *cores = inputs_of(SMALL, 4, 5)

    def loss(cores, bias, x):
        return layer(SMALL)(x, bias, *cores).square().sum()

    expected = [torch.func.grad(loss, argnums=(0, 1))(cores, bias, example) for example in x]
    of_each, bias_of_each = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0))(cores, bias, x)
    for k, found in enumerate(of_each):
        torch.testing.assert_close(found, torch.stack([e[0][k] for e in expected]), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(bias_of_each, torch.stack([e[1] for e in expected]), rtol=1e-10, atol=1e-11)

    def total(cores):
        return torch.vmap(lambda example: loss(cores, bias, example))(x).sum()

    leaves = [c.clone().requires_grad_() for c in cores]
    for found in (torch.func.grad(total)(cores), torch.autograd.grad(total(leaves), leaves)):
        for a, whole in zip(found, of_each, strict=True):
            torch.testing.assert_close(a, whole.sum(0), rtol=1e-10, atol=1e-11)


def test_forward_mode():
    """torch.func.jvp, dual numbers with and without gradients on, and forward over reverse, against the dense matrix's."""
    arguments = inputs_of(SMALL, 5)
    tangents = tuple(normal(*t.shape, seed=7 + k) for k, t in enumerate(arguments))
    y, dy = torch.func.jvp(dense(SMALL), arguments, tangents)
    for found, expected in zip(torch.func.jvp(layer(SMALL), arguments, tangents), (y, dy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t.clone().requires_grad_(gradients), d)
                for t, d in zip(arguments, tangents, strict=True)
            ]
            found = forward_ad.unpack_dual(layer(SMALL)(*duals))
            torch.testing.assert_close(found.primal, y, rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(found.tangent, dy, rtol=1e-10, atol=1e-11)
            only_bias = [arguments[0], duals[1], *arguments[2:]]
            assert forward_ad.unpack_dual(layer(SMALL)(*only_bias)).tangent is not None
    for k in (2, 5):

        def loss(core, function, k=k):
            return function(*arguments[:k], core, *arguments[k + 1 :]).square().sum()

        found, expected = (torch.func.hessian(loss)(arguments[k], f(SMALL)) for f in (layer, dense))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated"
)  # torch does, tracing one
@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_as_one_graph(gradients):
    """Traced without a break, for two numbers of tokens: values and gradients are those of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(layer(SMALL), fullgraph=True, backend="aot_eager")
    for tokens in (4, 7):
        arguments = inputs_of(SMALL, tokens, requires_grad=gradients)
        found, expected = compiled(*arguments), layer(SMALL)(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        if gradients:
            dy = normal(*found.shape, seed=3)
            pairs = zip(*(torch.autograd.grad(y, arguments, dy) for y in (found, expected)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """x in float32 or already narrow, cores and bias in float32: the output is bf16, gradients are float32 where the numbers are."""
    train = SHAPES[0]
    x, bias, *cores = inputs_of(train, 17, dtype=torch.float32, requires_grad=True)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(train)(x, bias, *cores)
    assert y.dtype == torch.bfloat16
    assert_equals_twin(y.detach(), x.detach(), [c.detach() for c in cores], 2, bias.detach())
    dy = normal(*y.shape, dtype=torch.bfloat16, seed=5)
    wide = [t.detach().double().requires_grad_() for t in (x, bias, *cores)]
    found = torch.autograd.grad(y, (x, bias, *cores), dy)
    expected = torch.autograd.grad(dense(train)(*wide), wide, dy.double())
    for a, b, t in zip(found, expected, (x, bias, *cores), strict=True):
        assert a.dtype == t.dtype
        assert (a.double() - b).norm() <= 3e-2 * b.norm()


def test_autocast_leaves_float64_and_merges_alone():
    """float64 stays; float32 cores are merged as they are: u^2 as above survives."""
    x, bias, *cores = inputs_of(SMALL, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_twin(layer(SMALL)(x, bias, *cores), x, cores, 2, bias)
        u = 2.0**-10
        train = [torch.tensor([[[1 + u, 1]]]), torch.diag(torch.tensor([1 + u, 1 + 2 * u])).unsqueeze(1)]
        train += [torch.tensor([[[1.0]], [[-1.0]]]), torch.ones(1, 1, 1)]
        assert tt_linear(torch.ones(1, 1), train, in_dims=(1, 1, 1), out_dims=(1,)).item() == u**2


def test_a_backward_inside_autocast_is_that_outside():
    x, bias, *cores = inputs_of(SHAPES[0], 17, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(SHAPES[0])(x, bias, *cores)
        inside = torch.autograd.grad(y, cores, torch.ones_like(y), retain_graph=True)
    outside = torch.autograd.grad(y, cores, torch.ones_like(y))
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_autocast_with_cores_of_two_dtypes():
    x, _, *cores = inputs_of(SHAPES[0], 5, dtype=torch.float32)
    cores[1] = cores[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_twin(layer(SHAPES[0])(x, None, *cores), x, cores, 2)


def test_the_meta_device():
    """Shapes without numbers, as memory planning needs them."""
    x, bias, *cores = (t.to("meta") for t in inputs_of(SMALL, 5))
    assert layer(SMALL)(x, bias, *cores).shape == (5, 4)


# --- errors ---

GOOD = ((1, 2, 3), (3, 3, 3), (3, 4, 1))


@pytest.mark.parametrize(
    ("shapes", "in_dims", "out_dims", "message"),
    [
        (GOOD[:2], (2, 3), (4,), "2 cores do not fit 3 dims; give one core for each input and output dim"),
        ((*GOOD, (1, 1, 1)), (2, 3), (4,), "4 cores do not fit 3 dims"),
        (((2, 2, 3), *GOOD[1:]), (2, 3), (4,), r"core 0 has shape \(2, 2, 3\); expected \(1, 2, rank\)"),
        ((GOOD[0], (2, 3, 3), GOOD[2]), (2, 3), (4,), r"core 1 has shape \(2, 3, 3\); expected \(3, 3, rank\)"),
        ((GOOD[0], (3, 5, 3), GOOD[2]), (2, 3), (4,), r"core 1 has shape \(3, 5, 3\)"),
        ((GOOD[0], (9, 3), GOOD[2]), (2, 3), (4,), r"core 1 has shape \(9, 3\)"),
        ((*GOOD[:2], (3, 4, 2)), (2, 3), (4,), "the last core ends in rank 2; a train ends in rank 1"),
        ((), (), (), "0 cores do not fit 0 dims"),
    ],
)
def test_wrong_cores_are_refused(shapes, in_dims, out_dims, message):
    cores = [torch.zeros(s) for s in shapes]
    with pytest.raises(ValueError, match=message):
        tt_linear(torch.zeros(5, math.prod(in_dims)), cores, in_dims=in_dims, out_dims=out_dims)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(5, 7), None, r"x ends in 7 features; in_dims \(2, 3\) need 6"),
        (torch.zeros(5, 6), torch.zeros(5), r"bias has shape \(5,\); expected \(4,\)"),
        (torch.zeros(5, 6), torch.zeros(1, 4), r"bias has shape \(1, 4\); expected \(4,\)"),
        (
            torch.zeros(5, 6, dtype=torch.float64),
            None,
            "core 0 is torch.float32 but x is torch.float64; cast one of them",
        ),
        (torch.zeros(5, 6), torch.zeros(4).double(), "bias is torch.float64 but x is torch.float32; cast one of them"),
        (torch.zeros(()), None, r"x has no axes; give \(\.\.\., features\)"),
    ],
    ids=["features", "bias size", "bias axes", "core dtype", "bias dtype", "no axis"],
)
def test_wrong_inputs_are_refused(x, bias, message):
    with pytest.raises(ValueError, match=message):
        tt_linear(x, [torch.zeros(s) for s in GOOD], in_dims=(2, 3), out_dims=(4,), bias=bias)
