"""Examples ready for a model (tokenised, cached, batched), and accuracy on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
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
    """

    def __init__(
        self, examples: Sequence[Example], scorer: Scorer, device: torch.device, cache: PrefixCache | None
    ) -> None:
        self.encoded = [scorer.encode(e) for e in examples]
        self.scorer, self.device, self._cache = scorer, device, cache
        self.labels = [e.label for e in examples]
        self.truncated = sum(e.truncated for e in self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    def subset(self, indices: Sequence[int]) -> Prepared:
        """Some of the examples, with the same cache."""
        some = copy(self)
        some.encoded = [self.encoded[i] for i in indices]
        some.labels = [self.labels[i] for i in indices]
        some.truncated = sum(e.truncated for e in some.encoded)
        return some

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All examples in batches of like length."""
        order = sorted(range(len(self)), key=lambda i: max(map(len, self.encoded[i].prompts)))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def record(self, batch_size: int, progress: Progress) -> None:
        """Fill the prefix cache with these examples."""
        for indices in self.by_length(batch_size):
            if self._cache is not None:
                self._record(self._cache, self._plain(indices))
            progress(len(indices))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Tensors of these examples, with their cached prefix states under "prefix" if all of them are kept."""
        plain, cache = self._plain(indices), self._cache
        batch = self._on_device(plain)
        if cache is None:
            return batch
        damaged = cache.store.damaged
        states = cache.batch(plain)
        if cache.store.damaged > damaged:  # computed anew, once
            self._record(cache, plain)
            states = cache.batch(plain)
        return batch if states is None else batch | {"prefix": states}

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

    def _record(self, cache: PrefixCache, plain: Batch) -> None:
        cache.record(plain, self.scorer.inputs(self._on_device(plain)))

    def _plain(self, indices: Sequence[int]) -> Batch:
        return self.scorer.collate([self.encoded[i] for i in indices])

    def _on_device(self, batch: Batch) -> Batch:
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
