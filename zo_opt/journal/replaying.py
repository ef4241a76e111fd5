"""Rebuilding tuned weights from a journal."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zo_opt.errors import ZOError
from zo_opt.journal.format import Header, read_journal
from zo_opt.journal.provenance import (
    check_described,
    difference,
    frozen_state,
    here_in_words,
    progress,
    rebuild,
    tuned_names,
)
from zo_opt.optim import Update, ZerothOrderOptimizer, apply
from zo_opt.system.checksum import fingerprint


def replay(
    path: str | Path,
    model: nn.Module,
    optimizer: ZerothOrderOptimizer | None = None,
    *,
    steps: int | None = None,
    exact: bool = True,
) -> int:
    """Rebuild the tuned weights: apply every recorded step to a model that is as it was at the start. Returns the number of steps.

    Args:
        path: the journal.
        model: base and trainables with the weights, dtypes and ``requires_grad`` that they had at the start; any device.
        optimizer: as it was at the start, of the same options; rebuilt from the journal if None. Afterwards it can go on: its
            tensors and counts are those of training, step control and the query schedule's history are new.
        steps: apply the steps before this one only.
        exact: refuse weights that come out otherwise than in training (another device may round otherwise).

    Raises:
        ZOError: a damaged journal; another base model, other weights at the start or another optimizer (nothing is changed
            then); fewer steps than asked for; or the weights come out otherwise.
    """
    contents = read_journal(path, steps)
    if steps is not None and steps != contents.steps:
        raise ZOError(f"{path} holds steps {contents.start} to {contents.steps}; steps={steps} is not among them.")
    header = contents.header
    _check_model(header, model)
    if optimizer is None:
        optimizer = rebuild(header.optimizer, header.start, model)
    check_described(header.optimizer, optimizer, model)
    found = difference(header.start, progress(optimizer))
    if found is not None or optimizer.state_dict()["state"]:
        raise ZOError(
            f"the optimizer is not as it was when the journal began ({found or 'it has state'}); build it anew."
        )
    there, here = header.machine, here_in_words(optimizer)
    if exact and not contents.weights and there != here and not header.optimizer["portable"]:
        raise ZOError(
            f"the journal was written on {there} and has no fingerprint of later weights, so that a different outcome on {here} "
            "would go unnoticed; replay where it was trained, or pass exact=False to take what comes out."
        )
    tuned = tuned_names(optimizer, model)
    for update in contents.updates:
        _apply(optimizer, update)
        if exact and contents.differs(optimizer.step_count, tuned):
            raise ZOError(
                f"after step {update.step} the weights are not those of training (on {there}; here {here}): replay where it was "
                "trained, since only Rademacher directions with SGD give the same bits everywhere; if that was here, something "
                "else than the optimizer moved the weights. exact=False takes what comes out."
            )
    return len(contents.updates)


def _apply(optimizer: ZerothOrderOptimizer, update: Update) -> None:
    try:
        apply(optimizer, update)
    except ZOError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise ZOError(
            f"step {update.step} cannot be applied ({type(error).__name__}: {str(error)[:200]}): the journal's settings or numbers are none "
            "that training has; restore it from a copy."
        ) from error


def _check_model(header: Header, model: nn.Module) -> None:
    """The base model and the start of the tuned weights are those of the run."""
    parameters = dict(model.named_parameters())
    missing = [name for name in header.parameters if name not in parameters]
    if missing:
        raise ZOError(
            f"this model has no {missing[0]!r}, which was tuned; build it as for training, adapters included."
        )
    tuned = {name: parameters[name] for name in header.parameters}
    if fingerprint(frozen_state(model, tuned.values())) != header.frozen:
        raise ZOError(
            "this is another base model than the journal's (its frozen weights differ in name, shape, dtype or value); load the "
            "one that was trained, in the same precision."
        )
    if fingerprint(tuned) != header.tuned:
        raise ZOError("the weights to be tuned are not those that training began with; load the start, not the result.")
