"""Finds and confirms the default recipe: every row of docs/recipe.md's tables comes from here.

    python benchmarks/recipe.py select --train_file train.tsv --out benchmarks/results/recipe_selection.jsonl
    python benchmarks/recipe.py confirm --train_file train.tsv --eval_file dev.tsv --out benchmarks/results/recipe_dev.jsonl
    python benchmarks/recipe.py table benchmarks/results/recipe_selection.jsonl

``select`` never sees the evaluation file: it cuts 744 fitting and 256 selection rows from the training rows, a different
cut for each seed. ``confirm`` runs the defaults (and the ablations named there) on all evaluation rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import nested
from rich.console import Console

from zo_opt.record.progress import Reporter
from zo_opt.training import TrainConfig, train

RANDOM = {"layers": 8}
PLACED: dict[str, Any] = {}
COMPONENTS = {"adapter_init": "components", "layers": [26], "bottleneck": 16, "lr": 0.05, "steps": 400}

# Selection: one change at a time from the defaults, and the ladder of adapters from AdaZeta's own start to ours.
SELECT: list[dict[str, Any]] = [
    {"steps": 25},
    {"steps": 50},
    {"steps": 100},
    {"steps": 50, "lr": 0.05},
    {"steps": 50, "lr": 0.2},
    {"steps": 50, "layers": [14]},
    {"steps": 50, "layers": [26]},
    {"steps": 50, "zo_eps": 0.003},
    {"steps": 50, "zo_eps": 0.03},
    {"steps": 50, "bottleneck": 16},
    {"steps": 50, "rank": 5},
    {"steps": 50, "min_queries": 1},
    {"steps": 50, "batch_order": "shuffled"},
    {"steps": 50, "update_rule": "sgd", "lr": 0.02},
    RANDOM | {"steps": 50, "lr": 0.003},
    RANDOM | {"steps": 50, "lr": 0.01},
]

CONFIRM: list[dict[str, Any]] = [PLACED, COMPONENTS, RANDOM | {"steps": 400}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("select", "confirm", "table"))
    parser.add_argument("results", nargs="?", type=Path, help="of table: the file to show")
    parser.add_argument("--train_file", type=Path)
    parser.add_argument("--eval_file", type=Path)
    parser.add_argument("--out", type=Path, help="one JSON line a run; runs already there are skipped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model_name_or_path", default=TrainConfig.model_name_or_path)
    parser.add_argument("--first", type=int, default=0, help="of select: the first setting to run")
    arguments = parser.parse_args()
    if arguments.what == "table":
        table([json.loads(line) for line in arguments.results.read_text().splitlines()])
        return
    torch.set_num_threads(arguments.threads)
    settings = SELECT[arguments.first :] if arguments.what == "select" else CONFIRM
    done = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    known = {(json.dumps(r["setting"]), r["seed"]) for r in map(json.loads, done)}
    for setting in settings:
        for seed in arguments.seeds:
            if (json.dumps(setting), seed) not in known:
                run(arguments, setting, seed)


def run(arguments: argparse.Namespace, setting: dict[str, Any], seed: int) -> None:
    """One run in a temporary directory; its figures are appended to --out."""
    with tempfile.TemporaryDirectory() as directory:
        files = {"train_file": arguments.train_file, "eval_file": arguments.eval_file}
        if arguments.what == "select":
            files = cut(arguments.train_file, seed, Path(directory))
        config = TrainConfig(
            **files,
            **nested(setting),
            model_name_or_path=arguments.model_name_or_path,
            seed=seed,
            output_dir=Path(directory) / "out",
        )
        with (Path(directory) / "log").open("w") as log:
            summary, _ = train(config, Reporter(Console(file=log)), "benchmarks/recipe.py")
    line = {
        "setting": setting,
        "seed": seed,
        "before": summary.before.accuracy,
        "after": summary.after.accuracy,
        "loss": summary.after.loss,
        "rows": summary.after.rows,
        "trainable": summary.trainable,
        "forwards": summary.forwards,
        "train_seconds": round(summary.train_seconds, 1),
        "other_seconds": round(summary.other_seconds, 1),
        "threads": arguments.threads,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        out.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def cut(train_file: Path, seed: int, directory: Path) -> dict[str, Path]:
    """744 fitting and 256 selection rows, a permutation of its own for every seed."""
    with train_file.open(newline="") as file:
        header, *rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    random.Random(seed).shuffle(rows)
    files = {"train_file": directory / "fit.tsv", "eval_file": directory / "select.tsv"}
    for path, part in zip(files.values(), (rows[256:], rows[:256]), strict=True):
        path.write_text("\n".join("\t".join(row) for row in [header, *part]) + "\n")
    return files


def table(lines: list[dict[str, Any]]) -> None:
    """A Markdown table: a row a setting, its seeds beside each other."""
    settings = list(dict.fromkeys(json.dumps(line["setting"]) for line in lines))
    print("| setting | trainables | forwards | accuracy, each seed | mean | loss | s |\n|---|---|---|---|---|---|---|")
    for setting in settings:
        runs = [line for line in lines if json.dumps(line["setting"]) == setting]
        each = ", ".join(f"{100 * r['after']:.1f}" for r in runs)
        mean = {k: sum(r[k] for r in runs) / len(runs) for k in ("after", "loss", "train_seconds")}
        name = ", ".join(f"{k}={v}" for k, v in json.loads(setting).items()) or "defaults"
        print(
            f"| {name} | {runs[0]['trainable']:,} | {runs[0]['forwards']:,} | {each} | **{100 * mean['after']:.1f}** "
            f"| {mean['loss']:.3f} | {mean['train_seconds']:.0f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
