"""Strangers' files: whatever is in them, only a ZOError comes out. benchmarks/fuzz.py runs the same over 10^5 inputs with limits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, empty, mutate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zo_opt.record.metrics import read_metrics

EXAMPLES = {"options": 10, "lines": 10, "adapter": 25, "peft": 25, "safetensors": 30, "checkpoint": 20}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_read(name: str, place: Path) -> None:
    if name == "tables":
        pytest.skip("of which many are not valid")
    for content in TARGETS[name].seeds(place):
        if b"txt" not in content[:3]:  # plain text has no labels
            TARGETS[name].read(content, place)
        if name == "metrics":  # of which lines that are damaged are left out
            assert len(read_metrics(place)) == 3
        empty(place)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused_in_a_sentence(name: str, place: Path) -> None:
    target = TARGETS[name]
    seeds = target.seeds(place)

    @settings(max_examples=EXAMPLES.get(name, 60), suppress_health_check=list(HealthCheck), database=None)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        rng = random.Random(seed)
        target.run(mutate(rng, rng.choice(seeds)), place)

    check()


@pytest.mark.parametrize("name", ["rows", "tables", "metrics", "options"])
def test_any_bytes_are_read_or_refused_in_a_sentence(name: str, place: Path) -> None:
    @settings(max_examples=10 if name == "options" else 100, suppress_health_check=list(HealthCheck), database=None)
    @given(content=st.binary(max_size=200))
    def check(content: bytes) -> None:
        TARGETS[name].run(content, place)

    check()
