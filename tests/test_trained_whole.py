"""Modules trained whole (``modules_to_save``) in a model of another dtype, weights that others share among them."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from zo_opt import LoRAConfig, get_adapter_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("gpt2", ["wte"]),
        ("gpt2", ["lm_head"]),
        ("gpt2", ["wte", "lm_head"]),
        ("t5", ["shared"]),
        ("bart", ["lm_head"]),
        ("llama", ["embed_tokens", "lm_head"]),
        ("llama", ["layers.1"]),
        ("llama", ["layers.1", "layers.1.mlp"]),
    ],
)
def test_a_module_trained_whole_in_a_narrow_model(name: str, modules: list[str], dtype: torch.dtype) -> None:
    """A head tied to the embedding gets float32 with it."""
    plain, base = tiny_models.build(name, dtype=dtype), tiny_models.build(name, dtype=dtype)
    targets = {"gpt2": ["h.0.attn.c_attn"], "llama": ["layers.0.self_attn.q_proj"]}.get(name)
    model = get_adapter_model(base, LoRAConfig(rank=2, modules_to_save=modules, target_modules=targets))
    batch = {n: x for n, x in tiny_models.padded_batch(name).items() if n != "labels"}
    if name in tiny_models.SEQ2SEQ:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    with torch.no_grad():
        before, after = plain(**batch).logits, model(**batch).logits
    assert after.dtype == before.dtype
    scale = before.float().abs().max()
    torch.testing.assert_close(after.float(), before.float(), atol=0.05 * float(scale), rtol=0.0)
    whole = [
        p
        for m in modules
        for p in base.get_submodule(next(n for n, _ in base.named_modules() if n.endswith(m))).parameters()
    ]
    assert whole
    assert all(p.dtype == torch.float32 and p.requires_grad for p in whole)
