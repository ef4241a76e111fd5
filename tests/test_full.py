"""Full fine-tuning through the adapters' frame: the model's own parameters, trained where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build, padded_batch
from torch import nn

from zo_opt import FullConfig, MeZO, ZOError, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.schedules import constant_queries


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def adamw_steps(model, parameters, batch, steps=3):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_it_is_training_the_model(name, tmp_path):
    """To the bit that of torch alone; files, unload and merge hold what was learned, and tied weights stay tied."""
    base, batch = build(name), padded_batch(name)
    plain = copy.deepcopy(base)
    adamw_steps(plain, plain.parameters(), batch)
    model = get_adapter_model(base, FullConfig())
    assert len(trainable_parameters(model)) == len(list(plain.parameters()))
    adamw_steps(model, trainable_parameters(model), batch)
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build(name), tmp_path)
    assert torch.equal(logits(again, batch), logits(plain, batch))
    merged = model.merge_and_unload()
    assert merged is base
    assert same(weights(merged), weights(plain))
    tied = {"gpt2": True, "bart": True, "llama": False}[name]
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"layers": 1}, lambda n: n.startswith("model.layers.1.")),
        ({"layers": [0]}, lambda n: n.startswith("model.layers.0.")),
        ({"target_modules": ["mlp", "input_layernorm"]}, lambda n: ".mlp." in n or ".input_layernorm." in n),
        ({"target_modules": ["q_proj"], "layers": 1}, lambda n: n == "model.layers.1.self_attn.q_proj.weight"),
        ({"target_modules": ["model.norm", "lm_head"]}, lambda n: n in {"model.norm.weight", "lm_head.weight"}),
    ],
)
def test_parts_of_the_model(options, chosen):
    base = build("llama")
    before, batch = weights(base), padded_batch("llama")
    model = get_adapter_model(base, FullConfig(**options))
    assert set(model.trained) == {n for n in before if chosen(n)}
    adamw_steps(model, trainable_parameters(model), batch)
    after = weights(model.unload())
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(filter(chosen, before))


def test_the_head_of_a_tied_model_is_its_embedding():
    model = get_adapter_model(build("gpt2"), FullConfig(target_modules=["lm_head"]))
    assert model.trained == ["transformer.wte.weight"]


def test_a_model_in_bfloat16_becomes_float32(tmp_path):
    base, batch = build("bert", dtype=torch.bfloat16), padded_batch("bert")
    model = get_adapter_model(base, FullConfig(modules_to_save=["classifier"]))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model, batch).dtype == torch.float32


@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
def test_zeroth_order_in_every_query_mode(directions):
    """Sequential, batched and auto take the same step to 1e-5 (fp32); split, with as many directions, lowers the loss."""
    batch, steps = padded_batch("gpt2"), {}
    for mode in ("sequential", "batched", "auto", "split"):
        model = get_adapter_model(build("gpt2"), FullConfig())
        start = weights(model.wrapped)
        optimizer = MeZO(
            trainable_parameters(model), lr=1e-4, zo_eps=1e-3, seed=0, module=model, query_mode=mode, directions=directions,
            query_schedule=constant_queries(4),
        )  # fmt: skip
        optimizer.step(lambda b, model=model: model(**b).loss, batch)
        steps[mode] = {n: p - start[n] for n, p in weights(model.wrapped).items()}
        assert all(step.any() for step in steps[mode].values())
    for mode in ("batched", "auto"):
        for name, step in steps["sequential"].items():
            torch.testing.assert_close(steps[mode][name], step, rtol=0, atol=1e-5)


def test_a_replaced_module_is_not_trained_besides():
    model = get_adapter_model(build("bert"), FullConfig(modules_to_tensorize=["pooler.dense"]))
    assert not any("base_layer" in name for name in model.trained)
    assert any(name.startswith("bert.pooler.dense.adapter.") for name in model.trained)


def test_the_table_counts_shared_weights_once():
    model = get_adapter_model(build("gpt2"), FullConfig())
    total = sum(p.numel() for p in model.parameters())
    assert model.adapter_table().splitlines()[-1].split()[2] == f"{total:,}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["nothing"]}, "'nothing' matches no module"),
        ({"target_modules": ["lm_head"], "layers": 1}, "leaves no parameter to train"),
        ({"layers": 9}, "layers=9"),
    ],
)
def test_mistakes(options, sentence):
    base = build("llama")
    with pytest.raises(ZOError, match=sentence):
        get_adapter_model(base, FullConfig(**options))
    assert all(p.requires_grad for p in base.parameters())


def test_quantised_weights_cannot_be_trained():
    base = build("llama")
    base.lm_head.weight = nn.Parameter(torch.zeros(50, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ZOError, match=r"'lm_head.weight'.*without quantisation"):
        get_adapter_model(base, FullConfig())
