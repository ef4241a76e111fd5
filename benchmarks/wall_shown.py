"""What memory_wall.py measured, as a table and as a picture."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from zo_opt.system.files import write_atomically
from zo_opt.system.pictures import BLUE, INK, VERMILION, new_figure, styled, to_png

INFERENCE = "a forward pass alone"


def measured(cell: dict[str, Any]) -> bool:
    """Whether a cell came to an end; not where, say, a package is missing."""
    return "size" in cell or "seconds" in cell


def table(arguments: argparse.Namespace) -> None:
    """What was measured, as Markdown."""
    results = json.loads(arguments.file.read_text())
    done = [c for c in results["cells"] if measured(c)]
    of = {part: [c for c in done if c["part"] == part] for part in ("batch", "answers", "model", "time")}
    seconds = {c["method"]: c["seconds"] for c in of["time"]}
    bound, length = results["bound"] / 2**20, results["length"]
    print(f"One step in a process of {bound:,.0f} MiB, {results['model']}, rows of {length} tokens.\n")
    print("| method | by | base | loaded, MiB | largest batch | tokens | seconds a row | the next size tried |")
    print("|---|---|---|---:|---:|---:|---:|---|")
    for c in sorted(of["batch"], key=lambda c: (c["answers"], c["size"])):
        by = "backpropagation" if c["backward"] else "forward passes"
        each = f"{c['seconds'] / c['size']:.2f}" if c["size"] else "-"
        tokens = f"{c['size'] * length:,}"
        print(f"| {c['method']} | {by} | {c['base']} | {_mib(c)} | {_rows(c)} | {tokens} | {each} | {_death(c)} |")
    if of["answers"]:
        print(f"\n| method | tokens to write of {length} | largest batch | the next size tried |\n|---|---:|---:|---|")
    for c in of["answers"]:
        print(f"| {c['method']} | {c['target']} | {_rows(c)} | {_death(c)} |")
    if of["model"]:
        print(
            f"\n| method, {results['rows']['model']} rows | base | layers | parameters | the next size tried |\n|---|---|---:|---:|---|"
        )
    for c in of["model"]:
        print(
            f"| {c['method']} | {c['base']} | {c['layers'] or 'none'} | {c['parameters'] / 1e6:,.0f} M | {_death(c)} |"
        )
    if seconds:
        print(f"\n| method | seconds of a step of {results['rows']['time']} rows |\n|---|---:|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent} |")
    for c in results["cells"]:
        if not measured(c):
            print(f"\nNot measured: {c['part']}, {c['method']}, {c['base']}: {c['dies']}")


def _mib(cell: dict[str, Any]) -> str:
    return f"{cell['loaded'] / 2**20:,.0f}" if "loaded" in cell else "-"


def _rows(cell: dict[str, Any]) -> str:
    more = "" if "dies" in cell else " or more"
    return f"{cell['size']}{more}" if cell["size"] else "**none**"


def _death(cell: dict[str, Any]) -> str:
    """With what the smallest size that did not fit died."""
    if "dies" not in cell:
        return "-"
    tried = re.search(r"DefaultCPUAllocator.*allocate (\d+) bytes", cell["dies"])
    said = f"dies, {int(tried[1]) / 2**20:.1f} MiB more were refused" if tried else cell["dies"]
    return f"{cell['dies_at']}: {said}"


def draw(arguments: argparse.Namespace) -> None:
    """A bar a method: the tokens of the largest batch."""
    results = json.loads(arguments.file.read_text())
    found = {
        c["method"]: c
        for c in results["cells"]
        if measured(c) and c["part"] == "batch" and c["base"] in ("bf16", "fp32")
    }
    tokens = {name: cell["size"] * results["length"] for name, cell in found.items()}
    reach = tokens.pop(INFERENCE, None)
    groups = {
        "trained: adapters at every token, or all weights": [n for n in tokens if not found[n]["answers"]],
        "trained: adapters at the answer alone": [n for n in tokens if found[n]["answers"]],
    }
    gib = results["bound"] / 2**30
    with styled():
        figure = new_figure(
            10, 5.8, f"A process of {gib:g} GiB: how large a batch can it train?",
            f"{results['model']}, rows of {results['length']} tokens; the largest batch of which one step fits",
        )  # fmt: skip
        _bars(figure.subplots(), groups, tokens, found, reach)
        write_atomically(arguments.out, to_png(figure))


def _bars(axes: Any, groups: dict[str, list[str]], tokens: dict[str, int], found: Any, reach: int | None) -> None:
    from matplotlib.patches import Patch

    most, place, ticks = max([*tokens.values(), reach or 1]), 0.0, {}
    for title, names in groups.items():
        axes.text(0.008 * most, place - 0.8, title, fontsize=11, color=INK, style="italic", va="center")
        for name in sorted(names, key=lambda n: (not found[n]["backward"], tokens[n])):
            size, colour = tokens[name], VERMILION if found[name]["backward"] else BLUE
            axes.barh(place, size, color=colour, height=0.78)
            inside = size > 0.2 * most
            said = f"{size:,}" if size else "not one row"
            axes.text(
                size + (-0.01 if inside else 0.01) * most, place, said, va="center", ha="right" if inside else "left",
                fontsize=11, fontweight="bold", color="white" if inside else colour,
            )  # fmt: skip
            ticks[place] = name.removesuffix(", answer positions") + (
                " (fp32)" if found[name]["base"] == "fp32" else ""
            )
            place += 1
        place += 1.2
    if reach is not None:
        axes.axvline(reach, color=INK, linewidth=1.4, linestyle="--", zorder=0)
        axes.text(reach - 0.01 * most, -0.8, f"inference: {reach:,}", ha="right", va="center", fontsize=11, color=INK)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 1.6, -1.3)
    axes.set_xlim(0, 1.02 * most)
    axes.set_xlabel("tokens", fontsize=11)
    axes.grid(visible=False, axis="y")
    handles = [Patch(color=VERMILION, label="backpropagation"), Patch(color=BLUE, label="forward passes alone")]
    axes.legend(handles=handles, loc="center right", bbox_to_anchor=(0.94, 0.74), frameon=False, fontsize=13)
