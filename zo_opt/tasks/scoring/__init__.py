"""How each kind of model (a file each) learns each kind of task."""

from __future__ import annotations

from typing import Any

from zo_opt.errors import ZOError
from zo_opt.tasks.metrics import CLASSIFICATION, GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.scoring.base import Batch, Encoded, Measured, Scorer
from zo_opt.tasks.scoring.causal import CausalGenerator, CausalScorer, LanguageModeller
from zo_opt.tasks.scoring.chat import ChatGenerator
from zo_opt.tasks.scoring.labels import ClassificationScorer, LabelScorer
from zo_opt.tasks.scoring.masked import MaskedScorer
from zo_opt.tasks.scoring.seq2seq import Seq2SeqGenerator, Seq2SeqScorer
from zo_opt.tasks.scoring.texts import Writer
from zo_opt.tasks.tasks import Task, placeholders

# kind of task -> ending of the architecture's name -> scorer
SCORERS: dict[str, dict[str, type[Scorer]]] = {
    CLASSIFICATION: {
        "ForSequenceClassification": ClassificationScorer,
        "ForMaskedLM": MaskedScorer,
        "ForConditionalGeneration": Seq2SeqScorer,
        "ForCausalLM": CausalScorer,
        "LMHeadModel": CausalScorer,
    },
    GENERATION: {
        "ForConditionalGeneration": Seq2SeqGenerator,
        "ForCausalLM": CausalGenerator,
        "LMHeadModel": CausalGenerator,
    },
    LANGUAGE_MODELLING: {"ForCausalLM": LanguageModeller, "LMHeadModel": LanguageModeller},
}
_NEEDS = {
    CLASSIFICATION: "has no output head that can score labels; load a causal, masked, encoder-decoder or sequence-classification model",
    GENERATION: "cannot write text; for a generation task load a causal or encoder-decoder model",
    LANGUAGE_MODELLING: "does not predict each token from those before it; for language modelling load a causal model",
}


def make_scorer(model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> Scorer:
    """The scorer for a model of transformers, by the kind of its head and of the task.

    Raises:
        ZOError: the model has no head for this kind of task.
    """
    architecture = type(model).__name__
    if task.conversation:
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise ZOError(
                f"{architecture} does not take conversations; load a causal model, or name the columns of a prompt and an answer with "
                "--text_column and --target_column."
            )
        return ChatGenerator(model, tokenizer, task, max_length)
    for ending, kind in SCORERS[task.kind].items():
        if architecture.endswith(ending):
            if "mask" in placeholders(task.template) and kind not in (MaskedScorer, ClassificationScorer):
                raise ZOError(
                    f"the template {task.template!r} has a {{mask}}, which {architecture} does not predict; leave it out."
                )
            return kind(model, tokenizer, task, max_length)
    raise ZOError(f"{architecture} {_NEEDS[task.kind]}.")


__all__ = [
    "Batch", "ChatGenerator", "ClassificationScorer", "Encoded", "LabelScorer", "Measured", "Scorer", "Writer", "make_scorer",
]  # fmt: skip
