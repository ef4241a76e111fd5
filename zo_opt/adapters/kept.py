"""What stands in for a module's forward and keeps what is frozen of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from zo_opt.prompts.recorder import Recorder
from zo_opt.prompts.states import PromptState
from zo_opt.system.replaced import replaced


class KeptForward(ABC):
    """Stands in for a module's forward from the moment that it is made, until ``remove``.

    Args:
        body: the module.

    Attributes:
        body, plain: the module, and its own forward.
        recorder: what the frozen base makes of sequences.
        objection: why nothing can be kept, in words; None where it can, or where that is not tried yet.
        state: sequences that are done, for the next forwards; None: made from what they are given.
    """

    recorder: Recorder
    objection: str | None = None
    depth_share = 1.0  # of the layers, those that run again

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self.plain: Callable[..., Any] = body.forward
        self.state: PromptState | None = None
        body.forward = self.forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.body.forward

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's."""

    @abstractmethod
    def prepare(self, inputs: Mapping[str, Tensor], answers_NS: Tensor | None) -> PromptState | None:
        """Sequences of a batch, done, for :meth:`replaying`; None where they cannot be.

        Args:
            inputs: the model's arguments, sequences first: input_ids, attention_mask and perhaps position_ids.
            answers_NS: the answer positions; None: what the tokens say.
        """

    def replaying(self, state: PromptState) -> AbstractContextManager[None]:
        """Within this context the module goes on from these sequences, whatever else it is given."""
        return replaced(self, state=state)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by their names."""
        return dict(zip(self.recorder.arguments, args, strict=False)) | kwargs
