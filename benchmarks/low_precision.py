"""Whole-model steps in bfloat16 against the same steps in float32, and steps that must change nothing.

    python benchmarks/low_precision.py --steps 1000 --out benchmarks/results/low_precision.json

The built-in model, all its parameters trained (MeZO, Rademacher), on the built-in task. Three runs over the same batches and
seeds: float32; bfloat16 with stochastic rounding (what the package does); bfloat16 rounded to nearest (what MeZO's loop does).
The first layers of the model are kept, so that a thousand steps fit into minutes. Reported: the mean loss on fixed rows on the way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn

from zo_opt import MeZO
from zo_opt.directions import Stream
from zo_opt.models.models import load_model
from zo_opt.optim import machine
from zo_opt.record.progress import Reporter
from zo_opt.tasks.batches import BatchOrder
from zo_opt.tasks.evaluation import Prepared, evaluate
from zo_opt.tasks.scoring import make_scorer
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import load_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        key: getattr(arguments, key) for key in ("steps", "layers", "lr", "batch_size", "threads")
    }
    results[f"unchanged after {max(1, arguments.steps // 10)} steps with lr 0"] = idle(arguments)
    print(results, flush=True)
    for name in ("float32", "bfloat16, stochastic", "bfloat16, nearest"):
        results[name] = course(arguments, name)
        print(name, results[name], flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def load(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, Prepared]:
    """A short model in that dtype, and the task's training rows."""
    examples = load_examples(TrainConfig(), Reporter(Console(quiet=True)))
    model, tokenizer = load_model(TrainConfig.model_name_or_path)
    model.model.layers = model.model.layers[: arguments.layers]
    model.config.num_hidden_layers = arguments.layers
    scorer = make_scorer(model, tokenizer, examples.task)
    model.to(dtype).requires_grad_(True)
    return model, Prepared(examples.train, scorer, torch.device("cpu"), None)


def idle(arguments: argparse.Namespace) -> bool:
    """Whether lr 0 leaves every bit of the weights in bfloat16."""
    model, prepared = load(arguments, torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(model.parameters(), lr=0.0, directions="rademacher", weight_decay=0.1)
    batch = prepared.batch(range(arguments.batch_size))
    for _ in range(max(1, arguments.steps // 10)):
        optimizer.step(lambda: prepared.loss(model, batch))
    return all(
        torch.equal(p.detach().view(torch.int16), q.view(torch.int16))
        for p, q in zip(model.parameters(), before, strict=True)
    )


def course(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """Loss on 128 fixed rows every tenth of the run."""
    model, prepared = load(arguments, torch.float32 if name == "float32" else torch.bfloat16)
    order = BatchOrder(prepared.labels, arguments.batch_size, 0, "balanced")
    optimizer = MeZO(model.parameters(), lr=arguments.lr, zo_eps=1e-2, directions="rademacher", seed=0)
    fixed = prepared.subset(range(len(prepared) - 128, len(prepared)))
    losses: dict[str, float] = {}
    rounding = mock.patch.object(machine, "round_into", _to_nearest) if name.endswith("nearest") else mock.MagicMock()
    with rounding:
        for step in range(arguments.steps + 1):
            if step % max(1, arguments.steps // 10) == 0:
                losses[str(step)] = round(evaluate(model, fixed, 32).loss, 4)
            if step < arguments.steps:
                batch = prepared.batch(order.indices(step))
                optimizer.step(lambda b: prepared.loss(model, b), batch)
    return losses


def _to_nearest(out: Tensor, values: Tensor, stream: Stream, start: int) -> None:
    out.copy_(values)


if __name__ == "__main__":
    main()
