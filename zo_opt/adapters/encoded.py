"""A frozen encoder in front of an adapted decoder: run once a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from zo_opt.adapters.kept import KeptForward
from zo_opt.prompts.recorder import Recorder
from zo_opt.prompts.states import PromptState


class EncoderForward(KeptForward):
    """Stands in for an encoder that nothing adapts: rows that it saw in the batch before, or that are kept, are not encoded again.

    Args:
        model: an encoder-decoder.
        adapted: paths of its adapted modules.
    """

    def __init__(self, model: Any, adapted: Sequence[str]) -> None:
        super().__init__(model.get_encoder())
        paths = {id(module): name for name, module in model.named_modules()}
        prefix = paths[id(self.body)] + "."
        self.objection = "its encoder is adapted" if any(name.startswith(prefix) for name in adapted) else None
        self.recorder = Recorder(model, self.body, self.plain, nullcontext, (), keeps="output")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        given = self.named(args, kwargs)
        ids, attention, state = given.get("input_ids"), given.get("attention_mask"), self.state
        if state is None and ids is not None and attention is not None:
            state = self.prepare({"input_ids": ids, "attention_mask": attention}, None)
        if state is None or ids is None:
            return self.plain(**given)
        return BaseModelOutput(last_hidden_state=state.ending(state.hidden_NTH, ids.shape[1]))

    def prepare(self, inputs: Mapping[str, Tensor], answers_NS: Tensor | None) -> PromptState | None:
        if self.objection is not None:
            return None
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        return self.recorder.prepare(ids, attention, attention != 0)
