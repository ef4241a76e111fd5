"""Parts of adapters: layers of any size against float64, tensorised heads, LoRA files, rank search, the cost table."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import build, padded_batch, perturb
from torch import nn
from transformers.pytorch_utils import Conv1D
from tt_kernels import reconstruct

from zo_opt import LaMDAConfig, TTConfig, TTLoRAConfig, ZOError, get_adapter_model, load_adapter_model
from zo_opt import trainable_parameters as trained
from zo_opt.adapters.tt_linear import TTLinear
from zo_opt.adapters.weights import matrix

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 2, 3, 5, 12, 16, 17, 31, 36, 97, 128])  # ones, primes, powers


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def dense64(train):
    """A train's matrix in float64, core after core."""
    return reconstruct([core.detach().double() for core in train.cores], train.in_dims, train.out_dims)


class Layers(nn.Module):
    """A linear layer of each kind: in -> out features."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.bare = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)
        self.conv = Conv1D(outputs, inputs)

    def forward(self, x):
        return torch.stack([self.linear(x), self.bare(x), self.conv(x)])


def layers(inputs, outputs, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Layers(inputs, outputs), torch.randn(6, inputs)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(1, 6), st.integers(0, 99))
def test_layers_of_any_size(inputs, outputs, rank, seed):
    """Identity at the start; W0 + dense() in float64 gives the adapted and the merged outputs to 1e-5 of the largest."""
    net, x = layers(inputs, outputs, seed)
    config = TTLoRAConfig(rank=rank, target_modules=["linear", "bare", "conv"])
    before = net(x)
    model = get_adapter_model(net, config)
    assert torch.equal(model(x), before)
    perturb(trained(model))
    expected = []
    for module in model.adapted_modules().values():
        adapter = module.adapter
        delta = dense64(adapter.down) @ dense64(adapter.up) * (16 / rank)
        bias = getattr(module.base_layer, "bias", None)
        out = x.double() @ (matrix(module.base_layer).double() + delta)
        expected.append(out if bias is None else out + bias.double())
    close = {"rtol": 0, "atol": 1e-5 * float(torch.stack(expected).abs().max())}
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), torch.stack(expected), **close)
        torch.testing.assert_close(model.merge_and_unload()(x).double(), torch.stack(expected), **close)


def test_the_decomposition_is_balanced_and_exact_at_full_rank():
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    train = TTLinear((4, 4), (4, 3), [4, 12, 3], bias=False, device=CPU)
    train.decompose(weight)
    torch.testing.assert_close(train.dense(), weight, rtol=0, atol=1e-5)
    sizes = torch.stack([core.detach().square().mean().sqrt() for core in train.cores])
    torch.testing.assert_close(sizes, sizes.mean().expand(4), rtol=1e-4, atol=0)
    train.decompose(torch.zeros(16, 12))
    assert not train.dense().any()


# --- a layer replaced by a train ---

HEADS = {"bert": "classifier", "roberta": "classifier.dense", "gpt2": "h.1.mlp.c_proj", "llama": "lm_head"}


@pytest.mark.parametrize("name", HEADS)
def test_a_tensorised_layer_at_full_rank_is_the_layer(name):
    base, batch = build(name), padded_batch(name)
    before, state = logits(base, batch), {n: p.clone() for n, p in base.state_dict().items()}
    model = get_adapter_model(base, TTLoRAConfig(rank=2, modules_to_tensorize=[HEADS[name]], tensorize_rank=99))
    close = {"rtol": 0, "atol": 1e-5 * float(before.abs().max())}
    torch.testing.assert_close(logits(model, batch), before, **close)
    head = next(n for n in model.adapted if n.endswith(HEADS[name]))
    ours = {n for n in model.trainable_state() if n.startswith(head + ".")}
    assert any("cores" in n for n in ours)
    assert not any("base_layer" in n for n in ours)
    assert any(n.endswith(".bias") for n in ours) == (f"{head}.bias" in state)  # trained with the cores
    plain = model.unload()
    assert all(torch.equal(p, state[n]) for n, p in plain.state_dict().items())


@pytest.mark.parametrize("name", HEADS)
def test_a_tensorised_layer_is_saved_and_merged(tmp_path, name):
    config = TTLoRAConfig(rank=2, modules_to_tensorize=[HEADS[name]], rank_pattern={HEADS[name]: 2})
    model, batch = get_adapter_model(build(name), config), padded_batch(name)
    perturb(trained(model))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build(name), tmp_path)
    assert torch.equal(logits(again, batch), expected)
    assert "ranks=[2" in repr(model)
    close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(logits(again.merge_and_unload(), batch), expected, **close)


def test_a_tensorised_layer_within_a_head_that_is_trained_whole(tmp_path):
    """RoBERTa's: the dense layer a train, the projection whole; in bf16."""
    config = TTConfig(rank=2, bottleneck=4, modules_to_save=["classifier"], modules_to_tensorize=["classifier.dense"])
    model, batch = get_adapter_model(build("roberta", dtype=torch.bfloat16), config), padded_batch("roberta")
    names = {n for n in model.trainable_state() if n.startswith("classifier")}
    assert "classifier.out_proj.weight" in names
    assert not any("base_layer" in n for n in names)
    perturb(trained(model))
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("roberta", dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(ZOError, match="nonlinearity"):
        model.merge_and_unload()


def test_count_of_a_tensorised_head():
    """RoBERTa-large's dense layer, 8.8.16 | 16.8.8 of rank 5, with its bias."""
    shape = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        base = transformers.AutoModelForSequenceClassification.from_config(shape)
    model = get_adapter_model(base, TTConfig(rank=5, bottleneck=64, modules_to_tensorize=["classifier.dense"]))
    cores = 40 + 200 + 400 + 400 + 200 + 40
    assert sum(p.numel() for p in trained(model)) == 136_704 + cores + 1024


# --- an ordinary LoRA ---

EXPORTS = {
    "llama": {},
    "gpt2": {},
    "t5": {"layers": 1},
    "bert": {"modules_to_save": ["classifier"]},
    "opt": {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 2}},
    "bart": {},
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers an old question
@pytest.mark.parametrize("name", EXPORTS)
def test_peft_loads_the_exported_lora(tmp_path, name):
    """The same logits to 1e-5 of the largest (fp32)."""
    model, batch = get_adapter_model(build(name), TTLoRAConfig(rank=4, tt_rank=2, **EXPORTS[name])), padded_batch(name)
    perturb(trained(model))
    expected = logits(model, batch)
    model.export_peft(tmp_path / "lora")
    values = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 4, 16.0)
    assert values["fan_in_fan_out"] == (name == "gpt2")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(theirs, batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.equal(logits(theirs.unload(), batch), expected)
    kept = [n for n in load_file(tmp_path / "lora" / "adapter_model.safetensors") if "lora" in n]
    assert len(kept) == 2 * len(model.adapted)


@pytest.mark.parametrize(
    "config",
    [
        TTConfig(rank=2, bottleneck=4),
        LaMDAConfig(rank=2),
        TTLoRAConfig(rank=2, modules_to_tensorize=["lm_head"]),
    ],
)
def test_what_is_no_lora_is_not_exported(tmp_path, config):
    model = get_adapter_model(build("llama"), config)
    with pytest.raises(ZOError, match="LoRA"):
        model.export_peft(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# --- what sits where ---


@pytest.mark.parametrize("each", [False, True])
def test_the_table_adds_up(each):
    config = TTLoRAConfig(rank=2, modules_to_save=["classifier"], rank_pattern={"layer.1.attention.self.query": 1})
    model = get_adapter_model(build("bert"), config)
    table = model.adapter_table(each=each).splitlines()
    assert all(len(line) <= 80 for line in table)
    rows = [line.split() for line in table[1:-1] if line.endswith("%")]  # long names go on in the next line
    count = sum(p.numel() for p in trained(model))
    frozen = sum(p.numel() for n, p in model.adapter_state().items()) - count
    assert table[-1].split() == ["total", "5", f"{count:,}", f"{4 * (count + frozen):,}", "100.0%"]
    assert sum(int(row[-3].replace(",", "")) for row in rows) == count
    # query in two ranks, value in one, and the head; or each of the four and the head
    assert len(rows) == (5 if each else 4)
    assert [sum(kind in row for row in rows) for kind in ("whole", "parallel")] == [1, len(rows) - 1]


def test_printing_is_short():
    text = repr(get_adapter_model(build("llama"), TTLoRAConfig(rank=4)))
    assert "TTLinear(in_dims=(4, 8), out_dims=(4,), ranks=[4, 4], bias=False)" in text
    assert "4 adapters" in text
    assert "Parameter" not in text
    assert len(text.splitlines()) < 60


def test_loading_decomposes_nothing(tmp_path, monkeypatch):
    """What a decomposition would give is in the file; on a large model it takes minutes."""
    config = TTLoRAConfig(rank=2, modules_to_tensorize=["lm_head"])
    model, batch = get_adapter_model(build("llama"), config), padded_batch("llama")
    perturb(trained(model))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("zo_opt.adapters.tt_linear.tt_svd", None)
    assert torch.equal(logits(load_adapter_model(build("llama"), tmp_path), batch), logits(model, batch))
