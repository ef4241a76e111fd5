"""Compiled layers give the losses and projected gradients of plain ones, and their failure is no failure of the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, run_main, tokenizer_for
from torch._dynamo.testing import CompileCounterWithBackend

from zo_opt import MeZO, TTConfig, get_adapter_model, trainable_parameters
from zo_opt.adapters import AdapterModel
from zo_opt.models.compilation import compile_layers, running_layers, undo
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import Task

TEXTS = ("a film", "the film is a charming story", "boring", "two friends and their long way home in winter")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def setting(architecture: str, cached: bool) -> tuple[AdapterModel, Prepared, int]:
    """A tiny model with adapters that do something in its last two layers, examples, and the first layer that runs."""
    task = Task(
        "t", "{text} It was {mask}." if architecture == "bert" else "{text} It was", {"0": "terrible", "1": "great"}
    )
    model = make_model(architecture)
    scorer = make_scorer(model, tokenizer_for(architecture), task)
    adapted = get_adapter_model(model, TTConfig(rank=2, bottleneck=8, layers=2)).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in adapted.trainable_state().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    kept = adapted.prompt_forward() if cached else None
    prepared = Prepared(
        [Example({"text": text}, i % 2) for i, text in enumerate(TEXTS)], scorer, torch.device("cpu"), kept
    )
    prepared.record(4, lambda count: None)
    return adapted, prepared, kept.recorder.cut if kept is not None else 0


def steps(model: AdapterModel, prepared: Prepared) -> tuple[list[float], list[float]]:
    """Losses and projected gradients of steps on batches of several lengths."""
    optimizer = MeZO(trainable_parameters(model), lr=1e-2, zo_eps=1e-2, module=model, query_mode="sequential")
    losses, projected_grads = [], []
    for indices in ([0, 1], [3, 2, 1, 0], [2], [3, 1], [0, 2]):
        optimizer.step(lambda b: prepared.loss(model, b), prepared.batch(indices))
        assert optimizer.last_record is not None
        losses.append(optimizer.last_record.loss)
        projected_grads += optimizer.last_record.projected_grads
    return losses, projected_grads


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "cached"), [("llama", True), ("gpt2", False)])
def test_compiled_steps_are_plain_steps(architecture: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by the compiler's front end and run as eager operations: quick, and all that is special here is in the tracing."""
    expected = steps(*setting(architecture, cached)[:2])
    model, prepared, first = setting(architecture, cached)
    layers = running_layers(model, first)
    assert len(layers) == (2 if cached else 4)
    counter = CompileCounterWithBackend("eager")
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: original(self, backend=counter, **kwargs))
    batch = prepared.batch([3, 1])
    assert compile_layers(layers, lambda: prepared.loss(model, batch)) is None
    assert counter.frame_count > 0
    found = steps(model, prepared)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(set(found[0])) == 5
    compiled = counter.frame_count
    steps(model, prepared)
    assert counter.frame_count == compiled  # nothing is compiled anew
    undo(layers)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compiled_by_inductor() -> None:
    expected = steps(*setting("llama", True)[:2])
    model, prepared, first = setting("llama", True)
    batch = prepared.batch([3, 1])
    assert compile_layers(running_layers(model, first), lambda: prepared.loss(model, batch)) is None
    torch.testing.assert_close(steps(model, prepared), expected, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_the_layers_run_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prepared, first = setting("llama", False)
    expected = steps(*setting("llama", False)[:2])
    layers = running_layers(model, first)
    batch = prepared.batch([0, 1])

    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nmany more lines")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: original(self, backend=broken, **kwargs))
    failure = compile_layers(layers, lambda: prepared.loss(model, batch))
    assert failure is not None
    assert "no C++ compiler" in failure
    assert "\n" not in failure
    assert steps(model, prepared) == expected


def test_what_fails_without_a_compiler_too_is_raised() -> None:
    def trial() -> None:
        raise LookupError("the batch is at fault")

    with pytest.raises(LookupError, match="batch"):
        compile_layers([], trial)


def test_a_run_says_why_it_is_not_compiled(
    toy_options: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: original(self, backend=broken, **kwargs))
    assert run_main(toy_options(output_dir=tmp_path / "out", steps=2, compile="true")) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if "torch.compile failed" in x]
    assert "no C++ compiler" in line


def test_compiling_needs_sequential_mode(
    toy_options: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(toy_options(output_dir=tmp_path / "out", query_mode="split", compile="true")) == 2
    assert "--query_mode sequential" in capsys.readouterr().err
