"""Steps taken again from what a journal has of them, without a forward pass."""

from __future__ import annotations

import torch

from zo_opt.errors import ZOError
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.records import StepRecord, Update


@torch.no_grad()
def apply(optimizer: ZerothOrderOptimizer, update: Update) -> None:
    """Move the weights as one recorded step did: the second half of ``step``, and all that a replay needs.

    Raises:
        ZOError: the update is not of the next step, or its directions hang on a forward pass.
    """
    if optimizer.own_directions:
        raise ZOError(
            f"{optimizer.method.name!r} takes its directions from what forwards show, so that no step is taken again without them."
        )
    if update.step != optimizer.step_count or len(update.lrs) != len(optimizer.param_groups):
        raise ZOError(
            f"an update of step {update.step} with {len(update.lrs)} groups cannot be applied at step "
            f"{optimizer.step_count} with {len(optimizer.param_groups)}; apply every step once, in order."
        )
    optimizer.trainables()
    optimizer.move(update)


@torch.no_grad()
def redo(optimizer: ZerothOrderOptimizer, update: Update, record: StepRecord) -> None:
    """Take a recorded step once more, with all that it left behind: :func:`apply`, and counts, history and step control.

    Args:
        optimizer: at the step before.
        update: what the journal has of the step.
        record: what the step measured; its ``forwards`` are all that the step took, a line search's included.

    Raises:
        ZOError: they are not of the next step.

    >>> whole, again = (torch.nn.Parameter(torch.tensor([3.0, -2.0])) for _ in range(2))
    >>> from zo_opt import MeZO
    >>> one, other = MeZO([whole], lr=0.1), MeZO([again], lr=0.1)
    >>> for _ in range(3):
    ...     loss = one.step(lambda: whole.square().sum())
    ...     redo(other, one.last_update, one.last_record)
    >>> torch.equal(whole, again), other.history == one.history
    (True, True)
    """
    if record.step != update.step:
        raise ZOError(f"the update is of step {update.step} and the record of step {record.step}; give one step's.")
    apply(optimizer, update)
    optimizer.take_in(record)
    if not update.coefficients:
        optimizer.failed_steps += 1
