"""tt_linear: values in every dtype, derivatives of all kinds, what backward keeps, torch's transforms, the copies, the errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from tt_cases import ROUNDOFF, SHAPES, assert_equals_twin, make_cores, normal, trains, twin
from tt_kernels import core_shapes, plans, reconstruct, tt_linear, tt_linear_copies
from tt_kernels.linear import contract
from tt_kernels.plan import MARGIN

# torch's own rules of forward-mode differentiation are scripted when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

DTYPES = st.sampled_from(list(ROUNDOFF))
SMALL = ((2, 3), (2, 2), 2)  # the train of the slower checks


def layer(train, plan=None):
    """(x, bias or None, *cores) -> y"""
    in_dims, out_dims, _ = train
    return lambda x, bias, *cores: tt_linear(x, cores, in_dims=in_dims, out_dims=out_dims, bias=bias, plan=plan)


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
@pytest.mark.parametrize(
    "train", [((8, 8, 16), (4, 4, 4), 5), ((16, 16, 16), (4, 4, 4), 16), ((4, 4, 4), (8, 8, 16), 5)]
)
def test_the_published_sizes(train, dtype):
    x, bias, *cores = inputs_of(train, 33, dtype=dtype)
    assert_equals_twin(layer(train)(x, bias, *cores), x, cores, 3, bias)


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
    full = next(p for p in plans(*dims.values(), (1, 2, 2) if side == "out" else (2, 2, 1), 1) if p.kind == "full")
    for plan in (None, full):
        assert tt_linear(x, cores, **dims, plan=plan).item() == u**2
    lead = [core.expand(2, *core.shape) for core in cores]
    assert tt_linear_copies(x.expand(2, 1, 1), lead, **dims).flatten().tolist() == [u**2] * 2


# --- derivatives ---


@pytest.mark.parametrize("train", [SMALL, *SHAPES[3:5], SHAPES[8], SHAPES[9]], ids=str)
def test_first_and_second_derivatives(train):
    x, bias, *cores = inputs_of(train, 2, requires_grad=True)
    assert torch.autograd.gradcheck(layer(train), (x, bias, *cores), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer(train), (x, bias, *cores))


@pytest.mark.parametrize("kind", ["full", "core by core", "partial"])
def test_derivatives_of_every_kind_of_plan(kind):
    plan = next(p for p in plans(*SMALL, 2) if p.kind == kind)
    x, bias, *cores = inputs_of(SMALL, 2, requires_grad=True)
    assert torch.autograd.gradcheck(layer(SMALL, plan), (x, bias, *cores), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer(SMALL, plan), (x, bias, *cores))


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
@pytest.mark.parametrize("train", [*SHAPES[:3], SHAPES[6], ((4, 4, 4), (8, 8, 16), 5)], ids=str)
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
    kinds = {p.kind: p for p in plans(*train, 9)}
    for plan in (None, kinds["full"], kinds["core by core"]):
        x, bias, *cores = inputs_of(train, 3, 3, dtype=torch.float32, requires_grad=True)
        kept: list[torch.Tensor] = []

        def keep(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(train, plan)(x, bias, *cores)
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *cores)}
        assert sum(t.numel() for t in kept) == sum(t.numel() for t in (x, *cores))
        y.sum().backward()


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
@pytest.mark.parametrize("kind", ["pair", "full", "core by core", "partial"])
def test_compiles_as_one_graph(kind, gradients):
    """Traced without a break, for two numbers of tokens: values and gradients are those of eager mode."""
    plan = None if kind == "pair" else next(p for p in plans(*SMALL, 4) if p.kind == kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer(SMALL, plan), fullgraph=True, backend="aot_eager")
    for tokens in (4, 7):
        arguments = inputs_of(SMALL, tokens, requires_grad=gradients)
        found, expected = compiled(*arguments), layer(SMALL, plan)(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        if gradients:
            dy = normal(*found.shape, seed=3)
            pairs = zip(*(torch.autograd.grad(y, arguments, dy) for y in (found, expected)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


# --- autocast ---


@pytest.mark.parametrize("kind", ["pair", "full", "core by core"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, kind):
    """x in float32 or already narrow, cores and bias in float32: the output is bf16, gradients are float32 where the numbers are."""
    train = SHAPES[0]
    plan = next(p for p in plans(*train, 17) if p.kind == kind)
    x, bias, *cores = inputs_of(train, 17, dtype=torch.float32, requires_grad=True)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(train, plan)(x, bias, *cores)
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


# --- copies ---


def copies_of(train, copies, tokens, dtype=torch.float64):
    in_dims, out_dims, _ = train
    x = normal(copies, tokens, 2, math.prod(in_dims), dtype=dtype)
    return x, normal(copies, math.prod(out_dims), dtype=dtype, seed=2), make_cores(*train, dtype=dtype, lead=(copies,))


@settings(deadline=None, max_examples=80)
@given(
    train=trains(),
    copies=st.integers(1, 4),
    tokens=st.integers(0, 4),
    dtype=DTYPES,
    biased=st.booleans(),
    shared=st.booleans(),
)
def test_copies_equal_a_loop(train, copies, tokens, dtype, biased, shared):
    x, bias, cores = copies_of(train, copies, tokens, dtype)
    x = x[:1].expand_as(x) if shared else x
    dims = {"in_dims": train[0], "out_dims": train[1]}
    y = tt_linear_copies(x, cores, **dims, bias=bias if biased else None)
    assert y.shape == (copies, tokens, 2, math.prod(train[1]))
    assert y.dtype == dtype
    for p in range(copies):
        assert_equals_twin(y[p], x[p], [c[p] for c in cores], len(train[0]), bias[p] if biased else None)


@pytest.mark.parametrize("train", [SMALL, ((2, 2), (3, 3), 2)], ids=["bias added", "bias folded"])
@pytest.mark.parametrize("shared", [False, True])
def test_derivatives_of_copies(shared, train):
    """Also those of x before it was expanded."""
    x, bias, cores = copies_of(train, 3, 1)
    tensors = [(x[0] if shared else x).requires_grad_(), bias.requires_grad_(), *(c.requires_grad_() for c in cores)]

    def run(x, bias, *cores):
        x = x.expand(3, *x.shape) if shared else x
        return tt_linear_copies(x, cores, in_dims=train[0], out_dims=train[1], bias=bias)

    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_copies_of_single_tokens():
    """x (P, M): one token a copy."""
    x, bias, cores = copies_of(SMALL, 3, 1)
    y = tt_linear_copies(x[:, 0, 0], cores, in_dims=SMALL[0], out_dims=SMALL[1], bias=bias)
    expected = torch.stack([twin(x[p, 0, 0], [c[p] for c in cores], 2, bias[p]) for p in range(3)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_vmap_over_copies():
    x, bias, cores = copies_of(SMALL, 3, 2)
    run = lambda x: tt_linear_copies(x, cores, in_dims=SMALL[0], out_dims=SMALL[1], bias=bias)  # noqa: E731
    many = torch.stack([x, -x, x + 1])
    torch.testing.assert_close(torch.vmap(run)(many), torch.stack([run(m) for m in many]), rtol=1e-10, atol=1e-12)


def test_gradient_of_the_expanded_x_itself():
    x, _, cores = copies_of(SMALL, 3, 2)
    shared = x[:1].expand_as(x).requires_grad_()
    own = x[:1].repeat(3, 1, 1, 1).requires_grad_()
    found, expected = (
        torch.autograd.grad(tt_linear_copies(t, cores, in_dims=SMALL[0], out_dims=SMALL[1]).square().sum(), t)[0]
        for t in (shared, own)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_of_copies(shared):
    """As for one train: the output is of the autocast dtype, whatever the bias; merges are in float32."""
    u = 2.0**-10
    train = [torch.tensor([[[1 + u, 1]]]), torch.diag(torch.tensor([1 + u, 1 + 2 * u])).unsqueeze(1)]
    train += [torch.tensor([[[1.0]], [[-1.0]]]), torch.ones(1, 1, 1)]
    x = torch.ones(1, 1, 1).expand(2, 1, 1) if shared else torch.ones(2, 1, 1)
    cores = [core.expand(2, *core.shape) for core in train]
    with torch.autocast("cpu", torch.bfloat16):
        for bias in (None, torch.zeros(2, 1)):
            y = tt_linear_copies(x, cores, in_dims=(1, 1, 1), out_dims=(1,), bias=bias)
            assert y.dtype == torch.bfloat16
            assert y.flatten().tolist() == [u**2] * 2


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
    copies = [core.expand(3, *core.shape) for core in cores]
    with pytest.raises(ValueError, match=r"cores do not fit|core \d has shape|the last core|must all begin"):
        tt_linear_copies(torch.zeros(3, 5, math.prod(in_dims)), copies, in_dims=in_dims, out_dims=out_dims)


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


@pytest.mark.parametrize(
    ("x", "copies", "bias", "message"),
    [
        (torch.zeros(2, 5, 6), 3, None, "must all begin with the axis of copies"),
        (torch.zeros(6), 6, None, "must all begin with the axis of copies"),
        (torch.zeros(3, 5, 6), None, None, "must all begin with the axis of copies"),
        (torch.zeros(3, 5, 6), 3, torch.zeros(4), "must all begin with the axis of copies"),
        (torch.zeros(3, 5, 7), 3, None, "x ends in 7 features"),
        (torch.zeros(3, 5, 6), 3, torch.zeros(3, 5), r"bias has shape \(5,\)"),
        (torch.zeros(3, 5, 6).double(), 3, None, "cast one of them"),
    ],
)
def test_wrong_copies_are_refused(x, copies, bias, message):
    cores = [torch.zeros(s) if copies is None else torch.zeros(copies, *s) for s in core_shapes((2, 3), (4,), 3)]
    with pytest.raises(ValueError, match=message):
        tt_linear_copies(x, cores, in_dims=(2, 3), out_dims=(4,), bias=bias)


@pytest.mark.parametrize("biases", [1, 2])
def test_a_wrong_number_of_biases_is_refused(biases):
    cores = [torch.zeros(3, *s) for s in core_shapes((2, 3), (4,), 3)]
    with pytest.raises(ValueError, match="must all begin with the axis of copies"):
        tt_linear_copies(torch.zeros(3, 5, 6), cores, in_dims=(2, 3), out_dims=(4,), bias=torch.zeros(biases, 4))


def test_the_chosen_plan_is_run(monkeypatch):
    """The default is the plan for the number of tokens rounded up to a power of two, and a given plan is taken as it is."""
    seen = []
    monkeypatch.setattr("tt_kernels.linear.contract", lambda *a: seen.append(a[2]) or contract(*a))
    wide = ((4, 4), (4, 4), (4, 16, 4))
    x, bias, *cores = inputs_of(wide, 900)
    layer(wide)(x, bias, *cores)
    given = next(p for p in plans(*wide, 1024) if p.kind == "partial")
    layer(wide, given)(x, bias, *cores)
    best = min(plans(*wide, 1024), key=lambda p: p.seconds)
    assert seen == [best.groups if best.seconds < MARGIN * plans(*wide, 1024)[0].seconds else (2, 2), given.groups]
