"""Encoder-decoders: the prompt is encoded once; label words, or the target, are decoded.

Shape suffixes: B examples, C labels, T tokens of label words or of a target, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Batch, Encoded
from zo_opt.tasks.scoring.labels import LabelScorer, sequence_scores, word_logits
from zo_opt.tasks.scoring.texts import TextScorer, Writer, token_nll


class Seq2SeqScorer(LabelScorer):
    """Labels: each one's words are decoded."""

    def encode(self, example: Example) -> Encoded:
        text, truncated = self.prompt_text(example, room=0)
        return Encoded([self.prompt_ids(text, example)], self.words_of(example), example.label, truncated)

    def scores(self, model: Any, batch: Batch) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        words_BCT = batch["words"]
        B, C, T = words_BCT.shape
        inputs = self.inputs(batch)
        mask, hidden = inputs["attention_mask"], model.get_encoder()(**inputs).last_hidden_state
        decoder_ids = _shifted(model, words_BCT)
        if T == 1:  # the start alone, which all labels share
            decoder_ids = decoder_ids[:, 0]
        else:
            decoder_ids = decoder_ids.flatten(0, 1)
            hidden, mask = hidden.repeat_interleave(C, dim=0), mask.repeat_interleave(C, dim=0)
        outputs = BaseModelOutput(last_hidden_state=hidden)
        logits = model(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        ).logits.float()
        if T == 1:
            return word_logits(logits[:, 0], words_BCT)
        return sequence_scores(logits.unflatten(0, (B, C)), words_BCT)


class Seq2SeqGenerator(Writer, TextScorer):
    """A text to write, with the special tokens that the tokenizer gives it."""

    def encode(self, example: Example) -> Encoded:
        text, truncated = self.prompt_text(example, room=0)
        whole = self.tokens_of(self.markup.as_letters(example.references[0]))
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
        decoder_ids = _shifted(model, targets_BT)
        logits_BTV = model(**self.inputs(batch), decoder_input_ids=decoder_ids, use_cache=False).logits
        return token_nll(logits_BTV.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)


def _shifted(model: Any, words: Tensor) -> Tensor:
    """What the decoder is given to predict tokens from, (..., T): the start, and all of them but the last."""
    start = torch.full_like(words[..., :1], model.config.decoder_start_token_id)
    return torch.cat([start, words[..., :-1].clamp(min=0)], dim=-1)
