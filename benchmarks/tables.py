"""Stored results as the tables and sentences that documents show.

python benchmarks/tables.py NAME    # NAME: one of the functions below; reads benchmarks/results/, measures nothing
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"


def stored(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / name).read_text())


def lines(name: str) -> list[dict[str, Any]]:
    """A file of results, one a line."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(header: str, *rows: str) -> None:
    """A Markdown table; cells are parted by bars."""
    print(f"| {header} |")
    print("|" + "---|" * (header.count("|") + 1))
    for row in rows:
        print(f"| {row} |")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


# --- what methods reach ---

NAMES = {"sst2": "SST-2", "trec": "TREC", "cb": "CB", "rte": "RTE", "mrpc": "MRPC"}
NAMES |= {f"{task}-encoder": f"{NAMES[task]}, an encoder with a new head" for task in ("trec", "sst2", "mrpc")}
BY = {
    "feedback": "forward passes (the default)",
    "backpropagation": "backpropagation, same adapters",
    "activations": "forward passes, no feedback",
    "weights": "forward passes, queries on weights",
    "lora": "backpropagation, LoRA",
}


def learning() -> None:
    """Accuracy of the defaults on every set, each seed."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in lines("learning.jsonl"):
        groups.setdefault((run["task"], run["method"], run["results"]["steps"]), []).append(run)
    rows = []
    for (task, method, steps), runs in groups.items():
        after = [run["results"]["after"]["accuracy"] for run in runs]
        before, regression = runs[0]["results"]["before"]["accuracy"], runs[0]["results"].get("regression")
        shown = ", ".join(f"{100 * a:.1f}" for a in after)
        minutes = sorted({f"{run['seconds'] / 60:.0f}" for run in runs}, key=int)
        rows.append(
            f"{NAMES.get(task, task)} | {BY[method]}, {steps} steps | **{100 * mean(after):.1f}** ({shown}) | "
            f"{100 * before:.1f} | {'' if regression is None else f'{100 * regression:.1f}'} | {' to '.join({minutes[0]: 0, minutes[-1]: 0})}"
        )
    table("set | by | accuracy, mean (each seed) | zero-shot | logistic regression | minutes", *rows)


def learning_short() -> None:
    """The same of the defaults alone, for those who read one table."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in lines("learning.jsonl"):
        if run["results"]["steps"] in (100, 313):  # five epochs
            found[run["task"]][run["method"]].append(run["results"])

    def shown(runs: list[dict[str, Any]]) -> str:
        return f"{100 * mean(r['after']['accuracy'] for r in runs):.1f}" if len(runs) >= 3 else ""

    table(
        "set, mean of three seeds | forward passes | backpropagation, same adapters | zero-shot | logistic regression",
        *(
            f"{NAMES[task]} | **{shown(ours)}** | {shown(by_method['backpropagation'])} | {100 * ours[0]['before']['accuracy']:.1f} | "
            f"{100 * ours[0]['regression']:.1f}"
            for task, by_method in found.items()
            if len(ours := by_method["feedback"]) >= 3
        ),
    )


def compare() -> None:
    """Accuracy and memory of the methods beside each other, on SST-2."""
    found = stored("compare-sst2/rows.json")
    gone = ("adazeta-placed",)  # a method of an earlier version
    table(
        "method | by | trained numbers | accuracy, 95 % interval | peak memory of the process",
        f"zero-shot | | 0 | {percent(found[0]['before'])} | ",
        *(
            f"`{r['method']}` | {'forward passes' if r['method'] in ('adazeta', 'mezo', 'mezo-lora', 'sparse-mezo') else 'backpropagation'} | "
            f"{r['trainable']:,} | {percent(r['score'])} ({100 * r['low']:.1f} to {100 * r['high']:.1f}) | {r['peak_memory'] / 2**30:.1f} GiB"
            for r in sorted(found, key=lambda r: -r["score"])
            if r["method"] not in gone
        ),
    )


def compare_short() -> None:
    """Four methods of the comparison, for those who read one table."""
    found = {r["method"]: r for r in stored("compare-sst2/rows.json")}
    shown = {"lora": "LoRA, backpropagation", "loretta": "tensor trains, backpropagation", "adazeta": "tensor trains, forward passes (AdaZeta)",
             "mezo-lora": "LoRA, forward passes (MeZO)"}  # fmt: skip
    table(
        "SST-2, 150 forward passes | accuracy, 95 % interval | peak memory of the process",
        *(
            f"{title} | {percent(r['score'])} ({100 * r['low']:.1f} to {100 * r['high']:.1f}) | {r['peak_memory'] / 2**30:.1f} GiB"
            for title, r in ((title, found[name]) for name, title in shown.items())
        ),
    )


def claims() -> None:
    """What papers claim, and what the comparisons measured."""
    print((RESULTS / "claims.md").read_text())


def rte() -> None:
    """The same comparison on a task that this model cannot do."""
    found = stored("compare-rte/rows.json")
    scores = [r["score"] for r in found]
    print(
        f"On RTE nothing was learned: {len(found)} methods end between {percent(min(scores))} and {percent(max(scores))}. "
        f"Before, it was {percent(found[0]['before'])}."
    )


# --- what things cost ---


def whole_model() -> None:
    """Whole-model steps beside the loop of the released MeZO code."""
    busy, quiet = stored("whole_model.json"), stored("whole_model_quiet.json")

    def row(title: str, cell: dict[str, float]) -> str:
        def pair(key: str) -> str:
            return " / ".join(f"{cell[key.format(kind)]:.2f}" for kind in ("rademacher", "gaussian"))

        memory, forward = cell["rademacher step's memory / a forward's"], cell["a forward's memory, MiB"]
        return (
            f"{title} | {pair('{} sweeps / MeZO loop')} | {pair('{} overhead / MeZO loop')} | {pair('MeZO step / {} step')} | "
            f"{memory:.2f} of {forward:.0f} MiB"
        )

    table(
        "tokens | noise, of the loop's | step less two forwards, of the loop's | times faster | memory beyond weights, of a forward's",
        *(row(name, cell) for name, cell in busy.items() if isinstance(cell, dict) and "64" in name),
        row("float32 1x64, quiet machine", quiet["float32 1x64"]),
    )


def query_modes() -> None:
    """Ratios of one mode to another."""
    found = stored("query_modes.json")
    one, batched, split, memory = found["one"], found["batched"], found["split"], found["memory"]
    kinds = ("float32", "bfloat16")

    def row(title: str, values: list[float]) -> str:
        return f"{title} | " + " | ".join(f"{v:.2f}" for v in values)

    table(
        "| float32 | bfloat16",
        row("8 queries of 64 tokens: batched / sequential, BERT-base", [batched[f"BERT-base {k} batched / sequential"] for k in kinds]),
        row("the same, an encoder of 4 layers of 256", [batched[f"small encoder {k} batched / sequential"] for k in kinds]),
        row("one query of 1x64 tokens, batched / two plain forwards", [one[f"{k} 1x64 batched / two forwards"] for k in kinds]),
        row("the same, sequential", [one[f"{k} 1x64 sequential / two forwards"] for k in kinds]),
        row("one query of 16x64 tokens, sequential / two plain forwards", [one[f"{k} 16x64 sequential / two forwards"] for k in kinds]),
        row("16 queries split over 16 rows / one sequential query", [split[f"BERT-base {k} 16x64 split, 16 queries / one query"] for k in kinds]),
        row("memory of a sequential step / of a forward", [memory[f"{k} 16x64 sequential 1 / forward"] for k in kinds]),
        row("memory of a split step, 16 queries / of a forward", [memory[f"{k} 16x64 split 16 / forward"] for k in kinds]),
    )  # fmt: skip


def compiled() -> None:
    """Whether compiled layers pay."""
    found = stored("compiled.json")
    table(
        "precision | compiled step / plain step | seconds to compile | steps until it pays",
        *(
            f"{name} | {found[name]['steps']['longest']['ratio']:.2f} | {found[name]['seconds_to_compile']['compiled']:.0f} | "
            f"{found[name]['steps_that_pay_it_back']}"
            for name in ("mixed", "fp32")
        ),
    )


def prompt_cache() -> None:
    """Steps with kept hidden states."""
    found = stored("prompt_cache.json")
    table(
        "hidden states are kept | seconds a step | of a step without",
        f"nowhere | {found['step_seconds']['uncached']:.2f} | 1",
        *(f"{place} | {found['step_seconds'][place]:.2f} | {ratio:.2f}" for place, ratio in found["ratios"].items()),
    )


def plan() -> None:
    """Memory as foretold and as measured."""
    table(
        "method | foretold | measured | foretold / measured",
        *(
            f"`{c['method']}` | {mebibytes(c['process'])} | {mebibytes(c['peak_memory'])} | {c['ratio']:.2f}"
            for c in stored("plan.json")["cells"]
        ),
    )


def lamda_memory() -> None:
    """Memory of LoRA over LaMDA's."""
    found = stored("lamda_memory.json")["bytes"]
    rows = []
    for name in (
        f"{n}, {kind}" for kind in ("float32", "bfloat16") for n in ("2 BART-large layers", "1 Llama-7B layer")
    ):
        lora, moving, core = (found[name][k] for k in ("lora r16", "lamda r32, B moving", "lamda r32, core only"))
        ratios = [f"{lora[what] / moving[what]:.2f}" for what in ("kept for the backward", "forward and backward")]
        everything = ", ".join(f"{lora['all of training'] / other['all of training']:.2f}" for other in (moving, core))
        rows.append(f"{name} | {' | '.join(ratios)} | {everything}")
    table("layers | kept for the backward pass | peak of a step | all of training: B moving, core only", *rows)


def low_precision() -> None:
    """Loss after whole-model steps, by precision."""
    found = stored("low_precision.json")
    kinds = ("float32", "bfloat16, stochastic", "bfloat16, nearest")
    table(
        f"weights | loss before | after {found['steps']} steps",
        *(f"{kind} | {found[kind]['0']:.2f} | {found[kind][str(found['steps'])]:.2f}" for kind in kinds),
    )


def precision() -> None:
    """Correlation of projected gradients with float32's."""
    found = stored("precision.json")
    table(
        "base | " + " | ".join(f"zo_eps {eps}" for eps in found["mixed"]),
        *(f"{form} | " + " | ".join(f"{value:.3f}" for value in row.values()) for form, row in found.items()),
    )


def quantised() -> None:
    """Bases in few bits: memory, speed, accuracy."""
    found = stored("quantised.json")
    bases = (
        "fp32",
        "mixed",
        "torchao int8",
        "torchao int4",
        "bitsandbytes int8",
        "bitsandbytes nf4",
        "GGUF",
        "compiled",
    )
    table(
        "base | weights, MB | own memory, MB | seconds a step | zero-shot | tuned",
        *(
            f"{name} | {r['weights'] / 1e6:.0f} | {r['training'] / 1e6:.0f} | {r['step_seconds']:.2f} | "
            f"{percent(r['before'])} | {percent(r['after'])}"
            for name, r in ((name, found[name]) for name in bases)
        ),
    )  # fmt: skip


def quantised_default() -> None:
    """The default run on an int4 base."""
    runs = [r for name, r in stored("quantised.json").items() if name.startswith("default run")]
    shown = ", ".join(percent(r["after"]) for r in runs)
    most = max(r["peak_memory"] for r in runs) / 2**30
    print(
        f"The default run on an int4 base goes from {percent(runs[0]['before'])} to {shown} ({len(runs)} seeds). "
        f"Its process takes {most:.1f} GiB at most."
    )


def objectives() -> None:
    """Accuracy as the objective, by zo_eps."""
    found = stored("objectives.json")
    turned = found["share of directions with a difference"]
    table(
        "zo_eps | directions along which the accuracy changes | accuracy before | after 50 steps",
        *(
            f"{eps} | {100 * turned[eps]:.0f} % | {percent(r['before'])} | {percent(r['after'])}"
            for eps, r in ((eps, found[f"accuracy, zo_eps {eps}"]) for eps in ("0.01", "0.1", "0.3"))
        ),
        f"0.01, the loss as objective | | {percent(found['loss, zo_eps 0.01']['before'])} | {percent(found['loss, zo_eps 0.01']['after'])}",
    )


def exact_match() -> None:
    """Exact match as the objective."""
    found = stored("objectives.json")
    ways = (
        ("weights, biases of the last four layers", ""),
        ("activations, lr 3e-3, zo_eps 0.3", " by activations"),
        ("activations, lr 5e-3, zo_eps 0.6", " by activations"),
    )
    rows = []
    for number, (name, kind) in enumerate(ways):
        runs = [
            found[f"exact match{kind}, seed {seed}" + (", lr 0.005, zo_eps 0.6" if number == 2 else "")]
            for seed in range(3)
        ]
        after = [run["exact_match_after"] for run in runs]
        shown = ", ".join(f"{100 * a:.1f}" for a in after)
        rows.append(
            f"{name} | {runs[0]['forwards']} | {percent(runs[0]['exact_match_before'])} | **{100 * mean(after):.1f}** ({shown})"
        )
    table("queries on | evaluations | exact match before | after, mean (each seed)", *rows)


def federated() -> None:
    """Federated tuning beside the same adapters in one place."""
    names = {"federated": "federated", "central": "in one place, the same rounds"}
    rows = []
    for run in lines("federated.jsonl"):
        curve, last = run["curve"], run["curve"][-1]
        accuracies = ", ".join(f"{point['accuracy']:.1f}" for point in curve)
        rows.append(
            f"{NAMES[run['options']['task']]} | {names[run['method']]} | {last['tokens']:,} | {last['bytes']:,} | {accuracies} % | {last['loss']:.3f}"
        )
    table("set | by | token evaluations | bytes of a client, to and fro | accuracy on the way | loss at the end", *rows)


def scaling() -> None:
    """Speed of several processes."""
    found = stored("scaling.json")["measured"]
    titles = {
        "strong, queries": "8 queries, 16 rows; queries shared", "strong, data": "4 queries, 16 rows; rows shared",
        "weak, queries": "4 queries a rank; queries shared", "weak, data": "16 rows a rank; rows shared",
    }  # fmt: skip
    table(
        "case | ranks | wall clock, ms a step | processor, ms a step | model, ms",
        *(
            f"{title} | {', '.join(found[name])} | "
            + " | ".join(
                ", ".join(f"{1e3 * cell[what]:.0f}" for cell in found[name].values())
                for what in ("wall", "processor", "predicted")
            )
            for name, title in titles.items()
        ),
    )


def scaling_example() -> None:
    """The cost model on a larger job."""
    found = stored("scaling.json")
    table(
        "ranks | grid | computing, s | exchange, ms | step, s | times one rank's speed | bytes passed on by a rank",
        *(
            f"{r['ranks']} | {r['grid']} | {r['compute']:.2f} | {1e3 * r['exchange']:.1f} | {r['step']:.2f} | {r['speed']:.1f} | "
            f"{r['bytes sent by rank 0']:,}"
            for r in found["on paper"]
            if r["ranks"] in (1, 4, 32, 64, 256, 1000)
        ),
    )


# --- what was tried to break it ---


def kills() -> None:
    """Runs that were killed."""
    found = stored("kills.json")
    print(
        f"{found['kills']} kills in {found['jobs']} runs of {len(found['by job'])} kinds: {found['failures']} failures, "
        f"{sum(job['steps made again'] for name, job in found['by job'].items() if 'backpropagation' not in name and 'adalora' not in name)}"
        " steps made again in runs with a journal."
    )


def fuzz() -> None:
    """Files that were changed at random."""
    found = stored("fuzz.json")
    print(f"{found['inputs']:,} changed files: {found['findings']} findings.")


def privacy() -> None:
    """Epsilon of 1000 steps of one query, delta 1e-5; computed, not measured."""
    from zo_opt.privacy import epsilon_of

    rates = (0.001, 0.01, 0.05)
    table(
        "noise multiplier | " + " | ".join(f"q = {q}" for q in rates),
        *(
            f"{noise} | " + " | ".join(f"{epsilon_of(noise, {1: 1000}, 1e-5, examples=20_000, batch_size=round(20_000 * q)):.2f}" for q in rates)
            for noise in (0.7, 1, 2, 4)
        ),
    )  # fmt: skip


if __name__ == "__main__":
    globals()[sys.argv[1]]()
