"""Objectives without a gradient on the real small model; results/objectives.json.

    python benchmarks/objectives.py eps           # how many answers turn at what zo_eps, and what a run then reaches
    python benchmarks/objectives.py choose        # lr and zo_eps for the next, on rows held out of the training rows
    python benchmarks/objectives.py exact_match   # SST-2 answered by writing: exact match before and after, three seeds
    python benchmarks/objectives.py activations   # the same with queries on activations, 99 evaluations instead of 200
    python benchmarks/objectives.py answer_loss   # the same rows and prompt, learned from the answer's loss with as many and half the evaluations

``exact_match`` is of ``zo-opt train --objective exact_match`` on a task of labels, whose report shows accuracy among the labels; the exact match
of what the model writes is measured here, on the held-out rows, from the adapter that was saved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import nested

from zo_opt.adapters import load_adapter_model, trainable_parameters
from zo_opt.optim import MeZO
from zo_opt.record.progress import Reporter
from zo_opt.schedules import constant_queries
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.objectives import ExactMatch
from zo_opt.training.config import TrainConfig
from zo_opt.training.loop import train
from zo_opt.training.setup import build_tools, load_base, load_examples

RESULTS = Path(__file__).parent / "results" / "objectives.json"
TEMPLATE = "Review: {sentence}\nSentiment (positive or negative):"
WORDS = "0=negative,1=positive"
ROWS: dict[str, Any] = {"adapter": "tt", "max_train_rows": 256, "held_out": 128}
# The biases of the last layers: what is written instead of a line break is a matter of a shift.
WRITING: dict[str, Any] = {
    "objective": "exact_match", "template": TEMPLATE, "verbalizers": WORDS, "adapter": "bitfit", "layers": 4,
    "target_modules": ["down_proj"], "query_schedule": "constant", "max_queries": 1, "max_train_rows": 256,
}  # fmt: skip
# The same by queries on activations, a direction a row: half the evaluations.
ROWS_OWN: dict[str, Any] = {k: WRITING[k] for k in ("objective", "template", "verbalizers", "max_train_rows")} | {
    "adapter": {"name": "tt-lora", "layers": 4, "target_modules": ["down_proj"]}, "schedule": {"name": "constant", "queries": 1},
    "lr": 3e-3,
}  # fmt: skip
CHOICES = ((0.3, 0.3), (0.3, 1.0), (0.5, 1.0))  # lr, zo_eps
EPS = (0.01, 0.03, 0.1, 0.3, 1.0)


def save(name: str, found: Any) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(results | {name: found}, indent=1) + "\n")
    print(name, json.dumps(found), flush=True)


def eps() -> None:
    """Accuracy of the default task, at the adapter's start: the share of directions along which any answer of 16 rows turns."""
    config = TrainConfig(objective="accuracy", **ROWS)
    reporter = Reporter()
    tools = build_tools(config, load_examples(config, reporter), reporter)
    tools.record_prompts(config, Path(), reporter)
    batches = [tools.train.batch(range(first, first + 16)) for first in range(0, 128, 16)]
    turned = {}
    for value in EPS:
        optimizer = MeZO(
            trainable_parameters(tools.model), lr=0.0, zo_eps=value, directions="rademacher", module=tools.model,
            query_schedule=constant_queries(1), query_mode="sequential",
        )  # fmt: skip
        grads = []
        for batch in batches:
            optimizer.step(lambda b: tools.train.loss(tools.model, b), batch)
            assert optimizer.last_record is not None
            grads += optimizer.last_record.projected_grads
        turned[str(value)] = sum(g != 0 for g in grads) / len(grads)
    save("share of directions with a difference", turned)
    for objective, scale in (("accuracy", 0.01), ("accuracy", 0.1), ("accuracy", 0.3), ("loss", 0.01)):
        save(f"{objective}, zo_eps {scale:g}", run(TrainConfig(objective=objective, zo_eps=scale, steps=50, **ROWS)))


def run(config: TrainConfig) -> dict[str, Any]:
    """One run of the loop: accuracy before and after."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        config = replace(config, output_dir=Path(directory) / "out")
        summary, _ = train(config, Reporter(), "")
        found: dict[str, Any] = {
            "before": summary.before.value,
            "after": summary.after.value,
            "forwards": summary.forwards,
            "seconds": time.monotonic() - start,
        }
        if config.objective == "exact_match":
            found |= {f"exact_match_{when}": value for when, value in written(config).items()}
    return found


@torch.no_grad()
def written(config: TrainConfig) -> dict[str, float]:
    """Exact match of what the model writes for the held-out rows, without and with the adapter."""
    reporter = Reporter()
    examples = load_examples(config, reporter)
    base = load_base(config, examples.task, reporter)
    held_out = Prepared(examples.held_out, base.scorer, base.device, None, ExactMatch())
    parts = [list(range(first, min(first + 32, len(held_out)))) for first in range(0, len(held_out), 32)]

    def match(model: Any) -> float:
        wrong = sum(float(held_out.loss(model, held_out.batch(part))) * len(part) for part in parts)
        return 1 - wrong / len(held_out)

    before = match(base.model)
    assert config.output_dir is not None
    return {"before": before, "after": match(load_adapter_model(base.model, config.output_dir).eval())}


def answer_loss(seed: int, evaluations: int, queries: int) -> dict[str, Any]:
    """The default of ``zo-opt train`` on the texts of the labels: exact match of what is written."""
    reporter = Reporter()
    rows = TrainConfig(
        **nested({k: WRITING[k] for k in ("template", "verbalizers", "max_train_rows")}), seed=seed, held_out=256
    )
    examples, start = load_examples(rows, reporter), time.monotonic()
    words = list(examples.task.verbalizers.values())
    with tempfile.TemporaryDirectory() as directory:
        for name, part in (("train", examples.train), ("held_out", examples.held_out)):
            lines = [json.dumps({"sentence": e.fields["sentence"], "answer": words[e.label]}) for e in part]
            (Path(directory) / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        config = TrainConfig(
            train_file=Path(directory) / "train.jsonl", eval_file=Path(directory) / "held_out.jsonl", target_column="answer",
            text_column="sentence", template=TEMPLATE.replace("{sentence}", "{text}"), max_new_tokens=4, seed=seed,
            schedule={"name": "constant", "queries": queries}, steps=evaluations // (queries + 1), output_dir=Path(directory) / "out",
        )  # fmt: skip
        summary, _ = train(config, reporter, "")
    name = "exact_match"
    return {
        "before": summary.before.metrics[name], "after": summary.after.metrics[name], "forwards": summary.forwards,
        "tokens": summary.tokens, "seconds": time.monotonic() - start,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["eps", "choose", "exact_match", "activations", "answer_loss"])
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    if arguments.what == "eps":
        eps()
    elif arguments.what == "answer_loss":
        for seed in arguments.seeds.split(","):
            for evaluations, queries in ((100, 1), (200, 1), (900, 8)):
                found = answer_loss(int(seed), evaluations, queries)
                save(f"answer loss, seed {seed}, {evaluations} evaluations, {queries} a step besides the first", found)
    elif arguments.what == "choose":
        for lr, scale in CHOICES:
            config = TrainConfig(
                **nested(WRITING), lr=lr, zo_eps=scale, steps=60, seed=10, validation=True, held_out=128
            )
            save(f"exact match, validation rows, lr {lr:g}, zo_eps {scale:g}", run(config))
    elif arguments.what == "activations":
        for seed in arguments.seeds.split(","):  # two evaluations a step, and three before the first
            config = TrainConfig.from_dict(ROWS_OWN | {"steps": 48, "seed": int(seed), "held_out": 256})
            save(f"exact match by activations, seed {seed}", run(config))
    else:
        for seed in arguments.seeds.split(","):
            config = TrainConfig(**nested(WRITING), lr=0.5, zo_eps=1.0, steps=100, seed=int(seed), held_out=256)
            save(f"exact match, seed {seed}", run(config))


if __name__ == "__main__":
    main()
