"""The bottleneck adapter: the equation, the places of the tensor-train adapter, the published count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build, perturb
from torch import nn

from zo_opt import BottleneckConfig, TTConfig, ZOError, get_adapter_model, trainable_parameters

ACTIVATIONS = {"tanh": torch.tanh, "gelu": nn.GELU(), "relu": torch.relu, "identity": nn.Identity()}


@given(
    size=st.integers(1, 9),
    bottleneck=st.integers(1, 7),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
)
def test_the_equation(size, bottleneck, activation, bias):
    """x + W_up act(W_down x + b_down) + b_up in float64, to 1e-5 in fp32; 2md + d + m parameters (arXiv 1902.00751, section 2.1)."""
    layer = nn.Linear(5, size)
    config = BottleneckConfig(bottleneck=bottleneck, activation=activation, bias=bias, target_modules=["0"])
    model = get_adapter_model(nn.Sequential(layer), config)
    trained = trainable_parameters(model)
    assert sum(p.numel() for p in trained) == 2 * bottleneck * size + bias * (size + bottleneck)
    perturb(trained, std=0.5)
    x = torch.linspace(-1, 1, 15).view(3, 5)
    net = model.wrapped[0].adapter
    h = layer(x).double()
    down, up = (part.double() for part in (net.down.weight, net.up.weight))
    b_down, b_up = (part.bias.double() if bias else 0.0 for part in (net.down, net.up))
    expected = h + ACTIVATIONS[activation](h @ down.T + b_down) @ up.T + b_up
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "opt", "gpt2", "t5", "bart"])
def test_it_sits_where_the_tensor_train_adapter_sits(name):
    dense = get_adapter_model(build(name), BottleneckConfig(bottleneck=4)).adapted_modules()
    train = get_adapter_model(build(name), TTConfig(bottleneck=4)).adapted_modules()
    assert {n: m.position for n, m in dense.items()} == {n: m.position for n, m in train.items()}


def test_the_residual_stream():
    model = get_adapter_model(build("llama"), BottleneckConfig(bottleneck=4, target_modules=["residual"], layers=1))
    assert [(n, m.position) for n, m in model.adapted_modules().items()] == [("model.layers.1", "before")]


def test_the_start():
    """down of variance 1 / size within 10 % over 32,768 draws (7 standard deviations are 5.5 %), up and biases zero."""
    model = get_adapter_model(nn.Sequential(nn.Linear(4, 512)), BottleneckConfig(target_modules=["0"]))
    adapter = model.wrapped[0].adapter
    assert adapter.down.weight.shape == (64, 512)
    assert 512 * float(adapter.down.weight.detach().var()) == pytest.approx(1, rel=0.1)
    assert not any(p.any() for p in (adapter.up.weight, adapter.up.bias, adapter.down.bias))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bottleneck": 0}, "bottleneck=0"),
        ({"activation": "swish"}, "'swish'.*gelu"),
        ({"bias": 1}, "bias=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_values(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        BottleneckConfig(**options)


def test_it_cannot_be_merged():
    model = get_adapter_model(build("llama"), BottleneckConfig(bottleneck=4))
    with pytest.raises(ZOError, match="nonlinearity"):
        model.merge_and_unload()
