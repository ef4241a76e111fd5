"""Every option of ``zo-opt train`` at two values: the results differ, or one is refused, or it is listed here as changing none, and why."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Sentiment, run_main

from zo_opt.cli.commands import COMMANDS
from zo_opt.training.options import GROUPS
from zo_opt.training.sentences import Parser

BASE: dict[str, Any] = {
    "device": "cpu", "precision": "fp32", "adapter": "lora", "optimizer": "mezo", "lr": 0.05, "steps": 2, "batch_size": 4, "eval_batch_size": 16,
    "template": "{text} It was", "verbalizers": "terrible,great", "query_mode": "sequential",
}  # fmt: skip
# Option -> (what it needs besides, one value, the other); None leaves it out, or leaves out what BASE has.
SWEEP: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "model_name_or_path": ({}, "{model}", "{other}"),
    "task": ({}, None, "boolq"),
    "train_file": ({}, None, "{fewer}"),
    "eval_file": ({}, "{eval}", "{fewer}"),
    "template": ({}, "{text} It was", "{text} So it was"),
    "verbalizers": ({}, "terrible,great", "great,terrible"),
    "steps": ({}, 2, 3),
    "epochs": ({"steps": None, "batch_size": 32}, 1, 2),
    "dataset": ({"train_file": None}, "{saved}", "{saved_fewer}"),
    "dataset_config": ({"train_file": None, "dataset": "{saved}"}, None, "plain"),
    "split": ({"train_file": None, "dataset": "{saved}"}, None, "train[:20]"),
    "eval_split": ({"train_file": None, "eval_file": None, "dataset": "{saved}"}, None, "validation"),
    "column_names": ({"train_file": "{bare}", "eval_file": None}, "text,label,more", "more,label,text"),
    "eval_steps": ({}, None, 1),
    "keep": ({"eval_steps": 1, "optimizer": "zo-sign", "lr": 3, "steps": 3}, None, "last"),
    "patience": ({"eval_steps": 1, "optimizer": "zo-sign", "lr": 3, "lr_schedule": "constant", "steps": 5}, None, 1),
    "config": ({"seed": None}, None, "{options}"),
    "preset": ({"adapter": None, "optimizer": None, "lr": None, "query_mode": None}, None, "paper-adazeta"),
    "quiet": ({}, False, True),
    "json": ({}, False, True),
    "budget_forwards": ({"steps": None}, 4, 8),
    "lr": ({}, 0.05, 0.1),
    "text_column": ({}, None, "label"),
    "label_column": ({}, None, "text"),
    "target_column": ({"verbalizers": None, "max_new_tokens": 2}, None, "label"),
    "optional_columns": ({"train_file": "{blanks}", "eval_file": None, "template": "{text}\n{more}\nIt was"}, None, "more"),
    "objective": ({}, None, "accuracy"),
    "max_train_rows": ({}, None, 8),
    "held_out": ({"eval_file": None}, 4, 8),
    "validation": ({}, False, True),
    "max_length": ({}, None, 3),
    "max_new_tokens": ({}, None, 2),
    "batch_size": ({}, 4, 8),
    "batch_order": ({}, "shuffled", "balanced"),
    "head": ({"verbalizers": None, "template": "{text}"}, "lm", "classification"),
    "precision": ({"steps": 3}, "fp32", "mixed"),
    "quantise": ({}, None, "int4"),
    "compile": ({"optimizer": "forward-gradient"}, False, True),
    "adapter": ({}, "lora", "tt"),
    "optimizer": ({}, "mezo", "zo-sign"),
    "estimator": ({}, "two-sided", "one-sided"),
    "directions": ({}, "rademacher", "gaussian"),
    "schedule": ({}, "constant", "linear"),
    "update_rule": ({}, "sgd", "sign"),
    "step_control": ({"query_mode": "split", "schedule": "linear"}, None, "divide-by-spread"),
    "line_search": ({}, None, "[0.0,-1.0]"),
    "query_mode": ({}, "sequential", "split"),
    "zo_eps": ({}, 0.01, 0.05),
    "weight_decay": ({}, 0.0, 0.5),
    "lr_schedule": ({"steps": 3}, "linear", "cosine"),
    "warmup_steps": ({}, 0, 2),
    "loraplus_lr_ratio": ({}, None, 16),
    "loraplus_lr_embedding": ({}, None, 1e-3),
    "seed": ({}, 0, 1),
    "share": ({}, "queries", "3x2x1"),
    "privacy_epsilon": ({"privacy_clip": 5}, 4, 8),
    "privacy_delta": ({"privacy_clip": 5, "privacy_noise": 1}, 1e-5, 1e-4),
    "privacy_noise": ({"privacy_clip": 5}, 1, 2),
    "privacy_clip": ({"privacy_noise": 1}, 5, 2),
    "resume": ({}, False, True),
    "trust_remote_code": ({}, False, True),
    "output_dir": ({}, None, None),
    "eval_batch_size": ({}, 16, 3),
    "device": ({}, "cpu", "nonsense"),
    "prompt_cache": ({}, "device", "off"),
    "prompt_cache_mb": ({}, 1024, 0),
    "prompt_cache_dir": ({"prompt_cache": "disk"}, None, "{place}"),
    "save_steps": ({}, 400, 1),
    "max_failed_steps": ({}, 10, 1),
    "report_to": ({}, "none", "nonsense"),
    "rank_timeout": ({}, 300.0, 10.0),
    "rank_check_every": ({}, 100, 1),
}  # fmt: skip
# By nature no number changes; what does.
NO_RESULT = {
    "trust_remote_code": "the checkpoint's own code runs, where it has any",
    "output_dir": "the place",
    "eval_batch_size": "memory and time of evaluations",
    "prompt_cache": "memory and time; the same bits",
    "prompt_cache_mb": "memory and time; the same bits",
    "prompt_cache_dir": "the place of the file",
    "save_steps": "how many steps a killed run loses",
    "max_failed_steps": "when a run without finite losses ends",
    "rank_timeout": "how long several processes wait for each other",
    "rank_check_every": "how often several processes compare their weights",
}
# In which words another option's name stands for it.
REFUSED = {"task": "columns", "label_column": "label", "target_column": "label"}
_TIMES = ("seconds", "memory", "command", "versions", "date", "time", "id", "device", "tokens_per", "speed")


def test_no_option_is_without_an_entry() -> None:
    own = Parser()
    COMMANDS["train"].add(own)
    assert {f.name for group in GROUPS for f in fields(group)} | set(own.hints()) == set(SWEEP)
    assert set(NO_RESULT) <= set(SWEEP)


Run = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def outcome(tiny_model_dir: Path, sentiment_files: Sentiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Options -> what a run with them leaves, without times and the options themselves; the sentence where they are refused."""
    from conftest import make_model, tokenizer_for

    place = tmp_path_factory.mktemp("sweep")
    other, fewer = place / "other", place / "fewer.jsonl"
    make_model("llama", std=0.1).save_pretrained(other)
    tokenizer_for("llama").save_pretrained(other)
    fewer.write_text("".join(sentiment_files.train.read_text().splitlines(keepends=True)[:20]))
    rows = [json.loads(line) for line in sentiment_files.train.read_text().splitlines()]
    bare, options_file = place / "bare.csv", place / "options.yaml"
    with bare.open("w", newline="") as file:
        csv.writer(file).writerows((row["text"], row["label"], f"{row['text']} indeed") for row in rows)
    blanks = place / "blanks.jsonl"
    blanks.write_text("".join(json.dumps(row | {"more": "indeed" * (i % 2)}) + "\n" for i, row in enumerate(rows)))
    options_file.write_text("seed: 3\n")
    if find_spec("datasets") is not None:  # else a run says so
        import datasets

        for name, some in (("saved", rows), ("saved_fewer", rows[:30])):
            parts = {"train": datasets.Dataset.from_list(some), "validation": datasets.Dataset.from_list(some[-10:])}
            datasets.DatasetDict(parts).save_to_disk(str(place / name))
    names = {
        "saved": place / "saved",
        "saved_fewer": place / "saved_fewer",
        "bare": bare,
        "blanks": blanks,
        "options": options_file,
        "model": tiny_model_dir,
        "other": other,
        "eval": sentiment_files.eval,
        "fewer": fewer,
        "place": place / "cache",
    }
    known: dict[str, Any] = {}

    def run(options: dict[str, Any]) -> Any:
        values = (
            {
                "model_name_or_path": tiny_model_dir,
                "train_file": sentiment_files.train,
                "eval_file": sentiment_files.eval,
            }
            | BASE
            | options
        )
        line = ["train"]
        for name, value in values.items():
            if value is not None and value is not False:
                text = str(names.get(str(value)[1:-1], value)) if str(value).startswith("{") else str(value)
                line += [f"--{name}"] if value is True else [f"--{name}", text]
        if (key := " ".join(line)) not in known:
            directory = place / f"out{len(known)}"
            with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()) as shown:
                code = run_main([*line, "--output_dir", str(directory)])
            assert code in (0, 2), line
            on_screen = {"silent": not shown.getvalue(), "json": shown.getvalue().startswith("{")}
            known[key] = left_in(directory) | on_screen if code == 0 else said.getvalue()
        return known[key]

    return run


def left_in(directory: Path) -> dict[str, Any]:
    steps = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    plain = json.loads((directory / "results.json").read_text())
    plain.pop("config", None)
    plain.pop("given", None)
    timeless = {k: v for k, v in plain.items() if not any(word in k for word in _TIMES)}
    kept = [{k: v for k, v in step.items() if k not in ("seconds", "checksum")} for step in steps]
    weights = (directory / "adapter_model.safetensors").read_bytes()
    return {
        "steps": kept,
        "results": timeless,
        "weights": weights,
        "config": (directory / "adapter_config.json").read_bytes(),
    }


@pytest.mark.parametrize("option", SWEEP)
def test_every_option_is_heeded_or_refused(option: str, outcome: Run) -> None:
    needs, one, other = SWEEP[option]
    found = [
        outcome(needs | ({} if value is None and option not in BASE else {option: value})) for value in (one, other)
    ]
    refused = [said for said in found if isinstance(said, str)]
    for said in refused:
        assert said.startswith("zo-opt: error: ") and said.rstrip().endswith((".", "?"))
        assert option in said or REFUSED[option] in said
    if option in NO_RESULT and not refused:
        losses = [[step["loss"] for step in run["steps"]] for run in found]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # batches of other sizes round otherwise
    elif not refused:
        assert found[0] != found[1]
