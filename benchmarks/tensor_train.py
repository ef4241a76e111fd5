"""A tensor-train layer against a LoRA pair, tensorly-torch, einsum and full reconstruction: times, ratios, bars.

    python benchmarks/tensor_train.py --out benchmarks/results/tensor_train.json

Needs ``pip install ".[benchmark]"``. One process, one thread by default, no gradients; every cell's columns are measured in turn, and
medians are compared. LoRA's pair is two ``F.linear`` of the train's rank. tensorly-torch's layer is a ``blocktt`` of the same rank
and dims (its cores hold an input and an output dim each, so that it is another parametrisation of the same size of matrix).
"48 layers" asks ``MergeCache`` for the pairs of 48 layers whose cores have moved, applies every layer, and divides by 48. FLOPs and bytes are
those of the merged pair's two products; the roofline takes the larger of FLOPs over the rate of a square matrix product and bytes over
the bandwidth of a large copy, both
measured here first. Small inputs stay in the cache, where a layer can be faster than that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, roofline
from tltorch import FactorizedLinear
from torch import Tensor
from torch.nn import functional as F
from tt_kernels import MergeCache, core_shapes, merge_pair, reconstruct, tt_linear

Dims = tuple[int, ...]
SIZES: dict[str, tuple[Dims, Dims]] = {
    "1024->64": ((8, 8, 16), (4, 4, 4)),
    "4096->64": ((16, 16, 16), (4, 4, 4)),
    "64->1024": ((4, 4, 4), (8, 8, 16)),
}
RANKS, TOKENS, DTYPES = (5, 16), (64, 512, 4096), (torch.float32, torch.bfloat16)
LAYERS = 48
BARS = {  # ratio -> (worst cell, median cell)
    "merged / LoRA pair": (1.05, None),
    "merged, bias / LoRA pair, bias": (1.05, None),
    "48 layers with their merge / LoRA pair": (1.3, None),
    "merged / tensorly factorised": (0.35, 0.25),
    "merged / tensorly reconstructed": (0.5, 0.35),
    "48 layers with their merge / tensorly factorised": (0.35, 0.25),
    "48 layers with their merge / tensorly reconstructed": (0.5, 0.35),
}
UNBARRED = ("merging at every call / LoRA pair", "einsum / LoRA pair", "full reconstruction / LoRA pair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few measurements: does it run?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, device = time.perf_counter(), arguments.device
    rates = roofline(device, DTYPES)
    results: dict[str, Any] = {"machine": machine(device, "tensorly", "tensorly-torch", "opt_einsum"), "rates": rates}
    print(json.dumps(results, indent=2))
    measure = partial(
        interleaved,
        rounds=3 if arguments.quick else 25,
        at_least=1e-4 if arguments.quick else 1e-3,
        at_most=0.01 if arguments.quick else 0.5,
    )
    with torch.no_grad():
        results["cells"] = {}
        for size, dtype, rank, tokens in ((s, d, r, t) for s in SIZES for d in DTYPES for r in RANKS for t in TOKENS):
            name = f"{size} rank {rank} {tokens} tokens {str(dtype)[6:]}"
            results["cells"][name] = cell(*SIZES[size], rank, tokens, dtype, device, rates, measure)
            print_cell(name, results["cells"][name], header=len(results["cells"]) == 1)
    results["bars"] = bars(results["cells"])
    results["seconds"] = round(time.perf_counter() - start)
    print_bars(results)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def cell(
    in_dims: Dims,
    out_dims: Dims,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    rates: dict[str, float],
    measure: Callable[..., dict[str, float]],
) -> dict[str, Any]:
    """Seconds of each column, ratios, and what the products count."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / 3).to(dtype).to(device)

    inputs, size_in, size_out = len(in_dims), prod(in_dims), prod(out_dims)
    x, bias = normal(tokens, size_in), normal(size_out)
    layers = [[normal(*s) for s in core_shapes(in_dims, out_dims, rank)] for _ in range(LAYERS)]
    moved = cycle([layers, [[-core for core in layer] for layer in layers]])  # what a step does to the cores
    cores = layers[0]
    a_RM, b_NR = normal(rank, size_in), normal(size_out, rank)
    dims = {"in_dims": in_dims, "out_dims": out_dims}
    pair, with_bias = merge_pair(cores, inputs), merge_pair(cores, inputs, bias)
    stacked = [torch.stack(column) for column in zip(*layers, strict=True)]
    cache, unchanged = MergeCache(), MergeCache()

    def all_layers() -> None:
        for layer in cache(next(moved), inputs):
            layer(x)

    tensorly = {
        way: tensorly_layer(in_dims, out_dims, rank, way, dtype, device) for way in ("factorized", "reconstructed")
    }
    equation = einsum_equation(inputs, len(out_dims))
    x_dims = x.reshape(tokens, *in_dims)
    actions: dict[str, Callable[[], Any]] = {
        "LoRA pair": lambda: F.linear(F.linear(x, a_RM), b_NR),
        "LoRA pair, bias": lambda: F.linear(F.linear(x, a_RM), b_NR, bias),
        "merged": lambda: pair(x),
        "merged, bias": lambda: with_bias(x),
        "48 layers with their merge": all_layers,
        "merging at every call": lambda: tt_linear(x, cores, **dims),
        "tensorly factorised": lambda: tensorly["factorized"](x),
        "tensorly reconstructed": lambda: tensorly["reconstructed"](x),
        "einsum": lambda: torch.einsum(equation, x_dims, *cores),
        "full reconstruction": lambda: x @ reconstruct(cores, in_dims, out_dims),
        "48 layers' chain alone": lambda: merge_pair(stacked, inputs),
        "48 layers' look at the cache": lambda: unchanged(layers, inputs),
    }
    check(actions, x, cores, in_dims, out_dims, bias)
    seconds = measure(actions)
    for name in actions:
        if name.startswith("48"):
            seconds[name] /= LAYERS
    flops = 2 * tokens * rank * (size_in + size_out)
    entries = tokens * (size_in + 2 * rank + size_out) + rank * (size_in + size_out)
    moved_bytes = entries * dtype.itemsize
    limit = max(flops / rates[str(dtype)[6:]], moved_bytes / rates["bytes"])
    counted = {"flops": flops, "bytes": moved_bytes, "roofline, s": limit}
    ratios = {}
    for ratio in (*BARS, *UNBARRED):
        ours, _, theirs = ratio.partition(" / ")
        ratios[ratio] = seconds[ours] / seconds[theirs]
    return {"seconds": seconds, "ratios": ratios, "counted": counted}


def tensorly_layer(in_dims: Dims, out_dims: Dims, rank: int, way: str, dtype: torch.dtype, device: str) -> Any:
    with torch.random.fork_rng():  # it draws from the global state
        torch.manual_seed(0)
        return FactorizedLinear(
            in_dims,
            out_dims,
            bias=False,
            factorization="blocktt",
            rank=rank,
            implementation=way,
            dtype=dtype,
            device=device,
        )


def einsum_equation(inputs: int, outputs: int) -> str:
    """x (t, i_1..i_d) with all cores at once; torch takes the path that opt_einsum finds."""
    count = inputs + outputs
    ranks, dims = "ABCDEFGHIJKLM"[: count + 1], "abcdefghijkl"[:count]
    cores = ",".join(ranks[k] + dims[k] + ranks[k + 1] for k in range(count))
    return f"z{dims[:inputs]},{cores}->z{dims[inputs:]}"


def check(
    actions: dict[str, Callable[[], Any]], x: Tensor, cores: list[Tensor], in_dims: Dims, out_dims: Dims, bias: Tensor
) -> None:
    """That what is timed is the product it should be."""
    expected = x.float() @ reconstruct([core.float() for core in cores], in_dims, out_dims)
    tolerance = (1e-4 if x.dtype == torch.float32 else 0.05) * float(expected.abs().max())
    for name in ("merged", "merged, bias", "merging at every call", "einsum", "full reconstruction"):
        y = actions[name]().float().reshape(expected.shape) - (bias.float() if "bias" in name else 0)
        error = float((y - expected).abs().max())
        if error > tolerance:
            raise RuntimeError(f"{name} is wrong by {error}")


def bars(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each ratio over the grid: its worst and median cell, how many cells meet the bar."""
    rows = {}
    for ratio in (*BARS, *UNBARRED):
        values = {name: cell["ratios"][ratio] for name, cell in cells.items()}
        worst, middle = max(values, key=lambda name: values[name]), sorted(values.values())[len(values) // 2]
        row: dict[str, Any] = {"worst": values[worst], "worst cell": worst, "median": middle}
        bar, median_bar = BARS.get(ratio, (None, None))
        if bar is not None:
            row |= {"bar": bar, "cells within": sum(v <= bar for v in values.values()), "cells": len(values)}
            row |= {"median bar": median_bar, "met": values[worst] <= bar and middle <= (median_bar or bar)}
        rows[ratio] = row
    return rows


SHORT = {  # column of the printed table -> what it shows
    "LoRA us": "LoRA pair", "merged": "merged", "+bias": "merged, bias", "48": "48 layers with their merge",
    "each call": "merging at every call", "tly fact": "tensorly factorised", "tly rec": "tensorly reconstructed",
    "einsum": "einsum", "dense": "full reconstruction",
}  # fmt: skip


def print_cell(name: str, figures: dict[str, Any], *, header: bool) -> None:
    """Microseconds of LoRA's pair, all else as multiples of it (with a bias: of LoRA's with one)."""
    if header:
        print(f"\n{'times LoRA pair':<38}" + "".join(f"{title:>10}" for title in (*SHORT, "MFLOP", "MB", "roof us")))
    seconds = figures["seconds"]
    values = [f"{seconds['LoRA pair'] * 1e6:.0f}"]
    for column in list(SHORT.values())[1:]:
        base = "LoRA pair, bias" if column.endswith("bias") else "LoRA pair"
        values.append(f"{seconds[column] / seconds[base]:.2f}")
    counted = figures["counted"]
    values += [f"{counted['flops'] / 1e6:.1f}", f"{counted['bytes'] / 1e6:.2f}", f"{counted['roofline, s'] * 1e6:.0f}"]
    print(f"{name:<38}" + "".join(f"{v:>10}" for v in values), flush=True)


def print_bars(results: dict[str, Any]) -> None:
    print(f"\n{'ratio':<52}{'median':>8}{'worst':>8}{'bar':>12}  met   worst cell")
    for ratio, row in results["bars"].items():
        bar = f"{row['bar']}" + (f" ({row['median bar']})" if row["median bar"] else "") if "bar" in row else "-"
        met = ("yes" if row["met"] else f"{row['cells within']}/{row['cells']}") if "bar" in row else "-"
        print(f"{ratio:<52}{row['median']:>8.2f}{row['worst']:>8.2f}{bar:>12}  {met:<6}{row['worst cell']}")
    print("bars: of the worst cell (of the median one); n/m: so many cells meet it")
    looks = [cell["seconds"]["48 layers' look at the cache"] * 1e6 for cell in results["cells"].values()]
    merges = [cell["seconds"]["48 layers' chain alone"] * 1e6 for cell in results["cells"].values()]
    print(
        f"a layer of 48: merge {min(merges):.1f} to {max(merges):.1f} us in one chain, look at the cache {min(looks):.1f} to {max(looks):.1f} us"
    )
    print(f"{results['seconds']} s in all")


if __name__ == "__main__":
    main()
