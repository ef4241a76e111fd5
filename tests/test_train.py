"""``zo-opt train`` end to end on a tiny model and a toy task."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import transformers
import yaml
from conftest import QUICK, Sentiment, run_main
from safetensors.torch import load_file

from zo_opt import load_adapter_model, trainable_parameters
from zo_opt.cli.main import main
from zo_opt.directions import DIRECTIONS
from zo_opt.models.precision import PRECISIONS
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES
from zo_opt.queries.modes import QUERY_MODES
from zo_opt.record.metrics import MetricsWriter
from zo_opt.record.progress import Reporter
from zo_opt.schedules import History, adazeta_queries
from zo_opt.tasks.batches import ORDERS
from zo_opt.tasks.evaluation import Prepared, evaluate
from zo_opt.tasks.rows import make_examples, read_rows
from zo_opt.tasks.scoring import make_scorer
from zo_opt.tasks.tasks import custom_task
from zo_opt.training import TrainConfig, loop, train

Options = Callable[..., list[str]]
Pictures = Callable[[], AbstractContextManager[None]]
STEPS = 60
# As a file or Python has it.
NESTED_QUICK = {k: v for k, v in QUICK.items() if k not in ("query_schedule", "queries")} | {
    "schedule": {"name": "constant", "queries": 2}
}


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def results(directory: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return out


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


# --- one whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, toy_options: Options, pictures: Pictures
) -> tuple[Path, list[str]]:
    """Directory and command line of a finished run."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    line = toy_options(output_dir=directory, steps=STEPS)
    with pictures():
        assert run_main(line) == 0
    return directory, line


def test_files_of_a_finished_run(finished: tuple[Path, list[str]]) -> None:
    directory, _ = finished
    expected = {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors", "journal", "metrics.jsonl", "report.html",
        "report.md", "report.png", "results.json", "run.json", "start",
    }  # fmt: skip
    assert {path.name for path in directory.iterdir()} - {"tensorboard"} == expected
    assert json.loads((directory / "adapter_config.json").read_text())["adapter_type"] == "tt"
    assert load_file(directory / "adapter_model.safetensors")


def test_metrics_have_one_line_a_step(finished: tuple[Path, list[str]]) -> None:
    lines = metrics(finished[0])
    assert [line["step"] for line in lines] == list(range(STEPS))
    forwards = 0
    for line, next_line in zip(lines, [*lines[1:], lines[-1]], strict=True):
        assert {"step", "epoch", "loss", "lr", "queries", "dropped", "forwards", "seconds", "projected_grads"} <= set(
            line
        )
        assert math.isfinite(line["loss"])
        assert len(line["projected_grads"]) == line["queries"] == QUICK["queries"]
        assert line["forwards"] == forwards + 2 * line["queries"]  # two a query
        assert line["epoch"] == line["step"] // 4  # 64 rows in batches of 16
        assert line["lr"] == QUICK["lr"]
        assert line["seconds"] <= next_line["seconds"]
        forwards = line["forwards"]


def test_the_toy_task_is_learned(finished: tuple[Path, list[str]]) -> None:
    losses = [line["loss"] for line in metrics(finished[0])]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    out = results(finished[0])
    assert out["before"]["accuracy"] < 0.7
    assert out["after"]["accuracy"] >= out["before"]["accuracy"] + 0.25
    assert out["after"]["loss"] < 0.75 * out["before"]["loss"]
    assert out["after"]["rows"] == 32


def test_results_say_what_was_spent(finished: tuple[Path, list[str]], tiny_model_dir: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trainable = sum(p.numel() for p in trainable_parameters(load_adapter_model(base, finished[0])))
    out = results(finished[0])
    assert out["steps"] == STEPS
    assert out["queries"] == 2 * STEPS
    assert out["forwards"] == 4 * STEPS
    assert out["trainable"] == trainable > 0
    assert out["peak_memory"] > 1 << 20
    assert out["train_rows"] == 64
    assert out["dropped"] == out["truncated"] == 0
    assert out["prepared_rows"] == 96
    assert 0 < out["cache_bytes"] <= 1024 << 20
    assert out["versions"]["torch"] == torch.__version__


def test_report_in_words(finished: tuple[Path, list[str]]) -> None:
    directory, line = finished
    text, out = (directory / "report.md").read_text(), results(directory)
    assert shlex.join(["zo-opt", *line]) in text
    for part in (
        f"{out['before']['accuracy']:.1%}", f"{out['after']['accuracy']:.1%}", f"{out['trainable']:,}", "report.png",
        torch.__version__, transformers.__version__, "forward passes", "peak memory", "time",
    ):  # fmt: skip
        assert part in text


def check_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 800
    assert pixels[..., :3].std() > 0.05  # something is drawn on it


def test_report_as_a_picture(finished: tuple[Path, list[str]]) -> None:
    check_picture(finished[0] / "report.png")


def test_report_as_one_page(finished: tuple[Path, list[str]]) -> None:
    """The table and the picture, and nothing that is anywhere else."""
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert b64encode((finished[0] / "report.png").read_bytes()).decode() in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    table = (finished[0] / "report.md").read_text()
    for name, value in re.findall(r"^\| ([^|]+) \| (.+) \|$", table, re.M)[2:]:
        assert f"<tr><th>{name}</th><td>" in page, name
        assert escape(re.sub(r"\*\*", "", value)).split(" ±")[0] in re.sub(r"</?strong>", "", page), value


def test_a_picture_of_backpropagation_on_running_text(toy_options: Options, tmp_path: Path, pictures: Pictures) -> None:
    """Learning rates instead of queries; a metric that is no share."""
    text = tmp_path / "story.txt"
    text.write_text("the film is a story of two friends\n" * 60)
    options = {
        "eval_file": None,
        "template": None,
        "verbalizers": None,
        "max_length": 32,
        "adapter": "lora",
        "optimizer": "adamw",
    }
    zeroth = dict.fromkeys(("query_mode", "query_schedule", "queries"))
    line = toy_options(train_file=text, task="lm", steps=3, output_dir=tmp_path / "out", **options, **zeroth)
    with pictures():
        assert run_main(line) == 0
    check_picture(tmp_path / "out" / "report.png")


def test_run_json_says_how_to_do_it_again(finished: tuple[Path, list[str]]) -> None:
    directory, line = finished
    record = json.loads((directory / "run.json").read_text())
    assert record["command"] == shlex.join(["zo-opt", *line])
    assert record["config"]["steps"] == STEPS
    assert record["config"]["template"] == "{text} It was"
    assert record["versions"]["torch"] == torch.__version__


def test_the_saved_adapter_reproduces_the_reported_accuracy(
    finished: tuple[Path, list[str]], tiny_model_dir: Path, sentiment_files: Sentiment
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    model = load_adapter_model(base, finished[0]).eval()
    task = custom_task(
        ["0", "1"], text_column="text", label_column="label", template="{text} It was", verbalizers="terrible,great"
    )
    scorer = make_scorer(base, tokenizer, task)
    examples = make_examples(read_rows(sentiment_files.eval), task, "eval")
    again = evaluate(model, Prepared(examples, scorer, torch.device("cpu"), None), 32)
    reported = results(finished[0])["after"]
    assert again.accuracy == reported["accuracy"]
    assert again.loss == pytest.approx(reported["loss"], rel=1e-5)


# --- the defaults: queries on activations ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_feedback(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Path:
    """Directory of a finished run with the default adapter, estimator and query mode."""
    directory = tmp_path_factory.mktemp("feedback") / "out"
    line = toy_options(output_dir=directory, steps=STEPS, adapter=None, query_mode=None, lr=3e-3)
    assert run_main(line) == 0
    return directory


def test_queries_on_activations_learn_the_toy_task(with_feedback: Path) -> None:
    losses = [line["loss"] for line in metrics(with_feedback)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    out = results(with_feedback)
    assert out["before"]["accuracy"] < 0.7
    assert out["after"]["accuracy"] >= out["before"]["accuracy"] + 0.25
    assert out["after"]["loss"] < 0.75 * out["before"]["loss"]
    saved = json.loads((with_feedback / "adapter_config.json").read_text())
    assert (saved["adapter_type"], saved["positions"], saved["trainable"]) == ("tt-lora", "answer", "input")
    assert saved["layers"] == [2, 3]  # of four: from two fifths of the depth on


def test_what_queries_on_activations_cost(with_feedback: Path) -> None:
    """A step is the loss and a forward a query, of answers alone: one token of each row. Three more find the length of shifts."""
    lines = metrics(with_feedback)
    assert [line["forwards"] for line in lines] == [3 + 3 * k for k in range(1, STEPS + 1)]
    assert [line["tokens"] for line in lines] == [16 * line["forwards"] for line in lines]
    out = results(with_feedback)
    assert (out["queries"], out["forwards"], out["tokens"]) == (2 * STEPS, 3 * STEPS + 3, lines[-1]["tokens"])


def test_a_run_with_queries_on_activations_keeps_no_journal(
    with_feedback: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in with_feedback.iterdir()}
    assert names.isdisjoint({"journal", "start"})
    assert {"adapter_model.safetensors", "metrics.jsonl", "results.json", "run.json"} <= names
    assert run_main(["replay", str(with_feedback), "--to", str(tmp_path / "to")]) == 2
    assert "has no journal; runs keep one where queries on weights are all that moves them" in capsys.readouterr().err


# --- the same bits ---------------------------------------------------------------------------------------------------


HEADS: dict[str, dict[str, Any]] = {"lm": {}, "classification": {"head": "classification", "verbalizers": None}}


@pytest.mark.parametrize("head", HEADS)
def test_the_same_seed_gives_the_same_bits(toy_options: Options, tmp_path: Path, head: str) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(1)  # the global random state is nobody's business
        assert run_main(toy_options(output_dir=tmp_path / name, steps=5, seed=seed, **HEADS[head])) == 0
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    assert without_time(metrics(tmp_path / "a")) == without_time(metrics(tmp_path / "b"))
    assert results(tmp_path / "a")["before"] == results(tmp_path / "b")["before"]
    assert adapter_bytes(tmp_path / "a") != adapter_bytes(tmp_path / "c")


@pytest.mark.parametrize("head", HEADS)
def test_a_run_leaves_the_process_as_it_was(toy_options: Options, tmp_path: Path, head: str) -> None:
    """Random state (promise 4), signal handlers, gradients, threads."""

    def state() -> tuple[Any, ...]:
        handlers = tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM))
        return (bytes(torch.get_rng_state()), handlers, torch.is_grad_enabled(), torch.get_num_threads())

    before = state()
    assert run_main(toy_options(output_dir=tmp_path / "out", steps=2, **HEADS[head])) == 0
    assert state() == before


# --- interrupted and resumed -----------------------------------------------------------------------------------------

HARD = {  # as much state as there is: moments, a falling rate with warmup, clipping, directions over the batch
    "steps": 12, "save_steps": 5, "update_rule": "adam", "lr_schedule": "linear", "warmup_steps": 3, "clip": 1.0,
    "query_mode": "split", "queries": 4, "weight_decay": 0.1, "seed": 7,
}  # fmt: skip
EASY = {
    "steps": 12,
    "save_steps": 5,
    "update_rule": "sgd",
    "optimizer": "mezo",
    "step_control": "none",
    "batch_order": "shuffled",
}
HEAD = {"head": "classification", "verbalizers": None, "steps": 9, "save_steps": 4, "query_mode": "split"}
# The defaults: what the estimator has learned is state, and there is no journal.
FEEDBACK = {
    "adapter": None, "query_mode": None, "step_control": None, "lr": 3e-3, "lr_schedule": "linear", "warmup_steps": 3,
    "query_schedule": "adazeta", "steps": 12, "save_steps": 5, "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, toy_options: Options) -> Callable[[dict[str, Any]], Path]:
    """Options -> directory of a run with them, from start to end."""
    done: dict[str, Path] = {}

    def run(options: dict[str, Any]) -> Path:
        if str(options) not in done:
            done[str(options)] = directory = tmp_path_factory.mktemp("whole") / "out"
            assert run_main(toy_options(output_dir=directory, **options)) == 0
        return done[str(options)]

    return run


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], None]) -> None:
    """Call ``stop`` right after the given step has been logged."""
    original = MetricsWriter.write

    def write(self: MetricsWriter, record: Any, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == step:
            monkeypatch.setattr(MetricsWriter, "write", original)
            stop()

    monkeypatch.setattr(MetricsWriter, "write", write)


def killed() -> None:
    raise SystemError("killed")


def same_run(one: Path, other: Path) -> None:
    assert adapter_bytes(one) == adapter_bytes(other)
    assert without_time(metrics(one)) == without_time(metrics(other))
    assert results(one)["after"] == results(other)["after"]
    assert results(one)["forwards"] == results(other)["forwards"]
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


@pytest.mark.parametrize(
    ("options", "step"), [(HARD, 0), (HARD, 4), (HARD, 7), (EASY, 4), (EASY, 7), (HEAD, 5), (FEEDBACK, 0), (FEEDBACK, 7)],
    ids=["hard-0", "hard-4", "hard-7", "easy-4", "easy-7", "head-5", "feedback-0", "feedback-7"],
)  # fmt: skip
def test_a_run_that_died_resumes_to_the_same_bits(
    toy_options: Options,
    uninterrupted: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    step: int,
) -> None:
    """Steps after the last checkpoint (one every 5 steps) are done again."""
    whole, broken = uninterrupted(options), tmp_path / "broken"
    stop_at(monkeypatch, step, killed)
    with pytest.raises(SystemError):
        run_main(toy_options(output_dir=broken, **options))
    assert not (broken / "adapter_model.safetensors").exists()
    assert (broken / "checkpoint.safetensors").exists()
    assert run_main(["train", "--output_dir", str(broken), "--resume"]) == 0
    same_run(broken, whole)


@pytest.mark.parametrize("begun", [True, False])
def test_a_budget_of_forward_passes_is_a_run_of_as_many_steps_as_it_pays_for(
    toy_options: Options,
    uninterrupted: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun: bool,
) -> None:
    """Stopped and resumed, too, and begun anew; a step takes four of them, and the learning rate falls to zero at the last one."""
    whole, broken = uninterrupted(EASY | {"lr_schedule": "linear"}), tmp_path / "broken"
    stop_at(monkeypatch, 6 if begun else 0, killed)
    line = toy_options(output_dir=broken, **EASY | {"lr_schedule": "linear", "steps": None, "budget_forwards": 51})
    with pytest.raises(SystemError):
        run_main(line)
    if not begun:
        for name in ("checkpoint.safetensors", "metrics.jsonl"):
            (broken / name).unlink()
        journal = broken / "journal"
        journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    assert run_main([*line, "--resume"]) == 0
    same_run(broken, whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(
    toy_options: Options,
    uninterrupted: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
) -> None:
    whole, broken = uninterrupted(HARD), tmp_path / "broken"
    stop_at(monkeypatch, 2, lambda: signal.raise_signal(signum))
    capsys.readouterr()
    assert run_main(toy_options(output_dir=broken, **HARD)) == 128 + signum
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"--output_dir {broken} --resume" in error
    assert len(metrics(broken)) == 3
    stop_at(monkeypatch, 6, killed)  # and once more, the hard way
    resume = shlex.split(error[error.index("zo-opt train") :])[1:]
    with pytest.raises(SystemError):
        run_main(resume)
    assert run_main(resume) == 0
    same_run(broken, whole)


def test_a_second_interrupt_stops_at_once(
    toy_options: Options,
    uninterrupted: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Within a step, whose weights are put back: the run goes on to the same bits."""
    whole, broken, losses = uninterrupted(HARD), tmp_path / "broken", []
    loss = Prepared.loss

    def interrupted(*given: Any) -> Any:
        losses.append(1)
        if len(losses) in (9, 10):  # in the third step
            signal.raise_signal(signal.SIGINT)
        return loss(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "loss", interrupted)
        assert run_main(toy_options(output_dir=broken, **HARD)) == 130
    assert len(losses) == 10
    error = capfd.readouterr().err
    assert "stopping after this step; Ctrl-C once more stops at once" in error and "--resume" in error
    assert run_main(["train", "--output_dir", str(broken), "--resume"]) == 0
    same_run(broken, whole)


def test_resuming_keeps_the_options_of_the_interrupted_run(
    toy_options: Options,
    uninterrupted: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = uninterrupted(EASY), tmp_path / "broken"
    stop_at(monkeypatch, 6, killed)
    line = toy_options(output_dir=broken, **EASY)
    with pytest.raises(SystemError):
        run_main(line)
    assert run_main(["train", "--output_dir", str(broken), "--resume", "--seed", "9"]) == 2
    assert "seed=9 was given with --resume" in capsys.readouterr().err
    assert run_main([*line, "--resume"]) == 0  # the same command once more
    same_run(broken, whole)


def test_all_options_can_be_printed_and_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert run_main(["train", "--lr", "0.5", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert TrainConfig.from_dict(printed) == TrainConfig(lr=0.5)


@pytest.mark.parametrize("begun", [True, False])
def test_what_a_resumed_run_can_be_told(
    begun: bool, toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an option's default, where the run was started with something else."""
    directory = tmp_path / "out"
    with monkeypatch.context() as patch:
        if begun:
            stop_at(patch, 3, killed)
        else:
            patch.setattr("zo_opt.training.loop._Run._save", lambda self: killed())
        with pytest.raises(SystemError):
            run_main(toy_options(output_dir=directory, **EASY | {"save_steps": 2, "max_failed_steps": 3}))
    told: list[TrainConfig] = []
    monkeypatch.setattr("zo_opt.training.loop.load_examples", lambda config, *_: told.append(config) or killed())
    with pytest.raises(SystemError):
        run_main(["train", "--output_dir", str(directory), "--resume", "--save_steps", str(TrainConfig.save_steps)])
    assert (told[0].save_steps, told[0].max_failed_steps) == (TrainConfig.save_steps, 3)
    assert told[0].resume == begun


def test_a_torn_line_of_metrics_does_no_harm(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    stop_at(monkeypatch, 7, killed)
    with pytest.raises(SystemError):
        run_main(toy_options(output_dir=broken, **EASY))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert run_main(["train", "--output_dir", str(broken), "--resume"]) == 0
    assert [line["step"] for line in metrics(broken)] == list(range(12))


@pytest.mark.slow
def test_a_process_that_was_signalled_resumes_to_the_same_bits(
    toy_options: Options, uninterrupted: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """A real process; forks are killed in tests/test_never_lose.py."""
    broken = tmp_path / "broken"
    options = {**HARD, "steps": 80, "save_steps": 7, "query_mode": "sequential", "queries": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "zo_opt.cli.main", *toy_options(output_dir=broken, **options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (broken / "metrics.jsonl").exists() and len((broken / "metrics.jsonl").read_text().splitlines()) > 3:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.005)
    _, error = process.communicate(timeout=30)
    assert "Traceback" not in error
    assert process.returncode == 130
    assert not (broken / "results.json").exists()
    assert run_main(["train", "--output_dir", str(broken), "--resume"]) == 0
    same_run(broken, uninterrupted(options))


# --- choices ---------------------------------------------------------------------------------------------------------

CHOICES = [
    *[{"query_mode": mode} for mode in QUERY_MODES],
    *[{"directions": name} for name in DIRECTIONS],
    # adamw's runs are in tests/test_first_order.py; AGZO wants linear layers, which tensor trains are not.
    *[{"optimizer": name} for name in OPTIMIZERS if name not in ("adamw", "agzo")],
    {"optimizer": "agzo", "adapter": "lora"},
    *[{"update_rule": name} for name in UPDATE_RULES],
    *[{"precision": name} for name in PRECISIONS],
    *[{"lr_schedule": name} for name in ("linear", "cosine", "constant")],
    *[{"batch_order": name} for name in ORDERS],
    {"query_schedule": "adazeta"},
    {"prompt_cache_mb": 0},
    {"adapter": "tt-lora", "query_mode": None},
    {"adapter": "tt-lora", "query_mode": None, "estimator": "activations", "step_control": None},
    {"adapter": "tt-lora", "query_mode": None, "head": "classification", "verbalizers": None},
    {"adapter": "tt-lora", "adapter.positions": "all"},
    {"adapter": "tt-lora", "estimator": "two-sided"},
    {"adapter.positions": "answer"},
    {"rank": 2, "bottleneck": 8, "layers": 2},
    {"bottleneck": 16, "max_train_rows": 9},
    {"layers": 1},
    {"layers": "[0,2]"},
    {"target_modules": "[self_attn.o_proj]"},
    {"eval_batch_size": 5, "batch_size": 3},
    {"batch_size": 100},
    {"step_control": "none"},
    {"weight_decay": 0.1},
    {"max_length": 12},
    {"activation": "gelu"},
    {"template": None, "verbalizers": None},
    {"verbalizers": "1=really great,0=terrible"},
]


@pytest.mark.parametrize(
    "choice",
    [c for c in CHOICES if not c.items() <= QUICK.items()],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_choice_runs(toy_options: Options, tmp_path: Path, choice: dict[str, Any]) -> None:
    assert run_main(toy_options(output_dir=tmp_path / "out", steps=2, **choice)) == 0
    lines = metrics(tmp_path / "out")
    assert len(lines) == 2
    assert all(math.isfinite(g) for line in lines for g in line["projected_grads"])
    assert all(t.isfinite().all() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


@pytest.mark.parametrize("query_mode", ["sequential", "split"])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "t5"])
def test_every_architecture_runs(
    toy_options: Options, tiny_dir: Callable[[str], Path], tmp_path: Path, architecture: str, query_mode: str
) -> None:
    model = tiny_dir(architecture)
    template = "{text} It was {mask}." if architecture == "bert" else "{text} It was"
    options = toy_options(
        output_dir=tmp_path / "out", model_name_or_path=model, template=template, steps=2, query_mode=query_mode
    )
    assert run_main(options) == 0
    out = results(tmp_path / "out")
    assert out["forwards"] == (8 if query_mode == "sequential" else 4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert"])
def test_a_classification_head_is_trained_and_saved(
    toy_options: Options, tiny_dir: Callable[[str], Path], sentiment_files: Sentiment, tmp_path: Path, architecture: str
) -> None:
    out = tmp_path / "out"
    options = toy_options(
        output_dir=out,
        model_name_or_path=tiny_dir(architecture),
        head="classification",
        verbalizers=None,
        steps=6,
        lr=0.1,
    )
    assert run_main(options) == 0
    assert len(metrics(out)) == 6
    config = json.loads((out / "adapter_config.json").read_text())
    head_names = config["modules_to_save"]
    saved = load_file(out / "adapter_model.safetensors")
    heads = {n: t for n, t in saved.items() if n.split(".")[0] in head_names}
    assert any(2 in t.shape for t in heads.values())  # a row a label

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_dir(architecture), num_labels=2)
    base.config.pad_token_id = 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_dir(architecture))
    model = load_adapter_model(base, out).eval()
    task = custom_task(["0", "1"], text_column="text", label_column="label", template="{text} It was", verbalizers=None)
    examples = make_examples(read_rows(sentiment_files.eval), task, "eval")
    again = evaluate(model, Prepared(examples, make_scorer(base, tokenizer, task), torch.device("cpu"), None), 32)
    assert again.accuracy == results(out)["after"]["accuracy"]
    assert again.loss == pytest.approx(results(out)["after"]["loss"], rel=1e-4)


def test_beside_an_encoders_row_a_step_has_as_many_queries_as_inner_activations(
    toy_options: Options, tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = dict.fromkeys(("optimizer", "adapter", "query_mode", "query_schedule", "queries", "lr", "zo_eps"))
    common |= {"model_name_or_path": tiny_dir("bert"), "head": "classification", "verbalizers": None, "steps": 2}
    for name, more, queries in (
        ("own", {}, 32),  # four sites of rank 8
        ("asked", {"schedule": "constant", "schedule.queries": 3}, 3),
        ("budget", {"steps": None, "budget_forwards": 20}, 8),
    ):
        assert run_main(toy_options(output_dir=tmp_path / name, **common | more)) == 0
        assert {step["queries"] for step in metrics(tmp_path / name)} == {queries}
    assert "use it: zo-opt predict /" in " ".join(capsys.readouterr().out.split())  # it writes nothing
    assert "zo-opt generate" not in (tmp_path / "own/README.md").read_text()


def test_the_prompt_cache_changes_no_loss(toy_options: Options, tmp_path: Path) -> None:
    for name, megabytes in (("cached", 64), ("plain", 0)):
        options = toy_options(output_dir=tmp_path / name, steps=4, prompt_cache_mb=megabytes, lr=1e-3)
        assert run_main(options) == 0
    assert results(tmp_path / "plain")["cache_bytes"] == 0
    for cached, plain in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "plain"), strict=True):
        assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_queries_follow_adazetas_schedule(toy_options: Options, tmp_path: Path) -> None:
    """Epochs are counted in steps of ceil(rows / batch size)."""
    options = {"query_schedule": "adazeta", "alpha": 0.9, "beta": 0.9, "max_queries": 5, "min_queries": 1}
    assert (
        run_main(toy_options(output_dir=tmp_path / "out", steps=18, batch_size=30, max_train_rows=61, **options)) == 0
    )
    schedule = adazeta_queries(0.9, 0.9, 5)
    queries = [line["queries"] for line in metrics(tmp_path / "out")]
    assert queries == [schedule(k, k // 3, History()) for k in range(18)]
    assert queries == sorted(queries)
    assert queries[0] == 1
    assert queries[-1] > 2


def test_a_constant_learning_rate_is_warmed_up(toy_options: Options, tmp_path: Path) -> None:
    line = toy_options(output_dir=tmp_path / "out", steps=6, lr=0.3, lr_schedule="constant", warmup_steps=3)
    assert run_main(line) == 0
    assert [step["lr"] for step in metrics(tmp_path / "out")] == pytest.approx([0, 0.1, 0.2, 0.3, 0.3, 0.3])


def test_options_from_a_yaml_file(toy_options: Options, tmp_path: Path) -> None:
    moved = ("template", "verbalizers", *QUICK)
    options = {"template": "{text} It was", "verbalizers": "terrible,great", **NESTED_QUICK, "lr": 0.5, "steps": 9}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    line = toy_options(**dict.fromkeys(moved), config=tmp_path / "run.yaml", steps=3, output_dir=tmp_path / "out")
    assert run_main(line) == 0
    lines = metrics(tmp_path / "out")
    assert len(lines) == 3  # what is typed wins
    assert {line["lr"] for line in lines} == {0.5}


def test_rows_are_held_out_where_there_is_no_eval_file(toy_options: Options, tmp_path: Path) -> None:
    assert run_main(toy_options(output_dir=tmp_path / "a", eval_file=None, steps=1)) == 0
    assert results(tmp_path / "a")["after"]["rows"] == 19  # 30 % of 64
    assert results(tmp_path / "a")["train_rows"] == 45
    assert run_main(toy_options(output_dir=tmp_path / "b", eval_file=None, held_out=6, steps=1, max_train_rows=20)) == 0
    assert results(tmp_path / "b")["after"]["rows"] == 6
    assert results(tmp_path / "b")["train_rows"] == 20


def test_text_beyond_the_context_is_counted_and_reported(
    toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a long film " * (40 if i < 3 else 1), "label": i % 2} for i in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert run_main(toy_options(output_dir=tmp_path / "out", train_file=tmp_path / "long.jsonl", steps=1)) == 0
    assert results(tmp_path / "out")["truncated"] == 3
    assert "3 of 8 training prompts were longer than 64 tokens" in capsys.readouterr().out


def test_other_columns_labels_and_label_names(toy_options: Options, tmp_path: Path) -> None:
    rows = [f'"{word} film",stars {i % 2}' for i, word in enumerate(["boring", "charming"] * 5)]
    (tmp_path / "mine.csv").write_text("review,grade\n" + "\n".join(rows) + "\n")
    options = toy_options(
        output_dir=tmp_path / "out", train_file=tmp_path / "mine.csv", eval_file=None, steps=1, text_column="review",
        label_column="grade", verbalizers="stars 0=terrible,stars 1=great",
    )  # fmt: skip
    assert run_main(options) == 0
    assert results(tmp_path / "out")["train_rows"] == 7


def test_progress_is_shown(toy_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(toy_options(output_dir=tmp_path / "out", steps=3)) == 0
    said = capsys.readouterr().out
    for part in (
        "zero-shot evaluation: accuracy",
        "loss",
        "queries 2",
        "forwards 12",
        "s left",
        "memory",
        str(tmp_path / "out"),
    ):
        assert part in said


def test_losses_that_are_not_finite_stop_the_run_and_spare_the_weights(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = Prepared.loss, iter(range(10**6))

    def loss(self: Prepared, model: Any, batch: Any) -> torch.Tensor:
        """Not a number in the second query of step 3, and from step 6 on."""
        call = next(calls)
        return original(self, model, batch) * (math.nan if call >= 24 or call == 15 else 1)

    monkeypatch.setattr(Prepared, "loss", loss)
    out = tmp_path / "out"
    assert run_main(toy_options(output_dir=out, steps=40, save_steps=1)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not (out / "adapter_model.safetensors").exists()
    lines = metrics(out)
    assert [line["dropped"] for line in lines] == [0, 0, 0, 1, 0, 0, *[2] * (len(lines) - 6)]
    kept = load_file(out / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in kept.values())


def test_metrics_are_json_also_where_a_loss_is_not_finite(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no NaN; other programs than Python's must be able to read the file."""
    original, calls = Prepared.loss, iter(range(10**6))
    monkeypatch.setattr(Prepared, "loss", lambda *a: original(*a) * (math.nan if next(calls) in (4, 5, 6, 7, 9) else 1))
    assert run_main(toy_options(output_dir=tmp_path / "out", steps=4)) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    assert results(tmp_path / "out")["dropped"] == 3


def test_from_python(tiny_model_dir: Path, sentiment_files: Sentiment, tmp_path: Path) -> None:
    config = TrainConfig(
        model_name_or_path=str(tiny_model_dir), train_file=sentiment_files.train, eval_file=sentiment_files.eval,
        template="{text} It was", verbalizers="terrible,great", output_dir=tmp_path / "out", steps=2, **NESTED_QUICK,
    )  # fmt: skip
    summary, directory = train(config, Reporter(), "from a test")
    assert directory == tmp_path / "out"
    assert summary.after.accuracy == results(directory)["after"]["accuracy"]
    assert summary.gain == pytest.approx(100 * (summary.after.accuracy - summary.before.accuracy))
    assert "from a test" in (directory / "report.md").read_text()


def test_an_output_directory_is_made_up_where_none_is_given(
    toy_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(toy_options(steps=1)) == 0
    [made] = (tmp_path / "runs").iterdir()
    assert (made / "report.md").is_file()
    assert made.name.startswith("train-adazeta-")


@pytest.mark.slow
def test_shared_data(toy_options: Options, tmp_path: Path) -> None:
    """Real rows, where they are at hand: quotes, odd characters, long lines."""
    rows = Path(__file__).parents[2] / "shared" / "data"
    if not rows.is_dir():
        pytest.skip("no shared data here")
    for task, train_file, eval_file in (("sst2", "train.tsv", "dev.tsv"), ("cb", "train.jsonl", "validation.jsonl")):
        files = {"train_file": rows / task / train_file, "eval_file": rows / task / eval_file}
        options = {"task": task, "template": None, "verbalizers": None, "max_train_rows": 40, "steps": 1}
        assert run_main(toy_options(output_dir=tmp_path / task, **files, **options, eval_batch_size=256)) == 0
        assert results(tmp_path / task)["train_rows"] == 40
    assert results(tmp_path / "sst2")["after"]["rows"] == 872


def test_mezo_is_not_adazeta_under_another_name(tiny_dir, sentiment_files, tmp_path):
    """Without further options mezo takes one query a step and plain SGD, adazeta its schedule and Adam."""
    queries = {}
    for optimizer in ("mezo", "adazeta"):
        out = tmp_path / optimizer
        arguments = ["--optimizer", optimizer, "--steps", "2", "--output_dir", str(out), "--max_train_rows", "16"]
        model = ["--model_name_or_path", str(tiny_dir("llama")), "--train_file", str(sentiment_files.train)]
        assert main(["train", *arguments, *model]) == 0
        queries[optimizer] = json.loads((out / "results.json").read_text())["queries"]
    assert queries == {"mezo": 2, "adazeta": 16}


def test_an_interrupt_before_the_first_step_leaves_nothing(tiny_dir, sentiment_files, tmp_path, monkeypatch):
    """No checkpoint exists yet: the directory must be free for a fresh start."""

    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zo_opt.training.loop.evaluate", interrupt)
    model = ["--model_name_or_path", str(tiny_dir("llama")), "--train_file", str(sentiment_files.train)]
    assert main(["train", "--output_dir", str(tmp_path / "out"), *model]) == 130
    assert not (tmp_path / "out").exists()


def test_an_interrupt_in_the_last_evaluation_repeats_no_step(tiny_dir, sentiment_files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    calls = []
    real = loop.evaluate

    def interrupt_the_second(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(loop, "evaluate", interrupt_the_second)
    arguments = ["--steps", "3", "--output_dir", str(out), "--model_name_or_path", str(tiny_dir("llama"))]
    assert main(["train", *arguments, "--train_file", str(sentiment_files.train)]) == 130
    lines = (out / "metrics.jsonl").read_text()
    assert main(["train", "--output_dir", str(out), "--resume"]) == 0
    assert (out / "metrics.jsonl").read_text() == lines
    assert json.loads((out / "results.json").read_text())["steps"] == 3


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert", "t5"])
def test_the_defaults_learn_on_every_architecture_and_resume_to_the_same_bits(
    toy_options: Options, tiny_dir: Callable[[str], Path], tmp_path: Path, architecture: str, head: str
) -> None:
    if (architecture, head) == ("t5", "classification"):
        pytest.skip("transformers' head of T5 reads the end token")
    template = "{text} It was {mask}." if (architecture, head) == ("bert", "lm") else "{text} It was"
    words = None if head == "classification" else "terrible,great"
    defaults = {
        "adapter": "tt-lora",
        "query_mode": None,
        "step_control": None,
        "update_rule": None,
        "query_schedule": None,
        "lr": None,
    }

    def run(out: str, **more: Any) -> Path:
        options = toy_options(
            output_dir=tmp_path / out, model_name_or_path=tiny_dir(architecture), template=template, head=head,
            verbalizers=words, steps=4, save_steps=2, **defaults, **more,
        )  # fmt: skip
        assert run_main(options) == 0
        return tmp_path / out

    whole, off = run("whole"), run("off", prompt_cache="off")
    assert all(line["queries"] >= 8 and line["tokens"] > 0 for line in metrics(whole))
    for mine, other in zip(metrics(whole), metrics(off), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
