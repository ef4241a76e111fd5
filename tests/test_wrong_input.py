"""What a user can get wrong: one sentence each, exit code 2, nothing overwritten, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import QUICK, Sentiment, run_main
from safetensors.torch import load_file, save_file

from zo_opt.record import checkpoint
from zo_opt.record.metrics import MetricsWriter

Options = Callable[..., list[str]]


@dataclass
class Place:
    """What a case may use: a directory of its own, the toy files and model, an interrupted run."""

    path: Path
    toy: Sentiment
    model: Path
    interrupted: Path

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, name: str, *rows: dict[str, Any]) -> Path:
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def other_model(self, change: Callable[[Path], Any]) -> Path:
        """A copy of the tiny model's directory with something done to it."""
        copy = self.path / "model"
        shutil.copytree(self.model, copy)
        change(copy)
        return copy

    def broken_run(self, change: Callable[[Path], Any]) -> Path:
        """A copy of an interrupted run with something done to it."""
        copy = self.path / "out"
        shutil.copytree(self.interrupted, copy)
        (copy / checkpoint.PREVIOUS_NAME).unlink()  # which would be taken instead
        change(copy)
        return copy


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, sentiment_files: Sentiment) -> Path:
    """The directory of a run that died after its third step."""
    directory = tmp_path_factory.mktemp("interrupted") / "run"
    patch, original = pytest.MonkeyPatch(), MetricsWriter.write

    def write(self: MetricsWriter, record: Any, *rest: Any) -> None:
        original(self, record, *rest)
        if record.step == 2:
            raise SystemError("killed")

    patch.setattr(MetricsWriter, "write", write)
    line = ["train", "--model_name_or_path", str(tiny_model_dir), "--train_file", str(sentiment_files.train)]
    line += ["--save_steps", "1", "--steps", "6", "--output_dir", str(directory), "--device", "cpu"]
    with pytest.raises(SystemError):
        run_main(line)
    patch.undo()
    assert (directory / "checkpoint.safetensors").is_file()
    return directory


def nan_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def headless(model: Path) -> None:
    transformers.AutoModel.from_pretrained(model).save_pretrained(model)


def shorten(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip_json(run: Path) -> None:
    """Damage the JSON inside a checkpoint's header, leaving its length."""
    path = run / "checkpoint.safetensors"
    content = path.read_bytes()
    assert b"zo_opt.checkpoint/2" in content
    path.write_bytes(content.replace(b"zo_opt.checkpoint/2", b"zo_opt.checkpoint/9"))


def nan_checkpoint(run: Path) -> None:
    path = run / "checkpoint.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not name.startswith("optimizer."):
            tensor.fill_(torch.nan)
    path.write_bytes(b"".join(checkpoint.sealed(tensors, checkpoint.read_state(path))))


def smaller_model(run: Path) -> None:
    """The run's record names a model of another shape."""
    other = run.parent / "other-model"
    config = transformers.AutoConfig.from_pretrained(
        json.loads((run / "run.json").read_text())["config"]["model_name_or_path"]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(config._name_or_path)
    config.hidden_size = 16
    config.intermediate_size = 24
    config.head_dim = 8
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    path = run / "checkpoint.safetensors"
    state = checkpoint.read_state(path)
    state["extra"]["run"]["config"]["model_name_or_path"] = str(other)
    path.write_bytes(b"".join(checkpoint.sealed(load_file(path), state)))


def evil_pickle(model: Path) -> None:
    """Weights as a pickle that would leave a trace if it were loaded."""
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(model / "executed"), "w"))

    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Evil()}))


def evil_code(model: Path) -> None:
    """A checkpoint that brings Python code of its own."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(model / 'executed')!r}, 'w')\n")


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def resume(place: Place, change: Callable[[Path], Any]) -> dict[str, Any]:
    files = ("model_name_or_path", "train_file", "eval_file", "template", "verbalizers")
    left_out = dict.fromkeys((*files, *QUICK, "steps"))
    return left_out | {"output_dir": place.broken_run(change), "resume": "true"}


TARGET = {"target_column": "label", "verbalizers": None}
TEXT = {"task": "lm", "template": None, "verbalizers": None}
A, B = {"text": "a film", "label": 0}, {"text": "boring", "label": 1}
MIB = 1 << 20

# name -> (options that are wrong, what the sentence must say)
Case = tuple[Callable[[Place], dict[str, Any]], str]
CASES: dict[str, Case] = {
    # files
    "no such file": (lambda p: {"train_file": p.path / "none.jsonl"}, r"none\.jsonl does not exist"),
    "no such eval file": (lambda p: {"eval_file": p.path / "none.csv"}, r"none\.csv does not exist"),
    "a directory as file": (lambda p: {"train_file": p.path}, "is no file"),
    "empty jsonl": (lambda p: {"train_file": p.file("a.jsonl", "")}, r"a\.jsonl is empty"),
    "empty csv": (lambda p: {"train_file": p.file("a.csv", "")}, r"a\.csv is empty"),
    "header only": (lambda p: {"train_file": p.file("a.csv", "text,label\n")}, r"a\.csv is empty"),
    "empty eval file": (lambda p: {"eval_file": p.file("a.tsv", "\n")}, r"a\.tsv is empty"),
    "another kind of file": (lambda p: {"train_file": p.file("a.xlsx", "x")}, r"\.jsonl, .*\.parquet"),
    "not UTF-8": (lambda p: {"train_file": p.file("a.csv", b"text,label\n\xe9,0\n")}, "UTF-8"),
    "not JSON": (lambda p: {"train_file": p.file("a.jsonl", '{"text": "a", "label": 0}\n{text\n')}, "line 2"),
    "one row": (lambda p: {"train_file": p.rows("a.jsonl", A), "eval_file": None}, "one"),
    # options that another leaves nothing to do
    "LoRA+ for embeddings alone": (
        lambda p: {"adapter": "lora", "loraplus_lr_embedding": 1e-5}, "loraplus_lr_embedding was given without loraplus_lr_ratio",
    ),
    "a delta without privacy": (lambda p: {"privacy_delta": 1e-6}, "privacy_delta was given without privacy_epsilon or privacy_noise"),
    "words for a new head": (lambda p: {"head": "classification"}, "verbalizers was given with head='classification'"),
    "rows to hold out of none": (lambda p: {"held_out": 5}, "held_out was given with eval_file.*--validation"),
    "a precision that is not taken": (
        lambda p: {"adapter": "full", "precision": "mixed"}, "precision was given with adapter 'full'.*fp32",
    ),
    "a bound on a cache that is off": (
        lambda p: {"prompt_cache": "off", "prompt_cache_mb": 7}, "prompt_cache_mb was given with prompt_cache='off'",
    ),
    "a label column of built-in rows": (
        lambda p: {"label_column": "stars", "train_file": None, "eval_file": None}, "label_column was given without train_file",
    ),
    "a text column that is not shown": (
        lambda p: {"text_column": "review", "template": "{label} It was"}, "text_column was given.*shows no {text}",
    ),
    "a task and a target": (lambda p: TARGET | {"task": "rte"}, "task was given with target_column"),
    "a task and other rows": (
        lambda p: {"task": "rte", "template": None, "verbalizers": None}, "task='rte' takes rows.*premise, hypothesis, label",
    ),
    "a task and another prompt": (lambda p: {"task": "rte"}, "task='rte' takes rows.*its own prompt"),
    "eval file alone": (lambda p: {"train_file": None}, "eval_file was given without train_file"),
    # columns and labels
    "missing text column": (lambda p: {"text_column": "review"}, "no column 'review'.*text, label"),
    "missing label column": (lambda p: {"label_column": "stars"}, "no column 'stars'.*text, label"),
    "missing column in the eval file": (
        lambda p: {"eval_file": p.rows("e.jsonl", A, {"label": 1})}, r"e\.jsonl, row 2.*no column 'text'",
    ),
    "unknown label in the eval file": (
        lambda p: {"eval_file": p.rows("e.jsonl", A, B | {"label": "maybe"})}, r"e\.jsonl, row 2.*'maybe'.*0, 1",
    ),
    "unknown label of a built-in task": (
        lambda p: {"train_file": p.rows("t.jsonl", {"sentence": "a", "label": 0}, {"sentence": "b", "label": 7}),
                   "template": None, "verbalizers": None}, "row 2.*label 7 is unknown",
    ),
    "one class only": (lambda p: {"train_file": p.rows("t.jsonl", A, A, A)}, r"t\.jsonl|verbalizers"),
    "one class only in the rows used": (
        lambda p: {"train_file": p.rows("t.jsonl", A, A, A, B), "max_train_rows": 3}, "one class only",
    ),
    "no rows wanted": (lambda p: {"max_train_rows": 0}, "max_train_rows"),
    "fewer than no rows wanted": (lambda p: {"max_train_rows": -1}, "max_train_rows"),
    "a number column as label": (
        lambda p: {"train_file": p.rows("t.jsonl", *[{"text": "a", "label": i} for i in range(200)]), "verbalizers": None},
        "200 different labels",
    ),
    # generation and language modelling
    "missing target column": (lambda p: TARGET | {"target_column": "summary"}, "no column 'summary'.*text, label"),
    "an empty target": (
        lambda p: TARGET | {"train_file": p.rows("t.jsonl", {"text": "a", "label": " "}, {"text": "b", "label": "x"})},
        r"t\.jsonl, row 1: column 'label' holds no text to write",
    ),
    "label words of a generation task": (lambda p: TARGET | {"verbalizers": "a,b"}, "verbalizers was given.*generation task"),
    "a target column of built-in rows": (
        lambda p: {"target_column": "answer", "train_file": None, "eval_file": None}, "target_column was given without train_file",
    ),
    "a built-in generation prompt on other columns": (lambda p: TEXT | {"task": "nq_open"}, "no column 'question'.*text, label"),
    "a label column of a generation task": (lambda p: TARGET | {"label_column": "text"}, "label_column was given"),
    "no new tokens": (lambda p: TARGET | {"max_new_tokens": 0}, "max_new_tokens=0"),
    "new tokens of a classification": (lambda p: {"max_new_tokens": 5}, "max_new_tokens was given.*writes nothing"),
    "no room for what is to be written": (lambda p: TARGET | {"max_new_tokens": 64}, "the template alone needs, with what follows it.*context of 64"),
    "a classification head for generation": (lambda p: TARGET | {"head": "classification"}, "head='classification'.*leave it out"),
    "compiled layers for generation": (
        lambda p: TARGET | {"compile": "true", "query_mode": "sequential"}, "leave --compile out",
    ),
    "plain text without labels": (lambda p: {"train_file": p.file("a.txt", "a\nb\n")}, r"a\.txt is plain text.*--task lm"),
    "plain text to evaluate labels on": (lambda p: {"eval_file": p.file("a.txt", "a\nb\n")}, r"a\.txt is plain text.*--task lm"),
    "plain text as a generation task": (
        lambda p: TARGET | {"train_file": p.file("a.txt", "a\nb\n")}, r"a\.txt, row 1: there is no column 'label'",
    ),
    "an empty text": (lambda p: TEXT | {"train_file": p.file("a.txt", "\n \n")}, r"a\.txt is empty; it needs text"),
    "a text of one line": (lambda p: TEXT | {"train_file": p.file("a.txt", "one"), "eval_file": None}, "one row only"),
    "a text whose end is blank": (
        lambda p: TEXT | {"train_file": p.rows("t.jsonl", {"text": "a"}, {"text": ""}), "eval_file": None}, "holds no text",
    ),
    "a text without a column of text": (
        lambda p: TEXT | {"train_file": p.rows("t.jsonl", {"body": "a"})}, "no column 'text'; its columns are body",
    ),
    "a template for running text": (lambda p: TEXT | {"template": "{text}!"}, "template was given.*language-modelling"),
    "language modelling on nothing": (lambda p: TEXT | {"train_file": None, "eval_file": None}, "'lm' has no built-in rows.*--train_file"),
    "blocks of one token": (lambda p: TEXT | {"max_length": 1}, "max_length=1.*at least 2"),
    # prompt
    "template without columns": (lambda p: {"template": "It was"}, "shows nothing of the row"),
    "template with a mask alone": (lambda p: {"template": "It was {mask}."}, "template"),
    "template of another table": (lambda p: {"template": "{premise} It was"}, "no column 'premise'"),
    "malformed template": (lambda p: {"template": "{text It was"}, "not well formed"),
    "template with a conversion that there is not": (lambda p: {"template": "{text!z} It was"}, "template"),
    "too few verbalizers": (lambda p: {"verbalizers": "great"}, "verbalizers"),
    "too many verbalizers": (lambda p: {"verbalizers": "a,b,c"}, "verbalizers"),
    "a label without verbalizer": (lambda p: {"verbalizers": "0=terrible"}, "verbalizers|'1'"),
    "verbalizers alike": (lambda p: {"verbalizers": "great,great"}, "different words"),
    "no room for text": (lambda p: {"max_length": 0}, "max_length=0"),
    "no room for the template": (lambda p: {"max_length": 2}, "template alone|max_length"),
    # model
    "no such model directory": (lambda p: {"model_name_or_path": p.path / "none"}, "none.*does not exist; give a local directory"),
    "no such model": (lambda p: {"model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
    "empty model directory": (
        lambda p: {"model_name_or_path": p.other_model(lambda m: [f.unlink() for f in m.iterdir()])}, r"config\.json",
    ),
    "model without an output head": (lambda p: {"model_name_or_path": p.other_model(headless)}, "no language-model head"),
    "model without a tokenizer": (
        lambda p: {"model_name_or_path": p.other_model(lambda m: [f.unlink() for f in m.glob("token*")])}, "model",
    ),
    "model config not JSON": (
        lambda p: {"model_name_or_path": p.other_model(lambda m: shorten(m / "config.json"))}, "could not be loaded",
    ),
    "model of an unknown type": (
        lambda p: {"model_name_or_path": p.other_model(with_config(model_type="bogus"))}, "could not be loaded",
    ),
    "damaged weights": (
        lambda p: {"model_name_or_path": p.other_model(lambda m: shorten(m / "model.safetensors"))}, "could not be loaded",
    ),
    "weights missing": (
        lambda p: {"model_name_or_path": p.other_model(lambda m: (m / "model.safetensors").unlink())}, "could not be loaded",
    ),
    "NaN weights": (lambda p: {"model_name_or_path": p.other_model(nan_weights)}, r"NaN.*model\.layers\.1\.mlp\.up_proj"),
    "pickled weights": (lambda p: {"model_name_or_path": p.other_model(evil_pickle)}, "could not be loaded"),
    "code in the checkpoint": (lambda p: {"model_name_or_path": p.other_model(evil_code)}, "trust_remote_code"),
    # where adapters go
    "targets that match nothing": (lambda p: {"target_modules": "[nowhere]"}, "'nowhere' matches nothing.*up_proj"),
    "targets that are not linear": (lambda p: {"target_modules": "[embed_tokens]"}, "not a linear layer"),
    "no layers": (lambda p: {"layers": 0}, "layers"),
    "more layers than there are": (lambda p: {"layers": 5}, "layers"),
    "a layer that is not there": (lambda p: {"layers": "[1,4]"}, "layers"),
    "a negative layer": (lambda p: {"layers": "[-1]"}, "layers"),
    "an empty list of layers": (lambda p: {"layers": "[]"}, "layers"),
    "rank 0": (lambda p: {"rank": 0}, "rank=0"),
    "rank -2": (lambda p: {"rank": -2}, "rank=-2"),
    "bottleneck 0": (lambda p: {"bottleneck": 0}, "bottleneck=0"),
    # options of adapter methods
    "an option of another method": (lambda p: {"tt_rank": 3}, "'tt' has no option 'tt_rank'"),
    "a multiplier of another method": (lambda p: {"lora_alpha": 3}, "'tt' has no option 'alpha'"),
    "a bottleneck without one": (lambda p: {"adapter": "tt-lora", "bottleneck": 3}, "'tt-lora' has no option 'bottleneck'"),
    "an option that there is not": (lambda p: {"adapter.colour": 1}, "'tt' has no option 'colour'.*rank"),
    "adapter options in a text": (lambda p: {"adapter_options": "blue"}, "--adapter_options is not known"),
    "alpha of LoRA 0": (lambda p: {"adapter": "tt-lora", "lora_alpha": 0}, "alpha=0"),
    "inner ranks of 0": (lambda p: {"adapter": "tt-lora", "tt_rank": 0}, "tt_rank=0"),
    "a start that there is not": (lambda p: {"adapter": "lamda", "adapter.init": "qr"}, "'qr'.*svd or zero"),
    "a rank for no module": (lambda p: {"adapter": "tt-lora", "rank_pattern": '{"k_proj": 3}'}, "'k_proj'.*no adapted module"),
    "a rank of 0 for a module": (lambda p: {"adapter": "tt-lora", "rank_pattern": '{"q_proj": 0}'}, "rank_pattern"),
    "a train in place of nothing": (lambda p: {"modules_to_tensorize": "[pooler]"}, "'pooler' matches nothing"),
    # numbers out of range
    **{
        f"{name} {value}": ((lambda p, n=name, v=value: {"query_schedule": "adazeta", n: v}), name)
        for name in ("alpha", "beta")
        for value in ("0", "1", "1.5", "-1", "nan")
    },
    **{
        f"{name} {value}": ((lambda p, n=name, v=value: {n: v}), name.rpartition(".")[2])
        for name, value in (
            ("batch_size", 0), ("batch_size", -3), ("eval_batch_size", 0), ("steps", 0), ("held_out", 0), ("save_steps", 0),
            ("warmup_steps", -1), ("prompt_cache_mb", -1), ("step_control.factor", -1), ("step_control.factor", "nan"),
            ("lr", -1), ("lr", "nan"), ("lr", "inf"), ("zo_eps", 0), ("zo_eps", "nan"), ("weight_decay", -1), ("update_rule.beta1", 1.5),
            ("update_rule.beta2", -0.1), ("update_rule.beta2", "nan"),
        )
    },
    "activations of shared rows": (
        lambda p: {"adapter": "tt-lora", "estimator": "learned-feedback", "share": "data"},
        "share='data' averages losses.*--share queries, or --estimator two-sided",
    ),
    "activations in another query mode": (
        lambda p: {"adapter": "tt-lora", "estimator": "activations", "query_mode": "split"},
        "query_mode='split' does not apply to estimator 'activations'; leave it sequential",
    ),
    "no queries": (lambda p: {"queries": 0}, "queries=0"),
    "no fewest queries": (lambda p: {"query_schedule": "adazeta", "min_queries": 0}, "min_queries=0"),
    "fewest queries above the most": (
        lambda p: {"query_schedule": "adazeta", "min_queries": 9, "max_queries": 3}, "min_queries=9",
    ),
    # names that are not known: the sentence lists those that are
    **{
        f"unknown {name}": ((lambda p, n=name: {n: "bogus"}), f"'bogus'.*{known}")
        for name, known in (
            ("optimizer", "adazeta"), ("directions", "rademacher"), ("query_mode", "split"), ("update_rule", "adam"),
            ("lr_schedule", "cosine"), ("precision", "mixed"), ("adapter", "tt"), ("adapter.positions", "answer"),
            ("activation", "tanh"), ("query_schedule", "constant"), ("head", "classification"), ("device", "cpu"),
            ("batch_order", "shuffled"), ("prompt_cache", "disk"), ("share", "queries"),
        )
    },
    "unknown task": (lambda p: {"task": "bogus", "train_file": None, "eval_file": None}, "'bogus'.*sst2"),
    # the prefix cache
    "prefix cache below a regular file": (
        lambda p: {"prompt_cache": "disk", "prompt_cache_dir": p.file("plain", "x") / "cache"},
        "plain.*cannot be written.*prompt_cache_dir",
    ),
    "a directory for a cache that is not on disk": (
        lambda p: {"prompt_cache_dir": p.path / "cache"}, "--prompt_cache disk",
    ),
    # the output directory
    "output below a regular file": (lambda p: {"output_dir": p.file("plain", "x") / "out"}, "plain.*cannot be written"),
    "output is a regular file": (lambda p: {"output_dir": p.file("plain", "x")}, "plain.*cannot be written"),
    "output not empty": (lambda p: {"output_dir": p.broken_run(lambda run: None)}, "is not empty"),
    # resuming
    "resume nowhere": (lambda p: {"output_dir": None, "resume": "true"}, "--output_dir"),
    "resume what is not there": (lambda p: {"resume": "true"}, r"checkpoint\.safetensors"),
    "resume a short checkpoint": (lambda p: resume(p, lambda r: shorten(r / "checkpoint.safetensors")), "is damaged"),
    "resume an empty checkpoint": (lambda p: resume(p, lambda r: shorten(r / "checkpoint.safetensors", 0)), "is damaged"),
    "resume another format": (lambda p: resume(p, flip_json), "not written by this version|is damaged"),
    "resume a checkpoint with NaN": (lambda p: resume(p, nan_checkpoint), "NaN"),
    "resume another model's checkpoint": (lambda p: resume(p, smaller_model), "does not fit"),
    "resume with another seed": (lambda p: resume(p, lambda r: None) | {"seed": 5}, "seed=5 was given with --resume.*was started with 0"),
    "save nowhere": (lambda p: {"report_to": "nowhere"}, "'nowhere' is not known.*tensorboard"),
    "a tracker that is not installed": (lambda p: {"report_to": "tensorboard,aim"}, "'aim' needs a package"),
    "no time for ranks": (lambda p: {"rank_timeout": 0}, "rank_timeout=0"),
    "ranks that are never compared": (lambda p: {"rank_check_every": 0}, "rank_check_every=0"),
    "steps and a budget of forward passes": (lambda p: {"steps": 7, "budget_forwards": 9}, "steps was given with budget_forwards.*leave one out"),
    "a budget that pays for no step": (lambda p: {"steps": None, "budget_forwards": 3}, "does not pay for one step.*give more"),
    "no failed step at all": (lambda p: {"max_failed_steps": 0}, "max_failed_steps=0"),
    # the command line itself
    "unknown option": (lambda p: {"bogus": 3}, "bogus"),
    "a word where a number belongs": (lambda p: {"steps": "many"}, "steps"),
    "a fraction where a whole number belongs": (lambda p: {"batch_size": 2.5}, "batch_size"),
    "no such config file": (lambda p: {"config": p.path / "none.yaml"}, r"none\.yaml|config"),
    "config not YAML": (lambda p: {"config": p.file("a.yaml", "steps: [3")}, "config|yaml|YAML"),
    "config with an unknown option": (lambda p: {"config": p.file("a.yaml", "bogus: 3\n")}, "bogus"),
}  # fmt: skip


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a directory: name -> content (None: a directory)."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@pytest.fixture
def place(tmp_path: Path, sentiment_files: Sentiment, tiny_model_dir: Path, interrupted: Path) -> Place:
    return Place(tmp_path, sentiment_files, tiny_model_dir, interrupted)


def assert_one_sentence(error: str, what: str) -> None:
    assert "Traceback" not in error
    [line] = error.splitlines()  # nothing else is said
    assert line.startswith("zo-opt: error: ")
    assert line.endswith(".")
    assert re.search(what, line), line


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(
    toy_options: Options,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    make, what = CASES[name]
    monkeypatch.chdir(place.path)
    line = toy_options(**{"output_dir": place.path / "out", "steps": 2} | make(place))
    before = tree(place.path)
    capsys.readouterr()
    code = run_main(line)
    assert_one_sentence(capsys.readouterr().err, what)
    assert code == 2
    assert tree(place.path) == before


@pytest.mark.parametrize("line", [["bogus"], ["train", "--steps"], ["--bogus"]])
def test_wrong_command(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    assert run_main(line) == 2
    assert_one_sentence(capsys.readouterr().err, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["output not empty"])
def test_wrong_input_in_a_process_of_its_own(toy_options: Options, place: Place, name: str) -> None:
    make, what = CASES[name]
    line = toy_options(**{"output_dir": place.path / "out", "steps": 2} | make(place))
    before = tree(place.path)
    done = subprocess.run(
        [sys.executable, "-m", "zo_opt.cli.main", *line], env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=place.path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert_one_sentence(done.stderr, what)
    assert tree(place.path) == before


PLANS = {
    "a method that is not known": ({"methods": "lora,bogus"}, "'bogus'.*mezo-lora"),
    "an adapter that is not known": ({"methods": "mezo:bogus"}, "'bogus'.*tt-lora"),
    "no config": ({"model_name_or_path": "nowhere"}, r"nowhere.*config\.json"),
    "a directory without a config": ({"model_name_or_path": "empty"}, r"empty holds no config\.json"),
    "a config of nothing": ({"model_name_or_path": "odd"}, "odd"),
    "memory without a unit": ({"memory": "24"}, "'24'.*24GB"),
    "memory that is no size": ({"memory": "much"}, "'much'.*24GB"),
    "no rows": ({"batch_size": 0}, "batch_size=0"),
    "no tokens": ({"length": 0}, "length=0"),
    "more tokens than positions": ({"length": 100_000}, "length=100000.*8192"),
    "more layers than there are": ({"layers": 31}, "layers=31"),
    "another precision": ({"precision": "fp8"}, "'fp8'.*mixed"),
    "another device": ({"device": "tpu"}, "'tpu'.*cuda"),
    "other logits": ({"logits": "some"}, "'some'.*labels"),
    "all logits of a classification head": ({"logits": "all", "head": "classification"}, "classification"),
    "another query mode": ({"query_mode": "bogus"}, "'bogus'.*split"),
    "a file of another kind": ({"out": "plan.txt"}, r"plan\.txt.*\.json"),
    "a file that is there": ({"out": "taken.md"}, r"taken\.md exists"),
}


@pytest.mark.parametrize("name", PLANS)
def test_wrong_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options, what = PLANS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "bogus"}')
    (tmp_path / "taken.md").touch()
    line = ["plan"]
    for option, value in ({"methods": "lora"} | options).items():
        line += [f"--{option}", str(value)]
    before = tree(tmp_path)
    assert run_main(line) == 2
    assert_one_sentence(capsys.readouterr().err, what)
    assert tree(tmp_path) == before
