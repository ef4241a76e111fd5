"""Encoder-decoders: the prompt is encoded once; label words, or the target, are decoded.

Shape suffixes: B examples, C labels, T tokens of label words or of a target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zo_opt.models.agreement import decoder_start
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Batch, Encoded, Scorer
from zo_opt.tasks.scoring.labels import LabelScorer, sequence_scores, word_logits
from zo_opt.tasks.scoring.texts import TextScorer, Writer, token_nll
from zo_opt.tasks.tasks import Task


class Seq2Seq(Scorer):
    """What encoder-decoders have in common."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        self._start = decoder_start(model)

    def shifted(self, words: Tensor, begun: Sequence[int] = ()) -> Tensor:
        """What the decoder is given to predict tokens from, (..., 1 + begun + T - 1):
        its start, what it has begun with, and all tokens but the last.
        """
        start = words.new_tensor([self._start, *begun]).expand(*words.shape[:-1], -1)
        return torch.cat([start, words[..., :-1].clamp(min=0)], dim=-1)

    def target_ids(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text that the decoder writes, as transformers makes them: in another language than the prompt's, perhaps."""
        text = self.markup.as_letters(text)
        return list(self.tokenizer(text_target=text, add_special_tokens=special, verbose=False)["input_ids"])


class Seq2SeqScorer(Seq2Seq, LabelScorer):
    """Labels: each one's words are decoded, behind what every target of the tokenizer begins with (BART's ``<s>``, a language)."""

    @cached_property
    def begun(self) -> list[int]:
        """The special tokens that stand before a target's own."""
        whole, own = self.target_ids("a"), self.target_ids("a", special=False)
        return next((whole[:i] for i in range(len(whole)) if own and whole[i : i + len(own)] == own), [])

    def following(self, text: str) -> list[int]:
        """Tokens of a text with which the decoder begins: no matter how the prompt ends."""
        return self.target_ids(text, special=False)

    def encode(self, example: Example) -> Encoded:
        text, truncated = self.prompt_text(example, room=0)
        return Encoded([self.prompt_ids(text, example)], self.words_of(example), example.label, truncated)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        words_BCT = batch["words"]
        B, C, T = words_BCT.shape
        inputs = self.inputs(batch)
        mask, hidden = inputs["attention_mask"], model.get_encoder()(**inputs).last_hidden_state
        decoder_ids = self.shifted(words_BCT, self.begun)
        if T == 1:  # what they begin with, which all labels share
            decoder_ids = decoder_ids[:, 0]
        else:
            decoder_ids = decoder_ids.flatten(0, 1)
            hidden, mask = hidden.repeat_interleave(C, dim=0), mask.repeat_interleave(C, dim=0)
        outputs = BaseModelOutput(last_hidden_state=hidden)
        logits = model(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        ).logits.float()
        if T == 1:
            return word_logits(logits[:, -1], words_BCT)
        return sequence_scores(logits[:, -T:].unflatten(0, (B, C)), words_BCT)


class Seq2SeqGenerator(Seq2Seq, Writer, TextScorer):
    """A text to write, with the special tokens that the tokenizer gives it."""

    def encode(self, example: Example) -> Encoded:
        text, truncated = self.prompt_text(example, room=0)
        whole = self.target_ids(example.references[0])
        target = whole if len(whole) <= self.max_length else whole[: self.max_length - 1] + whole[-1:]
        return Encoded(
            [self.prompt_ids(text, example)],
            [target],
            truncated=truncated,
            references=example.references,
            shortened=target != whole,
        )

    def token_losses(self, model: Any, batch: Batch) -> Tensor:
        targets_BT = batch["words"][:, 0]
        decoder_ids = self.shifted(targets_BT)
        logits_BTV = model(**self.inputs(batch), decoder_input_ids=decoder_ids, use_cache=False).logits
        return token_nll(logits_BTV.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)
