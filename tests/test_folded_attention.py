"""Fused attention under vmap gives each copy's attention, and is in nobody's way outside."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zo_opt.queries.folded_attention import folded_attention

COPIES, BATCH, HEADS, LENGTH, KEYS, WIDTH = 3, 2, 4, 5, 7, 6
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unfused(query, key, value, mask=None, is_causal=False, scale=None):
    """softmax(scale Q K^T + mask) V in float64; keys are repeated for grouped queries."""
    query, key, value = (x.double() for x in (query, key, value))
    groups = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ value


def check(inputs, dims, mask=None, mask_dim=None, *, options=None, copies=COPIES, dtype=torch.float32):
    """Folded equals a loop over copies of the fused kernel, and the formula."""
    options = options or {}
    plain = {k: v for k, v in options.items() if k != "enable_gqa"}
    tensors, axes = [*inputs, *([] if mask is None else [mask])], [*dims, *([] if mask is None else [mask_dim])]

    def attend(*x):
        return F.scaled_dot_product_attention(*x, **options)

    with folded_attention():
        found = vmap(attend, in_dims=tuple(axes))(*tensors)
    each = [
        [t if axis is None else t.select(axis, i) for t, axis in zip(tensors, axes, strict=True)] for i in range(copies)
    ]
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, torch.stack([attend(*x) for x in each]), rtol=tolerance, atol=tolerance)
    expected = torch.stack([unfused(*x, **plain) for x in each])
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def inputs(dtype=torch.float32):
    """Queries of all copies; keys and values of each copy."""
    return [
        draw(COPIES, BATCH, HEADS, LENGTH, WIDTH, dtype=dtype),
        draw(COPIES, BATCH, HEADS, KEYS, WIDTH, seed=1, dtype=dtype),
        draw(COPIES, BATCH, HEADS, KEYS, WIDTH, seed=2, dtype=dtype),
    ]


SHAPES = {
    "2-d": (LENGTH, KEYS),
    "3-d": (HEADS, LENGTH, KEYS),
    "4-d": (BATCH, HEADS, LENGTH, KEYS),
    "batch 1": (1, 1, LENGTH, KEYS),
    "heads 1": (BATCH, 1, LENGTH, KEYS),
    "a row for all queries": (BATCH, 1, 1, KEYS),
}


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("per_copy", [False, True], ids=["shared", "per copy"])
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 0, 0)], ids=["all", "query", "key and value"])
def test_masks(kind, shape, per_copy, dims):
    mask = draw(*((COPIES, *shape) if per_copy else shape), seed=3)
    mask = mask if kind == "float" else (mask > -0.5).logical_or(torch.arange(KEYS) == 0)  # no row without a key
    tensors = [x if dim == 0 else x[0] for x, dim in zip(inputs(), dims, strict=True)]
    check(tensors, dims, mask, 0 if per_copy else None)


def test_a_mask_alone_differs_between_copies():
    check([x[0] for x in inputs()], (None, None, None), draw(COPIES, LENGTH, KEYS, seed=3), 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2.0}])
def test_options(options, dtype):
    check(inputs(dtype), (0, 0, 0), options=options, dtype=dtype)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries(shared, masked):
    query, key, value = inputs()
    key, value = key[:, :, :2], value[:, :, :2]
    dims = (0, None, None) if shared else (0, 0, 0)
    if shared:
        key, value = key[0], value[0]
    mask = draw(BATCH, 1, LENGTH, KEYS, seed=3) if masked else None
    check([query, key, value], dims, mask, options={"enable_gqa": True})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sizes_and_axes(data):
    size = st.integers(1, 9)
    copies, batch, heads, length, keys, width = (data.draw(size) for _ in range(6))
    dims = data.draw(
        st.tuples(*[st.sampled_from([None, *range(5)])] * 3).filter(lambda d: any(x is not None for x in d))
    )
    shapes = [(batch, heads, n, width) for n in (length, keys, keys)]
    tensors = []
    for number, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        full = list(shape)
        if dim is not None:
            full.insert(dim, copies)
        tensors.append(draw(*full, seed=number, dtype=torch.float64))
    options = {"is_causal": data.draw(st.booleans())}
    check(tensors, dims, options=options, copies=copies, dtype=torch.float64)


@pytest.mark.parametrize("axes", [3, 5])
def test_inputs_of_other_ranks_are_left_to_torch(axes):
    tensors = [x.flatten(1, 2) if axes == 3 else x.unsqueeze(2) for x in inputs()]
    assert tensors[0].ndim == axes + 1
    check(tensors, (0, 0, 0))


def test_nested_copies():
    query, key, value = inputs()
    outer = draw(2, 1, 1, 1, 1, 1, seed=4)

    def attend(factor, q):
        return vmap(lambda x, k: F.scaled_dot_product_attention(x * factor, k, value[0]))(q, key)

    with folded_attention():
        found = vmap(attend, in_dims=(0, None))(outer[:, 0, 0], query)
    expected = torch.stack(
        [
            torch.stack([F.scaled_dot_product_attention(q * f, k, value[0]) for q, k in zip(query, key, strict=True)])
            for f in outer.flatten()
        ]
    )
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_names_of_arguments():
    query, key, value = (x[0] for x in inputs())
    with folded_attention():
        found = vmap(lambda q: F.scaled_dot_product_attention(query=q, key=key, value=value, attn_mask=None))(
            inputs()[0]
        )
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(query, key, value), rtol=2e-6, atol=2e-6)


def test_without_copies_the_bits_are_torchs():
    query, key, value = (x[0] for x in inputs())
    mask = draw(LENGTH, KEYS, seed=3)
    with folded_attention():
        found = F.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, value, mask))


class Kernels(TorchDispatchMode):
    """Counts the fused kernel's calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return func(*args, **(kwargs or {}))


def test_one_kernel_for_all_copies_inside_of_the_context_alone():
    """After it, and after an exception in it, vmap is torch's own: a kernel for each copy, and a warning."""
    with Kernels() as kernels, folded_attention():
        vmap(F.scaled_dot_product_attention)(*inputs())
    assert kernels.calls == 1
    with pytest.raises(ZeroDivisionError), folded_attention():
        vmap(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * (1 // 0))(*inputs())
    with Kernels() as kernels, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vmap(F.scaled_dot_product_attention)(*inputs())
    assert kernels.calls == COPIES


def test_an_error_is_torchs_own():
    query, key, value = inputs()
    with pytest.raises(RuntimeError), folded_attention():
        vmap(F.scaled_dot_product_attention)(query, key[..., :3], value)
    check(inputs(), (0, 0, 0))  # and nothing is left of it


@pytest.mark.parametrize("which", [0, 1], ids=["query", "key and value"])
def test_one_row_for_a_batch(which):
    tensors = [x[:, :1] if (number == 0) == (which == 0) else x for number, x in enumerate(inputs())]
    check(tensors, (0, 0, 0))


def test_torchs_own_attention_module():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = draw(COPIES, BATCH, LENGTH, 8)

    def attend(x):
        return attention(x, x, x, need_weights=False)[0]

    with Kernels() as kernels, folded_attention():
        found = vmap(attend)(x)
    assert kernels.calls == 1
    torch.testing.assert_close(found, torch.stack([attend(each) for each in x]), rtol=1e-5, atol=1e-6)
