"""LoRA+: who gets which learning rate, in our models and PEFT's, under first- and zeroth-order optimizers."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft_pairs import peft_quietly
from tiny_models import build, padded_batch

from zo_opt import (
    AdaLoRAConfig,
    AdaZeta,
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    MeZO,
    TTConfig,
    TTLoRAConfig,
    VeRAConfig,
    ZOError,
    get_adapter_model,
    lora_plus_groups,
    trainable_parameters,
)

LR, RATIO, EMBEDDING = 1e-3, 8.0, 1e-5


def rates(model, **options):
    """Name -> (lr, weight decay); every trainable is in one group."""
    groups = lora_plus_groups(model, LR, RATIO, EMBEDDING, **options)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in groups)
    assert of.keys() == {id(p) for p in trainable_parameters(model)}
    return {n: of[id(p)] for n, p in model.named_parameters() if id(p) in of}


def by_part(model, **options):
    return {(n.split(".")[-1], rate) for n, (rate, _) in rates(model, **options).items()}


def test_lora():
    model = get_adapter_model(build("llama"), LoRAConfig(rank=2, target_modules=["q_proj", "embed_tokens"]))
    found = rates(model)
    for name, (rate, _) in found.items():
        assert rate == (EMBEDDING if "embed_tokens" in name else LR * RATIO if "lora_B" in name else LR), name
    assert len({rate for rate, _ in found.values()}) == 3


def test_other_methods():
    def build_with(config):
        return get_adapter_model(build("llama"), config)

    fast = LR * RATIO
    assert by_part(build_with(LoRAFAConfig())) == {("lora_B", fast)}
    assert by_part(build_with(DoRAConfig())) == {("lora_A", LR), ("lora_B", fast), ("lora_magnitude_vector", fast)}
    assert by_part(build_with(VeRAConfig(rank=4))) == {("vera_lambda_d", fast), ("vera_lambda_b", fast)}
    assert by_part(build_with(AdaLoRAConfig())) == {("lora_A", LR), ("lora_B", fast), ("lora_E", LR)}


def test_a_head_trained_whole_and_decay():
    model = get_adapter_model(build("bert"), LoRAConfig(rank=2, modules_to_save=["classifier"]))
    found = rates(model, weight_decay=0.1)
    assert found["wrapped.classifier.weight"] == (LR, 0.1)
    assert found["wrapped.classifier.bias"] == (LR * RATIO, 0.0)
    assert {decay for n, (_, decay) in found.items() if "lora" in n} == {0.1}


@pytest.mark.parametrize("dora", [False, True])
def test_rates_are_pefts(dora):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=dora)
    with peft_quietly():
        model = peft.get_peft_model(build("llama"), config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=EMBEDDING
    )
    expected = {id(p): g["lr"] for g in theirs.param_groups for p in g["params"]}
    found = rates(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (dora and "embed_tokens" in name and parameter.ndim == 1):
            assert found[name][0] == expected[id(parameter)], name
    # PEFT gives magnitudes of an embedding the ratio, by the depth of their name; here they are part of its adapter.


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, MeZO, AdaZeta])
def test_any_optimizer(make):
    """B moves under each; under zeroth-order SGD the ratio times as far as A."""
    model, batch = get_adapter_model(build("llama"), LoRAConfig(rank=2)), padded_batch("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make(lora_plus_groups(model, LR, RATIO))
    if make in (MeZO, AdaZeta):
        optimizer.step(lambda: model(**batch).loss)
    else:
        model(**batch).loss.backward()
        optimizer.step()
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}
    assert all(change.any() for n, change in moved.items() if "lora_B" in n)
    if make is MeZO:
        sizes = {x: torch.cat([c.flatten() for n, c in moved.items() if x in n]).std() for x in ("lora_A", "lora_B")}
        assert float(sizes["lora_B"] / sizes["lora_A"]) == pytest.approx(
            RATIO, rel=0.5
        )  # of a few hundred Gaussians each


@pytest.mark.parametrize(
    "config", [TTLoRAConfig(), TTConfig(rank=2, bottleneck=4), LoRAConfig(target_modules=["embed_tokens"])]
)
def test_a_model_without_b_is_refused(config):
    with pytest.raises(ZOError, match=r"lora_B.*trains none"):
        lora_plus_groups(get_adapter_model(build("llama"), config), LR)


def test_a_whole_model_is_refused():
    with pytest.raises(ZOError, match="lora_B"):
        lora_plus_groups(build("llama"), LR)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0}, {"ratio": 0}, {"ratio": -1}, {"ratio": float("nan")}, {"lr_embedding": 0}, {"weight_decay": -0.1}],
)
def test_impossible_numbers(options):
    model = get_adapter_model(build("llama"), LoRAConfig())
    with pytest.raises(ZOError, match=next(iter(options))):
        lora_plus_groups(model, **{"lr": LR} | options)
