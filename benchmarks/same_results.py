"""Are results what they were, to the bit? Digests of some 160 short runs, for one version of the code and another.

    python benchmarks/same_results.py record benchmarks/results/same_results.json
    python benchmarks/same_results.py compare benchmarks/results/same_results.json
    python benchmarks/same_results.py compare benchmarks/results/same_results.json --only 'optimizer/*,cli/default'

Every run is made with the ``zo_opt`` that Python imports, on one thread, and gives three things: ``weights``, a digest
of the tensors that it tuned (names, dtypes, shapes, bytes); ``journal``, one of the numbers in its journal (null where
it has none); and ``result``, the figures of its evaluations and digests of all that it measured on the way. How files
look is part of none of them. Digests hold for one kind of CPU and one version of torch and transformers: elsewhere,
record anew with the code to compare with. ``compare`` ends with 1 if a run differs or fails.

Models and rows are made here, tiny and random; runs named ``builtin/`` take the built-in model and tasks, fetched once.
The tables hold names and numbers alone. What the package calls things is in the imports, and in the functions after
each table.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import count, product
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

import zo_opt
from zo_opt import GaussianPrivacy, get_adapter_model, load_adapter_model, lora_plus_groups, optim, trainable_parameters
from zo_opt.adapters import make_config
from zo_opt.cli.main import main as zo_opt_main
from zo_opt.directions import DIRECTIONS
from zo_opt.journal import Journal, read_journal
from zo_opt.models.builtin import model_directory
from zo_opt.record.metrics import read_metrics
from zo_opt.schedules import SCHEDULES, derived_beta
from zo_opt.training import ZOTrainer, ZOTrainingArguments

Options = dict[str, Any]
Run = Callable[[Path], Options]  # takes an empty directory, gives weights, journal and result
MODULE = "zo_opt.cli.main"
KEY = bytes(range(32))  # of privacy's noise, in place of the system's entropy
STEPS = 5


# --- The command line: option -> value; True is a flag, None leaves out -----------------------------------------------

TOY: Options = {
    "model_name_or_path": "llama", "train_file": "train.jsonl", "eval_file": "eval.csv", "template": "{text} It was",
    "verbalizers": "terrible,great", "device": "cpu", "precision": "fp32", "steps": 6, "batch_size": 8, "save_steps": 3,
    "adapter": "tt", "batch_order": "balanced",
}  # fmt: skip
TEXTS = TOY | {
    "train_file": "texts.jsonl", "eval_file": None, "template": "Review {text} Label", "verbalizers": None,
    "target_column": "answer", "max_new_tokens": 3,
}  # fmt: skip
LM = {"task": "lm", "train_file": "text.txt", "max_length": 16} | dict.fromkeys(
    ["eval_file", "template", "verbalizers"]
)
LORA = TOY | {"adapter": "lora", "adapter.rank": 2, "adapter.layers": 2}
MEZO = {"optimizer": "mezo", "query_mode": "sequential", "lr": 0.01}
ADAMW = {"optimizer": "adamw", "lr": 0.01}
ADALORA = {"adapter": "adalora", "adapter.target_rank": 1}
LISA = {"adapter": "lisa", "adapter.blocks": 1, "adapter.interval": 2}
BUILTIN = {"device": "cpu", "steps": 3, "max_train_rows": 16, "held_out": 8, "batch_size": 4}

TRAIN: dict[str, Options] = {
    "cli/default": TOY | {"adapter": None, "batch_order": None},
    "cli/queries on activations": TOY | {"adapter": None, "estimator": "activations"},
    "cli/adapters on answers": TOY | {"adapter.positions": "answer"},
    "cli/random start": TOY | {
        "adapter.rank": 2, "adapter.bottleneck": 8, "adapter.activation": "gelu", "adapter.layers": [1, 3],
    },
    "cli/adazeta": TOY | {
        "query_mode": "sequential", "schedule.max_queries": 3, "schedule.min_queries": 1, "schedule.alpha": 0.9, "schedule.beta": 0.8,
    },
    "cli/mixed precision": TOY | {"precision": "mixed"},
    "cli/no cache": TOY | {"prompt_cache": "off", "batch_order": "shuffled"},
    "cli/cache on disk": TOY | {"prompt_cache": "disk", "validation": True, "eval_file": None, "held_out": 8},
    "cli/mezo": LORA | MEZO | {
        "query_mode": "batched", "schedule.queries": 2, "directions": "sphere", "step_control": "none", "seed": 3, "weight_decay": 0.1,
        "lr_schedule": "cosine", "warmup_steps": 2, "zo_eps": 1e-3,
    },
    "cli/variance schedule": TOY | MEZO | {
        "query_schedule": "variance", "schedule.min_queries": 1, "schedule.max_queries": 3, "update_rule": "momentum",
        "step_control.factor": 1.5,
    },
    "cli/budget schedule": TOY | MEZO | {
        "query_schedule": "budget", "schedule.forwards": 30, "update_rule": "adam", "update_rule.beta1": 0.8,
    },
    "cli/hizoo": LORA | MEZO | {"optimizer": "hizoo"},
    "cli/forward-gradient": LORA | {"optimizer": "forward-gradient", "lr": 0.01},
    "cli/whole model by mezo": TOY | MEZO | {"adapter": "full", "lr": 1e-4},
    "cli/lisa by mezo": TOY | MEZO | LISA | {"lr": 1e-4},
    "cli/adalora by mezo": LORA | MEZO | ADALORA,
    "cli/lora by adamw": LORA | ADAMW | {"adapter.alpha": 4.0, "optimizer.max_grad_norm": 0.5},
    "cli/lora+ by adamw": LORA | ADAMW | {"loraplus_lr_ratio": 16.0, "lr": None},
    "cli/adalora by adamw": LORA | ADAMW | ADALORA,
    "cli/lamda by adamw": LORA | ADAMW | {"adapter": "lamda"},
    "cli/lisa by adamw": TOY | ADAMW | LISA,
    "cli/own columns": TOY | {
        "train_file": "columns.csv", "eval_file": None, "held_out": 8, "text_column": "said", "label_column": "mood",
        "template": "Review {text} Label", "verbalizers": "bad=negative,good=positive",
    },
    "cli/classification head": LORA | {"head": "classification", "template": None, "verbalizers": None},
    "cli/masked model": TOY | {"model_name_or_path": "bert", "template": "{text} It was {mask}"},
    "cli/seq2seq model": TOY | {"model_name_or_path": "t5"},
    "cli/accuracy": TOY | {"objective": "accuracy"},
    "cli/f1": LORA | MEZO | {"objective": "f1", "lr": 0.1},
    "cli/exact match": TEXTS | {"objective": "exact_match", "target_column": "guess", "max_new_tokens": 1},
    "cli/reward": TEXTS | {"objective": "rewards:short"},
    "cli/generation": TEXTS,
    "cli/language modelling": TOY | LM,
    "cli/privacy": TOY | {"batch_order": None, "privacy_epsilon": 8.0, "privacy_delta": 1e-4, "privacy_clip": 5.0},
    "cli/int8": TOY | {"quantise": "int8"},
    "builtin/default": BUILTIN,
    "builtin/lora by adamw": BUILTIN | ADAMW | {"adapter": "lora", "adapter.layers": 2},
    "builtin/generation": BUILTIN | {"task": "arithmetic", "adapter.layers": 2, "max_new_tokens": 3},
    "builtin/language modelling": BUILTIN | {"task": "sciq-text", "max_length": 32, "adapter.layers": 2, "held_out": 2},
}  # fmt: skip
NEEDS = {"cli/privacy": "dp_accounting", "cli/int8": "torchao"}  # run -> package without which it is left out

# Under torchrun, in two processes.
RANKS: dict[str, Options] = {
    "two processes/queries": LORA | MEZO | {"steps": 3},
    "two processes/rows": LORA | MEZO | {"steps": 3, "share": "data"},
}

# Ended in the step of that number, by a signal or as if killed, and resumed.
STOPPED: dict[str, tuple[int, int | None, Options]] = {
    "resumed/stopped": (4, signal.SIGTERM, TOY),
    "resumed/killed": (6, None, TRAIN["cli/hizoo"] | {"save_steps": 4}),
    "resumed/adalora stopped": (4, signal.SIGTERM, TRAIN["cli/adalora by adamw"]),
}
RESUME: Options = {"resume": True}

# What a command makes of a run.
AFTERWARDS: dict[str, tuple[Options, str]] = {
    "afterwards/replay": (TOY, "replay {run} --to {to}"),
    "afterwards/replay of some steps": (TRAIN["cli/hizoo"], "replay {run} --to {to} --steps 4"),
    "afterwards/merge": (
        TOY | {"adapter": "tt-lora", "estimator": "two-sided", "adapter.rank": 2, "adapter.tt_rank": 2},
        "merge {run} --to {to}",
    ),
    "afterwards/merge as lora": (TRAIN["cli/lora by adamw"], "merge {run} --to {to} --as lora"),
}

COMPARED = {name: value for name, value in TOY.items() if name not in ("steps", "save_steps")} | {"keep_models": True}
COMPARE: dict[str, Options] = {
    "compared/methods": COMPARED | {"methods": "lora,mezo-lora", "budget_forwards": 12},
    "compared/learning rates": COMPARED | {
        "methods": "adazeta", "seeds": "1", "budget_forwards": 8, "lr_trials": 2, "lr_forwards": 4,
    },
}  # fmt: skip


def command_runs() -> dict[str, Run]:
    """Whole runs: in this process, and with torchrun and in comparisons in processes of their own."""
    return {
        **{name: partial(train, options, NEEDS.get(name)) for name, options in TRAIN.items()},
        **{name: partial(resumed, *how) for name, how in STOPPED.items()},
        **{name: partial(afterwards, *how) for name, how in AFTERWARDS.items()},
        **{name: partial(two_processes, options) for name, options in RANKS.items()},
        **{name: partial(compared, options) for name, options in COMPARE.items()},
    }


def line_of(command: str, options: Options, directory: Path) -> list[str]:
    """A command with its options as arguments."""
    given = {"output_dir": directory} | {name: value for name, value in options.items() if value is not None}
    pairs = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items())
    return [command, *(argument for pair in pairs for argument in pair)]


def call(arguments: Sequence[str], code: int = 0) -> None:
    """``zo-opt`` in this process."""
    with patch("secrets.token_bytes", lambda size: KEY[:size]):
        found = zo_opt_main(arguments)
    if found != code:
        raise RuntimeError(f"exit code {found}")


def train(options: Options, needs: str | None, work: Path) -> Options:
    """``zo-opt train``."""
    if needs is not None and find_spec(needs) is None:
        raise LeftOutError(f"{needs} is not installed")
    call(line_of("train", options, work / "run"))
    return read_run(work / "run")


class LeftOutError(Exception):
    """The run needs something that is not installed."""


def resumed(step: int, signum: int | None, options: Options, work: Path) -> Options:
    """Ended in a step, right after the weights have moved, and taken up again."""

    def end() -> None:
        if signum is None:
            raise MemoryError("as if killed")
        signal.raise_signal(signum)

    with after_step(step, end):
        try:
            call(line_of("train", options, work / "run"), code=0 if signum is None else 128 + signum)
        except MemoryError:
            assert signum is None
    assert not (work / "run" / "results.json").exists()
    call(line_of("train", RESUME, work / "run"))
    return read_run(work / "run")


@contextmanager
def after_step(number: int, action: Callable[[], None]) -> Iterator[None]:
    """Do something right after an optimizer's step of that number, from 1."""
    steps = count(1)
    hook = register_optimizer_step_post_hook(lambda *_: action() if next(steps) == number else None)
    try:
        yield
    finally:
        hook.remove()


def afterwards(options: Options, command: str, work: Path) -> Options:
    """A run, and what a command makes of it: the weights are those that the command writes."""
    call(line_of("train", options, work / "run"))
    call(command.format(run=work / "run", to=work / "to").split())
    (written,) = (work / "to").glob("*.safetensors")
    weights = adapter_in(work / "to", work / "run") if command.startswith("replay") else load_file(written)
    return read_run(work / "run") | {"weights": digest_of_tensors(weights)}


def two_processes(options: Options, work: Path) -> Options:
    """``zo-opt train`` under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", MODULE]
    line = [sys.executable, *launch, *line_of("train", options, work / "run")]
    process = subprocess.run(line, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stdout + process.stderr)
    return read_run(work / "run")


def compared(options: Options, work: Path) -> Options:
    """``zo-opt compare``: everything of every run."""
    call(line_of("compare", options, work / "all"))
    runs = [read_run(path.parent) for path in sorted((work / "all").rglob("results.json"))]
    digests = {kind: digest([run[kind] for run in runs]) for kind in ("weights", "journal")}
    return digests | {"result": [run["result"] for run in runs]}


def read_run(directory: Path) -> Options:
    """What a run left: weights, journal, evaluations, and what it measured in each step (but seconds)."""
    results = json.loads((directory / "results.json").read_text())
    measured = ("step", "loss", "lr", "queries", "dropped", "forwards", "projected_grads")
    steps = [[line[name] for name in measured] for line in read_metrics(directory)]
    result = {side: figures(results[side]) for side in ("before", "after")} | {"steps": digest(steps)}
    path = directory / "journal"
    updates = read_journal(path).updates if path.exists() else None
    return outcome(adapter_in(directory, directory), updates, result)


def adapter_in(directory: Path, of_run: Path) -> Mapping[str, Tensor]:
    """The adapter that a run saved, under its own names whatever the format of the file."""
    tensors = load_file(directory / "adapter_model.safetensors")
    if "peft_type" not in json.loads((directory / "adapter_config.json").read_text()):
        return tensors
    run = json.loads((of_run / "run.json").read_text())["config"]
    kind = (
        "SequenceClassification"
        if run["head"] == "classification"
        else FILES.get(run["model_name_or_path"], ("CausalLM",))[0]
    )
    name = run["model_name_or_path"]
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        name if name in FILES else str(model_directory())
    )
    found: Mapping[str, Tensor] = load_adapter_model(base.float(), directory).adapter_state()
    return found


def figures(evaluation: Options) -> Options:
    """An evaluation, its lists of a number a row as digests."""
    return {name: digest(value) if isinstance(value, list) else value for name, value in evaluation.items()}


# --- In Python --------------------------------------------------------------------------------------------------------

# name -> its own options
OPTIMIZERS: dict[str, Options] = {
    "mezo": {"queries": 2},
    "adazeta": {},
    "zo-sign": {"queries": 2, "lr": 1e-3},
    "zo-momentum": {"queries": 2, "beta": 0.8},
    "zo-adam": {"queries": 2, "beta1": 0.8, "beta2": 0.9, "adam_eps": 1e-6},
    "zo-conservative": {"queries": 2, "lr": 0.5},
    "sparse-mezo": {"queries": 2, "density": 0.5},
    "hizoo": {"queries": 2, "smoothing": 0.05},
    "lozo": {"queries": 2, "rank": 1, "interval": 2},
    "subzero": {"queries": 2, "rank": 2, "interval": 2},
    "fzoo": {"queries": 3},
    "grzo": {},
    "mezo-svrg": {"queries": 2, "interval": 3},
    "forward-gradient": {"queries": 2},
    "zo-kalman": {"queries": 2, "memory": 0.9, "noise": 0.5, "lr": 0.1},
    "agzo": {"queries": 2},
    "p-gap": {"queries": 2, "rank": 2, "interval": 2, "probes": 3},
}
ADAPTERS: dict[str, Options] = {
    "tt": {"rank": 2, "bottleneck": 8},
    "adapter": {"bottleneck": 4},
    "tt-lora": {"rank": 2, "tt_rank": 2},
    "lora": {"rank": 2},
    "dora": {"rank": 2, "alpha": 8.0},
    "lora-fa": {"rank": 2},
    "vera": {"rank": 4},
    "adalora": {"rank": 3, "target_rank": 1, "total_steps": STEPS, "warmup_steps": 1, "final_steps": 1},
    "aflora": {"rank": 2, "total_steps": STEPS, "warmup_steps": 1, "final_steps": 1},
    "lamda": {"rank": 4, "total_steps": STEPS},
    "lamda++": {"rank": 4, "ranks": [2, 4, 6], "total_steps": STEPS},
    "spectral": {"rank": 4},
    "zo-act": {"rank": 2},
    "bitfit": {},
    "lisa": {"blocks": 1, "interval": 2},
    "full": {},
}
MODEL_OF = {"bitfit": "opt"}  # whose architecture has biases to merge into
BY_ADAMW = ("lora", "tt", "adalora", "aflora", "lamda", "lamda++", "lisa", "full")
TO_PEFT = ("lora", "dora", "lora-fa", "tt-lora", "adalora", "vera")
FROM_PEFT = ("lora", "dora", "adalora", "vera")

MODES = ("sequential", "batched", "split", "auto")
HEAD = {"modules_to_tensorize": ["classifier.dense"], "modules_to_save": ["classifier.out_proj"], "tensorize_rank": 3}

# Loops of one's own: what differs from MeZO on a LoRA. An entry of two values is a name and its options.
LOOPS: dict[str, Options] = {
    **{f"optimizer/{name}": {"optimizer": name, "weight_decay": 0.01} for name in OPTIMIZERS},
    **{
        f"optimizer/{name} in split mode": {"optimizer": name, "query_mode": "split"}
        for name in OPTIMIZERS
        if name != "forward-gradient"
    },
    "directions/gaussian": {"directions": ("gaussian", {})},
    "directions/philox-gaussian": {"directions": ("philox-gaussian", {})},
    "directions/rademacher": {"directions": ("rademacher", {})},
    "directions/sphere": {"directions": ("sphere", {})},
    "directions/sparse": {"directions": ("sparse", {"density": 0.3})},
    "directions/low-rank": {"directions": ("low-rank", {"rank": 3, "interval": 2})},
    "directions/subspace": {"directions": ("subspace", {"rank": 3, "interval": 2})},
    "directions/sign-flip": {"directions": ("sign-flip", {})},
    "schedule/constant": {"schedule": ("constant", {"queries": 3})},
    "schedule/adazeta": {"schedule": ("adazeta", {"alpha": 0.9, "beta": 0.8, "max_queries": 3})},
    "schedule/linear": {"schedule": ("linear", {"start": 1, "end": 4, "steps": STEPS})},
    "schedule/cosine": {"schedule": ("cosine", {"start": 1, "end": 4, "steps": STEPS})},
    "schedule/stepwise": {"schedule": ("stepwise", {"milestones": {0: 1, 2: 3}})},
    "schedule/budget": {"schedule": ("budget", {"forwards": 26, "steps": STEPS})},
    "schedule/variance": {"schedule": ("variance", {"min_queries": 16, "max_queries": 40})},
    "schedule/derived beta": {"schedule": ("adazeta", {"beta": derived_beta(0.85, 30)}), "steps_per_epoch": 2},
    **{
        f"update rule/{name}": {"update_rule": name, "directions": ("rademacher", {}), "weight_decay": 0.1}
        for name in ("sgd", "adam", "sign", "momentum", "amsgrad")
    },
    "step control/clip": {"step_control": ("ClipProjectedGrads", {"factor": 0.5}), "queries": 3},
    "step control/spread": {"step_control": ("DivideBySpread", {}), "queries": 3},
    "line search/reject": {"line_search": (0.0, 1.0), "lr": 0.5},
    "line search/shorten": {"line_search": (1.0, 0.5, 0.25, 0.0), "lr": 0.5},
    **{
        f"query mode/{mode}, {model}": {"query_mode": mode, "model": model, "adapter": "tt", "queries": 3}
        for mode, model in product(MODES, ("llama", "gpt2", "bert", "t5"))
    },
    **{
        f"whole model/{dtype}, {kind}": {"adapter": None, "dtype": dtype, "directions": (kind, {}), "lr": 1e-4}
        for dtype, kind in product(("float32", "bfloat16", "float16"), ("gaussian", "rademacher"))
    },
    "whole model/of many weights": {"adapter": None, "model": "wide", "directions": ("rademacher", {}), "lr": 1e-4},
    "loop/two micro-batches": {"parts": 2},
}
TRAINER: dict[str, Options] = {
    "trainer/adazeta": {
        "zo_optimizer": "adazeta",
        "query_schedule": {"name": "adazeta", "beta": 0.8},
        "max_queries": 3,
        "step_control": "clip",
    },
    "trainer/mezo, accumulated": {"zo_optimizer": "mezo", "gradient_accumulation_steps": 2, "update_rule": "adam"},
    "trainer/backpropagation": {"zo_optimizer": "none", "loraplus_lr_ratio": 4.0},
}


def python_runs() -> dict[str, Run]:
    """Runs without the command line."""
    return {
        **{name: partial(loop, **options) for name, options in LOOPS.items()},
        "loop/lora+ and a learning-rate schedule": learning_rates,
        "loop/a loss that is not finite": lost_query,
        "loop/gradients for adamw": gradients,
        "loop/privacy": private,
        **{f"adapter/{name}": partial(adapter_by_mezo, name) for name in ADAPTERS},
        **{f"adapter/{name} by adamw": partial(adapter_by_adamw, name) for name in BY_ADAMW},
        "adapter/tt, a tensorized head": partial(adapter_by_mezo, "tt", model="roberta", **HEAD),
        **{name: partial(trainer, **options) for name, options in TRAINER.items()},
    }


def optimizer_of(name: str, model: nn.Module, params: Iterable[Any] | None = None, **given: Any) -> Any:
    """A zeroth-order optimizer on what is trained of a model, from names and numbers."""
    exact = {} if name == "forward-gradient" else {"zo_eps": 1e-2}
    options = {"lr": 1e-2, "seed": 5} | exact | OPTIMIZERS[name] | given
    made = {
        "queries": lambda queries: ("query_schedule", SCHEDULES["constant"](queries)),
        "schedule": lambda entry: ("query_schedule", SCHEDULES[entry[0]](**entry[1])),
        "directions": lambda entry: ("directions", DIRECTIONS[entry[0]](**entry[1])),
        "update_rule": lambda rule: ("update_rule", optim.UPDATE_RULES[rule]()),
        "step_control": lambda entry: ("step_control", [getattr(optim, entry[0])(**entry[1])]),
        "line_search": lambda multipliers: ("line_search", optim.LineSearch(multipliers)),
    }
    arguments = dict(made[key](value) if key in made else (key, value) for key, value in options.items())
    return optim.OPTIMIZERS[name](
        params if params is not None else trainable_parameters(model), module=model, **arguments
    )


def adapted(adapter: str, model: nn.Module, **options: Any) -> Any:
    """A model with adapters of that name in it."""
    return get_adapter_model(model, make_config(adapter, ADAPTERS[adapter] | options))


def loop(
    work: Path,
    optimizer: str = "mezo",
    adapter: str | None = "lora",
    model: str = "llama",
    dtype: str = "float32",
    layers: int | None = None,
    parts: int = 1,
    **options: Any,
) -> Options:
    """Some steps on one batch, in so many parts."""
    net = make_model(model, dtype)
    tuned = adapted(adapter, net, layers=layers) if adapter is not None else net
    return follow(work, tuned, optimizer_of(optimizer, tuned, **options), make_batch(model), parts=parts)


def follow(
    work: Path,
    model: Any,
    optimizer: Any,
    batch: Mapping[str, Tensor],
    *,
    closure: Callable[..., Any] | None = None,
    parts: int = 1,
    after: Callable[[], Any] = lambda: None,
) -> Options:
    """Take steps, with a journal unless the adapter changes as training goes on, and say what came of them."""
    changes, updates, losses = getattr(model, "schedule", None) is not None, [], []
    journal = None if changes or optimizer.own_directions else Journal.create(work / "journal", optimizer, model)
    with journal or nullcontext():
        for step in range(STEPS):
            for part in range(parts):
                rows = {name: values[part::parts] for name, values in batch.items()}
                optimizer.estimate(closure or (lambda b: model(**b).loss), rows)
            optimizer.step()
            record = optimizer.last_record
            losses.append([record.loss, record.queries, record.forwards, record.dropped])
            updates.append(optimizer.last_update)
            if journal is not None:
                journal.append(optimizer.last_update)
            else:
                optimizer.write_last_grad()
                model.step(step)
                optimizer.zero_grad()
            after()
    found = updates if journal is None else read_journal(work / "journal").updates
    return outcome(tuned_tensors(model), found, steps_of(losses))


def learning_rates(work: Path) -> Options:
    """Two parameter groups, whose learning rates fall."""
    model = adapted("lora", make_model("llama"))
    optimizer = optimizer_of("mezo", model, lora_plus_groups(model, lr=1e-2, ratio=8.0), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    return follow(work, model, optimizer, make_batch("llama"), after=scheduler.step)


def lost_query(work: Path) -> Options:
    """One of the losses is nan, and its query dropped."""
    model, calls = adapted("lora", make_model("llama")), count()

    def closure(batch: Any) -> Any:
        return model(**batch).loss if next(calls) != 8 else float("nan")

    return follow(work, model, optimizer_of("mezo", model), make_batch("llama"), closure=closure)


def gradients(work: Path) -> Options:
    """Estimates that torch's AdamW takes as gradients."""
    model, batch, losses = adapted("lora", make_model("llama")), make_batch("llama"), []
    optimizer, adamw = optimizer_of("mezo", model), torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for _ in range(STEPS):
        adamw.zero_grad()
        losses.append([float(optimizer.write_grad(lambda b: model(**b).loss, batch))])
        adamw.step()
    return outcome(tuned_tensors(model), None, steps_of(losses))


def private(work: Path) -> Options:
    """Clipped, noisy projected gradients of sampled rows."""
    model, privacy = adapted("lora", make_model("llama")), GaussianPrivacy(5.0, 1.0, examples=16, batch_size=8, key=KEY)
    optimizer = optimizer_of("adazeta", model, privacy=privacy, queries=2)

    def closure(batch: Any) -> Tensor:
        rows = {name: values[privacy.batch(optimizer.step_count)] for name, values in batch.items()}
        labels = rows.pop("labels")[:, 1:]
        return cross_entropy(model(**rows).logits[:, :-1].transpose(1, 2), labels, reduction="none").mean(dim=1)

    return follow(work, model, optimizer, make_batch("llama", 16), closure=closure)


def adapter_by_mezo(name: str, work: Path, model: str = "", **options: Any) -> Options:
    """Steps of MeZO; then saved, removed, loaded, merged, written for PEFT and read again, where that can be."""
    model = model or MODEL_OF.get(name, "llama")
    tuned = adapted(name, make_model(model), **options)
    digests = {"start": digest_of_tensors(tuned.adapter_state())}
    lr = 1e-4 if name in ("full", "lisa") else 1e-2
    found = follow(work, tuned, optimizer_of("mezo", tuned, lr=lr), make_batch(model))
    tuned.save_pretrained(work / "saved")
    if name in TO_PEFT:
        tuned.export_peft(work / "peft")
        digests |= {"peft": digest_of_tensors(load_file(work / "peft" / "adapter_model.safetensors"))}
    plain = tuned.unload()
    digests |= {"unloaded": digest_of_tensors(plain.state_dict())}
    if name in FROM_PEFT:
        again = load_adapter_model(plain, work / "peft")
        digests |= {"from peft": digest_of_tensors(again.adapter_state())}
        plain = again.unload()
    again = load_adapter_model(plain, work / "saved")
    digests |= {"loaded": digest_of_tensors(again.adapter_state())}
    if again.adapter_config.mergeable:
        digests |= {"merged": digest_of_tensors(again.merge_and_unload().state_dict())}
    return found | {"result": found["result"] | digests}


def adapter_by_adamw(name: str, work: Path) -> Options:
    """The adapter's own course under backpropagation."""
    model, batch, losses = adapted(name, make_model("llama")), make_batch("llama"), []
    adamw = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for step in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append([loss.item()])
        adamw.step()
        model.step(step)
        adamw.zero_grad()
    return outcome(tuned_tensors(model), None, steps_of(losses))


def trainer(work: Path, **options: Any) -> Options:
    """The Hugging Face Trainer on padded rows, shuffled by its seed."""
    updates = []

    class Updates(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
            updates.append(getattr(getattr(optimizer, "optimizer", optimizer), "last_update", None))

    model, batch = adapted("lora", make_model("llama")), make_batch("llama", 24)
    rows = [{key: values[i] for key, values in batch.items()} for i in range(24)]
    arguments = ZOTrainingArguments(
        str(work), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, seed=3,
        learning_rate=1e-2, dataloader_pin_memory=False, per_device_train_batch_size=4, max_steps=STEPS, **options,
    )  # fmt: skip
    hf = ZOTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[Updates()])
    hf.train()
    losses = [[entry["loss"]] for entry in hf.state.log_history if "loss" in entry]
    result = steps_of(losses) | {"evaluation": hf.evaluate()["eval_loss"]}
    return outcome(tuned_tensors(model), None if None in updates else updates, result)


def tuned_tensors(model: Any) -> Mapping[str, Tensor]:
    """The adapter's tensors, or those of a whole model."""
    found: Mapping[str, Tensor] = model.adapter_state() if hasattr(model, "adapter_state") else model.state_dict()
    return found


def steps_of(losses: Sequence[Sequence[float]]) -> Options:
    """What the steps measured, the loss first; null where it is not finite (of private runs)."""
    last = losses[-1][0]
    return {"loss": last if isfinite(last) else None, "steps": digest(losses)}


# --- Models and rows --------------------------------------------------------------------------------------------------

FILLING = ["the", "film", "is", "a", "story", "of", "two", "friends", "and", "their", "long", "way", "home"]
MOODS = (("dreadful", "boring"), ("wonderful", "charming"))
LABELS = ["It", "was", "terrible", "great", "negative", "positive", "Review", "Label"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
VOCABULARY = [*SPECIAL, *FILLING, *MOODS[0], *MOODS[1], *LABELS]
CONTEXT = 64
IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "decoder_start_token_id": 0}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# name -> configuration of transformers and its options, kind of model
MODELS: dict[str, tuple[str, Options, str]] = {
    "llama": ("Llama", WIDTHS | {"num_key_value_heads": 2}, "CausalLM"),
    "wide": ("Llama", WIDTHS | {"num_key_value_heads": 2, "vocab_size": 1 << 17}, "CausalLM"),
    "gpt2": ("GPT2", {"n_embd": 32, "n_head": 4, "n_positions": CONTEXT}, "CausalLM"),
    "opt": ("OPT", OPT, "CausalLM"),
    "bert": ("Bert", WIDTHS | STILL, "SequenceClassification"),
    "roberta": ("Roberta", WIDTHS | STILL, "SequenceClassification"),
    "t5": ("T5", T5, "Seq2SeqLM"),
}
# Of the models that the command line is given: kind of model, and what its tokenizer puts around a text.
FILES = {"llama": ("CausalLM", "<s> $A"), "bert": ("MaskedLM", "<s> $A </s>"), "t5": ("Seq2SeqLM", "$A </s>")}


def make_model(name: str, dtype: str = "float32", kind: str = "", layers: int = 2) -> Any:
    """A random model in evaluation mode, its weights so large that every part of it matters."""
    config, options, default_kind = MODELS[name]
    described = getattr(transformers, f"{config}Config")(**IDS | options, num_hidden_layers=layers)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind or default_kind}").from_config(described)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.to(getattr(torch, dtype)).eval()


def make_batch(model: str, rows: int = 6) -> dict[str, Tensor]:
    """Token ids of different lengths, padded on the right, and labels."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.randint(4, 10, (rows, 1), generator=generator)).long()
    ids = torch.randint(len(SPECIAL), len(VOCABULARY), (rows, 9), generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100)
    if MODELS[model][2] == "SequenceClassification":
        labels = torch.randint(0, 2, (rows,), generator=generator)
    elif MODELS[model][2] == "Seq2SeqLM":
        labels = torch.randint(len(SPECIAL), len(VOCABULARY), (rows, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def write_files(directory: Path) -> None:
    """For the command line: models with their tokenizers, and rows in which one word decides the label."""
    for name, (kind, around) in FILES.items():
        make_model(name, kind=kind, layers=4).save_pretrained(directory / name)
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
        special = {f"{token}_token": f"<{token}>" for token in ("pad", "unk", "mask")}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, model_max_length=CONTEXT, bos_token="<s>", eos_token="</s>", **special
        ).save_pretrained(directory / name)
    rng, rows = random.Random(0), []
    for i in range(64):
        text = rng.choices(FILLING, k=rng.randint(2, 6))
        text.insert(rng.randrange(len(text) + 1), rng.choice(MOODS[i % 2]))
        rows.append((" ".join(text), i % 2))
    files = {
        "train.jsonl": [json.dumps({"text": text, "label": label}) for text, label in rows[:40]],
        "eval.csv": ["text,label", *(f"{text},{label}" for text, label in rows[40:])],
        "columns.csv": ["mood,said", *(f"{('bad', 'good')[label]},{text}" for text, label in rows)],
        "texts.jsonl": [json.dumps({"text": t, "answer": t[t.index(" ") + 1 :], "guess": "their"}) for t, _ in rows],
        "text.txt": [text for text, _ in rows],
        "rewards.py": ["def short(predictions, references):", "    return [-len(text) for text in predictions]"],
    }
    for name, lines in files.items():
        (directory / name).write_text("".join(f"{line}\n" for line in lines))


# --- Digests ----------------------------------------------------------------------------------------------------------


def outcome(weights: Mapping[str, Tensor], updates: Sequence[Any] | None, result: Options) -> Options:
    """What is recorded of a run; ``updates``: what each step did to the weights, as journals have it."""
    numbers = [[u.step, u.lrs, u.coefficients, u.curvatures, u.older] for u in updates or ()]
    return {
        "weights": digest_of_tensors(weights),
        "journal": None if updates is None else digest(numbers),
        "result": result,
    }


def digest(values: Any) -> str:
    """Of plain values, floats to the bit."""
    return sha256(json.dumps(values).encode()).hexdigest()[:16]


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# --- The script -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", help="names of runs with commas between, * for any; record adds them to the file")
    arguments = parser.parse_args()
    file, everything, asked = arguments.file.resolve(), python_runs() | command_runs(), arguments.only
    known = json.loads(file.read_text()) if file.exists() else {}
    chosen = {name: run for name, run in everything.items() if asked is None or is_asked(name, asked)}
    if not chosen:
        parser.error(f"no run has the name {asked}")
    print(f"{len(chosen)} runs of zo_opt in {Path(zo_opt.__file__).parent}, torch {torch.__version__}")
    found, failed = make(chosen)
    if arguments.command == "record":
        kept = {name: of for name, of in known.items() if name in everything and name not in chosen}
        file.write_text(json.dumps(kept | found, indent=1, sort_keys=True) + "\n")
        return bool(failed)
    gone = [name for name in known if name not in everything and (asked is None or is_asked(name, asked))]
    different = [name for name in found if name in known and not is_same(name, known[name], found[name])]
    for name in gone:
        print(f"{name}: recorded, and there is no such run")
    for name in found.keys() - known.keys():
        print(f"{name}: not recorded")
    print(
        f"{len(found.keys() & known.keys())} compared; {len(different)} differ, {len(failed)} failed, {len(gone)} gone"
    )
    return bool(different or failed or gone)


def is_asked(name: str, asked: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in asked.split(","))


def is_same(name: str, before: Options, now: Options) -> bool:
    """Whether two records of a run are; says where they are not."""
    one, other = dict(leaves(before)), dict(leaves(now))
    different = [path for path in one | other if one.get(path) != other.get(path)]
    for path in different:
        print(f"{name}: {path} was {one.get(path)} and is {other.get(path)}")
    return not different


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of all that is no list and no mapping."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def make(runs: Mapping[str, Run]) -> tuple[Options, list[str]]:
    """What runs give, and which failed. Each begins with the same global random state, and talks only if it fails."""
    found, failed, begun = {}, [], time.monotonic()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # In that directory are the command line's models and rows, and no zo_opt but the one that was imported.
    with TemporaryDirectory() as directory, chdir(directory):
        write_files(Path(directory))
        for number, (name, run) in enumerate(runs.items()):
            start, said, work = time.monotonic(), io.StringIO(), Path(f"run-{number}")
            work.mkdir()
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            try:
                with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found[name] = json.loads(json.dumps(run(work)))
                print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
            except LeftOutError as reason:
                print(f"{name}: left out, {reason}", flush=True)
            except Exception as error:
                failed.append(name)
                print(f"{name}: FAILED, {type(error).__name__}: {error}\n{said.getvalue()[-2000:]}", flush=True)
    print(f"{len(found)} runs made in {time.monotonic() - begun:.0f} s")
    return found, failed


if __name__ == "__main__":
    sys.exit(main())
