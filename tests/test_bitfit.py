"""BitFit: the biases of a model and nothing else, merged where there is one to merge into."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import CONFIGS, build, padded_batch, perturb
from torch import nn

from zo_opt import BitFitConfig, ZOError, get_adapter_model, load_adapter_model, trainable_parameters


def biases(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def adapted(base, **options):
    model = get_adapter_model(base, BitFitConfig(**options))
    perturb(trainable_parameters(model))
    return model


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "gpt2", "opt", "bart"])
def test_every_bias_of_the_model_is_trained(name):
    base = build(name)
    expected = sum(b.numel() for b in biases(base).values())
    model = get_adapter_model(base, BitFitConfig())
    assert sum(p.numel() for p in trainable_parameters(model)) == expected
    assert all(n.endswith(".adapter.bias") for n in model.trained)


def test_it_is_training_the_biases_themselves():
    """Oracle: the same model with only its biases requiring grad, three steps of SGD, to 1e-6 in fp32."""
    base, batch = build("bert"), padded_batch("bert")
    oracle = copy.deepcopy(base).requires_grad_(False)
    own = [p for n, p in oracle.named_parameters() if n.endswith("bias")]
    for p in own:
        p.requires_grad_(True)
    model = get_adapter_model(base, BitFitConfig())
    for net, parameters in ((oracle, own), (model, trainable_parameters(model))):
        sgd = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            sgd.zero_grad()
            net(**batch).loss.backward()
            sgd.step()
    merged, expected = biases(model.merge_and_unload()), biases(oracle)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "linear"), [("llama", 7), ("gemma2", 7), ("t5", None)])
def test_new_biases_where_a_model_has_none(name, linear, tmp_path):
    base, batch = build(name), padded_batch(name)
    before = logits(base, batch)
    model = get_adapter_model(base, BitFitConfig())
    assert torch.equal(logits(model, batch), before)
    if linear:
        assert len(model.adapted) == linear * base.config.num_hidden_layers
    assert not any("norm" in n or "lm_head" in n or "embed" in n for n in model.adapted)
    perturb(trainable_parameters(model))
    after = logits(model, batch)
    with pytest.raises(ZOError, match="has no bias to merge into"):
        model.merge_and_unload()
    assert torch.equal(logits(model, batch), after)  # nothing was changed
    model.save_pretrained(tmp_path)
    plain = model.unload()
    assert torch.equal(logits(plain, batch), before)
    assert torch.equal(logits(load_adapter_model(plain, tmp_path), batch), after)


def test_a_head_with_a_bias_does_not_stand_for_the_layers():
    base = build("llama")
    base.lm_head = nn.Linear(32, 50)
    names = get_adapter_model(base, BitFitConfig()).adapted
    assert "lm_head" in names
    assert len(names) == 1 + 7 * 2


def test_names_and_layers_narrow_it():
    model = adapted(build("bert"), target_modules=["query", "intermediate.dense"], layers=1)
    assert model.adapted == [
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.intermediate.dense",
    ]
    assert get_adapter_model(build("llama"), BitFitConfig(target_modules=["input_layernorm"])).adapted == [
        "model.layers.0.input_layernorm",
        "model.layers.1.input_layernorm",
    ]


def test_what_is_trained_whole_or_replaced_is_left_out():
    """As the paper trains a task's head: whole, beside the biases of the body."""
    base = build("bert")
    everywhere = len(get_adapter_model(copy.deepcopy(base), BitFitConfig()).adapted)
    model = get_adapter_model(base, BitFitConfig(modules_to_save=["classifier"], modules_to_tensorize=["pooler.dense"]))
    assert model.adapted[-1] == "bert.pooler.dense"  # by its tensor train
    assert len(model.adapted) == everywhere - 1
    assert {"classifier.weight", "classifier.bias"} <= set(model.trained)


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)])
def test_shapes_and_dtypes(module):
    net = nn.Sequential(module.to(torch.bfloat16))
    model = adapted(net, target_modules=["0"])
    out = model(torch.ones(2, 3, 6, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert [p.dtype for p in trainable_parameters(model)] == [torch.float32]


def test_merging_parts_a_shared_bias(tmp_path):
    """A masked language model's head shares its bias with the decoder: the file holds what was trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.BertForMaskedLM(CONFIGS["bert"]()).eval()
        base.cls.predictions.bias.data.normal_()
    batch = {"input_ids": padded_batch("bert")["input_ids"]}
    model = adapted(base, target_modules=["predictions.decoder"])
    expected = logits(model, batch)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["wte"]}, "'wte' is no linear layer or norm"),
        ({"target_modules": ["nothing"]}, "'nothing' is no linear layer or norm"),
        ({"target_modules": ["ln_f"], "layers": 1}, "no bias to train in layers=1"),
        ({"layers": 3}, "layers=3"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ZOError, match=sentence):
        get_adapter_model(build("gpt2"), BitFitConfig(**options))
