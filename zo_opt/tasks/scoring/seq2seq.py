"""Encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Batch, Encoded, LabelScorer, pad_words, sequence_scores, word_logits


class Seq2SeqScorer(LabelScorer):
    """Encoder-decoders: the prompt is encoded once, each label's words are decoded."""

    def encode(self, example: Example) -> Encoded:
        text, truncated = self._prompt(example, room=0)
        return Encoded([self._ids(text)], self._words(example), example.label, truncated)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return super().collate(encoded) | {"words": pad_words(encoded, left=False)}

    def scores(self, model: Any, batch: Batch) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        words_BCT = batch["words"]
        B, C, T = words_BCT.shape
        inputs = self.inputs(batch)
        mask, hidden = inputs["attention_mask"], model.get_encoder()(**inputs).last_hidden_state
        start = torch.full_like(words_BCT[:, :, :1], model.config.decoder_start_token_id)
        if T == 1:
            decoder_ids = start[:, 0]
        else:
            decoder_ids = torch.cat([start, words_BCT[:, :, :-1].clamp(min=0)], dim=2).flatten(0, 1)
            hidden, mask = hidden.repeat_interleave(C, dim=0), mask.repeat_interleave(C, dim=0)
        outputs = BaseModelOutput(last_hidden_state=hidden)
        logits = model(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        ).logits.float()
        if T == 1:
            return word_logits(logits[:, 0], words_BCT)
        return sequence_scores(logits.unflatten(0, (B, C)), words_BCT)
