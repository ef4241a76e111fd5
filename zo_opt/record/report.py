"""The run report: report.md in words and numbers, report.png as a picture, results.json for programs."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

from zo_opt.record.metrics import read_metrics
from zo_opt.record.summary import Summary
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import readable
from zo_opt.tasks.metrics import METRICS

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


def write(directory: Path, summary: Summary) -> None:
    """Write report.md, report.png and, last, results.json: with it the run is finished."""
    write_atomically(directory / "report.md", markdown(summary).encode())
    draw(read_metrics(directory), summary, directory / "report.png")
    write_atomically(directory / "results.json", (_json(summary.to_dict()) + "\n").encode())


def markdown(s: Summary) -> str:
    """The summary as a short page."""
    metric, before, after = METRICS[s.metric], s.before, s.after
    dropped = f" ({s.dropped} dropped: loss not finite)" if s.dropped else ""
    rows = {
        f"{metric.label} before": f"{metric.show(before.value)} ± {metric.show(before.standard_error)}",
        f"{metric.label} after": f"**{metric.show(after.value)}** ± {metric.show(after.standard_error)} "
        f"({metric.change(before.value, after.value)})",
        **{
            f"{METRICS[name].label} before, after": ", ".join(
                METRICS[name].show(e.metrics[name]) for e in (before, after)
            )
            for name in after.metrics
            if name != s.metric
        },
        "loss before, after": f"{before.loss:.3f}, {after.loss:.3f}",
        "on the way": _curve(s),
        "logistic regression": _regression(s),
        "rows": f"{s.train_rows:,} training, {_evaluated(s)}",
        "trainables": s.adapter,
        "steps, queries": f"{s.steps:,}, {s.queries:,}{dropped}",
        "forward passes": _cost(s),
        "token evaluations": f"{s.tokens:,}" if s.tokens else "",
        "time": f"{s.train_seconds:.0f} s training, {s.other_seconds:.0f} s caching and evaluation",
        "peak memory": f"{readable(s.peak_memory)} on {s.device} ({readable(s.train_peak_memory)} in training), {_cache_share(s)}",
        "frozen base": s.precision,
        "privacy of the training rows": s.privacy,
        "prompts cut to fit": f"{s.truncated}",
        "versions": ", ".join(f"{package} {version}" for package, version in s.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return (
        f"# {s.optimizer} on {s.task}\n\n{s.model}, tuned {s.how}.\n\n"
        f"![loss and queries against forward passes, {metric.label} before and after](report.png)\n\n"
        f"| | |\n|---|---|\n{table}\n\n```\n{s.command}\n```\n\n± is one standard error over the rows evaluated on.\n"
    )


def _evaluated(s: Summary) -> str:
    """The rows that the metrics are of."""
    return f"{s.after.rows:,} held out" if s.after.trained_on == 0 else f"evaluated on {s.after.on_rows}"


def _curve(s: Summary) -> str:
    """The held-out evaluations of the way, and whose weights are the run's."""
    metric = METRICS[s.metric]
    shown = [f"{metric.show(math.nan if p['value'] is None else p['value'])} after step {p['step']:,}" for p in s.curve]
    kept = "" if s.kept_step is None else f"; kept: step {s.kept_step:,}, the best of {len(s.curve)} on these rows"
    return ", ".join(shown) + kept if shown else ""


def _regression(s: Summary) -> str:
    """What it reaches on the frozen model's hidden states."""
    if s.regression is None:
        return ""
    better = ", better than the tuned model" if s.regression > s.after.accuracy else ""
    return f"{s.regression:.1%} on the frozen model's hidden states{better}"


def _cost(s: Summary) -> str:
    whole = s.forwards * s.forward_depth + s.prepared_rows / s.batch_size
    cost = f"{s.forwards:,} in training ({s.forwards / s.steps:.3g} a step, batches of {s.batch_size})"
    if not s.queries:
        cost += ", a backward pass counted as two"
    if s.forward_depth < 1:
        cost += f", each through {s.forward_depth:.0%} of the layers, those above the first adapter"
    return f"{cost}; {whole:,.0f} whole passes in all, with one over {s.prepared_rows:,} rows whose prompts were kept"


def _cache_share(s: Summary) -> str:
    elsewhere = {"disk": "on disk", "cpu": "in CPU memory"}.get(s.cache_place)
    if elsewhere is None or (s.cache_place == "cpu" and s.device == "cpu"):
        return f"of which {readable(s.cache_bytes)} kept prompts"
    return f"and {readable(s.cache_bytes)} of kept prompts {elsewhere}"


def draw(metrics: list[dict[str, Any]], s: Summary, path: Path) -> None:
    """Loss against forward passes, the query schedule under it, the primary metric before and after beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained", dpi=160)
    grid = figure.add_gridspec(2, 2, width_ratios=(3.4, 1), height_ratios=(3, 1))
    loss_axes = figure.add_subplot(grid[0, 0])
    lower_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    forwards, losses = ([m[name] for m in metrics] for name in ("forwards", "loss"))
    loss_axes.plot(forwards, losses, ".", color=GREY, markersize=3, label="each step")
    loss_axes.plot(forwards, smooth(losses), color=BLUE, linewidth=2.2, label="running mean")
    loss_axes.axhline(s.before.loss, color=ORANGE, linewidth=1, linestyle="--", label="evaluation, before")
    loss_axes.axhline(s.after.loss, color=ORANGE, linewidth=1.6, label="evaluation, after")
    if s.curve:
        seen = [math.nan if p["loss"] is None else p["loss"] for p in s.curve]
        loss_axes.plot(
            [p["forwards"] for p in s.curve], seen, "o-", color=ORANGE, markersize=4, label="evaluation, on the way"
        )
    loss_axes.set_ylabel("loss")
    finite = sorted(x for x in losses if math.isfinite(x))
    if finite:  # one outlying batch must not flatten the curve
        top = max(finite[int(0.99 * (len(finite) - 1))], s.before.loss, s.after.loss)
        low = min(finite[0], s.after.loss)
        loss_axes.set_ylim(low - 0.05 * (top - low), top + 0.25 * (top - low))
    loss_axes.legend(frameon=False, ncols=2, fontsize=9)
    loss_axes.tick_params(labelbottom=False)
    below = [m["queries" if s.queries else "lr"] for m in metrics]
    lower_axes.step(forwards, below, color=BLUE, where="pre")
    lower_axes.set_ylim(0, 1.25 * max(below, default=1))
    lower_axes.set_ylabel("queries\na step" if s.queries else "lr")
    lower_axes.set_xlabel("forward passes")
    _draw_metric(figure.add_subplot(grid[:, 1]), s)
    metric = METRICS[s.metric]
    name, change = Path(s.model).name, metric.change(s.before.value, s.after.value)
    gained = change if metric.share else f"{metric.label} {change}"
    figure.suptitle(
        f"{name} on {Path(s.task).name}: {gained} in {s.forwards:,} training forward passes, "
        f"{'no backward pass' if s.queries else 'a backward pass counted as two'}",
        fontsize=13,
    )
    save_picture(figure, path)


def _draw_metric(axes: Any, s: Summary) -> None:
    metric, shown = METRICS[s.metric], (s.before, s.after)
    heights, errors = (
        [x * metric.unit if math.isfinite(x) else 0.0 for x in values]
        for values in ([e.value for e in shown], [e.standard_error for e in shown])
    )
    bars = axes.bar(
        ["before", "after"], heights, color=[GREY, BLUE], width=0.62, yerr=errors, capsize=4, ecolor="#4a5568"
    )
    labels = [metric.show(e.value).replace("%", " %") for e in shown]
    axes.bar_label(bars, labels=labels, padding=4, fontsize=11)
    highest = max(h + e for h, e in zip(heights, errors, strict=True))
    axes.set_ylim(0, 105 if metric.share else 1.15 * (highest or 1))
    unit = " (%)" if metric.share else "" if metric.higher_is_better else " (less is better)"
    axes.set_ylabel(f"{metric.label} on {s.after.on_rows}{unit}")


def save_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically; its axes lose their upper and right frame."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def smooth(values: list[float]) -> list[float]:
    """Exponential running mean over a tenth of the run, without the bias of its start; non-finite values are skipped."""
    decay = 1 - 1 / max(len(values) / 10, 2)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(mean / weight if weight else math.nan)
    return smoothed


def _json(plain: dict[str, Any]) -> str:
    """Indented, but lists of numbers on one line."""
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), json.dumps(plain, indent=2))
