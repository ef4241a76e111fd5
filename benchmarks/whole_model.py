"""Whole-model and adapter steps against the MeZO loop: what perturbing, restoring and updating costs beside the forwards.

    python benchmarks/whole_model.py --threads 1 --out benchmarks/results/whole_model.json

A BERT-base (109 M parameters, random weights), in float32 and bfloat16. The MeZO loop is that of the released code: a global seed,
``torch.normal`` a tensor, out of place, three passes a query and one to update. Everything is measured interleaved in one process;
medians. "overhead" is a one-query step less two plain forwards; "sweeps" is perturbing every parameter twice by a closure that
merely reads it, and the update. Bandwidth floor: one in-place addition of a constant to every parameter. Memory is the most bytes
allocated at once above the weights, by the allocator's own record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, peak_bytes, show
from query_modes import SMALL
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from zo_opt import MeZO
from zo_opt.optim import Update
from zo_opt.queries.perturbation import Perturbed, Point

EPS = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small encoder: does it run?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "machine": machine(arguments.device, "transformers"), "rounds": arguments.rounds
    }  # fmt: skip
    results["adapter"] = adapter(arguments.rounds * 5, arguments.device)
    show("adapter, 288 tensors, 36,864 parameters", results["adapter"])
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 16):
            name = f"{str(dtype)[6:]} {batch}x64"
            size = SMALL if arguments.quick else {}
            results[name] = whole_model(dtype, batch, arguments.rounds, arguments.device, **size)
            show(name, results[name])
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def whole_model(dtype: torch.dtype, batch: int, rounds: int, device: str, **size: int) -> dict[str, float]:
    """Seconds (medians) and the ratios that the bars name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**size)).eval().to(device, dtype)
        ids, labels = torch.randint(0, 30000, (batch, 64)).to(device), torch.randint(0, 2, (batch,)).to(device)
    parameters = list(model.parameters())

    def closure() -> Tensor:
        return model(input_ids=ids, labels=labels).loss  # type: ignore[no-any-return]

    @torch.no_grad()
    def two_forwards() -> None:
        closure()
        closure()

    def read_every_parameter() -> float:
        seen = [p.detach() for p in parameters]
        return float(seen[0][0, 0])  # a slope of 0 would need no update

    optimizers = {d: MeZO(parameters, lr=1e-7, zo_eps=EPS, directions=d) for d in ("rademacher", "gaussian")}
    actions: dict[str, Callable[[], Any]] = {
        "two forwards": two_forwards,
        "MeZO loop": lambda: mezo_loop(parameters),
        "bandwidth floor": lambda: add_constant(parameters),
    }
    for name, optimizer in optimizers.items():
        actions[f"{name} step"] = lambda optimizer=optimizer: optimizer.step(closure)
        actions[f"{name} sweeps"] = lambda optimizer=optimizer: optimizer.step(read_every_parameter)
    seconds = interleaved(actions, rounds)
    ratios = {"bandwidth floor / MeZO loop": seconds["bandwidth floor"] / seconds["MeZO loop"]}
    for name in optimizers:
        overhead = seconds[f"{name} step"] - seconds["two forwards"]
        ratios[f"{name} overhead / MeZO loop"] = overhead / seconds["MeZO loop"]
        ratios[f"{name} sweeps / MeZO loop"] = seconds[f"{name} sweeps"] / seconds["MeZO loop"]
        whole = seconds["two forwards"] + seconds["MeZO loop"]
        ratios[f"MeZO step / {name} step"] = whole / seconds[f"{name} step"]
        step = peak_bytes(lambda optimizer=optimizer: optimizer.step(closure), device)
        ratios[f"{name} step's memory / a forward's"] = step / peak_bytes(two_forwards, device)
    ratios["a forward's memory, MiB"] = peak_bytes(two_forwards, device) / 2**20
    return {f"{k}, s": v for k, v in seconds.items()} | ratios


def adapter(rounds: int, device: str) -> dict[str, float]:
    """288 tensors of 128 entries: a whole step whose closure does nothing, and its perturb, restore and update alone."""

    def tensors() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(16, 8, device=device)) for _ in range(288)]

    parameters = tensors()
    # Tensors of its own for each: an optimizer gathers them in a buffer, and two would take them from each other.
    own = {d: tensors() for d in ("rademacher", "gaussian")}
    optimizers = {d: MeZO(own[d], lr=1e-7, zo_eps=EPS, directions=d) for d in own}
    actions: dict[str, Callable[[], Any]] = {"MeZO loop": lambda: mezo_loop(parameters)}
    for name, optimizer in optimizers.items():
        actions[f"{name} step"] = lambda o=optimizer, p=own[name][0]: o.step(lambda: float(p[0, 0]))
        actions[f"{name} sweeps"] = lambda optimizer=optimizer: sweeps(optimizer)
    seconds = interleaved(actions, rounds)
    ratios = {f"{name} / MeZO loop": s / seconds["MeZO loop"] for name, s in seconds.items() if name != "MeZO loop"}
    return {f"{k}, s": v for k, v in seconds.items()} | ratios


@torch.no_grad()
def sweeps(optimizer: MeZO) -> None:
    """What the loop does and nothing of what an optimizer does besides: two points, the restore, the update."""
    directions = optimizer.directions_of(optimizer.step_count)
    list(Perturbed(optimizer.trainables(), directions).losses(lambda: 0.0, [Point(((0, EPS),)), Point(((0, -EPS),))]))
    optimizer.move(Update(optimizer.step_count, (1e-7,), (0.3,)))


def mezo_loop(parameters: list[nn.Parameter], lr: float = 1e-7, projected_grad: float = 0.3) -> None:
    """The published loop's work on the parameters, without its forwards."""

    def normal(p: nn.Parameter) -> Tensor:
        return torch.normal(mean=0, std=1, size=p.data.size(), device=p.device, dtype=p.dtype)

    with torch.random.fork_rng():
        for scale in (1, -2, 1):
            torch.manual_seed(0)
            for p in parameters:
                p.data = p.data + scale * normal(p) * EPS
        torch.manual_seed(0)
        for p in parameters:
            p.data = p.data - lr * (projected_grad * normal(p) + 0.0 * p.data)


def add_constant(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.data.add_(0.0)


if __name__ == "__main__":
    main()
