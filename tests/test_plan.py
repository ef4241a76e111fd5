"""What plan foretells: against the allocator's own record, counts that are known, and every adapter and optimizer there is."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import transformers
from allocator import allocated
from conftest import run_main
from tiny_models import CONFIGS, MASKED, SEQ2SEQ, build

from zo_opt import MeZO, get_adapter_model, trainable_parameters
from zo_opt.adapters import ADAPTERS
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, ZerothOrderOptimizer
from zo_opt.planning import Setting, make_skeleton, plan_method, read_config
from zo_opt.system.memory import parse_bytes, peak_memory, reset_peak_memory, total_memory
from zo_opt.training.config import TrainConfig
from zo_opt.training.pairings import PAIRINGS, get_pairing

SMALL = Setting(batch_size=4, length=24, precision="fp32", device="cpu")
CPU = torch.device("cpu")


def skeleton_of(name):
    config = CONFIGS[name]()
    config.architectures = ["BertForMaskedLM" if name in MASKED else "LlamaForCausalLM"]
    config.vocab_size = 300
    return make_skeleton(config, "lm", name)


def wide(name):
    """Wide enough that scalars and masks weigh little."""
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=500, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
            architectures=["BertForMaskedLM"],
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=500, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=384, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    return make_skeleton(config, "lm", name)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("method", ["full", "bitfit", "lora", "dora", "vera", "adapter", "mezo", "mezo-lora"])
def test_a_step_takes_what_is_foretold(name, method):
    """Tensors of a real step, weights and optimizer state added: within 30 % (small things weigh more here than in a real model)."""
    skeleton, setting = wide(name), Setting(8, 64, "fp32", "cpu", logits="all", query_mode="sequential")
    found = plan_method(skeleton, get_pairing(method).config(), setting)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_adapter_model(
            type(skeleton)(skeleton.config).eval(), TrainConfig(adapter=get_pairing(method).adapter).make_adapter()
        )
        ids = torch.randint(3, 500, (8, 64))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    batch, trained = {"input_ids": ids, "attention_mask": mask, "labels": ids}, trainable_parameters(model)
    if get_pairing(method).config().zeroth_order:
        optimizer = MeZO(trained, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=False)

    def step():
        if isinstance(optimizer, ZerothOrderOptimizer):
            optimizer.step(lambda b: model(**b).loss, batch)
            return
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    assert found.peak == pytest.approx(found.weights + found.optimizer + allocated(step), rel=0.3)


def test_all_logits_are_seen():
    skeleton, logits = skeleton_of("llama"), 4 * 24 * 300 * 4
    found = [
        plan_method(skeleton, get_pairing("lora").config(), Setting(4, 24, "fp32", "cpu", logits=w))
        for w in ("labels", "all")
    ]
    assert found[1].peak - found[0].peak >= 2 * logits  # logits and their gradient


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_is_planned(name, adapter):
    skeleton = skeleton_of(name)
    first, zeroth = (plan_method(skeleton, get_pairing(f"{o}:{adapter}").config(), SMALL) for o in ("adamw", "mezo"))
    for found in (first, zeroth):
        assert found.trainable > 0
        assert found.weights < found.peak
    assert first.trainable == zeroth.trainable
    assert first.activations > 2 * zeroth.activations / 3
    assert first.optimizer == 2 * first.gradients > 0
    assert zeroth.gradients == zeroth.optimizer == 0


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_every_optimizer_is_planned(optimizer):
    """Its state is what its update rule and the method itself keep: that of a real one."""
    found = plan_method(skeleton_of("llama"), get_pairing(f"{optimizer}:lora").config(), SMALL)
    assert found.gradients == 0
    assert found.activations > 0
    if optimizer == "zo-kalman":
        with pytest.raises(ZOError, match="Kalman"):
            plan_method(skeleton_of("llama"), get_pairing("zo-kalman:full").config(), SMALL)
        return
    config = TrainConfig(optimizer=optimizer, adapter="lora")
    theta = torch.nn.Parameter(torch.ones(3))
    rule = {"update_rule": config.make_update_rule()} if config.make_update_rule() is not None else {}
    made = OPTIMIZERS[optimizer]([theta], lr=0.0, module=torch.nn.ParameterList([theta]), **rule)
    made.slots()
    state = sum(t.nbytes for t in made.state[theta].values())
    assert found.optimizer * theta.nbytes == state * 4 * found.trainable


@pytest.mark.parametrize("name", PAIRINGS)
def test_every_method_is_planned(name):
    found = plan_method(skeleton_of("llama"), get_pairing(name).config(), Setting(2, 16, "mixed", "cuda"))
    assert found.peak > found.weights > 0


def test_precisions_and_quantised_bases():
    def weights(precision, quantise=None):
        setting = Setting(2, 16, precision, "cpu", quantise=quantise)
        return plan_method(skeleton_of("llama"), get_pairing("lora").config(), setting).weights

    assert weights("bf16") < weights("mixed") < weights("fp32")
    assert weights("mixed", "int4") < weights("mixed", "int8") < weights("mixed")
    assert weights("fp32", "int8") == weights("mixed", "int8")


def test_more_costs_more():
    skeleton = skeleton_of("llama")

    def peak(method="lora", **changes):
        setting = {"batch_size": 4, "length": 24, "precision": "fp32", "device": "cpu"} | changes
        return plan_method(skeleton, get_pairing(method).config(), Setting(**setting)).peak

    assert peak() < peak(batch_size=8) < peak(batch_size=8, length=48)
    assert peak(layers=1) < peak()
    assert peak("mezo-lora") < peak() < peak("full")
    assert peak("mezo-lora", query_mode="sequential") < peak("mezo-lora", query_mode="batched")


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in (*MASKED, *SEQ2SEQ)])
def test_architectures(name):
    for method in ("lora", "mezo"):
        assert plan_method(skeleton_of(name), get_pairing(method).config(), SMALL).peak > 0


def test_encoder_decoder():
    for name in SEQ2SEQ:
        skeleton = make_skeleton(CONFIGS[name](), "lm", name)
        assert plan_method(skeleton, get_pairing("lora").config(), SMALL).activations > 0


def test_nothing_is_touched():
    """The skeleton stays as it is; no random number is drawn."""
    state, skeleton = torch.get_rng_state(), skeleton_of("llama")
    before = {n: (p.shape, p.dtype, p.requires_grad) for n, p in skeleton.named_parameters()}
    for method in ("lora", "mezo", "lamda"):
        plan_method(skeleton, get_pairing(method).config(), Setting(2, 16, "mixed"))
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in skeleton.named_parameters()} == before
    assert all(p.is_meta for p in skeleton.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_built_in_config_needs_no_files():
    """SmolLM2-135M's count."""
    skeleton = make_skeleton(read_config("smollm2-135m-instruct"), "lm", "")
    assert sum(p.numel() for p in skeleton.parameters()) == 134_515_008


def test_published_counts():
    """methods.md: Llama-2-7B; LoRA r8 on q and v."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    found = plan_method(make_skeleton(config, "lm", ""), get_pairing("lora").config(), Setting(1, 16))
    assert found.trainable == 4_194_304
    assert found.adapter == 4 * found.trainable
    assert found.optimizer == 8 * found.trainable


def test_a_process_takes_its_base_and_the_most_of_loading_a_step_and_saving():
    whole = plan_method(skeleton_of("llama"), get_pairing("mezo").config(), Setting(1, 8, "fp32", "cpu"))
    assert whole.saving == whole.weights + 3 * whole.adapter
    assert whole.process(1000) == 1000 + max(whole.saving, whole.peak)
    found = plan_method(skeleton_of("llama"), get_pairing("mezo-lora").config(), Setting(1, 8, "mixed", "cpu"))
    assert found.loading > found.weights  # the float32 checkpoint is mapped while bf16 weights are made of it
    assert found.process(1000) == 1000 + max(found.loading, found.peak, found.saving)


# --- the command ---


@pytest.fixture
def model_dir(tmp_path):
    build("llama").save_pretrained(tmp_path / "tiny")
    for path in (tmp_path / "tiny").glob("*.safetensors"):
        path.unlink()  # the config alone
    return tmp_path / "tiny"


def test_command(model_dir, tmp_path, capsys):
    line = ["plan", "--model_name_or_path", str(model_dir), "--methods", "lora,mezo-lora,adamw:tt-lora"]
    for ending in (".json", ".csv", ".md"):
        assert run_main([*line, "--length", "16", "--memory", "24GB", "--out", str(tmp_path / f"plan{ending}")]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in ("lora", "adamw:tt-lora", "process", "yes", "Estimates"))
    data = json.loads((tmp_path / "plan.json").read_text())
    assert [m["method"] for m in data["methods"]] == ["lora", "mezo-lora", "adamw:tt-lora"]
    with (tmp_path / "plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["peak"]) for r in rows] == [m["peak"] for m in data["methods"]]
    assert (tmp_path / "plan.md").read_text().count("\n") == 5


def test_the_table_is_whole_in_80_columns(model_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    methods = "adazeta-feedback,full,zo-conservative:tt-lora"
    assert run_main(["plan", "--model_name_or_path", str(model_dir), "--methods", methods, "--length", "64"]) == 0
    table = capsys.readouterr().out.partition("Estimates")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert sum(line.rstrip().endswith("yes") for line in table) == 3  # planned for this machine's own memory


def test_a_method_that_does_not_fit_the_model_has_a_note(model_dir, capsys):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 1, "model_type": "olmo", "architectures": ["OlmoForCausalLM"]})
    )
    assert (
        run_main(["plan", "--model_name_or_path", str(model_dir), "--methods", "lora,loretta", "--length", "64"]) == 0
    )
    assert "loretta: there are no default targets for model type 'olmo'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp31"], "precision"),
        (["--batch_size", "0"], "batch_size"),
        (["--head", "classification", "--logits", "all"], "language models"),
        (["--out", "plan.txt"], ".json"),
        (["--memory", "24"], "unit"),
        (["--methods", "lara"], "lara"),
    ],
)
def test_mistakes(options, message, capsys):
    assert run_main(["plan", *options]) == 2
    assert message in capsys.readouterr().err


# --- memory in use ---


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 gib", 3 << 29), ("512MiB", 512 << 20), ("2kB", 2000)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


def test_memory_of_this_machine():
    reset_peak_memory(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert held.nbytes < peak_memory(CPU) < total_memory(CPU) < 1 << 50
