"""Tasks whose answer is a text: learned by teacher forcing, evaluated by what the model writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.training.data import Example
from zo_opt.training.scoring.base import IGNORED, Batch, Encoded, pad_words
from zo_opt.training.scoring.text import CausalText, TextScorer


class Generator(TextScorer):
    """A scorer that writes, too."""

    @abstractmethod
    def prompt(self, encoded: Encoded) -> list[int]:
        """The tokens that the model is given to go on from."""

    @torch.no_grad()
    def generate(self, model: Any, encoded: Sequence[Encoded], device: torch.device) -> list[str]:
        """What the model writes after each prompt: greedily, with a key-value cache, until an end token or max_new_tokens.

        The checkpoint's own settings of generation (sampling, penalties) are left aside, but for the tokens it forces.
        """
        prompts = [self.prompt(e) for e in encoded]
        longest = max(map(len, prompts))
        ids = torch.tensor([self._pad(p, longest, self.tokenizer.pad_token_id) for p in prompts], device=device)
        mask = torch.tensor([self._pad([1] * len(p), longest, 0) for p in prompts], device=device)
        plain = getattr(model, "wrapped", model)  # adapters are inside
        with patch.object(plain, "generation_config", self._greedy(plain)):
            written = plain.generate(input_ids=ids, attention_mask=mask)
        new = written if plain.config.is_encoder_decoder else written[:, longest:]
        return [str(text) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _greedy(self, model: Any) -> Any:
        own = model.generation_config
        ends = {self.tokenizer.eos_token_id, *_as_list(own.eos_token_id)} - {None}
        greedy = type(own)(
            do_sample=False, num_beams=1, max_new_tokens=self.task.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
        )  # fmt: skip
        for name in ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"):
            setattr(greedy, name, copy(getattr(own, name, None)))
        return greedy


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


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
