"""The model card of a run, README.md: what it is, on which data, what it reached, how to use it, and its limits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zo_opt.adapters.uses import CARD_NAME, Uses
from zo_opt.record.summary import Summary
from zo_opt.system.files import write_atomically
from zo_opt.tasks.metrics import CLASSIFICATION, METRICS
from zo_opt.tasks.tables import hub_name

FEW = 100  # held-out rows


def write(directory: Path, summary: Summary, record: Mapping[str, Any], uses: Uses) -> None:
    """Write the card beside the adapter.

    Args:
        directory: of the run.
        summary: what it measured.
        record: what run.json says.
        uses: what the adapter is good for.
    """
    parts = (
        _front(summary, uses),
        _head(summary),
        _data(summary, record),
        _use(directory, summary, uses),
        _limits(summary, uses),
        _how(directory, record),
    )
    write_atomically(directory / CARD_NAME, "\n".join(parts).encode())


def _front(s: Summary, uses: Uses) -> str:
    """What the hub reads: a line of YAML each, whose strings are JSON's."""
    task = "text-classification" if s.kind == CLASSIFICATION else "text-generation"
    values: dict[str, Any] = {
        "library_name": "peft" if uses.peft == "native" else "zo_opt",
        "base_model": s.model if _is_hub_id(s.model) else None,
        "datasets": [s.task] if _is_hub_id(s.task) else None,
        "pipeline_tag": task,
        "tags": ["zo_opt", "zeroth-order" if s.queries else "backpropagation", s.optimizer],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["---", *lines, "---", ""])


def _head(s: Summary) -> str:
    metric, before, after = METRICS[s.metric], s.before, s.after
    rows = {
        **{
            METRICS[name].label: f"{METRICS[name].show(before.metrics[name])} | {METRICS[name].show(value)}"
            + (f" ± {metric.show(after.standard_error)}" if name == s.metric else "")
            for name, value in after.metrics.items()
        },
        "loss": f"{before.loss:.3f} | {after.loss:.3f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    beside = (
        ""
        if s.regression is None
        else f"\nLogistic regression on the frozen model's hidden states reaches {s.regression:.1%} there.\n"
    )
    return (
        f"# {Path(s.model).name}, tuned on {Path(s.task).name}\n\nAn adapter of {_shown(s.model)} ({s.adapter}), tuned {s.how}: {s.optimizer}, "
        f"{s.steps:,} steps of {s.batch_size} rows, {s.forwards:,} forward passes, {s.train_seconds:.0f} s on {s.device}.\n\n"
        f"| on {s.after.on_rows} | before | after |\n|---|---|---|\n{table}\n\n± is one standard error over these rows.\n{beside}"
    )


def _data(s: Summary, record: Mapping[str, Any]) -> str:
    rows, task = record.get("rows", {}), record["resolved"]["task"]
    train, held = rows.get("train", {}), rows.get("held_out", {})
    prompt = "the tokenizer's chat template" if task["conversation"] else f"`{_code(task['template'])}`"
    words = ", ".join(f"{label} -> `{_code(word)}`" for label, word in task["verbalizers"].items())
    lines = {
        "rows": f"{_shown(s.task)}: {s.train_rows:,} to learn, {s.after.rows:,} to evaluate on",
        "SHA-256 of the training rows": f"`{train['sha256']}`"
        if "sha256" in train
        else "not recorded, for they are private",
        "SHA-256 of the held-out rows": f"`{held['sha256']}`" if "sha256" in held else "",
        "prompt": prompt,
        "label words": words,
        "privacy of the training rows": s.privacy,
    }
    return "## Data\n\n" + "\n".join(f"- {name}: {value}" for name, value in lines.items() if value) + "\n"


def _use(directory: Path, s: Summary, uses: Uses) -> str:
    name = directory.name
    shell = [f"zo-opt predict {name} --file new.jsonl"] if s.kind == CLASSIFICATION else []
    if uses.writes:
        shell.append(f'zo-opt generate {name} --prompt "..."')
    if uses.merges:
        shell.append(f"zo-opt merge {name} --to merged")
    if uses.peft == "export":
        shell.append(f"zo-opt merge {name} --as lora --to lora")
    block = "```bash\n" + "\n".join(shell) + "\n```\n"
    if uses.peft != "native":
        return f"## Use\n\n{block}"
    base = f'"{s.model}"' if _is_hub_id(s.model) else '"the base model\'s directory"'
    python = f'base = AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, "{name}")'
    return f"## Use\n\n{block}\nWith PEFT alone, under the prompt above:\n\n```python\n{python}\n```\n"


def _limits(s: Summary, uses: Uses) -> str:
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits_of(s, uses)) + "\n"


def _limits_of(s: Summary, uses: Uses) -> Iterator[str]:
    later = uses.before().removeprefix("later: ")
    yield later[0].upper() + later[1:]
    yield "It was measured on rows like those that it learned from, under the prompt above; elsewhere nothing is known of it."
    if s.after.rows < FEW:
        yield f"{s.after.rows} rows to evaluate on are few: read the figures with their standard error."
    if s.after.trained_on != 0:
        yield f"The figures are of {s.after.on_rows}."
    if s.kept_step is not None:
        yield f"Its weights are those after step {s.kept_step:,}, the best of {len(s.curve)} on these rows, which flatters the figures."
    if not math.isfinite(s.after.value) or s.gain * (1 if METRICS[s.metric].higher_is_better else -1) <= 0:
        yield f"It is no better than the untuned model: {s.outcome}."
    if s.regression is not None and s.regression > s.after.accuracy:
        yield "Logistic regression on the frozen model's hidden states is better on these rows."
    if s.truncated:
        yield f"{s.truncated:,} prompts were longer than the context and were cut."
    if s.precision != "fp32":
        yield f"It was tuned on a base in {s.precision}; in another precision it computes slightly otherwise."
    yield "What the base model gets wrong or learned from its own data, this one may, too."


def _how(directory: Path, record: Mapping[str, Any]) -> str:
    commands = [record["command"]]
    commands += [
        f"zo-opt train --output_dir {directory.name} --resume --steps {part['steps']}"
        for part in record.get("went_on", [])
    ]
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return (
        "## Made by\n\n```\n"
        + "\n".join(commands)
        + f"\n```\n\n{versions}. Figures of every step, and a picture: `report.md`.\n"
    )


def _is_hub_id(name: str) -> bool:
    return hub_name(Path(name)) is not None


def _shown(name: str) -> str:
    """A hub's id as it is; of a path its last part, for where it lies is nobody else's business."""
    return name if _is_hub_id(name) else Path(name).name


def _code(text: str) -> str:
    """A text in a line of code."""
    return text.replace("\n", "\\n").replace("`", "'")
