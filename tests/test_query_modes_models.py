"""Batched and split on more kinds of models and trainables: LoRA by hand, tensor-train LoRA, other attentions, bf16 bases; and ``auto``."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_query_modes import EPS, SCALES, Net, Unmappable, evaluator_of, net_batch, optimizer_of, slice_sizes, take
from tiny_models import build, padded_batch, perturb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zo_opt import MeZO, TTConfig, TTLoRAConfig, get_adapter_model, trainable_parameters
from zo_opt.queries import modes
from zo_opt.queries.modes import copies_at_once, is_worth_batching
from zo_opt.schedules import constant_queries

MODELS = ["llama", "bert", "opt", "gpt2", "t5"]


class HandLoRA(nn.Module):
    """A frozen linear layer and two more beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        perturb(self.down.parameters(), std=0.3)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)


def hand_lora(model):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.requires_grad_(False)
        places = [(parent, n, m) for parent in model.modules() for n, m in parent.named_children()]
        for parent, name, child in places:
            if type(child) is nn.Linear and name in ("q", "v", "query", "value", "q_proj", "v_proj"):
                setattr(parent, name, HandLoRA(child))
    return model


KINDS = {
    "lora by hand": hand_lora,
    "tt-lora": lambda model: get_adapter_model(model, TTLoRAConfig(rank=2, tt_rank=2)),
    "tt": lambda model: get_adapter_model(model, TTConfig(rank=2, bottleneck=4)),
}


def tuned(kind, model):
    model = KINDS[kind](model)
    perturb(trainable_parameters(model))
    return model


def losses(mode, model, batch, queries=3):
    with torch.no_grad():
        return evaluator_of(mode, model, lambda b: model(**b).loss, batch)(queries, SCALES).values


def projected(values):
    return (values[:, 0] - values[:, 1]) / (2 * EPS)


def assert_alike(found, expected, loss=1e-5):
    """Losses to 1e-5 of themselves; what that leaves of projected gradients: twice it, over 2 eps."""
    assert float(expected.std() / expected.mean().abs()) > 1e-5
    torch.testing.assert_close(found, expected, rtol=loss, atol=0)
    error = loss * float(expected.mean()) / EPS
    torch.testing.assert_close(projected(found), projected(expected), rtol=0, atol=error)


def check(model, name, examples=4, tolerance=1e-5):
    """Batched equals sequential, split equals each slice alone; nobody falls back (a warning is an error)."""
    batch = padded_batch(name, examples)
    assert_alike(losses("batched", model, batch), losses("sequential", model, batch), tolerance)
    stops = torch.tensor(slice_sizes(examples, 3)).cumsum(0).tolist()
    found = losses("split", model, batch)
    for q, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        expected = losses("sequential", model, take(batch, start, stop))[q]
        torch.testing.assert_close(found[q], expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", ["lora by hand", "tt-lora"])
@pytest.mark.parametrize("name", MODELS)
def test_lora(kind, name):
    if kind == "lora by hand" and name == "gpt2":
        pytest.skip("its projections are not linear layers")
    check(tuned(kind, build(name)), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bfloat16_bases_under_float32_trainables(kind, name):
    """bf16 keeps 8 bits: sums in another order differ by its rounding."""
    check(tuned(kind, build(name, dtype=torch.bfloat16)), name, tolerance=4e-2)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "opt"])
def test_eager_attention(name):
    model = build(name)
    model.set_attn_implementation("eager")
    check(tuned("tt", model), name)


@pytest.mark.parametrize("mask", ["none", "left", "per head"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_masks_and_grouped_queries(name, mask):
    """Without a mask attention is causal by the kernel's own flag; on the left, padding comes first; a 4-d mask goes in as it is."""
    model, batch = tuned("tt", build(name)), padded_batch(name)
    ids, padding = batch["input_ids"], batch["attention_mask"].bool()
    if mask == "none":
        batch = {"input_ids": ids.clamp(min=3), "labels": ids.clamp(min=3)}
    elif mask == "left":
        batch = {k: v.flip(1) for k, v in batch.items()}
    else:
        causal = torch.ones(9, 9, dtype=torch.bool).tril() & padding[:, None, None]
        batch["attention_mask"] = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
        if name == "gemma2":
            batch["attention_mask"] = {
                "full_attention": batch["attention_mask"],
                "sliding_attention": batch["attention_mask"],
            }
    assert_alike(losses("batched", model, batch), losses("sequential", model, batch))


class Torchs(nn.Module):
    """torch's own encoder and attention modules, with a padding mask and a causal one."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.requires_grad_(False)
        self.adapter = nn.Linear(8, 8)
        perturb(self.adapter.parameters(), std=0.5)
        self.eval()

    def forward(self, x, padding):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[-2])
        return self.encoder(self.adapter(x), src_mask=causal, src_key_padding_mask=padding).square().mean()


@pytest.mark.parametrize("mode", ["batched", "split"])
def test_torchs_own_transformer(mode):
    calls = []
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func is fused)
            return func(*args, **(kwargs or {}))

    model = Torchs()
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))
    batch = {"x": x, "padding": (torch.arange(5) > 2).expand(4, 5).float() * -1e4}
    with torch.no_grad(), Count():
        evaluator_of(mode, model, lambda b: model(**b), batch)(2, SCALES)
    assert sum(calls) == (1 if mode == "batched" else 2)


# --- auto ---


@given(tokens=st.integers(1, 1000), trainables=st.sampled_from([1, 1 << 20, (1 << 20) + 1]))
def test_the_rule(tokens, trainables):
    """Batched where four copies of the batch are few tokens, and the trainables few."""
    small = 4 * tokens <= modes.BATCHED_TOKENS["cpu"] and trainables <= 1 << 20
    assert is_worth_batching(copies_at_once("cpu", tokens), trainables) == small


def run_auto(net, batch, mode="auto", steps=4, **options):
    optimizer = optimizer_of(net, mode, **options)
    for _ in range(steps):
        optimizer.step(net.loss, batch)
    return net.weight.detach().clone()


@pytest.mark.parametrize("examples", [6, 600])
def test_auto_gives_the_same_bits_every_time(examples):
    first, second = (run_auto(Net(), net_batch(examples)) for _ in range(2))
    assert torch.equal(first, second)
    same_as = "batched" if examples == 6 else "sequential"
    assert torch.equal(first, run_auto(Net(), net_batch(examples), same_as))


def test_auto_gives_the_same_bits_on_a_transformer():
    batch, runs = padded_batch("llama"), []
    for _ in range(2):
        model = tuned("tt-lora", build("llama"))
        optimizer = MeZO(
            trainable_parameters(model), lr=1e-3, zo_eps=EPS, module=model, query_mode="auto",
            query_schedule=constant_queries(3),
        )  # fmt: skip
        for _ in range(2):
            optimizer.step(lambda b, model=model: model(**b).loss, batch)
        runs.append([p.detach().clone() for p in trainable_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_model_that_cannot_be_mapped_is_sequential_to_the_bit_after_one_warning():
    """Also in the step that finds it out: a run that is resumed after it, in a new process, finds it out again."""
    net = Unmappable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run_auto(net, net_batch())
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert "one by one" in str(caught[0].message)
    assert torch.equal(found, run_auto(Unmappable(), net_batch(), "sequential"))
    with pytest.warns(UserWarning, match="one by one"):  # another optimizer finds it out for itself
        assert torch.equal(found, run_auto(Unmappable(), net_batch()))
