"""The Hugging Face Trainer with losses alone: one method takes the place of forward and backward, the Trainer does the rest."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from zo_opt.adapters import AdapterModel, lora_plus_groups, trainable_parameters
from zo_opt.errors import ZOError, reason_of
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.trainer.adapter_trainer import AdapterTrainerMixin
from zo_opt.trainer.arguments import ZOArguments
from zo_opt.trainer.callback import unwrapped
from zo_opt.trainer.card import Tally, complete_card, data_of_run, method_of_run


class ZOTrainerMixin(AdapterTrainerMixin):
    """Put before a Trainer class: ``class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer)``, with arguments that have :class:`ZOArguments` before theirs.

    Estimation takes the place of forward and backward; the Trainer's own ``optimizer.step()``, learning-rate schedule, callbacks, logging,
    evaluation, checkpoints and resuming are left as they are. All micro-batches of a step share their directions, so that gradient
    accumulation equals one larger batch, tokens weighted alike. Training logs have ``queries`` and ``projected_grad_rms`` (root mean square)
    of the last step, and ``forwards`` (a micro-batch's count each) and ``dropped_queries`` so far, in place of ``grad_norm``. Losses that
    are not finite are left out of a log's mean and counted (``nan_losses``); where there are no others, the loss is logged as NaN. The
    model card says the method and the data; so does a line at the start of ``train``.

    An optimizer built by hand can be given as ``optimizers=(optimizer, None)``.

    Raises:
        ZOError: arguments without :class:`ZOArguments`, or a way of running that zeroth order cannot serve.
    """

    args: ZOArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if not isinstance(given, ZOArguments):
            raise ZOError(
                f"this Trainer was given {'no args' if given is None else type(given).__name__}; give it ZOTrainingArguments, or for another "
                "Trainer a dataclass that has ZOArguments before its own arguments."
            )
        self._run_length: tuple[int, int] | None = None  # optimizer steps, and those of an epoch
        self._since_log, self._in_all = Tally(), Tally()
        super().__init__(*args, **kwargs)
        if self.args.zeroth_order:
            self._check_setting()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; with True and no checkpoint yet it starts a new run, so that the same script starts and resumes."""
        directory = Path(self.args.output_dir or "")
        if resume_from_checkpoint is True and not (directory.is_dir() and get_last_checkpoint(str(directory))):
            resume_from_checkpoint = None
        self._since_log, self._in_all = Tally(), Tally()
        if self.args.zeroth_order and self.is_world_process_zero():
            sys.stdout.write(f"{method_of_run(self)} on {data_of_run(self)}\n")
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        loss = result.metrics.get("train_loss", result.training_loss)  # as it was logged
        return TrainOutput(result.global_step, loss, result.metrics)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with what was done and on which data."""
        super().create_model_card(*args, **kwargs)
        if self.args.zeroth_order and self.is_world_process_zero():
            complete_card(Path(self.args.output_dir or "") / "README.md", self)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, noted: schedules of queries ask for the run's length."""
        values = super().set_initial_training_values(*args, **kwargs)
        self._run_length = (int(values[-1]), int(values[1]))
        return values

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The optimizer that the arguments describe, unless one was given."""
        groups = self._param_groups()
        if self.args.zeroth_order:
            if self.optimizer is None:
                if self._run_length is None:
                    raise ZOError(
                        "create_optimizer() was called before train(), which knows the number of steps; call train(), or pass "
                        "optimizers=(optimizer, None)."
                    )
                self.optimizer = self.args.make_zo_optimizer(groups, self.model, *self._run_length)
            optimizer = self.zo_optimizer
            self._check_processes(optimizer)
            if optimizer.setting.module is None:  # so that dropout is off in its evaluations
                optimizer.setting = replace(optimizer.setting, module=self.model)
            return self.optimizer
        if self.optimizer is None and (self.args.loraplus_lr_ratio is not None or isinstance(self.model, AdapterModel)):
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(*(() if model is None else (model,)))

    @property
    def zo_optimizer(self) -> ZerothOrderOptimizer:
        """The zeroth-order optimizer without accelerate's wrapper.

        Raises:
            ZOError: there is another one.
        """
        optimizer = unwrapped(self.optimizer)
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise ZOError(
                f"the optimizer is a {type(optimizer).__name__}; give a zeroth-order one in optimizers=, or zo_optimizer='none' in the "
                "arguments for backpropagation."
            )
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Estimate on one micro-batch; the trainables are left as they were.

        Returns:
            The micro-batch's share of the step's loss, a scalar.
        """
        if not self.args.zeroth_order:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.args.world_size > 1:
            model = self.model  # there are no gradients for DistributedDataParallel to share
        model.train()
        batch = dict(self._prepare_inputs(inputs))
        loss = self.zo_optimizer.estimate(self._closure(model, num_items_in_batch), batch)
        finite = bool(loss.isfinite())
        for tally in (self._since_log, self._in_all):
            tally.add(finite)
        share = loss / self.current_gradient_accumulation_steps if finite else torch.zeros_like(loss)
        return share.to(self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's; of training steps also what the estimates were."""
        if self.args.zeroth_order and "train_loss" in logs:
            logs["train_loss"] = self._in_all.mean(logs["train_loss"])
        if self.args.zeroth_order and "loss" in logs and (record := self.zo_optimizer.last_record) is not None:
            logs.pop("grad_norm", None)
            logs["loss"] = self._since_log.mean(logs["loss"])
            if self._since_log.lost:
                logs["nan_losses"] = self._since_log.lost
            self._since_log = Tally()
            finite = [g for g in record.projected_grads if math.isfinite(g)]
            if finite:
                logs["projected_grad_rms"] = math.sqrt(sum(g * g for g in finite) / len(finite))
            logs["queries"] = record.queries
            logs["forwards"] = self.zo_optimizer.history.forwards
            logs["dropped_queries"] = self.zo_optimizer.dropped_queries
        super().log(logs, *args, **kwargs)

    def _closure(self, model: nn.Module, num_items_in_batch: Any) -> Callable[[dict[str, Any]], Tensor]:
        """The loss of a micro-batch, scaled so that the mean over the step's micro-batches is the loss of the whole batch."""
        # A direction that sees a slice of the batch needs the mean over the slice.
        items = None if self.zo_optimizer.mode == "split" else num_items_in_batch
        whole = items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        if self.label_smoother is not None and self.compute_loss_func is None:
            whole = whole and "num_items_in_batch" in signature(self.label_smoother.__call__).parameters  # not in 4.57
        if (own := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            whole = own
        scale = self.current_gradient_accumulation_steps if whole else 1
        # compute_loss has multiplied the model's loss by the processes where tokens are averaged over all of them.
        spread = items is not None and self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices
        times = scale * (self.accelerator.num_processes if spread else 1)
        # The model has added the penalty to the loss, if the loss is the model's: it must count once.
        added = self.label_smoother is None and self.compute_loss_func is None
        penalised = isinstance(self.model, AdapterModel) and not (added and times == 1)

        def closure(batch: dict[str, Any]) -> Tensor:
            if hasattr(self, "_metrics"):  # TRL's trainers ask the model whether its metrics are those of training
                self.model.training = True
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, dict(batch), num_items_in_batch=items)
            loss = scale * loss
            if penalised and (penalty := self.model.penalty()) is not None:
                loss = loss + (1 - times * added) * penalty
            return loss  # type: ignore[no-any-return]

        return closure

    def _param_groups(self) -> list[Any]:
        args, model = self.args, self.model
        if args.loraplus_lr_ratio is not None:
            return lora_plus_groups(
                model, args.learning_rate, args.loraplus_lr_ratio, args.loraplus_lr_embedding, args.weight_decay
            )
        trained = trainable_parameters(model)
        if args.zeroth_order:
            return trained
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's, which goes on without a state that is not there.

        Raises:
            ZOError: the state is not there or damaged, or the arguments say other numbers than it.
        """
        if checkpoint is None or not self.args.zeroth_order:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if missing := [name for name in ("optimizer.pt", "scheduler.pt") if not (Path(checkpoint) / name).is_file()]:
            raise ZOError(
                f"the checkpoint {checkpoint} holds no {missing[0]}, without which the run would draw its first directions anew; resume from "
                "one that was saved whole (save_only_model=False)."
            )
        optimizer = self.zo_optimizer
        wanted = {"zo_seed": optimizer.setting.seed, "zo_eps": optimizer.choices.zo_eps}
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, EOFError, OSError) as error:
            raise ZOError(
                f"the optimizer's state in {checkpoint} cannot be read ({reason_of(error)}); resume from an earlier checkpoint."
            ) from error
        found = {"zo_seed": optimizer.setting.seed, "zo_eps": optimizer.choices.zo_eps}
        for name, value in wanted.items():
            if value != found[name]:
                raise ZOError(
                    f"the checkpoint's run has {name}={found[name]}, and this one {value}; give the checkpoint's, or start a new run."
                )

    def _check_setting(self) -> None:
        """What only the launched Trainer knows: how accelerate runs, and on how many devices."""
        if self.optimizer_cls_and_kwargs is not None:
            raise ZOError(
                "optimizer_cls_and_kwargs names another optimizer than zo_optimizer; leave it out, or give zo_optimizer='none' with it."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ZOError(
                "accelerate was launched with DeepSpeed or FSDP, which shard the weights that zeroth-order optimizers perturb where they "
                "lie; launch it without."
            )
        if self.args.n_gpu > 1:
            raise ZOError(
                f"the Trainer would spread each batch over {self.args.n_gpu} GPUs by DataParallel; make one visible with CUDA_VISIBLE_DEVICES."
            )

    def _check_processes(self, optimizer: ZerothOrderOptimizer) -> None:
        """The Trainer gives every process rows of its own: their losses must be put together."""
        shared = optimizer.ranks.options.share if optimizer.ranks is not None else None
        if self.args.world_size > 1 and shared != "data":
            raise ZOError(
                f"the Trainer was launched in {self.args.world_size} processes, each with rows of its own, which would go their own ways; "
                "give query_mode='distributed', or an optimizer with Distributed(share='data'), or launch one process."
            )


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``transformers.Trainer`` that tunes with forward passes alone. Takes :class:`ZOTrainingArguments`; everything else as there.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from zo_opt import TTConfig, get_adapter_model
    >>> from zo_opt.training import ZOTrainer, ZOTrainingArguments
    >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = get_adapter_model(LlamaForCausalLM(LlamaConfig(**sizes)), TTConfig(rank=2, bottleneck=8))
    >>> rows = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)]
    >>> args = ZOTrainingArguments(tempfile.mkdtemp(), max_steps=2, disable_tqdm=True, use_cpu=True, report_to="none")
    >>> trainer = ZOTrainer(model=model, args=args, train_dataset=rows)
    >>> result = trainer.train()  # doctest: +ELLIPSIS
    adazeta (zo_eps 0.001, lr 5e-05), ... on 8 rows
    {'train_runtime': ...}
    >>> result.global_step, trainer.zo_optimizer.history.forwards
    (2, 4)
    """
