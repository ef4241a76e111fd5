"""What logistic regression on the frozen model's hidden states reaches on the same rows: tuning is to beat it, and the report says if not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.metrics import CLASSIFICATION
from zo_opt.tasks.tasks import placeholders

DEPTH = 2 / 3  # besides the last layer's states, those at this depth: the better ones on the training rows are taken
STRENGTHS = np.logspace(-5, 0, 6)
FOLDS = 3


def regression_accuracy(model: AdapterModel, train: Prepared, held_out: Prepared, batch_size: int) -> float | None:
    """The accuracy on the held-out rows; None where it means nothing: labels whose words change from row to row, no body to look into.

    Layer and regularisation are chosen by cross-validation on the training rows.

    Args:
        model: its adapters as they start, of no effect.
        train, held_out: rows with labels.
        batch_size: rows in a forward.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    task = train.scorer.task
    fixed = not any(placeholders(words) for words in task.verbalizers.values())
    counts = np.bincount(train.labels) if task.kind == CLASSIFICATION else np.zeros(1)
    if task.kind != CLASSIFICATION or not fixed or model.answers is None or (counts[counts > 0] < FOLDS).any():
        return None
    states = [_states(model, rows, batch_size) for rows in (train, held_out)]
    found = []
    for layer in range(2):
        fit = make_pipeline(
            StandardScaler(),
            LogisticRegressionCV(
                Cs=STRENGTHS, cv=FOLDS, max_iter=300, l1_ratios=(0,), use_legacy_attributes=False, scoring="accuracy"
            ),
        )
        fit.fit(states[0][layer], train.labels)
        inner: Any = fit[-1]
        found.append(
            (float(np.max(np.mean(inner.scores_, axis=0))), float(fit.score(states[1][layer], held_out.labels)))
        )
    return max(found)[1]


@torch.no_grad()
def _states(model: AdapterModel, prepared: Prepared, batch_size: int) -> tuple[Any, Any]:
    """At each row's first answer position what leaves a layer at two thirds of the depth, and the body: (rows, hidden) each."""
    answers = model.answers
    assert answers is not None
    layers, cut = answers.recorder.layers, answers.recorder.cut
    middle = layers[min(max(round(DEPTH * len(layers)) - 1, cut), len(layers) - 1)]
    found: list[list[Tensor]] = [[], []]
    order: list[int] = []
    first: list[Tensor] = []  # places of the batch's first answer tokens, where a layer sees whole sequences

    def see(_module: Any, _args: Any, output: Any) -> None:
        if answers.trying or answers.positions.asleep:  # a prompt on its way to being kept
            return
        at = answers.layout.take(output[0] if isinstance(output, tuple) else output)[0]
        found[0].append(at[torch.arange(len(at)), first[-1]] if first[-1].numel() else at[:, 0])

    def end(hidden_CNTH: Tensor) -> Tensor:
        at = hidden_CNTH[0]
        found[1].append(at[torch.arange(len(at)), first[-1]] if first[-1].numel() else at[:, 0])
        raise _EndedError

    handle = middle.register_forward_hook(see)
    answers.ended = end
    try:
        for indices in prepared.by_length(batch_size):
            batch = prepared.batch(indices)
            inputs, several = prepared.scorer.inputs(batch), batch["input_ids"].shape[1]
            whole = answers.positions.everywhere
            mask = prepared.scorer.answers(batch)
            places = answers.positions.answers(inputs["input_ids"], inputs["attention_mask"]) if mask is None else mask
            first.append(places.int().argmax(1) if whole else places.new_empty(0, dtype=torch.long))
            before = [len(x) for x in found]
            with suppress(_EndedError):
                prepared.scores(model, batch)
            for x, start in zip(found, before, strict=True):
                x[start:] = [torch.cat(x[start:])[::several].float().cpu()]  # a row's sequences share their prompt
            order += indices
    finally:
        handle.remove()
        answers.ended = None
    back = np.argsort(order)
    return tuple(torch.cat(x).numpy()[back] for x in found)  # type: ignore[return-value]


class _EndedError(Exception):
    pass
