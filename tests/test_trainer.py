"""ZOTrainer does what a loop of one's own does, and leaves everything else to the Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_models import build, padded_batch
from trainer_runs import (
    QUIET,
    InOrderStock,
    Steps,
    adapted,
    batches,
    counts_predictions,
    equal,
    predicted,
    rows,
    weights,
    zo_trainer,
)

from zo_opt import AdaZeta, LoRAConfig, MeZO, ZOError, trainable_parameters
from zo_opt.optim import Adam, ClipProjectedGrads
from zo_opt.schedules import adazeta_queries, constant_queries
from zo_opt.training import ZOTrainer, ZOTrainingArguments

STEEP = {"name": "adazeta", "alpha": 0.99, "beta": 0.99}
# arguments -> the optimizer of a plain loop
LOOPS = {
    "adazeta": (
        {"max_queries": 4, "query_schedule": STEEP, "weight_decay": 0.01},
        lambda model: AdaZeta(
            trainable_parameters(model), lr=1e-2, seed=3, module=model, steps_per_epoch=2,
            query_schedule=adazeta_queries(0.99, 0.99, 4),
        ),
    ),
    "parts of one's own": (
        {
            "zo_optimizer": "mezo", "zo_seed": 8, "zo_eps": 1e-2, "directions": "rademacher", "query_mode": "split",
            "max_queries": 2, "update_rule": "adam", "adam_beta2": 0.9, "step_control": "clip",
        },
        lambda model: MeZO(
            trainable_parameters(model), lr=1e-2, seed=8, zo_eps=1e-2, directions="rademacher", query_mode="split",
            module=model, steps_per_epoch=2, query_schedule=constant_queries(2), update_rule=Adam(0.9, 0.9),
            step_control=[ClipProjectedGrads(3.0)],
        ),
    ),
    "a built optimizer": (
        {"zo_optimizer": "mezo"},
        lambda model: MeZO(
            trainable_parameters(model), lr=1e-2, seed=5, query_schedule=constant_queries(2), module=model
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_the_same_bits_as_a_plain_loop(loop: str, tmp_path: Path) -> None:
    options, make = LOOPS[loop]
    steps, model, twin = Steps(), adapted(), adapted()
    trainer = zo_trainer(
        model, tmp_path, data=rows(8), callbacks=[steps], num_train_epochs=4, lr_scheduler_type="cosine", **options
    )
    if loop == "a built optimizer":
        trainer.optimizer = make(model)
    trainer.train()
    optimizer = make(twin)
    scheduler = transformers.get_scheduler("cosine", optimizer, 0, 8)

    def loss(batch: dict[str, Any]) -> Any:
        # In 5.x the mean over the labels, as without a Trainer.
        split = options.get("query_mode") == "split"
        count = {} if split or counts_predictions() else {"num_items_in_batch": predicted(batch)}
        return twin(**batch, **count).loss

    expected = []
    for batch in batches(4, count=8) * 4:
        optimizer.step(loss, batch)
        scheduler.step()
        expected.append(optimizer.last_record)
    assert steps.records == expected
    if loop == "adazeta":
        assert [record.queries for record in expected] == [1] * 6 + [2] * 2
    assert equal(weights(model), weights(twin))
    assert not equal(weights(model), weights(adapted()))
    assert model.training


SMOOTHED = pytest.param(
    {"label_smoothing_factor": 0.1},
    marks=pytest.mark.skipif(not counts_predictions(), reason="4.57 smooths each micro-batch by itself"),
)


@pytest.mark.parametrize("options", [{}, SMOOTHED])
def test_accumulation_equals_a_larger_batch(options: dict[str, Any], tmp_path: Path) -> None:
    """Rows of different lengths: micro-batches of equal size have unequal numbers of tokens. Tolerance: rounding of losses over 2 zo_eps."""
    results = []
    for size, micro_batches in ((8, 1), (2, 4)):
        steps, model = Steps(), adapted()
        trainer = zo_trainer(
            model, tmp_path, callbacks=[steps], max_queries=2, zo_optimizer="mezo", zo_eps=1e-2,
            per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches, **options,
        )  # fmt: skip
        trainer.train()
        assert steps.records[-1].forwards == 4 * micro_batches
        results.append((steps.records, weights(model), trainer.state.log_history))
    for records, parameters, log in results[1:]:
        for record, first in zip(records, results[0][0], strict=True):
            assert record.loss == pytest.approx(first.loss, abs=1e-5)
            assert record.projected_grads == pytest.approx(first.projected_grads, abs=1e-3)
        for mine, theirs in zip(parameters, results[0][1], strict=True):
            torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=0)
        for line, first in zip(log[:3], results[0][2], strict=False):
            assert line["loss"] == pytest.approx(first["loss"], abs=2e-4)


def test_a_penalty_counts_once_however_many_micro_batches(tmp_path: Path) -> None:
    from zo_opt import AdaLoRAConfig

    config = AdaLoRAConfig(
        rank=2, target_rank=1, total_steps=3, warmup_steps=0, final_steps=1, target_modules=["q_proj"]
    )
    losses = []
    for options in (
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "query_mode": "split"},
    ):
        steps = Steps()
        zo_trainer(adapted(config), tmp_path, callbacks=[steps], max_steps=1, zo_optimizer="mezo", **options).train()
        losses.append(steps.records[0].loss)
    assert adapted(config).penalty().item() > 0.05
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    # Each slice's tokens are averaged by themselves, and without the first label: near in 5.x, not equal.
    assert not counts_predictions() or losses[2] == pytest.approx(losses[0], abs=0.1)


class Events(transformers.TrainerCallback):
    """Names of all events, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *_, **__: object.__getattribute__(self, "seen").append(name)
        return object.__getattribute__(self, name)


def test_the_stock_trainers_order_of_events(tmp_path: Path) -> None:
    options = {
        "max_steps": 5, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 3,
    }  # fmt: skip
    stock, ours = Events(), Events()
    args = transformers.TrainingArguments(str(tmp_path / "stock"), **{**QUIET, **options})
    InOrderStock(model=build("llama"), args=args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[stock]).train()
    zo_trainer(build("llama"), tmp_path / "ours", callbacks=[ours], **options).train()
    assert ours.seen == stock.seen
    assert {"on_substep_end", "on_pre_optimizer_step", "on_save", "on_evaluate", "on_epoch_end"} <= set(ours.seen)


def test_what_was_estimated_is_logged_and_reported(tmp_path: Path) -> None:
    class Heard(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.logs.append(dict(logs))

    heard, steps = Heard(), Steps()
    trainer = zo_trainer(
        adapted(), tmp_path, callbacks=[heard, steps], max_steps=2, zo_optimizer="mezo", max_queries=3,
    )  # fmt: skip
    trainer.train()
    for line, record in zip(heard.logs, steps.records, strict=False):
        rms = math.sqrt(sum(g * g for g in record.projected_grads) / 3)
        assert line["projected_grad_rms"] == pytest.approx(rms)
        assert line["loss"] == pytest.approx(record.loss, abs=1e-4)  # 4.57 rounds
        assert line["queries"] == 3 and line["dropped_queries"] == 0 and "grad_norm" not in line
    assert [line["forwards"] for line in heard.logs[:2]] == [6, 12]
    assert "queries" not in heard.logs[-1]  # of the whole run
    assert trainer.state.log_history[0]["forwards"] == 6


def test_tensorboard_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    zo_trainer(adapted(), tmp_path, max_steps=2, report_to="tensorboard").train()
    written = {f.parent for f in tmp_path.rglob("events.out.tfevents.*")}
    board = event_files.EventAccumulator(str(written.pop())).Reload()
    assert [event.value for event in board.Scalars("train/forwards")] == [2, 4]


class Sometimes(ZOTrainer):
    """Of the losses of these numbers nothing comes."""

    calls, lost = 0, (1, 7, 8)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().compute_loss(*args, **kwargs) * (math.nan if self.calls in self.lost else 1)


def test_losses_that_are_not_finite_are_dropped_and_counted(tmp_path: Path) -> None:
    args = ZOTrainingArguments(str(tmp_path), **{**QUIET, "max_steps": 2, "zo_optimizer": "mezo", "max_queries": 2})
    model = adapted()
    trainer = Sometimes(model=model, args=args, train_dataset=rows())
    trainer.train()
    assert trainer.zo_optimizer.dropped_queries == trainer.state.log_history[1]["dropped_queries"] == 2
    assert all(p.isfinite().all() for p in trainable_parameters(model))


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_a_step_without_a_finite_loss_is_logged_as_one(logging_steps: int, tmp_path: Path) -> None:
    """Steps 1, 3 and 4 have none; a log of several steps has the mean of those that have one."""
    options = {"max_steps": 4, "zo_optimizer": "mezo", "max_queries": 1, "logging_steps": logging_steps}
    args = ZOTrainingArguments(str(tmp_path), **QUIET | options)
    trainer = Sometimes(model=adapted(), args=args, train_dataset=rows())
    trainer.lost = (1, 2, 5, 6, 7, 8)
    steps = Steps()
    trainer.add_callback(steps)
    result = trainer.train()
    *logs, last = trainer.state.log_history
    second = pytest.approx(steps.records[1].loss, abs=1e-4)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert [log["loss"] for log in logs] == ([nan, second, nan, nan] if logging_steps == 1 else [second, nan])
    assert [log.get("nan_losses") for log in logs] == ([1, None, 1, 1] if logging_steps == 1 else [1, 2])
    assert last["train_loss"] == second and result.training_loss == second


def test_the_card_says_what_was_done_and_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Dataset.from_list(
        [{name: tensor.tolist() for name, tensor in row.items()} for row in rows(8)], split="train"
    )
    options = {
        "max_steps": 2,
        "zo_optimizer": {"name": "lozo", "rank": 2},
        "query_schedule": "linear",
        "max_queries": 3,
    }
    args = ZOTrainingArguments(str(tmp_path), **QUIET | options)
    trainer = ZOTrainer(model=adapted(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    method = "lozo (zo_eps 0.001, lr 0.01, rank 2, query_schedule linear, max_queries 3), 448 trainable parameters"
    what = f"8 rows, split train, fingerprint {data._fingerprint}"
    assert capsys.readouterr().out.startswith(f"{method} on {what}\n")
    evaluated = trainer.evaluate()["eval_loss"]
    for _ in range(2):  # written anew
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text()
        assert card.count(f"| method | {method} |") == 1 and f"- optimizer: {method}\n" in card and "ADAMW" not in card
        assert f"| training data | {what} |" in card and f"on {what}." in card and "None dataset" not in card
        assert (
            f"eval_loss {evaluated:.4g}" in card
            and f"| forward passes | {trainer.zo_optimizer.history.forwards} " in card
        )


def test_mixed_precision_keeps_the_trainables_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which 4.57 overwrites, for all that comes after
    losses = []
    for bf16 in (False, True):
        steps, model = Steps(), adapted()
        zo_trainer(model, tmp_path, callbacks=[steps], max_steps=1, bf16=bf16, zo_eps=1e-2).train()
        assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
        assert steps.records[0].projected_grads[0] != 0
        losses.append(steps.records[0].loss)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_dropout_is_off_in_evaluations_of_an_optimizer_that_knows_no_module(tmp_path: Path) -> None:
    model = build("gpt2")  # dropout 0.1
    seen: list[bool] = []
    model.transformer.h[0].mlp.dropout.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    trainer = zo_trainer(model, tmp_path, max_steps=1)
    trainer.optimizer = MeZO(trainable_parameters(model), lr=1e-2)
    trainer.train()
    assert seen == [False, False] and model.training


def test_a_classifier_with_adapters_is_evaluated_and_the_best_one_kept(tmp_path: Path) -> None:
    """An AdapterModel's own signature says nothing: labels and columns are those of the model within."""
    whole = padded_batch("bert", 16)
    data = [{**{n: t[i] for n, t in whole.items()}, "idx": i} for i in range(16)]
    model = adapted(LoRAConfig(rank=2, target_modules=["query", "value"]), "bert")
    trainer = zo_trainer(
        model, tmp_path, data=data, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy", learning_rate=0.3,
    )  # fmt: skip
    trainer.eval_dataset = data
    values = iter([0.1, 0.9, 0.3, 0.2])
    trainer.compute_metrics = lambda _: {"accuracy": next(values, 0.0)}
    kept: list[Any] = []
    trainer.add_callback(
        type("Keep", (transformers.TrainerCallback,), {"on_step_end": lambda *_, **__: kept.append(weights(model))})
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert equal(weights(model), kept[1]) and not equal(kept[1], kept[3])
    assert "eval_loss" in trainer.evaluate()
    assert trainer.label_names == ["labels"]


def test_arguments_on_a_command_line(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--zo_optimizer", '{"name": "lozo", "rank": 3}', "--max_queries", "2"]
    (args,) = transformers.HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(
        [
            *line,
            "--update_rule",
            '{"name": "momentum", "beta": 0.5}',
            "--learning_rate",
            "1e-4",
            "--report_to",
            "none",
            "--use_cpu",
            "True",
        ]
    )
    optimizer = args.make_zo_optimizer(list(build("llama").parameters()), torch.nn.Module(), 10, 5)
    assert (optimizer.method.name, optimizer.choices.directions.rank, optimizer.choices.query_schedule(0, 0, None)) == (
        "lozo",
        3,
        2,
    )
    beta = optimizer.choices.update_rule.beta
    assert (beta, args.max_grad_norm, optimizer.param_groups[0]["lr"]) == (0.5, 0.0, 1e-4)


def test_the_budget_counts_micro_batches(tmp_path: Path) -> None:
    trainer = zo_trainer(
        adapted(),
        tmp_path,
        max_steps=3,
        gradient_accumulation_steps=2,
        query_schedule={"name": "budget", "forwards": 24},
    )
    trainer.train()
    assert trainer.zo_optimizer.history.forwards == 24


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"fp16": True}, r"fp16=True scales losses.*use bf16=True"),
    "fsdp": ({"fsdp": "full_shard"}, r"fsdp shards the weights"),
    "deepspeed": ({"deepspeed": "ds.json"}, r"deepspeed shards the weights"),
    "checkpointing": ({"gradient_checkpointing": True}, r"gradient checkpointing saves activations.*set it to False"),
    "max_grad_norm": ({"max_grad_norm": 1.0}, r"max_grad_norm=1.0 has no gradient to clip.*step_control"),
    "neftune": ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha adds noise"),
    "compiled copies": ({"torch_compile": True, "query_mode": "split"}, r"compiled model cannot be run on many copies"),
    "optimizer": ({"zo_optimizer": "adam"}, r"optimizer='adam' is not known; choose one of mezo, "),
    "query mode": ({"query_mode": "all"}, r"query_mode='all' is not known; choose one of sequential"),
    "schedule": ({"query_schedule": "steep"}, r"query_schedule='steep' is not known"),
    "rule": ({"update_rule": "lion"}, r"update_rule='lion' is not known"),
    "two rules": ({"zo_optimizer": "zo-adam", "update_rule": "sgd"}, r"'zo-adam' takes no update_rule"),
    "budget": ({"query_mode": "split", "query_schedule": "budget"}, r"use query_mode='sequential'"),
    "no JSON": ({"directions": "{rank=2}"}, r"directions='{rank=2}' is no JSON"),
    "no name": ({"directions": {"rank": 2}}, r"has no name"),
    "an option of none": ({"zo_optimizer": {"name": "mezo", "colour": 1}}, r"'mezo' has no option 'colour'"),
    "backpropagation": ({"zo_optimizer": "adamw"}, r"zo_optimizer='adamw' is backpropagation; give 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_arguments_that_are_refused(mistake: str, tmp_path: Path) -> None:
    options, sentence = MISTAKES[mistake]
    with pytest.raises(ZOError, match=sentence):
        ZOTrainingArguments(str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_settings_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = transformers.TrainingArguments(str(tmp_path / "new"), **QUIET)
    with pytest.raises(ZOError, match="given TrainingArguments; give it ZOTrainingArguments"):
        ZOTrainer(model=build("llama"), args=stock)
    with pytest.raises(ZOError, match="given no args; give it ZOTrainingArguments"):
        ZOTrainer(build("llama"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ZOError, match="before train"):
        zo_trainer(adapted(), tmp_path).create_optimizer()
    trainer = zo_trainer(adapted(), tmp_path)
    trainer.optimizer = torch.optim.SGD(trainable_parameters(trainer.model), lr=1.0)
    with pytest.raises(ZOError, match="the optimizer is a SGD; give a zeroth-order one"):
        trainer.train()
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ZOError, match="over 2 GPUs by DataParallel"):
        zo_trainer(adapted(), tmp_path)
