"""What a CUDA graph of the forward would gain a forward-only step: the package's own steps, eager against a replayed graph.

    python benchmarks/graphs.py --device cuda --out graphs.json

A BERT-base shape of random weights with LoRA (rank 8) in every layer, MeZO with one query, sequential: the optimizer moves the factors in
place, where a captured forward reads them. The package itself captures nothing. Medians of interleaved steps; ``captured`` says whether a graph
was replayed at all (without CUDA the second column is the eager forward again), and ``loss difference`` whether it saw what was moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, show
from query_modes import SMALL
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from zo_opt import LoRAConfig, MeZO, get_adapter_model, trainable_parameters

WARM_UP = 3  # eager forwards before a capture, as torch asks for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small encoder, few measurements: does it run?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(arguments.device, "transformers"), "rounds": arguments.rounds}
    size, rounds = (SMALL, 1) if arguments.quick else ({}, arguments.rounds)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 16):
            name = f"{str(dtype)[6:]} {rows}x64"
            results[name] = cell(dtype, rows, arguments.device, rounds, **size)
            show(name, results[name])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def cell(dtype: torch.dtype, rows: int, device: str, rounds: int, **size: int) -> dict[str, Any]:
    """Seconds of a forward and of a step, eager and replayed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**size)).eval().to(device, dtype)
        ids = torch.randint(1000, 30000, (rows, 64), device=device)
    labels = torch.arange(rows, device=device) % 2
    adapted = get_adapter_model(model, LoRAConfig(rank=8)).to(device)
    parameters = trainable_parameters(adapted)

    @torch.no_grad()
    def eager() -> Tensor:
        return adapted(input_ids=ids, labels=labels).loss  # type: ignore[no-any-return]

    optimizer = MeZO(parameters, lr=1e-7, zo_eps=1e-3, directions="rademacher")
    optimizer.step(eager)  # which may put the trainables elsewhere
    replayed = captured(eager, device)
    seconds = interleaved(
        {
            "eager forward": eager,
            "replayed forward": replayed,
            "eager step": lambda: optimizer.step(eager),
            "replayed step": lambda: optimizer.step(replayed),
        },
        rounds,
    )
    with torch.no_grad():
        for p in parameters:  # away from the start, where a stale graph would show
            p.add_(0.01)
        difference = abs(float(eager()) - float(replayed()))
    ratios = {
        f"replayed {what} / eager": seconds[f"replayed {what}"] / seconds[f"eager {what}"]
        for what in ("forward", "step")
    }
    found: dict[str, Any] = {f"{k}, s": v for k, v in seconds.items()} | ratios
    return found | {"captured": device == "cuda", "loss difference": difference}


def captured(forward: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """A forward that replays its own kernels; without CUDA itself."""
    if device != "cuda":
        return forward
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = forward()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


if __name__ == "__main__":
    main()
