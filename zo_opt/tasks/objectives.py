"""What a run trains: the loss, or a number that has no gradient, such as 1 - exact match of what the model writes.

Zeroth-order estimates need values alone, so that any number of a batch will do (MeZO tunes accuracy and F1: arXiv 2305.17333, section
3.3). Such a number moves in steps: it takes a larger zo_eps, and batches on which some answers are about to turn.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_opt.choices import Table
from zo_opt.errors import ZOError
from zo_opt.tasks.metrics import CLASSIFICATION, GENERATION, answer, normalise
from zo_opt.tasks.scoring import Batch, Encoded, LabelScorer, Scorer, Writer

LOSS = "loss"
SIGNATURE = "reward(predictions: list[str], references: list[list[str]]) -> list[float]"
ZO_EPS = 0.1  # for objectives that move in steps: benchmarks/objectives.py


class Objective(ABC):
    """A number of a batch that is to become small.

    Attributes:
        trained: what the number is, in words.
        reads_rows: whether it looks at rows as Python values, which copies in one forward do not have.
    """

    trained: str
    reads_rows = False

    @abstractmethod
    def __call__(self, model: Any, scorer: Any, batch: Batch, encoded: Sequence[Encoded]) -> Tensor:
        """The number of each row, (B,), of which the batch's is the mean; or one of the whole batch, ().

        ``encoded``: the rows where ``reads_rows``, else empty.
        """

    def writes(self, scorer: Scorer) -> bool:
        """Whether the model is to write for it, which takes its first layers too."""
        return False


class Accuracy(Objective):
    """The share of labels that are wrong."""

    trained = "1 - accuracy of each batch"

    def __call__(self, model: Any, scorer: LabelScorer, batch: Batch, encoded: Sequence[Encoded]) -> Tensor:
        return (scorer.scores(model, batch).argmax(dim=1) != batch["labels"]).float()


class F1(Objective):
    """1 - F1: of two labels that of the last one, of more the mean over those that occur, as in an evaluation."""

    trained = "1 - F1 of each batch"

    def __call__(self, model: Any, scorer: LabelScorer, batch: Batch, encoded: Sequence[Encoded]) -> Tensor:
        scores_BC = scorer.scores(model, batch)
        return 1 - f1(scores_BC.argmax(dim=1), batch["labels"], scores_BC.shape[1])


class ExactMatch(Objective):
    """The share of rows for which the model writes something else than a right text; of a task of labels: than its label words."""

    trained = "1 - exact match of what the model writes for each batch"
    reads_rows = True

    def writes(self, scorer: Scorer) -> bool:
        return True

    def __call__(self, model: Any, scorer: Any, batch: Batch, encoded: Sequence[Encoded]) -> Tensor:
        texts = scorer.generate(model, encoded, batch["labels"].device)
        pairs = zip(texts, (e.references for e in encoded), strict=True)
        return torch.tensor([float(normalise(answer(t, r)) not in map(normalise, r)) for t, r in pairs])


class Reward(Objective):
    """Minus the mean of the user's own rewards: of the texts that the model writes, or the names of the labels it chooses.

    Args:
        name: "module:function".
        function: ``reward(predictions, references)`` -> one number a row, the larger the better. ``predictions``: what the model wrote
            (its first line, where the right text has one), or the name of the label it chose. ``references``: the right texts of each
            row, at least one, or the name of the right label.

    >>> length = Reward("mine:length", lambda predictions, references: [-len(p) for p in predictions])
    >>> length.rewards(["a", "bcd"], [["a"], ["b"]])
    [-1.0, -3.0]
    """

    trained = "minus the mean reward of each batch"
    reads_rows = True

    def __init__(self, name: str, function: Callable[[list[str], list[list[str]]], Any]) -> None:
        self.name, self.function = name, function

    def writes(self, scorer: Scorer) -> bool:
        return scorer.task.kind == GENERATION

    def __call__(self, model: Any, scorer: Any, batch: Batch, encoded: Sequence[Encoded]) -> Tensor:
        if scorer.task.kind == GENERATION:
            references = [list(e.references) for e in encoded]
            texts = scorer.generate(model, encoded, batch["labels"].device)
            predictions = [answer(t, r) for t, r in zip(texts, references, strict=True)]
        else:
            labels = scorer.task.labels
            predictions = [labels[i] for i in scorer.scores(model, batch).argmax(dim=1).tolist()]
            references = [[labels[e.label]] for e in encoded]
        return -torch.tensor(self.rewards(predictions, references), dtype=torch.float64)

    def rewards(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The rewards, one a row.

        Raises:
            ZOError: the function failed, or gave something else than one finite number a row.
        """
        try:
            found = self.function(predictions, references)
        except Exception as error:
            raise ZOError(
                f"{self.name} failed{_place(error)} with {type(error).__name__}: {error}; mend it."
            ) from error
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple) or not all(isinstance(v, Real) for v in values):
            raise ZOError(f"{self.name} returned {_short(found)}; it must return a list of numbers: {SIGNATURE}.")
        if len(values) != len(predictions):
            raise ZOError(f"{self.name} returned {len(values)} rewards for {len(predictions)} rows; return one a row.")
        for row, value in enumerate(values):
            if not math.isfinite(value):
                raise ZOError(
                    f"{self.name} returned {value} for {predictions[row]!r} (right: {references[row]}); return finite numbers."
                )
        return [float(v) for v in values]


# what a run may train besides the loss; or the user's own reward
OBJECTIVES: Table[Any] = Table(
    "objective", None, {LOSS: None, "accuracy": Accuracy, "f1": F1, "exact_match": ExactMatch}
)


def make_objective(name: str, scorer: Scorer) -> Objective | None:
    """The objective of that name for a task; None stands for the loss.

    Args:
        name: of ``OBJECTIVES``, or "module:function" (:class:`Reward`), whose module is imported.
        scorer: of the task's kind.

    Raises:
        ZOError: the task or the model has no such number, or the user's function cannot be had.
    """
    if name == LOSS:
        return None
    kind = scorer.task.kind
    if kind not in (CLASSIFICATION, GENERATION):
        raise ZOError(f"objective={name!r} needs answers that are right or wrong, which {kind} has not; leave it out.")
    if name in ("accuracy", "f1") and kind == GENERATION:
        raise ZOError(f"objective={name!r} counts labels, of which a generation task has none; give exact_match.")
    if name == "exact_match" and not isinstance(scorer, Writer):
        raise ZOError(
            "objective='exact_match' is of what a model writes, and this kind of model writes nothing for a task of labels; "
            "give --objective accuracy, or load a causal model."
        )
    if name in OBJECTIVES:
        made: Objective = OBJECTIVES[name]()
        return made
    try:
        return Reward(name, OBJECTIVES.find(name))
    except ZOError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise ZOError(
            f"objective={name!r} cannot be imported{_place(error)} ({type(error).__name__}: {error}); mend it."
        ) from error


def check_name(name: str) -> None:
    """Whether a name is an objective's, or looks like module:function.

    Raises:
        ZOError: it is neither.
    """
    if name not in OBJECTIVES and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name):
        raise ZOError(
            f"objective={name!r} is not known; choose one of {', '.join(OBJECTIVES)}, or name a function of yours as my_module:reward."
        )


def f1(predicted_B: Tensor, labels_B: Tensor, classes: int) -> Tensor:
    """F1 of the last of two classes, 0 where it is neither predicted nor right; of more, the mean over classes that occur.

    >>> import torch
    >>> round(float(f1(torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 1]), 2)), 3)
    0.8
    """
    predicted_BC, labels_BC = F.one_hot(predicted_B, classes).float(), F.one_hot(labels_B, classes).float()
    right_C, seen_C = (predicted_BC * labels_BC).sum(0), (predicted_BC + labels_BC).sum(0)
    f1_C = 2 * right_C / seen_C.clamp(min=1)
    return f1_C[1] if classes == 2 else f1_C.sum() / (seen_C > 0).sum()


def _place(error: BaseException) -> str:
    """The line of the user's code where it happened."""
    trace = error.__traceback__
    if isinstance(error, SyntaxError) or trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
