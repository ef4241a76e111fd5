"""Everything a run can be told, in groups; each field is an option of the command line. Needs no torch, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from zo_opt.choices import Choice

if TYPE_CHECKING:
    NonNegativeFloat: TypeAlias = float
    PositiveFloat: TypeAlias = float
    NonNegativeInt: TypeAlias = int
    PositiveInt: TypeAlias = int
else:
    from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

BACKPROPAGATION = "adamw"
DEFAULT_MODEL = "smollm2-135m-instruct"
WHOLE_MODEL = ("full", "lisa")  # adapters that train the model's own weights
# Steps where nobody says how many: more passes over few rows bring a lower loss on these and a higher one on others (docs/methods/learning.md).
EPOCHS, LEAST_STEPS, MOST_STEPS = 5, 100, 400


@dataclass(frozen=True, kw_only=True)
class FirstOptions:
    """What people need first.

    Args:
        model_name_or_path: the built-in model, a Hugging Face id or a local directory.
        task: a built-in task (docs/how-to/data.md): labels (sst2, rte, cb, boolq, copa, mrpc, piqa), generation (arithmetic, nq_open, sciq) or
            language modelling (sciq-text; lm: on your own --train_file); or module:name, your own. Its prompt is used for
            --train_file too unless --template is given.
        train_file: your own rows, .jsonl, .json, .csv, .tsv or .parquet, or org/name of a data set of the hub; for language modelling also .txt.
        eval_file: held-out rows; without it some training rows are held out.
        template: prompt with columns in braces, such as "{text} It was".
        verbalizers: label words, as "label=word,label=word" or in the labels' sorted order "word,word".
        steps: optimizer steps; where neither epochs nor budget_forwards say them, those of 5 epochs, 100 at least and 400 at most.
        epochs: in place of steps: how often each row is seen.
        budget_forwards: in place of steps: the run ends before the step that would take more forward passes than this in all, a
            backward pass counted as two.
        lr: learning rate; if not given, 3e-3 for queries on activations (1e-3 for an objective without a gradient); of weights 0.01 where lr
            is a step's length (adam, sign ...), else 0.02 for adapters and 1e4 / parameters, 1e-4 at most, for whole models; of adamw the
            adapter's own (docs/methods/optimizers.md).
        output_dir: where everything goes; runs/<task>-<optimizer>-<time> if not given. Must be empty unless resuming.
        resume: continue the run in output_dir, with its options, or with --steps to another end than it had; patience, save_steps,
            max_failed_steps, report_to, share, rank_timeout, rank_check_every and prompt_cache_dir may be given anew, too, other values of
            other options are refused.
    """

    model_name_or_path: str = DEFAULT_MODEL
    task: str = "sst2"
    train_file: Path | None = None
    eval_file: Path | None = None
    template: str | None = None
    verbalizers: str | None = None
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    budget_forwards: PositiveInt | None = None
    lr: NonNegativeFloat | None = None
    output_dir: Path | None = None
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Rows and what is learned of them.

    Args:
        dataset: in place of train_file: a data set of the hub, org/name, or a directory that save_to_disk of datasets wrote.
        dataset_config: its configuration, where it has several.
        split: its rows to train on: train if not given; "train[:1000]" and the like, too.
        eval_split: its rows to hold out, such as validation; without it, and without eval_file, some training rows are held out.
        column_names: of a .csv or .tsv file without a header line, as "text,label".
        text_column: the column that {text} in the template stands for.
        label_column: the column of the label.
        target_column: the column of the text to write: makes your own rows a generation task.
        optional_columns: columns of the prompt that may be blank in a row, or missing, as "input,context"; lines of the template that show
            nothing but blank ones are left out, the last line excepted.
        objective: what is trained: loss; or, without a gradient and with zeroth-order optimizers alone, 1 - accuracy, f1 or exact_match
            (of what the model writes) on the batch, or minus the mean of your_module:reward (docs/how-to/reward.md).
        max_train_rows: use only the first so many training rows.
        held_out: rows to hold out where there is no eval_file (at most 30 % of all); of running text the last lines.
        validation: evaluate on rows held out of the training rows instead, for choosing options; the held-out rows stay unseen.
        max_length: tokens a prompt may have; the model's context if not given. Language modelling: tokens of a block (128).
        max_new_tokens: generation: the most tokens written for a row in an evaluation; the task's own (32) if not given.
        batch_size: examples a step.
        eval_batch_size: examples in an evaluation batch.
        batch_order: shuffled, or balanced (classes take turns).
    """

    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    eval_split: str | None = None
    column_names: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    target_column: str | None = None
    optional_columns: str | None = None
    objective: str = "loss"
    max_train_rows: PositiveInt | None = None
    held_out: PositiveInt = 256
    validation: bool = False
    max_length: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None
    batch_size: PositiveInt = 16
    eval_batch_size: PositiveInt = 32
    batch_order: Literal["balanced", "shuffled"] = "shuffled"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The frozen model.

    Args:
        head: "lm" scores label words with the language-model head; "classification" trains a new head.
        trust_remote_code: let the checkpoint's own Python code run.
        device: cpu, cuda or auto.
        precision: of the frozen base: "mixed" (bf16 matrix products, fp32 everything else), "fp32", or "auto".
        quantise: keep the frozen base's weights in few bits (docs/how-to/quantise.md): int8 or int4 (torchao), bnb-int8 or bnb-nf4
            (bitsandbytes). In full if not given.
        compile: run the layers through torch.compile (sequential query mode; takes a minute, see benchmarks/compiled.py for what
            it gains).
        prompt_cache: where the frozen part of forwards (keys and values of prompts, hidden states below the first adapter) is kept:
            device, cpu (memory), disk (a file; a resumed run takes it up again) or off (computed anew for every batch).
        prompt_cache_mb: bound on them, in MiB; 0 turns the cache off.
        prompt_cache_dir: directory of the file on disk, which then outlasts the run for others on the same model; the run's
            own if not given.
    """

    head: Literal["lm", "classification"] = "lm"
    trust_remote_code: bool = False
    device: str = "auto"
    precision: Literal["auto", "mixed", "fp32"] = "auto"
    quantise: Literal["int8", "int4", "bnb-int8", "bnb-nf4"] | None = None
    compile: bool = False
    prompt_cache: Literal["device", "cpu", "disk", "off"] = "device"
    prompt_cache_mb: NonNegativeInt = 1024
    prompt_cache_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """How the adapter is moved.

    Parts are chosen by name (PARTS); their own options are nested: --optimizer.beta1, --schedule.alpha.

    Args:
        adapter: the adapter (docs/methods/adapters.md), or module:Class, your own.
        optimizer: how it is tuned (docs/methods/optimizers.md): adazeta, mezo, ...; adamw is backpropagation, for comparison; or
            module:name, your own.
        estimator: losses -> derivatives: two-sided or one-sided, of weights; activations or learned-feedback, of inner activations of adapters
            that act on answers. If not given, learned-feedback for adazeta with tt-lora where nothing else speaks against it, else the
            optimizer's own.
        directions: their distribution; rademacher, or the optimizer's own, if not given.
        schedule: queries of each step: adazeta (paper), constant, linear, cosine, stepwise, budget, variance, every-example (split
            alone), or module:function; the optimizer's own if not given.
        update_rule: sgd, adam, sign, momentum or amsgrad, on the estimated gradient (adam for adazeta, else the optimizer's own).
        step_control: what is done to projected gradients before the update: clip (at 3 times their running root mean square) if
            not given; none; or a list in a file of options.
        line_search: lengths of a step that are tried before it is taken, such as '[0, 1]'.
        query_mode: sequential, batched, split or auto; split if not given, sequential for forward-gradient, for objectives f1,
            exact_match and rewards, and where processes share the data. "distributed" is sequential in each of several processes.
        zo_eps: perturbation scale (0.01; 0.1 for objectives that move in steps); of queries on activations how far one moves the body's output,
            as a share of it (0.03).
        weight_decay: decoupled.
        lr_schedule: linear (to zero), cosine or constant.
        warmup_steps: steps over which the learning rate rises from zero.
        loraplus_lr_ratio: LoRA+: the learning rate of B over that of A (16 in the paper).
        loraplus_lr_embedding: LoRA+: the learning rate of adapters of embeddings.
    """

    adapter: Choice = "tt-lora"
    optimizer: Choice = "adazeta"
    estimator: Choice | None = None
    directions: Choice | None = None
    schedule: Choice | None = None
    update_rule: Choice | None = None
    step_control: Choice | list[Choice] | None = None
    line_search: list[float] | None = None
    query_mode: Literal["sequential", "batched", "split", "auto", "distributed"] | None = None
    zo_eps: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: NonNegativeInt = 0
    loraplus_lr_ratio: PositiveFloat | None = None
    loraplus_lr_embedding: NonNegativeFloat = 1e-6


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run, its processes and its privacy.

    Args:
        seed: of directions, cores and the order of examples.
        eval_steps: steps between evaluations on the held-out rows while the run trains; none if not given.
        keep: with eval_steps: best, the weights that were best on the held-out rows (if not given), or last.
        patience: with eval_steps: end after so many evaluations that brought nothing better.
        save_steps: steps between checkpoints (docs/how-to/resume.md).
        max_failed_steps: so many steps in a row without any finite loss end the run.
        report_to: none, or where to send what metrics.jsonl has as well: tensorboard, wandb, mlflow and others that accelerate knows;
            several with commas between.
        share: what several processes share (torchrun, docs/how-to/processes.md): queries, data, or both as a grid such as 2x4 (query groups x
            data ranks); query_mode then says how each evaluates its part.
        rank_timeout: of several processes, seconds to wait for the slowest beyond the first one's own part of a step.
        rank_check_every: of several processes, steps between comparisons of all trainables by SHA-256.
        privacy_epsilon: differential privacy of the training rows (docs/how-to/privacy.md): noise such that all steps together stay within
            this epsilon.
        privacy_delta: its delta; well below 1 / rows.
        privacy_noise: the noise on a sum of rows, in units of privacy_clip, in place of privacy_epsilon.
        privacy_clip: bound on one row's projected gradient.
    """

    seed: NonNegativeInt = 0
    eval_steps: PositiveInt | None = None
    keep: Literal["best", "last"] | None = None
    patience: PositiveInt | None = None
    save_steps: PositiveInt = 400
    max_failed_steps: PositiveInt = 10
    report_to: str = "none"
    share: str = "queries"
    rank_timeout: PositiveFloat = 300.0
    rank_check_every: PositiveInt = 100
    privacy_epsilon: PositiveFloat | None = None
    privacy_delta: PositiveFloat = 1e-5
    privacy_noise: PositiveFloat | None = None
    privacy_clip: PositiveFloat | None = None


# In the order in which help shows them.
GROUPS = (FirstOptions, RowOptions, ModelOptions, LearningOptions, RunOptions)
# Options of a run that a comparison sets itself. Privacy is of one run: the epsilons of several add up.
COMPARISONS_OWN = frozenset(
    ("lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "steps", "epochs", "budget_forwards", "seed", "output_dir", "eval_steps", "keep",
     "patience", "save_steps", "resume", "validation",
     "privacy_epsilon", "privacy_delta", "privacy_noise", "privacy_clip")
)  # fmt: skip
# Options that are chosen by name and have options of their own.
PARTS = ("adapter", "optimizer", "estimator", "directions", "schedule", "update_rule", "step_control")
