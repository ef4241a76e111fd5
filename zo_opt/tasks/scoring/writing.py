"""What a model writes after a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any
from unittest.mock import patch

import torch

from zo_opt.tasks.scoring.base import Encoded, Scorer


class Writer(Scorer):
    """A scorer whose kind of model writes."""

    @abstractmethod
    def prompt(self, encoded: Encoded) -> list[int]:
        """The tokens that the model is given to go on from."""

    @abstractmethod
    def most_tokens(self, encoded: Sequence[Encoded]) -> int:
        """The most tokens that are written for these rows."""

    @torch.no_grad()
    def generate(self, model: Any, encoded: Sequence[Encoded], device: torch.device) -> list[str]:
        """What the model writes after each prompt: greedily, with a key-value cache, until an end token or ``most_tokens``.

        The checkpoint's own settings of generation (sampling, penalties) are left aside, but for the tokens it forces.
        """
        prompts = [self.prompt(e) for e in encoded]
        longest = max(map(len, prompts))
        ids = torch.tensor([self._pad(p, longest, self.tokenizer.pad_token_id) for p in prompts], device=device)
        mask = torch.tensor([self._pad([1] * len(p), longest, 0) for p in prompts], device=device)
        plain = getattr(model, "wrapped", model)  # adapters are inside
        with patch.object(plain, "generation_config", self._greedy(plain, self.most_tokens(encoded))):
            written = plain.generate(input_ids=ids, attention_mask=mask)
        new = written if plain.config.is_encoder_decoder else written[:, longest:]
        return [str(text) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _greedy(self, model: Any, most_tokens: int) -> Any:
        own = model.generation_config
        ends = {self.tokenizer.eos_token_id, *_as_list(own.eos_token_id)} - {None}
        greedy = type(own)(
            do_sample=False, num_beams=1, max_new_tokens=most_tokens, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
        )  # fmt: skip
        for name in ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"):
            setattr(greedy, name, copy(getattr(own, name, None)))
        return greedy


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
