"""What logistic regression on the frozen model's hidden states reaches on the same rows: tuning is to beat it, and the report says if not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
    if task.kind != CLASSIFICATION or not fixed or (counts[counts > 0] < FOLDS).any():
        return None
    with _looked_into(model):
        if model.answers is None:
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


@contextmanager
def _looked_into(model: AdapterModel) -> Iterator[None]:
    """Within this context the model's body can be looked into, whether the run keeps what is frozen of forwards or not."""
    lent = model.answers is None and model.encoder is None
    if lent:
        model.prompt_forward()
    try:
        yield
    finally:
        for forward in (model.answers, model.encoder) if lent else ():
            if forward is not None:
                forward.remove()
        if lent:
            model.answers = model.encoder = None


@torch.no_grad()
def _states(model: AdapterModel, prepared: Prepared, batch_size: int) -> tuple[Any, Any]:
    """At each row's first answer position what leaves a layer at two thirds of the depth, and the body: (rows, hidden) each."""
    answers = model.answers
    assert answers is not None
    layers, positions = answers.recorder.layers, answers.positions
    middle = layers[min(max(round(DEPTH * len(layers)) - 1, answers.recorder.cut), len(layers) - 1)]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    order: list[int] = []
    seen: list[Tensor] = []

    def see(_module: Any, _args: Any, output: Any) -> None:
        if not (answers.trying or positions.asleep):  # else a prompt on its way to being kept
            seen.append(answers.layout.take(output[0] if isinstance(output, tuple) else output))

    handle = middle.register_forward_hook(see)
    try:
        for indices in prepared.by_length(batch_size):
            batch = prepared.batch(indices)
            inputs, several = prepared.scorer.inputs(batch), batch["input_ids"].shape[1]
            first = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
            if positions.everywhere:  # layers see whole sequences, else answers alone
                with positions.given(prepared.scorer.answers(batch)):
                    first = positions.answers(inputs["input_ids"], inputs["attention_mask"]).int().argmax(1)
            end_CNTH = answers.end_of(partial(prepared.scores, model, batch))
            for states, hidden_CNTH in zip(found, (seen.pop(), end_CNTH), strict=True):
                at_NH = hidden_CNTH[0][torch.arange(len(first)), first]
                states.append(at_NH[::several].float().cpu())  # a row's sequences share their prompt
            order += indices
    finally:
        handle.remove()
    back = np.argsort(order)
    middle_states, end_states = (torch.cat(states).numpy()[back] for states in found)
    return middle_states, end_states
