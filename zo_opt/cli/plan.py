"""``zo-opt plan``."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from rich import box
from rich.table import Table

from zo_opt.cli.options import PlanConfig
from zo_opt.cli.say import print_json, reporter_of
from zo_opt.errors import ZOError
from zo_opt.planning import Footprint, Setting, make_skeleton, plan_method, read_config
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import current_memory, parse_bytes, readable, total_memory
from zo_opt.training.pairings import PAIRINGS, get_pairing

FORMATS = (".json", ".csv", ".md")
ACCURACY = 0.4  # real processes took up to so much more (benchmarks/plan.py)
CONTEXT = 512 << 20  # what CUDA itself takes of a device, about
_SIZES = ("weights", "gradients", "optimizer", "activations", "process")


def run(options: Namespace, command: str) -> None:
    """Plan all methods, print the table, write the file."""
    reporter, as_json = reporter_of(options)
    config = PlanConfig(**vars(options))
    _check(config)
    setting = Setting(**{f.name: getattr(config, f.name) for f in fields(Setting)})
    device = setting.taken_device
    there = device.type == "cpu" or torch.cuda.is_available()
    memory = parse_bytes(config.memory) if config.memory is not None else total_memory(device) if there else None
    names = config.methods.split(",") if config.methods is not None else PAIRINGS
    pairings = [get_pairing(name.strip()) for name in dict.fromkeys(names)]
    skeleton = make_skeleton(read_config(config.model_name_or_path), config.head, config.model_name_or_path)
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    if positions is not None and config.length > positions:
        raise ZOError(f"length={config.length} is more than the model's {positions} positions; give at most that.")
    base = current_memory(device) if device.type == "cpu" else CONTEXT  # all that a run imports is imported by now
    rows, notes = [], {}
    for pairing in pairings:
        try:
            rows.append(row(pairing.name, plan_method(skeleton, pairing.config(), setting), base, memory))
        except ZOError as error:
            notes[pairing.name] = " ".join(str(error).split())
    if not rows:
        name, reason = next(iter(notes.items()))
        raise ZOError(f"nothing could be planned; {name}: {reason.rstrip('.')}.")
    where = f"{setting.taken_precision}, {device.type}" + (
        f", {readable(memory)} of memory" if memory is not None else ""
    )
    reporter.say(f"{config.model_name_or_path}: a step of {config.batch_size} x {config.length} tokens, {where}")
    reporter.show(table(rows))
    whole = "all that the process takes" if device.type == "cpu" else "all that it takes of the device"
    reporter.say(
        f"Estimates. process: {whole}, {readable(base)} before a model is read included; real runs took up to {ACCURACY:.0%} more."
    )
    for name, reason in notes.items():
        reporter.say(f"{name}: {reason}")
    rows += [{"method": name, "note": reason} for name, reason in notes.items()]
    if as_json:
        print_json(plain(rows, config))
    if config.out is not None:
        write_atomically(config.out, rendered(rows, config).encode())
        reporter.say(f"written to {config.out}")


def row(method: str, found: Footprint, base: int, memory: int | None) -> dict[str, Any]:
    """One method's figures, in bytes; ``fits``: yes, tight (not if it takes more by the accuracy of estimates), no, or empty.

    >>> found = Footprint(*[0] * 6, peak=70, loading=60, saving=50)
    >>> [row("lora", found, 10, memory)["fits"] for memory in (200, 100, 79, None)]
    ['yes', 'tight', 'no', '']
    """
    process = found.process(base)
    fits = ""
    if memory is not None:
        fits = "no" if process > memory else "tight" if process * (1 + ACCURACY) > memory else "yes"
    return {"method": method, **vars(found), "process": process, "fits": fits, "note": ""}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal: whole in 80 columns."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("method", "trained", *_SIZES, "fits"):
        shown.add_column(name, justify="left" if name in ("method", "fits") else "right", overflow="fold")
    for each in rows:
        shown.add_row(each["method"], _count(each["trainable"]), *(readable(each[s]) for s in _SIZES), each["fits"])
    return shown


def plain(rows: Sequence[dict[str, Any]], config: PlanConfig) -> dict[str, Any]:
    """For programs."""
    return {"config": {k: v for k, v in vars(config).items() if k not in ("out", "overwrite")}, "methods": list(rows)}


def rendered(rows: Sequence[dict[str, Any]], config: PlanConfig) -> str:
    """The file's content, by its ending."""
    assert config.out is not None
    if config.out.suffix == ".json":
        return json.dumps(plain(rows, config), indent=2) + "\n"
    names = ["method", *(f.name for f in fields(Footprint)), "process", "fits", "note"]
    if config.out.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    lines = [names, ["---"] * len(names)]
    for each in rows:
        cells = {k: readable(v) if isinstance(v, int) and k != "trainable" else str(v) for k, v in each.items()}
        lines.append([cells.get(name, "") for name in names])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _count(number: int) -> str:
    """A number of parameters in at most six characters.

    >>> _count(512), _count(460_800), _count(134_515_008), _count(6_738_415_616)
    ('512', '460.8K', '134.5M', '6.7B')
    """
    size, units = float(number), ["", "K", "M", "B"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f}{units[0]}" if units[0] else str(number)


def _check(config: PlanConfig) -> None:
    if (config.head, config.logits) == ("classification", "all"):
        raise ZOError("logits='all' is for language models; leave it out with head='classification'.")
    out = config.out
    if out is not None and out.suffix not in FORMATS:
        raise ZOError(f"out={out} ends in {out.suffix or 'nothing'!r}; give a name that ends in {', '.join(FORMATS)}.")
    if out is not None and not config.overwrite and out.exists():
        raise ZOError(f"{out} exists already; give another --out, or --overwrite.")
