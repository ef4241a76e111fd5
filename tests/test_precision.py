"""The frozen base in mixed form: bf16 matrix weights and products in the layers, fp32 everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model, tokenizer_for
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_opt import TTConfig, ZOError, get_adapter_model
from zo_opt.models import precision
from zo_opt.models.precision import set_precision
from zo_opt.system.layers import layer_of

ALL = ("llama", "gpt2", "opt", "bert", "t5")
CPU = torch.device("cpu")


@torch.no_grad()
def logits(architecture: str, model: nn.Module) -> Tensor:
    ids = torch.tensor([tokenizer_for(architecture)("the film is a charming story of two friends")["input_ids"]])
    extra = {"decoder_input_ids": ids[:, :3]} if architecture == "t5" else {}
    out: Tensor = model(input_ids=ids, **extra).logits
    return out


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the linear maps inside the stack of layers (GPT-2 writes them as Conv1D)."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and layer_of(f"{name}.") is not None
    }


@pytest.mark.parametrize("architecture", ALL)
def test_mixed_form(architecture: str) -> None:
    model, exact = make_model(architecture), logits(architecture, make_model(architecture))
    assert set_precision(model, "mixed", CPU) == "mixed"
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == set(matrices(model))
    assert low
    others = {name: p.dtype for name, p in model.named_parameters() if name not in low}
    others |= {name: b.dtype for name, b in model.named_buffers() if b.is_floating_point()}
    assert set(others.values()) == {torch.float32}
    assert any(name.endswith("bias") for name in others) == (architecture in ("gpt2", "opt", "bert"))

    out = logits(architecture, model)
    assert out.dtype == torch.float32
    error = (out - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.03  # bf16 keeps 8 bits: 0.4 % a product, over four layers


def test_the_residual_stream_and_the_head_stay_in_fp32() -> None:
    model = make_model("llama")
    set_precision(model, "mixed", CPU)
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and output.is_floating_point():
                seen[name] = output.dtype

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    logits("llama", model)
    assert {"model.layers.0", "model.layers.3.mlp.down_proj", "model.norm", "lm_head"} <= set(seen)
    assert set(seen.values()) == {torch.float32}


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_fp32_form(architecture: str) -> None:
    model = make_model(architecture).to(torch.bfloat16)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert set_precision(model, "fp32", CPU) == "fp32"
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, weights[name].float())
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {torch.float32}
    assert logits(architecture, model).dtype == torch.float32


def test_fp32_changes_nothing_in_a_model_that_is_fp32() -> None:
    model, exact = make_model("llama"), logits("llama", make_model("llama"))
    set_precision(model, "fp32", CPU)
    assert torch.equal(logits("llama", model), exact)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_the_mixed_form_where_bf16_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: fast)
    assert set_precision(make_model("llama"), "auto", CPU) == ("mixed" if fast else "fp32")


def test_adapters_on_a_mixed_base_are_fp32_and_start_as_an_identity() -> None:
    model = make_model("llama")
    set_precision(model, "mixed", CPU)
    exact = logits("llama", model)
    adapted = get_adapter_model(model, TTConfig(rank=2, bottleneck=8))
    assert {t.dtype for t in adapted.trainable_state().values()} == {torch.float32}
    assert torch.equal(logits("llama", adapted), exact)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ZOError, match="precision='fp8' is not known; choose one of auto, mixed, fp32"):
        set_precision(make_model("llama"), "fp8", CPU)
