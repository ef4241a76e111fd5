"""Short runs of Trainers on a tiny model: rows in their order, no progress bars, nothing reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import build, padded_batch
from torch.utils.data import SequentialSampler

from zo_opt import LoRAConfig, get_adapter_model, trainable_parameters
from zo_opt.trainer.callback import unwrapped
from zo_opt.training import ZOTrainer, ZOTrainingArguments

QUIET = {
    "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "dataloader_pin_memory": False, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3,
}  # fmt: skip


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Padded rows with labels, of different lengths."""
    batch = padded_batch("llama", count)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]


def batches(size: int, count: int = 24) -> list[dict[str, torch.Tensor]]:
    """The same rows as a loop of one's own would see them."""
    whole = padded_batch("llama", count)
    return [{name: tensor[i : i + size] for name, tensor in whole.items()} for i in range(0, count, size)]


def adapted(config: Any = None, name: str = "llama") -> Any:
    """The tiny model with adapters; the same one each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_adapter_model(build(name), config or LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]))


class InOrder:
    """A Trainer that takes the rows as they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class InOrderZO(InOrder, ZOTrainer):
    pass


class InOrderStock(InOrder, transformers.Trainer):
    pass


class Steps(transformers.TrainerCallback):
    """The record of every zeroth-order step."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.records.append(unwrapped(optimizer).last_record)


def zo_trainer(
    model: Any, directory: Path, *, callbacks: Any = None, data: Any = None, shuffled: bool = False, **options: Any
) -> Any:
    """A ZOTrainer on the rows; all further options are its arguments'."""
    args = ZOTrainingArguments(str(directory), **{**QUIET, **options})
    kind = ZOTrainer if shuffled else InOrderZO
    return kind(model=model, args=args, train_dataset=data or rows(), eval_dataset=rows(4), callbacks=callbacks or [])


def counts_predictions() -> bool:
    """Whether the Trainer divides a causal model's loss by the labels that are predicted; 4.57 counts each row's first one, too."""
    return hasattr(transformers.Trainer, "loss_is_scaled_for_ga")  # of the same age


def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the Trainer divides the sum of a batch's losses by."""
    labels = batch["labels"][:, 1:] if counts_predictions() else batch["labels"]
    return labels.ne(-100).sum()


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainable_parameters(model)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
