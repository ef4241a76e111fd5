"""Saved adapters: the same logits in PEFT, the same bits here; strangers' files read or refused in a sentence; our optimizers on PEFT's models."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import OrderedDict

import peft
import pytest
import torch
import transformers
from peft_pairs import LINEAR, TARGETS, close, peft_quietly
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, build, padded_batch, perturb
from torch import nn

from zo_opt import (
    AdaLoRAConfig,
    AdaZeta,
    DoRAConfig,
    FullConfig,
    LoRAConfig,
    LoRAFAConfig,
    MeZO,
    TTLoRAConfig,
    VeRAConfig,
    ZOAdam,
    ZOError,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.schedules import constant_queries

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@torch.no_grad()
def logits(model, batch):
    return model(
        **{k: v for k, v in batch.items() if k != "labels"}
    ).logits  # with labels PEFT's AdaLoRA asks for an optimizer


def all_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


# --- to PEFT ---

OURS = {
    "lora": (LoRAConfig(rank=4, alpha=6), TARGETS, "LORA"),
    "lora rslora": (LoRAConfig(rank=3, alpha=0.1, use_rslora=True, seed=3), TARGETS, "LORA"),
    "lora-fa": (LoRAFAConfig(rank=4), LINEAR, "LORA"),
    "tt-lora": (TTLoRAConfig(rank=4, tt_rank=2), LINEAR, "LORA"),
    "dora": (DoRAConfig(rank=4, alpha=6), TARGETS, "LORA"),
    "adalora": (AdaLoRAConfig(rank=4, target_rank=2, alpha=6, squared_penalty=True), LINEAR, "ADALORA"),
    "vera": (VeRAConfig(rank=6), LINEAR, "VERA"),
}
PATTERN = {"llama": "v_proj", "bert": "value", "gpt2": "c_fc"}
TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
AUTO = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
}
PEFTS_OWN = ("ignore:.is_gradient_checkpointing:FutureWarning", "ignore:Model has .tie_word_embeddings:UserWarning")


def ours(case, name, base=None, **options):
    config, targets, _ = OURS[case]
    options = {"target_modules": targets.get(name)} | options
    model = get_adapter_model(base or build(name), type(config)(**vars(config) | options))
    perturb(trainable_parameters(model))
    return model


def assert_same_adapter(again, model):
    """The configuration, and the tensors to the bit."""
    assert again.adapter_config == model.adapter_config
    states = [
        {n: t.numpy().tobytes() for n, t in (m.adapter_state() | m.schedule_state()).items()} for m in (again, model)
    ]
    assert states[0] == states[1]


@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("name", TARGETS)
def test_peft_gives_the_same_logits(tmp_path, monkeypatch, name, case):
    """To 1e-5 of the largest, without a warning; in bert no module has a rank of its own, in the others one more, one less. Here to the bit."""
    patterned = {} if name == "bert" else {"rank_pattern": {PATTERN[name]: 2, TARGETS[name][0]: 5}}
    build(name).save_pretrained(tmp_path / "base")
    base = type(build(name)).from_pretrained(tmp_path / "base")
    model, batch = ours(case, name, base, **patterned), padded_batch(name)
    (model.export_peft if case == "tt-lora" else model.save_pretrained)(tmp_path / "to")
    values = json.loads((tmp_path / "to" / CONFIG).read_text())
    assert (values["peft_type"], values["task_type"]) == (OURS[case][2], TASK[name])
    assert values["base_model_name_or_path"] == "base"  # and not where it lies
    monkeypatch.chdir(tmp_path)
    for theirs in (
        peft.PeftModel.from_pretrained(build(name), tmp_path / "to"),
        AUTO[TASK[name]].from_pretrained(tmp_path / "to"),
    ):
        close(logits(theirs.eval(), batch), logits(model, batch))
    assert not torch.allclose(logits(build(name), batch), logits(model, batch), atol=1e-2)
    again = load_adapter_model(build(name), tmp_path / "to")
    close(logits(again, batch), logits(model, batch))
    if case != "tt-lora":
        assert_same_adapter(again, model)


@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize("case", ["lora", "dora", "adalora", "vera"])
@pytest.mark.parametrize("head", ["classifier", "dense", "nothing"])
def test_heads_go_along(tmp_path, case, head):
    """Trained whole; in a module of two layers one of them; frozen, which PEFT wants for this task all the same."""
    base = build("roberta")
    model = ours(
        case,
        "bert",
        base,
        target_modules=["query"],
        modules_to_save=[f"classifier{'.dense' * (head == 'dense')}"] if head != "nothing" else None,
    )
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("roberta"), tmp_path).eval()
    close(logits(theirs, padded_batch("roberta")), logits(model, padded_batch("roberta")))
    assert_same_adapter(load_adapter_model(build("roberta"), tmp_path), model)


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_an_adapted_head(tmp_path):
    """For PEFT a classifier is trained whole or not adapted: such a file names no task."""
    model = ours("lora", "bert", target_modules=["query", "classifier"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] is None
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    close(logits(theirs, padded_batch("bert")), logits(model, padded_batch("bert")))
    assert_same_adapter(load_adapter_model(build("bert"), tmp_path), model)


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_an_encoder_decoder(tmp_path):
    model, batch = ours("lora", "t5", target_modules=["q"]), padded_batch("t5")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == TASK["t5"]
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(build("t5"), tmp_path).eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("case", ["lora", "dora", "adalora", "vera"])
def test_our_files_without_what_is_ours_in_them(tmp_path, case):
    """As if PEFT had written them: the same function."""
    model = ours(case, "llama")
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    again = load_adapter_model(build("llama"), tmp_path)
    close(logits(again, padded_batch("llama")), logits(model, padded_batch("llama")))


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_trained_on_with_peft_in_the_same_directory(tmp_path):
    """Nothing of ours is left that could stand against it."""
    ours("adalora", "llama").save_pretrained(tmp_path)
    with peft_quietly():
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).eval()
    perturb([p for p in theirs.parameters() if p.requires_grad])
    save(theirs, tmp_path)
    again = load_adapter_model(build("llama"), tmp_path)
    close(logits(again, padded_batch("llama")), logits(theirs, padded_batch("llama")))


def test_a_changed_configuration(tmp_path):
    """What decides the function must be as it was saved; where the base model lies is the user's."""
    model = ours("lora", "llama")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": "/there", "task_type": None}))
    assert_same_adapter(load_adapter_model(build("llama"), tmp_path), model)
    (tmp_path / CONFIG).write_text(json.dumps(values | {"lora_alpha": 99.0}))
    refused(build("llama"), tmp_path, "was changed after it was saved")


@pytest.mark.parametrize("case", ["lora", "tensor trains", "schedule"])
def test_a_flipped_bit(tmp_path, case):
    """Of the tensors, in PEFT's format, ours, and what a schedule's later steps depend on."""
    beside = {"modules_to_tensorize": ["lm_head"]} if case == "tensor trains" else {}
    ours("adalora" if case == "schedule" else "lora", "llama", **beside).save_pretrained(tmp_path)
    path = tmp_path / ("adapter_schedule.safetensors" if case == "schedule" else WEIGHTS)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    refused(build("llama"), tmp_path, f"{path.name} is damaged.*checksum")


def test_files_of_earlier_versions(tmp_path):
    """Every method in zo_opt's own format, without a checksum."""
    model = ours("lora", "llama")
    (tmp_path / CONFIG).write_text(json.dumps({"format": "zo_opt/1"} | model.adapter_config.to_dict()))
    save_file(model.adapter_state(), tmp_path / WEIGHTS)
    assert_same_adapter(load_adapter_model(build("llama"), tmp_path), model)


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("facebook/opt-1.3b", "facebook/opt-1.3b"), ("gpt2", "gpt2"), ("/home/me/models/mine", "mine"), ("../mine/", "mine"),
        ("models/mine", "mine"), ("", None),
    ],
)  # fmt: skip
def test_where_the_base_model_lies_is_not_told(tmp_path, monkeypatch, given, recorded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for config in (LoRAConfig(target_modules=["q_proj"]), TTLoRAConfig(rank=2, target_modules=["q_proj"])):
        model = get_adapter_model(build("llama"), config)
        model.wrapped.config._name_or_path = given
        model.save_pretrained(tmp_path / "to")
        assert json.loads((tmp_path / "to" / CONFIG).read_text())["base_model_name_or_path"] == recorded
        shutil.rmtree(tmp_path / "to")


def test_pruned_triplets_go_to_peft_as_zeros(tmp_path):
    model = ours("adalora", "llama")
    for module in model.adapted_modules().values():
        module.adapter.lora_E.data[1:3] = 0
    model.export_peft(tmp_path)
    with peft_quietly():
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    close(logits(theirs, padded_batch("llama")), logits(model, padded_batch("llama")))


def test_models_trained_in_place_are_refused(tmp_path):
    with pytest.raises(ZOError, match="'full' trains the model's own weights"):
        get_adapter_model(build("llama"), FullConfig()).export_peft(tmp_path)


@pytest.mark.parametrize("case", ["adalora", "vera", "lora"])
def test_tensor_trains_beside(tmp_path, case):
    """PEFT has none: saved in zo_opt's format, and no export."""
    model = ours(case, "llama", modules_to_tensorize=["lm_head"])
    with pytest.raises(ZOError, match=r"lm_head.*cannot be exported"):
        model.export_peft(tmp_path / "to")
    assert not (tmp_path / "to").exists()
    model.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / CONFIG).read_text())["format"] == "zo_opt/1"
    assert_same_adapter(load_adapter_model(build("llama"), tmp_path / "own"), model)


def test_a_tied_weight_trained_whole_is_not_pefts(tmp_path):
    """PEFT would train a copy of it, here the embedding moves with the head."""
    model = ours("lora", "gpt2", target_modules=["c_attn"], modules_to_save=["lm_head"])
    with pytest.raises(ZOError, match="'lm_head' is trained whole and shares its weight"):
        model.export_peft(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_adapter(load_adapter_model(build("gpt2"), tmp_path), model)


# --- from PEFT ---


def lora(**options):
    return lambda targets: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets} | options)


THEIRS = {
    "lora": lora(),
    "dropout": lora(lora_dropout=0.3),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dora patterns": lora(use_dora=True, rank_pattern={r".*1.*(query|q_proj|c_attn)": 2}, alpha_pattern={"._proj": 3}),
    "patterns": lora(
        rank_pattern={"q_proj": 2, "c_attn": 3, "value": 1},
        alpha_pattern={"layers.0.self_attn.v_proj": 5, "^model.layers.1.self_attn.q_proj": 2.5, "layer.0": 9},
    ),
    "gaussian": lora(init_lora_weights="gaussian"),
    "no init": lora(init_lora_weights=False),
    "one layer": lora(layers_to_transform=[1]),
    "a name too many": lambda targets: lora()([*targets, "nothing_here"]),
    "regular expression": lambda targets: lora()(rf".*\.1\..*({'|'.join(targets)})"),
    "excluded": lora(exclude_modules=["q_proj", "value", "c_fc"]),
    "all-linear": lambda _: lora()("all-linear"),
    "adalora": lambda targets: peft.AdaLoraConfig(
        init_r=5, target_r=3, lora_alpha=6, total_step=10, target_modules=targets
    ),
    "vera": lambda targets: peft.VeraConfig(r=6, target_modules=targets, save_projection=True),
}
LINEAR_ONLY = ("adalora", "vera", "regular expression")


def theirs(case, name, **options):
    config = THEIRS[case]((LINEAR if case in LINEAR_ONLY else TARGETS)[name])
    for option, value in options.items():
        setattr(config, option, value)
    with peft_quietly():
        model = peft.get_peft_model(build(name), config).eval()
    perturb([p for p in model.parameters() if p.requires_grad])
    return model


def save(model, directory):
    with peft_quietly():
        model.save_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "case"),
    [("llama", case) for case in THEIRS]
    + [
        (name, case)
        for name in ("bert", "gpt2")
        for case in ("lora", "dora", "patterns", "excluded", "adalora", "vera")
    ],
)
def test_pefts_files_give_the_same_logits(tmp_path, name, case):
    """bert's and gpt2's hold the base weight of the adapted embedding as well; gpt2's is tied to the head."""
    model, batch = theirs(case, name), padded_batch(name)
    save(model, tmp_path)
    loaded = load_adapter_model(build(name), tmp_path)
    close(logits(loaded, batch), logits(model, batch))
    assert not torch.allclose(logits(build(name), batch), logits(model, batch), atol=1e-2)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(loaded.trainable_state())
    close(logits(loaded.merge_and_unload(), batch), logits(model, batch))


def test_a_loaded_configuration_is_as_short_as_pefts(tmp_path):
    save(theirs("patterns", "llama"), tmp_path)
    config = load_adapter_model(build("llama"), tmp_path).adapter_config
    assert config.target_modules == tuple(sorted(TARGETS["llama"]))
    assert (config.rank, set(config.rank_pattern.values())) == (4, {2})
    assert load_adapter_model(build("llama"), tmp_path).adapter_config == config


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_modules_to_save_are_loaded(tmp_path, name):
    module = {"bert": "classifier", "llama": "lm_head"}[name]
    model = theirs("lora", name, modules_to_save=[module, "score"])
    save(model, tmp_path)
    loaded = load_adapter_model(build(name), tmp_path)
    close(logits(loaded, padded_batch(name)), logits(model, padded_batch(name)))
    assert any(n.startswith(f"{module}.") for n in loaded.trainable_state())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("lora", torch.float16), ("dora", torch.bfloat16), ("adalora", torch.bfloat16), ("vera", torch.bfloat16)],
)
def test_rounded_files_become_float32(tmp_path, case, dtype):
    model = theirs(case, "llama")
    save(model, tmp_path)
    save_file({n: t.to(dtype) for n, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    with peft_quietly():
        rounded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    loaded = load_adapter_model(build("llama"), tmp_path)
    assert {t.dtype for t in loaded.adapter_state().values()} == {torch.float32}
    close(logits(loaded, padded_batch("llama")), logits(rounded, padded_batch("llama")))


def test_adalora_after_its_run(tmp_path):
    """PEFT then leaves pruned triplets out of the file, in one module all of them, and says in ``rank_pattern`` which."""
    model, batch = theirs("adalora", "llama"), padded_batch("llama")
    config = model.peft_config["default"]
    config.total_step, config.deltaT, config.orth_reg_weight = 4, 1, 0.5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with peft_quietly():
        for step in range(5):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
    assert config.rank_pattern
    save(model, tmp_path)
    sizes = {n: len(t) for n, t in load_file(tmp_path / WEIGHTS).items() if n.endswith("lora_E")}
    assert sum(sizes.values()) == 3 * len(sizes)
    assert len(set(sizes.values())) > 1
    loaded = load_adapter_model(build("llama"), tmp_path)
    close(logits(loaded, batch), logits(model, batch))
    with peft_quietly():
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).eval()
    with torch.no_grad():  # with the orthogonality penalty, which PEFT adds in its inner model only
        assert float(loaded(**batch).loss) == pytest.approx(float(again.base_model(**batch).loss), rel=1e-5)


def net():
    inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    return nn.Sequential(OrderedDict([("b", inner), ("0", nn.Linear(6, 6))]))


def test_a_path_that_is_the_end_of_another(tmp_path):
    """``0`` and ``b.0``: the rank and alpha of the first are not those of the second."""
    options = {
        "target_modules": ["0", "b.1"],
        "rank_pattern": {"0": 3, "b.0": 2},
        "alpha_pattern": {"b.0": 5.0, "0": 7},
    }
    model = get_adapter_model(net(), LoRAConfig(rank=2, alpha=5.0, **options))
    base, x = {n.replace(".base_layer", ""): p for n, p in model.wrapped.state_dict().items()}, torch.eye(6)
    perturb(trainable_parameters(model))
    expected = model(x).detach()
    model.export_peft(tmp_path)

    def plain():
        other = net()
        other.load_state_dict({n: p for n, p in base.items() if "adapter" not in n})
        return other

    with peft_quietly():
        theirs = peft.PeftModel.from_pretrained(plain(), tmp_path).eval()
    close(theirs(x).detach(), expected)
    close(load_adapter_model(plain(), tmp_path)(x).detach(), expected)


# --- strangers' files ---

OPTIONS = {
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "lora_only": ({"bias": "lora_only"}, "bias='lora_only'"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "single tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "bare parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "another model's start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "an option of tomorrow": ({"use_new_idea": {"a": 1}}, "use_new_idea"),
    "another method": ({"peft_type": "IA3"}, "'IA3'.*LORA"),
    "no number": ({"lora_alpha": "six"}, "lora_alpha is 'six'"),
    "alpha without end": ({"lora_alpha": float("inf")}, "Infinity is no JSON number"),
    "alpha 0": ({"lora_alpha": 0}, "alpha=0"),
    "a regular expression": ({"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern has .*, a regular expression"),
    "a pattern of words": ({"alpha_pattern": {"q_proj": "x"}}, "alpha"),
    "a pattern of lists": ({"alpha_pattern": {"q_proj": [1]}}, r"alpha_pattern of q_proj is \[1\]"),
    "patterns in a list": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    "a name as list": ({"modules_to_save": "lm_head"}, "modules_to_save"),
    "too few modules": ({"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, "nothing for .*o_proj"),
    "DoRA without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "a head that is not there": ({"modules_to_save": ["lm_head"]}, "'lm_head.weight'"),
    "rounding": ({"r": True}, None),  # the rank is the file's
}


def refused(base, directory, sentence):
    """In one sentence, and the model is as before."""
    before, trained = all_weights(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ZOError, match=sentence) as raised:
        load_adapter_model(base, directory)
    assert "\n" not in str(raised.value)
    after = all_weights(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [p.requires_grad for p in base.parameters()] == trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA's two files' contents."""
    directory = tmp_path_factory.mktemp("lora")
    save(theirs("lora", "llama"), directory)
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)


def written(directory, values, tensors):
    (directory / CONFIG).write_text(json.dumps(values))
    save_file(tensors, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize("what", OPTIONS)
def test_options_are_heeded_or_refused(tmp_path, saved, what):
    changes, sentence = OPTIONS[what]
    values, tensors = saved
    directory = written(tmp_path, values | changes, tensors)
    if sentence is None:
        load_adapter_model(build("llama"), directory)
    else:
        refused(build("llama"), directory, sentence)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
DAMAGES = {
    "another size": (lambda t: t | {f"{Q}A.weight": torch.zeros(4, 31)}, r"q_proj.*\(4, 31\).*\(4, 32\)"),
    "another rank": (lambda t: t | {f"{Q}B.weight": torch.zeros(32, 3)}, r"q_proj.*\(32, 3\)"),
    "a third axis": (lambda t: t | {f"{Q}A.weight": torch.zeros(4, 32, 1)}, "no matrix lora_A"),
    "rank 0": (lambda t: {n: x[:0] if "lora_A" in n else x[:, :0].clone() for n, x in t.items()}, "rank"),
    "NaN": (lambda t: t | {f"{Q}A.weight": torch.full((4, 32), torch.nan)}, "NaN"),
    "integers": (lambda t: t | {f"{Q}A.weight": torch.zeros(4, 32, dtype=torch.int8)}, "int8"),
    "a half": (lambda t: {n: x for n, x in t.items() if n != f"{Q}B.weight"}, "lora_B' is missing"),
    "a layer missing": (lambda t: {n: x for n, x in t.items() if "layers.1" not in n}, r"nothing for .*layers\.1"),
    "a layer too many": (
        lambda t: t | {n.replace("layers.1", "layers.2"): x.clone() for n, x in t.items()},
        r"layers\.2.*does not have",
    ),
    "other names": (lambda t: {n.removeprefix("base_model."): x for n, x in t.items()}, "base_model"),
    "nothing": (lambda t: {}, "nothing"),
    "a base weight": (
        lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(50, 32)},
        "base weight 'lm_head.weight'",
    ),
    "more tokens": (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(51, 32)}, r"\(51, 32\).*\(50, 32\)"),
    "unknown": (lambda t: t | {"base_model.model.x.y": torch.zeros(1)}, "no such parameter"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_refused(tmp_path, saved, what):
    damage, sentence = DAMAGES[what]
    refused(build("llama"), written(tmp_path, saved[0], damage(saved[1])), sentence)


def test_a_model_with_adapters_is_refused(tmp_path, saved):
    model = get_adapter_model(build("llama"), LoRAConfig())
    with pytest.raises(ZOError, match="adapters already"):
        load_adapter_model(model, written(tmp_path, *saved))


def test_pickles_are_never_read(tmp_path, saved):
    (tmp_path / CONFIG).write_text(json.dumps(saved[0]))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    refused(build("llama"), tmp_path, "pickled")


def test_the_right_base_weight_is_no_harm(tmp_path, saved):
    """Also rounded, as PEFT saves a bf16 model's."""
    head = build("llama").lm_head.weight.detach().to(torch.bfloat16)
    load_adapter_model(
        build("llama"), written(tmp_path, saved[0], saved[1] | {"base_model.model.lm_head.weight": head})
    )


def test_a_tied_head_trained_whole_is_refused(tmp_path):
    """PEFT trains a copy of it; here the embedding would move with it."""
    model = theirs("vera", "gpt2", modules_to_save=["lm_head"])
    save(model, tmp_path)
    refused(build("gpt2"), tmp_path, r"'lm_head.weight'.*tie_word_embeddings")
    config = CONFIGS["gpt2"]()
    config.tie_word_embeddings = False
    parted = transformers.AutoModelForCausalLM.from_config(config).eval()
    base = build("gpt2")
    parted.load_state_dict(base.state_dict())
    close(logits(load_adapter_model(parted, tmp_path), padded_batch("gpt2")), logits(model, padded_batch("gpt2")))


def test_vera_without_its_factors(tmp_path):
    with peft_quietly():
        config = peft.VeraConfig(r=6, target_modules=LINEAR["llama"], save_projection=False)
        peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    refused(build("llama"), tmp_path, "save_projection=True")


def test_adalora_whose_marks_do_not_fit(tmp_path):
    save(theirs("adalora", "llama"), tmp_path)
    values, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    path = "model.layers.0.self_attn.q_proj.lora_E"
    for marks, sentence in (([True] * 3 + [False] * 2, "rank 5"), ([True], "5 truth values"), ("x", "truth values")):
        refused(build("llama"), written(tmp_path, values | {"rank_pattern": {path: marks}}, tensors), sentence)


# --- our optimizers on PEFT's models ---

MADE = ["lora", "dora", "adalora", "vera"]


def step(case, optimizer, mode):
    """One step from one start: the loss, the projected gradients, the trainables after it."""
    model, batch = theirs(case, "llama"), padded_batch("llama")
    own = optimizer(
        trainable_parameters(model), lr=1e-3, zo_eps=1e-2, seed=0, query_schedule=constant_queries(3), module=model, query_mode=mode
    )  # fmt: skip
    loss = own.step(lambda b: model(**b).loss, batch)
    after = torch.cat([p.detach().flatten() for p in trainable_parameters(model)])
    return float(loss), torch.tensor(own.last_update.coefficients), after


@pytest.mark.parametrize(("case", "optimizer"), [*((case, AdaZeta) for case in MADE), ("lora", MeZO), ("vera", ZOAdam)])
def test_batched_queries_on_pefts_models(case, optimizer):
    """Losses and weights to 1e-5; projected gradients, differences over 2 zo_eps, to 1e-3 of the largest."""
    sequential = step(case, optimizer, "sequential")
    with pytest.warns(UserWarning, match="one by one") if case == "adalora" else contextlib.nullcontext():
        batched = step(case, optimizer, "batched")  # PEFT's AdaLoRA adds in place, which copies in one forward cannot
    assert batched[0] == pytest.approx(sequential[0], rel=1e-5)
    close_to = 1e-3 * float(sequential[1].abs().max())
    torch.testing.assert_close(batched[1], sequential[1], rtol=0, atol=close_to)
    if optimizer is not ZOAdam:  # whose first step has the length lr whatever the gradient: its rounding decides signs
        torch.testing.assert_close(batched[2], sequential[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "optimizer"), [("sequential", MeZO), ("batched", AdaZeta), ("split", ZOAdam)])
def test_pefts_models_learn(mode, optimizer):
    """The loss falls, and nothing but the adapters moves."""
    model, batch = theirs("lora", "llama"), padded_batch("llama")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    own = optimizer(
        trainable_parameters(model), lr=1e-3, zo_eps=1e-3, seed=0, query_schedule=constant_queries(4), module=model, query_mode=mode,
        directions="rademacher",
    )  # fmt: skip
    before = float(model(**batch).loss.detach())
    for _ in range(30):
        own.step(lambda b: model(**b).loss, batch)
    assert float(model(**batch).loss.detach()) < before
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
