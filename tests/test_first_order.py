"""Backpropagation in the loop's terms: the same bits as AdamW, nothing non-finite in the weights, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_main
from torch import Tensor, nn

from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.optim import Backpropagation
from zo_opt.record.metrics import MetricsWriter
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups
from zo_opt.training.config import TrainConfig

Options = Callable[..., list[str]]


def problem() -> tuple[nn.Linear, Callable[[Any], Tensor], Tensor]:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]]))
        model.bias.zero_()
    batches = torch.linspace(-2, 2, 20 * 4 * 3).view(20, 4, 3)
    return model, lambda batch: (model(batch) - 1).square().sum(), batches


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_same_bits_as_adamw_by_hand(clip: float) -> None:
    model, closure, batches = problem()
    optimizer = Backpropagation(model.parameters(), lr=0.03, beta2=0.99, weight_decay=0.1, max_grad_norm=clip)
    twin, twin_closure, _ = problem()
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.03, betas=(0.9, 0.99), weight_decay=0.1)
    for batch in batches:
        loss = optimizer.step(closure, batch)
        expected = twin_closure(batch)
        expected.backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(twin.parameters(), clip) > clip
        adamw.step()
        adamw.zero_grad()
        assert loss == expected
        assert not loss.requires_grad
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)
    assert optimizer.history.forwards == 3 * len(batches)
    assert optimizer.step_count == len(batches)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(what: str) -> None:
    theta = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = Backpropagation([theta], lr=0.1, weight_decay=0.1, max_grad_norm=1.0, max_failed_steps=3)
    optimizer.step(lambda _: theta.square().sum(), None)
    before, moments = theta.detach().clone(), optimizer.state[theta]["exp_avg"].clone()

    def bad(_: Any) -> Tensor:
        # The root's derivative at zero is infinite, its value is not.
        return theta.sum() * float("nan") if what == "loss" else (theta - theta.detach()).abs().sqrt().sum()

    for _ in range(2):
        optimizer.step(bad, None)
    assert optimizer.dropped_queries == optimizer.failed_steps == 2
    assert optimizer.last_record is not None and optimizer.last_record.dropped == 1
    optimizer.step(lambda _: theta.square().sum() * 0.0, None)  # in a row: a good one between starts anew
    assert optimizer.failed_steps == 0
    moved = theta.detach().clone()
    for _ in range(2):
        optimizer.step(bad, None)
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        optimizer.step(bad, None)
    assert torch.equal(theta, moved)
    assert before.isfinite().all() and moments.isfinite().all()


def test_ten_steps_in_a_row_by_default() -> None:
    theta = nn.Parameter(torch.ones(2))
    optimizer = Backpropagation([theta], lr=0.1)
    for _ in range(9):
        optimizer.step(lambda _: theta.sum() * float("inf"), None)
    with pytest.raises(NonFiniteLossError):
        optimizer.step(lambda _: theta.sum() * float("inf"), None)
    assert torch.equal(theta, torch.ones(2))


def test_a_dropped_first_step_does_not_upset_a_scheduler() -> None:
    theta = nn.Parameter(torch.ones(2))
    optimizer = Backpropagation([theta], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step(lambda _: theta.sum() * float("nan"), None)
    scheduler.step()  # warnings are errors here


def test_unsound_weights_are_refused() -> None:
    with pytest.raises(ZOError, match="NaN"):
        Backpropagation([nn.Parameter(torch.tensor([float("nan")]))], lr=0.1)


def test_its_state_continues_to_the_same_bits() -> None:
    model, closure, batches = problem()
    optimizer = Backpropagation(model.parameters(), lr=0.03, max_grad_norm=1.0, steps_per_epoch=4)
    for batch in batches[:7]:
        optimizer.step(closure, batch)
    twin, twin_closure, _ = problem()
    twin.load_state_dict(model.state_dict())
    again = Backpropagation(twin.parameters(), lr=0.5, max_grad_norm=1.0, steps_per_epoch=4)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for batch in batches[7:]:
        optimizer.step(closure, batch)
        again.step(twin_closure, batch)
        assert again.last_record == optimizer.last_record
    assert torch.equal(model.weight, twin.weight)
    assert again.history == optimizer.history


def test_lora_plus_reaches_the_optimizer() -> None:
    from conftest import make_model

    from zo_opt import LoRAConfig, get_adapter_model

    model = get_adapter_model(make_model("llama"), LoRAConfig(rank=2))
    config = TrainConfig(optimizer="adamw", adapter="lora", loraplus_lr_ratio=16.0)
    optimizer = make_optimizer(config, model, make_param_groups(config, model, 1e-3), 1e-3, 1)
    assert isinstance(optimizer, Backpropagation)
    names = {id(p): n for n, p in model.named_parameters()}
    lrs = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {lr for name, lr in lrs.items() if "lora_B" in name} == {1.6e-2}
    assert {lr for name, lr in lrs.items() if "lora_A" in name} == {1e-3}


ADAPTERS = ("lora", "adalora", "lamda", "lisa")


def first_order(toy_options: Options, out: Path, adapter: str, **changes: Any) -> list[str]:
    return toy_options(
        output_dir=out, adapter=adapter, optimizer="adamw", lr=1e-3, steps=8, save_steps=3,
        query_mode=None, query_schedule=None, queries=None, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_killed_and_resumed_is_as_uninterrupted(
    adapter: str, toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_main(first_order(toy_options, whole, adapter)) == 0
    original = MetricsWriter.write

    def write(self: MetricsWriter, record: Any, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == 4:  # the checkpoint is after step 2
            raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        with pytest.raises(SystemError):
            run_main(first_order(toy_options, broken, adapter))
    assert run_main(["train", "--output_dir", str(broken), "--resume"]) == 0
    for path in whole.glob("adapter*.safetensors"):  # a checkpoint has times
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name
    losses = [
        [json.loads(line)["loss"] for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, broken)
    ]
    assert losses[0] == losses[1]
    assert not (whole / "journal").exists()


def test_there_is_nothing_to_replay(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_main(first_order(toy_options, out, "lora")) == 0
    capsys.readouterr()
    assert run_main(["replay", str(out), "--to", str(tmp_path / "again")]) == 2
    assert "journal" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("adapter", ["lisa", "adalora"])
def test_zeroth_order_drives_adapters_that_change_without_a_journal(
    adapter: str, toy_options: Options, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_main(toy_options(output_dir=out, adapter=adapter, optimizer="mezo", lr=1e-5, steps=4)) == 0
    assert not (out / "journal").exists()
    assert json.loads((out / "results.json").read_text())["steps"] == 4
    shutil.rmtree(out)


@pytest.mark.parametrize("adapter", ["lisa", "adalora"])
@pytest.mark.parametrize("optimizer", ["mezo", "adamw"])
def test_dropped_steps_do_not_stop_adapters_that_change(
    adapter: str, optimizer: str, toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few losses that are not finite, in the middle."""
    from zo_opt.training import stepper

    calls, original = [0], stepper.training_loss

    def loss(*arguments: Any) -> Tensor:
        calls[0] += 1
        value = original(*arguments)
        return value * float("nan") if 5 <= calls[0] <= 12 else value

    monkeypatch.setattr(stepper, "training_loss", loss)
    out = tmp_path / "out"
    changes = {"query_schedule": None, "queries": None} | (
        {"query_mode": None} if optimizer == "adamw" else {"directions": "gaussian"}
    )
    line = toy_options(output_dir=out, adapter=adapter, optimizer=optimizer, lr=1e-5, steps=14, **changes)
    assert run_main(line) == 0
    assert json.loads((out / "results.json").read_text())["dropped"] >= 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("directions", "gaussian"), ("query_mode", "split"), ("schedule", "linear"), ("schedule", {"name": "constant", "queries": 3}),
        ("update_rule", "sgd"), ("step_control", "clip"), ("zo_eps", 1e-3), ("estimator", "one-sided"), ("line_search", [0, 1]),
    ],
)  # fmt: skip
def test_options_of_zeroth_order_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ZOError, match=option):
        TrainConfig(optimizer="adamw", **{option: value}).check()
