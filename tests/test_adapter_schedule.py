"""Adapters that change as training goes on: being driven, the complaint if not, files in mid-run, zeroth-order use."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tiny_models import build, padded_batch
from torch import nn

from zo_opt import (
    AdaLoRAConfig,
    AFLoRAConfig,
    LaMDAConfig,
    LaMDAPlusPlusConfig,
    MeZO,
    ZOAdam,
    ZOError,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.adapters import schedule
from zo_opt.schedules import constant_queries

STEPS = 16
PHASES = {"total_steps": STEPS, "warmup_steps": 2, "final_steps": 5}
CASES = {
    "adalora": AdaLoRAConfig(rank=4, target_rank=2, alpha=100.0, **PHASES),
    "lamda": LaMDAConfig(rank=3, freeze_share=0.5, total_steps=STEPS),
    "lamda++": LaMDAPlusPlusConfig(rank=3, ranks=(2, 4), freeze_share=0.5, total_steps=STEPS),
    "aflora": AFLoRAConfig(rank=3, d_initial=1.0, **PHASES),
}
pytestmark = pytest.mark.parametrize("case", CASES)


def adapted(case):
    return get_adapter_model(build("llama"), CASES[case])


def adamw_of(model):
    return torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)


def step_of(model, optimizer, number, batch):
    model(**batch).loss.backward()
    optimizer.step()
    model.step(number)
    optimizer.zero_grad()


def test_training_on_without_it_is_stopped(case):
    model, batch = adapted(case), padded_batch("llama")
    optimizer = adamw_of(model)
    step_of(model, optimizer, 0, batch)
    model(**batch).loss.backward()
    optimizer.step()
    with pytest.raises(ZOError, match=r"made two steps without it; call model.step"):
        optimizer.step()


def test_a_zeroth_order_optimizer_is_seen(case):
    model, batch = adapted(case), padded_batch("llama")
    optimizer = MeZO(trainable_parameters(model), lr=1e-4)
    optimizer.step(lambda: model(**batch).loss)
    with pytest.raises(ZOError, match="two steps without it"):
        optimizer.step(lambda: model(**batch).loss)


def test_an_optimizer_wrapped_by_accelerate_is_seen(case):
    """And its accumulation of gradients is not mistaken for steps."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        model, batch = adapted(case), padded_batch("llama")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        wrapped, optimizer = accelerator.prepare(model, adamw_of(model))
        for micro in range(6):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    model.step(micro // 3)
                optimizer.zero_grad()
        with pytest.raises(ZOError, match="two steps without it"):
            for _ in range(6):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_accumulating_gradients_is_no_step(case):
    model, batch = adapted(case), padded_batch("llama")
    optimizer = adamw_of(model)
    for step in range(3):
        for _ in range(4):
            model(**batch).loss.backward()
        optimizer.step()
        model.step(step)
        optimizer.zero_grad()


def test_other_models_optimizers_are_nobodys_business(case):
    model = adapted(case)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    step_of(model, adamw_of(model), 0, padded_batch("llama"))


def test_the_watch_ends_with_the_model_and_with_unload(case):
    before = len(schedule._WATCHES)
    model, batch = adapted(case), padded_batch("llama")
    assert len(schedule._WATCHES) == before + 1
    parameters = trainable_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    plain = model.unload()
    assert len(schedule._WATCHES) == before
    plain(**batch)
    for _ in range(3):
        optimizer.step()
    again = adapted(case)
    del again, model
    gc.collect()
    assert len(schedule._WATCHES) == before


def test_a_copied_model_has_a_schedule_of_its_own(case):
    model, batch = adapted(case), padded_batch("llama")
    twin = copy.deepcopy(model)
    before = {n: t.clone() for n, t in model.adapter_state().items()}
    optimizer = adamw_of(twin)
    for step in range(STEPS):
        step_of(twin, optimizer, step, batch)
    assert all(torch.equal(t, before[n]) for n, t in model.adapter_state().items())
    assert model.schedule.moving() in (None, sum(p.numel() for p in trainable_parameters(model)))


@pytest.mark.parametrize("stop", [1, 9])
def test_files_in_mid_run_continue_to_the_same_bits(tmp_path, case, stop):
    model, batch = adapted(case), padded_batch("llama")
    optimizer = adamw_of(model)
    for step in range(stop):
        step_of(model, optimizer, step, batch)
    model.save_pretrained(tmp_path)
    again = load_adapter_model(build("llama"), tmp_path)
    resumed = adamw_of(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(stop, STEPS):
        step_of(model, optimizer, step, batch)
        step_of(again, resumed, step, batch)
    for one, other in (
        (model.adapter_state(), again.adapter_state()),
        (model.schedule_state(), again.schedule_state()),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[n]) for n, t in one.items())


def test_state_of_another_model_is_refused(tmp_path, case):
    adapted(case).save_pretrained(tmp_path)
    (tmp_path / "adapter_schedule.safetensors").write_bytes(b"")
    with pytest.raises(ZOError, match="damaged"):
        load_adapter_model(build("llama"), tmp_path)


@pytest.mark.parametrize("mode", ["sequential", "split"])
@pytest.mark.parametrize("optimizer_type", [MeZO, ZOAdam])
def test_a_whole_schedule_with_zeroth_order(case, mode, optimizer_type):
    """To the end: only so many triplets are left, no column or matrix that was frozen moves."""
    model, batch = adapted(case), padded_batch("llama")
    optimizer = optimizer_type(
        trainable_parameters(model), lr=1e-3, seed=0, query_schedule=constant_queries(2), module=model, query_mode=mode
    )
    for step in range(STEPS):
        before = {n: t.clone() for n, t in model.adapter_state().items()}
        optimizer.step(lambda b: model(**b).loss, batch)
        if model.schedule.needs_grad:
            optimizer.write_last_grad()
        model.step(step)
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    modules = [m.adapter for m in model.adapted_modules().values()]
    if case == "adalora":
        assert sum(int((a.lora_E != 0).sum()) for a in modules) == 2 * len(modules)
    else:
        still = {n for n, t in model.adapter_state().items() if torch.equal(t, before[n])}
        assert all(n in still for n in before if n.endswith("lora_B"))
        assert all(n not in still for n in before if n.endswith(("lora_S", "lambda_d", "lambda_b")))


def test_gradients_come_first(case):
    """A schedule that scores by gradients says what to do where there are none."""
    model, batch = adapted(case), padded_batch("llama")
    optimizer = MeZO(trainable_parameters(model), lr=1e-4)
    optimizer.step(lambda: model(**batch).loss)
    if not model.schedule.needs_grad:
        model.step(0)
        return
    with pytest.raises(ZOError, match=r"write_last_grad\(\)"):
        model.step(0)


def test_step_numbers_are_checked(case):
    for wrong in (-1, 1.0, True):
        with pytest.raises(ZOError, match="global_step"):
            adapted(case).step(wrong)
