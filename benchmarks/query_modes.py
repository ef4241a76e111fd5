"""What a query costs in each mode: one-query steps, batched and split queries, ``auto``, and memory.

    python benchmarks/query_modes.py --threads 1 --out benchmarks/results/query_modes.json

Everything is interleaved in one process; medians. "BERT-base": 110 M parameters with a tensor-train adapter after every attention output
and feed-forward (24, rank 5, bottleneck 64). "small encoder": 4 layers of 256. Both with random weights and padded batches. A plain
forward is one of the
model without adapters. The grid holds ``auto`` against the better of the two modes it chooses from. Memory is the most bytes
allocated at once above the weights by the allocator's own record.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, peak_bytes, show
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from zo_opt import MeZO, TTConfig, get_adapter_model, trainable_parameters
from zo_opt.schedules import constant_queries

EPS = 1e-3
SIZE: dict[str, int] = {}  # BERT-base's; small with --quick
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default="one,batched,split,memory,grid", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="the small encoder everywhere: does it run?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    SIZE.update(SMALL if arguments.quick else {})
    kept = arguments.out is not None and arguments.out.exists()  # parts that are not run again stay as they are
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if kept else {}
    results |= {
        "machine": machine(arguments.device, "transformers"), "rounds": arguments.rounds
    }  # fmt: skip
    parts: dict[str, Callable[[int, str], dict[str, Any]]] = {
        "one": one_query, "batched": batched_queries, "split": split_queries, "memory": memory, "grid": grid,
    }  # fmt: skip
    for part in arguments.parts.split(","):
        results[part] = parts[part](arguments.rounds, arguments.device)
        show(part, results[part])
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")


class Setup:
    """One encoder, frozen, with and without adapters over the same weights, and a padded batch."""

    def __init__(
        self, dtype: torch.dtype, rows: int, length: int, device: str, layers: int | None = None, **size: int
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = (
                BertForSequenceClassification(BertConfig(**(SIZE | size)))
                .eval()
                .to(device, dtype)
                .requires_grad_(False)
            )
            ids = torch.randint(1000, 30000, (rows, length), device=device)
            labels = torch.randint(0, 2, (rows,), device=device)
        mask = torch.ones_like(ids)
        mask[1::2, length - length // 8 :] = 0
        self.batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        self.forward_plain = _twin(plain, self.batch)
        self.model = get_adapter_model(plain, TTConfig(rank=5, bottleneck=64, layers=layers))

    def optimizer(self, mode: str, queries: int = 1) -> MeZO:
        return MeZO(
            trainable_parameters(self.model), lr=1e-7, zo_eps=EPS, directions="rademacher", module=self.model,
            query_mode=mode, query_schedule=constant_queries(queries),
        )  # fmt: skip

    def step(self, optimizer: MeZO) -> Callable[[], Any]:
        return lambda: optimizer.step(self.loss, self.batch)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss  # type: ignore[no-any-return]


def _twin(plain: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The loss of the model as it is before adapters go in: a second module over the same weights."""
    memo = {id(p): p for p in plain.parameters()} | {id(b): b for b in plain.buffers()}
    twin = copy.deepcopy(plain, memo)

    @torch.no_grad()
    def forward() -> Tensor:
        return twin(**batch).loss  # type: ignore[no-any-return]

    return forward


def one_query(rounds: int, device: str) -> dict[str, float]:
    """A one-query step over two plain forwards; bars: 1.03 at 16x64, 0.95 at 1x64."""
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (16, 1):
            setup = Setup(dtype, rows, 64, device)
            actions = {"two forwards": lambda f=setup.forward_plain: (f(), f())}
            for mode in ("sequential", "batched", "auto"):
                actions[mode] = setup.step(setup.optimizer(mode))
            seconds = interleaved(actions, rounds if rows > 1 else 5 * rounds)
            name = f"{str(dtype)[6:]} {rows}x64"
            found[f"{name} two forwards, s"] = seconds["two forwards"]
            found |= {
                f"{name} {m} / two forwards": seconds[m] / seconds["two forwards"]
                for m in ("sequential", "batched", "auto")
            }
    return found


def batched_queries(rounds: int, device: str) -> dict[str, float]:
    """Eight queries at 64 tokens: batched over sequential; bar: 0.74 in float32."""
    found = {}
    for name, size in (("BERT-base", {}), ("small encoder", SMALL)):
        for dtype in (torch.float32, torch.bfloat16):
            setup = Setup(dtype, 1, 64, device, **size)
            actions = {mode: setup.step(setup.optimizer(mode, 8)) for mode in ("sequential", "batched")}
            seconds = interleaved(actions, rounds)
            found[f"{name} {str(dtype)[6:]} batched / sequential"] = seconds["batched"] / seconds["sequential"]
    return found


def split_queries(rounds: int, device: str) -> dict[str, float]:
    """As many queries as examples, each on its own example, over one sequential query on the batch; bar: 1.15."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        setup = Setup(dtype, 16, 64, device)
        actions = {"one": setup.step(setup.optimizer("sequential")), "split": setup.step(setup.optimizer("split", 16))}
        seconds = interleaved(actions, rounds)
        found[f"BERT-base {str(dtype)[6:]} 16x64 split, 16 queries / one query"] = seconds["split"] / seconds["one"]
    return found


def memory(rounds: int, device: str) -> dict[str, float]:
    """Peak bytes of a step above the weights over a plain forward's; bars: 1.05, split 1.10."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rows, length in ((16, 64), (4, 256)):
            name = f"{str(dtype)[6:]} {rows}x{length}"
            setup = Setup(dtype, rows, length, device)
            forward = peak_bytes(setup.forward_plain, device)
            found[f"{name} forward, MiB"] = forward / 2**20
            for mode, queries in (("sequential", 1), ("sequential", 4), ("split", 16 if rows == 16 else 4)):
                step = setup.step(setup.optimizer(mode, queries))
                step()
                found[f"{name} {mode} {queries} / forward"] = peak_bytes(step, device) / forward
    return found


def grid(rounds: int, device: str) -> dict[str, Any]:
    """``auto`` over the better of sequential and batched at every size; bar: 1.03. Small encoder, float32."""
    found: dict[str, Any] = {}
    for rows in (1, 4, 16):
        for length in (64, 256):
            setup = Setup(torch.float32, rows, length, device, **SMALL)
            for queries in (1, 4, 16):
                actions = {m: setup.step(setup.optimizer(m, queries)) for m in ("sequential", "batched", "auto")}
                seconds = interleaved(actions, max(3, rounds if rows * length * queries < 8192 else rounds // 2))
                better = min(seconds["sequential"], seconds["batched"])
                found[f"{rows}x{length}, {queries} queries: batched / sequential"] = (
                    seconds["batched"] / seconds["sequential"]
                )
                found[f"{rows}x{length}, {queries} queries: auto / better"] = seconds["auto"] / better
    found["worst auto / better"] = max(v for k, v in found.items() if k.endswith("auto / better"))
    return found


if __name__ == "__main__":
    main()
