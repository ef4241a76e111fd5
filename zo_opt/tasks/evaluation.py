"""Examples ready for a model (tokenised, cached, batched), and how well it does on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.errors import ZOError
from zo_opt.prompts.states import PromptState
from zo_opt.system.plain_json import or_nan, without_nan
from zo_opt.tasks.metrics import (
    CLASSIFICATION,
    GENERATION,
    LANGUAGE_MODELLING,
    METRICS,
    answer,
    classification_metrics,
    describe,
    generation_metrics,
    perplexity,
)
from zo_opt.tasks.objectives import Objective
from zo_opt.tasks.padding import shape_of
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Batch, Encoded, LabelScorer, Measured, Scorer, Writer
from zo_opt.tasks.tasks import Task

Progress = Callable[[int], None]
_PROMPT = "prompt."  # before names of tensors in a batch


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on ``rows`` held-out rows (of running text: blocks).

    Attributes:
        metrics: name -> value, the task's primary metric first; shares are fractions.
        loss: classification: mean cross entropy over label words; generation: mean over rows of the mean negative log-likelihood of
            the target's tokens; language modelling: mean negative log-likelihood of a token, in nats.
        rows: how many.
        row_scores: one number a row, in the rows' order, whose mean is the primary metric: 1 where the label is right, or the text's
            score. Of perplexity: the row's mean negative log-likelihood a token. Meant for intervals and paired comparisons.
        row_weights: of perplexity, the tokens of each row: perplexity is exp of the weighted mean. Else empty.
        trained_on: how many of the rows (of running text: of its lines) were trained on, and so were not held out; None: nobody knows.
    """

    metrics: Mapping[str, float]
    loss: float
    rows: int
    row_scores: Sequence[float] = ()
    row_weights: Sequence[int] = ()
    trained_on: int | None = 0

    @property
    def primary(self) -> str:
        """The name of the metric that counts."""
        return next(iter(self.metrics))

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]

    @property
    def accuracy(self) -> float:
        """The share of right labels; of classification alone."""
        if "accuracy" not in self.metrics:
            raise ZOError(f"there is no accuracy here; this task's metrics are {', '.join(self.metrics)}.")
        return self.metrics["accuracy"]

    @property
    def standard_error(self) -> float:
        """One standard error of the primary metric over the held-out rows (of perplexity: of the mean loss, times the perplexity)."""
        weights = self.row_weights or [1] * len(self.row_scores)
        total, pairs = sum(weights), list(zip(weights, self.row_scores, strict=True))
        mean = sum(w * s for w, s in pairs) / total
        variance = sum((w * (s - mean)) ** 2 for w, s in pairs) / total**2
        return math.sqrt(variance) * (self.value if self.primary == "perplexity" else 1.0)

    def describe(self) -> str:
        """In words."""
        return f"{describe(self.metrics)}, loss {self.loss:.3f} on {self.on_rows}"

    @property
    def on_rows(self) -> str:
        """The rows in words; those that were trained on are never called held out."""
        if self.trained_on == 0:
            return f"{self.rows:,} held-out rows"
        if self.trained_on is None:
            return f"{self.rows:,} rows (whether trained on is not recorded)"
        lines = "lines" if self.row_weights else "of them"
        return f"{self.rows:,} rows ({self.trained_on:,} {lines} trained on)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the metrics by their names; null where a number is not finite."""
        plain: dict[str, Any] = {name: without_nan(value) for name, value in self.metrics.items()}
        plain |= {
            "loss": without_nan(self.loss),
            "rows": self.rows,
            "row_scores": [without_nan(s) for s in self.row_scores],
        }
        plain |= {"row_weights": list(self.row_weights)} if self.row_weights else {}
        return plain | ({"trained_on": self.trained_on} if self.trained_on != 0 else {})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Evaluation:
        """What :meth:`to_dict` gave; null becomes nan."""
        metrics = {name: or_nan(plain[name]) for name in plain if name in METRICS}
        scores = [or_nan(s) for s in plain.get("row_scores", ())]
        return cls(
            metrics,
            or_nan(plain["loss"]),
            plain["rows"],
            scores,
            plain.get("row_weights", ()),
            plain.get("trained_on", 0),
        )


class Prepared:
    """A set of examples as batches for one model: encoded once, what is frozen of their forwards kept where that is on.

    Args:
        examples: what to prepare.
        scorer: how the model learns this task.
        device: where batches go.
        prompts: the model's forward that keeps prompts (``AdapterModel.prompt_forward``), or None.
        objective: what is trained in place of the loss, or None.
        each_row: whether ``loss`` gives the objective of each row, where it has one.
        trained_on: how many of the examples are trained on; None where that is not known.
    """

    def __init__(
        self, examples: Sequence[Example], scorer: Scorer, device: torch.device, prompts: Any,
        objective: Objective | None = None, *, each_row: bool = False, trained_on: int | None = 0,
    ) -> None:  # fmt: skip
        self.encoded = scorer.encode_all(examples)
        scorer.check_tokens(self.encoded)
        self.scorer, self.device, self.prompts, self.objective = scorer, device, prompts, objective
        self.each_row, self.trained_on = each_row, trained_on

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def labels(self) -> list[int]:
        """The right labels' numbers."""
        return [e.label for e in self.encoded]

    @property
    def truncated(self) -> int:
        """Of how many examples the prompt was cut to fit the context."""
        return sum(e.truncated for e in self.encoded)

    @property
    def shortened(self) -> int:
        """Of how many examples the text to learn was cut."""
        return sum(e.shortened for e in self.encoded)

    def subset(self, indices: Sequence[int]) -> Prepared:
        """Some of the examples, with the same cache."""
        some = copy(self)
        some.encoded = [self.encoded[i] for i in indices]
        return some

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All examples in batches of like length; of one and the same shape where the model cannot bear padding."""
        order = sorted(range(len(self)), key=lambda i: max(map(len, self.encoded[i].prompts)))
        groups = [order]
        if not self.scorer.padding_is_harmless:
            order.sort(key=lambda i: shape_of(self.encoded[i]))
            groups = [list(g) for _, g in groupby(order, lambda i: shape_of(self.encoded[i]))]
        return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]

    def record(self, batch_size: int, progress: Progress) -> None:
        """Have what is frozen of these examples' forwards kept."""
        for indices in self.by_length(batch_size):
            self.batch(indices)
            progress(len(indices))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Tensors of these examples, with what is frozen of their forward under "prompt." names where it can be kept."""
        batch = self._on_device(self.scorer.collate([self.encoded[i] for i in indices]))
        if self.objective is not None and self.objective.reads_rows:
            batch["rows"] = torch.tensor(list(indices))
        if self.prompts is None:
            return batch
        state = self.prompts.prepare(self.scorer.inputs(batch), self.scorer.answers(batch))
        if state is None:
            return batch
        several = batch["input_ids"].shape[:2]
        return batch | {_PROMPT + name: tensor.unflatten(0, several) for name, tensor in state.tensors().items()}

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores of the labels, shape (B, C), from kept prompts where the batch has them."""
        assert isinstance(self.scorer, LabelScorer), "only labels are scored"
        with self._going_on(model, batch):
            return self.scorer.scores(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is trained: the objective; else the task's loss, a mean over the batch: of labels the cross entropy, of texts the mean
        over rows of a token's loss.
        """
        if self.objective is None:
            with self._going_on(model, batch):
                return self.scorer.loss(model, batch)
        encoded = [self.encoded[i] for i in batch["rows"].tolist()] if self.objective.reads_rows else []
        with self._going_on(model, batch) if not self.objective.writes(self.scorer) else nullcontext():
            found = self.objective(model, self.scorer, batch, encoded)
        return found if self.each_row else found.mean(dtype=torch.float64)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's loss of each row, (B,): what ``loss`` is the mean of."""
        with self._going_on(model, batch):
            return self.scorer.losses(model, batch)

    def measure(self, model: nn.Module, indices: Sequence[int]) -> Measured:
        """What an evaluation needs of these examples; the model writes where it is to (never from kept prompts)."""
        batch = self.batch(indices)
        with self._going_on(model, batch):
            measured = self.scorer.measure(model, batch)
        if self.scorer.task.kind == GENERATION:
            assert isinstance(self.scorer, Writer)
            measured.texts = self.scorer.generate(model, [self.encoded[i] for i in indices], self.device)
        return measured

    @contextmanager
    def _going_on(self, model: Any, batch: Batch) -> Iterator[None]:
        """Within this context the model goes on from the batch's prompts, and its adapters act where the answers are."""
        with ExitStack() as stack:
            if hasattr(model, "answering"):
                stack.enter_context(model.answering(self.scorer.answers(batch)))
            kept = {
                name.removeprefix(_PROMPT): x.flatten(0, 1) for name, x in batch.items() if name.startswith(_PROMPT)
            }
            if kept and self.prompts is not None:
                stack.enter_context(self.prompts.replaying(PromptState.of(kept)))
            yield

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(model: nn.Module, prepared: Prepared, batch_size: int, progress: Progress = lambda _: None) -> Evaluation:
    """The task's metrics and loss over a set of examples."""
    loss, weight = 0.0, 0
    parts, order = [], []
    for indices in prepared.by_length(batch_size):
        part = prepared.measure(model, indices)
        loss, weight = loss + part.loss, weight + part.weight
        parts.append(part)
        order += indices
        progress(len(indices))

    def of_rows(name: str) -> list[Any]:
        """A number or text of each row, in the rows' order."""
        found = [value for part in parts for value in getattr(part, name)]
        return [value for _, value in sorted(zip(order, found, strict=False), key=itemgetter(0))]

    task, loss = prepared.scorer.task, loss / weight
    metrics, row_scores = _metrics(task, prepared.encoded, loss, of_rows("values"), of_rows("texts"))
    ordered = {name: metrics[name] for name in task.metrics}
    return Evaluation(ordered, loss, len(prepared), row_scores, of_rows("weights"), prepared.trained_on)


def _metrics(
    task: Task, encoded: Sequence[Encoded], loss: float, values: list[Any], texts: list[str]
) -> tuple[dict[str, float], list[float]]:
    """All metrics of a task's kind, and the numbers of each row that the task's primary one is the mean of."""
    if task.kind == CLASSIFICATION:
        labels = [e.label for e in encoded]
        right = [float(v == label) for v, label in zip(values, labels, strict=True)]
        return classification_metrics(values, labels, len(task.labels)), right
    if task.kind == LANGUAGE_MODELLING:
        return {"perplexity": perplexity(loss)}, values
    references = [e.references for e in encoded]
    answers = [answer(text, right) for text, right in zip(texts, references, strict=True)]
    scores = generation_metrics(answers, references)
    return {name: sum(rows) / len(rows) for name, rows in scores.items()}, scores[task.metrics[0]]
