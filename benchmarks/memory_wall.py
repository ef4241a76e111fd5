"""The largest batch, and the largest model, that one step of each method trains in a process that may not take more memory than so much.

    python benchmarks/memory_wall.py run --out benchmarks/results/memory_wall.json
    python benchmarks/memory_wall.py table benchmarks/results/memory_wall.json
    python benchmarks/memory_wall.py draw benchmarks/results/memory_wall.json --out docs/wall.png

Every size is tried in a process of its own: a fork of one that has imported, loaded, quantised and put adapters in exactly as ``zo-opt train``
does, with the kernel's RLIMIT_DATA set to the bound before the first step (private writable memory of the whole process, the interpreter and the
weights included). On CUDA the bound is the device's, by torch.cuda.set_per_process_memory_fraction, and holds while the model is loaded, too.
What dies says with what. First-order methods take two steps, for AdamW's moments are made at the end of the first; the others one.

Parts: ``batch`` (rows of 32 tokens on the built-in model), ``answers`` (texts to write instead of a label), ``model`` (layers of a Llama of
random weights of SmolLM2-360M's widths, 4 rows), which asks for torchao where a base is in few bits. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bounded import Setting, clock, held, in_fork, largest, limit, peak
from measure import machine
from rich.console import Console
from wall_shown import INFERENCE, draw, measured, table

import zo_opt.training.loop  # noqa: F401 (imported once, for all forks)
from zo_opt.models.builtin import DEFAULT_MODEL, model_directory
from zo_opt.record.progress import Reporter
from zo_opt.system.memory import parse_bytes
from zo_opt.training.config import TrainConfig
from zo_opt.training.pairings import get_pairing
from zo_opt.training.setup import Tools, build_tools, load_examples
from zo_opt.training.stepper import Stepper, training_loss
from zo_opt.training.stop import StopSignals

LENGTH = 32  # tokens of a row
WIDTHS = {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
LAYERS = 4  # that models grow by
ROWS = {"model": 4, "time": 8}  # of the parts that do not search for them


@dataclass(frozen=True)
class Method:
    """What is tried: a method of ``zo-opt compare`` with options of its adapter, or a forward pass alone."""

    pairing: str
    backward: bool
    adapter: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    answers: bool = False

    def config(self, **changes: Any) -> TrainConfig:
        """A run's options."""
        pairing = get_pairing(self.pairing)
        adapter = {"name": pairing.adapter, **pairing.adapter_options, **self.adapter}
        return pairing.config(adapter=adapter, **changes)


ALL: dict[str, Any] = {"layers": None}  # zo-opt train adapts the last quarter of them otherwise
METHODS: dict[str, Method] = {
    INFERENCE: Method("mezo-lora", False, ALL),
    "full": Method("full", True),
    "lora": Method("lora", True, ALL),
    "lora, gradient checkpointing": Method("lora", True, ALL, checkpointing=True),
    "lora, last quarter of the layers": Method("lora", True),
    "lora-fa": Method("lora-fa", True, ALL),
    "lamda": Method("lamda", True, ALL),
    "mezo": Method("mezo", False),
    "mezo-lora": Method("mezo-lora", False, ALL),
    "adazeta": Method("adazeta", False, ALL),
    "lora, answer positions": Method("lora", True, ALL | {"positions": "answer"}, answers=True),
    "tt-lora, answer positions": Method("tt-lora-answers", True, answers=True),
    "adazeta-feedback, answer positions": Method("adazeta-feedback", False, answers=True),
}
PRECISIONS = {"fp32": ("fp32", None), "bf16": ("mixed", None), "int8": ("mixed", "int8"), "int4": ("mixed", "int4")}
WHOLE = ("full", "mezo")  # trained in place, and so in fp32
ON_MODELS = ("lora", "lora, gradient checkpointing", "mezo-lora", "adazeta-feedback, answer positions")
ON_ANSWERS = ("tt-lora, answer positions", "adazeta-feedback, answer positions")


def prepare(method: Method, config: TrainConfig) -> Tools:
    """Model, adapters and rows, as for a run."""
    reporter = Reporter(Console(quiet=True))
    tools = build_tools(config, load_examples(config, reporter), reporter)
    if method.checkpointing:
        with warnings.catch_warnings(action="ignore"):  # transformers 5 has another name for it
            tools.model.wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tools.model.train()  # without dropout in these models
    return tools


def take_steps(method: Method, config: TrainConfig, tools: Tools, setting: Setting, rows: int) -> dict[str, Any]:
    """One step of so many rows under the bound, two of a first-order method: the most that is held, and the last one's seconds."""
    if setting.device == "cpu":
        limit(setting)
    if method is METHODS[INFERENCE]:
        with torch.no_grad():
            start = clock(setting.device)
            training_loss(tools.model, tools.train, tools.train.batch(range(rows)))
    else:
        stepper, stop = Stepper(replace(config, batch_size=rows), tools), StopSignals()
        for _ in range(1 + method.backward):
            start = clock(setting.device)
            stepper.step(stop)
    return {"peak": peak(setting.device), "seconds": round(clock(setting.device) - start, 2)}


def batch_cell(method: Method, config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """The largest batch of a method: on CPUs the model is loaded once, and forked for every size."""
    if setting.device == "cuda":
        return largest(lambda rows: in_fork(partial(fresh, method, config, setting, rows), setting.seconds), setting)
    tools = prepare(method, config)
    loaded = {"loaded": held()["VmData"], "loading_resident": held()["VmHWM"]}
    steps = partial(take_steps, method, config, tools, setting)
    return loaded | largest(lambda rows: in_fork(partial(steps, rows), setting.seconds), setting)


def fresh(method: Method, config: TrainConfig, setting: Setting, rows: int) -> dict[str, Any]:
    """A model loaded, and one size tried."""
    if setting.device == "cuda":
        limit(setting)
    tools = prepare(method, config)
    loaded = {"loaded": held()["VmData"], "loading_resident": held()["VmHWM"]}
    return loaded | take_steps(method, config, tools, setting, rows)


def model_cell(method: Method, config: TrainConfig, setting: Setting, directory: Path) -> dict[str, Any]:
    """The most layers of a random Llama with which a method takes a step, in steps of LAYERS."""

    def fits(size: int) -> dict[str, Any]:
        own = replace(config, model_name_or_path=write_model(directory, config.model_name_or_path, LAYERS * size))
        return in_fork(partial(fresh, method, own, setting, ROWS["model"]), setting.seconds)

    found = largest(fits, setting)
    layers = LAYERS * found["size"]
    return found | {"layers": layers, "parameters": parameters(layers)}


def parameters(layers: int) -> int:
    """Of a random Llama, whose head is its embedding."""
    config = transformers.LlamaConfig(**WIDTHS, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True)
    with torch.device("meta"):
        return sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())


def time_cell(method: Method, config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """The median seconds of three steps of ROWS["time"] rows after a first one, without a bound."""
    tools = prepare(method, config)
    stepper, stop, seconds = Stepper(replace(config, batch_size=ROWS["time"]), tools), StopSignals(), []
    for _ in range(4):
        start = clock(setting.device)
        stepper.step(stop)
        seconds.append(clock(setting.device) - start)
    return {"seconds": round(sorted(seconds[1:])[1], 2)}


def write_rows(directory: Path, rows: int, target: int) -> dict[str, Any]:
    """Rows that fill LENGTH tokens, with a label or a text of so many tokens to write; and the options of a run on them."""
    path = directory / f"rows-{target}.jsonl"
    text = "a film that says little and says it well " * 10
    rows = max(rows, 2)  # one of each label
    texts = [f"{i}: {text}" for i in range(rows)]  # of one text twice the prompt would be run and kept once
    answers: list[Any] = ["well" + " well" * (target - 2)] * rows if target else [i % 2 for i in range(rows)]
    path.write_text("".join(json.dumps({"text": t, "label": a}) + "\n" for t, a in zip(texts, answers, strict=True)))
    task = {"target_column": "label", "template": "{text}"} if target else {}
    return {"train_file": path, "eval_file": path, "max_length": LENGTH, "prompt_cache": "off", "steps": 10, **task}


def write_model(directory: Path, source: str, layers: int | None = None) -> str:
    """A model, or a Llama of so many layers of random numbers, as a bf16 checkpoint; made in a process of its own."""
    path = directory / f"model-{layers}"

    def write() -> dict[str, Any]:
        builtin = str(model_directory()) if source == DEFAULT_MODEL else source
        transformers.utils.logging.disable_progress_bar()
        if layers is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(builtin, dtype=torch.bfloat16)
        else:
            config = transformers.AutoConfig.from_pretrained(builtin)
            config.update({**WIDTHS, "num_hidden_layers": layers, "head_dim": 64})
            model = transformers.LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(builtin).save_pretrained(path)
        return {}

    if not path.exists() and (failed := in_fork(write, 600)):
        raise SystemExit(f"the model of {layers} layers could not be written: {failed}")
    return str(path)


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured: part, method, precision of the base, tokens to write."""
    chosen = list(METHODS) if arguments.methods is None else arguments.methods.split(";")
    parts, few = arguments.parts.split(","), arguments.precisions.split(",")
    found: list[dict[str, Any]] = []
    for part in parts:
        among = {
            "batch": chosen,
            "answers": ON_ANSWERS,
            "model": ON_MODELS,
            "time": [n for n in chosen if n != INFERENCE],
        }
        for precision in few if part in ("batch", "model") else ["bf16"]:
            for target in arguments.targets if part == "answers" else [0]:
                for name in among[part]:
                    if name in chosen:
                        taken = "fp32" if name in WHOLE else precision
                        found.append({"part": part, "method": name, "base": taken, "target": target})
    return [cell for i, cell in enumerate(found) if cell not in found[:i]]


def run(arguments: argparse.Namespace) -> None:
    """Measure what is asked for; cells that the file has already stay."""
    torch.set_num_threads(1)
    bound = parse_bytes(arguments.bound)
    setting = Setting(bound, arguments.device, arguments.most, arguments.seconds)
    asked = {
        "bound": bound,
        "length": LENGTH,
        "device": arguments.device,
        "most": arguments.most,
        "model": arguments.model_name_or_path,
        "rows": ROWS,
    }
    results: dict[str, Any] = {**asked, "cells": []}
    if arguments.out is not None and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
        if other := [name for name in asked if results.get(name) != asked[name]]:
            raise SystemExit(f"{arguments.out} was measured with another {', '.join(other)}; give another --out.")
    origin = in_fork(lambda: machine(arguments.device, "transformers"), 60)  # CUDA must not be begun in this process
    results["machine"] = origin
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells(arguments):
            results["cells"] = [c for c in results["cells"] if not cell.items() <= c.items() or measured(c)]
            if any(cell.items() <= done.items() for done in results["cells"]):
                continue
            start = time.monotonic()
            found = in_fork(
                partial(measure, cell, arguments.model_name_or_path, setting, Path(scratch)), arguments.cell_seconds
            )
            method = METHODS[cell["method"]]
            found = {"backward": method.backward, "answers": method.answers} | found
            results["cells"].append(
                cell | {"imports": held()["VmData"]} | found | {"took": round(time.monotonic() - start)}
            )
            print({k: v for k, v in results["cells"][-1].items() if k != "tried"}, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if failed := [c["dies"] for c in results["cells"] if not measured(c)]:
        raise SystemExit(f"{len(failed)} cells could not be measured; the first: {failed[0]}")


def measure(cell: dict[str, Any], model: str, setting: Setting, directory: Path) -> dict[str, Any]:
    """One cell."""
    method, (precision, few) = METHODS[cell["method"]], PRECISIONS[cell["base"]]
    options = write_rows(directory, setting.most, cell["target"])
    options |= {"model_name_or_path": model, "device": setting.device, "batch_size": 1}
    config = method.config(precision=precision, quantise=few, **options)
    if cell["part"] == "model":
        return model_cell(method, config, setting, directory)
    if cell["base"] != "fp32":  # in which the built-in model's own checkpoint is
        config = replace(config, model_name_or_path=write_model(directory, model))
    return (time_cell if cell["part"] == "time" else batch_cell)(method, config, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--bound", default="1GiB", help="memory of a process; on CUDA of the device")
    command.add_argument("--model_name_or_path", default=DEFAULT_MODEL, help="of all parts but model")
    command.add_argument("--parts", default="batch,answers,model,time")
    command.add_argument("--methods", help="names with semicolons between")
    command.add_argument("--precisions", default="bf16,int8,int4", help="of the base, of parts batch and model")
    command.add_argument("--targets", type=int, nargs="+", default=[8, 24], help="tokens to write, of part answers")
    command.add_argument(
        "--most", type=int, default=256, help="rows, or LAYERS of a model, beyond which nothing is tried"
    )
    command.add_argument("--seconds", type=int, default=900, help="that one size may take")
    command.add_argument("--cell_seconds", type=int, default=2400, help="that a cell may take")
    command.add_argument("--device", default="cpu")
    command.add_argument("--out", type=Path)
    command.set_defaults(do=run)
    command = commands.add_parser("table")
    command.add_argument("file", type=Path)
    command.set_defaults(do=table)
    command = commands.add_parser("draw")
    command.add_argument("file", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=draw)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
