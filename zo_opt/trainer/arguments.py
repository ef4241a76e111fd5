"""What the Hugging Face Trainer can be told beyond its own arguments: the zeroth-order optimizer, and LoRA+'s learning rates."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments

from zo_opt.choices import split
from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES, Backpropagation, ZerothOrderOptimizer, method_of
from zo_opt.schedules import SCHEDULES, ConstantQueries, QuerySchedule, RunLength, for_run
from zo_opt.schedules.base import two_sided_cost
from zo_opt.trainer.heeded import adams_own, check_heeded

PARTS = ("estimator", "directions", "query_schedule", "update_rule", "step_control")
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

    Learning rate, weight decay, Adam's numbers and the seed are the Trainer's own (``learning_rate``, ``weight_decay``, ``adam_beta1``,
    ``adam_beta2``, ``adam_epsilon``, ``seed``); what is of no use, such as ``optim``, is refused. What is left open is the optimizer's own.
    Weight decay is always the Trainer's, so that AdaZeta's 0.01 must be asked for. A part is a name, ``module:name`` of your own, or a
    name with options, such as ``{"name": "adazeta", "alpha": 0.9}``; on a command line as JSON.

    Args:
        zo_optimizer: of :data:`~zo_opt.optim.OPTIMIZERS`; or "none": backpropagation with the Trainer's own ``optim``.
        zo_eps: perturbation scale, in parameter units.
        zo_seed: of the directions; ``seed`` if not given.
        estimator: of :data:`~zo_opt.estimators.ESTIMATORS`.
        directions: of :data:`~zo_opt.directions.DIRECTIONS`.
        query_schedule: of :data:`~zo_opt.schedules.SCHEDULES`.
        max_queries: the most queries a step takes; the number of queries of the constant schedule.
        query_mode: sequential, batched, split or auto; or distributed, for a run of several processes (torchrun), each of which
            sees rows of its own. In split mode the loss of each slice is the mean over its own tokens.
        update_rule: of :data:`~zo_opt.optim.UPDATE_RULES`.
        step_control: of :data:`~zo_opt.optim.STEP_CONTROLS`.
        max_failed_steps: so many steps in a row without a finite loss stop the run.
        loraplus_lr_ratio: LoRA+: the learning rate of B over that of A (16 in the paper); for backpropagation too.
        loraplus_lr_embedding: LoRA+: the learning rate of adapters of embeddings.
        max_grad_norm: for backpropagation alone (1 if not given): zeroth order has no gradient to clip.
        bf16: as the Trainer's, off if not given; TRL's arguments switch it on, where a CPU has it not.
        gradient_checkpointing: for backpropagation alone; TRL's arguments switch it on.

    Raises:
        ZOError: an option that is not known, or one of the Trainer's that zeroth order cannot serve.
    """

    zo_optimizer: str = field(  # in Python a mapping, too
        default="adazeta", metadata=_help('a zeroth-order optimizer, or "none" for backpropagation')
    )
    zo_eps: float = field(default=1e-3, metadata=_help("perturbation scale"))
    zo_seed: int | None = field(default=None, metadata=_help("seed of the directions; --seed if not given"))
    estimator: dict | str | None = field(default=None, metadata=_help("the optimizer's own if not given"))  # type: ignore[type-arg]
    directions: dict | str | None = field(default=None, metadata=_help("the optimizer's own if not given"))  # type: ignore[type-arg]
    query_schedule: dict | str | None = field(default=None, metadata=_help("the optimizer's own if not given"))  # type: ignore[type-arg]
    max_queries: int | None = field(default=None, metadata=_help("the most queries a step takes"))
    query_mode: str | None = field(default=None, metadata=_help("sequential, batched, split, auto or distributed"))
    update_rule: dict | str | None = field(default=None, metadata=_help("sgd, adam, sign, momentum or amsgrad"))  # type: ignore[type-arg]
    step_control: dict | str | None = field(default=None, metadata=_help("clip or divide-by-spread"))  # type: ignore[type-arg]
    max_failed_steps: int = field(
        default=10, metadata=_help("so many steps in a row without a finite loss stop the run")
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata=_help("LoRA+: the learning rate of B over that of A")
    )
    loraplus_lr_embedding: float = field(
        default=1e-6, metadata=_help("LoRA+: the learning rate of adapters of embeddings")
    )
    max_grad_norm: float | None = field(default=None, metadata=_help("for backpropagation alone; 1 if not given"))  # type: ignore[assignment]
    bf16: bool = field(default=False, metadata=_help("mixed precision: rounds the losses whose differences are taken"))
    gradient_checkpointing: bool | None = field(default=None, metadata=_help("for backpropagation alone"))

    def __post_init__(self) -> None:
        for name in ("zo_optimizer", *PARTS):
            setattr(self, name, _from_json(name, getattr(self, name)))
        check_heeded(self)
        if self.zeroth_order:
            derived = isinstance(self.query_schedule, dict) and self.query_schedule.get("beta") == "derived"
            self._choices(1000 if derived else 1, 1)  # any length that serves: it is not known yet
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
        optimizer: ZerothOrderOptimizer = OPTIMIZERS.find(self._name)(
            params,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed if self.zo_seed is None else self.zo_seed,
            steps_per_epoch=steps_per_epoch,
            module=module,
            max_failed_steps=self.max_failed_steps,
            distributed=Distributed(share="data") if self.query_mode == "distributed" else None,
            **self._choices(steps, steps_per_epoch),
            **{name: value for name, value in adams_own(self).items() if name in method_of(self._name).own},
            **split("zo_optimizer", self.zo_optimizer)[1],
        )
        return optimizer

    @property
    def _name(self) -> str:
        return split("zo_optimizer", self.zo_optimizer)[0]

    def _choices(self, steps: int, steps_per_epoch: int) -> dict[str, Any]:
        """What the optimizer is told beside what the Trainer has.

        Raises:
            ZOError: a part is not possible, or not this optimizer's.
        """
        if OPTIMIZERS.find(self._name) is Backpropagation:
            raise ZOError(
                f"zo_optimizer={self._name!r} is backpropagation; give {BACKPROPAGATION!r}, and optim for which."
            )
        method = method_of(self._name)
        rule = UPDATE_RULES.make(self.update_rule, **adams_own(self)) if self.update_rule is not None else None
        given = {name: getattr(self, name) for name in ("estimator", "directions", "query_mode", "step_control")}
        given |= {"update_rule": rule, "query_schedule": self._schedule(RunLength(steps, steps_per_epoch, *self._cost))}
        given = {name: value for name, value in given.items() if value is not None}
        if "zo_eps" not in method.fixes:
            given["zo_eps"] = self.zo_eps
        unknown = [name for name in split("zo_optimizer", self.zo_optimizer)[1] if name not in method.own]
        if unknown and method.presets:
            raise ZOError(
                f"zo_optimizer={self._name!r} has no option {unknown[0]!r}; it has {', '.join(method.own) or 'none'}."
            )
        method.sort(given | {"lr": 0.0})  # whether they go together
        return given

    def _schedule(self, length: RunLength) -> QuerySchedule | None:
        kind = self.query_schedule or ("adazeta" if self._name == "adazeta" else None)
        if kind is None:
            return None if self.max_queries is None else ConstantQueries(self.max_queries)
        most = {} if self.max_queries is None else dict.fromkeys(("max_queries", "end", "queries"), self.max_queries)
        return for_run(SCHEDULES.make(kind, **most), length)

    @property
    def _cost(self) -> tuple[int, int]:
        """Forward passes of a query, and of a step besides; a micro-batch's count each."""
        return two_sided_cost(self.query_mode, self.gradient_accumulation_steps)

    def _check_trainer_options(self) -> None:
        """The Trainer's options that need a backward pass, or that would be ignored without a word."""
        if self.max_grad_norm:
            raise ZOError(
                f"max_grad_norm={self.max_grad_norm} has no gradient to clip with zo_optimizer={self._name!r}; leave it out, "
                "or clip projected gradients with step_control='clip'."
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
        if compiled and self.query_mode in _COPIES:
            raise ZOError(
                "a compiled model cannot be run on many copies; with torch_compile=True give query_mode='sequential'."
            )


def _from_json(name: str, value: Any) -> Any:
    """A mapping that was given as text, as on a command line."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ZOError(f"{name}={value!r} is no JSON ({error}).") from error


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):
    """``transformers.TrainingArguments`` and the fields of :class:`ZOArguments`.

    >>> import tempfile
    >>> args = ZOTrainingArguments(tempfile.mkdtemp(), zo_optimizer="adazeta", learning_rate=1e-4, max_queries=15)
    >>> args.zo_optimizer, args.zo_eps, args.max_grad_norm
    ('adazeta', 0.001, 0.0)
    """
