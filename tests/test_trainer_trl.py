"""ZOTrainerMixin before TRL's SFTTrainer; TRL is there in the second environment of .ci/run alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from trainer_runs import QUIET, Steps, equal, predicted, weights

from zo_opt import MeZO, TTConfig, get_adapter_model, load_adapter_model
from zo_opt.training import ZOArguments, ZOTrainerMixin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its libraries' own
TEXTS = ["the film is wonderful", "the story is dreadful and long", "a charming way home", "boring"] * 2


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):  # type: ignore[misc]
    pass


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):  # type: ignore[misc]
    pass


def sft_trainer(directory: Path, steps: Steps, model: Any = None, **options: Any) -> Any:
    args = ZOSFTConfig(str(directory), max_length=16, **{**QUIET, **options})
    data = Dataset.from_dict({"text": TEXTS})
    return ZOSFTTrainer(
        model=make_model("llama") if model is None else model, args=args, train_dataset=data, eval_dataset=data,
        processing_class=make_tokenizer("causal"),
        callbacks=[steps],
    )  # fmt: skip


def test_sft_with_losses_alone(tmp_path: Path) -> None:
    options = {"zo_optimizer": "mezo", "max_queries": 2, "learning_rate": 1e-3, "max_steps": 3, "zo_eps": 1e-2}
    steps = Steps()
    trainer = sft_trainer(tmp_path, steps, save_strategy="steps", save_steps=2, **options)
    start = weights(trainer.model)
    trainer.train()
    assert [r.queries for r in steps.records] == [2, 2, 2] and not equal(weights(trainer.model), start)
    log = trainer.state.log_history[0]
    assert log["forwards"] == 4 and log["loss"] == pytest.approx(steps.records[0].loss, abs=1e-4)
    assert {"mean_token_accuracy", "projected_grad_rms"} <= log.keys()  # TRL's own measures are those of training
    assert "eval_loss" in trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert (
        "SFT" in card
        and "| method | mezo (zo_eps 0.01, lr 0.001, max_queries 2)" in card
        and "| training data | 8 rows" in card
    )

    rest = Steps()
    resumed = sft_trainer(tmp_path, rest, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(resumed.model), weights(trainer.model)) and rest.records == steps.records[2:]


def test_our_adapters(tmp_path: Path) -> None:
    steps, options = Steps(), {"zo_optimizer": "adazeta", "max_queries": 2, "max_steps": 2}
    model = get_adapter_model(make_model("llama"), TTConfig(rank=2, bottleneck=8))
    start = weights(model)
    trainer = sft_trainer(tmp_path, steps, model, save_strategy="steps", save_steps=2, **options)
    trainer.train()
    assert len(steps.records) == 2 and not equal(weights(model), start)
    loaded = load_adapter_model(make_model("llama"), tmp_path / "checkpoint-2")
    assert equal(weights(loaded), weights(model))


def test_the_same_loss_as_the_models_own(tmp_path: Path) -> None:
    """All eight rows in one batch, so that their order does not matter; TRL sums in another order than the model."""
    steps = Steps()
    options = {"zo_optimizer": "mezo", "max_steps": 1, "per_device_train_batch_size": 8, "zo_eps": 1e-2}
    sft_trainer(tmp_path, steps, **options).train()
    model, tokenizer = make_model("llama"), make_tokenizer("causal")
    batch = tokenizer([text + "</s>" for text in TEXTS], return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = MeZO(model.parameters(), lr=0.0, zo_eps=1e-2, seed=3)
    count = predicted({"labels": labels})
    loss = optimizer.estimate(lambda: model(**batch, labels=labels, num_items_in_batch=count).loss)
    assert steps.records[0].loss == pytest.approx(float(loss), abs=1e-5)
