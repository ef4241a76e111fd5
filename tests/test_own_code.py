"""Code of the user's own, in a module outside the package: in Python, on the command line, resumed, compared."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from conftest import run_main
from forked_runs import FORKING
from torch import nn

from zo_opt import MeZO, ZOError, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.adapters import ADAPTERS
from zo_opt.comparison import runs, supervisor
from zo_opt.directions import DIRECTIONS
from zo_opt.optim import OPTIMIZERS
from zo_opt.record import checkpoint
from zo_opt.schedules import SCHEDULES, History, constant_queries
from zo_opt.tasks.builtin import get_task
from zo_opt.training import TrainConfig
from zo_opt.training.stepper import Stepper

RESEARCH = '''
from dataclasses import dataclass, replace

import torch
from torch import nn

from zo_opt import MeZO
from zo_opt.adapters import AdapterConfig
from zo_opt.adapters.adapted import Delta, ParallelAdapter
from zo_opt.adapters.options import option
from zo_opt.directions import Directions, Rademacher
from zo_opt.optim import Method, ZerothOrderOptimizer
from zo_opt.schedules import Schedule
from zo_opt.tasks.tasks import Task


class MyZO(ZerothOrderOptimizer):
    """MeZO whose steps are shorter.

    Args:
        shrink: what the step is multiplied by.
    """

    method = Method("my-zo", own=("shrink",))

    def __init__(self, params, *, shrink: float = 1.0, **options):
        self.shrink = shrink
        super().__init__(params, **options)

    def update_from(self, estimate, update):
        return replace(update, coefficients=tuple(self.shrink * c for c in update.coefficients))


def plain(params, **options):
    return MeZO(params, **options)


def two_then_three(step, epoch, history):
    return 2 if step < 2 else 3


@dataclass(frozen=True)
class Every(Schedule):
    """One query, and more of them now and then."""

    often: int = 2
    many: int = 3

    def __call__(self, step, epoch, history):
        return self.many if step % self.often == 0 else 1


@dataclass(frozen=True)
class Greedy(Every):
    """Wants more than there is."""

    def __call__(self, step, epoch, history):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass(frozen=True)
class Tilted(Directions):
    """Rademacher's, longer or shorter."""

    length: float = 1.0

    def draw(self, stream, shapes, start, stop, device):
        return self.length * Rademacher().draw(stream, shapes, start, stop, device)


tilted = Tilted(2.0)


@dataclass(frozen=True)
class ShiftConfig(AdapterConfig):
    """h = W0 x + shift."""

    default_targets = {"llama": ("q_proj", "v_proj")}
    start: float = option(0.0, "of the shift")

    def wrap(self, target, number):
        return ParallelAdapter(target.module, Shift(self, target))


class Shift(Delta):
    def __init__(self, config, target):
        super().__init__()
        self.shift = nn.Parameter(torch.full((target.module.out_features,), config.start, device=target.device))

    def forward(self, x):
        return self.shift.expand(*x.shape[:-1], -1)

    def dense(self):
        raise NotImplementedError


def rows(split):
    return [{"text": f"a film, the {i}th", "label": i % 2} for i in range(24)] if split == "train" else []


task = Task("mine", "{text} It was", {"0": "terrible", "1": "great"}, source=rows)
number = 7
'''
BROKEN = "raise RuntimeError('not today')"
Line = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def research(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, found in the working directory; forgotten afterwards."""
    (tmp_path / "research.py").write_text(RESEARCH)
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        module = importlib.import_module("research")
    yield module
    del sys.modules["research"]


def toy() -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 6).view(2, 3))
        layer.bias.zero_()
    return layer


def stepped(make: Any, steps: int = 5, **options: Any) -> list[torch.Tensor]:
    layer, x = toy(), torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0]])
    optimizer = make(layer.parameters(), **{"lr": 0.01, "zo_eps": 0.01, "seed": 3} | options)
    for _ in range(steps):
        optimizer.step(lambda: (layer(x) - 1).square().mean())
    return [p.detach().clone() for p in layer.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- Python ---


def test_an_optimizer(research: Any) -> None:
    mezo = stepped(MeZO)
    assert same(stepped(research.MyZO), mezo)
    assert same(stepped(OPTIMIZERS.find("research:plain")), mezo)
    assert same(stepped(research.MyZO, shrink=0.5), stepped(MeZO, lr=0.005))
    with pytest.raises(ZOError, match=r"'my-zo' has no option 'grow'; it has shrink, lr"):
        stepped(research.MyZO, grow=2)


def test_a_schedule(research: Any) -> None:
    function, history = SCHEDULES.make("research:two_then_three"), History()
    assert [function(step, 0, history) for step in range(4)] == [2, 2, 3, 3]
    with pytest.raises(ZOError, match="is a function and has no option 'often'"):
        SCHEDULES.make({"name": "research:two_then_three", "often": 3})
    made = SCHEDULES.make({"name": "research:Every", "often": 3})
    assert made == research.Every(3, 3)
    assert SCHEDULES.plain(made) == {"name": "research:Every", "often": 3, "many": 3}
    config = TrainConfig(schedule={"name": "research:Every", "many": 5})
    assert config.make_choices()["query_schedule"] == research.Every(2, 5)
    by_name = stepped(MeZO, query_schedule="research:two_then_three")
    assert same(by_name, stepped(MeZO, query_schedule=lambda step, epoch, history: 2 + (step >= 2)))
    assert not same(by_name, stepped(MeZO, query_schedule=constant_queries(2)))


def test_directions(research: Any) -> None:
    found = stepped(MeZO, directions={"name": "research:Tilted", "length": 2.0})
    assert same(found, stepped(MeZO, directions=research.tilted))
    assert same(found, stepped(MeZO, directions="research:tilted"))  # an instance is one, too
    assert same(stepped(MeZO, directions=research.Tilted()), stepped(MeZO, directions="rademacher"))
    assert not same(found, stepped(MeZO, directions="rademacher"))


def test_an_adapter(research: Any, tmp_path: Path) -> None:
    config = ADAPTERS.make({"name": "research:ShiftConfig", "start": 0.5, "target_modules": ["0"]})
    model, x = get_adapter_model(nn.Sequential(toy()), config), torch.ones(1, 3)
    assert torch.equal(model(x), toy()(x) + 0.5)
    assert sum(p.numel() for p in trainable_parameters(model)) == 2
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(load_adapter_model(nn.Sequential(toy()), tmp_path / "out")(x), model(x))


def test_a_task(research: Any) -> None:
    assert get_task("research:task") is research.task


@pytest.mark.parametrize(("table", "name", "sentence"), [
    (DIRECTIONS, "broken:x", r"cannot be imported \(RuntimeError: not today\)"),
    (DIRECTIONS, "nowhere:x", r"cannot be imported \(ModuleNotFoundError"),
    (DIRECTIONS, "research:nothing", r"cannot be imported \(AttributeError"),
    (DIRECTIONS, "research:plain", "is no Directions and no class of one"),
    (DIRECTIONS, "research:MyZO", "is no Directions and no class of one"),
    (SCHEDULES, "research:number", "is no class or function"),
    (ADAPTERS, "research:task", "is no AdapterConfig and no class of one"),
])  # fmt: skip
def test_what_is_of_another_kind_is_refused(table: Any, name: str, sentence: str) -> None:
    with pytest.raises(ZOError, match=sentence) as caught:
        table.find(name)
    assert str(caught.value).endswith(".")


# --- the command line ---

OWN = {
    "adapter": "research:ShiftConfig", "adapter.start": 0.25, "directions": "research:Tilted", "directions.length": 0.5,
    "optimizer": "research:MyZO", "optimizer.shrink": 0.5, "schedule": "research:Every", "schedule.often": 3, "task": "research:task",
}  # fmt: skip
FUNCTIONS = {
    "optimizer": "research:plain", "schedule": "research:two_then_three", "directions": "research:tilted", "task": "research:task",
}  # fmt: skip
STEPS = 6


@pytest.fixture
def line(tiny_model_dir: Path) -> Line:
    """Options -> a command line; the task brings the rows."""

    def made(command: str, **changes: Any) -> list[str]:
        values = {
            "model_name_or_path": tiny_model_dir,
            "device": "cpu",
            "precision": "fp32",
            "batch_size": 4,
            **changes,
        }
        return [command, *(text for name, value in values.items() for text in (f"--{name}", str(value)))]

    return made


def weights(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def queries(directory: Path) -> list[int]:
    lines = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    return [found["queries"] for found in lines if "queries" in found]


@pytest.mark.parametrize(("own", "expected"), [(OWN, [3, 1, 1, 3, 1, 1]), (FUNCTIONS, [2, 2, 3, 3, 3, 3])])
def test_a_run(
    own: dict[str, Any], expected: list[int], line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run, one that is stopped and goes on to the same bits, and an evaluation; each asks before strange code runs."""
    options = {**own, "steps": STEPS, "save_steps": 2, "lr": 0.02}
    assert run_main(line("train", **options, output_dir="whole")) == 0
    assert queries(tmp_path / "whole") == expected
    saved = json.loads((tmp_path / "whole" / "run.json").read_text())["config"]
    assert saved["optimizer"]["name"] == own["optimizer"]
    (tmp_path / "own.json").write_text(json.dumps({name: saved[name] for name in own if "." not in name}))
    step = Stepper.step

    def dies(self: Any, stop: Any) -> None:
        if self.optimizer.step_count == 3:
            raise SystemError("killed")
        step(self, stop)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Stepper, "step", dies)
        run_main(line("train", **options, output_dir="stopped"))
    resume = ["train", "--output_dir", "stopped", "--resume"]
    capsys.readouterr()
    assert run_main(resume) == 2
    said = capsys.readouterr().err
    assert "names code outside zo_opt" in said and "--trust_remote_code" in said and own["optimizer"] in said
    named = [text for name, value in own.items() if "." not in name for text in (f"--{name}", str(value))]
    assert run_main([*resume, *named[:-2]]) == 2  # the task is not named
    assert "(research:task)" in capsys.readouterr().err
    for number, allowed in enumerate((named, ["--trust_remote_code"], ["--config", "own.json"])):
        shutil.copytree("stopped", f"resumed-{number}")
        assert run_main(["train", "--output_dir", f"resumed-{number}", "--resume", *allowed]) == 0
        assert weights(tmp_path / f"resumed-{number}") == weights(tmp_path / "whole")
        assert queries(tmp_path / f"resumed-{number}") == expected
    assert run_main(["eval", "whole"]) == 2
    assert "names code outside zo_opt" in capsys.readouterr().err
    assert run_main(["eval", "whole", "--trust_remote_code"]) == 0


def test_what_comes_after_a_run_asks_too(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(line("train", task="research:task", adapter="lora", steps=2, output_dir="run")) == 0
    for command in ("replay", "merge"):
        asked = [command, "run", "--to", command]
        capsys.readouterr()
        assert run_main(asked) == 2
        assert "names code outside zo_opt" in capsys.readouterr().err
        assert run_main([*asked, "--trust_remote_code"]) == 0, capsys.readouterr().err
    assert weights(tmp_path / "replay") == weights(tmp_path / "run")


def test_options_of_ones_own_are_checked_and_shown(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, sentence in (
        ({"optimizer.grow": 2}, "optimizer 'research:MyZO' has no option 'grow'; it has shrink"),
        ({"optimizer.shrink": "little"}, "optimizer.shrink"),
        ({"schedule.rarely": 2}, "schedule 'research:Every' has no option 'rarely'; it has often, many"),
        ({"directions": "broken:x"}, "not today"),
    ):
        assert run_main(line("train", **OWN | wrong)) == 2
        assert sentence in capsys.readouterr().err
    assert run_main([*line("train", **OWN), "--help"]) == 0
    assert "--optimizer.shrink" in capsys.readouterr().out


def test_a_comparison(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs are processes of their own; resumed, strange code is named again or allowed."""
    monkeypatch.setattr(psutil, "subprocess", FORKING)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.02)
    methods = "research:MyZO:lora,mezo:research:ShiftConfig"
    options = {"methods": methods, "task": "research:task", "optimizer.shrink": 0.5, "adapter.start": 0.25}
    assert run_main(line("compare", **options, budget_forwards=8, output_dir="out")) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    assert rows.keys() == {*methods.split(",")}
    assert all(row["score"] is not None for row in rows.values())
    for ran, part, own in (
        ("research_MyZO_lora", "optimizer", {"shrink": 0.5}),
        ("mezo_research_ShiftConfig", "adapter", {"start": 0.25}),
    ):
        saved = json.loads((tmp_path / "out" / "runs" / ran / "seed-0" / "run.json").read_text())["config"]
        assert own.items() <= saved[part].items()
    resume = ["compare", "--output_dir", "out", "--resume"]
    capsys.readouterr()
    assert run_main(resume) == 2
    assert "names code outside zo_opt" in capsys.readouterr().err
    assert run_main([*resume, "--trust_remote_code"]) == 0
    assert run_main([*resume, "--methods", methods, "--task", "research:task"]) == 0


def test_a_run_of_a_comparison_names_its_code_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it goes on from its checkpoint: the comparison was allowed to run it."""
    started: list[list[str]] = []
    monkeypatch.setattr(runs.psutil, "Popen", lambda command, **_: started.append(command))
    directory = tmp_path / "seed-0"
    run = runs.Run("mine", TrainConfig(optimizer="research:MyZO", output_dir=directory))
    run.start(1, tmp_path)
    directory.mkdir()
    (directory / checkpoint.NAME).touch()
    run.start(1, tmp_path)
    assert "--resume" not in started[0]
    assert "--resume" in started[1]
    options = Path(started[1][started[1].index("--config") + 1])
    assert json.loads(options.read_text())["optimizer"] == "research:MyZO"


def test_memory_that_runs_out_ends_a_run_with_one_sentence(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    asked = line("train", task="research:task", adapter="lora", schedule="research:Greedy", steps=2, output_dir="run")
    assert run_main(asked) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB). Give fewer rows at once" in said
    assert "Traceback" not in said
