"""The callback that drives adapters which change as training goes on."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zo_opt.adapters import AdapterModel
from zo_opt.optim import ZerothOrderOptimizer


class AdapterScheduleCallback(TrainerCallback):
    """Calls ``model.step(global_step)`` after every optimizer step and before ``zero_grad``: all that AdaLoRA, LaMDA, AFLoRA and LISA ask of a loop.

    Put it into any Trainer, the stock one included; a :class:`~zo_opt.training.ZOTrainer` has it already. Of no effect on other models. What
    the method adds to the loss is added by the model itself (:meth:`~zo_opt.adapters.AdapterModel.forward`). A method that reads
    gradients gets a zeroth-order optimizer's last estimate.

    >>> from transformers import Trainer
    >>> from zo_opt.training import AdapterScheduleCallback
    >>> def trainer(model, args, rows):
    ...     return Trainer(model=model, args=args, train_dataset=rows, callbacks=[AdapterScheduleCallback()])
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """``state.global_step`` is still the number of the step just made, from 0."""
        model, optimizer = kwargs["model"], unwrapped(kwargs["optimizer"])
        if not isinstance(model, AdapterModel) or model.schedule is None:
            return
        if model.schedule.needs_grad and isinstance(optimizer, ZerothOrderOptimizer):
            optimizer.write_last_grad()
        model.step(state.global_step)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
