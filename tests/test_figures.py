"""Numbers in documents are those of stored results, and stand where a command puts them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402

# What was measured has a unit, or is a decimal number that fills a cell of a table.
MEASURED = re.compile(
    r"(?<![\w.])\d[\d.,]* ?(?:%|percent|points?|[KMG]i?B|ms|s|seconds?|minutes?|hours?|times)(?![\w-])|^\|.*\| *\**(?!\d{4}\.\d{5})\d+\.\d+",
    re.M,
)
# What is no measurement: a confidence, a claim of a paper, an assumption that is said to be one.
OTHER = re.compile(r"95 %|arXiv|is taken to need", re.I)


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_agree_with_their_results(path: Path) -> None:
    """``python benchmarks/figures.py --write`` mends what fails here."""
    text = path.read_text()
    assert figures.renewed(text) == text


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_measured_numbers_stand_in_blocks(path: Path) -> None:
    """Outside of them, and of code, there is no number with a unit."""
    text = figures.BLOCK.sub("", path.read_text())
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    found = [line for line in text.splitlines() if MEASURED.search(line) and not OTHER.search(line)]
    assert found == []


def test_a_changed_number_is_found() -> None:
    text = "<!-- python benchmarks/tables.py plan -->\n\n| made up |\n\n<!-- end -->\n"
    assert "made up" not in figures.renewed(text)
    assert MEASURED.search("It reaches 84.2 % in 3 minutes.")
    with pytest.raises(ValueError, match="no <!-- end -->"):
        figures.renewed("<!-- python benchmarks/tables.py plan -->\n")
