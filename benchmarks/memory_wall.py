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

import zo_opt.training.loop  # noqa: F401 (imported once, for all forks)
from zo_opt.models.builtin import DEFAULT_MODEL, model_directory
from zo_opt.record.progress import Reporter
from zo_opt.record.report import BLUE, ORANGE, save_picture
from zo_opt.system.memory import parse_bytes
from zo_opt.training.config import TrainConfig
from zo_opt.training.pairings import get_pairing
from zo_opt.training.setup import Tools, build_tools, load_examples
from zo_opt.training.stepper import Stepper, training_loss
from zo_opt.training.stop import StopSignals

DARK = "#4a5568"
LENGTH = 32  # tokens of a row
WIDTHS = {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
LAYERS = 4  # that models grow by
ROWS_OF_MODEL = 4
ROWS_OF_TIME = 8


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
INFERENCE = "a forward pass alone"
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
        return in_fork(partial(fresh, method, own, setting, ROWS_OF_MODEL), setting.seconds)

    found = largest(fits, setting)
    layers = LAYERS * found["size"]
    return found | {"layers": layers, "parameters": parameters(layers)}


def parameters(layers: int) -> int:
    """Of a random Llama, whose head is its embedding."""
    config = transformers.LlamaConfig(**WIDTHS, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True)
    with torch.device("meta"):
        return sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())


def time_cell(method: Method, config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """The median seconds of three steps of ROWS_OF_TIME rows after a first one, without a bound."""
    tools = prepare(method, config)
    stepper, stop, seconds = Stepper(replace(config, batch_size=ROWS_OF_TIME), tools), StopSignals(), []
    for _ in range(4):
        start = clock(setting.device)
        stepper.step(stop)
        seconds.append(clock(setting.device) - start)
    return {"seconds": round(sorted(seconds[1:])[1], 2)}


def write_rows(directory: Path, rows: int, target: int) -> dict[str, Any]:
    """Rows that fill LENGTH tokens, with a label or a text of so many tokens to write; and the options of a run on them."""
    path = directory / f"rows-{target}.jsonl"
    text = "a film that says little and says it well " * 10
    answers: list[Any] = ["well" + " well" * (target - 2)] * rows if target else [i % 2 for i in range(rows)]
    path.write_text("".join(json.dumps({"text": text, "label": answer}) + "\n" for answer in answers))
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
    results: dict[str, Any] = {"cells": []}
    if arguments.out is not None and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    asked = {
        "bound": bound,
        "length": LENGTH,
        "device": arguments.device,
        "most": arguments.most,
        "model": arguments.model_name_or_path,
    }
    origin = in_fork(lambda: machine(arguments.device, "transformers"), 60)  # CUDA must not be begun in this process
    results |= asked | {"machine": origin}
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells(arguments):
            if any(cell.items() <= done.items() for done in results["cells"]):
                continue
            start = time.monotonic()
            found = in_fork(
                partial(measure, cell, arguments.model_name_or_path, setting, Path(scratch)), arguments.cell_seconds
            )
            results["cells"].append(
                cell | {"imports": held()["VmData"]} | found | {"took": round(time.monotonic() - start)}
            )
            print({k: v for k, v in results["cells"][-1].items() if k != "tried"}, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")


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


def table(arguments: argparse.Namespace) -> None:
    """What was measured, as Markdown."""
    results = json.loads(arguments.file.read_text())
    of = {part: [c for c in results["cells"] if c["part"] == part] for part in ("batch", "answers", "model", "time")}
    seconds = {c["method"]: c.get("seconds") for c in of["time"]}
    print(
        f"One step in a process of {results['bound'] / 2**20:,.0f} MiB, {results['model']}, rows of {results['length']} tokens.\n"
    )
    print(
        "| method | | base | loaded, MiB | largest batch | tokens | the next size tried | its seconds | seconds of 8 rows |"
    )
    print("|---|---|---|---:|---:|---:|---|---:|---:|")
    for c in of["batch"]:
        kind = "backpropagation" if METHODS[c["method"]].backward else "forward passes"
        print(
            f"| {c['method']} | {kind} | {c['base']} | {_mib(c.get('loaded'))} | {_rows(c)} | {c['size'] * results['length']:,} | {_death(c)} "
            f"| {c.get('seconds', '-')} | {seconds.get(c['method']) or '-'} |"
        )
    print(
        "\n| method | tokens to write of 32 | largest batch | tokens | the next size tried |\n|---|---:|---:|---:|---|"
    )
    for c in of["answers"]:
        print(f"| {c['method']} | {c['target']} | {_rows(c)} | {c['size'] * results['length']:,} | {_death(c)} |")
    print(
        f"\n| method, {ROWS_OF_MODEL} rows | base | layers | parameters | the next size tried |\n|---|---|---:|---:|---|"
    )
    for c in of["model"]:
        print(
            f"| {c['method']} | {c['base']} | {c['layers'] or 'none'} | {c['parameters'] / 1e6:,.0f} M | {_death(c)} |"
        )


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def _rows(cell: dict[str, Any]) -> str:
    more = "" if "dies" in cell else " or more"
    return f"{cell['size']}{more}" if cell["size"] else "**none**"


def _death(cell: dict[str, Any]) -> str:
    """With what the smallest size that did not fit died."""
    if "dies" not in cell:
        return "-"
    said = cell["dies"].replace("[enforce fail at alloc_cpu.cpp:127] err == 0. ", "").partition(". Error code")[0]
    return f"{cell['dies_at']}: {said}"


def draw(arguments: argparse.Namespace) -> None:
    """A bar a method: the tokens of the largest batch."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    results = json.loads(arguments.file.read_text())
    found = {c["method"]: c for c in results["cells"] if c["part"] == "batch" and c["base"] in ("bf16", "fp32")}
    tokens = {name: cell["size"] * results["length"] for name, cell in found.items()}
    reach = tokens.pop(INFERENCE, None)
    most = max([*tokens.values(), reach or 1])
    groups = {
        "trained: adapters at every token, or all weights": [n for n in tokens if not METHODS[n].answers],
        "trained: adapters at the answer alone": [n for n in tokens if METHODS[n].answers],
    }
    figure = Figure(figsize=(10, 5.8), layout="constrained", dpi=160)
    axes, place, ticks = figure.subplots(), 0.0, {}
    for title, names in groups.items():
        axes.text(0.008 * most, place - 0.8, title, fontsize=11, color=DARK, style="italic", va="center")
        for name in sorted(names, key=lambda n: (not METHODS[n].backward, tokens[n])):
            size, colour = tokens[name], ORANGE if METHODS[name].backward else BLUE
            axes.barh(place, size, color=colour, height=0.78)
            inside = size > 0.2 * most
            said = f"{size:,}" if size else "not one row"
            axes.text(
                size + (-0.01 if inside else 0.01) * most, place, said, va="center", ha="right" if inside else "left",
                fontsize=11, fontweight="bold", color="white" if inside else colour,
            )  # fmt: skip
            ticks[place] = name.removesuffix(", answer positions") + (" (fp32)" if name in WHOLE else "")
            place += 1
        place += 1.2
    if reach is not None:
        axes.axvline(reach, color=DARK, linewidth=1.4, linestyle="--", zorder=0)
        axes.text(reach - 0.01 * most, -0.8, f"inference: {reach:,}", ha="right", va="center", fontsize=11, color=DARK)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 1.6, -1.3)
    axes.set_xlim(0, 1.02 * most)
    axes.set_xlabel(f"tokens in the largest batch that one step can train ({results['model']})", fontsize=11)
    handles = [Patch(color=ORANGE, label="backpropagation"), Patch(color=BLUE, label="forward passes alone")]
    axes.legend(handles=handles, loc="center right", bbox_to_anchor=(0.94, 0.74), frameon=False, fontsize=13)
    gib = results["bound"] / 2**30
    figure.suptitle(f"A process of {gib:g} GiB: how large a batch can it train?", fontsize=16, fontweight="bold")
    save_picture(figure, arguments.out)


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
