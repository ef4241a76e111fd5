"""Metrics against their definitions, written out here, and how they are shown."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt.tasks.builtin import TASKS
from zo_opt.tasks.metrics import (
    KINDS,
    METRICS,
    answer,
    classification_metrics,
    generation_metrics,
    normalise,
    perplexity,
)

LABELS = st.integers(2, 4).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=30),
    )
)


def f1_of(label: int, pairs: list[tuple[int, int]]) -> float:
    """2 TP / (2 TP + FP + FN); 0 where the label is nowhere."""
    hits = sum(p == label and t == label for p, t in pairs)
    wrong = sum((p == label) != (t == label) for p, t in pairs)
    return 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0


def mcc_of(pairs: list[tuple[int, int]], classes: int) -> float:
    """Gorodkin's K-category correlation: the covariance of one-hot rows over their spreads."""
    n, right = len(pairs), sum(p == t for p, t in pairs)
    predicted, true = (Counter(column) for column in zip(*pairs, strict=True))
    covariance = right * n - sum(predicted[k] * true[k] for k in range(classes))
    spreads = [n * n - sum(c[k] ** 2 for k in range(classes)) for c in (predicted, true)]
    return covariance / math.sqrt(math.prod(spreads)) if math.prod(spreads) else 0.0


@settings(max_examples=60, deadline=None)
@given(LABELS)
def test_classification_metrics_follow_their_definitions(case: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = case
    found = classification_metrics([p for p, _ in pairs], [t for _, t in pairs], classes)
    present = {label for pair in pairs for label in pair}
    f1 = f1_of(1, pairs) if classes == 2 else sum(f1_of(k, pairs) for k in present) / len(present)
    assert found["accuracy"] == sum(p == t for p, t in pairs) / len(pairs)
    assert found["f1"] == pytest.approx(f1, abs=1e-12)
    assert found["mcc"] == pytest.approx(mcc_of(pairs, classes), abs=1e-9)


def test_two_classes_have_the_last_one_as_positive() -> None:
    assert classification_metrics([0, 0, 0], [0, 0, 1], 2)["f1"] == 0.0
    assert classification_metrics([1, 1, 1], [1, 1, 0], 2)["f1"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("The Beatles", "beatles!", True),
        ("an  apple", "Apple", True),
        ("theatre", "atre", False),  # an article is a word of its own
        ("-8", "8", False),
        ("\u22128", "-8", True),  # the minus sign of typesetting
        ("2.5", "25", False),
        ("1,000", "1000", True),
        ("9.", "9", True),
        ("well-known", "wellknown", True),
        ("3-4", "34", True),  # a hyphen between numbers is no minus sign
    ],
)
def test_exact_match_is_of_normalised_answers(text: str, reference: str, same: bool) -> None:
    assert (normalise(text) == normalise(reference)) is same
    assert generation_metrics([text], [[reference]])["exact_match"] == [float(same)]


def rouge_n(text: str, reference: str, n: int) -> float:
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (text.split(), reference.split())]
    shared, sizes = sum((grams[0] & grams[1]).values()), [sum(g.values()) for g in grams]
    return 2 * shared / sum(sizes) if shared else 0.0


def rouge_l(text: str, reference: str) -> float:
    a, b = text.split(), reference.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b)) if table[-1][-1] else 0.0


WORDS = st.lists(st.sampled_from(["cat", "dog", "sat", "mat", "on"]), max_size=7).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(text=WORDS, references=st.lists(WORDS.filter(bool), min_size=1, max_size=3))
def test_rouge_is_the_f_measure_against_the_best_reference(text: str, references: list[str]) -> None:
    found = generation_metrics([text], [references])
    assert found["rouge1"] == [pytest.approx(max(rouge_n(text, r, 1) for r in references))]
    assert found["rouge2"] == [pytest.approx(max(rouge_n(text, r, 2) for r in references))]
    assert found["rougeL"] == [pytest.approx(max(rouge_l(text, r) for r in references))]


def test_what_is_compared_of_a_text() -> None:
    assert answer("\n 96 \nCalculate 1 + 1 = 2", ["96"]) == "96"
    assert answer("one\ntwo", ["uno\ndos"]) == "one\ntwo"  # an answer of several lines is asked for
    assert answer("  ", ["96"]) == ""


def test_perplexity() -> None:
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_less_is_better_of_perplexity_alone() -> None:
    assert [name for name, metric in METRICS.items() if not metric.higher_is_better] == ["perplexity"]


def test_every_task_reports_metrics_of_its_kind() -> None:
    for task in TASKS.values():
        assert set(task.metrics) <= set(KINDS[task.kind]) <= set(METRICS)
        assert len(set(task.metrics)) == len(task.metrics) > 0
        if task.kind == "classification":
            assert task.metrics[0] == "accuracy"  # row scores are right or wrong
