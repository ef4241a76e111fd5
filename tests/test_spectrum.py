"""The energy that the best approximation of a weight keeps, against dense decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_opt import ZOError
from zo_opt.adapters.spectrum import energy


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_energy_is_what_the_best_approximation_keeps(rows, columns, seed):
    weight = noise(rows, columns, seed=seed)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for rank, value in zip(range(1, 11), energy(weight, range(1, 11)), strict=True):
        lost = (weight - u[:, :rank] * s[:rank] @ vh[:rank]).square().sum() / weight.square().sum()
        assert value == pytest.approx(1 - float(lost), abs=1e-12)  # float64
    assert energy(weight, [min(rows, columns), 50]) == [1.0, 1.0]
    assert energy(weight.T, [1]) == pytest.approx(energy(weight, [1]), abs=1e-12)


def test_energy_in_low_precision_and_of_extremes():
    weight = noise(12, 7)
    assert energy(weight.bfloat16(), [3]) == energy(weight.bfloat16().double(), [3])
    assert energy(torch.nn.Parameter(weight), [3]) == energy(weight, [3])
    assert energy(torch.zeros(3, 4), [1, 2]) == [1.0, 1.0]
    assert energy(weight * 1e-30, [3]) == pytest.approx(energy(weight, [3]), abs=1e-12)
    assert energy(torch.diag(torch.tensor([1.0, 1e-4])), [1])[0] == pytest.approx(1 - 1e-8, abs=1e-14)


@pytest.mark.parametrize(
    ("weight", "ranks", "sentence"),
    [
        (torch.ones(3), [1], "needs a matrix"),
        (torch.full((2, 2), float("nan")), [1], "NaN"),
        (torch.ones(2, 2), [0], r"ranks=\[0\]"),
    ],
)
def test_mistakes(weight, ranks, sentence):
    with pytest.raises(ZOError, match=sentence):
        energy(weight, ranks)
