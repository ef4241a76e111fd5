"""Checkpoints are the Trainer's: resumed runs end at the bits of runs that went through, whatever is trained by whatever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_table import NAMES
from tiny_models import build
from trainer_runs import Steps, adapted, equal, rows, weights, zo_trainer

from zo_opt import AdaLoRAConfig, LISAConfig, TTConfig, ZOError, load_adapter_model
from zo_opt.trainer.callback import unwrapped

ELEVEN = {
    "max_steps": 11,
    "save_steps": 1,
    "max_queries": 4,
    "query_schedule": {"name": "adazeta", "alpha": 0.99, "beta": 0.99},
    "update_rule": "adam",
}


def test_resuming_from_each_of_ten_checkpoints(tmp_path: Path) -> None:
    """Over epochs' ends, with queries that grow, a falling learning rate, clipping and shuffled rows."""
    options = {**ELEVEN, "step_control": "clip"}

    def run(checkpoint: int | None) -> tuple[Any, list[Any]]:
        steps, model = Steps(), adapted()
        saving = "no" if checkpoint else "steps"
        trainer = zo_trainer(
            model, tmp_path, callbacks=[steps], data=rows(10), save_strategy=saving, shuffled=True, **options
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}") if checkpoint else None)
        return weights(model), steps.records

    whole, records = run(None)
    assert len({record.queries for record in records}) > 1 and len(list(tmp_path.glob("checkpoint-*"))) == 11
    for checkpoint in range(1, 11):
        resumed, rest = run(checkpoint)
        assert equal(resumed, whole), checkpoint
        assert rest == records[checkpoint:]


def lisa() -> Any:
    return adapted(LISAConfig(blocks=1, interval=1))


def adalora() -> Any:
    return adapted(
        AdaLoRAConfig(rank=3, target_rank=1, total_steps=4, warmup_steps=0, final_steps=1, target_modules=["q_proj"])
    )


def tied() -> Any:
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def peft() -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


MODELS = {
    "lisa": lisa, "adalora": adalora, "tt": lambda: adapted(TTConfig(rank=2, bottleneck=4)), "whole": tied, "peft": peft,
}  # fmt: skip
RUNS = [*((name, "model") for name in MODELS), *(("lora", name) for name in NAMES)]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # asked by PEFT itself
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_resuming_every_kind_of_model_and_optimizer(kind: str, name: str, tmp_path: Path) -> None:
    make = MODELS.get(kind, adapted)
    options = {"zo_optimizer": "adazeta", "max_queries": 2} if name == "model" else {"zo_optimizer": name}
    if kind == "whole":
        options["learning_rate"] = 1e-3

    def run(checkpoint: str | None) -> Any:
        model = make()
        saving = {} if checkpoint else {"save_strategy": "steps", "save_steps": 2}
        trainer = zo_trainer(model, tmp_path, max_steps=4, **saving, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, unwrapped(trainer.optimizer).state_dict()

    start = weights(make())
    (model, state), (resumed, state_again) = run(None), run(str(tmp_path / "checkpoint-2"))
    assert equal(weights(model), weights(resumed))
    assert not equal(weights(model), start)
    assert state["zo"] == state_again["zo"]
    for slots, again in zip(state["state"].values(), state_again["state"].values(), strict=True):
        assert all(torch.equal(slots[slot], again[slot]) for slot in slots)


def test_the_same_script_starts_and_resumes(tmp_path: Path) -> None:
    counts = []
    for steps in (2, 4):
        rest = Steps()
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "zo_optimizer": "mezo"}
        zo_trainer(adapted(), tmp_path / "out", callbacks=[rest], **options).train(resume_from_checkpoint=True)
        counts.append([record.step for record in rest.records])
    assert counts == [[0, 1], [2, 3]]


def test_a_checkpoint_is_an_adapter(tmp_path: Path) -> None:
    model = adapted()
    trainer = zo_trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded = load_adapter_model(build("llama"), tmp_path / "checkpoint-1")
    assert equal(weights(loaded), weights(model))
    assert '"peft_type": "LORA"' in (tmp_path / "checkpoint-1" / "adapter_config.json").read_text()
    trainer.save_model(str(tmp_path / "last"))
    assert {f.name for f in (tmp_path / "last").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ZOError, match="holds a 'lora' adapter and the model a 'tt' one"):
        zo_trainer(MODELS["tt"](), tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_checkpoint_without_its_optimizer(name: str, damage: str, tmp_path: Path) -> None:
    """It would begin with the run's first directions and learning rate, at its middle."""
    zo_trainer(adapted(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-1" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    sentence = f"holds no {name}" if damage == "gone" else "cannot be read .*earlier checkpoint"
    with pytest.raises(ZOError, match=sentence):
        zo_trainer(adapted(), tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("option", [{"zo_eps": 0.5}, {"zo_seed": 5}])
def test_a_checkpoint_of_other_numbers(option: dict[str, Any], tmp_path: Path) -> None:
    zo_trainer(adapted(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ZOError, match=f"the checkpoint's run has {next(iter(option))}="):
        zo_trainer(adapted(), tmp_path, max_steps=2, **option).train(resume_from_checkpoint=True)


def test_what_the_trainer_pickles_is_read_back_without_unpickling(tmp_path: Path) -> None:
    trainer = zo_trainer(adapted(), tmp_path, max_steps=1, zo_optimizer="hizoo", save_strategy="steps", save_steps=1)
    trainer.train()
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert state["zo"]["step"] == 1 and state["state"]
