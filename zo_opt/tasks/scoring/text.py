"""Text to be learned token by token: the targets of a generation task, and running text.

Shape suffixes: B rows, T target tokens, S tokens, H hidden, V vocabulary, N = B * T.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.tasks.scoring.base import IGNORED, Batch, Encoded, Measured, Scorer, pad_words
from zo_opt.tasks.scoring.causal import head_is_linear
from zo_opt.tasks.tasks import Task

HEAD_TOKENS = 512  # positions that go through the output head at once: all of a batch's would be its memory peak


class TextScorer(Scorer):
    """The mean negative log-likelihood of each row's target tokens, in nats, under teacher forcing.

    The loss of a batch is the mean of its rows' means: short targets count as much as long ones. [choice] So a row's loss does not
    depend on the rows beside it, and a batch in parts (split queries, micro-batches) has the mean of the parts' losses.
    """

    @abstractmethod
    def token_losses(self, model: Any, batch: Batch) -> Tensor:
        """Negative log-likelihoods, (B, T) float32; 0 where the batch's "words" (B, 1, T) are padding."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return self.losses(model, batch).mean()

    def measure(self, model: Any, batch: Batch) -> Measured:
        rows = self.losses(model, batch).tolist()
        return Measured(sum(rows), len(rows), rows)

    def losses(self, model: Any, batch: Batch) -> Tensor:
        return self.token_losses(model, batch).sum(dim=1) / counts(batch)


class CausalText(TextScorer):
    """Decoder-only models: padded on the left, so that target tokens are the last ones."""

    pad_left = True

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        self._plain_head = head_is_linear(model)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return super().collate(encoded) | {"words": pad_words(encoded, left=True)}

    def token_losses(self, model: Any, batch: Batch) -> Tensor:
        targets_BT = batch["words"][:, 0]
        positions = targets_BT.shape[1] + 1  # each token is predicted from the one before it
        inputs: dict[str, Any] = self.inputs(batch)
        if "use_cache" in self._forward_arguments:
            inputs["use_cache"] = False
        if not self._plain_head:
            if "logits_to_keep" in self._forward_arguments:
                inputs["logits_to_keep"] = positions
            logits_BTV = model(**inputs).logits[:, -positions:-1]
            return _nll(logits_BTV.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)
        hidden_BTH = model.base_model(**inputs).last_hidden_state[:, -positions:-1]
        head = model.get_output_embeddings()
        chunks = zip(hidden_BTH.flatten(0, 1).split(HEAD_TOKENS), targets_BT.flatten().split(HEAD_TOKENS), strict=True)
        return torch.cat([_nll(head(hidden), targets) for hidden, targets in chunks]).view_as(targets_BT)


def counts(batch: Batch) -> Tensor:
    """Target tokens of each row, (B,)."""
    return (batch["words"][:, 0] != IGNORED).sum(dim=1)


def _nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="none")
