"""Evaluations on the way: the curve, the best weights, early ends, epochs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_main
from text_tasks import results

from zo_opt.record.metrics import MetricsWriter, read_metrics
from zo_opt.tasks.evaluation import Evaluation, evaluate
from zo_opt.training import curve as curve_module
from zo_opt.training import loop

Options = Callable[..., list[str]]
# Backpropagation, which learns the toy task in a few steps.
LEARNS = {
    "optimizer": "adamw",
    "adapter": "lora",
    "lr": 0.2,
    "query_mode": None,
    "query_schedule": None,
    "queries": None,
    "steps": 10,
}


def points(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out"] for line in lines if "held_out" in line]


@pytest.fixture(scope="module")
def astray(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Path:
    out = tmp_path_factory.mktemp("astray") / "run"
    assert run_main(toy_options(**LEARNS, eval_steps=2, output_dir=out)) == 0
    return out


def test_the_curve_is_on_record(astray: Path) -> None:
    found = results(astray)
    assert [p["step"] for p in found["curve"]] == [2, 4, 6, 8, 10]
    assert points(astray) == found["curve"][:-1]
    assert [p["forwards"] for p in found["curve"]] == [6, 12, 18, 24, 30]
    assert [line["step"] for line in read_metrics(astray)] == list(range(10))  # which are steps alone
    assert "| on the way |" in (astray / "report.md").read_text()


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Evaluations that come out so, one after the other: before the run, on the way, at its end; those that follow are real."""
    left = list(accuracies)

    def evaluated(*given: Any) -> Evaluation:
        found = evaluate(*given)
        return replace(found, metrics=dict(found.metrics) | {"accuracy": left.pop(0)}) if left else found

    for module in (curve_module, loop):
        monkeypatch.setattr(module, "evaluate", evaluated)


def test_the_best_weights_are_the_runs(toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(toy_options(**LEARNS | {"steps": 4}, output_dir=tmp_path / "four")) == 0
    with monkeypatch.context() as patch:
        scripted(patch, [0.4, 0.5, 0.9, 0.9, 0.6, 0.8])
        patch.setattr(curve_module, "_goodness", lambda point: (point["value"], 0.0))  # of equal ones the first
        assert run_main(toy_options(**LEARNS, eval_steps=2, output_dir=tmp_path / "best")) == 0
    found = results(tmp_path / "best")
    assert [p["value"] for p in found["curve"]] == [0.5, 0.9, 0.9, 0.6, 0.8]
    assert (found["kept_step"], found["steps"]) == (4, 10)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("best", "four")]
    assert weights[0] == weights[1]
    assert found["after"] == results(tmp_path / "four")["after"]
    assert "kept: step 4, the best of 5 on these rows" in (tmp_path / "best" / "report.md").read_text()


def test_what_is_best() -> None:
    """The primary metric, then the loss; a number that is not finite is never."""
    points = [
        {"metric": "accuracy", "value": v, "loss": loss}
        for v, loss in ((0.5, 1.0), (0.7, 2.0), (0.7, 1.0), (None, 0.1), (0.7, None))
    ]
    assert max(points, key=curve_module._goodness) is points[2]
    points = [{"metric": "perplexity", "value": v, "loss": 1.0} for v in (30.0, 20.0, None, 25.0)]
    assert max(points, key=curve_module._goodness) is points[1]


def test_the_last_weights_if_asked_for(astray: Path, toy_options: Options, tmp_path: Path) -> None:
    assert run_main(toy_options(**LEARNS, eval_steps=2, keep="last", output_dir=tmp_path / "last")) == 0
    assert run_main(toy_options(**LEARNS, output_dir=tmp_path / "plain")) == 0
    last, plain = results(tmp_path / "last"), results(tmp_path / "plain")
    assert last["kept_step"] is None and last["curve"] == results(astray)["curve"]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("last", "plain")]
    assert weights[0] == weights[1]  # looking changes nothing
    assert last["after"] == plain["after"]


def test_patience_ends_a_run(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, [0.4, 0.5, 0.4, 0.3, 0.2])
    assert run_main(toy_options(**LEARNS, eval_steps=2, patience=2, keep="last", output_dir=tmp_path / "out")) == 0
    found = results(tmp_path / "out")
    assert (found["steps"], [p["step"] for p in found["curve"]]) == (6, [2, 4, 6])
    assert "nothing better in 2 evaluations: the run ends after step 6" in capsys.readouterr().out


@pytest.mark.parametrize("dies", ["after a step", "in an evaluation", "before the record of one"])
@pytest.mark.parametrize("method", ["backpropagation", "a journal"])
def test_a_run_that_died_has_the_same_curve(
    dies: str, method: str, toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LEARNS if method == "backpropagation" else {"steps": 10, "lr": 0.3}
    line = toy_options(**own, eval_steps=2, save_steps=3)
    assert run_main([*line, "--output_dir", str(tmp_path / "whole")]) == 0

    def dying(original: Any, when: Callable[..., bool]) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if when(self, *args):
                raise SystemError("killed")
            return original(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if dies == "after a step":
            patch.setattr(MetricsWriter, "write", dying(MetricsWriter.write, lambda _, record, *__: record.step == 6))
        elif dies == "in an evaluation":
            patch.setattr(
                curve_module.Curve, "measure", dying(curve_module.Curve.measure, lambda _, step, __: step == 6)
            )
        else:
            patch.setattr(
                MetricsWriter, "write_evaluation", dying(MetricsWriter.write_evaluation, lambda _, p: p["step"] == 6)
            )
        with pytest.raises(SystemError):
            run_main([*line, "--output_dir", str(tmp_path / "cut")])
    assert run_main(["train", "--output_dir", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert (cut["curve"], cut["kept_step"], cut["after"]) == (whole["curve"], whole["kept_step"], whole["after"])
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("epochs", "batch", "steps"), [("2", 16, 8), ("0.5", 16, 2), ("1", 24, 3)])
def test_epochs_are_steps(epochs: str, batch: int, steps: int, toy_options: Options, tmp_path: Path) -> None:
    """Of 64 rows."""
    line = toy_options(**LEARNS | {"steps": None, "epochs": epochs}, batch_size=batch, output_dir=tmp_path / "out")
    assert run_main(line) == 0
    assert results(tmp_path / "out")["steps"] == steps


def test_perplexity_is_better_where_it_is_less(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    from text_tasks import command

    (tmp_path / "a.txt").write_text("the film is charming\n" * 60)
    line = command(
        model_name_or_path=tiny_dir("llama"), task="lm", train_file=tmp_path / "a.txt", max_length=16, optimizer="adamw", adapter="lora",
        lr=0.05, steps=6, eval_steps=1, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert run_main(line) == 0
    found = results(tmp_path / "out")
    assert found["after"]["perplexity"] == pytest.approx(min(p["value"] for p in found["curve"]))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "keep of nothing": ({"keep": "best"}, "keep was given without eval_steps"),
    "patience with nothing": ({"patience": 2}, "patience was given without eval_steps"),
    "two lengths": ({"epochs": 2, "steps": 5}, "steps was given with epochs"),
    "epochs and a budget": ({"epochs": 2, "budget_forwards": 50}, "epochs was given with budget_forwards"),
    "no epochs": ({"epochs": 0}, "epochs=0 is not possible; give a number above 0"),
    "another keep": ({"eval_steps": 2, "keep": "first"}, "keep='first' is not possible; give best or last"),
    "no steps between": ({"eval_steps": 0}, "eval_steps=0 is not possible"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_have_nothing_to_do(
    name: str, toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, what = WRONG[name]
    assert run_main(toy_options(**changes, output_dir=tmp_path / "out")) == 2
    assert what in capsys.readouterr().err
