"""GRZO: a direction for every example of the batch, for two forwards in all (arXiv 2606.02857)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from zo_opt.directions import Directions
from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.step_control import DivideBySpread, StepControl
from zo_opt.schedules import QuerySchedule


class GRZO(ZerothOrderOptimizer):
    """theta <- theta - lr * mean_i d_i / std(d) * z_i, d_i the two-sided difference of example i along its own direction z_i.

    Source: arXiv 2606.02857. Directions are sign-flip factorised (:class:`~zo_opt.directions.SignFlip`); query mode is split
    with as many queries as examples (a schedule given here may ask for fewer). lr is in parameter units a step. Other
    arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    Args:
        module: the module that owns the parameters.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = GRZO(model.parameters(), module=model, lr=0.02, seed=0)
    >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    >>> batch = {"x": x, "y": x.sum(1, keepdim=True)}
    >>> for _ in range(400):
    ...     loss = optimizer.step(lambda b: (model(b["x"]) - b["y"]).square().mean(), batch)
    >>> bool(loss < 0.1), optimizer.last_record.queries, optimizer.last_record.forwards
    (True, 8, 2)
    """

    name = "grzo"
    own_directions = True
    lr_is_a_length = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-5,
        module: nn.Module | None = None,
        directions: str | Directions = "sign-flip",
        query_schedule: QuerySchedule | None = None,
        query_mode: str = "split",
        distributed: Distributed | None = None,
        step_control: Sequence[StepControl] = (),
        **options: Any,
    ) -> None:
        splits = query_mode == "split" or (distributed is not None and distributed.within == "split")
        if query_schedule is None and not splits:
            raise ZOError(f'query_mode="{query_mode}" does not split the batch; pass GRZO a query_schedule with it.')
        every_example = query_schedule if query_schedule is not None else lambda step, epoch, history: 1 << 30
        super().__init__(
            params,
            lr=lr,
            module=module,
            directions=directions,
            query_schedule=every_example,
            query_mode=query_mode,
            distributed=distributed,
            step_control=(DivideBySpread(), *step_control),
            **options,
        )
