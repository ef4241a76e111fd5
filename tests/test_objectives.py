"""Any forward: closures of every kind, and objectives that have no gradient."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, run_main, tokenizer_for
from text_tasks import CPU, adapted, assert_resumes_to_the_same_bits, command, results
from torch import nn

from zo_opt import MeZO, TTConfig, get_adapter_model, trainable_parameters
from zo_opt.errors import ZOError
from zo_opt.schedules import constant_queries
from zo_opt.tasks.evaluation import Prepared, evaluate
from zo_opt.tasks.metrics import classification_metrics
from zo_opt.tasks.objectives import F1, Accuracy, ExactMatch, Reward, f1, make_objective
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import Task, custom_generation_task

Options = Callable[..., list[str]]


# --- closures ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Small, and without anything random."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight.T + self.bias)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def projected_grads(net: nn.Module, closure: Callable[[torch.Tensor], Any], mode: str = "sequential") -> torch.Tensor:
    module = net if mode != "sequential" else None
    optimizer = MeZO(
        net.parameters(), lr=0.0, seed=3, module=module, query_mode=mode, query_schedule=constant_queries(3)
    )
    optimizer.step(closure, X)
    assert optimizer.last_record is not None
    return torch.tensor(optimizer.last_record.projected_grads)


def plain(mode: str = "sequential") -> torch.Tensor:
    net = Net()
    return projected_grads(net, lambda x: net(x).square().mean(), mode)


@torch.inference_mode()
def in_inference_mode(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x).square().mean()


def in_numpy(net: nn.Module, x: torch.Tensor) -> float:
    """As an exported model behind another runtime: arrays in, a number out."""
    weight, bias = (p.detach().numpy() for p in (net.weight, net.bias))
    return float(np.square(np.tanh(x.numpy() @ weight.T + bias)).mean())


CLOSURES: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "float": lambda net, x: float(net(x).square().mean()),
    "numpy number": lambda net, x: net(x).square().mean().detach().numpy()[()],
    "tensor of one axis": lambda net, x: net(x).square().mean().view(1),
    "float64 tensor": lambda net, x: net(x).square().mean().double(),
    "inference mode": in_inference_mode,
    "numpy": in_numpy,
}


@pytest.mark.parametrize("kind", CLOSURES)
def test_closures_one_after_another(kind: str) -> None:
    net = Net()
    found = projected_grads(net, lambda x: CLOSURES[kind](net, x))
    torch.testing.assert_close(found, plain(), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:copies of this model cannot share a forward")
@pytest.mark.parametrize(("kind", "mode"), [*((kind, "batched") for kind in CLOSURES), ("numpy", "split")])
def test_closures_on_copies(kind: str, mode: str) -> None:
    """What vmap cannot follow (a Python number, numpy) is evaluated copy by copy, with a warning, to the same numbers."""
    net = Net()
    found = projected_grads(net, lambda x: CLOSURES[kind](net, x), mode)
    torch.testing.assert_close(found, plain(mode), rtol=1e-3, atol=1e-3)


def test_a_number_from_copies_is_said_to_cost_more() -> None:
    net = Net()
    with pytest.warns(UserWarning, match="copies of this model cannot share a forward"):
        projected_grads(net, lambda x: float(net(x).square().mean()), "batched")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["traced", "exported", "compiled"])
def test_modules_that_only_infer(kind: str) -> None:
    """Perturbed in place, one after another: nothing but the parameters' memory is asked of the module."""
    net = Net()
    expected = plain()
    made: Any
    if kind == "traced":
        made = torch.jit.trace(net, X)
    elif kind == "exported":
        made = torch.export.export(net, (X,)).module()
    else:
        made = torch.compile(net, backend="eager")
    found = projected_grads(made, lambda x: made(x).square().mean().item())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- numbers ----------------------------------------------------------------------------------------------------------

EXAMPLES = [
    Example({"text": text}, label) for label, text in enumerate(("a film", "the film is a charming story", "boring"))
] + [Example({"text": "two friends and their long way home in winter"}, 1)]
WORDS = {"0": "terrible", "1": "great", "2": "positive"}


def prepared(architecture: str, objective: Any) -> tuple[Any, Prepared]:
    template = "{text} It was {mask}." if architecture == "bert" else "{text} It was"
    model = make_model(architecture)
    scorer = make_scorer(model, tokenizer_for(architecture), Task("t", template, WORDS))
    ready = get_adapter_model(model, TTConfig(rank=2, bottleneck=8, layers=2)).eval()
    return ready, Prepared(EXAMPLES, scorer, CPU, None, objective)


def test_f1_is_the_evaluations() -> None:
    generator = torch.Generator().manual_seed(2)
    for rows, classes in itertools.product((1, 2, 5, 20), (2, 3, 4)):
        predicted, labels = torch.randint(classes, (2, rows), generator=generator)
        expected = classification_metrics(predicted.tolist(), labels.tolist(), classes)["f1"]
        assert float(f1(predicted, labels, classes)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_accuracy_and_f1_of_a_batch(architecture: str) -> None:
    for name, objective in (("accuracy", Accuracy()), ("f1", F1())):
        model, rows = prepared(architecture, objective)
        found = rows.loss(model, rows.batch([0, 1, 2, 3]))
        assert float(found) == pytest.approx(1 - evaluate(model, rows, 4).metrics[name], abs=1e-6)


def test_a_reward_sees_what_was_chosen() -> None:
    seen: list[Any] = []

    def reward(predictions: list[str], references: list[list[str]]) -> list[float]:
        seen.append((predictions, references))
        return [3.0 if [p] == r else 0.0 for p, r in zip(predictions, references, strict=True)]

    model, rows = prepared("llama", Reward("mine:reward", reward))
    found = float(rows.loss(model, rows.batch([3, 0, 1])))
    assert found == pytest.approx(-3 * evaluate(model, rows.subset([3, 0, 1]), 4).accuracy)
    predictions, references = seen[0]
    assert references == [["1"], ["0"], ["1"]]
    assert set(predictions) <= set(WORDS)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_exact_match_and_rewards_of_what_is_written(architecture: str) -> None:
    examples = [Example(e.fields, references=("great", "fine")) for e in EXAMPLES]
    task = custom_generation_task(text_column="text", target_column="a", template="{text} It was")
    scorer = make_scorer(make_model(architecture), tokenizer_for(architecture), task)
    model, said = adapted(architecture), ["great", "Fine!", "great film", ""]
    scorer.generate = lambda model, encoded, device: said[: len(encoded)]  # type: ignore[method-assign]
    rows = Prepared(examples, scorer, CPU, None, ExactMatch())
    assert float(rows.loss(model, rows.batch([0, 1, 2, 3]))) == 0.5
    assert float(rows.loss(model, rows.batch([2]))) == 0.0
    rows.objective = Reward("mine:length", lambda texts, right: [len(t) for t in texts])
    assert float(rows.loss(model, rows.batch([0, 1, 2, 3]))) == -20 / 4


def test_label_words_are_written() -> None:
    """A task of labels, by generation: greedy, over the whole vocabulary, as many tokens as the longest label words have."""
    model, rows = prepared("llama", ExactMatch())
    encoded = [rows.encoded[i] for i in range(4)]
    assert [e.references for e in encoded] == [("terrible",), ("great",), ("positive",), ("great",)]
    batch = rows.batch([0, 1, 2, 3])
    with torch.no_grad():
        logits = model(**rows.scorer.inputs(batch)).logits[:, -1]
    texts = rows.scorer.generate(model, encoded, CPU)  # type: ignore[attr-defined]
    assert texts == [rows.scorer.tokenizer.decode(i) for i in logits.argmax(dim=1)]
    right = sum(t.strip() == e.references[0] for t, e in zip(texts, encoded, strict=True))
    assert float(rows.loss(model, batch)) == 1 - right / 4


@pytest.mark.parametrize("objective", [Accuracy(), F1()])
def test_query_modes_agree(objective: Any) -> None:
    """Copies in one forward turn the same answers as one after another."""
    found = {}
    for mode in ("sequential", "batched"):
        model, rows = prepared("llama", objective)
        optimizer = MeZO(
            trainable_parameters(model), lr=0.0, zo_eps=0.5, query_mode=mode, module=model, seed=1,
            query_schedule=constant_queries(8),
        )  # fmt: skip
        optimizer.step(lambda b, r=rows, m=model: r.loss(m, b), rows.batch([0, 1, 2, 3]))
        found[mode] = optimizer.last_record.projected_grads
    assert any(g != 0 for g in found["sequential"])
    assert found["batched"] == pytest.approx(found["sequential"], abs=1e-6)


@pytest.mark.parametrize(
    ("architecture", "task", "name", "sentence"),
    [
        ("bert", Task("t", "{text} {mask}", WORDS), "exact_match", "writes nothing"),
        ("llama", custom_generation_task(text_column="a", target_column="b", template="{a}"), "f1", "give exact_match"),
        ("llama", Task("t", "{text}", kind="language-modelling"), "accuracy", "right or wrong"),
    ],
)
def test_objectives_that_a_task_has_not(architecture: str, task: Task, name: str, sentence: str) -> None:
    scorer = make_scorer(make_model(architecture), tokenizer_for(architecture), task)
    assert make_objective("loss", scorer) is None
    with pytest.raises(ZOError, match=sentence):
        make_objective(name, scorer)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (1.0, "returned 1.0; it must return a list"),
        (["good"], "must return a list"),
        ([1.0, 2.0], "2 rewards for 1 rows"),
        ([float("nan")], "returned nan for 'a'"),
        (ValueError("no key"), r"failed at .*test_objectives.py:\d+ with ValueError: no key"),
    ],
)
def test_what_a_reward_must_not_return(returned: Any, sentence: str) -> None:
    def reward(predictions: list[str], references: list[list[str]]) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(ZOError, match=sentence):
        Reward("mine:reward", reward).rewards(["a"], [["b"]])
    for fine in ([True], (2,), np.array([0.5]), torch.tensor([0.5])):
        assert Reward("mine:reward", lambda p, r, fine=fine: fine).rewards(["a"], [["b"]]) == [float(fine[0])]


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_learns_from_its_accuracy(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = toy_options(objective="accuracy", query_mode=None, steps=20, lr=1, zo_eps=1, output_dir=tmp_path / "out")
    assert run_main(line) == 0
    out = results(tmp_path / "out")
    assert out["after"]["accuracy"] > out["before"]["accuracy"] + 0.2
    losses = [json.loads(x)["loss"] for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(round(64 * loss) == 64 * loss for loss in losses)  # shares of a batch's rows, over two sides
    assert "trains 1 - accuracy" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert config["objective"] == "accuracy"


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(
        "def right(predictions, references):\n"
        "    return [float(p in r) for p, r in zip(predictions, references, strict=True)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"] + [p for p in __import__("sys").path if p])
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    return "my_rewards:right"


def test_a_run_learns_from_a_reward(toy_options: Options, reward_module: str, tmp_path: Path) -> None:
    """The same as from accuracy, number for number, for the reward is 1 where a label is right."""
    for name in ("accuracy", reward_module):
        line = toy_options(objective=name, steps=5, output_dir=tmp_path / name.partition(":")[0])
        assert run_main(line) == 0
    found, expected = (results(tmp_path / name)["after"] for name in ("my_rewards", "accuracy"))
    assert found == expected


def test_a_resumed_run_that_writes_ends_in_the_same_bits(
    tiny_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"a film {i}", "answer": ("great", "boring")[i % 2]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def line(directory: Path) -> list[str]:
        return command(
            model_name_or_path=tiny_dir("llama"), train_file=tmp_path / "rows.jsonl", target_column="answer", held_out=4,
            objective="exact_match", max_new_tokens=2, output_dir=directory,
            **{"schedule.max_queries": 2},
        )  # fmt: skip

    assert_resumes_to_the_same_bits(line, tmp_path, monkeypatch)


MISTAKES = {
    "no such thing": ("bleu", r"objective='bleu' is not known.*my_module:reward"),
    "no module": (
        "nowhere:reward",
        r"'nowhere:reward' cannot be imported \(ModuleNotFoundError: No module named 'nowhere'",
    ),
    "no function": ("my_rewards:wrong", r"'my_rewards:wrong' cannot be imported \(AttributeError"),
    "a module of Python's": ("json:reward", r"'json:reward' cannot be imported \(AttributeError"),
    "a module that fails": ("broken:reward", r"'broken:reward' cannot be imported \(NameError"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(
    case: str, toy_options: Options, reward_module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, sentence = MISTAKES[case]
    (tmp_path / "json.py").write_text("reward = 1\n")
    (tmp_path / "broken.py").write_text("reward = undefined\n")
    assert run_main(toy_options(objective=name, output_dir=tmp_path / "out")) == 2
    assert re.search(sentence, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "forward-gradient"])
def test_no_gradient_no_backpropagation(
    optimizer: str, toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"query_mode": None, "query_schedule": None, "queries": None}
    line = toy_options(objective="accuracy", optimizer=optimizer, output_dir=tmp_path / "out", **options)
    assert run_main(line) == 2
    assert f"no gradient, which optimizer='{optimizer}' needs" in capsys.readouterr().err
