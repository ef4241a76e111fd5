"""``zo-opt diagnose``: what it measures on a tiny model, what it advises, what it writes and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from zo_opt.cli.main import main
from zo_opt.diagnosis.diagnose import Diagnosis, Form, advise, best_zo_eps, diagnose
from zo_opt.diagnosis.plot import picture
from zo_opt.diagnosis.trials import Trial, try_learning_rates
from zo_opt.errors import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import build_tools, load_examples
from zo_opt.training.stepper import Stepper
from zo_opt.training.stop import StopSignals

Options = Callable[..., list[str]]
QUIET = Reporter(Console(quiet=True))


@pytest.fixture
def config(tiny_dir: Callable[[str], Path], sentiment_files: object) -> TrainConfig:
    return TrainConfig(
        model_name_or_path=str(tiny_dir("llama")), train_file=sentiment_files.train,  # type: ignore[attr-defined]
        adapter={"name": "tt", "layers": 1, "rank": 2, "bottleneck": 4}, batch_size=4,
    )  # fmt: skip


def test_float32_differences_agree_with_exact_derivatives(config: TrainConfig) -> None:
    found = diagnose(replace(config, precision="fp32"), QUIET, queries=8, eps_grid=(1e-3, 1e-2))
    assert found.reference == "forward-mode derivatives in fp32"
    assert [form.precision for form in found.forms] == ["fp32"]
    assert min(found.forms[0].correlations) > 0.99
    assert found.zo_eps in (1e-3, 1e-2)
    assert found.lr > 0


def test_a_hopeless_zo_eps_is_seen(config: TrainConfig) -> None:
    """Far beyond the rounding of the loss differences are noise; far too large they are curvature."""
    found = diagnose(replace(config, precision="fp32"), QUIET, queries=8, eps_grid=(1e-8, 1e-2, 1e3))
    tiny, good, huge = found.forms[0].errors
    assert good < 0.1 < min(tiny, huge)
    assert found.zo_eps == 1e-2


def test_mixed_precision_is_shown_beside_float32(config: TrainConfig) -> None:
    found = diagnose(replace(config, precision="mixed"), QUIET, queries=8, eps_grid=(1e-4, 1e-1))
    assert [form.precision for form in found.forms] == ["mixed", "fp32"]
    mixed, exact = found.forms
    assert mixed.errors[0] > exact.errors[0]


def test_the_weights_of_the_run_are_those_that_are_measured(config: TrainConfig) -> None:
    """The same seed finds the same figures."""
    first, second = (diagnose(config, QUIET, queries=4, eps_grid=(1e-2,)) for _ in range(2))
    assert first == second


def test_the_middle_of_the_good_values_is_recommended() -> None:
    assert best_zo_eps((1e-3, 1e-2, 1e-1, 1.0), (0.5, 0.999, 0.998, 0.2)) == 1e-1
    assert best_zo_eps((1e-3, 1e-2, 1e-1, 1.0), (0.5, 0.997, 0.999, 0.998)) == 1e-1
    with pytest.raises(ZOError, match="finite"):
        best_zo_eps((1e-3,), (float("nan"),))


def test_advice_names_what_is_wrong() -> None:
    low = Form("mixed", (0.3, 0.8), (1.0, 0.5), (0.6, 0.0), (0.0, 0.25))
    full = Form("fp32", (0.99, 0.99), (0.1, 0.1), (0.0, 0.0), (0.0, 0.0))
    found = Diagnosis((1e-3, 1e-2), (low, full), "x", 8, 10, 1.0, -2.0, 4.0, 1e-2, 0.25, 0.25, (), ())
    text = " ".join(advise(found, length=False))
    for part in (
        "0.800",
        "loses much",
        "--precision fp32",
        "drown in rounding",
        "0.001",
        "25%",
        "not convex",
        "lr at most 0.25",
        "it was not tried",
    ):
        assert part in text, part


def test_the_learning_rate_advised_is_one_that_learned() -> None:
    """And the figures of the others are said with it."""
    form = Form("fp32", (0.5, 0.99, 0.7), (0.1,) * 3, (0.0,) * 3, (0.0,) * 3)
    found = Diagnosis((1e-4, 1e-2, 1.0), (form,), "x", 8, 10, 1.0, 4.0, 4.0, 1e-2, 0.25, 0.25, (), ())
    much, good = Trial(0.25, (1.0, 3.0), 1.0, 2.0), Trial(0.079, (1.0, 0.9), 1.0, 0.8)
    text = " ".join(advise(replace(found, trials=(much, good)), length=False))
    assert (
        "lr 0.079: loss on training rows 1 before, and after 2 steps with lr 0.25: 2; 0.079: 0.8; 0.25 (1 / curvature, 4)"
        in text
    )
    assert "--zo_eps 0.01 --lr 0.079" in text
    assert (
        "at 0.0001 and below rounding drowns them (0.50)" in text and "from 1 on the loss is no straight line" in text
    )
    assert "No lr tried is good" in " ".join(advise(replace(found, trials=(much,)), length=False))
    assert picture(replace(found, trials=(much, good), advice=("why",)), "x").startswith(b"\x89PNG")


def test_trials_are_steps_of_the_run_and_leave_the_adapter_as_it_was(config: TrainConfig) -> None:
    config = replace(config, precision="fp32", optimizer="mezo", estimator="two-sided", zo_eps=1e-2, prompt_cache_mb=0)
    tools = build_tools(config, load_examples(config, QUIET), QUIET)
    before = {name: p.detach().clone() for name, p in tools.model.adapter_state().items()}
    trials = try_learning_rates(config, tools, 1e4, 3, QUIET)
    assert [trial.lr for trial in trials[:2]] == [1e4, 3200.0]
    assert all(len(trial.losses) == 3 and trial.before == trials[0].before for trial in trials)
    assert all(torch.equal(p, before[name]) for name, p in tools.model.adapter_state().items())
    stepper = Stepper(
        replace(config, lr=3200.0, steps=3, lr_schedule="constant"),
        replace(tools, recipe=replace(tools.recipe, lr=3200.0), steps=3),
    )
    with StopSignals() as stop:
        for loss in trials[1].losses:
            stepper.step(stop)
            assert stepper.optimizer.last_record is not None and stepper.optimizer.last_record.loss == pytest.approx(
                loss
            )


def command(config: TrainConfig, *more: str) -> list[str]:
    return [
        "diagnose", "--model_name_or_path", config.model_name_or_path, "--train_file", str(config.train_file), "--queries", "4",
        "--eps_grid", "[0.001,0.01]", "--batch_size", "4", "--precision", "fp32", "--trial_steps", "2", *more,
    ]  # fmt: skip


def test_the_command(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(config, "--out", str(tmp_path / "d.png"))) == 0
    said = capsys.readouterr().out
    assert "zo_eps" in said
    assert "--lr" in said
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["queries"] == 4 and 1 <= len(found["trials"]) <= 5


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--out", "d.jpg"], ".png"),
        (["--out", "missing/d.png"], "does not exist"),
        (["--out", "d.png", "--queries", "1"], "at least 2"),
        (["--out", "d.png", "--eps_grid", "[0.01,-1]"], "positive"),
        (["--out", "taken.png"], "is there already"),
    ],
)
def test_mistakes(
    config: TrainConfig,
    more: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.png").write_text("mine")
    assert main(command(config, *more)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert Path("taken.png").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.png"]
