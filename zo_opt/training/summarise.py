"""From a finished run to the numbers of its report."""

from __future__ import annotations

from zo_opt.adapters import trainable_parameters
from zo_opt.optim import CountingOptimizer
from zo_opt.record.summary import Progress, Summary, versions
from zo_opt.system.memory import peak_memory
from zo_opt.tasks.evaluation import Evaluation
from zo_opt.training.config import TrainConfig
from zo_opt.training.private import spent
from zo_opt.training.setup import Tools


def summarise(
    config: TrainConfig,
    command: str,
    tools: Tools,
    optimizer: CountingOptimizer,
    progress: Progress,
    after: Evaluation,
    kept_step: int | None = None,
) -> Summary:
    """What a run measured, once it is at its end."""
    kept = tools.prompts if tools.prompts is not None and tools.prompts.objection is None else None
    recorder = kept.recorder if kept is not None else None
    store = recorder.store if recorder is not None else None
    trainable = sum(p.numel() for p in trainable_parameters(tools.model))
    moving = tools.model.schedule.moving() if tools.model.schedule is not None else None
    return Summary(
        command=command,
        model=config.model_name_or_path,
        kind=tools.train.scorer.task.kind,
        metric=after.primary,
        task=config.rows_name or config.task,
        optimizer=config.optimizer_name,
        adapter=tools.model.trainable_summary(),
        trainable=trainable,
        trainable_end=trainable if moving is None else moving,
        lr=tools.recipe.lr,
        before=Evaluation.from_dict(progress.before),
        after=after,
        train_rows=len(tools.train),
        steps=optimizer.step_count,
        queries=optimizer.history.queries,
        forwards=optimizer.history.forwards,
        forward_depth=kept.depth_share if kept is not None else 1.0,
        prepared_rows=recorder.recorded if recorder is not None else 0,
        cache_bytes=store.bytes if store is not None else 0,
        cache_place=config.prompt_cache if recorder is not None else "off",
        dropped=optimizer.dropped_queries,
        truncated=tools.train.truncated + tools.held_out.truncated,
        train_seconds=progress.train_seconds,
        other_seconds=progress.other_seconds,
        peak_memory=max(progress.peak_memory, peak_memory(tools.device)),
        train_peak_memory=progress.train_peak_memory,
        adapter_bytes=sum(t.numel() * t.element_size() for t in tools.model.adapter_state().values()),
        device=tools.device.type,
        precision=tools.precision,
        batch_size=config.batch_size,
        versions=versions(),
        privacy=spent(config, optimizer),
        tokens=optimizer.history.tokens,
        on_answers=recorder is not None and recorder.keeps == "keys",
        regression=progress.regression,
        curve=progress.curve,
        kept_step=kept_step,
    )
