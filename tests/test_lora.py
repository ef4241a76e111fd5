"""LoRA, LoRA-FA and DoRA: PEFT's numbers, the start, counts, and mistakes in sentences."""

from __future__ import annotations

import math
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_pairs import LINEAR, TARGETS, assert_trains_alike, close, pair, peft_quietly
from tiny_models import build, padded_batch, perturb
from torch import nn

from zo_opt import (
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    VeRAConfig,
    ZOError,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.adapters.weights import matrix
from zo_opt.models.precision import set_precision

KINDS = {"lora": LoRAConfig, "lora-fa": LoRAFAConfig, "dora": DoRAConfig}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


# --- PEFT ---


def lora_pair(name, kind, **options):
    targets = (LINEAR if kind == "lora-fa" else TARGETS)[name]
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=kind == "dora", **options)
    ours = KINDS[kind](rank=4, alpha=6, target_modules=targets, **options)
    model, theirs, same = pair(name, ours, theirs)
    if kind == "lora-fa":
        for n, p in theirs.named_parameters():
            if "lora_A" in n:
                p.requires_grad_(False)
    return model, theirs, same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETS)
def test_forward_gradients_and_20_steps_of_adamw_are_pefts(name, kind):
    assert_trains_alike(name, *lora_pair(name, kind))


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_scalings_are_pefts(kind, options):
    model, theirs, _ = lora_pair("llama", kind, **options)
    close(logits(model, padded_batch("llama")), logits(theirs, padded_batch("llama")))


@pytest.mark.parametrize("name", TARGETS)
def test_dora_starts_at_pefts_magnitudes(name):
    with peft_quietly():
        config = peft.LoraConfig(r=4, target_modules=TARGETS[name], use_dora=True)
        theirs = dict(peft.get_peft_model(build(name), config).named_parameters())
    model = get_adapter_model(build(name), DoRAConfig(rank=4, target_modules=TARGETS[name]))
    for path, module in model.adapted_modules().items():
        expected = theirs[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
        close(module.adapter.lora_magnitude_vector.detach(), expected.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETS)
def test_merged_weights_are_pefts(name, kind):
    """And with them the function; fp32 rounding."""
    model, theirs, _ = lora_pair(name, kind)
    with peft_quietly():
        merged = dict(theirs.merge_and_unload().named_parameters())
    adapted = model.adapted
    plain = dict(model.merge_and_unload().named_parameters())
    for path in adapted:
        close(plain[f"{path}.weight"].detach(), merged[f"{path}.weight"].detach(), path)


# --- the start ---


def start(config, layer):
    return get_adapter_model(nn.Sequential(layer), replace(config, target_modules=["0"])).adapted_modules()["0"].adapter


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_a_is_uniform_within_its_bound_and_b_zero(inputs, outputs, rank, seed):
    adapter = start(LoRAConfig(rank=rank, seed=seed), nn.Linear(inputs, outputs))
    assert adapter.lora_A.shape == (rank, inputs)
    assert adapter.lora_B.shape == (outputs, rank)
    assert adapter.lora_A.abs().max() <= 1 / math.sqrt(inputs)
    assert not adapter.lora_B.any()


def test_a_has_the_variance_of_kaiming_uniform():
    """a = sqrt(5): variance 1 / (3 in). Its estimate over n = 64,000 uniform numbers has a relative deviation of sqrt(0.8 / n)."""
    a = start(LoRAConfig(rank=64), nn.Linear(1000, 10)).lora_A.detach().double()
    assert abs(float(a.square().mean()) * 3 * 1000 - 1) < 5 * math.sqrt(0.8 / a.numel())
    assert abs(float(a.mean())) < 5 / math.sqrt(3 * 1000 * a.numel())


def test_embeddings_start_with_a_at_zero():
    adapter = start(LoRAConfig(rank=8), nn.Embedding(500, 64))
    assert adapter.lora_A.shape == (8, 500)
    assert not adapter.lora_A.any()
    assert abs(float(adapter.lora_B.detach().square().mean()) - 1) < 5 * math.sqrt(2 / 512)


@pytest.mark.parametrize("kind", [LoRAConfig, DoRAConfig])
def test_padding_is_not_trained(kind):
    """As in PEFT and in nn.Embedding itself: the row of the padding token gets no gradient."""
    base = nn.Sequential(nn.Embedding(7, 5, padding_idx=2))
    model = get_adapter_model(base, kind(rank=3, target_modules=["0"]))
    model(torch.tensor([1, 2, 3])).sum().backward()
    grad = model.adapted_modules()["0"].adapter.lora_A.grad
    assert grad[:, [1, 3]].all()
    assert not grad[:, 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_from_the_seed_alone(kind):
    """Every target has a stream of its own; the global state is neither used nor changed."""

    def factors(seed):
        model = get_adapter_model(build("llama"), KINDS[kind](rank=4, seed=seed, target_modules=["q_proj"]))
        return [m.adapter.lora_A.detach().clone() for m in model.adapted_modules().values()]

    before = torch.get_rng_state()
    first = factors(0)
    torch.manual_seed(17)
    again, other = factors(0), factors(1)
    torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# --- LoRA-FA and DoRA themselves ---


def test_lora_fa_keeps_no_input_for_the_backward():
    """Only A x, of rank numbers a token (the input is a leaf that needs no gradient)."""
    layer = get_adapter_model(nn.Sequential(nn.Linear(50, 30)), LoRAFAConfig(rank=4, target_modules=["0"])).wrapped[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(7, 50, generator=torch.Generator().manual_seed(0)))
    assert (7, 4) in kept
    assert not any(50 in shape and 7 in shape for shape in kept)


def test_dora_is_the_papers_equation():
    """W = m (W0 + s B A) / ||.||, in float64, norms over the inputs of each output."""
    layer = nn.Linear(9, 5)
    perturb(layer.parameters(), std=1.0)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    model = get_adapter_model(nn.Sequential(layer), DoRAConfig(rank=2, alpha=6, target_modules=["0"]))
    perturb(trainable_parameters(model))
    own = model.adapted_modules()["0"].adapter
    a, b, m = (p.detach().double() for p in (own.lora_A, own.lora_B, own.lora_magnitude_vector))
    v = layer.weight.detach().double() + 6 / 2 * b @ a
    expected = x.double() @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T + layer.bias.detach().double()
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=1e-5)


def test_outputs_whose_weights_are_zero_stay_finite():
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight[1:3])
    x = torch.ones(2, 6)
    before = layer(x).detach()
    model = get_adapter_model(nn.Sequential(layer), DoRAConfig(rank=2, target_modules=["0"]))
    assert torch.equal(model(x).detach(), before)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(model))
    assert matrix(model.merge_and_unload()[0]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_bases_add_in_float32(kind):
    """The base rounds to bf16, the update and the sum do not: two roundings (2^-8 each) from the exact result."""
    base = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16)
    model = get_adapter_model(base, KINDS[kind](rank=2, target_modules=["0"]))
    perturb(trainable_parameters(model))
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = model(x)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        wide = nn.Sequential(nn.Linear(16, 16))
        wide.load_state_dict({k: v.float() for k, v in model.unload().state_dict().items()})
    exact = get_adapter_model(wide, KINDS[kind](rank=2, target_modules=["0"]))
    perturb(trainable_parameters(exact))
    torch.testing.assert_close(out.float(), exact(x.float()), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    "config",
    [*(kind(rank=4) for kind in KINDS.values()), VeRAConfig(rank=8, d_initial=1.0)],
    ids=lambda c: c.adapter_type,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mixed_bases(name, config):
    """bf16 matrix products within fp32: an exact identity at the start, then fp32's logits to 3e-2 of the largest, merged ones too."""
    base, batch = build(name), padded_batch(name)
    set_precision(base, "mixed", torch.device("cpu"))
    before = logits(base, batch)
    model, exact = get_adapter_model(base, config), get_adapter_model(build(name), config)
    assert torch.equal(logits(model, batch), before)
    for each in (model, exact):
        perturb(trainable_parameters(each))
    expected = logits(exact, batch)
    assert not torch.allclose(expected, before, rtol=0, atol=0.1 * float(expected.abs().max()))
    assert logits(model, batch).dtype == torch.float32
    near = {"rtol": 0, "atol": 3e-2 * float(expected.abs().max())}
    torch.testing.assert_close(logits(model, batch), expected, **near)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, **near)


# --- files, counts, mistakes ---


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_are_saved(tmp_path, kind):
    options = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3.0}, "use_rslora": True}
    model = get_adapter_model(build("llama"), KINDS[kind](rank=4, **options))
    perturb(trainable_parameters(model))
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("llama"), tmp_path)
    assert again.adapter_config == model.adapter_config
    assert torch.equal(logits(again, padded_batch("llama")), logits(model, padded_batch("llama")))


LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
DEBERTA = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 128100}
DEBERTA_LINEARS = [
    "query_proj",
    "key_proj",
    "value_proj",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


@pytest.mark.parametrize(
    ("shape", "config", "count"),
    [
        (transformers.LlamaConfig(**LLAMA), LoRAConfig(rank=8), 4_194_304),
        (transformers.LlamaConfig(**LLAMA), LoRAConfig(rank=16, target_modules=SEVEN), 39_976_960),
        (transformers.LlamaConfig(**LLAMA), LoRAConfig(rank=64, target_modules=SEVEN), 159_907_840),
        (transformers.LlamaConfig(**LLAMA), LoRAFAConfig(rank=64, target_modules=SEVEN), 87_031_808),
        (transformers.LlamaConfig(**LLAMA), DoRAConfig(rank=8), 4_194_304 + 64 * 4096),
        (transformers.DebertaV2Config(**DEBERTA), LoRAConfig(rank=8, target_modules=DEBERTA_LINEARS), 1_327_104),
    ],
    ids=["llama r8", "llama all r16", "llama all r64", "llama fa r64", "llama dora r8", "deberta r8"],
)
def test_counts(shape, config, count):
    with torch.device("meta"):
        model = get_adapter_model(transformers.AutoModel.from_config(shape), config)
    assert sum(p.numel() for p in trainable_parameters(model)) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"use_rslora": 1}, "use_rslora=1"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.*q_proj.*-1"),
        ({"alpha_pattern": {"o_proj": 2}}, "'o_proj'.*no adapted module"),
    ],
)
def test_mistakes(kind, options, sentence):
    with pytest.raises(ZOError, match=sentence):
        get_adapter_model(build("llama"), KINDS[kind](**options))


def test_lora_fa_has_no_embeddings():
    with pytest.raises(ZOError, match="Embedding"):
        get_adapter_model(build("llama"), LoRAFAConfig(target_modules=["embed_tokens"]))
