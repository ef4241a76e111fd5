"""The metrics of the three kinds of tasks: what they are called, how they are shown, and how they follow from a model's answers.

Accuracy, Matthews correlation and F1 come from scikit-learn's definitions, ROUGE from rouge-score; exact match is SQuAD's
(arXiv 1606.05250) but for negative numbers and decimals.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CLASSIFICATION, GENERATION, LANGUAGE_MODELLING = "classification", "generation", "language-modelling"


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: its name in a sentence.
        share: whether it is a fraction, shown in per cent.
        higher_is_better: False for perplexity.
    """

    label: str
    share: bool = True
    higher_is_better: bool = True

    @property
    def unit(self) -> float:
        """What a value is multiplied by to be shown."""
        return 100.0 if self.share else 1.0

    def show(self, value: float) -> str:
        """The value in words.

        >>> METRICS["accuracy"].show(0.831), METRICS["perplexity"].show(23.456), METRICS["mcc"].show(-0.5)
        ('83.1%', '23.46', '-0.500')
        """
        if self.share:
            return f"{value:.1%}"
        return f"{value:,.2f}" if self is METRICS["perplexity"] else f"{value:.3f}"

    def change(self, before: float, after: float) -> str:
        """The difference in words, with its sign.

        >>> METRICS["accuracy"].change(0.5, 0.75), METRICS["perplexity"].change(30.0, 20.5)
        ('+25.0 points', '-9.50')
        """
        return f"{100 * (after - before):+.1f} points" if self.share else f"{after - before:+.2f}"


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy"),
    "mcc": Metric("MCC", share=False),
    "f1": Metric("F1"),
    "exact_match": Metric("exact match"),
    "rouge1": Metric("ROUGE-1"),
    "rouge2": Metric("ROUGE-2"),
    "rougeL": Metric("ROUGE-L"),
    "perplexity": Metric("perplexity", share=False, higher_is_better=False),
}
# kind -> metrics, the primary one first
KINDS: dict[str, tuple[str, ...]] = {
    CLASSIFICATION: ("accuracy", "mcc", "f1"),
    GENERATION: ("rougeL", "rouge1", "rouge2", "exact_match"),
    LANGUAGE_MODELLING: ("perplexity",),
}


def classification_metrics(predicted: Sequence[int], labels: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy, Matthews correlation coefficient (0 where one class alone is predicted or right) and F1.

    Args:
        predicted: label numbers, one a row.
        labels: the right ones.
        classes: how many there are. Of two, F1 is that of the last one; of more, the mean over all classes' (macro).

    >>> scores = classification_metrics([1, 1, 0, 1], [1, 0, 0, 1], classes=2)
    >>> scores["accuracy"], round(scores["f1"], 3), round(scores["mcc"], 3)
    (0.75, 0.8, 0.577)
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    several = len({*predicted, *labels}) > 1  # scikit-learn warns of a confusion matrix of one number
    right = sum(p == label for p, label in zip(predicted, labels, strict=True))
    average = {"average": "binary", "pos_label": 1} if classes == 2 else {"average": "macro"}
    return {
        "accuracy": right / len(labels),
        "mcc": float(matthews_corrcoef(labels, predicted)) if several else 0.0,
        "f1": float(f1_score(labels, predicted, zero_division=0.0, **average)),
    }


def generation_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """Exact match and the F-measures of ROUGE-1, -2 and -L of each text, against the reference that fits it best.

    ROUGE knows the letters a to z and digits alone, so that it is 0 in other scripts; no stemming. [choice] as of the ``evaluate``
    library.

    Args:
        texts: what the model wrote, one a row.
        references: the right answers, at least one a row.

    >>> generation_metrics(["The cat sat."], [["a cat sat", "a dog"]])["exact_match"]
    [1.0]
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds)
    found: dict[str, list[float]] = {name: [] for name in ("exact_match", *kinds)}
    for text, right in zip(texts, references, strict=True):
        best = scorer.score_multi(list(right), text)
        found["exact_match"].append(float(normalise(text) in map(normalise, right)))
        for kind in kinds:
            found[kind].append(float(best[kind].fmeasure))
    return found


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood of a token, in nats; infinite beyond what float64 holds.

    >>> perplexity(0.0), perplexity(1e9)
    (1.0, inf)
    """
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def normalise(text: str) -> str:
    """A short answer without case, punctuation, English articles and surplus space, as SQuAD compares answers.

    [choice] A minus sign in front of a number and a decimal point inside one stay: without them -8 would be 8 and 2.5 be 25.

    >>> normalise("The  U.S. Navy!"), normalise("-8"), normalise("2.5%"), normalise("1,000")
    ('us navy', '-8', '2.5', '1000')
    """
    kept = re.sub(r"(?<![\w-])-(?=\d)", "\0", text.lower().replace("\u2212", "-"))
    kept = re.sub(r"(?<=\d)\.(?=\d)", "\1", kept)
    kept = "".join(c for c in kept if c not in string.punctuation).replace("\0", "-").replace("\1", ".")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer(text: str, references: Sequence[str]) -> str:
    """What of a generated text is compared: all of it if a reference has several lines, else its first line that is not empty.

    A model that was not tuned to stop goes on after its answer.

    >>> answer(" 96\\nCalculate 1 + 1 =", ["96"])
    '96'
    """
    text = text.strip()
    return text if any("\n" in r.strip() for r in references) else text.partition("\n")[0].strip()


def describe(metrics: Mapping[str, float]) -> str:
    """All metrics in words, the primary one first.

    >>> describe({"exact_match": 0.25, "rougeL": 0.5})
    'exact match 25.0%, ROUGE-L 50.0%'
    """
    return ", ".join(f"{METRICS[name].label} {METRICS[name].show(value)}" for name, value in metrics.items())
