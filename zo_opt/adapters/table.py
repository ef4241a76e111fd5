"""Where adapters sit and what they cost, as a text table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.tt_linear import TTLinear
from zo_opt.system.layers import layer_of

_LEFT, _RIGHT = ("where", "kind", "shapes", "ranks"), ("count", "trained", "bytes", "share")


@dataclass
class _Line:
    """Adapters that are alike: trained parameters and bytes (frozen ones included) of all of them."""

    adapters: int = 0
    parameters: int = 0
    bytes: int = 0


def adapter_table(
    wrapped: nn.Module,
    adapted: Mapping[str, AdaptedModule],
    trained: Sequence[Tensor],
    *,
    each: bool,
) -> str:
    """A line for the adapters of one place, kind, shape and rank (``each``: for every adapter), and a total; long texts are folded."""
    lines: dict[tuple[str, ...], _Line] = {}
    counted = {id(p) for p in trained}
    seen: set[int] = set()  # what modules share counts where it is met first

    def add(name: str, kind: str, shapes: str, ranks: str, parameters: Sequence[Tensor]) -> None:
        line = lines.setdefault((name if each else _any_layer(name), kind, shapes, ranks), _Line())
        line.adapters += 1
        for p in parameters:
            if id(p) not in seen:
                seen.add(id(p))
                line.parameters += p.numel() * (id(p) in counted)
                line.bytes += p.numel() * p.element_size()

    for name, module in adapted.items():
        add(name, module.kind, _shapes(module.adapter), _ranks(module.adapter), list(module.adapter.parameters()))
    for name, module in wrapped.named_modules():
        whole = [p for p in module.parameters(recurse=False) if id(p) in counted and id(p) not in seen]
        if whole:
            add(name, "whole", " ".join(_by(p.shape) for p in whole), "", whole)
    total = _Line(*(sum(getattr(line, f) for line in lines.values()) for f in ("adapters", "parameters", "bytes")))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in _LEFT:
        table.add_column(column, overflow="fold")
    for column in _RIGHT:
        table.add_column(column, justify="right", no_wrap=True)
    for key, line in [*lines.items(), (("total", "", "", ""), total)]:
        share = f"{line.parameters / max(total.parameters, 1):.1%}"
        table.add_row(*key, f"{line.adapters:,}", f"{line.parameters:,}", f"{line.bytes:,}", share)
    text = io.StringIO()
    Console(file=text, width=80, color_system=None, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _any_layer(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    place = layer_of(name)
    return name if place is None else f"{place[0]}.*{name[len(f'{place[0]}.{place[1]}') :]}"


def _trains(adapter: nn.Module) -> list[TTLinear]:
    return [m for m in adapter.modules() if isinstance(m, TTLinear)]


def _shapes(adapter: nn.Module) -> str:
    """Of the matrices that trains stand for; else of the parameters."""
    trains = [f"{'*'.join(map(str, t.in_dims))} x {'*'.join(map(str, t.out_dims))}" for t in _trains(adapter)]
    return ", ".join(trains or [_by(p.shape) for p in adapter.parameters()])


def _ranks(adapter: nn.Module) -> str:
    """One number for a train whose ranks are all alike."""
    ranks = [sorted(set(t.ranks)) for t in _trains(adapter)]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranks if r)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
