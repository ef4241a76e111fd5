"""Text: learned token by token under teacher forcing, and written.

Shape suffixes: B rows, T target tokens, N = B * T, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.tasks.metrics import GENERATION
from zo_opt.tasks.scoring.base import IGNORED, Batch, Encoded, Measured, Scorer


class TextScorer(Scorer):
    """The mean negative log-likelihood of each row's target tokens, in nats.

    The loss of a batch is the mean of its rows' means: short targets count as much as long ones. [choice] So a row's loss does not
    depend on the rows beside it, and a batch in parts (split queries, micro-batches) has the mean of the parts' losses.
    """

    @abstractmethod
    def token_losses(self, model: Any, batch: Batch) -> Tensor:
        """Negative log-likelihoods, (B, T) float32; 0 where the batch's "words" (B, 1, T) are padding."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return self.losses(model, batch).mean()

    def losses(self, model: Any, batch: Batch) -> Tensor:
        return self.token_losses(model, batch).sum(dim=1) / target_lengths(batch)

    def measure(self, model: Any, batch: Batch) -> Measured:
        rows = self.losses(model, batch).tolist()
        return Measured(sum(rows), len(rows), rows)


class Writer(Scorer):
    """A scorer whose kind of model writes."""

    def prompt(self, encoded: Encoded) -> list[int]:
        """The tokens that the model is given to go on from."""
        return encoded.prompts[0]

    @torch.no_grad()
    def generate(self, model: Any, encoded: Sequence[Encoded], device: torch.device) -> list[str]:
        """What the model writes after each prompt: greedily, with a key-value cache, until an end token or the most tokens of the task
        (of one with labels: of the longest label words).

        The checkpoint's own settings of generation (sampling, penalties) are left aside, but for the tokens it forces.
        """
        prompts = [self.prompt(e) for e in encoded]
        ids = self.padded([prompts], self.pad_id)[0].to(device)
        mask = self.padded([[[1] * len(p) for p in prompts]], 0)[0].to(device)
        writes = self.task.kind == GENERATION
        most = self.task.max_new_tokens if writes else max(len(words) for e in encoded for words in e.words)
        plain = getattr(model, "wrapped", model)  # adapters are inside
        own = plain.generation_config
        # generate() would fill in the checkpoint's settings in one that is given.
        plain.generation_config = self._greedy(own, most)
        try:
            written = plain.generate(input_ids=ids, attention_mask=mask)
        finally:
            plain.generation_config = own
        new = written if plain.config.is_encoder_decoder else written[:, ids.shape[1] :]
        return [str(text) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _greedy(self, own: Any, most_tokens: int) -> Any:
        greedy = type(own)(
            do_sample=False, num_beams=1, max_new_tokens=most_tokens, pad_token_id=self.pad_id,
            eos_token_id=sorted(end_tokens(self.tokenizer, own)) or None,
        )  # fmt: skip
        for name in ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"):
            setattr(greedy, name, copy(getattr(own, name, None)))
        return greedy


def end_tokens(tokenizer: Any, generation_config: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's own settings of generation."""
    ends = getattr(generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def target_lengths(batch: Batch) -> Tensor:
    """Target tokens of each row, (B,)."""
    return (batch["words"][:, 0] != IGNORED).sum(dim=1)


def token_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihoods of tokens, (N,) float32; 0 where they are padding."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="none")
