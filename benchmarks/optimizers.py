"""Every optimizer of the package on the small real model and task: learning rate chosen on training rows, then all evaluation rows.

    python benchmarks/optimizers.py run --train_file train.tsv --eval_file dev.tsv --out benchmarks/results/optimizers.jsonl
    python benchmarks/optimizers.py table benchmarks/results/optimizers.jsonl

SmolLM2-135M-Instruct, SST-2 under the weak template, AdaZeta's own random start: tensor-train adapters (rank 5, bottleneck 64) in the last
layers, all cores trained. Every run spends the same number of forward passes of 16 rows. The learning rate is the one with the
lowest loss on 256 rows cut from the training rows; one seed, so that this shows that a method trains, not which one is best.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import nested
from rich.console import Console

from zo_opt.errors import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.tasks.batches import BatchOrder
from zo_opt.tasks.evaluation import Evaluation, evaluate
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import Tools, build_tools, load_examples

GRADIENTS = (3e-4, 1e-3, 3e-3)  # lr times a gradient
LENGTHS = (3e-3, 1e-2, 3e-2)  # lr in parameter units a step
EIGHT: dict[str, Any] = {"query_schedule": "constant", "max_queries": 8}

ADAPTER: dict[str, Any] = {"layers": 2}
SMALL: dict[str, Any] = {
    "layers": 2,
    "target_modules": ["down_proj"],
    "rank": 2,
    "bottleneck": 8,
}  # about a thousand numbers

# Options of each method beside the common ones, its learning rates and where it is adapted.
METHODS: dict[str, tuple[dict[str, Any], Sequence[float], dict[str, Any]]] = {
    "mezo": ({}, GRADIENTS, ADAPTER),
    "mezo, 8 queries split": (EIGHT, GRADIENTS, ADAPTER),
    "adazeta (paper's SGD)": ({"update_rule": "sgd"}, GRADIENTS, ADAPTER),
    "adazeta (Adam)": ({}, LENGTHS, ADAPTER),
    "zo-sign": (EIGHT, LENGTHS, ADAPTER),
    "zo-momentum": (EIGHT, [lr / 10 for lr in GRADIENTS], ADAPTER),
    "zo-adam": (EIGHT, LENGTHS, ADAPTER),
    "zo-conservative": (EIGHT, GRADIENTS, ADAPTER),
    "sparse-mezo": (EIGHT, GRADIENTS, ADAPTER),
    "hizoo": (EIGHT, GRADIENTS, ADAPTER),
    "lozo": (EIGHT, GRADIENTS, ADAPTER),
    "subzero": (EIGHT, GRADIENTS, ADAPTER),
    "fzoo": ({}, LENGTHS, ADAPTER),
    "grzo": ({}, LENGTHS, ADAPTER),
    "mezo-svrg": (EIGHT, GRADIENTS, ADAPTER),
    "forward-gradient": ({}, GRADIENTS, ADAPTER),
    "zo-kalman (Adam)": (EIGHT | {"update_rule": "adam"}, LENGTHS, SMALL),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("results", nargs="?", type=Path, help="of table: the file to show")
    parser.add_argument("--train_file", type=Path)
    parser.add_argument("--eval_file", type=Path)
    parser.add_argument("--out", type=Path, help="one JSON line a method; methods already there are skipped")
    parser.add_argument("--forwards", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "table":
        table([json.loads(line) for line in arguments.results.read_text().splitlines()])
        return
    torch.set_num_threads(arguments.threads)
    known = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    done = {json.loads(line)["method"] for line in known}
    for adapter in (ADAPTER, SMALL):
        methods = {name: m for name, m in METHODS.items() if m[2] is adapter and name not in done}
        if methods:
            bench = Bench(arguments, adapter)
            for name, (options, lrs, _) in methods.items():
                bench.run(name, options, lrs)


class Bench:
    """One model with what is frozen of its forwards kept; every run starts from the same adapters."""

    def __init__(self, arguments: argparse.Namespace, adapter: dict[str, Any]) -> None:
        self.arguments = arguments
        files = {"train_file": arguments.train_file, "eval_file": arguments.eval_file}
        self.config = TrainConfig(**files, batch_order="balanced", **nested(adapter))
        reporter = Reporter(Console(quiet=True))
        examples = load_examples(self.config, reporter)
        self.tools = build_tools(self.config, examples, reporter)
        self.tools.record_prompts(self.config, Path(), reporter)
        order = torch.randperm(len(examples.train), generator=torch.Generator().manual_seed(0)).tolist()
        self.fit, self.select = order[256:], order[:256]
        self.start = {n: p.detach().clone() for n, p in self.tools.model.trainable_state().items()}
        self.before = evaluate(self.tools.model, self.tools.held_out, 32)

    def run(self, name: str, options: dict[str, Any], lrs: Sequence[float]) -> None:
        """Choose the learning rate, then evaluate; one line of results."""
        trials = []
        for lr in lrs:
            trial = self.train(name.split(",", maxsplit=1)[0].split(" ", maxsplit=1)[0], options, lr)
            trials.append(trial | {"lr": lr})
            print(f"{name}: {trials[-1]}", flush=True)
            if trial["selection loss"] == min(t["selection loss"] for t in trials):
                best = {n: p.detach().clone() for n, p in self.tools.model.trainable_state().items()}
        chosen = min(trials, key=lambda t: t["selection loss"])
        restore(self.tools, best)
        after = evaluate(self.tools.model, self.tools.held_out, 32)
        line = {
            "method": name, "trainable": sum(t.numel() for t in self.start.values()), **chosen,
            "before": self.before.to_dict(), "after": after.to_dict(), "trials": trials, "threads": self.arguments.threads,
        }  # fmt: skip
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with self.arguments.out.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{name}: lr {chosen['lr']:g}, dev loss {self.before.loss:.3f} -> {after.loss:.3f}", flush=True)

    def train(self, optimizer_name: str, options: dict[str, Any], lr: float) -> dict[str, Any]:
        """Spend the forwards; the loss on the selection rows."""
        restore(self.tools, self.start)
        config = replace(self.config, optimizer=optimizer_name, lr=lr, **nested(options))
        tools = replace(self.tools, recipe=replace(self.tools.recipe, lr=lr))
        order = BatchOrder([tools.train.labels[i] for i in self.fit], config.batch_size, 0, config.batch_order)
        optimizer = make_optimizer(
            config,
            tools.model,
            make_param_groups(config, tools.model, tools.recipe.lr),
            tools.recipe.lr,
            order.steps_per_epoch,
        )
        begun = time.perf_counter()
        steps = 0
        try:
            while optimizer.history.forwards < self.arguments.forwards:
                share = optimizer.history.forwards / self.arguments.forwards
                optimizer.param_groups[0]["lr"] = lr * (1 - share)  # linear to zero over the budget
                batch = tools.train.batch([self.fit[i] for i in order.indices(steps)])
                loss = optimizer.step(lambda b: tools.train.loss(tools.model, b), batch)
                steps += 1
                assert loss is not None
                if not math.isfinite(float(loss)) or float(loss) > 20:
                    break
            result = selection(tools, self.select)
        except ZOError as error:
            return {"selection loss": math.inf, "failed": str(error)}
        return {
            "selection loss": result.loss, "selection accuracy": result.accuracy, "steps": steps,
            "forwards": optimizer.history.forwards, "queries": optimizer.history.queries,
            "seconds": round(time.perf_counter() - begun, 1),
        }  # fmt: skip


def selection(tools: Tools, indices: Sequence[int]) -> Evaluation:
    """Loss and accuracy on some of the training rows."""
    return evaluate(tools.model, tools.train.subset(indices), 32)


@torch.no_grad()
def restore(tools: Tools, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in tools.model.trainable_state().items():
        parameter.copy_(tensors[name])


def table(lines: list[dict[str, Any]]) -> None:
    """A Markdown table, in the order of METHODS."""
    before = lines[0]["before"]
    print(f"Before: loss {before['loss']:.3f}, accuracy {100 * before['accuracy']:.1f} %.\n")
    print(
        "| method | trainables | lr | steps | queries | forwards | loss | accuracy |\n|---|---|---|---|---|---|---|---|"
    )
    for line in sorted(lines, key=lambda r: list(METHODS).index(r["method"])):
        after = line["after"]
        print(
            f"| {line['method']} | {line['trainable']:,} | {line['lr']:g} | {line['steps']} | {line['queries']:,} "
            f"| {line['forwards']:,} | {after['loss']:.3f} | {100 * after['accuracy']:.1f} |"
        )


if __name__ == "__main__":
    main()
