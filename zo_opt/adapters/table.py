"""Where adapters sit and what they cost, as a text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.tt_linear import TensorTrain
from zo_opt.system.layers import layer_of

_HEADER = ("where", "adapters", "method", "shapes", "ranks", "parameters", "bytes", "share")
_NUMBERS = ("adapters", "parameters", "bytes", "share")


@dataclass
class _Line:
    """Adapters that are alike: trained parameters and bytes (frozen ones included) of all of them."""

    adapters: int
    parameters: int
    bytes: int


def adapter_table(
    wrapped: nn.Module, adapted: Mapping[str, AdaptedModule], method: str, trained: Sequence[Tensor], *, each: bool
) -> str:
    """A line for the adapters of one place, method, shape and rank (``each``: for every adapter), and a total."""
    lines: dict[tuple[str, ...], _Line] = {}
    counted = {id(p) for p in trained}
    seen: set[int] = set()  # what modules share counts where it is met first

    def add(name: str, kind: str, shapes: str, ranks: str, parameters: Sequence[Tensor]) -> None:
        line = lines.setdefault((name if each else _any_layer(name), kind, shapes, ranks), _Line(0, 0, 0))
        line.adapters += 1
        for p in parameters:
            if id(p) not in seen:
                seen.add(id(p))
                line.parameters += p.numel() * (id(p) in counted)
                line.bytes += p.numel() * p.element_size()

    for name, module in adapted.items():
        kind = f"{'tt' if module.kind == 'replacement' else method}, {module.kind}"
        add(name, kind, _shapes(module.adapter), _ranks(module.adapter), list(module.adapter.parameters()))
    for name, module in wrapped.named_modules():
        whole = [p for p in module.parameters(recurse=False) if id(p) in counted and id(p) not in seen]
        if whole:
            add(name, "trained whole", " ".join(_by(p.shape) for p in whole), "", whole)
    total = _Line(*(sum(getattr(line, f) for line in lines.values()) for f in ("adapters", "parameters", "bytes")))
    rows = [
        _HEADER,
        *(_row(key, line, total) for key, line in lines.items()),
        _row(("total", "", "", ""), total, total),
    ]
    return _aligned(rows)


def _row(key: tuple[str, ...], line: _Line, total: _Line) -> tuple[str, ...]:
    where, *described = key
    share = f"{line.parameters / max(total.parameters, 1):.1%}"
    return where, f"{line.adapters:,}", *described, f"{line.parameters:,}", f"{line.bytes:,}", share


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    right = [name in _NUMBERS for name in _HEADER]
    cells = [
        [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True)] for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _any_layer(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    place = layer_of(name)
    return name if place is None else f"{place[0]}.*{name[len(f'{place[0]}.{place[1]}') :]}"


def _trains(adapter: nn.Module) -> list[TensorTrain]:
    return [m for m in adapter.modules() if isinstance(m, TensorTrain)]


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
