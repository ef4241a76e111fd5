"""The run report: report.md in words and numbers, report.png as a picture, report.html with both, results.json for programs."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

from zo_opt.record.metrics import read_metrics
from zo_opt.record.output import RESULTS_NAME
from zo_opt.record.report_picture import picture
from zo_opt.record.summary import Summary
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import readable
from zo_opt.tasks.metrics import METRICS

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.6rem; margin: 0; }}
p {{ color: #52606d; margin: .25rem 0 1.5rem; }}
img {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; margin: 1.5rem 0; }}
th, td {{ text-align: left; vertical-align: top; padding: .45rem 1rem .45rem 0; border-bottom: 1px solid #e4e7eb; overflow-wrap: anywhere; }}
th {{ font-weight: normal; color: #52606d; white-space: nowrap; }}
pre {{ background: #f5f7fa; padding: .9rem 1rem; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{model}, tuned {how}.</p>
<img alt="loss, queries and metric against forward passes" src="data:image/png;base64,{image}">
<table>
{rows}
</table>
<pre>{command}</pre>
<p>± is one standard error over the rows evaluated on.</p>
</body>
</html>
"""


def write(directory: Path, summary: Summary) -> None:
    """Write report.md, report.png, report.html and, last, results.json: with it the run is finished."""
    image = picture(read_metrics(directory), summary)
    write_atomically(directory / "report.md", markdown(summary).encode())
    write_atomically(directory / "report.png", image)
    write_atomically(directory / "report.html", html(summary, image).encode())
    write_atomically(directory / RESULTS_NAME, (_json(summary.to_dict()) + "\n").encode())


def markdown(s: Summary) -> str:
    """The summary as a short page."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts(s).items())
    return (
        f"# {s.optimizer} on {s.task}\n\n{s.model}, tuned {s.how}.\n\n"
        f"![loss, queries and {METRICS[s.metric].label} against forward passes](report.png)\n\n"
        f"| | |\n|---|---|\n{table}\n\n```\n{s.command}\n```\n\n± is one standard error over the rows evaluated on.\n"
    )


def html(s: Summary, image: bytes) -> str:
    """The same page in one file that needs nothing beside it; ``image``: the picture, PNG."""
    plain = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts(s).items())
    rows = re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", plain)
    title = escape(f"{s.optimizer} on {s.task}")
    return _PAGE.format(
        title=title, model=escape(s.model), how=escape(s.how), image=b64encode(image).decode(), rows=rows, command=escape(s.command),
    )  # fmt: skip


def facts(s: Summary) -> dict[str, str]:
    """What is in the report's table: name -> value, in Markdown; what there is nothing to say of is left out."""
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
    return {name: value for name, value in rows.items() if value}


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
    cost = f"{s.forwards:,} in training ({s.forwards / s.steps:.3g} a step, batches of {s.batch_size})"
    if not s.queries:
        cost += ", a backward pass counted as two"
    if s.forward_depth < 1:
        cost += f", each through {s.forward_depth:.0%} of the layers, those from the first adapter on"
    if s.on_answers:
        return f"{cost}, and of the answers' tokens alone; besides, {s.prepared_rows:,} rows' prompts went through the frozen model"
    whole = s.forwards * s.forward_depth + s.prepared_rows / s.batch_size
    return f"{cost}; {whole:,.0f} whole passes in all, with one over {s.prepared_rows:,} rows whose prompts were kept"


def _cache_share(s: Summary) -> str:
    elsewhere = {"disk": "on disk", "cpu": "in CPU memory"}.get(s.cache_place)
    if elsewhere is None or (s.cache_place == "cpu" and s.device == "cpu"):
        return f"of which {readable(s.cache_bytes)} kept prompts"
    return f"and {readable(s.cache_bytes)} of kept prompts {elsewhere}"


def _json(plain: dict[str, Any]) -> str:
    """Indented, but lists of numbers on one line."""
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), json.dumps(plain, indent=2))
