"""Models with a classification head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Batch, Encoded, LabelScorer
from zo_opt.tasks.tasks import placeholders


class ClassificationScorer(LabelScorer):
    """Models with a classification head: the prompt alone, the head's logits as scores."""

    def encode(self, example: Example) -> Encoded:
        mask = {"mask": self.tokenizer.mask_token or ""} if "mask" in placeholders(self.task.template) else {}
        text, truncated = self._prompt(example, room=0, **mask)
        return Encoded([self._ids(text)], [], example.label, truncated)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(**self.inputs(batch)).logits.float()
        return logits
