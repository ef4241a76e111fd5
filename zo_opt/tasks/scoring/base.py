"""Prompts -> tensors -> a loss; for labels by way of one score each.

The score of a label is the log-probability of its label words (whole sequences where they have several tokens), compared among
the labels alone; with a classification head it is the head's logit. Only label positions go through the output head.

Shape suffixes: B examples, C labels, S tokens, T tokens of label words, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.errors import ZOError
from zo_opt.tasks.rows import Example
from zo_opt.tasks.tasks import Task, placeholders

Batch = dict[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompts: one token list, or one a label where label words are part of the sequence.
        words: the label words' tokens, one list a label; of a text to learn, one list of its tokens.
        label: the right label's number.
        truncated: whether text was cut to fit the context.
        references: the right texts: of a generation task, or the right label's words.
    """

    prompts: list[list[int]]
    words: list[list[int]]
    label: int = 0
    truncated: bool = False
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What an evaluation learns from one batch.

    Attributes:
        loss: sum of the losses.
        weight: how many losses that is: rows, or tokens.
        values: one number a row: the label predicted, or the mean loss of its tokens.
        weights: how much each row counts for; empty where all count alike.
    """

    loss: float
    weight: int
    values: list[float]
    weights: list[int] = field(default_factory=list)


class Scorer(ABC):
    """How one kind of model learns one kind of task."""

    pad_left = False

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.max_length = context_length(model, tokenizer, max_length)
        self._forward_arguments = set(inspect.signature(model.forward).parameters)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ZOError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token.")
            tokenizer.pad_token = tokenizer.eos_token

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """Tokenise one example; text too long for the context is cut so that template and label (or target) survive."""

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """Tokenise examples, one for one; running text is cut into other rows than it came in."""
        return [self.encode(e) for e in examples]

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss that is trained: a mean over the batch, a float32 scalar."""

    @abstractmethod
    def losses(self, model: Any, batch: Batch) -> Tensor:
        """The loss of each row, (B,) float32: what ``loss`` is the mean of."""

    @abstractmethod
    def measure(self, model: Any, batch: Batch) -> Measured:
        """What an evaluation needs of a batch."""

    def label_positions(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Rows of the flattened inputs and the position in each from which an example's label is predicted, (B,) each.

        None where this kind of model has no such single position.
        """
        return None

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad to one length: input_ids and attention_mask (B, 1 or C, S), labels (B,)."""
        longest = max(len(p) for e in encoded for p in e.prompts)
        input_ids = torch.tensor(
            [[self._pad(p, longest, self.tokenizer.pad_token_id) for p in e.prompts] for e in encoded]
        )
        mask = torch.tensor([[self._pad([1] * len(p), longest, 0) for p in e.prompts] for e in encoded])
        labels = torch.tensor([e.label for e in encoded])
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _pad(self, ids: list[int], length: int, value: int) -> list[int]:
        filling = [value] * (length - len(ids))
        return filling + ids if self.pad_left else ids + filling

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's arguments, examples and labels flattened into one axis."""
        inputs = {
            "input_ids": batch["input_ids"].flatten(0, 1),
            "attention_mask": batch["attention_mask"].flatten(0, 1),
        }
        if self.pad_left and "position_ids" in self._forward_arguments:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return inputs

    def _prompt(self, example: Example, room: int, **extra: str) -> tuple[str, bool]:
        """The filled template with at least ``room`` tokens of the context to spare; its longest fields are cut if need be."""
        fields, truncated = dict(example.fields), False
        while True:
            text = self.task.template.format(**fields, **extra)
            excess = len(self._ids(text)) + room - self.max_length
            shown = [n for n in placeholders(self.task.template) if n in fields]
            longest = max(shown, key=lambda n: len(fields[n]))
            if excess <= 0:
                return text, truncated
            if not fields[longest]:
                raise ZOError(
                    f"the template alone needs {excess} tokens more than the context of {self.max_length}; shorten it or raise max_length."
                )
            fields[longest], truncated = self._cut(fields[longest], excess), True

    def _cut(self, text: str, tokens: int) -> str:
        """The text without its last tokens (at least one character shorter)."""
        keep = max(len(self._ids(text, special=False)) - tokens, 0)
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
            end = offsets[keep][0] if keep < len(offsets) else len(text) - 1
        else:
            end = len(text) * keep // (keep + tokens)
        return text[: min(end, len(text) - 1)].rstrip()

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _words(self, example: Example) -> list[list[int]]:
        """Tokens of each label's words as they follow the prompt: with the space before them where the template ends in text."""
        words = []
        for label, text in self.task.verbalizers.items():
            filled = text.format(**example.fields)
            ids = self._following(filled)
            if not ids:
                raise ZOError(
                    f"the label words {filled!r} of label {label!r} have no tokens; choose other verbalizers."
                )
            words.append(ids)
        return words

    def _following(self, text: str) -> list[int]:
        """Tokens of a text as it follows the prompt."""
        stem = "a" + self.task.template[len(self.task.template.rstrip()) :]
        space = "" if stem != "a" else " "
        before, both = self._ids(stem, special=False), self._ids(stem + space + text, special=False)
        return both[len(before) :] if both[: len(before)] == before else self._ids(space + text, special=False)


class LabelScorer(Scorer):
    """How one kind of model scores labels."""

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


def context_length(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """The tokens a sequence may have: the least of the model's positions, the tokenizer's limit and ``max_length``."""
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is not None and getattr(config, "model_type", "") in ("roberta", "xlm-roberta"):
        positions -= 2  # its position embeddings start at padding_idx + 1
    limits = [n for n in (positions, tokenizer.model_max_length, max_length) if n is not None]
    limit = int(min(limits, default=1 << 30))
    if limit < 1:
        raise ZOError(f"max_length={max_length} leaves no room for text; give a positive number of tokens.")
    return limit


def word_logits(logits_BV: Tensor, words_BCT: Tensor) -> Tensor:
    """Logits of label words of one token; a softmax over labels restricts the vocabulary to them."""
    return logits_BV.gather(1, words_BCT[:, :, 0])


def sequence_scores(logits_BCTV: Tensor, words_BCT: Tensor) -> Tensor:
    """Sum over the label words' tokens of their log-probabilities; padded positions (IGNORED) count nothing."""
    log_probs = logits_BCTV.log_softmax(-1).gather(-1, words_BCT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    scores: Tensor = (log_probs * (words_BCT != IGNORED)).sum(-1)
    return scores


def pad_words(encoded: Sequence[Encoded], left: bool) -> Tensor:
    """Label words of all examples, shape (B, C, T), padded with IGNORED."""
    longest = max(len(w) for e in encoded for w in e.words)

    def pad(ids: list[int]) -> list[int]:
        filling = [IGNORED] * (longest - len(ids))
        return filling + ids if left else ids + filling

    return torch.tensor([[pad(w) for w in e.words] for e in encoded])
