"""Collects what tt_init needs from a model and its training rows, and places the adapters."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.adapters import AdapterModel, TTConfig, weights
from zo_opt.adapters.tt_init import class_mean_features, component_features, label_word_directions, place
from zo_opt.tasks.evaluation import Prepared, Progress
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Scorer
from zo_opt.tasks.tasks import Task, placeholders


def can_place(scorer: Scorer, task: Task, example: Example) -> bool:
    """Whether hidden states at a label position and fixed, distinct label words are there to place adapters by."""
    fixed = not any(placeholders(words) for words in task.verbalizers.values())
    if not fixed or type(scorer).label_positions is Scorer.label_positions:
        return False
    return len({words[0] for words in scorer.encode(example).words}) == len(task.labels)


@torch.no_grad()
def initialise(
    model: AdapterModel, prepared: Prepared, features: str,
    *, components: int, output_scale: float, batch_size: int, progress: Progress,
) -> None:  # fmt: skip
    """Place every adapter by the hidden states it sees at the label positions of the training rows.

    Args:
        model: with tensor-train adapters that train their mixing cores.
        prepared: the training rows.
        features: "class_means" or "components".
        components: principal components among which discriminants are sought.
        output_scale: norm of the output directions relative to the hidden states' root mean square norm.
        batch_size: rows in a forward.
        progress: told how many rows are done.
    """
    config = model.adapter_config
    assert isinstance(config, TTConfig)
    states, labels = _adapter_inputs(model, prepared, batch_size, progress)
    rows_CH = _label_rows(model, [w[0] for w in prepared.encoded[0].words])
    for name, x_NH in states.items():
        if features == "class_means":
            found = class_mean_features(x_NH, labels, config.bottleneck, components=components)
        else:
            found = component_features(x_NH, config.bottleneck)
        norm = float(x_NH.norm(dim=1).square().mean().sqrt())
        adapter: Any = model.wrapped.get_submodule(name).adapter
        place(adapter, found, label_word_directions(rows_CH, output_scale * norm))


def _adapter_inputs(
    model: AdapterModel, prepared: Prepared, batch_size: int, progress: Progress
) -> tuple[dict[str, Tensor], Tensor]:
    """Each adapter's input at every row's label position, (N, H) float32 on the CPU; and the labels (N,)."""
    seen: dict[str, Tensor] = {}
    collected: dict[str, list[Tensor]] = {name: [] for name in model.adapted}
    labels = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0]
            if name == model.adapted[-1]:
                raise _SeenError

        return hook

    with ExitStack() as hooks:
        for name in model.adapted:
            adapter: Any = model.wrapped.get_submodule(name).adapter
            hooks.callback(adapter.register_forward_pre_hook(watch(name)).remove)
        for indices in prepared.by_length(batch_size):
            batch = prepared.batch(indices)
            with suppress(_SeenError):
                prepared.scores(model, batch)
            places = prepared.scorer.label_positions(batch)
            assert places is not None, "ask can_place() first"
            for name, x in seen.items():
                # Some feed-forwards (OPT's) see all tokens on one axis.
                x_NSH = x if x.ndim == 3 else x.unflatten(0, (-1, batch["input_ids"].shape[-1]))
                collected[name].append(x_NSH[places].float().cpu())
            labels.append(batch["labels"].cpu())
            progress(len(indices))
    return {name: torch.cat(parts) for name, parts in collected.items()}, torch.cat(labels)


def _label_rows(model: AdapterModel, tokens: list[int]) -> Tensor:
    """Rows of the output head for the tokens, times the final norm's weight where the model has one: (C, H), float32."""
    head: Any = model.get_output_embeddings()
    rows: Tensor = weights.rows(head, tokens).cpu()
    base: Any = model.base_model
    for owner in (base, getattr(base, "decoder", None)):
        for name in ("norm", "final_layer_norm", "ln_f"):
            norm = getattr(owner, name, None)
            if norm is not None and norm.weight.shape == rows.shape[1:]:
                return rows * _gain(norm)
    return rows


def _gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies each normalised entry by, (H,): its weight, or one plus its weight (Gemma)."""
    weight: Any = norm.weight
    signs = torch.ones_like(weight, dtype=torch.float32)
    signs[1::2] = -1
    gain: Tensor = ((norm(signs) - norm(-signs)) / (2 * signs)).float().cpu()
    return gain


class _SeenError(Exception):
    pass
