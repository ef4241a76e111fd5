"""Tasks whose answer is a text: learned by teacher forcing, evaluated by what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import IGNORED, Batch, Encoded, pad_words
from zo_opt.tasks.scoring.text import CausalText, TextScorer
from zo_opt.tasks.scoring.writing import Writer


class Generator(Writer, TextScorer):
    """A scorer that writes, too."""

    def most_tokens(self, encoded: Sequence[Encoded]) -> int:
        return self.task.max_new_tokens


class CausalGenerator(CausalText, Generator):
    """Decoder-only models: the target follows the prompt, and the tokenizer's end token the target."""

    def encode(self, example: Example) -> Encoded:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        target, most = self._following(example.references[0]) + end, max(self.max_length // 2, 1)
        cut = len(target) > most  # of a target longer than that the first tokens are learned
        target = target[:most] if cut else target
        text, truncated = self._prompt(example, room=max(len(target), self.task.max_new_tokens))
        prompt = self._ids(text)
        if len(prompt) > 1 and prompt[-1] == self.tokenizer.eos_token_id:
            prompt = prompt[:-1]
        return Encoded([prompt + target], [target], truncated=truncated or cut, references=example.references)

    def prompt(self, encoded: Encoded) -> list[int]:
        return encoded.prompts[0][: len(encoded.prompts[0]) - len(encoded.words[0])]


class Seq2SeqGenerator(Generator):
    """Encoder-decoders: the prompt is encoded, the target decoded with the special tokens that the tokenizer gives it."""

    def encode(self, example: Example) -> Encoded:
        text, truncated = self._prompt(example, room=0)
        target = self._ids(example.references[0])
        if len(target) > self.max_length:
            target, truncated = target[: self.max_length - 1] + target[-1:], True
        return Encoded([self._ids(text)], [target], truncated=truncated, references=example.references)

    def prompt(self, encoded: Encoded) -> list[int]:
        return encoded.prompts[0]

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return super().collate(encoded) | {"words": pad_words(encoded, left=False)}

    def token_losses(self, model: Any, batch: Batch) -> Tensor:
        targets_BT = batch["words"][:, 0]
        start = torch.full_like(targets_BT[:, :1], model.config.decoder_start_token_id)
        decoder_ids = torch.cat([start, targets_BT[:, :-1].clamp(min=0)], dim=1)
        logits_BTV = model(**self.inputs(batch), decoder_input_ids=decoder_ids, use_cache=False).logits.float()
        nll_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
        return nll_N.view_as(targets_BT)
