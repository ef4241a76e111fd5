"""VeRA: PEFT's numbers, one pair of factors for all layers, files that depend on no generator."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
import transformers
from peft_pairs import LINEAR, assert_trains_alike, close, pair, peft_quietly
from safetensors.torch import load_file
from tiny_models import build, padded_batch, perturb

from zo_opt import VeRAConfig, ZOError, get_adapter_model, load_adapter_model, trainable_parameters


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def vera_pair(name):
    """PEFT keeps A and B outside of the layers."""
    targets = LINEAR[name]
    theirs = peft.VeraConfig(r=5, target_modules=targets, d_initial=0.3, save_projection=True)
    model, theirs, same = pair(name, VeRAConfig(rank=5, target_modules=targets, d_initial=0.3), theirs)
    first = next(iter(model.adapted_modules().values())).adapter
    with torch.no_grad():
        first.vera_A.copy_(theirs.base_model.vera_A["default"])
        first.vera_B.copy_(theirs.base_model.vera_B["default"])
    return model, theirs, [(n, p, q) for n, p, q in same if q.requires_grad]


@pytest.mark.parametrize("name", LINEAR)
def test_forward_gradients_and_20_steps_of_adamw_are_pefts(name):
    assert_trains_alike(name, *vera_pair(name))


@pytest.mark.parametrize("name", LINEAR)
def test_merged_weights_are_pefts(name):
    model, theirs, _ = vera_pair(name)
    with peft_quietly():
        merged = dict(theirs.merge_and_unload().named_parameters())
    adapted = model.adapted
    plain = dict(model.merge_and_unload().named_parameters())
    for path in adapted:
        close(plain[f"{path}.weight"].detach(), merged[f"{path}.weight"].detach(), path)


def test_one_pair_of_factors_for_all_layers():
    """Sized by the largest target, also in a copy of the model; the smaller ones use its first rows and columns."""
    model = get_adapter_model(build("llama"), VeRAConfig(rank=6, target_modules=["v_proj", "up_proj", "down_proj"]))
    for each in (model, copy.deepcopy(model)):
        adapters = [m.adapter for m in each.adapted_modules().values()]
        assert len({id(a.vera_A) for a in adapters}) == len({id(a.vera_B) for a in adapters}) == 1
    a, b = adapters[0].vera_A, adapters[0].vera_B
    assert (a.shape, b.shape) == ((6, 48), (48, 6))
    assert not (a.requires_grad or b.requires_grad)
    value = model.adapted_modules()["model.layers.0.self_attn.v_proj"].adapter  # 32 to 16
    perturb(value.parameters())
    expected = (value.vera_lambda_b[:, None] * value.vera_B[:16]) @ (
        value.vera_lambda_d[:, None] * value.vera_A[:, :32]
    )
    torch.testing.assert_close(value.dense(), expected.T, rtol=0, atol=1e-6)


def test_factors_are_kaiming_uniform():
    """Variance 2 / columns; its estimate over n uniform numbers has a relative deviation of sqrt(0.8 / n)."""
    model = get_adapter_model(build("llama"), VeRAConfig(rank=300))
    adapter = next(iter(model.adapted_modules().values())).adapter
    for factor in (adapter.vera_A.double(), adapter.vera_B.double()):
        columns = factor.shape[1]
        assert factor.abs().max() <= math.sqrt(6 / columns)
        assert abs(float(factor.square().mean()) * columns / 2 - 1) < 5 * math.sqrt(0.8 / factor.numel())
    assert not torch.equal(adapter.vera_A, adapter.vera_B.T)


def test_files_hold_the_factors_once(tmp_path):
    """So that another seed, or another generator, does not matter for loading."""
    model, batch = get_adapter_model(build("llama"), VeRAConfig(rank=6, seed=3)), padded_batch("llama")
    perturb(trainable_parameters(model))
    model.save_pretrained(tmp_path)
    names = [n for n in load_file(tmp_path / "adapter_model.safetensors") if "lambda" not in n]
    assert sorted(n.rpartition(".")[2] for n in names) == ["vera_A", "vera_B"]
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    assert torch.equal(logits(load_adapter_model(build("llama"), tmp_path), batch), logits(model, batch))


def test_a_smaller_rank_uses_the_first_rows():
    config = VeRAConfig(rank=3, rank_pattern={"v_proj": 5})
    adapters = {n: m.adapter for n, m in get_adapter_model(build("llama"), config).adapted_modules().items()}
    for name, adapter in adapters.items():
        rank = 5 if name.endswith("v_proj") else 3
        assert (adapter.vera_A.shape[0], len(adapter.vera_lambda_d)) == (5, rank)


@pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [
        ({"hidden_size": 768, "num_hidden_layers": 12}, 1024, 43_008),
        ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 256, 61_440),
    ],
    ids=["roberta-base", "roberta-large"],
)
def test_counts(shape, rank, count):
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(transformers.RobertaConfig(**shape))
        model = get_adapter_model(base, VeRAConfig(rank=rank))
    assert sum(p.numel() for p in trainable_parameters(model)) == count


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank=0"),
        ({"d_initial": 0}, "d_initial=0"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        get_adapter_model(build("llama"), VeRAConfig(**options))
