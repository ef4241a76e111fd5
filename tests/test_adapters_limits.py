"""What adapters refuse in one sentence, and functions that must not change where it would be easy to miss."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import nn
from transformers import UMT5Config, UMT5ForConditionalGeneration

from zo_opt import LoRAConfig, TTConfig, TTLoRAConfig, ZOError, get_adapter_model
from zo_opt.adapters.tt import TTAdapter

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_fresh_adapter_is_an_identity_under_autocast_too(dtype, autocast):
    adapter = TTAdapter(TTConfig(rank=2, bottleneck=4), 8, rank=2, seed=0, device=CPU)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(adapter(x), x)


def test_a_float64_weight_is_merged_in_float64():
    layer = nn.Linear(8, 8, dtype=torch.float64)
    before = layer.weight.detach().clone()
    plain = get_adapter_model(nn.Sequential(layer), TTLoRAConfig(rank=2, target_modules=["0"])).merge_and_unload()
    assert torch.equal(plain[0].weight, before)  # the start adds nothing


@torch.no_grad()
def test_merging_a_tied_head_of_an_encoder_decoder_that_scales_its_logits():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "num_layers": 2}
    base = UMT5ForConditionalGeneration(UMT5Config(**sizes, tie_word_embeddings=True, decoder_start_token_id=0)).eval()
    model = get_adapter_model(base, TTLoRAConfig(rank=3, target_modules=["lm_head"]))
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    batch = {"input_ids": torch.arange(6).view(1, 6), "decoder_input_ids": torch.arange(4).view(1, 4)}
    expected = model(**batch).logits
    assert torch.allclose(model.merge_and_unload()(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "config", [TTLoRAConfig(target_modules=["residual"]), TTConfig(modules_to_tensorize=["residual"])]
)
def test_a_whole_layer_has_no_weight(config):
    with pytest.raises(ZOError, match="no layer with a weight"):
        get_adapter_model(build("llama"), config)


def test_a_target_that_layers_leave_out_is_named():
    with pytest.raises(ZOError, match="nothing of target module 'embed_tokens'"):
        get_adapter_model(build("llama"), LoRAConfig(target_modules=["embed_tokens", "q_proj"], layers=1))


@pytest.mark.parametrize(("options", "message"), [
    ({"activation": ["tanh"]}, "activation="), ({"seed": "a"}, "seed="), ({"seed": 1.5}, "seed="), ({"seed": 1 << 60}, "seed="),
    ({"seed": -1}, "seed="), ({"bias": "no"}, "bias="),
])  # fmt: skip
def test_wrong_options(options, message):
    with pytest.raises(ZOError, match=message):
        TTConfig(**options)


def test_a_module_without_parameters_is_not_saved_and_nothing_is_frozen():
    model = build("llama")
    with pytest.raises(ZOError, match="no parameters"):
        get_adapter_model(model, TTLoRAConfig(modules_to_save=["act_fn"]))
    assert all(p.requires_grad for p in model.parameters())


def test_a_target_within_a_module_that_is_trained_whole():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    with pytest.raises(ZOError, match="within modules_to_save"):
        get_adapter_model(net, TTLoRAConfig(rank=2, target_modules=["1.0"], modules_to_save=["1"]))
