"""A frozen encoder in front of an adapted decoder: run once a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from zo_opt.prompts.recorder import Recorder
from zo_opt.prompts.states import PromptState


class EncoderForward:
    """Stands in for an encoder that nothing adapts: rows that it saw in the batch before, or that are kept, are not encoded again.

    Args:
        model: an encoder-decoder.
        adapted: paths of its adapted modules.

    Attributes:
        recorder: what the encoder makes of rows.
        objection: why rows are encoded anew each time, in words; None where they need not be.
        state: rows that are done, for the next forwards; None: found by what they are given.
    """

    def __init__(self, model: Any, adapted: Sequence[str]) -> None:
        self.body: nn.Module = model.get_encoder()
        self._plain = self.body.forward
        paths = {id(module): name for name, module in model.named_modules()}
        prefix = paths[id(self.body)] + "."
        self.objection = "its encoder is adapted" if any(name.startswith(prefix) for name in adapted) else None
        self.recorder = Recorder(model, self.body, self._plain, nullcontext, (), keeps="output")
        self.state: PromptState | None = None
        self.body.forward = self.forward

    def remove(self) -> None:
        """Give the encoder its own forward back."""
        del self.body.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's forward."""
        from transformers.modeling_outputs import BaseModelOutput

        given = dict(zip(self.recorder.arguments, args, strict=False)) | kwargs
        ids, attention, state = given.get("input_ids"), given.get("attention_mask"), self.state
        if state is None and ids is not None and attention is not None and self.objection is None:
            state = self.prepare({"input_ids": ids, "attention_mask": attention}, None)
        if state is None or ids is None:
            return self._plain(**given)
        return BaseModelOutput(last_hidden_state=state.ending(state.hidden_NTH, ids.shape[1]))

    def prepare(self, inputs: Mapping[str, Tensor], answers_NS: Tensor | None) -> PromptState | None:
        """Rows of a batch, encoded, for :meth:`replaying`; None where that cannot be."""
        if self.objection is not None:
            return None
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        return self.recorder.prepare(ids, attention, attention != 0)

    @contextmanager
    def replaying(self, state: PromptState) -> Iterator[None]:
        """Within this context the encoder gives these rows' states."""
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before
