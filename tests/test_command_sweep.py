"""Every option of the commands that use or plan a run, at two values: what comes out differs, or the reason is listed here.

Options of a run, which ``diagnose`` and ``compare`` take besides their own, are those of tests/test_option_sweep.py. A comparison starts
processes, so that its own options are swept in tests/test_compare.py and here for their entry alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Sentiment, run_main

from zo_opt.cli.commands import COMMANDS
from zo_opt.training.sentences import Parser

BASES: dict[str, dict[str, Any]] = {
    "eval": {"run_dir": "{run}"},
    "predict": {"run_dir": "{run}", "file": "{rows}"},
    "generate": {"run_dir": "{run}", "prompt": "a film", "max_new_tokens": 8},
    "schedule": {"out": "{out}.png", "steps": 12, "schedule.max_queries": 6},
    "plan": {"model_name_or_path": "{model}", "methods": "mezo-lora,lora", "out": "{out}.json", "device": "cpu", "length": 16},
    "diagnose": {
        "model_name_or_path": "{model}", "train_file": "{rows}", "eval_file": "{other_rows}", "template": "{text} It was",
        "verbalizers": "terrible,great", "device": "cpu", "precision": "fp32", "adapter": "lora", "optimizer": "mezo",
        "queries": 2, "eps_grid": "[0.01,0.1]", "trial_steps": 2, "batch_size": 2, "out": "{out}.png",
    },
}  # fmt: skip
SAMPLED = {"do_sample": True, "seed": 1}
# Command -> option -> (what it needs besides, one value, the other); None leaves it out.
SWEEP: dict[str, dict[str, tuple[dict[str, Any], Any, Any]]] = {
    "eval": {
        "run_dir": ({}, "{run}", "{model}"),
        "eval_file": ({}, None, "{rows}"),
        "zero_shot": ({}, False, True),
        "precision": ({}, None, "mixed"),
        "device": ({}, "cpu", "nonsense"),
        "out": ({}, None, "{out}.jsonl"),
        "quiet": ({}, False, True),
        "json": ({}, False, True),
        "trust_remote_code": ({}, False, True),
    },
    "predict": {
        "run_dir": ({}, "{run}", "{model}"),
        "file": ({}, "{rows}", "{other_rows}"),
        "out": ({}, None, "{out}.jsonl"),
        "batch_size": ({}, None, 3),
        "quiet": ({"out": "{out}.jsonl"}, False, True),
        "device": ({}, "cpu", "nonsense"),
        "trust_remote_code": ({}, False, True),
    },
    "generate": {
        "run_dir": ({}, "{run}", "{model}"),
        "prompt": ({}, "a film", "the best of all"),
        "file": ({"prompt": None}, "{rows}", "{other_rows}"),
        "chat": ({"prompt": None}, False, True),
        "form": ({}, "run", "plain"),
        "out": ({}, None, "{out}.jsonl"),
        "max_new_tokens": ({}, 8, 2),
        "do_sample": ({"seed": 1}, None, True),
        "temperature": (SAMPLED, 0.1, 5),
        "top_p": (SAMPLED, 0.01, 1.0),
        "top_k": (SAMPLED, 1, 50),
        "seed": (SAMPLED | {"temperature": 5}, 1, 2),
        "batch_size": ({}, None, 2),
        "quiet": ({"out": "{out}.jsonl"}, False, True),
        "json": ({}, False, True),
        "device": ({}, "cpu", "nonsense"),
        "trust_remote_code": ({}, False, True),
    },
    "schedule": {
        "config": ({"steps": None}, None, "{steps}"),
        "query_schedule": ({}, "adazeta", "linear"),
        "steps": ({}, 12, 20),
        "steps_per_epoch": ({}, 1, 4),
        "signal_end": ({"query_schedule": "variance"}, 0.1, 0.9),
        "query_mode": ({}, "sequential", "split"),
        "batch_size": ({"query_mode": "split"}, 16, 2),
        "out": ({}, "{out}.png", "{out}.gif"),
        "overwrite": ({"out": "{taken}.png"}, False, True),
        "quiet": ({}, False, True),
        "json": ({}, False, True),
    },
    "plan": {
        "model_name_or_path": ({}, "{model}", "{wide}"),
        "methods": ({}, "mezo-lora,lora", "lora"),
        "memory": ({"out": "{out}.md"}, "10MB", "64GB"),
        "batch_size": ({}, 16, 4),
        "length": ({}, 16, 32),
        "precision": ({}, "fp32", "mixed"),
        "device": ({}, "cpu", "nonsense"),
        "head": ({}, "lm", "classification"),
        "logits": ({}, "labels", "all"),
        "layers": ({}, None, 1),
        "query_mode": ({}, "sequential", "batched"),
        "quantise": ({}, None, "int8"),
        "out": ({}, None, "{out}.json"),
        "overwrite": ({"out": "{taken}.json"}, False, True),
        "quiet": ({}, False, True),
        "json": ({}, False, True),
    },
    "diagnose": {
        "config": ({"seed": None}, None, "{seed}"),
        "preset": ({"adapter": None, "optimizer": None}, None, "paper-adazeta"),
        "queries": ({}, 2, 4),
        "eps_grid": ({}, "[0.01,0.1]", "[0.02,0.2]"),
        "out": ({}, "{out}.png", "{out}.gif"),
        "trial_steps": ({}, 2, 3),
        "quiet": ({}, False, True),
        "json": ({}, False, True),
    },
}  # fmt: skip
# By nature nothing that comes out changes; what does.
NO_RESULT = {
    ("eval", "trust_remote_code"): "the checkpoint's own code runs, where it has any",
    ("predict", "trust_remote_code"): "the same",
    ("generate", "trust_remote_code"): "the same",
    ("predict", "batch_size"): "memory and time",
}
COMPARISON = {
    "config", "preset", "methods", "seeds", "budget_forwards", "budget_seconds", "budget_memory", "lr", "lr_trials", "lr_forwards", "jobs",
    "keep_models", "output_dir", "resume", "quiet", "json",
}  # fmt: skip
Run = Callable[[str, dict[str, Any]], tuple[int, str, dict[str, bytes]]]


@pytest.mark.parametrize("command", [*SWEEP, "compare"])
def test_no_option_is_without_an_entry(command: str) -> None:
    parser = Parser()
    COMMANDS[command].add(parser)
    assert set(parser.hints()) == (COMPARISON if command == "compare" else set(SWEEP[command]))
    assert {option for name, option in NO_RESULT if name == command} <= set(SWEEP.get(command, ()))


@pytest.fixture(scope="module")
def outcome(tiny_model_dir: Path, sentiment_files: Sentiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Command and options -> exit code, what is on the terminal, and the files, pictures' bytes and names aside."""
    from conftest import make_model, tokenizer_for

    place = tmp_path_factory.mktemp("commands")
    lines = sentiment_files.train.read_text().splitlines(keepends=True)
    for name, some in (("rows", lines[:8]), ("other_rows", lines[8:14])):
        (place / f"{name}.jsonl").write_text("".join(some))
    (place / "steps.yaml").write_text("steps: 20\n")
    (place / "seed.yaml").write_text("seed: 3\n")
    for kind in ("png", "csv", "json"):
        (place / f"taken.{kind}").write_text("")
    make_model("opt").save_pretrained(place / "wide")
    tokenizer_for("opt").save_pretrained(place / "wide")
    line = ["train", "--model_name_or_path", str(tiny_model_dir), "--train_file", str(sentiment_files.train)]
    line += [
        "--eval_file",
        str(place / "other_rows.jsonl"),
        "--template",
        "{text} It was",
        "--verbalizers",
        "terrible,great",
    ]
    line += [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--adapter",
        "lora",
        "--optimizer",
        "adamw",
        "--lr",
        "0.05",
        "--steps",
        "3",
    ]
    assert run_main([*line, "--output_dir", str(place / "run"), "--quiet"]) == 0
    names = {name: place / f"{name}.jsonl" for name in ("rows", "other_rows")} | {
        "run": place / "run", "model": tiny_model_dir, "wide": place / "wide", "taken": place / "taken",
        "steps": place / "steps.yaml", "seed": place / "seed.yaml",
    }  # fmt: skip
    known: dict[str, Any] = {}

    def run(command: str, options: dict[str, Any]) -> tuple[int, str, dict[str, bytes]]:
        values, line, out = BASES[command] | options, [], place / f"out{len(known)}" / "x"
        if (key := f"{command} {values}") in known:
            return known[key]
        out.parent.mkdir()
        for name, value in values.items():
            if value is None or value is False:
                continue
            text = str(value)
            for word, path in {**names, "out": out}.items():
                text = text.replace(f"{{{word}}}", str(path))
            line += [text] if name == "run_dir" else [f"--{name}"] if value is True else [f"--{name}", text]
        shown, said = StringIO(), StringIO()
        with redirect_stdout(shown), redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", StringIO("hello\n"))
            patch.setattr("zo_opt.cli.plan.current_memory", lambda device: 1 << 28)  # which grows with every test
            code = run_main([command, *line])
        assert code in (0, 2), key
        terminal = said.getvalue() if code == 2 else shown.getvalue() + said.getvalue()
        files = {p.suffix: p.read_bytes() for p in sorted(out.parent.iterdir()) if p.suffix != ".png"}
        known[key] = code, timeless(terminal.replace(str(out.parent), "")), files
        return known[key]

    return run


def timeless(text: str) -> str:
    """Without what differs between two runs of one line."""
    return re.sub(r"(?m)^.*: \d+/\d+ \w+ .*\n", "", text)


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in SWEEP.items() for o in options])
def test_every_option_is_heeded_or_refused(command: str, option: str, outcome: Run) -> None:
    needs, one, other = SWEEP[command][option]
    found = [outcome(command, needs | {option: value}) for value in (one, other)]
    for code, said, files in found:
        if code == 2:
            assert said.startswith("zo-opt: error: ") and said.rstrip().endswith((".", "?"))
            assert not files
    assert any(code == 0 for code, _, _ in found) or (command, option) in {("generate", "chat")}
    if (command, option) in NO_RESULT:
        assert numbers(found[0][1]) == pytest.approx(numbers(found[1][1]), rel=1e-4)
    else:
        assert found[0] != found[1]


def numbers(text: str) -> list[float]:
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [float(x) for line in lines for x in re.findall(r"\d+\.\d+", json.dumps(line))] or [
        float(x) for x in re.findall(r"\d+\.\d+", text)
    ]


# What changes nothing gives the same: else every option would seem to be heeded.
SAME = {
    "eval": {"device": "cpu"}, "predict": {"device": "cpu"}, "generate": {"form": "run"}, "schedule": {"batch_size": 16},
    "plan": {"head": "lm"}, "diagnose": {"seed": 0},
}  # fmt: skip


@pytest.mark.parametrize("command", SWEEP)
def test_what_changes_nothing_gives_the_same(command: str, outcome: Run) -> None:
    assert outcome(command, {}) == outcome(command, SAME[command])
