"""Contracts that every adapter keeps, over one table of them and models of several architectures."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import jsonargparse
import pytest
import torch
import transformers
from tiny_models import CONFIGS, IDS, SIZES, build, padded_batch, perturb

from zo_opt import (
    AdaLoRAConfig,
    AdaZeta,
    AFLoRAConfig,
    BitFitConfig,
    BottleneckConfig,
    DoRAConfig,
    FullConfig,
    LaMDAConfig,
    LaMDAPlusPlusConfig,
    LISAConfig,
    LoRAConfig,
    LoRAFAConfig,
    SpectralConfig,
    TTConfig,
    TTLoRAConfig,
    VeRAConfig,
    ZOActConfig,
    ZOError,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.adapters import ADAPTERS, AdapterConfig, make_config
from zo_opt.schedules import constant_queries
from zo_opt.system.layers import layer_of

TABLE = {
    "tt": TTConfig(rank=2, bottleneck=4),
    "tt-lora": TTLoRAConfig(rank=4, tt_rank=2, alpha=2.0),
    "lora": LoRAConfig(rank=4, alpha=2.0),
    "lora rslora": LoRAConfig(rank=4, alpha=2.0, use_rslora=True),
    "lora-fa": LoRAFAConfig(rank=4, alpha=2.0),
    "dora": DoRAConfig(rank=4, alpha=2.0),
    "vera": VeRAConfig(rank=16, d_initial=1.0),
    "adapter": BottleneckConfig(bottleneck=4),
    "bitfit": BitFitConfig(),
    "spectral": SpectralConfig(rank=3),
    "zo-act": ZOActConfig(rank=3),
    "full": FullConfig(),
    "lisa": LISAConfig(blocks=1, interval=7),
    "adalora": AdaLoRAConfig(rank=4, target_rank=2, alpha=200.0, total_steps=30),
    "lamda": LaMDAConfig(rank=3, total_steps=30),
    "lamda zero": LaMDAConfig(rank=3, init="zero", freeze_share=0.0),
    "lamda++": LaMDAPlusPlusConfig(rank=3, ranks=(2, 4), total_steps=30),
    "aflora": AFLoRAConfig(rank=3, d_initial=5.0, total_steps=30),
}
MERGEABLE = {name: config for name, config in TABLE.items() if config.mergeable}
# Those that train the model's own weights: nothing is wrapped, all of the model is float32, and what it was is gone.
IN_PLACE = {name for name, config in TABLE.items() if type(config).in_place is not AdapterConfig.in_place}
RANKED = {name: config for name, config in TABLE.items() if hasattr(config, "rank")}
IN_EMBEDDINGS = {name: config for name, config in MERGEABLE.items() if config.adapts_embeddings}
NO_BIASES = ("llama", "t5", "gemma2")  # BitFit's new ones cannot be merged there
# Conv1D: gpt2; narrower keys and values: llama; tied weights: gpt2, opt, t5, bart, gemma2.
MODELS = ("llama", "gpt2", "opt", "bert", "deberta-v2", "t5", "bart", "gemma2")
# Every method on three architectures, four kinds of method on all of them.
PAIRS = [
    (n, c) for c in TABLE for n in MODELS if n in ("llama", "gpt2", "t5") or c in ("tt", "tt-lora", "lora", "bitfit")
]
EMBEDDINGS = {  # tied to the output head in each of them; bart's and gemma2's multiply what they look up
    "gpt2": "wte",
    "opt": "embed_tokens",
    "gemma2": "embed_tokens",
    "bart": "decoder.embed_tokens",
    "t5": "decoder.embed_tokens",
}


def test_the_table_is_complete():
    assert {config.adapter_type for config in TABLE.values()} == ADAPTERS.keys()


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def begin(model, batch):
    """What an adapter that starts from the first batch needs before the first step."""
    if model.adapter_config.reads_rows:
        logits(model, batch)


def adapted(name, config, dtype=torch.float32):
    """A model with adapters that are no identities, and its batch."""
    model = get_adapter_model(build(name, dtype=dtype), config)
    perturb(trainable_parameters(model))
    return model, padded_batch(name)


def all_weights(model):
    """Every parameter under each of its names."""
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def merges(name, case):
    """Whether a method's adapters in a model have weights to go into."""
    return not (case == "bitfit" and name in NO_BIASES)


def with_(config, **changes):
    return type(config)(**{**vars(config), **changes})


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [(n, c, torch.float32) for n, c in PAIRS] + [("llama", c, torch.bfloat16) for c in TABLE],
)
def test_the_start_is_an_identity_and_unloading_gives_the_bits_back(name, case, dtype):
    base, batch = build(name, dtype=dtype), padded_batch(name)
    if case in IN_PLACE:  # which is all that happens to the model
        base.float()
    before, weights = logits(base, batch), all_weights(base)
    model = get_adapter_model(base, TABLE[case])
    assert torch.equal(logits(model, batch), before)
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    perturb(trainable_parameters(model))
    after = logits(model, batch)
    assert after.dtype == before.dtype
    assert not torch.equal(after, before)
    plain = model.unload()
    assert plain is base
    if case in IN_PLACE:
        assert torch.equal(logits(plain, batch), after)
        return
    assert same(all_weights(plain), weights)
    assert torch.equal(logits(plain, batch), before)


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_every_trainable_matters(name, case):
    model, batch = adapted(name, TABLE[case])
    model(**batch).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_files_hold_the_bits(tmp_path, name, case):
    model, batch = adapted(name, TABLE[case])
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build(name), tmp_path)
    assert same(model.adapter_state(), again.adapter_state())
    assert again.trainable_state().keys() == model.trainable_state().keys()
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in PAIRS if c in MERGEABLE and merges(n, c)])
def test_merging_keeps_the_function(name, case):
    """To 1e-5 of the largest logit in fp32; the weights that no adapter changed keep their bits."""
    model, batch = adapted(name, MERGEABLE[case])
    expected, before = logits(model, batch), all_weights(copy.deepcopy(model).unload())
    changed = {f"{n}.{getattr(m, 'merged', 'weight')}" for n, m in model.adapted_modules().items()}
    plain = model.merge_and_unload()
    assert isinstance(plain, transformers.PreTrainedModel)
    torch.testing.assert_close(logits(plain, batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    after = all_weights(plain)
    assert {n for n in before if not torch.equal(before[n], after[n])} == changed


@pytest.mark.parametrize(
    ("name", "case"),
    [("gpt2", c) for c in MERGEABLE if c not in IN_PLACE],
)
def test_merging_in_bfloat16(name, case):
    """The merged weight is rounded once: to 3e-2 of the largest logit (eight bits of mantissa, two layers)."""
    model, batch = adapted(name, MERGEABLE[case], torch.bfloat16)
    expected = logits(model, batch).float()
    plain = model.merge_and_unload()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(plain, batch).float(), expected, rtol=0, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("case", IN_EMBEDDINGS)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_tied_embedding_parts_from_the_head_when_it_is_merged(tmp_path, name, case):
    base, batch = build(name), padded_batch(name)
    before, head = logits(base, batch), base.get_output_embeddings().weight
    model = get_adapter_model(base, with_(MERGEABLE[case], target_modules=[EMBEDDINGS[name]]))
    assert torch.equal(logits(model, batch), before)
    perturb(trainable_parameters(model))
    expected, frozen = logits(model, batch), head.detach().clone()
    assert not torch.equal(expected, before)
    plain = model.merge_and_unload()
    assert torch.equal(plain.get_output_embeddings().weight, frozen)
    # An encoder-decoder's switch may also scale its logits (UMT5): it is left alone.
    assert plain.config.tie_word_embeddings == bool(plain.config.is_encoder_decoder)
    close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(logits(plain, batch), expected, **close)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(plain, batch))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_a_tied_head_parts_from_the_embedding_when_it_is_merged(tmp_path, name):
    base, batch = build(name), padded_batch(name)
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = get_adapter_model(base, TTLoRAConfig(rank=4, target_modules=["lm_head"]))
    perturb(trainable_parameters(model))
    expected = logits(model, batch)
    plain = model.merge_and_unload()
    assert torch.equal(plain.get_input_embeddings().weight, embedding)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_parameters_that_are_tied_besides_are_kept_as_well(tmp_path):
    """A masked language model's head shares its bias too; the config has one switch for both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.BertForMaskedLM(CONFIGS["bert"]()).eval()
        base.cls.predictions.bias.data.normal_()
    batch = {"input_ids": padded_batch("bert")["input_ids"]}
    model = get_adapter_model(base, LoRAConfig(target_modules=["word_embeddings"]))
    perturb(trainable_parameters(model))
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(plain, batch))


def test_merging_leaves_ties_alone_that_no_adapter_touched():
    model, _ = adapted("gpt2", TABLE["tt-lora"])
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.transformer.wte.weight


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("name", ["llama"])
def test_batched_queries_give_the_sequential_losses(name, case):
    """One step of AdaZeta; losses to 1e-5 and projected gradients to 1e-3 of the largest (fp32; a difference over 2 zo_eps)."""
    records = []
    for mode in ("sequential", "batched"):
        model, batch = adapted(name, TABLE[case])
        begin(model, batch)
        optimizer = AdaZeta(
            trainable_parameters(model), lr=1e-2, zo_eps=1e-2, seed=0, query_schedule=constant_queries(3), module=model, query_mode=mode
        )  # fmt: skip
        loss = optimizer.step(lambda b, m=model: m(**b).loss, batch)
        records.append((float(loss), torch.tensor(optimizer.last_update.coefficients)))
    assert records[0][0] == pytest.approx(records[1][0], rel=1e-5)
    torch.testing.assert_close(records[1][1], records[0][1], rtol=0, atol=1e-3 * float(records[0][1].abs().max()))


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("mode", ["batched", "split"])
def test_training_lowers_the_loss_and_moves_nothing_else(case, mode):
    base, batch = build("llama"), padded_batch("llama")
    weights = all_weights(base)
    model = get_adapter_model(base, TABLE[case])
    begin(model, batch)
    frozen = {n: t for n, t in weights.items() if case not in IN_PLACE or n not in model.trained}
    kept = {n: t.clone() for n, t in model.adapter_state().items() if n not in model.trainable_state()}
    optimizer = AdaZeta(
        trainable_parameters(model), lr=1e-3, zo_eps=1e-3, seed=0, query_schedule=constant_queries(4), module=model, query_mode=mode,
        directions="rademacher",
    )  # fmt: skip
    with torch.no_grad():
        before = float(model(**batch).loss)
    for step in range(30):
        optimizer.step(lambda b: model(**b).loss, batch)
        if model.schedule is not None and model.schedule.needs_grad:
            optimizer.write_last_grad()
        model.step(step)
        optimizer.zero_grad()
    with torch.no_grad():
        assert float(model(**batch).loss) < before
    assert all(torch.equal(model.adapter_state()[n], t) for n, t in kept.items())
    after = all_weights(model.unload())
    assert all(torch.equal(after[n], t) for n, t in frozen.items())


@pytest.mark.parametrize("case", TABLE)
def test_modules_trained_whole(tmp_path, case):
    """Beside adapters, in a bf16 model: a classification head in float32, saved and loaded with them."""
    config = with_(TABLE[case], modules_to_save=["classifier"])
    model, batch = adapted("bert", config, torch.bfloat16)
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("bert", dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert any(n.startswith("classifier.") for n in model.trainable_state())


@pytest.mark.parametrize("case", TABLE)
def test_layers_and_the_seed(case):
    def start(**changes):
        model = get_adapter_model(build("llama"), with_(TABLE[case], **changes))
        return model.trained, torch.cat([tensor.flatten() for tensor in model.adapter_state().values()])

    names, first = start(layers=1)
    assert {place[1] for name in names if (place := layer_of(name))} == {1}
    assert torch.equal(start(layers=1)[1], first)
    if hasattr(TABLE[case], "seed"):
        draws = "svd" not in case and case not in IN_PLACE
        assert torch.equal(start(layers=1, seed=1)[1], first) != draws


@pytest.mark.parametrize("case", RANKED)
def test_a_rank_for_some_layers(tmp_path, case):
    """The longest ending that fits decides; files keep it."""
    names = get_adapter_model(build("llama"), TABLE[case]).adapted
    last = names[-1].rpartition(".")[2]
    config = with_(TABLE[case], rank=2, rank_pattern={last: 3, names[-1]: 4})
    model = get_adapter_model(build("llama"), config)
    endings = {name.rpartition(".")[2] for name in names}  # a pattern for all, for methods that would choose one
    uniform = {
        r: get_adapter_model(
            build("llama"), with_(TABLE[case], rank=4, rank_pattern=dict.fromkeys(endings, r))
        ).adapted_modules()
        for r in (2, 3, 4)
    }
    for name, module in model.adapted_modules().items():
        rank = 4 if name == names[-1] else 3 if name.endswith(last) else 2
        adapters = module.adapter, uniform[rank][name].adapter
        shapes = [[p.shape for p in adapter.parameters() if p.requires_grad] for adapter in adapters]
        assert shapes[0] == shapes[1]
    model.save_pretrained(tmp_path)
    assert same(load_adapter_model(build("llama"), tmp_path).adapter_state(), model.adapter_state())


WRONG = {
    "a rank for nothing": ({"rank_pattern": {"lm_head": 2}}, "'lm_head'.*no adapted module"),
    "a rank of 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    "ranks in a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank 0": ({"rank": 0}, "rank=0"),
    "a fraction as rank": ({"rank": 1.5}, "rank=1.5"),
    "tensorize_rank 0": ({"tensorize_rank": 0}, "tensorize_rank=0"),
    "a head that is not there": ({"modules_to_tensorize": ["score"]}, "'score' matches nothing"),
    "a norm as head": ({"modules_to_tensorize": ["input_layernorm"]}, "LlamaRMSNorm"),
    "a head that is a target": ({"target_modules": ["down_proj"], "modules_to_tensorize": ["down_proj"]}, "both"),
}


def possible(what, case):
    """Methods without a rank have no rank to get wrong; those that wrap nothing have no targets."""
    ranks = {"rank", "rank_pattern"} & WRONG[what][0].keys()
    return (case in RANKED or not ranks) and (case not in IN_PLACE or "target_modules" not in WRONG[what][0])


@pytest.mark.parametrize(
    ("what", "case"), [(w, c) for w in WRONG for c in ("tt", "lora", "bitfit", "full") if possible(w, c)]
)
def test_mistakes_are_sentences_and_change_nothing(what, case):
    changes, sentence = WRONG[what]
    base = build("llama")
    with pytest.raises(ZOError, match=sentence):
        get_adapter_model(base, with_(TABLE[case], **changes))
    assert all(p.requires_grad for p in base.parameters())
    assert not any(hasattr(m, "adapter") for m in base.modules())


@pytest.mark.parametrize("case", ["adapter", "bitfit", "full"])
def test_a_pattern_of_ranks_for_a_method_without_ranks(case):
    with pytest.raises(ZOError, match="have no rank"):
        get_adapter_model(build("llama"), with_(TABLE[case], rank_pattern={"q_proj": 2}))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TTLoRAConfig(alpha=0), "alpha=0"),
        (lambda: TTLoRAConfig(alpha=float("nan")), "alpha"),
        (lambda: TTLoRAConfig(tt_rank=0), "tt_rank=0"),
        (lambda: LaMDAConfig(init="qr"), "'qr'.*svd"),
    ],
)
def test_impossible_values(make, sentence):
    with pytest.raises(ZOError, match=sentence):
        make()


@pytest.mark.parametrize("case", TABLE)
def test_a_configuration_is_frozen_and_its_plain_form_is_itself(case):
    config = TABLE[case]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.layers = 1
    values = json.loads(json.dumps(config.to_dict()))
    assert make_config(values.pop("adapter_type"), values) == config
    assert all(field.metadata["help"] for field in dataclasses.fields(config))


OF_A_USER = """
from dataclasses import dataclass
from zo_opt import LoRAConfig
from zo_opt.adapters.options import option

@dataclass(frozen=True)
class HalfConfig(LoRAConfig):
    share: float = option(0.5, "of what LoRA adds")

    def scaling(self, name):
        return self.share * super().scaling(name)
"""


def test_an_adapter_of_ones_own(tmp_path, monkeypatch):
    """A name ``module:Class`` wherever a method's name stands; files hold it, and run no code that is not imported already."""
    (tmp_path / "own_adapter.py").write_text(OF_A_USER)
    monkeypatch.chdir(tmp_path)
    model = get_adapter_model(build("llama"), make_config("own_adapter:HalfConfig", {"rank": 4, "share": 0.25}))
    perturb(trainable_parameters(model))
    model.save_pretrained(tmp_path / "out")
    again = load_adapter_model(build("llama"), tmp_path / "out")
    assert again.adapter_config == model.adapter_config
    assert again.adapter_config.adapter_type == "own_adapter:HalfConfig"
    assert same(model.adapter_state(), again.adapter_state())
    monkeypatch.delitem(sys.modules, "own_adapter")
    with pytest.raises(ZOError, match="import own_adapter"):
        load_adapter_model(build("llama"), tmp_path / "out")
    with pytest.raises(ZOError, match="share=-1"):
        make_config("own_adapter:HalfConfig", {"share": -1})
    with pytest.raises(ZOError, match="no AdapterConfig"):
        make_config("copy:Error", {})
    with pytest.raises(ZOError, match="AdapterConfig"):
        make_config("copy:deepcopy", {})


def test_the_command_line_checks_every_option():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    for name, kind in ADAPTERS.items():
        parser.add_class_arguments(kind, name.replace("-", "_"))
    given = parser.parse_args(["--lamda.init=zero", "--lamda.layers=[0,1]", "--lora.alpha_pattern={q: 2.0}"])
    assert LaMDAConfig(**given["lamda"].as_dict()) == LaMDAConfig(init="zero", layers=[0, 1])
    assert LoRAConfig(**given["lora"].as_dict()) == LoRAConfig(alpha_pattern={"q": 2.0})
    with pytest.raises(jsonargparse.ArgumentError, match="init"):
        parser.parse_args(["--lamda.init=qr"])


def test_positions_that_are_computed_are_no_target():
    with pytest.raises(ZOError, match="OPTLearnedPositionalEmbedding"):
        get_adapter_model(build("opt"), LoRAConfig(target_modules=["embed_positions"]))


def test_quantised_weights_cannot_be_read():
    base = build("llama")
    base.model.layers[1].self_attn.v_proj.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), False)
    with pytest.raises(ZOError, match="quantis"):
        get_adapter_model(base, LaMDAConfig())
    model = get_adapter_model(base, TTLoRAConfig())
    before = all_weights(base)
    with pytest.raises(ZOError, match="quantis"):
        model.merge_and_unload()
    assert same(all_weights(base), before)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # A: 16.16.16 | 8 and B: 8 | 16.16.16, 920 each; LoRA of rank 8 has 4,194,304
        (TTLoRAConfig(rank=8, tt_rank=5), 2 * 32 * 1840),
    ],
)  # fmt: skip
def test_counts_on_llama_2_7b(config, count):
    shape = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = get_adapter_model(transformers.AutoModelForCausalLM.from_config(shape), config)
    assert len(model.adapted) == 64
    assert sum(p.numel() for p in trainable_parameters(model)) == count


def test_narrow_keys():
    """Grouped queries: k_proj maps 32 to 16 here, and to a single key of 1 in the extreme."""
    sizes = SIZES | {"hidden_size": 33, "num_attention_heads": 33}
    config = transformers.LlamaConfig(**IDS, **sizes, num_key_value_heads=1, head_dim=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": padded_batch("llama")["input_ids"]}
    for case in (c for n, c in MERGEABLE.items() if n not in IN_PLACE and merges("llama", n)):
        plain = copy.deepcopy(base)
        model = get_adapter_model(plain, with_(case, target_modules=["q_proj", "k_proj"]))
        perturb(trainable_parameters(model))
        expected = logits(model, batch)
        torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, rtol=0, atol=1e-5)
