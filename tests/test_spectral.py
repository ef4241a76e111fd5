"""Spectral gains: each gain multiplies one singular value of the pretrained weight."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build
from torch import nn

from zo_opt import SpectralConfig, ZOError, get_adapter_model, trainable_parameters


@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_gains_multiply_singular_values(n_in, n_out, rank, seed):
    """Oracle: U diag(s (1 + g)) V^T in float64 from torch's SVD of the weight; 1e-4 in fp32."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n_in, n_out)
    layer.weight.data = torch.randn(n_out, n_in, generator=generator)
    w = layer.weight.detach().double()
    model = get_adapter_model(nn.Sequential(layer), SpectralConfig(rank=rank, target_modules=["0"]))
    (gains,) = trainable_parameters(model)
    assert gains.shape == (min(rank, n_in, n_out),)
    gains.data = torch.randn(gains.shape, generator=generator)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    s[: len(gains)] *= 1 + gains.detach().double()
    x = torch.randn(3, n_in, generator=generator)
    expected = x.double() @ (u * s @ vt).T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_gain_of_minus_one_removes_the_singular_value():
    model = get_adapter_model(build("llama"), SpectralConfig(rank=2, target_modules=["q_proj"], layers=1))
    weight = model.wrapped.model.layers[1].self_attn.q_proj.base_layer.weight.detach().clone()
    with torch.no_grad():
        trainable_parameters(model)[0].fill_(-1)
    merged = model.merge_and_unload().model.layers[1].self_attn.q_proj.weight
    s, left = torch.linalg.svdvals(weight), torch.linalg.svdvals(merged)
    torch.testing.assert_close(left[:-2], s[2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left[-2:], torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "matrices"), [("llama", 7), ("bert", 6), ("deberta-v2", 8), ("gpt2", 4), ("opt", 6), ("bart", 16)]
)
def test_every_linear_layer_of_the_layers_by_default(name, matrices):
    """bart: 6 in the encoder, 10 in the decoder; deberta-v2: two more for positions. No embedding, pooler or head."""
    model = get_adapter_model(build(name), SpectralConfig(rank=2))
    assert len(model.adapted) == matrices * 2
    last = get_adapter_model(build(name), SpectralConfig(rank=2, layers=1))
    assert len(last.adapted) == matrices


def test_896_parameters_on_smollm2():
    shape = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = get_adapter_model(transformers.LlamaForCausalLM(shape), SpectralConfig(layers=8))
    assert sum(p.numel() for p in trainable_parameters(model)) == 7 * 8 * 16 == 896


def test_a_model_without_numbered_layers_needs_names():
    with pytest.raises(ZOError, match="target_modules"):
        get_adapter_model(nn.Sequential(nn.Linear(3, 3)), SpectralConfig())
