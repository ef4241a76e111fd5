"""What ranks cost and give: steps on 1, 2 and 4 processes of one thread, against the cost model of docs/how-to/processes.md.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --rounds 5

An encoder of 4 layers of 128 (biases and norms tuned), 16 rows of 32 tokens, AdaZeta, sequential within a rank, gloo on one machine. Of each
case the median over all rounds' steps, rounds interleaved over the numbers of ranks: wall-clock seconds of rank 0, and the processor seconds of
the slowest rank, which other programs on the machine disturb less and which do not see that ranks share cores. Weak scaling: the work of
a rank stays, queries (or rows) grow with the ranks; its efficiency is the time on one rank over the time on N. Prints tables, writes
benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from measure import machine
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from zo_opt import AdaZeta
from zo_opt.distributed import Distributed
from zo_opt.schedules import constant_queries

RESULTS = Path(__file__).parent / "results" / "scaling.json"
RANKS, ROWS, TOKENS, WIDTH, LAYERS = (1, 2, 4), 16, 32, 128, 4
STEPS, EXCHANGES = 4, 100
# case -> what is shared; queries and rows on so many ranks
CASES: dict[str, tuple[str, Any, Any]] = {
    "strong, queries": ("queries", lambda n: 8, lambda n: ROWS),
    "strong, data": ("data", lambda n: 4, lambda n: ROWS),
    "weak, queries": ("queries", lambda n: 4 * n, lambda n: ROWS),
    "weak, data": ("data", lambda n: 4, lambda n: ROWS * n),
}
PAPER = (1, 2, 4, 8, 16, 32, 64, 256, 1000)
# An example for the paper part: a step of 16 queries on 64 rows, a forward of one row and what a forward takes at least, in seconds.
EXAMPLE = {"queries": 16, "rows": 64, "row_seconds": 0.01, "least_seconds": 0.02, "update_seconds": 0.01}


class Encoder(nn.Module):
    """Token ids -> a loss."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.embedding, self.head = nn.Embedding(1000, WIDTH), nn.Linear(WIDTH, 2)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.ndim == 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pooled = self.encoder(self.embedding(batch["ids"])).mean(dim=1)
        return nn.functional.cross_entropy(self.head(pooled), batch["labels"])


def make_batch(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (rows, TOKENS), generator=generator)
    return {"ids": ids, "labels": torch.randint(2, (rows,), generator=generator)}


def steps(model: Encoder, share: str, queries: int, batch: dict[str, Tensor], count: int) -> dict[str, list[float]]:
    """Seconds of each step on this rank, by the wall clock and of its processor; the first step is not counted."""
    torch.manual_seed(0)
    optimizer = AdaZeta(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, module=model, query_schedule=constant_queries(queries),
        query_mode="distributed", distributed=Distributed(share=share),
    )  # fmt: skip
    assert optimizer.ranks is not None
    mine = optimizer.ranks.rows(range(len(batch["labels"])))
    batch = {name: tensor[list(mine)] for name, tensor in batch.items()}
    wall, processor = [], []
    for step in range(count + 1):
        start, busy = time.perf_counter(), time.process_time()
        optimizer.step(model, batch)
        if step:
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - busy)
    return {"wall": wall, "processor": processor}


def parts(model: Encoder) -> dict[str, float]:
    """Processor seconds of the model's terms, in one process: a forward of 16, 8 and 4 rows at a point, and a step's update."""
    found = {}
    for rows in sorted({ROWS // n for n in RANKS} | {ROWS}):
        batch, spent = make_batch(rows), []
        for _ in range(STEPS):
            for queries in (8, 2):  # their difference leaves out what a step costs but for its queries
                spent.append((queries, median(steps(model, "queries", queries, batch, 2)["processor"])))
        many, few = (median(s for q, s in spent if q == queries) for queries in (8, 2))
        found[f"forward of {rows} rows"] = (many - few) / 12
        found[f"update, {rows} rows"] = max(0.0, few - 4 * (many - few) / 12)
    return found


def exchanges() -> list[float]:
    """Wall-clock seconds of exchanges with nothing to evaluate."""
    theta = nn.Parameter(torch.zeros(1))
    optimizer = AdaZeta([theta], query_mode="distributed", query_schedule=constant_queries(8))
    optimizer.step(lambda: 0.0)
    ranks, seconds = optimizer.ranks, []
    assert ranks is not None
    for _ in range(EXCHANGES):
        start, busy = time.perf_counter(), time.process_time()
        ranks.losses(16, None, lambda first, last: torch.zeros(last - first, dtype=torch.float64))
        seconds.append((time.perf_counter() - start, time.process_time() - busy))
    return [median(s for s, _ in seconds), median(s for _, s in seconds)]


def work(rank: int, count: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/join", rank=rank, world_size=count)
    torch.manual_seed(0)
    model = Encoder()
    found: dict[str, Any] = {
        case: steps(model, share, queries(count), make_batch(rows(count)), STEPS)
        for case, (share, queries, rows) in CASES.items()
    }
    found["exchange"] = exchanges()
    if count == 1:
        found["parts"] = parts(model)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found))


def measured(rounds: int) -> dict[str, Any]:
    """Case -> ranks -> seconds a step; the seconds of an exchange; the model's terms."""
    runs: dict[int, list[list[dict[str, Any]]]] = {n: [] for n in RANKS}
    for round_ in range(rounds):
        for count in RANKS:
            with tempfile.TemporaryDirectory() as directory:
                start_processes(work, (count, directory), nprocs=count, start_method="fork")
                runs[count].append([json.loads((Path(directory) / f"{r}.json").read_text()) for r in range(count)])
        print(f"round {round_ + 1} of {rounds} done, load {os.getloadavg()[0]:.1f}", flush=True)
    result: dict[str, Any] = {case: {} for case in CASES}
    for case in CASES:
        for count in RANKS:
            wall = [s for ranks in runs[count] for s in ranks[0][case]["wall"]]
            slowest = [
                max(s) for ranks in runs[count] for s in zip(*(r[case]["processor"] for r in ranks), strict=True)
            ]
            result[case][count] = {"wall": median(wall), "processor": median(slowest)}
    result["exchange"] = {
        count: {
            "wall": min(ranks[0]["exchange"][0] for ranks in runs[count]),
            "processor of rank 0": median(ranks[0]["exchange"][1] for ranks in runs[count]),
        }
        for count in RANKS
    }
    terms = [ranks[0]["parts"] for ranks in runs[1]]
    result["terms"] = {name: median(t[name] for t in terms) for name in terms[0]}
    return result


def predicted(found: dict[str, Any], case: str, count: int) -> float:
    """ceil(points / groups) forwards of rows / members, an update, an exchange: processor seconds of the slowest rank."""
    share, queries, rows = CASES[case]
    points, mine = 2 * queries(count), rows(count)
    if share == "queries":
        points = math.ceil(points / count)
    else:
        mine //= count
    terms = found["terms"]
    exchange = found["exchange"][count]["processor of rank 0"] if count > 1 else 0.0
    return float(points * terms[f"forward of {mine} rows"] + terms[f"update, {mine} rows"] + exchange)


def on_paper(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The example's step on 1 to 1000 ranks, each number in the grid that computes fastest."""
    first, last = RANKS[1], RANKS[-1]
    hub = {n: found["exchange"][n]["processor of rank 0"] for n in RANKS}
    a_rank = max(1e-6, (hub[last] - hub[first]) / (last - first))
    points, lines = 2 * EXAMPLE["queries"], []

    def compute_of(groups: int, members: int) -> float:
        mine = math.ceil(EXAMPLE["rows"] / members)
        return math.ceil(points / groups) * max(EXAMPLE["least_seconds"], mine * EXAMPLE["row_seconds"])

    for ranks in PAPER:
        grids = [(g, ranks // g) for g in range(ranks, 0, -1) if ranks % g == 0]
        groups, members = min(grids, key=lambda grid: compute_of(*grid))
        compute = compute_of(groups, members)
        exchange = 0.0 if ranks == 1 else hub[first] + (ranks - first) * a_rank
        total = compute + EXAMPLE["update_seconds"] + exchange
        message = 304 + 8 * max(0, math.ceil(points / groups) - 32)
        lines.append({
            "ranks": ranks, "grid": f"{groups}x{members}", "compute": compute, "exchange": exchange, "step": total,
            "bytes passed on by a rank": (ranks - 1) * message,
        })  # fmt: skip
    for line in lines:
        line["speed"] = lines[0]["step"] / line["step"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    load = os.getloadavg()
    found = measured(rounds)
    print(
        f"\n{'case':<18}{'ranks':>6}{'wall ms':>10}{'cpu ms':>10}{'model ms':>10}{'cpu/model':>11}{'speed-up or efficiency':>26}"
    )
    for case in CASES:
        for count in RANKS:
            line = found[case][count]
            line["predicted"] = predicted(found, case, count)
            ratios = [found[case][1][kind] / line[kind] for kind in ("wall", "processor")]
            line["wall against one rank"], line["processor against one rank"] = ratios
            print(
                f"{case:<18}{count:>6}{1e3 * line['wall']:>10.1f}{1e3 * line['processor']:>10.1f}{1e3 * line['predicted']:>10.1f}"
                f"{line['processor'] / line['predicted']:>11.2f}{ratios[0]:>14.2f} wall {ratios[1]:.2f} cpu"
            )
    for count, seconds in found["exchange"].items():
        print(f"exchange, {count} ranks: " + ", ".join(f"{kind} {1e6 * s:.0f} us" for kind, s in seconds.items()))
    paper = on_paper(found)
    print(f"\non paper: {EXAMPLE}")
    for line in paper:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    about = {"cores": os.cpu_count(), "load before and after": [load[0], os.getloadavg()[0]], "rounds": rounds}
    RESULTS.write_text(
        json.dumps(
            {"machine": machine("cpu") | about, "measured": found, "example": EXAMPLE, "on paper": paper}, indent=2
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
