"""Forwards to a given training loss: each slice of the batch its own direction, or one direction for the whole batch.

    python benchmarks/split.py run --train_file train.tsv --eval_file dev.tsv --out benchmarks/results/split.jsonl
    python benchmarks/split.py show benchmarks/results/split.jsonl --target 0.65 --figure docs/split.png

SmolLM2-135M-Instruct, SST-2 under the weak template, AdaZeta's random start (rank 5, bottleneck 64) in the last layers, all cores trained.
Both sides take the same steps: Adam, the same learning rates falling linearly to zero, the same batches of 16, two
forwards a step, five seeds. The loss is that on 256 fixed training rows, every 10 forwards.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import nested
from optimizers import Bench, restore, selection

from zo_opt.tasks.batches import BatchOrder
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups

SIDES: dict[str, dict[str, Any]] = {
    "one shared direction": {"query_mode": "sequential", "query_schedule": "constant", "max_queries": 1},
    "split, 16 directions": {"query_mode": "split", "query_schedule": "constant", "max_queries": 16},
}
EVERY = 10  # forwards between two looks at the loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("results", nargs="?", type=Path, help="of show: the file to read")
    parser.add_argument("--train_file", type=Path)
    parser.add_argument("--eval_file", type=Path)
    parser.add_argument("--out", type=Path, help="one JSON line a run; runs already there are skipped")
    parser.add_argument("--forwards", type=int, default=200)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.003, 0.001, 0.01])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "show":
        show(
            [json.loads(line) for line in arguments.results.read_text().splitlines()],
            arguments.target,
            arguments.figure,
        )
        return
    torch.set_num_threads(arguments.threads)
    known = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    done = {(r["side"], r["lr"], r["seed"]) for r in map(json.loads, known)}
    bench = Bench(arguments, {"layers": arguments.layers})
    for lr in arguments.lrs:
        for seed in range(arguments.seeds):
            for side, options in SIDES.items():
                if (side, lr, seed) in done:
                    continue
                line = {
                    "side": side,
                    "lr": lr,
                    "seed": seed,
                    "layers": arguments.layers,
                    "losses": run(bench, options, lr, seed),
                }
                with arguments.out.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(
                    f"{side}, lr {lr:g}, seed {seed}: {line['losses'][0][1]:.3f} -> {line['losses'][-1][1]:.3f}",
                    flush=True,
                )


def run(bench: Bench, options: dict[str, Any], lr: float, seed: int) -> list[tuple[int, float]]:
    """(forwards, loss) along one run."""
    restore(bench.tools, bench.start)
    config = replace(bench.config, optimizer="adazeta", lr=lr, seed=seed, **nested(options))
    tools = replace(bench.tools, recipe=replace(bench.tools.recipe, lr=lr))
    order = BatchOrder([tools.train.labels[i] for i in bench.fit], config.batch_size, seed, config.batch_order)
    optimizer = make_optimizer(
        config,
        tools.model,
        make_param_groups(config, tools.model, tools.recipe.lr),
        tools.recipe.lr,
        order.steps_per_epoch,
    )
    budget = bench.arguments.forwards
    losses = [(0, selection(tools, bench.select).loss)]
    while optimizer.history.forwards < budget:
        optimizer.param_groups[0]["lr"] = lr * (1 - optimizer.history.forwards / budget)
        batch = tools.train.batch([bench.fit[i] for i in order.indices(optimizer.step_count)])
        optimizer.step(lambda b: tools.train.loss(tools.model, b), batch)
        if optimizer.history.forwards % EVERY == 0:
            losses.append((optimizer.history.forwards, selection(tools, bench.select).loss))
    return losses


def show(lines: list[dict[str, Any]], target: float, figure: Path | None) -> None:
    """Forwards to the target on each side, and the picture."""
    sides = {
        (line["lr"], line["side"]): [r for r in lines if (r["lr"], r["side"]) == (line["lr"], line["side"])]
        for line in lines
    }
    print(
        f"| lr | side | forwards to a loss of {target:g}, each seed | median | loss at the end, median |\n|---|---|---|---|---|"
    )
    for (lr, side), runs in sorted(sides.items()):
        reached = [next((f for f, loss in r["losses"] if loss <= target), math.inf) for r in runs]
        end = statistics.median(r["losses"][-1][1] for r in runs)
        shown = ", ".join("never" if math.isinf(f) else str(f) for f in reached)
        median = statistics.median(reached)
        print(f"| {lr:g} | {side} | {shown} | {'never' if math.isinf(median) else f'{median:g}'} | {end:.3f} |")
    if figure is not None:
        draw(sides, target, figure)


def draw(sides: dict[tuple[float, str], list[dict[str, Any]]], target: float, figure: Path) -> None:
    """Loss against forwards: a thin line a seed, a thick one for the median; one panel a learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lrs = sorted({lr for lr, _ in sides})
    canvas, axes = plt.subplots(
        1, len(lrs), figsize=(5.5 * len(lrs), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, lr in zip(axes[0], lrs, strict=True):
        for side, colour in zip(SIDES, ("#b5542b", "#1f6f8b"), strict=True):
            runs = [r["losses"] for r in sides.get((lr, side), [])]
            for losses in runs:
                axis.plot(*zip(*losses, strict=True), color=colour, alpha=0.25, linewidth=1)
            if runs:
                forwards = [f for f, _ in runs[0]]
                medians = [statistics.median(r[i][1] for r in runs) for i in range(len(forwards))]
                axis.plot(forwards, medians, color=colour, linewidth=2.2, label=side)
        axis.axhline(target, color="#888888", linewidth=0.8, linestyle=":")
        axis.set(xlabel="forward passes", title=f"Adam, lr {lr:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training loss (256 rows)")
    axes[0][0].legend(frameon=False)
    canvas.savefig(figure, dpi=130)


if __name__ == "__main__":
    main()
