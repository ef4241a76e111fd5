"""Logistic regression on the frozen model's hidden states: shown whatever else a run is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_main
from text_tasks import results

KINDS = {
    "on weights": {"adapter": "lora"},
    "on answers": {"adapter": "tt-lora", "optimizer": "adazeta", "query_schedule": None},
    "the whole model": {"adapter": "full"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_figure_and_steps_without_a_cache(
    kind: str, toy_options: Callable[..., list[str]], tmp_path: Path
) -> None:
    found = {}
    for name, cache in {"kept": {}, "off": {"prompt_cache": "off"}}.items():
        out = tmp_path / name
        assert run_main(toy_options(output_dir=out, steps=2, lr=1e-3, **KINDS[kind], **cache)) == 0
        found[name] = results(out)
        assert "logistic regression" in (out / "report.md").read_text()
    [figure] = {plain["regression"] for plain in found.values()}
    assert figure > 0.5
    assert found["off"]["after"]["loss"] == pytest.approx(found["kept"]["after"]["loss"], rel=1e-4)
