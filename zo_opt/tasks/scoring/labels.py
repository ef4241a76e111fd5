"""Labels, by way of one score each.

The score of a label is the log-probability of its label words (whole sequences where they have several tokens), compared among
the labels alone; with a classification head it is the head's logit. Only label positions go through the output head.

Shape suffixes: B examples, C labels, T tokens of label words, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from zo_opt.models.agreement import label_outputs, name_outputs, settle_classifier
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import IGNORED, Batch, Encoded, Measured, Scorer
from zo_opt.tasks.tasks import Task, placeholders


class LabelScorer(Scorer):
    """How one kind of model scores labels."""

    def word_notes(self) -> list[str]:
        """What is to be said of its label words: how many tokens they take, where that costs something."""
        words = self.fixed_words
        if words is None or max(map(len, words)) == 1:
            return []
        texts = [text.format() for text in self.task.verbalizers.values()]
        counts = ", ".join(f"{text!r} {len(ids)}" for text, ids in zip(texts, words, strict=True))
        return [
            f"label words take several tokens ({counts}): the model runs {len(words)} sequences a row, one a label, in place of one; words of "
            "one token each are cheaper."
        ]

    @abstractmethod
    def scores(self, model: Any, batch: Batch) -> Tensor:
        """Scores of the labels, float32, shape (B, C)."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross entropy of the scores."""
        # Not the mean of ``losses``: the same to rounding, and these bits are on record in journals.
        return F.cross_entropy(self.scores(model, batch), batch["labels"])

    def losses(self, model: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def measure(self, model: Any, batch: Batch) -> Measured:
        scores = self.scores(model, batch)
        loss = float(F.cross_entropy(scores, batch["labels"], reduction="sum"))
        return Measured(loss, len(scores), scores.argmax(dim=1).tolist())


class ClassificationScorer(LabelScorer):
    """Models with a classification head: the prompt alone, the head's logits as scores.

    Attributes:
        names: what the model's outputs stand for, in their order.
    """

    either_side = True

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        settle_classifier(model, tokenizer)
        self._outputs, self.names, note = label_outputs(model, task.labels, task.label_names)
        self.notes += [note] if note else []
        name_outputs(model, self.names)

    def word_notes(self) -> list[str]:
        return []

    def encode(self, example: Example) -> Encoded:
        mask = {"mask": self.tokenizer.mask_token or ""} if "mask" in placeholders(self.task.template) else {}
        text, truncated = self.prompt_text(example, room=0, **mask)
        return Encoded([self.prompt_ids(text, example)], [], example.label, truncated)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(**self.inputs(batch)).logits.float()
        return logits if self._outputs == sorted(self._outputs) else logits[:, self._outputs]


def word_logits(logits_BV: Tensor, words_BCT: Tensor) -> Tensor:
    """Logits of label words of one token; a softmax over labels restricts the vocabulary to them."""
    return logits_BV.gather(1, words_BCT[:, :, 0])


def sequence_scores(logits_BCTV: Tensor, words_BCT: Tensor) -> Tensor:
    """Sum over the label words' tokens of their log-probabilities; padded positions (IGNORED) count nothing."""
    log_probs = logits_BCTV.log_softmax(-1).gather(-1, words_BCT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    scores: Tensor = (log_probs * (words_BCT != IGNORED)).sum(-1)
    return scores
