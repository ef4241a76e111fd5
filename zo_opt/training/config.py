"""Everything ``zo-opt train`` can be told, with its defaults: the recipe of docs/recipe.md."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from zo_opt.adapters import ADAPTERS, AdapterConfig, make_config
from zo_opt.adapters.tt_init import FEATURES
from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.models import builtin
from zo_opt.models.quantisation import check_kind
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES, Adam, ClipProjectedGrads, StepControl, UpdateRule, first_order
from zo_opt.prompts.prefix_store import PLACES
from zo_opt.record.trackers import check_trackers
from zo_opt.schedules import QuerySchedule
from zo_opt.schedules.options import make_schedule
from zo_opt.tasks import objectives
from zo_opt.tasks.batches import ORDERS

_ADAPTER_FIELDS = ("rank", "rank_pattern", "tt_rank", "scale", "bottleneck", "activation", "target_modules", "layers")
# Option -> field of an adapter's configuration.
ADAPTER_OPTIONS = {name: name for name in (*_ADAPTER_FIELDS, "modules_to_tensorize")} | {"lora_alpha": "alpha"}
_Options = TypeVar("_Options")
LR_SCHEDULES = ("linear", "cosine", "constant")


@dataclass
class TrainConfig:
    """Options of a training run.

    Args:
        model_name_or_path: the built-in model, a Hugging Face id or a local directory.
        head: "lm" scores label words with the language-model head; "classification" trains a new head.
        trust_remote_code: let the checkpoint's own Python code run.
        device: cpu, cuda or auto.
        precision: of the frozen base: "mixed" (bf16 matrix products, fp32 everything else), "fp32", or "auto".
        quantise: keep the frozen base's weights in few bits (docs/any_forward.md): int8 or int4 (torchao), bnb-int8 or bnb-nf4
            (bitsandbytes). In full if not given.
        objective: what is trained: loss; or, without a gradient and with zeroth-order optimizers alone, 1 - accuracy, f1 or exact_match
            (of what the model writes) on the batch, or minus the mean of your_module:reward (docs/any_forward.md).
        task: a built-in task (docs/tasks.md): labels (sst2, rte, cb, boolq, copa, mrpc, piqa), generation (arithmetic, nq_open, sciq) or
            language modelling (sciq-text; lm: on your own --train_file). Its prompt is used for --train_file too unless --template
            is given.
        train_file: your own rows, .jsonl, .csv or .tsv; for language modelling also .txt.
        eval_file: held-out rows; without it some training rows are held out.
        text_column: the column that {text} in the template stands for.
        label_column: the column of the label.
        target_column: the column of the text to write: makes your own rows a generation task.
        template: prompt with columns in braces, such as "{text} It was".
        verbalizers: label words, as "label=word,label=word" or in the labels' sorted order "word,word".
        max_train_rows: use only the first so many training rows.
        held_out: rows to hold out where there is no eval_file (at most 30 % of all); of running text the last lines.
        validation: evaluate on rows held out of the training rows instead, for choosing options; the held-out rows stay unseen.
        max_length: tokens a prompt may have; the model's context if not given. Language modelling: tokens of a block (128).
        max_new_tokens: generation: the most tokens written for a row in an evaluation; the task's own (32) if not given.
        adapter: adapter method.
        adapter_init: where adapters start: "class_means" (features that tell the classes apart, from training rows' hidden
            states), "components" (their principal components, no labels used), "random" (the method's own start), or "auto":
            class_means where the model and the task allow it and no target_modules are given. Placement is for tt alone;
            tt-delta has "zero" and "svd" besides.
        feature_components: principal components among which class_means looks.
        output_scale: norm of a placed adapter's output directions, relative to the hidden states'.
        rank: inner ranks of the tensor trains (5 if random, else 32); tt-lora: the rank of the update (8).
        rank_pattern: path ending -> rank, for modules whose rank is another, such as '{"layers.7.mlp.up_proj": 8}'.
        lora_alpha: tt-lora: the update is multiplied by lora_alpha / rank (16). The plain --alpha is AdaZeta's.
        tt_rank: tt-lora: inner ranks of its two tensor trains (5).
        scale: tt-delta: what the train is multiplied by (1).
        bottleneck: features between the adapter's down and up (64 if random, else the number of classes).
        activation: between down and up: tanh, gelu, relu or identity (tanh).
        modules_to_tensorize: linear layers, such as a classification head's, replaced by a tensor train of their weight.
        adapter_options: other options of the adapter's configuration by name, such as '{"tensorize_rank": 8}'.
        target_modules: names of the modules to adapt ("residual": the residual stream where it enters a layer); the
            architecture's defaults if random, else residual.
        layers: an integer: the last so many layers; a list: these layers; not given: the last quarter if random, else the
            one at two thirds of the depth.
        optimizer: adazeta, mezo, zo-sign, zo-momentum, zo-adam, zo-conservative, sparse-mezo, hizoo, lozo, subzero, fzoo, grzo,
            mezo-svrg, forward-gradient or zo-kalman; or adamw: backpropagation, for comparison.
        lr: learning rate (see docs/optimizers.md; with adam 0.1 for placed adapters, 0.01 for random ones).
        loraplus_lr_ratio: LoRA+: the learning rate of B over that of A (adamw; 16 in the paper).
        loraplus_lr_embedding: LoRA+: the learning rate of adapters of embeddings.
        max_grad_norm: adamw: bound on the gradient's norm; 0 turns it off.
        lr_schedule: linear (to zero), cosine or constant.
        warmup_steps: steps over which the learning rate rises from zero.
        update_rule: sgd, adam, sign, momentum or amsgrad, on the estimated gradient (adam for adazeta, else the optimizer's own).
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        clip: clip projected gradients at so many times their running root mean square; 0 turns it off.
        weight_decay: decoupled.
        zo_eps: perturbation scale (0.01; 0.1 for objectives that move in steps).
        directions: gaussian, philox-gaussian, rademacher, sphere, sparse, low-rank, subspace or sign-flip; rademacher, or the
            optimizer's own, if not given.
        query_mode: sequential, batched, split or auto; split if not given, sequential for forward-gradient, for objectives f1,
            exact_match and rewards, and where processes share the data. "distributed" is sequential in each of several processes.
        share: what several processes share (torchrun, docs/scaling.md): queries, data, or both as a grid such as 2x4 (query groups x
            data ranks); query_mode then says how each evaluates its part.
        rank_timeout: of several processes, seconds to wait for the slowest beyond the first one's own part of a step.
        rank_check_every: of several processes, steps between comparisons of all trainables by SHA-256.
        query_schedule: adazeta (paper), constant, linear, cosine, stepwise, budget or variance; the optimizer's own if not given.
        alpha: AdaZeta's alpha, between 0 and 1.
        beta: AdaZeta's beta, between 0 and 1, or "derived" from the number of epochs as in the released code.
        max_queries: the most queries a step takes (15); the number of queries of the constant schedule (1).
        min_queries: fewest queries a step takes; where linear and cosine start.
        budget_forwards: forward passes that the budget schedule spends; as many as adazeta would if not given.
        milestones: step:queries pairs of the stepwise schedule, such as 0:1,250:4; four even levels if not given.
        privacy_epsilon: differential privacy of the training rows (docs/privacy.md): noise such that all steps together stay within
            this epsilon.
        privacy_delta: its delta; well below 1 / rows.
        privacy_noise: the noise on a sum of rows, in units of privacy_clip, in place of privacy_epsilon.
        privacy_clip: bound on one row's projected gradient.
        batch_size: examples a step.
        eval_batch_size: examples in an evaluation batch.
        batch_order: balanced (classes take turns) or shuffled.
        steps: optimizer steps.
        seed: of directions, cores and the order of examples.
        prefix_cache: where hidden states below the first adapter are kept: device, cpu (memory), disk (a file; a resumed run takes
            it up again) or off.
        prefix_cache_mb: bound on them, in MiB; 0 turns the cache off.
        prefix_cache_dir: directory of the file on disk, which then outlasts the run for others on the same model; the run's
            own if not given.
        compile: run the layers through torch.compile (sequential query mode; takes a minute, see benchmarks/compiled.py for what
            it gains).
        output_dir: where everything goes; runs/<task>-<optimizer>-<time> if not given. Must be empty unless resuming.
        save_steps: steps between checkpoints (docs/durability.md).
        max_failed_steps: so many steps in a row without any finite loss end the run.
        report_to: none, or where to send what metrics.jsonl has as well: tensorboard, wandb, mlflow and others that accelerate knows;
            several with commas between.
        resume: continue the run in output_dir, with its options; save_steps, max_failed_steps, report_to, share, rank_timeout,
            rank_check_every and prefix_cache_dir may be given anew, other values of other options are refused.
    """

    model_name_or_path: str = builtin.DEFAULT_MODEL
    head: str = "lm"
    trust_remote_code: bool = False
    device: str = "auto"
    precision: str = "auto"
    quantise: str | None = None
    objective: str = "loss"

    task: str = "sst2"
    train_file: Path | None = None
    eval_file: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    target_column: str | None = None
    template: str | None = None
    verbalizers: str | None = None
    max_train_rows: int | None = None
    held_out: int = 256
    validation: bool = False
    max_length: int | None = None
    max_new_tokens: int | None = None

    adapter: str = "tt"
    adapter_init: str = "auto"
    feature_components: int = 64
    output_scale: float = 0.3
    rank: int | None = None
    rank_pattern: dict[str, int] | None = None
    lora_alpha: float | None = None
    tt_rank: int | None = None
    scale: float | None = None
    bottleneck: int | None = None
    activation: str | None = None
    modules_to_tensorize: list[str] | None = None
    adapter_options: dict[str, Any] | None = None
    target_modules: list[str] | None = None
    layers: int | list[int] | None = None

    optimizer: str = "adazeta"
    lr: float | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    max_grad_norm: float = 1.0
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    update_rule: str | None = None
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 3.0
    weight_decay: float = 0.0
    zo_eps: float | None = None
    directions: str | None = None
    query_mode: str | None = None
    share: str = "queries"
    rank_timeout: float = 300.0
    rank_check_every: int = 100
    query_schedule: str | None = None
    alpha: float = 0.85
    beta: float | str = 0.4
    max_queries: int | None = None
    min_queries: int = 8
    budget_forwards: int | None = None
    milestones: str | None = None

    privacy_epsilon: float | None = None
    privacy_delta: float = 1e-5
    privacy_noise: float | None = None
    privacy_clip: float | None = None

    batch_size: int = 16
    eval_batch_size: int = 32
    batch_order: str = "balanced"
    steps: int = 100
    seed: int = 0
    prefix_cache: str = "device"
    prefix_cache_mb: int = 1024
    prefix_cache_dir: Path | None = None
    compile: bool = False

    output_dir: Path | None = None
    save_steps: int = 100
    max_failed_steps: int = 10
    report_to: str = "none"
    resume: bool = False

    def check(self) -> None:
        """Everything that can be wrong before anything is loaded.

        Raises:
            ZOError: with a sentence on the first mistake.
        """
        for name, hint in get_type_hints(type(self)).items():
            if getattr(self, name) is None and not _is(None, hint):
                raise ZOError(f"{name} was given as null; give a value, or leave it out.")
        for name in ("batch_size", "eval_batch_size", "steps", "held_out", "save_steps", "max_failed_steps"):
            if getattr(self, name) < 1:
                raise ZOError(f"{name}={getattr(self, name)} is not possible; give a whole number of at least 1.")
        for name in ("max_train_rows", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ZOError(f"{name}={getattr(self, name)} is not possible; give a whole number of at least 1.")
        if self.batch_order not in ORDERS:
            raise ZOError(f"batch_order={self.batch_order!r} is not known; choose one of {', '.join(ORDERS)}.")
        if self.layers == []:
            raise ZOError("layers=[] leaves nothing to adapt; give a number, a list of layers, or nothing.")
        if self.warmup_steps < 0 or self.prefix_cache_mb < 0 or self.clip < 0:
            raise ZOError("warmup_steps, prefix_cache_mb and clip cannot be negative; 0 turns each of them off.")
        if self.prefix_cache not in PLACES:
            raise ZOError(f"prefix_cache={self.prefix_cache!r} is not known; choose one of {', '.join(PLACES)}.")
        if self.prefix_cache_dir is not None and self.prefix_cache != "disk":
            raise ZOError(
                f"prefix_cache_dir was given with prefix_cache={self.prefix_cache!r}; add --prefix_cache disk, or leave it out."
            )
        if self.compile and (self.mode != "sequential" or self.optimizer == "forward-gradient"):
            raise ZOError(
                "compiled layers cannot be run on many copies or differentiated; with --compile give --query_mode sequential and "
                "another optimizer than forward-gradient."
            )
        if self.lr_schedule not in LR_SCHEDULES:
            raise ZOError(f"lr_schedule={self.lr_schedule!r} is not known; choose one of {', '.join(LR_SCHEDULES)}.")
        if self.eval_file is not None and self.train_file is None:
            raise ZOError("eval_file was given without train_file; give both, or neither for the built-in rows.")
        if self.target_column is not None and self.train_file is None:
            raise ZOError("target_column was given without train_file; give both, or a built-in --task.")
        self.make_adapter()
        if self.quantise is not None:
            self._check_quantised()
        objectives.check_name(self.objective)
        if self.objective != objectives.LOSS and self.optimizer in (first_order.NAME, "forward-gradient"):
            raise ZOError(
                f"objective={self.objective!r} has no gradient, which optimizer={self.optimizer!r} needs; choose an optimizer that needs "
                "values alone, such as adazeta."
            )
        if self.feature_components < 1 or self.output_scale <= 0:
            raise ZOError("feature_components must be at least 1 and output_scale positive.")
        if self.optimizer not in (known := (*OPTIMIZERS, first_order.NAME)):
            raise ZOError(f"optimizer={self.optimizer!r} is not known; choose one of {', '.join(known)}.")
        if self.optimizer == first_order.NAME:
            self._check_first_order()
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio <= 0:
            raise ZOError(f"loraplus_lr_ratio={self.loraplus_lr_ratio} is not possible; give a positive number.")
        if self.max_grad_norm < 0 or self.loraplus_lr_embedding < 0:
            raise ZOError("max_grad_norm and loraplus_lr_embedding cannot be negative; give 0 or more.")
        for name in ("rank_timeout", "rank_check_every"):
            if not 0 < getattr(self, name) < 1e9:
                raise ZOError(f"{name}={getattr(self, name)} is not possible; give a positive number.")
        if self.share != "queries":
            self.make_distributed()
            if self.objective == "f1":
                raise ZOError("the F1 of a batch is no mean over its rows; with objective='f1' give --share queries.")
        self.make_query_schedule()
        self.make_update_rule()
        from zo_opt.privacy.rows import check_privacy  # which knows the options

        check_privacy(self)
        check_trackers(self.report_to)

    def _check_quantised(self) -> None:
        check_kind(str(self.quantise))
        if ADAPTERS[self.adapter].in_place is not AdapterConfig.in_place:
            raise ZOError(
                f"adapter {self.adapter!r} trains the model's own weights, which quantise={self.quantise!r} freezes; choose another "
                "adapter, or leave --quantise out."
            )

    def _check_first_order(self) -> None:
        given = [n for n in ("directions", "query_mode", "query_schedule", "max_queries", "update_rule", "budget_forwards")
                 if getattr(self, n) is not None]  # fmt: skip
        if given:
            raise ZOError(
                f"{given[0]} is an option of zeroth-order optimizers; leave it out with optimizer={self.optimizer!r}."
            )

    def make_adapter(self, **defaults: Any) -> AdapterConfig:
        """The adapter that the options describe; ``defaults`` stand for options that were not given.

        Raises:
            ZOError: the method is not known, has no such option or no such start; or a value is not possible.
        """
        if self.adapter not in ADAPTERS:
            raise ZOError(f"adapter={self.adapter!r} is not known; choose one of {', '.join(ADAPTERS)}.")
        has = {f.name for f in fields(ADAPTERS[self.adapter])}
        options = dict(self.adapter_options or {})
        for option, name in ADAPTER_OPTIONS.items():
            if (value := getattr(self, option)) is not None:
                if name not in has:
                    raise ZOError(
                        f"{option} is no option of adapter {self.adapter!r}; leave it out, or choose another adapter."
                    )
                options[name] = value
        starts = ("auto", "random", *(FEATURES if self.adapter == "tt" else ()))
        if self.adapter_init not in starts:
            if "init" not in has:
                raise ZOError(
                    f"adapter_init={self.adapter_init!r} is not known to adapter {self.adapter!r}; choose one of {', '.join(starts)}."
                )
            options["init"] = self.adapter_init
        return make_config(self.adapter, {k: v for k, v in defaults.items() if k in has} | options)

    @property
    def private(self) -> bool:
        """Whether training rows are to be hidden."""
        return self.privacy_epsilon is not None or self.privacy_noise is not None

    @property
    def mode(self) -> str:
        """How one process evaluates: the query mode asked for; else split, where the optimizer has it."""
        if self.query_mode is not None:
            return "sequential" if self.query_mode == "distributed" else self.query_mode
        alone = self.private or self.share != "queries" or self.optimizer in ("forward-gradient", first_order.NAME)
        # F1 of a few rows says little, and copies cannot write together.
        return "sequential" if alone or self.objective not in (objectives.LOSS, "accuracy") else "split"

    def make_distributed(self) -> Distributed:
        """What several processes share, and how they are watched."""
        return Distributed(
            share=self.share, within=self.mode, timeout=self.rank_timeout, check_every=self.rank_check_every
        )

    @property
    def eps(self) -> float:
        """The perturbation scale asked for; else the objective's."""
        if self.zo_eps is not None:
            return self.zo_eps
        return 1e-2 if self.objective == objectives.LOSS else objectives.ZO_EPS

    def make_query_schedule(self, steps_per_epoch: int = 1) -> QuerySchedule | None:
        """The query schedule asked for; None stands for the optimizer's own."""
        own = "constant" if self.private else "adazeta"  # more queries need more noise
        kind = self.query_schedule or (own if self.optimizer == "adazeta" else None)
        if kind is None and self.max_queries is None:
            return None
        return make_schedule(
            kind or "constant", steps=self.steps, steps_per_epoch=steps_per_epoch, alpha=self.alpha, beta=self.beta,
            max_queries=self.max_queries, min_queries=self.min_queries, budget_forwards=self.budget_forwards,
            milestones=self.milestones, query_mode=self.mode,
        )  # fmt: skip

    def make_update_rule(self) -> UpdateRule | None:
        """The update rule asked for (adam for adazeta); None stands for the optimizer's own."""
        kind = self.update_rule or ("adam" if self.optimizer == "adazeta" else None)
        if kind is None:
            return None
        if kind not in UPDATE_RULES:
            raise ZOError(f"update_rule={kind!r} is not known; choose one of {', '.join(UPDATE_RULES)}.")
        if OPTIMIZERS[self.optimizer].own_update_rule:
            raise ZOError(
                f"optimizer={self.optimizer!r} is an update rule itself; leave update_rule out, or take mezo."
            )
        return Adam(self.beta1, self.beta2) if UPDATE_RULES[kind] is Adam else UPDATE_RULES[kind]()

    def make_step_control(self) -> tuple[StepControl, ...]:
        """The step control asked for."""
        return (ClipProjectedGrads(self.clip),) if self.clip else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """What ``to_dict`` gave.

        Raises:
            TypeError: an option that there is not, or a value of another type.
        """
        return from_plain(cls, values)


def to_plain(options: Any) -> dict[str, Any]:
    """Options in a dataclass as plain values of JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


def from_plain(kind: type[_Options], values: dict[str, Any]) -> _Options:
    """What ``to_plain`` gave, as the dataclass.

    Raises:
        TypeError: an option that there is not, or a value of another type.
    """
    declared: Any = kind
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is(value, hints[name]):
            raise TypeError(f"{name} is {str(value)[:80]!r}")
    paths = {f.name for f in fields(declared) if "Path" in str(f.type)}
    return kind(**{k: Path(v) if k in paths and v is not None else v for k, v in values.items()})


def _is(value: Any, hint: Any) -> bool:
    """Whether a plain value of JSON is what an option's annotation says (a path is a text there)."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(_is(v, inner[0]) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is(v, inner[1]) for v in value.values())
    plain = {Path: (str,), float: (int, float)}.get(hint, (hint,))
    return hint is Any or type(value) in plain or (hint is type(None) and value is None)
