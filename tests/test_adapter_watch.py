"""What the watch over a schedule takes for a mistake, and what is left of a model after unloading."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, padded_batch

from zo_opt import (
    AdaLoRAConfig,
    AFLoRAConfig,
    LaMDAConfig,
    LoRAConfig,
    ZOError,
    get_adapter_model,
    trainable_parameters,
)


def test_two_optimizers_on_parts_of_a_model_are_no_mistake():
    model = get_adapter_model(build("llama"), AFLoRAConfig(rank=2, total_steps=4, warmup_steps=0, final_steps=1))
    batch = padded_batch("llama")
    parameters = trainable_parameters(model)
    halves = [torch.optim.AdamW(part, lr=1e-3) for part in (parameters[::2], parameters[1::2])]
    for step in range(3):
        model(**batch).loss.backward()
        for optimizer in halves:
            optimizer.step()
        model.step(step)
        for optimizer in halves:
            optimizer.zero_grad()
    halves[0].step()
    with pytest.raises(ZOError, match="two steps without it"):
        halves[0].step()


@pytest.mark.parametrize("config", [AdaLoRAConfig(rank=2, target_rank=1), LaMDAConfig(rank=2), LoRAConfig(rank=2)])
def test_what_is_left_after_unloading_still_answers(config):
    model = get_adapter_model(build("llama"), config)
    model.unload()
    assert trainable_parameters(model) == []
    assert "0 trainable parameters" in repr(model)
    assert model(**padded_batch("llama")).loss.isfinite()
