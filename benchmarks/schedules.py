"""Which query schedule reaches a loss first, at equal token evaluations: with queries on activations, and with queries on weights.

    python benchmarks/schedules.py run --data DIR --out benchmarks/results/schedules.jsonl
    python benchmarks/schedules.py table benchmarks/results/schedules.jsonl
    python benchmarks/schedules.py picture benchmarks/results/schedules.jsonl --to docs/schedules.png

DIR holds one folder a set, as in benchmarks/learning.py. All rows are training rows: 300 to learn from, 200 held out to measure on. Adapters act
on answers, so that a forward of a batch is one token a row, and equal forwards are equal token evaluations. Every run has the same budget of them
and the defaults of ``zo-opt train`` but for its schedule; the learning rate stays as it is to the end, so that a run's end says nothing. A run whose
loss leaves three times its start has diverged. lr 1 is the default (of weight queries: the pairing's own), 10 ten times that.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant, 1": {"name": "constant", "queries": 1},
    "constant, 8": {"name": "constant", "queries": 8},
    "AdaZeta's growth from 1": {"name": "adazeta", "min_queries": 1},
    "growing, 1 to 15": {"name": "linear", "start": 1, "end": 15},
    "shrinking, 15 to 1": {"name": "linear", "start": 15, "end": 1},
    "variance-adaptive": {"name": "variance", "min_queries": 1, "max_queries": 16},
    "even budget": {"name": "budget"},
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "activations": {"estimator": "learned-feedback"},
    "weights": {"estimator": "two-sided", "query_mode": "sequential"},
}
ADAPTER = {"name": "tt-lora", "positions": "answer", "trainable": "input"}
MEASURES = 12  # of the held-out loss, over a run
PROMPTS: dict[str, Any] = {}  # a set's prompts, done once for all its runs


def train(task: str, by: str, schedule: str, seed: int, times: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: the held-out loss against forwards spent."""
    from dataclasses import replace

    from learning import tools_of
    from rich.console import Console

    from zo_opt.record.progress import Reporter
    from zo_opt.tasks.evaluation import evaluate
    from zo_opt.training.stepper import Stepper
    from zo_opt.training.stop import StopSignals

    options = ESTIMATORS[by] | {
        "adapter": ADAPTER, "query_schedule": SCHEDULES[schedule], "budget_forwards": arguments.forwards, "validation": True,
        "held_out": 200, "max_train_rows": 300, "lr_schedule": "constant", "seed": seed,
    }  # fmt: skip
    if schedule == "even budget":  # as many steps as the constant 8 takes
        options["query_schedule"] = {"name": "budget", "forwards": arguments.forwards, "steps": arguments.forwards // 9}
    config, tools = tools_of(task, Path(arguments.data), options)
    assert tools.prompts is not None
    if task in PROMPTS:
        tools.prompts.recorder.store = PROMPTS[task]
    else:
        tools.record_prompts(config, Path(), Reporter(Console(quiet=True)))
        PROMPTS[task] = tools.prompts.recorder.store
    tools = replace(tools, recipe=replace(tools.recipe, lr=tools.recipe.lr * times))
    stepper, stop = Stepper(replace(config, steps=tools.steps), tools), StopSignals()
    history = stepper.optimizer.history
    curve, queries, started = [], [], time.monotonic()
    start = evaluate(tools.model, tools.held_out, 32)
    curve.append((0, start.loss, start.value))
    for _ in range(tools.steps):
        before = history.queries
        stepper.step(stop)
        queries.append(history.queries - before)
        if history.forwards >= len(curve) * arguments.forwards / MEASURES:
            now = evaluate(tools.model, tools.held_out, 32)
            curve.append((history.forwards, now.loss, now.value))
            if not math.isfinite(now.loss) or now.loss > 3 * max(start.loss, 1.0):
                break
    return {
        "task": task, "by": by, "schedule": schedule, "seed": seed, "lr": times, "steps": len(queries), "queries": queries,
        "curve": curve, "seconds": time.monotonic() - started,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run what is asked for and not yet in the file; a line a run."""
    out = Path(arguments.out)
    done = {key(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    for seed in map(int, arguments.seeds.split(",")):
        for task in arguments.tasks.split(","):
            for by in arguments.by.split(","):
                for times in map(float, arguments.lrs.split(",")):
                    for schedule in SCHEDULES:
                        if (task, by, schedule, seed, times) in done:
                            continue
                        found = train(task, by, schedule, seed, times, arguments)
                        with out.open("a") as file:
                            file.write(json.dumps(found) + "\n")
                        loss, accuracy = found["curve"][-1][1:]
                        print(
                            f"{task}, {by}, lr x {times:g}, seed {seed}, {schedule}: loss {loss:.3f}, {100 * accuracy:.1f} % "
                            f"after {found['steps']} steps in {found['seconds']:.0f} s",
                            flush=True,
                        )


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart."""
    return line["task"], line["by"], line["schedule"], line["seed"], line["lr"]


def grouped(path: str) -> dict[tuple[str, str, float], dict[str, list[dict[str, Any]]]]:
    """Runs by task, what is queried and lr, then by schedule."""
    found: dict[Any, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for text in Path(path).read_text().splitlines():
        line = json.loads(text)
        found[line["task"], line["by"], line["lr"]][line["schedule"]].append(line)
    return found


def reached(line: dict[str, Any], loss: float) -> float:
    """Forwards until the held-out loss is that low, between two measurements by a line; infinite if it never is."""
    for (f0, l0, _), (f1, l1, _) in zip(line["curve"], line["curve"][1:], strict=False):
        if l1 <= loss:
            return float(f0 + (f1 - f0) * (l0 - loss) / (l0 - l1)) if l0 > l1 else float(f1)
    return math.inf


def diverged(line: dict[str, Any]) -> bool:
    """Whether the run broke off."""
    start, end = line["curve"][0][1], line["curve"][-1][1]
    return not math.isfinite(end) or end > 3 * max(start, 1.0)


def table(arguments: argparse.Namespace) -> None:
    """Each schedule: steps, the loss at the end, when it reached the loss that half of all runs of its group reach, how many diverged."""
    print("| set, queries on, lr | schedule | steps | loss at the end, each seed | forwards to the goal | diverged |")
    print("|---|---|---|---|---|---|")
    for (task, by, times), schedules in grouped(arguments.file).items():
        goal = median(line["curve"][-1][1] for lines in schedules.values() for line in lines)
        for name, lines in schedules.items():
            ends = ", ".join(f"{line['curve'][-1][1]:.3f}" for line in lines)
            first = median(reached(line, goal) for line in lines)
            shown = "never" if math.isinf(first) else f"{first:.0f}"
            steps = median(line["steps"] for line in lines)
            print(
                f"| {task}, {by}, lr x {times:g}; goal {goal:.3f} | {name} | {steps:.0f} | {ends} | {shown} | {sum(map(diverged, lines))} |"
            )


def picture(arguments: argparse.Namespace) -> None:
    """The median held-out loss against forwards; a panel for each set and what is queried, at the default lr."""
    from matplotlib.figure import Figure

    from zo_opt.system.pictures import COLOURS

    groups = {name: group for name, group in grouped(arguments.file).items() if name[2] == 1}
    figure = Figure(figsize=(12, 8), layout="constrained", dpi=130)
    panels = figure.subplots(2, -(-len(groups) // 2), squeeze=False).flat
    for axes, ((task, by, _), schedules) in zip(panels, groups.items(), strict=False):
        for colour, (name, lines) in zip(COLOURS, schedules.items(), strict=False):
            at = [
                sum(line["curve"][i][0] for line in lines) / len(lines)
                for i in range(min(len(x["curve"]) for x in lines))
            ]
            middle = [median(line["curve"][i][1] for line in lines) for i in range(len(at))]
            axes.plot(at, middle, color=colour, linewidth=2, label=name)
        axes.set_title(f"{task.upper()}, queries on {by}", loc="left", fontsize=11)
        axes.set_xlabel("forward passes of a batch (one token a row each)")
        axes.set_ylabel("loss on held-out rows")
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(groups) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right upper")
    figure.suptitle("Query schedules at equal token evaluations: median of the seeds", fontsize=12)
    figure.savefig(arguments.to)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    runs = kinds.add_parser("run")
    runs.add_argument("--tasks", default="sst2,trec")
    runs.add_argument("--by", default="activations,weights")
    runs.add_argument("--seeds", default="0,1,2")
    runs.add_argument("--lrs", default="1")
    runs.add_argument("--forwards", type=int, default=900)
    runs.add_argument("--data", default="data")
    runs.add_argument("--out", default="schedules.jsonl")
    runs.set_defaults(run=run)
    shown = kinds.add_parser("table")
    shown.add_argument("file")
    shown.set_defaults(run=table)
    drawn = kinds.add_parser("picture")
    drawn.add_argument("file")
    drawn.add_argument("--to", default="schedules.png")
    drawn.set_defaults(run=picture)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
