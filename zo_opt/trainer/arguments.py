"""What the Hugging Face Trainer can be told beyond its own arguments: the zeroth-order optimizer, and LoRA+'s learning rates."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments

from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES, Adam, AMSGrad, ClipProjectedGrads, UpdateRule, ZerothOrderOptimizer
from zo_opt.queries.modes import QUERY_MODES
from zo_opt.schedules import QuerySchedule
from zo_opt.schedules.options import make_schedule

BACKPROPAGATION = "none"
_COPIES = ("batched", "split", "auto")

if TYPE_CHECKING:
    _Base = TrainingArguments
else:
    _Base = object


def _help(said: str) -> dict[str, str]:
    return {"help": said}


@dataclass
class ZOArguments(_Base):
    """Fields to put before those of any ``TrainingArguments``, such as TRL's ``SFTConfig``.

    Learning rate, weight decay, Adam's decays and the seed are the Trainer's own (``learning_rate``, ``weight_decay``, ``adam_beta1``,
    ``adam_beta2``, ``seed``); ``optim`` is not used. What is left open is the optimizer's own. Weight decay is always the Trainer's, so that
    AdaZeta's 0.01 must be asked for.

    Args:
        zo_optimizer: a key of :data:`~zo_opt.optim.OPTIMIZERS`; or "none": backpropagation with the Trainer's own ``optim``.
        zo_eps: perturbation scale, in parameter units.
        zo_seed: of the directions; ``seed`` if not given.
        directions: a name of :data:`~zo_opt.directions.DIRECTIONS`.
        query_schedule: a name of :data:`~zo_opt.schedules.SCHEDULES`.
        query_alpha: AdaZeta's alpha.
        query_beta: AdaZeta's beta, a number or "derived".
        max_queries: the most queries a step takes; the number of queries of the constant schedule.
        min_queries: fewest queries a step takes.
        budget_forwards: forward passes that the budget schedule spends; a micro-batch's count each.
        milestones: ``step:queries`` pairs of the stepwise schedule.
        query_mode: sequential, batched, split or auto; or distributed, for a run of several processes (torchrun), each of which
            sees rows of its own. In split mode the loss of each slice is the mean over its own tokens.
        share_prefix: compute the frozen layers below the first trainable once a step
            (:class:`~zo_opt.prompts.shared_prefix.SharedPrefix` says for which models that is right).
        update_rule: sgd, adam, sign, momentum or amsgrad.
        clip_projected_grads: clip projected gradients at so many times their running root mean square; 0 turns it off.
        max_failed_steps: so many steps in a row without a finite loss stop the run.
        zo_options: the optimizer's own options by name, such as ``{"rank": 2}``; on a command line as JSON.
        loraplus_lr_ratio: LoRA+: the learning rate of B over that of A (16 in the paper); for backpropagation too.
        loraplus_lr_embedding: LoRA+: the learning rate of adapters of embeddings.
        max_grad_norm: for backpropagation alone (1 if not given): zeroth order has no gradient to clip.

    Raises:
        ZOError: an option that is not known, or one of the Trainer's that zeroth order cannot serve.
    """

    zo_optimizer: str = field(
        default="adazeta", metadata=_help('a zeroth-order optimizer, or "none" for backpropagation')
    )
    zo_eps: float = field(default=1e-3, metadata=_help("perturbation scale"))
    zo_seed: int | None = field(default=None, metadata=_help("seed of the directions; --seed if not given"))
    directions: str | None = field(default=None, metadata=_help("kind of directions; the optimizer's own if not given"))
    query_schedule: str | None = field(
        default=None, metadata=_help("schedule of queries; the optimizer's own if not given")
    )
    query_alpha: float = field(default=0.85, metadata=_help("AdaZeta's alpha"))
    query_beta: float | str = field(default=0.4, metadata=_help('AdaZeta\'s beta; in Python also "derived"'))
    max_queries: int | None = field(default=None, metadata=_help("the most queries a step takes"))
    min_queries: int = field(default=1, metadata=_help("fewest queries a step takes"))
    budget_forwards: int | None = field(default=None, metadata=_help("forward passes that the budget schedule spends"))
    milestones: str | None = field(default=None, metadata=_help("step:queries pairs of the stepwise schedule"))
    query_mode: str | None = field(default=None, metadata=_help("sequential, batched, split, auto or distributed"))
    share_prefix: bool = field(
        default=False, metadata=_help("compute the frozen layers below the first trainable once a step")
    )
    update_rule: str | None = field(default=None, metadata=_help("sgd, adam, sign, momentum or amsgrad"))
    clip_projected_grads: float = field(
        default=0.0, metadata=_help("clip at so many times the running root mean square; 0: off")
    )
    max_failed_steps: int = field(
        default=10, metadata=_help("so many steps in a row without a finite loss stop the run")
    )
    zo_options: dict | str | None = field(default=None, metadata=_help("the optimizer's own options, as JSON"))  # type: ignore[type-arg]
    loraplus_lr_ratio: float | None = field(
        default=None, metadata=_help("LoRA+: the learning rate of B over that of A")
    )
    loraplus_lr_embedding: float = field(
        default=1e-6, metadata=_help("LoRA+: the learning rate of adapters of embeddings")
    )
    max_grad_norm: float | None = field(default=None, metadata=_help("for backpropagation alone; 1 if not given"))  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.zeroth_order:
            self._check()
            self._check_trainer_options()
            self.max_grad_norm = 0.0
        elif self.max_grad_norm is None:
            self.max_grad_norm = 1.0
        super().__post_init__()  # type: ignore[no-untyped-call]

    @property
    def zeroth_order(self) -> bool:
        """Whether the loss's derivatives come from forward passes."""
        return self.zo_optimizer != BACKPROPAGATION

    def make_zo_optimizer(
        self, params: list[Any], module: nn.Module, steps: int, steps_per_epoch: int
    ) -> ZerothOrderOptimizer:
        """The optimizer that the arguments describe, for a run of so many optimizer steps.

        Raises:
            ZOError: an option that this optimizer does not have, or an impossible value.
        """
        optional: dict[str, Any] = {
            "directions": self.directions,
            "query_schedule": self._schedule(steps, steps_per_epoch),
            "query_mode": self.query_mode,
            "distributed": Distributed(share="data") if self.query_mode == "distributed" else None,
            "update_rule": self._rule(),
        }
        try:
            return OPTIMIZERS[self.zo_optimizer](
                params,
                lr=self.learning_rate,
                zo_eps=self.zo_eps,
                weight_decay=self.weight_decay,
                seed=self.seed if self.zo_seed is None else self.zo_seed,
                steps_per_epoch=steps_per_epoch,
                module=module,
                share_prefix=self.share_prefix,
                step_control=(ClipProjectedGrads(self.clip_projected_grads),) if self.clip_projected_grads else (),
                max_failed_steps=self.max_failed_steps,
                **{name: value for name, value in optional.items() if value is not None},
                **(self.zo_options or {}),  # type: ignore[arg-type]
            )
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise ZOError(
                f"zo_options={self.zo_options} do not fit zo_optimizer={self.zo_optimizer!r} ({error}); see its class for what it takes."
            ) from error

    def _schedule(self, steps: int, steps_per_epoch: int) -> QuerySchedule | None:
        kind = self.query_schedule or ("adazeta" if self.zo_optimizer == "adazeta" else None)
        if kind is None and self.max_queries is None:
            return None
        return make_schedule(
            kind or "constant", steps=steps, steps_per_epoch=steps_per_epoch, alpha=self.query_alpha, beta=self.query_beta,
            max_queries=self.max_queries, min_queries=self.min_queries, budget_forwards=self.budget_forwards,
            milestones=self.milestones, forwards_per_query=2 * self.gradient_accumulation_steps, query_mode=self.query_mode,
        )  # fmt: skip

    def _rule(self) -> UpdateRule | None:
        if self.update_rule is None:
            return None
        if self.update_rule not in UPDATE_RULES:
            raise ZOError(f"update_rule={self.update_rule!r} is not known; choose one of {', '.join(UPDATE_RULES)}.")
        if OPTIMIZERS[self.zo_optimizer].own_update_rule:
            raise ZOError(
                f"zo_optimizer={self.zo_optimizer!r} is an update rule itself; leave update_rule out, or take mezo."
            )
        rule = UPDATE_RULES[self.update_rule]
        return rule(self.adam_beta1, self.adam_beta2) if rule in (Adam, AMSGrad) else rule()

    def _check(self) -> None:
        """Our own options, as far as they can be judged before the run's length is known."""
        if self.zo_optimizer not in OPTIMIZERS:
            raise ZOError(
                f"zo_optimizer={self.zo_optimizer!r} is not known; choose one of {', '.join(OPTIMIZERS)}, or "
                f"{BACKPROPAGATION!r} for backpropagation."
            )
        if self.query_mode is not None and self.query_mode not in QUERY_MODES:
            raise ZOError(f"query_mode={self.query_mode!r} is not known; choose one of {', '.join(QUERY_MODES)}.")
        if isinstance(self.zo_options, str):
            try:
                self.zo_options = json.loads(self.zo_options)
            except json.JSONDecodeError as error:
                raise ZOError(f"zo_options={self.zo_options!r} is no JSON ({error}).") from error
        if self.zo_options is not None and not isinstance(self.zo_options, dict):
            raise ZOError(
                f'zo_options={self.zo_options!r} is no mapping; give names and values, such as {{"rank": 2}}.'
            )
        self._schedule(1000 if self.query_beta == "derived" else 1, 1)  # which is derived from the number of epochs
        self._rule()

    def _check_trainer_options(self) -> None:
        """The Trainer's options that need a backward pass, or that would be ignored without a word."""
        if self.max_grad_norm:
            raise ZOError(
                f"max_grad_norm={self.max_grad_norm} has no gradient to clip with zo_optimizer={self.zo_optimizer!r}; leave it out, "
                "or clip projected gradients with clip_projected_grads=3."
            )
        if self.fp16:
            raise ZOError(
                "fp16=True scales losses to keep gradients from vanishing, and zeroth order has none; use bf16=True, or load the "
                "frozen model in float16 and leave fp16 out."
            )
        if any(getattr(self, name, None) for name in ("gradient_checkpointing", "activation_checkpointing")):
            raise ZOError(
                "gradient checkpointing saves activations that forward passes alone never keep; set it to False."
            )
        if self.fsdp or self.deepspeed:
            name = "fsdp" if self.fsdp else "deepspeed"
            raise ZOError(
                f"{name} shards the weights, which zeroth-order optimizers perturb where they lie; leave {name} out."
            )
        if self.neftune_noise_alpha:
            raise ZOError(
                "neftune_noise_alpha adds noise in training mode, and zeroth order evaluates losses without; leave it out."
            )
        # transformers switches torch_compile on by these, after this check.
        compiled = self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None
        if compiled and (self.query_mode in _COPIES or self.share_prefix):
            raise ZOError(
                "a compiled model cannot be run on many copies or share its first layers; with torch_compile=True give "
                "query_mode='sequential' and share_prefix=False."
            )


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):
    """``transformers.TrainingArguments`` and the fields of :class:`ZOArguments`.

    >>> import tempfile
    >>> args = ZOTrainingArguments(tempfile.mkdtemp(), zo_optimizer="adazeta", learning_rate=1e-4, max_queries=15)
    >>> args.zo_optimizer, args.zo_eps, args.max_grad_norm
    ('adazeta', 0.001, 0.0)
    """
