"""Whether ``--compile`` pays: forwards and steps of the main job with compiled layers against plain ones.

    python benchmarks/compiled.py --threads 1 --out benchmarks/results/compiled.json

SmolLM2-135M on SST-2, tensor-train adapters in the last quarter of the layers, hidden states below them kept; ``query_mode="sequential"``,
one query. The same batches, each padded to its longest sequence and to a multiple of 16 tokens, run with
plain and with compiled layers, interleaved in one process; medians of a whole step. One compilation serves all lengths (dynamic
shapes); "compiled_static" compiles for each padded length alone and is timed on batches padded to 64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from zo_opt import MeZO, trainable_parameters
from zo_opt.models.compilation import compile_layers, running_layers
from zo_opt.record.progress import Reporter
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import build_tools, load_examples

MULTIPLE, STATIC = 16, 64
Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="+", default=["mixed", "fp32"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "model": TrainConfig.model_name_or_path, "torch": torch.__version__, "threads": arguments.threads,
        "device": arguments.device, "batch_size": arguments.batch_size,
    }  # fmt: skip
    for precision in arguments.precision:
        results[precision] = measure(arguments, precision)
        print(precision, json.dumps(results[precision], indent=2))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def measure(arguments: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Step times, their ratios, compile seconds, and the steps that pay them back."""
    torch._dynamo.reset()
    rows = arguments.batches * arguments.batch_size
    config = TrainConfig(
        adapter="tt",
        max_train_rows=max(rows, 128),
        held_out=2,
        query_mode="sequential",
        precision=precision,
        device=arguments.device,
    )
    reporter = Reporter(Console(quiet=True))
    tools = build_tools(config, load_examples(config, reporter), reporter)
    tools.record_prompts(config, Path(), reporter)
    assert tools.prompts is not None
    layers = running_layers(tools.model, tools.prompts.recorder.cut)
    optimizer = MeZO(trainable_parameters(tools.model), lr=0.0, zo_eps=config.eps, module=tools.model)

    def step(batch: Batch) -> tuple[float, float]:
        optimizer.step_count = 0
        optimizer.step(lambda b: tools.train.loss(tools.model, b), batch)
        assert optimizer.last_record is not None
        return optimizer.last_record.loss, optimizer.last_record.projected_grads[0]

    size = arguments.batch_size
    plain = [tools.train.batch(range(size * i, size * (i + 1))) for i in range(arguments.batches)]
    sets = {
        "longest": plain,
        f"multiple_of_{MULTIPLE}": [padded(b, -(-length(b) // MULTIPLE) * MULTIPLE) for b in plain],
    }
    eager = [step(b) for b in plain]
    variants = {}
    seconds_to_compile = {}
    for name, dynamic in (("compiled", True), ("compiled_static", False)):
        start = time.perf_counter()
        trial = plain[0] if dynamic else padded(plain[0], STATIC)
        if dynamic:
            failure = compile_layers(layers, lambda trial=trial: tools.train.loss(tools.model, trial))
            assert failure is None, failure
        else:
            torch._dynamo.reset()
            for layer in layers:
                layer.compile(dynamic=False)
            with torch.no_grad():
                tools.train.loss(tools.model, trial)
        seconds_to_compile[name] = time.perf_counter() - start
        variants[name] = [layer._compiled_call_impl for layer in layers]
        if dynamic:
            compiled = [step(b) for b in plain]
            figures = {
                pads: compare(layers, variants[name], step, batches, arguments.rounds) for pads, batches in sets.items()
            }
        else:
            same = [padded(b, STATIC) for b in plain if length(b) <= STATIC]
            figures[f"static_{STATIC}"] = compare(layers, variants[name], step, same, arguments.rounds)
    saved = figures["longest"]["eager_seconds"] - figures["longest"]["compiled_seconds"]
    return {
        "layers_compiled": len(layers), "tokens": [length(b) for b in plain], "steps": figures,
        "seconds_to_compile": seconds_to_compile,
        "steps_that_pay_it_back": round(seconds_to_compile["compiled"] / saved) if saved > 0 else None,
        "largest_relative_loss_difference": max(abs(c[0] / e[0] - 1) for c, e in zip(compiled, eager, strict=True)),
        "projected_grads": {"eager": [e[1] for e in eager], "compiled": [c[1] for c in compiled]},
    }  # fmt: skip


def compare(
    layers: list[Any], compiled: list[Any], step: Callable[[Batch], Any], batches: list[Batch], rounds: int
) -> dict[str, float]:
    """Median seconds of a step, plain and compiled, and the median of their ratios batch by batch."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for done in range(rounds + 1):
        for batch in batches:
            for use in (False, True):
                for layer, call in zip(layers, compiled, strict=True):
                    layer._compiled_call_impl = call if use else None
                start = time.perf_counter()
                step(batch)
                if done:
                    seconds[use].append(time.perf_counter() - start)
    ratios = [c / e for c, e in zip(seconds[True], seconds[False], strict=True)]
    return {
        "eager_seconds": median(seconds[False]), "compiled_seconds": median(seconds[True]), "ratio": median(ratios)
    }  # fmt: skip


def padded(batch: Batch, to: int) -> Batch:
    """A batch (padded on the left) with more padding there."""
    more = to - length(batch)
    changes = {name: F.pad(batch[name], (more, 0)) for name in ("input_ids", "attention_mask")}
    return batch | changes | {"prompt.places_NT": batch["prompt.places_NT"] + more}


def length(batch: Batch) -> int:
    return batch["input_ids"].shape[-1]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
