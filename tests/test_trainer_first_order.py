"""First-order training of adapters: the stock Trainer with one callback, and LoRA+ as arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainer_runs import QUIET, InOrderStock, adapted, batches, equal, predicted, rows, weights, zo_trainer

from zo_opt import AdaLoRAConfig, AFLoRAConfig, LaMDAConfig, LISAConfig, ZOError, trainable_parameters
from zo_opt.training import AdapterScheduleCallback, ZOTrainingArguments

PHASES = {"total_steps": 6, "warmup_steps": 0, "final_steps": 2}
CONFIGS = {
    "adalora": AdaLoRAConfig(rank=3, target_rank=1, target_modules=["q_proj"], **PHASES),
    "lamda": LaMDAConfig(rank=3, freeze_share=0.5, total_steps=6),
    "aflora": AFLoRAConfig(rank=3, d_initial=1.0, **PHASES),
    "lisa": LISAConfig(blocks=1, interval=2),
}
ADAMW = {**QUIET, "optim": "adamw_torch", "max_steps": 6, "max_grad_norm": 0.5}


def by_hand(config: Any) -> list[torch.Tensor]:
    """The weights after the loop that these adapters ask for."""
    model = adapted(config).train()
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0)
    scheduler = transformers.get_scheduler("linear", optimizer, 0, 6)
    for step, batch in enumerate(batches(4)):
        model(**batch, num_items_in_batch=predicted(batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        model.step(step)
        scheduler.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("name", ["adalora", "lamda", "aflora"])
def test_the_stock_trainer_with_the_callback(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name])
    args = transformers.TrainingArguments(str(tmp_path), remove_unused_columns=False, **ADAMW)
    trainer = InOrderStock(model=model, args=args, train_dataset=rows(), callbacks=[AdapterScheduleCallback()])
    trainer.train()
    assert equal(weights(model), by_hand(CONFIGS[name]))


def test_without_the_callback_the_run_is_stopped(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), remove_unused_columns=False, **ADAMW)
    trainer = InOrderStock(model=adapted(CONFIGS["adalora"]), args=args, train_dataset=rows())
    with pytest.raises(ZOError, match="the optimizer made two steps without it"):
        trainer.train()


@pytest.mark.parametrize("name", ["adalora", "lisa"])
def test_a_zo_trainer_without_zeroth_order(name: str, tmp_path: Path) -> None:
    """With what takes turns (LISA) in the optimizer, saved and resumed with its schedule."""
    model, resumed = adapted(CONFIGS[name]), adapted(CONFIGS[name])
    options = {**ADAMW, "zo_optimizer": "none", "save_steps": 3}
    trainer = zo_trainer(model, tmp_path, **{**options, "save_strategy": "steps"})
    trainer.train()
    assert equal(weights(model), by_hand(CONFIGS[name]))
    assert "grad_norm" in trainer.state.log_history[0] and "queries" not in trainer.state.log_history[0]
    if name == "adalora":  # AdamW's state of LISA's layers begins anew with their turn
        zo_trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert equal(weights(resumed), weights(model))


@pytest.mark.parametrize("optimizer", ["none", "mezo"])
def test_loraplus_as_arguments(optimizer: str, tmp_path: Path) -> None:
    model = adapted()
    trainer = zo_trainer(
        model, tmp_path, zo_optimizer=optimizer, loraplus_lr_ratio=16.0, max_steps=1, learning_rate=1e-3, weight_decay=0.1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    names = {id(p): n.split(".")[-2] if n.endswith("weight") else n.split(".")[-1] for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert sorted(rates.values()) == pytest.approx([1e-3, 16e-3])
    assert {name[:6] for name, lr in rates.items() if lr > 2e-3} == {"lora_B"}
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.1}


def test_gradients_are_clipped_as_in_the_stock_trainer(tmp_path: Path) -> None:
    assert ZOTrainingArguments(str(tmp_path), use_cpu=True, zo_optimizer="none").max_grad_norm == 1.0
