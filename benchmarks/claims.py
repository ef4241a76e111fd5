"""What papers claim of the methods, beside what a comparison measured.

Reads the directory that ``zo-opt compare`` wrote (its commands stand in benchmarks/results/compare-*/compare.md) and prints a Markdown table:

    python benchmarks/claims.py runs/compare-sst2 [runs/compare-rte ...] --out benchmarks/results/claims.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from zo_opt.comparison.results import interval
from zo_opt.record.metrics import read_metrics
from zo_opt.record.report_picture import smooth


class Comparison:
    """The runs of one comparison."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows = {row["method"]: row for row in json.loads((directory / "rows.json").read_text())}

    def has(self, *methods: str) -> bool:
        return all(self.rows.get(m, {}).get("score") is not None for m in methods)

    def runs(self, method: str) -> list[Path]:
        found = (self.directory / "runs" / method.replace(":", "_")).glob("seed-*/results.json")
        return sorted(path.parent for path in found)

    def curve(self, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forwards, seconds and the running mean of the training loss at every step, the last two as means over seeds."""
        runs = [read_metrics(run) for run in self.runs(method)]
        steps = min(map(len, runs))
        losses = np.mean([smooth([line["loss"] for line in run[:steps]]) for run in runs], axis=0)
        seconds = np.mean([[line["seconds"] for line in run[:steps]] for run in runs], axis=0)
        return np.array([line["forwards"] for line in runs[0][:steps]]), seconds, losses

    def scores(self, method: str) -> np.ndarray:
        return np.array(
            [json.loads((run / "results.json").read_text())["after"]["row_scores"] for run in self.runs(method)]
        )

    def race(self, one: str, other: str) -> str:
        """Steps and forwards of both until the running mean of the training loss reaches what both reach."""
        curves = {m: self.curve(m) for m in (one, other)}
        target = max(float(np.min(losses)) for _, _, losses in curves.values())
        words = []
        for method, (forwards, seconds, losses) in curves.items():
            at = int(np.argmax(losses <= target + 1e-12))
            words.append(f"{method} {at + 1} steps, {forwards[at]} forwards, {seconds[at]:.0f} s")
        return f"to training loss {target:.3f}: " + "; ".join(words)

    def difference(self, one: str, other: str) -> str:
        """Accuracy of the one less the other's, with a 95 % interval over seeds and rows."""
        a, b = self.scores(one), self.scores(other)
        low, high = interval(a - b)
        return f"{one} {100 * a.mean():.1f} %, {other} {100 * b.mean():.1f} %: {100 * (a - b).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"

    def parameters(self, one: str, other: str) -> str:
        a, b = self.rows[one]["trainable_end"], self.rows[other]["trainable_end"]
        return (
            f"{one} {a:,}, {other} {b:,}: {b / a:.1f}x fewer at the end (at the start {self.rows[one]['trainable']:,})"
        )


def table(comparisons: list[Comparison]) -> str:
    """A row for each claim and comparison that has its methods."""
    claims = [
        ("AdaZeta takes 6x fewer steps than MeZO-LoRA to the same loss", ("adazeta", "mezo-lora"), ("race", "difference")),
        ("LoRA+ gains 1-2 % over LoRA, up to 2x faster", ("lora+", "lora"), ("difference", "race")),
        ("AdaLoRA beats LoRA at the same final budget", ("adalora", "lora"), ("difference", "parameters")),
        ("LaMDA has 17.7x fewer parameters than LoRA at the same accuracy", ("lamda", "lora"), ("parameters", "difference")),
        ("LaMDA++ beats LaMDA", ("lamda++", "lamda"), ("difference", "parameters")),
        ("AdaZeta against LoRA by backpropagation", ("adazeta", "lora"), ("difference",)),
    ]  # fmt: skip
    lines = ["| claim | where | measured |", "|---|---|---|"]
    for claim, methods, measures in claims:
        for comparison in comparisons:
            if comparison.has(*methods):
                said = "; ".join(getattr(comparison, measure)(*methods) for measure in measures)
                lines.append(f"| {claim} | {comparison.directory.name} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = table([Comparison(d) for d in options.directories])
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
