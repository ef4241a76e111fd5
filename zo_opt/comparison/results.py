"""What runs of a method gave, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zo_opt.comparison.runs import Run
from zo_opt.errors import ZOError
from zo_opt.tasks.metrics import perplexity

CONFIDENCE = 0.95
_TRAIN_LOSS_STEPS = 0.1  # of a run's end, over which its training loss is averaged


@dataclass(frozen=True)
class Row:
    """A method's figures: means over the seeds whose runs finished; None where none did."""

    method: str
    state: str  # "finished", "diverged", "failed", "does not fit" or "running": the worst of the seeds'
    reason: str  # why it is not "finished"
    seeds: int
    lr: float | None = None
    lr_at_edge: bool = False  # the smallest or largest that was tried, so that one beyond may be better
    batch_size: int | None = None
    trainable: int | None = None  # parameters trained
    trainable_end: int | None = None  # of them at the end of training
    adapter_bytes: int | None = None  # of all that the frozen model does not have
    peak_memory: int | None = None  # bytes while training, the largest over seeds
    step_seconds: float | None = None  # the median over all steps
    steps: int | None = None
    forwards: int | None = None  # of each run
    search_forwards: int = 0  # of all trials of learning rates
    train_loss: float | None = None
    loss: float | None = None
    metric: str = "accuracy"  # the task's first one: before, after, and its 95 % interval over seeds and rows
    before: float | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None


def summarise(method: str, runs: Sequence[Run], trials: Sequence[Run]) -> Row:
    """One row of the table from a method's runs, finished or not.

    Raises:
        ZOError: the files of one are damaged.
    """
    outcomes = [run.outcome() for run in runs]
    worst = next((o for o in outcomes if o is not None and o.state != "finished"), None)
    state = worst.state if worst is not None else ("finished" if None not in outcomes else "running")
    reason = worst.reason if worst is not None else ""
    if worst is not None and len(runs) > 1:
        alike = sum(o is not None and o.state == state for o in outcomes)
        reason = f"{alike} of {len(runs)} runs; {reason}"
    done = [run for run, o in zip(runs, outcomes, strict=True) if o is not None and o.state == "finished"]
    search = sum(int(steps[-1]["forwards"]) for t in trials if (steps := t.steps_done()))
    if not done:
        return Row(method, state, reason, 0, search_forwards=search)
    results = [found for run in done if (found := run.results()) is not None]  # which those that finished have
    curves = [run.steps_done() for run in done]
    first = results[0]
    for run, result, curve in zip(done, results, curves, strict=True):
        measured = [(r["metric"], len(r["after"]["row_scores"])) for r in (result, first)]
        if not curve or measured[0] != measured[1]:
            raise ZOError(
                f"{run.directory} is damaged (metrics.jsonl has no whole line, or results.json is of other rows than another seed's); delete "
                "its results.json and resume: the run is made again."
            )
    tried = [trial.config.lr for trial in trials if trial.config.lr is not None]
    metric = first["metric"]
    scores_SR = np.array([r["after"]["row_scores"] for r in results], dtype=float)
    low, high = interval(scores_SR, first["after"].get("row_weights"))
    loss = _mean([r["after"]["loss"] for r in results])
    score = _mean([r["after"][metric] for r in results])
    if metric == "perplexity":  # its rows hold the logarithms, and so does the mean over seeds
        low, high, score = perplexity(low), perplexity(high), perplexity(loss)
    same = ("lr", "batch_size", "trainable", "trainable_end", "adapter_bytes", "steps", "forwards")  # for all seeds
    return Row(
        method, state, reason, len(done), **{name: first[name] for name in same}, metric=metric,
        lr_at_edge=bool(tried) and first["lr"] in (min(tried), max(tried)),
        peak_memory=max(r["train_peak_memory"] for r in results),
        step_seconds=float(np.median(np.concatenate([step_seconds(c) for c in curves]))),
        search_forwards=search, train_loss=_mean([end_loss(c) for c in curves]), loss=loss,
        before=_mean([r["before"][metric] for r in results]), score=score, low=low, high=high,
    )  # fmt: skip


def unlearned(method: str, trials: Sequence[Run]) -> Row:
    """The row of a method none of whose learning rates did."""
    failed = [o for run in trials if (o := run.outcome()) is not None and o.state == "failed"]
    if failed:
        return Row(method, "failed", failed[0].reason, 0)
    return Row(method, "diverged", "no learning rate gave a finite loss", 0)


def interval(scores_SR: np.ndarray[Any, Any], row_weights: Sequence[float] | None = None) -> tuple[float, float]:
    """A 95 % interval of the (weighted) mean over other seeds and other rows than these S seeds and R rows.

    The rows are the same for every seed, so that a row's difficulty is drawn once for all seeds (crossed, not nested). The
    variance of the mean is that of crossed random effects, (MS_S + MS_R - MS_SR) / (S R) with the mean squares of seeds, rows
    and what is left; Student's t has Satterthwaite's degrees of freedom. [choice] No bootstrap: drawn from two or three seeds it
    is too narrow (80 % instead of 95 % where seeds differ a lot). With one seed the interval speaks of rows alone.

    >>> low, high = interval(np.repeat([[0.0, 1.0]], 50, axis=0).repeat(50, axis=1))
    >>> 0.38 < low < 0.42 < 0.58 < high < 0.62
    True
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    seeds, rows = scores_SR.shape
    own_R = np.ones(rows) if row_weights is None else np.asarray(row_weights, dtype=float)
    share_R = own_R / own_R.sum()
    mean = float((scores_SR @ share_R).mean())
    linear_SR = mean + rows * share_R * (scores_SR - mean)  # whose plain mean has the weighted mean's variance
    of_rows_R, of_seeds_S = linear_SR.mean(0), linear_SR.mean(1)
    free_S, free_R = seeds - 1, rows - 1
    ms_R = seeds * np.square(of_rows_R - mean).sum() / max(free_R, 1)
    if seeds == 1:
        total, freedom = ms_R, max(free_R, 1)
    else:
        ms_S = rows * np.square(of_seeds_S - mean).sum() / free_S
        rest_SR = linear_SR - of_rows_R - of_seeds_S[:, None] + mean
        ms_SR = np.square(rest_SR).sum() / max(free_S * free_R, 1)
        total = max(ms_S + ms_R - ms_SR, ms_S, ms_R)  # components of variance are not negative
        parts = ms_S**2 / free_S + ms_R**2 / max(free_R, 1) + ms_SR**2 / max(free_S * free_R, 1)
        freedom = max(total**2 / parts, 1.0) if parts > 0 else 1.0
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2) * math.sqrt(total / (seeds * rows)))
    return max(mean - half, float(scores_SR.min())), min(mean + half, float(scores_SR.max()))


def end_loss(curve: Sequence[dict[str, Any]]) -> float:
    """Mean training loss over the last tenth of a run's steps."""
    last = curve[-max(1, math.ceil(_TRAIN_LOSS_STEPS * len(curve))) :]
    return _mean([line["loss"] for line in last if math.isfinite(line["loss"])])


def step_seconds(curve: Sequence[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Seconds of each step; of the first one too where it is the only one."""
    times = np.array([line["seconds"] for line in curve])
    return np.diff(times) if len(times) > 1 else times


def _mean(values: Sequence[float | None]) -> float:
    """nan where a number is null in JSON, which has no other way to say that it is not finite."""
    with np.errstate(over="ignore"):  # of perplexities
        return float(np.mean([math.nan if v is None else v for v in values])) if values else math.nan
