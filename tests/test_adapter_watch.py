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
from zo_opt.optim import Backpropagation


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


def test_a_step_of_backpropagation_is_one_whoever_made_an_adamw_before():
    """torch puts its hooks around AdamW.step once the first AdamW is made, also for what calls it from a step of its own."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    model = get_adapter_model(build("llama"), LaMDAConfig(rank=2, total_steps=4))
    optimizer, batch = Backpropagation(trainable_parameters(model), lr=1e-3), padded_batch("llama")
    for step in range(2):
        optimizer.step(lambda b: model(**b).loss, batch)
        model.step(step)
    optimizer.step(lambda b: model(**b).loss * torch.nan, batch)  # dropped: nothing has moved
    optimizer.step(lambda b: model(**b).loss, batch)
    with pytest.raises(ZOError, match="two steps without it"):
        optimizer.step(lambda b: model(**b).loss, batch)
