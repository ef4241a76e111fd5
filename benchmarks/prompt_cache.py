"""A step with kept hidden states against one without: random tensor-train adapters in the last 8 of 30 layers of the built-in model.

    python benchmarks/prompt_cache.py --threads 1 --out benchmarks/results/prompt_cache.json

SST-2, one query (two forwards) a step, float32. The same batches go through an uncached set of examples and through caches on the
device, in CPU memory and on disk, interleaved in one process; medians of a step with its batch's assembly, reading and checksums
included. Losses are compared batch by batch. Bar: cached / uncached <= 0.35, losses equal to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from zo_opt import MeZO, trainable_parameters
from zo_opt.prompts.recorder import Recorder
from zo_opt.prompts.store import FILE_NAME, FileStore, MemoryStore
from zo_opt.record.progress import Reporter
from zo_opt.tasks.evaluation import Prepared
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import build_tools, load_examples

PLACES = ("device", "cpu", "disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--query_mode", default="sequential")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as directory:
        results = measure(arguments, Path(directory))
    print(json.dumps(results, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Ratios of medians, the largest difference of a loss, and what recording cost."""
    rows = (arguments.steps + 1) * arguments.batch_size
    config = TrainConfig(
        adapter={"name": "tt", "layers": 8}, precision="fp32", device=arguments.device, max_train_rows=rows, held_out=2,
        prompt_cache="off",
    )  # fmt: skip
    reporter = Reporter(Console(quiet=True))
    examples = load_examples(config, reporter)
    tools = build_tools(config, examples, reporter)
    with torch.no_grad():  # away from the start, where adapters are identities
        generator = torch.Generator().manual_seed(0)
        for p in trainable_parameters(tools.model):
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.device))
    sets = {"uncached": tools.train}
    recording: dict[str, float] = {}
    cached_bytes: dict[str, int] = {}
    prompts = tools.model.prompt_forward()
    recorder = prompts.recorder
    stores: dict[str, MemoryStore | FileStore | None] = {"uncached": None}
    for place in PLACES:
        start = time.perf_counter()
        if place == "disk":
            stores[place] = FileStore(directory / FILE_NAME, 1 << 30, recorder.fingerprint())
        else:
            stores[place] = MemoryStore(1 << 30, tools.device if place == "device" else torch.device("cpu"))
        use(recorder, stores[place])
        sets[place] = Prepared(examples.train, tools.train.scorer, tools.device, prompts)
        sets[place].record(config.eval_batch_size, lambda count: None)
        recording[place] = time.perf_counter() - start
        cached_bytes[place] = stores[place].bytes
    optimizer = MeZO(
        trainable_parameters(tools.model), lr=0.0, zo_eps=1e-2, module=tools.model, query_mode=arguments.query_mode
    )
    seconds: dict[str, list[float]] = {name: [] for name in sets}
    difference = 0.0
    tokens = []
    for step in range(arguments.steps + 1):  # the first one warms up
        indices = range(step * arguments.batch_size, (step + 1) * arguments.batch_size)
        losses = {}
        tokens.append(tools.train.batch(indices)["input_ids"].shape[-1])
        for name, prepared in sets.items():
            use(recorder, stores[name])
            optimizer.step_count = step  # the same direction for all

            def run(prepared: Prepared = prepared, indices: range = indices) -> None:
                optimizer.step(lambda b: prepared.loss(tools.model, b), prepared.batch(indices))

            took = timed(run)
            losses[name] = optimizer.last_record.loss
            if step:
                seconds[name].append(took)
        difference = max(difference, *(abs(losses[p] / losses["uncached"] - 1) for p in PLACES))
    medians = {name: sorted(s)[len(s) // 2] for name, s in seconds.items()}
    return {
        "model": config.model_name_or_path, "adapted_layers": "8 of 30", "dtype": "float32", "device": str(tools.device),
        "threads": arguments.threads, "torch": torch.__version__, "machine": platform.machine(), "rows": rows,
        "batch_size": arguments.batch_size, "padded_tokens": tokens, "query_mode": arguments.query_mode,
        "step_seconds": medians, "ratios": {p: medians[p] / medians["uncached"] for p in PLACES}, "bar": 0.35,
        "largest_relative_loss_difference": difference, "recording_seconds": recording, "cached_bytes": cached_bytes,
    }  # fmt: skip


def use(recorder: Recorder, store: MemoryStore | FileStore | None) -> None:
    """From here on states are kept there; those of the batch before are forgotten, so that each place is read."""
    recorder.store = store
    recorder._known.clear()


def timed(call: Callable[[], Any]) -> float:
    """Seconds, the device's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
