"""Examples ready for a model (tokenised, cached, batched), and accuracy on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.training.data import Example
from zo_opt.training.prefix_cache import PrefixCache
from zo_opt.training.scoring import Batch, Scorer

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (a fraction) and mean loss on ``rows`` examples."""

    accuracy: float
    loss: float
    rows: int

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


class Prepared:
    """A set of examples as batches for one model: encoded once, their frozen prefixes cached where that is on.

    Args:
        examples: what to prepare.
        scorer: how the model scores labels.
        device: where batches go.
        cache: the prefix cache, shared by all sets of a run, or None.
        offset: this set's first key in the cache.
    """

    def __init__(
        self, examples: Sequence[Example], scorer: Scorer, device: torch.device, cache: PrefixCache | None, offset: int
    ) -> None:
        self.encoded = [scorer.encode(e) for e in examples]
        self.scorer, self.device, self._cache, self._offset = scorer, device, cache, offset
        self.labels = [e.label for e in examples]
        self.truncated = sum(e.truncated for e in self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All examples in batches of like length."""
        order = sorted(range(len(self)), key=lambda i: max(map(len, self.encoded[i].prompts)))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def record(self, batch_size: int, progress: Progress) -> None:
        """Fill the prefix cache with these examples."""
        for indices in self.by_length(batch_size):
            if self._cache is not None:
                batch = self._plain(indices)
                self._cache.record(self._keys(indices), self.scorer.inputs(batch), batch["attention_mask"])
            progress(len(indices))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Tensors of these examples, with their cached prefix states under "prefix" if all of them are kept."""
        batch = self._plain(indices)
        if self._cache is not None:
            states = self._cache.batch(self._keys(indices), batch["attention_mask"])
            if states is not None:
                batch["prefix"] = states
        return batch

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores of the labels, shape (B, C), by way of the cached prefix where the batch has it."""
        prefix = batch.get("prefix")
        if prefix is None or self._cache is None:
            return self.scorer.scores(model, batch)
        with self._cache.replay(prefix.flatten(0, 1)):
            return self.scorer.scores(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy of the scores: the loss that is trained and evaluated."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"])

    def _keys(self, indices: Sequence[int]) -> list[int]:
        return [self._offset + i for i in indices]

    def _plain(self, indices: Sequence[int]) -> Batch:
        batch = self.scorer.collate([self.encoded[i] for i in indices])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(model: nn.Module, prepared: Prepared, batch_size: int, progress: Progress = lambda _: None) -> Evaluation:
    """Accuracy and mean loss over a set of examples."""
    right, loss = 0, 0.0
    for indices in prepared.by_length(batch_size):
        batch = prepared.batch(indices)
        scores = prepared.scores(model, batch)
        right += int((scores.argmax(dim=1) == batch["labels"]).sum())
        loss += float(F.cross_entropy(scores, batch["labels"], reduction="sum"))
        progress(len(indices))
    return Evaluation(right / len(prepared), loss / len(prepared), len(prepared))
