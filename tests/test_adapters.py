"""Tensor-train adapters: published sizes, an exact identity at the start, files to the bit, errors in a sentence."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, SEQ2SEQ, build, padded_batch, perturb
from torch import nn

from zo_opt import TTConfig, ZOError, get_adapter_model, load_adapter_model, trainable_parameters

ARCHITECTURES = sorted(CONFIGS)
PER_LAYER = dict.fromkeys(ARCHITECTURES, 2) | dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "gemma2"), 3)
ADAPTERS = {name: 2 * count for name, count in PER_LAYER.items()} | {"t5": 2 * 2 + 2 * 3, "bart": 2 * 2 + 2 * 3}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def config(**options):
    return TTConfig(**{"rank": 2, "bottleneck": 4} | options)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def adapters_in(model):
    return [n for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "adapter")]


class Net(nn.Module):
    """No architecture of transformers."""

    def __init__(self, hidden=20):
        super().__init__()
        self.first, self.second = nn.Linear(12, hidden), nn.Linear(hidden, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def on_meta(auto, model_config):
    with torch.device("meta"):
        return auto.from_config(model_config)


def llama_2_7b():
    shape = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return on_meta(transformers.AutoModelForCausalLM, shape)


def cores(model):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "cores" in n)


def count(model):
    return sum(p.numel() for p in trainable_parameters(model))


def test_published_count_on_llama_2_7b():
    """610,560 in 96 adapters, 211,200 of them in cores; with the RMSNorms 876,800 (methods.md)."""
    model = get_adapter_model(llama_2_7b(), TTConfig(rank=5, bottleneck=64))
    assert (count(model), cores(model), len(adapters_in(model))) == (610_560, 211_200, 96)
    norms = ["input_layernorm", "post_attention_layernorm", "norm"]
    plain = model.unload()
    assert count(get_adapter_model(plain, TTConfig(rank=5, bottleneck=64, modules_to_save=norms))) == 876_800


def test_published_count_on_roberta_large():
    shape = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    model = on_meta(transformers.AutoModelForMaskedLM, shape)
    model = get_adapter_model(model, TTConfig(rank=5, bottleneck=64))
    assert (count(model), cores(model), len(adapters_in(model))) == (136_704, 84_480, 48)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_start_is_an_exact_identity(name):
    base, batch = build(name), padded_batch(name)
    before = logits(base, batch)
    model = get_adapter_model(base, config())
    assert len(adapters_in(model)) == ADAPTERS[name]
    assert torch.equal(logits(model, batch), before)
    perturb(trainable_parameters(model))
    assert not torch.equal(logits(model, batch), before)  # the adapters are in the path


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_every_trainable_matters(name):
    """No adapter sits where the model's code goes around it."""
    model, batch = get_adapter_model(build(name), config()), padded_batch(name)
    perturb(trainable_parameters(model))
    model(**batch).loss.backward()
    silent = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert silent == []


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bert", "t5", "bart"])
def test_trainables_are_float32_in_a_bfloat16_model(name):
    base, batch = build(name, dtype=torch.bfloat16), padded_batch(name)
    before = logits(base, batch)
    model = get_adapter_model(base, config())
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert torch.equal(logits(model, batch), before)
    perturb(trainable_parameters(model))
    after = logits(model, batch)
    assert after.dtype == torch.bfloat16
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residual_adapters_start_as_identities(name):
    """One before every layer of every stack."""
    base, batch = build(name), padded_batch(name)
    before = logits(base, batch)
    model = get_adapter_model(base, config(target_modules=["residual"]))
    assert len(adapters_in(model)) == (4 if name in SEQ2SEQ else 2)
    assert torch.equal(logits(model, batch), before)
    perturb(trainable_parameters(model))
    assert not torch.equal(logits(model, batch), before)


def test_modules_to_save_in_a_bfloat16_model():
    """A head trained whole is float32 like all trainables, and the model still runs with the same outputs to rounding."""
    base, batch = build("bert", dtype=torch.bfloat16), padded_batch("bert")
    before = logits(base, batch)
    model = get_adapter_model(base, config(modules_to_save=["classifier"]))
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    torch.testing.assert_close(logits(model, batch).float(), before.float(), rtol=2e-2, atol=2e-2)


def test_only_the_adapters_are_trainable():
    base = build("llama")
    frozen = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = get_adapter_model(base, config())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".adapter." in n for n in trained)
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, frozen[name])


def test_trainable_parameters_lists_tied_ones_once():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    tied[0].bias.requires_grad_(False)
    assert [id(p) for p in trainable_parameters(tied)] == [id(tied[0].weight), id(tied[1].bias)]


@pytest.mark.parametrize(("layers", "expected"), [(None, {0, 1}), (1, {1}), (2, {0, 1}), ([0], {0}), ([1, 0], {0, 1})])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers(name, layers, expected):
    model = get_adapter_model(build(name), config(layers=layers))
    numbers = {int(part) for n in adapters_in(model) for part in n.split(".") if part.isdigit()}
    assert numbers == expected
    assert len(adapters_in(model)) == PER_LAYER[name] * len(expected)


def test_last_layer_of_an_encoder_and_a_decoder():
    model = get_adapter_model(build("t5"), config(layers=1))
    assert len(adapters_in(model)) == 5
    assert all(".block.1." in n for n in adapters_in(model))


@pytest.mark.parametrize("layers", [0, 3, -1, [2], [0, 7], [-1], []])
def test_layers_that_do_not_exist(layers):
    base = build("llama")
    with pytest.raises(ZOError, match="layers"):
        get_adapter_model(base, config(layers=layers))
    assert adapters_in(base) == []


def test_named_targets():
    model = get_adapter_model(build("llama"), config(target_modules=["self_attn.o_proj"]))
    assert [n.removeprefix("wrapped.") for n in adapters_in(model)] == [
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    ]


def test_one_target_as_a_string_is_that_target():
    assert adapters_in(get_adapter_model(Net(), config(target_modules="first"))) == ["wrapped.first"]


def test_a_target_that_matches_nothing():
    base = build("llama")
    with pytest.raises(ZOError, match=r"'query'.*gate_proj"):
        get_adapter_model(base, config(target_modules=["o_proj", "query"]))
    assert adapters_in(base) == []
    assert all(p.requires_grad for p in base.parameters())


def test_a_target_that_is_not_linear():
    with pytest.raises(ZOError, match="LlamaRMSNorm"):
        get_adapter_model(build("llama"), config(target_modules=["input_layernorm"]))


def test_an_unknown_architecture_needs_target_modules():
    with pytest.raises(ZOError, match=r"Net.*target_modules"):
        get_adapter_model(Net(), config())
    assert count(get_adapter_model(Net(), config(target_modules=["first", "second"]))) > 0


def test_a_module_to_save_that_matches_nothing_leaves_the_model_as_it_was():
    base = Net()
    with pytest.raises(ZOError, match="'head'"):
        get_adapter_model(base, config(target_modules=["first"], modules_to_save=["head"]))
    assert adapters_in(base) == []


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"bottleneck": -1}, {"activation": "cube"}, {"positions": "some"}, {"answer_token": -1}]
)
def test_impossible_configurations(options):
    with pytest.raises(ZOError, match=next(iter(options))):
        config(**options)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapted_model_is_refused(wrapped):
    base = build("llama")
    model = get_adapter_model(base, config())
    with pytest.raises(ZOError, match="unload"):
        get_adapter_model(model if wrapped else base, config())


def test_unload_gives_the_base_back():
    base, batch = build("llama"), padded_batch("llama")
    names, before = [n for n, _ in base.named_modules()], logits(base, batch)
    state = {n: p.clone() for n, p in base.state_dict().items()}
    model = get_adapter_model(base, config())
    perturb(trainable_parameters(model))
    plain = model.unload()
    assert plain is base
    assert [n for n, _ in plain.named_modules()] == names
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(p, state[n]) for n, p in plain.state_dict().items())
    assert torch.equal(logits(plain, batch), before)
    assert adapters_in(get_adapter_model(plain, config())) != []  # and may be adapted anew


def test_merging_is_refused_with_a_reason():
    base = build("llama")
    model = get_adapter_model(base, config())
    with pytest.raises(ZOError, match="nonlinearity"):
        model.merge_and_unload()
    assert len(adapters_in(model)) == ADAPTERS["llama"]


def test_the_wrapper_answers_for_the_model():
    base = build("llama")
    model = get_adapter_model(base, config())
    assert model.config is base.config
    ids = padded_batch("llama")["input_ids"][:1]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    assert f"{count(model):,}" in model.trainable_summary()


def test_deep_copies_work():
    model, batch = get_adapter_model(build("llama"), config()), padded_batch("llama")
    perturb(trainable_parameters(model))
    assert torch.equal(logits(copy.deepcopy(model), batch), logits(model, batch))


def test_the_same_seed_gives_the_same_adapters():
    def start(seed):
        return torch.cat(
            [p.detach().flatten() for p in trainable_parameters(get_adapter_model(build("bert"), config(seed=seed)))]
        )

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_different_targets_start_differently():
    first, second = (
        m for n, m in get_adapter_model(build("bert"), config(layers=1)).named_modules() if n.endswith(".adapter")
    )
    ours, theirs = (next(p for n, p in a.named_parameters() if n == "down.cores.0") for a in (first, second))
    assert not torch.equal(ours, theirs)


def test_global_random_state_is_left_alone(tmp_path):
    base = build("llama")
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model = get_adapter_model(base, config())
    model.save_pretrained(tmp_path)
    load_adapter_model(model.unload(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


# --- files ---


def saved(directory, name="llama", **options):
    """An adapter that is no identity, saved; its trainables and logits."""
    model = get_adapter_model(build(name), config(**options))
    perturb(trainable_parameters(model))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("bert", {"modules_to_save": ["classifier"], "rank": 3, "activation": "gelu", "bias": False}),
        ("opt", {"positions": "answer", "bottleneck": 16}),
        ("llama", {"target_modules": ["residual"]}),
        ("gpt2", {"layers": [0], "target_modules": ("mlp.c_proj",), "seed": 9}),
    ],
)  # fmt: skip
def test_round_trip_to_the_bit(tmp_path, name, options):
    model = saved(tmp_path, name, **options)
    again = load_adapter_model(build(name), tmp_path)
    ours, theirs = model.adapter_state(), again.adapter_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(logits(again, padded_batch(name)), logits(model, padded_batch(name)))
    assert again.trainable_state().keys() == model.trainable_state().keys()


def test_the_files_hold_the_adapters_alone(tmp_path):
    model = saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert load_file(tmp_path / WEIGHTS).keys() == model.trainable_state().keys()
    values = json.loads((tmp_path / CONFIG).read_text())
    assert (values["adapter_type"], values["rank"], values["bottleneck"]) == ("tt", 2, 4)


def edit_config(directory, **changes):
    values = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v != "(absent)"}))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, directory / WEIGHTS)


def put(tensors, name, value):
    tensors[name] = value


DAMAGE = {
    "no config": lambda d: (d / CONFIG).unlink(),
    "no weights": lambda d: (d / WEIGHTS).unlink(),
    "empty config": lambda d: (d / CONFIG).write_text(""),
    "config of peft": lambda d: (d / CONFIG).write_text('{"peft_type": "LORA", "r": 8}'),
    "config of a future version": lambda d: edit_config(d, format="zo_opt/9"),
    "unknown method": lambda d: edit_config(d, adapter_type="telepathy"),
    "no method": lambda d: edit_config(d, adapter_type="(absent)"),
    "unknown field": lambda d: edit_config(d, colour="blue"),
    "rank a word": lambda d: edit_config(d, rank="five"),
    "other rank": lambda d: edit_config(d, rank=3),
    "activation a list": lambda d: edit_config(d, activation=["tanh"]),
    "targets a number": lambda d: edit_config(d, target_modules=5),
    "targets of another model": lambda d: edit_config(d, target_modules=["query"]),
    "layers too many": lambda d: edit_config(d, layers=9),
    "a head that is not there": lambda d: edit_config(d, modules_to_save=["classifier"]),
    "pickled weights": lambda d: torch.save({"a": torch.ones(2)}, d / WEIGHTS),
    "a tensor missing": lambda d: edit_tensors(d, lambda t, n: t.pop(n)),
    "a tensor too many": lambda d: edit_tensors(d, lambda t, n: put(t, "model.extra", torch.ones(2))),
    "a wrong shape": lambda d: edit_tensors(d, lambda t, n: put(t, n, t[n].flatten()[None].contiguous())),
    "a wrong dtype": lambda d: edit_tensors(d, lambda t, n: put(t, n, t[n].half())),
    "a NaN": lambda d: edit_tensors(d, lambda t, n: t[n].view(-1)[-1:].fill_(float("nan"))),
}


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    saved(directory)
    return {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_and_the_model_stays_plain(tmp_path, adapter_files, damage):
    for name, content in adapter_files.items():
        (tmp_path / name).write_bytes(content)
    DAMAGE[damage](tmp_path)
    base, batch = build("llama"), padded_batch("llama")
    before = logits(base, batch)
    with pytest.raises(ZOError) as caught:
        load_adapter_model(base, tmp_path)
    assert len(str(caught.value)) > 20
    assert adapters_in(base) == []
    assert torch.equal(logits(base, batch), before)


def test_an_adapter_of_another_architecture(tmp_path):
    saved(tmp_path, "gpt2")
    base = build("llama")
    with pytest.raises(ZOError):
        load_adapter_model(base, tmp_path)
    assert adapters_in(base) == []


def test_an_adapter_of_another_size(tmp_path):
    model = get_adapter_model(Net(), config(target_modules=["first"]))
    model.save_pretrained(tmp_path)
    base = Net(24)
    with pytest.raises(ZOError, match="does not fit"):
        load_adapter_model(base, tmp_path)
    assert adapters_in(base) == []


def test_saving_twice_keeps_the_last(tmp_path):
    saved(tmp_path)
    model = saved(tmp_path, rank=3)
    again = load_adapter_model(build("llama"), tmp_path)
    assert all(torch.equal(p, again.trainable_state()[n]) for n, p in model.trainable_state().items())


def test_adapters_inside_an_adapted_layer_are_saved_whole(tmp_path):
    """A layer on the residual stream and a module within it: the inner adapter's frozen cores belong to the file too."""
    options = {"rank": 2, "bottleneck": 2, "layers": [1]}
    config = TTConfig(**options, target_modules=["residual", "down_proj"])
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(CONFIGS["llama"]())
    plain = copy.deepcopy(base)
    adapted = get_adapter_model(base, config)
    for parameter in adapted.adapter_state().values():
        parameter.add_(0.1)
    adapted.save_pretrained(tmp_path)
    ids = torch.arange(5, 11).unsqueeze(0)
    loaded = load_adapter_model(plain, tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert len(adapted.adapter_state()) == sum("adapter" in n for n, _ in adapted.named_parameters())
