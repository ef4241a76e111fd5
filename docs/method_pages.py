"""Pages made from the code: one a method, one a table of parts, one a module of the API. Their sources are docstrings, tables and stored results."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe
from docstrings import to_markdown

from zo_opt.adapters import ADAPTERS, AdapterConfig
from zo_opt.directions import DIRECTIONS
from zo_opt.estimators import ESTIMATORS
from zo_opt.optim import OPTIMIZERS, STEP_CONTROLS, UPDATE_RULES
from zo_opt.schedules import SCHEDULES

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
# Page -> its title, option, table, and its page of the API.
PARTS = {
    "estimators": ("Estimators", "--estimator", ESTIMATORS, "estimators"),
    "directions": ("Directions", "--directions", DIRECTIONS, "directions"),
    "query-schedules": ("Query schedules", "--query_schedule", SCHEDULES, "query-schedules"),
    "update-rules": ("Update rules", "--update_rule", UPDATE_RULES, "optimizers"),
    "step-control": ("Step control", "--step_control", STEP_CONTROLS, "optimizers"),
}
# Page of the API -> its modules. Names are those of each module's __all__.
API = {
    "A run": ("zo_opt.training.run",),
    "Options of a run": ("zo_opt.training.options",),
    "Adapters": ("zo_opt.adapters",),
    "Optimizers": ("zo_opt.optim",),
    "Estimators": ("zo_opt.estimators",),
    "Directions": ("zo_opt.directions",),
    "Query schedules": ("zo_opt.schedules",),
    "The Trainer": ("zo_opt.trainer",),
    "Several processes": ("zo_opt.distributed",),
    "Privacy": ("zo_opt.privacy",),
    "Journal": ("zo_opt.journal",),
    "Models": ("zo_opt.models.precision",),
    "Tensor trains": ("zo_opt.tensor_train", "tt_kernels"),
    "Errors": ("zo_opt.errors",),
}


def menu() -> dict[str, list[dict[str, str]]]:
    """Title in the menu -> the pages that stand under it."""
    return {
        "Optimizers": [{name: f"methods/optimizers/{name}.md"} for name in OPTIMIZERS if name != "adamw"],
        "Adapters": [{name: f"methods/adapters/{slug(name)}.md"} for name in ADAPTERS],
        "Parts": [{title: f"methods/{page}.md"} for page, (title, *_) in PARTS.items()],
        "API": [{title: f"api/{slug(title)}.md"} for title in API],
    }


def pages() -> dict[str, str]:
    """Path of a page -> its Markdown."""
    made = {f"methods/optimizers/{name}.md": optimizer(name) for name in OPTIMIZERS if name != "adamw"}
    made |= {f"methods/adapters/{slug(name)}.md": adapter(name) for name in ADAPTERS}
    made |= {f"methods/{page}.md": parts(*what) for page, what in PARTS.items()}
    return made | {f"api/{slug(title)}.md": api(title, modules) for title, modules in API.items()}


def slug(title: str) -> str:
    return title.lower().replace("++", "-pp").replace(" ", "-")


# --- methods ---


def optimizer(name: str) -> str:
    """The page of an optimizer."""
    thing = OPTIMIZERS[name]
    row = table_rows("methods/optimizers.md")[name]
    presets = ", ".join(f"`{k}={v!r}`" for k, v in thing.method.presets.items()) or "none"
    facts = {
        "Command line": f"`--optimizer {name}`" + "".join(f", `--optimizer.{o}`" for o in thing.method.own),
        "Python": f"`zo_opt.{thing.__name__}`",
        "Forward passes of a step with Q queries": row[3],
        "Float32 numbers kept for each parameter": row[4],
        "Presets": presets,
        "Cannot be given": row[6] or "nothing: every choice is open",
        "Source": source(row[5]),
    }
    command = f"zo-opt train --optimizer {name} --adapter lora --estimator two-sided --steps 200"
    if "estimator" in thing.method.fixes:
        command = command.replace(" --estimator two-sided", "")
    return f"""# {name}

{head(thing)}

{facts_table(facts)}

```bash
{command}
```

{optimizer_figures(name)}

{about(thing)}

{in_api(thing, "optimizers", up="../../")}
"""


def adapter(name: str) -> str:
    """The page of an adapter."""
    thing = ADAPTERS[name]
    row = table_rows("methods/adapters.md")[name]
    facts = {
        "What is trained": row[1],
        "Command line": f"`--adapter {name}`",
        "Python": f"`zo_opt.{thing.__name__}`",
        "Trained numbers on SmolLM2-135M, at the defaults": row[6],
        "Can be merged into the weights": row[3],
        "Exchange with PEFT": row[4],
        "Changes while training (`model.step`)": row[5],
        "Source": source(row[2]),
    }
    return f"""# {name}

{head(thing)}

{facts_table(facts)}

```bash
zo-opt train --adapter {name} --optimizer adamw --steps 200
```

{adapter_figures(name)}

{about(thing)}

{in_api(thing, "adapters", up="../../")}
"""


def parts(title: str, option: str, table: Any, page: str) -> str:
    """The page of a table of parts."""
    text = f"# {title}\n\nEach is a name for `{option}`, a class in Python, and may be your own (`module:Class`).\n"
    for name, thing in table.items():
        text += f"\n## `{name}`\n\n{head(thing)}\n\n{about(thing, heading='###')}\n\n{in_api(thing, page)}\n"
    return text


def head(thing: Any) -> str:
    """The equation, as a docstring begins with it, and the sentences that say when to use the thing."""
    first, rest = paragraphs(thing)[0], paragraphs(thing)[1:]
    first = " ".join(first.replace("&lt;", "<").split())
    use = next((" ".join(p.split()) for p in rest if p.startswith("Use it")), "")
    shown = f"```text\n{first}\n```" if re.search(r"<-| = ", first) else first
    return f"{shown}\n\n{use}"


def about(thing: Any, heading: str = "##") -> str:
    """The rest of a docstring, and the options as a table."""
    rest = [p for p in paragraphs(thing)[1:] if not p.startswith("Use it")]
    options = own_options(thing)
    rows = "\n".join(f"| `{name}` | {default} | {text} |" for name, default, text in options)
    table = f"| option | default | meaning |\n|---|---|---|\n{rows}" if options else ""
    parted = [part for part in ("\n\n".join(rest), table) if part]
    return (f"{heading} Details\n\n" if heading == "##" else "") + "\n\n".join(parted)


def paragraphs(thing: Any) -> list[str]:
    """The text of a docstring without its sections."""
    sections = griffe.parse_google(griffe.Docstring(to_markdown(inspect.getdoc(thing) or "")), warnings=False)
    return "\n\n".join(section.value for section in sections if section.kind.value == "text").split("\n\n")


def own_options(thing: Any) -> list[tuple[str, str, str]]:
    """Name, default and meaning of what belongs to the thing alone."""
    if inspect.isclass(thing) and issubclass(thing, AdapterConfig):
        common = {f.name for f in fields(AdapterConfig)}
        return [(f.name, f"`{f.default!r}`", f.metadata["help"]) for f in fields(thing) if f.name not in common]
    sections = griffe.parse_google(griffe.Docstring(to_markdown(inspect.getdoc(thing) or "")), warnings=False)
    said = {p.name: " ".join(p.description.split()) for s in sections if s.kind.value == "parameters" for p in s.value}
    called = inspect.signature(getattr(thing, "choose", thing)).parameters
    defaults = {name: p.default for name, p in called.items() if p.default is not inspect.Parameter.empty}
    return [(name, f"`{defaults[name]!r}`" if name in defaults else "", text) for name, text in said.items()]


def in_api(thing: Any, page: str, up: str = "../") -> str:
    """A link to the thing's place in the API."""
    return f"[`{thing.__name__}` in the API]({up}api/{page}.md#{thing.__module__}.{thing.__qualname__})"


def facts_table(facts: dict[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def source(cell: str) -> str:
    """arXiv numbers as what they are."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", cell) or "the plain case"


def table_rows(page: str) -> dict[str, list[str]]:
    """The rows of a page's first big table, by the name that stands first."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].split("`")[1]: row for row in cells if len(row) == 7}


def optimizer_figures(name: str) -> str:
    lines = [json.loads(line) for line in (RESULTS / "optimizers.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["method"].split(" (")[0].split(",")[0] == name]
    if not found:
        return "It took no part in the [comparison of optimizers](../optimizers.md#what-each-reached)."
    text = "What it reached ([how](../optimizers.md#what-each-reached)):\n\n| run | forward passes | loss | accuracy |\n|---|---|---|---|\n"
    text += f"| before | 0 | {found[0]['before']['loss']:.3f} | {100 * found[0]['before']['accuracy']:.1f} % |\n"
    return text + "\n".join(
        f"| {line['method']} | {line['forwards']} | {line['after']['loss']:.3f} | {100 * line['after']['accuracy']:.1f} % |"
        for line in found
    )


def adapter_figures(name: str) -> str:
    lines = json.loads((RESULTS / "compare-sst2" / "rows.json").read_text())
    of_name = {"tt": ("loretta", "adazeta"), "lora": ("lora", "lora+", "mezo-lora"), "full": ("full", "mezo")}
    found = [line for line in lines if line["method"] in of_name.get(name, (name,))]
    if not found:
        return "It took no part in the [comparison of methods](../../research/claims.md)."
    text = "What it reached on SST-2 ([how](../../research/claims.md)):\n\n| method | accuracy, 95 % interval | peak memory |\n"
    return (
        text
        + "|---|---|---|\n"
        + "\n".join(
            f"| {line['method']} | {100 * line['score']:.1f} % ({100 * line['low']:.1f} to {100 * line['high']:.1f}) | "
            f"{line['peak_memory'] / 2**30:.1f} GiB |"
            for line in found
        )
    )


# --- the API ---


def api(title: str, modules: tuple[str, ...]) -> str:
    """A page with what a module offers."""
    text = f"# {title}\n"
    for name in modules:
        module = importlib.import_module(name)
        about = to_markdown(inspect.getdoc(module) or "")
        text += f"\n`{name}`: {about}\n"
        for public in getattr(module, "__all__", None) or own_names(module):
            thing = getattr(module, public)
            if hasattr(thing, "__qualname__") and thing.__module__.startswith(name):
                text += f"\n::: {thing.__module__}.{thing.__qualname__}\n"
    return text


def own_names(module: Any) -> list[str]:
    """The public classes and functions that a module without __all__ defines."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]
