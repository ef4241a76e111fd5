"""How each kind of model scores labels: one file a kind."""

from __future__ import annotations

from typing import Any

from zo_opt.errors import ZOError
from zo_opt.training.scoring.base import Batch, Encoded, Scorer
from zo_opt.training.scoring.causal import CausalScorer
from zo_opt.training.scoring.classification import ClassificationScorer
from zo_opt.training.scoring.masked import MaskedScorer
from zo_opt.training.scoring.seq2seq import Seq2SeqScorer
from zo_opt.training.tasks import Task, placeholders


def make_scorer(model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> Scorer:
    """The scorer for a model of transformers, by the kind of its head.

    Raises:
        ZOError: the model has no head that scores labels.
    """
    architecture = type(model).__name__
    kinds: dict[str, type[Scorer]] = {
        "ForSequenceClassification": ClassificationScorer,
        "ForMaskedLM": MaskedScorer,
        "ForConditionalGeneration": Seq2SeqScorer,
        "ForCausalLM": CausalScorer,
        "LMHeadModel": CausalScorer,
    }
    for ending, kind in kinds.items():
        if architecture.endswith(ending):
            if "mask" in placeholders(task.template) and kind not in (MaskedScorer, ClassificationScorer):
                raise ZOError(
                    f"the template {task.template!r} has a {{mask}}, which {architecture} does not predict; leave it out."
                )
            return kind(model, tokenizer, task, max_length)
    raise ZOError(
        f"{architecture} has no output head that can score labels; load a causal, masked, encoder-decoder or sequence-classification model."
    )


__all__ = ["Batch", "Encoded", "Scorer", "make_scorer"]
