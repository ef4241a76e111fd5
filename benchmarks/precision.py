"""How well projected gradients survive low precision: correlation with float32's, for the whole model in bf16 and for the mixed form.

    python benchmarks/precision.py --out benchmarks/results/precision.json

The built-in model and task, random tensor-train adapters in the last 8 layers, one direction an example.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from zo_opt import MeZO
from zo_opt.adapters import TTConfig, get_adapter_model, trainable_parameters
from zo_opt.models.models import load_model
from zo_opt.models.precision import set_precision
from zo_opt.record.progress import Reporter
from zo_opt.schedules import constant_queries
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.scoring import make_scorer
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import load_examples

EPS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--model_name_or_path", default=TrainConfig.model_name_or_path)
    arguments = parser.parse_args()
    reference = projected_grads(arguments, "fp32", 1e-2)
    table = {
        form: {eps: correlation(projected_grads(arguments, form, eps), reference) for eps in EPS}
        for form in ("mixed", "bf16")
    }
    print("| form | " + " | ".join(f"zo_eps {eps:g}" for eps in EPS) + " |")
    for form, row in table.items():
        print(f"| {form} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n")


def projected_grads(arguments: argparse.Namespace, form: str, zo_eps: float) -> torch.Tensor:
    """Projected gradients of the same directions and examples."""
    config = TrainConfig()
    examples = load_examples(config, Reporter(Console(quiet=True)))
    model, tokenizer = load_model(arguments.model_name_or_path)
    scorer = make_scorer(model, tokenizer, examples.task)
    if form == "bf16":
        model.to(torch.bfloat16)
    else:
        set_precision(model, form, torch.device("cpu"))
    adapted = get_adapter_model(model, TTConfig(rank=5, bottleneck=64, layers=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(adapted):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    prepared = Prepared(examples.train, scorer, torch.device("cpu"), None)
    optimizer = MeZO(
        trainable_parameters(adapted),
        lr=0.0,
        zo_eps=zo_eps,
        query_schedule=constant_queries(16),
        query_mode="split",
        module=adapted,
        directions="rademacher",
    )
    found: list[float] = []
    for start in range(0, arguments.queries, 16):
        optimizer.step(lambda b: prepared.loss(adapted, b), prepared.batch(range(start, start + 16)))
        assert optimizer.last_record is not None
        found += optimizer.last_record.projected_grads
    return torch.tensor(found)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


if __name__ == "__main__":
    main()
