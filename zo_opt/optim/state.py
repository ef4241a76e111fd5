"""What of an optimizer outlasts it: states that are saved and loaded, copies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from zo_opt.distributed.ranks import Ranks
from zo_opt.errors import ZOError
from zo_opt.optim.axis import AxisOptimizer

_DECISIVE = ("estimator", "directions", "query_schedule", "update_rule", "step_control", "line_search")
# Of schedules: what follows from a run's length, which may grow.
_OF_RUN = ("steps", "steps_per_epoch", "forwards_per_query", "forwards_per_step")


class KeepsState(AxisOptimizer):
    """The state of a zeroth-order optimizer: all that its next step depends on."""

    caches: ClassVar[tuple[str, ...]] = ("_slots", "_pieces", "_directions", "_variances", "_evaluated")
    ranks: Ranks | None
    pending: list[Any]
    update_count: int
    estimator_memory: dict[str, Tensor]
    _control: list[dict[str, float]]

    def described(self) -> dict[str, Any]:
        own = {name: getattr(self, name, None) for name in self.method.own}
        plain = self.choices.plain()
        found = super().described() | {k: v for k, v in own.items() if isinstance(v, int | float | str)}
        found |= {name: plain[name] for name in _DECISIVE}
        found["query_schedule"] = {k: v for k, v in plain["query_schedule"].items() if k not in _OF_RUN}
        described: dict[str, Any] = json.loads(json.dumps(found, default=lambda value: type(value).__qualname__))
        return described

    def progress(self) -> dict[str, Any]:
        if self.pending:
            raise ZOError("state_dict() was called between estimate() and step(); call step() first.")
        return super().progress() | {
            "seed": self.setting.seed,
            "zo_eps": self.choices.zo_eps,
            "updates": self.update_count,
            "step_control": [dict(memory) for memory in self._control],
            "estimator": self.choices.estimator.state_dict(),
        }

    def load_progress(self, zo: dict[str, Any]) -> None:
        super().load_progress(zo)
        self.setting = replace(self.setting, seed=int(zo["seed"]))
        self.choices = replace(self.choices, zo_eps=float(zo["zo_eps"]))
        self.forget_axis()  # its directions know the seed
        self.update_count = int(zo["updates"])
        self._control = [dict(memory) for _, memory in zip(self._control, zo["step_control"], strict=True)]

    def check_state(self, state_dict: dict[str, Any]) -> None:
        if bool(state_dict["zo"].get("estimator")) != bool(self.choices.estimator.state_dict()):
            raise ZOError(
                "this state and this optimizer differ in privacy: one has it, the other has not; give it to both."
            )
        super().check_state(state_dict)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "memory": {name: tensor.clone() for name, tensor in self.estimator_memory.items()}
        }

    def take_state(self, state_dict: dict[str, Any]) -> None:
        super().take_state(state_dict)
        self.estimator_memory = {name: tensor.clone() for name, tensor in state_dict.get("memory", {}).items()}
        # torch casts state to the parameters' dtype; ours is float32 whatever they are.
        for parameter, saved in self.saved_slots(state_dict):
            for name, tensor in saved.items():
                self.state[parameter][name] = tensor.to(parameter.device, copy=True)
        self.pending = []
        self.forget_axis()
        if self.ranks is not None:
            self.ranks.compare_anew()
        self.choices.estimator.load_state_dict(state_dict["zo"]["estimator"])  # last: it is no part of the optimizer

    def __getstate__(self) -> dict[str, Any]:
        if self.pending:
            raise ZOError("the optimizer was copied between estimate() and step(); call step() first.")
        if self.setting.privacy is not None:
            raise ZOError(
                "an optimizer with privacy was copied, and both copies' steps would be accounted for once; go on with its state_dict() "
                "in an optimizer of its own."
            )
        return super().__getstate__() | dict.fromkeys(self.caches)
