"""Options: each one does something, is refused, or is listed as of no effect; what is mistyped is a sentence; files bring them back."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from conftest import run_main

import zo_opt
from zo_opt.cli.main import COMMANDS
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS
from zo_opt.training.build_optimizer import make_optimizer
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import GROUPS, PARTS
from zo_opt.training.parsing import Parser, option_types, parse_arguments
from zo_opt.training.parts import TABLES, own_options

# --- every option of every part ---

# Two values of options whose type does not say what is possible.
VALUES: dict[str, tuple[Any, Any]] = {
    "layers": ([0], [1]), "alpha_pattern": ({"q_proj": 1.0}, {"q_proj": 2.0}), "rank_pattern": ({"q_proj": 1}, {"q_proj": 2}),
    "ranks": ([1, 2], [2, 3]), "lamda++.rank": (16, 17), "milestones": ({0: 1}, {0: 2}), "total_steps": (40, 50), "warmup_steps": (3, 4),
    "final_steps": (3, 4),
    "line_search": ([0.0, 1.0], [0.0, 2.0]), "query_mode": ("sequential", "split"), "forwards": (1000, 2000),
}  # fmt: skip


def two_values(name: str, hint: Any) -> tuple[Any, Any]:
    """Two values that an option takes."""
    if name in VALUES:
        return VALUES[name]
    hint = next(kind for kind in (get_args(hint) or (hint,)) if kind is not NoneType) if _optional(hint) else hint
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return inner[0], inner[1]
    if kind is Sequence:
        return ["q_proj"], ["v_proj"]
    if inner:  # a choice of types
        return two_values(name, inner[0])
    return {bool: (True, False), int: (9, 10), float: (0.25, 0.5)}[hint]


def _optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


# Adapters that refuse an option, and with which words.
REFUSED = {
    ("lisa", "target_modules"): "whole layers",
    ("lisa", "positions"): "trains the model's own weights",
    ("full", "positions"): "trains the model's own weights",
    ("zo-act", "positions"): "acts on all",
}
OWN = [
    (part, name, option)
    for part, table in TABLES.items()
    for name in table
    for option in own_options(part, table[name])
    if (name, option) not in REFUSED
]


def built(values: Mapping[str, Any]) -> Any:
    """What the options make: an adapter's config, or an optimizer as plain values."""
    config = TrainConfig.from_dict({"query_mode": None, **values})
    if "adapter" in values:
        return config.make_adapter()
    config.check_given_parts()
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(config, model, list(model.parameters()), config.lr or 0.1, 7)
    scalars = {k: v for k, v in vars(optimizer).items() if isinstance(v, bool | int | float | str)}
    own = [getattr(optimizer, name, None) for name in ("choices", "setting", "defaults")]
    return {k: str(v).replace(str(model), "") for k, v in enumerate([*own, scalars])}


@pytest.mark.parametrize(("part", "name", "option"), OWN, ids=lambda one: one)
def test_every_option_of_a_part_is_heeded(part: str, name: str, option: str) -> None:
    hint = option_types(TABLES[part][name])[option]
    one, other = VALUES.get(f"{name}.{option}") or two_values(option, hint)
    if one == own_options(part, TABLES[part][name])[option]:
        one, other = other, one
    values = {"optimizer": "mezo", "query_mode": "sequential"} if part not in ("optimizer", "adapter") else {}
    with_one, with_other = (built(values | {part: {"name": name, option: value}}) for value in (one, other))
    assert with_one != with_other


@pytest.mark.parametrize(("name", "option"), REFUSED)
def test_an_adapter_refuses_what_it_has_no_use_for(name: str, option: str) -> None:
    _, other = two_values(option, option_types(TABLES["adapter"][name])[option])
    with pytest.raises(ZOError, match=REFUSED[name, option]):
        built({"adapter": {"name": name, option: other}})


# Plain options that make an optimizer, at two values that are no defaults.
PLAIN: dict[str, tuple[Any, Any]] = {
    "lr": (0.25, 0.5), "seed": (1, 2), "zo_eps": (0.25, 0.5), "weight_decay": (0.25, 0.5), "max_failed_steps": (2, 3),
    "line_search": ([0.0, 1.0], [0.0, 2.0]), "query_mode": ("sequential", "split"),
}  # fmt: skip
# Directions and their seed mean nothing to backpropagation; the seed still orders its rows.
NO_EFFECT = {("adamw", "seed")}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_heeds_or_refuses_plain_options(optimizer: str) -> None:
    for option, values in PLAIN.items():
        found = []
        for value in values:
            try:
                found.append(built({"optimizer": optimizer, option: value}))
            except ZOError as error:
                assert re.search(rf"{option.replace('_', '.')}|{value!r}", str(error)), (option, error)
                found.append(None)
        heeded = found[0] != found[1] or found == [None, None]
        assert heeded != ((optimizer, option) in NO_EFFECT), option


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_holds_the_part_that_was_chosen_or_refuses_it(optimizer: str) -> None:
    """Where it is taken, the optimizer holds what was named."""
    needed = {"trust-region": {"radius": 0.5}}
    for part in ("estimator", "directions", "schedule", "update_rule", "step_control"):
        for name in TABLES[part]:
            choice = {"name": name} | needed.get(name, {})
            config = (
                TrainConfig.from_dict({"optimizer": optimizer, "query_mode": "sequential", part: choice})
                if (part not in _refused(optimizer))
                else None
            )
            if config is None:
                with pytest.raises(ZOError, match=f"{part} is no option of optimizer '{optimizer}'"):
                    TrainConfig.from_dict({"optimizer": optimizer, part: choice})
                continue
            model = torch.nn.Linear(3, 2)
            try:
                made: Any = make_optimizer(config, model, list(model.parameters()), 0.1, 7)
            except ZOError:
                continue
            held = made.choices.plain()["query_schedule" if part == "schedule" else part]
            assert name in ([one["name"] for one in held] if isinstance(held, list) else [held["name"]])


def _refused(optimizer: str) -> frozenset[str]:
    return frozenset("schedule" if name == "query_schedule" else name for name in OPTIMIZERS[optimizer].method.fixes)


# --- every plain option ---


def test_every_plain_option_is_read_somewhere() -> None:
    """An option that no module looks at would be accepted without effect."""
    root = Path(zo_opt.__file__).parent
    read = {
        node.attr
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    names = {f.name for group in GROUPS for f in fields(group)}
    assert names - read == set()


# --- what is mistyped ---

WRONG: dict[str, tuple[str, str]] = {
    # not an option of what was chosen
    "another adapter's": ("--adapter lora --adapter.bottleneck 3", "adapter 'lora' has no option 'bottleneck'; it has .*rank"),
    "the default adapter's": ("--adapter.bottleneck 3", "adapter 'tt-lora' has no option 'bottleneck'"),
    "a misspelt one": ("--adapter lora --adapter.rnak 3", r"has no option 'rnak'.*Did you mean rank\?"),
    "another optimizer's": ("--optimizer mezo --optimizer.smoothing 1e-5", "optimizer 'mezo' has no option 'smoothing'; it has none"),
    "a schedule's": ("--optimizer mezo --schedule.alpha .5", "schedule 'constant' has no option 'alpha'; it has queries"),
    "an update rule's": ("--update_rule sgd --update_rule.beta1 .5", "update_rule 'sgd' has no option 'beta1'"),
    "a control's": ("--step_control none --step_control.factor 2", "step_control 'none' has no option 'factor'"),
    "directions of a low-rank method": ("--optimizer lozo --directions sphere", "directions is no option of optimizer 'lozo'"),
    "their options": ("--optimizer lozo --directions.rank 3", "directions is no option of optimizer 'lozo'"),
    "an estimator of a method that is one": ("--optimizer fzoo --estimator two-sided", "estimator is no option of optimizer 'fzoo'"),
    "zo_eps of exact derivatives": ("--optimizer forward-gradient --zo_eps .1", "zo_eps is no option of optimizer 'forward-gradient'"),
    "zo_eps of a chosen exact estimator": ("--optimizer mezo --estimator forward-mode --zo_eps .1", "zo_eps.*exact derivatives.*leave it out"),
    "a query mode of backpropagation": ("--optimizer adamw --query_mode split", "query_mode is no option of optimizer 'adamw'"),
    "queries of backpropagation": ("--optimizer adamw --schedule constant", "schedule is no option of optimizer 'adamw'"),
    # flat names of before
    **{
        f"--{name}": (f"--{name} 3", rf"--{name} is not known\. Did you mean --{meant}\?".replace(".", r"\.", 0))
        for name, meant in (
            ("max_queries", "schedule.max_queries"), ("min_queries", "schedule.min_queries"), ("alpha", "schedule.alpha"),
            ("beta", "schedule.beta"), ("clip", "step_control.factor"), ("rank", "adapter.rank"), ("layers", "adapter.layers"),
            ("beta1", "update_rule.beta1"), ("target_modules", "adapter.target_modules"), ("queries", "schedule.queries"),
            # and transformers'
            ("learning_rate", "lr"), ("num_train_epochs", "epochs"), ("max_steps", "steps"), ("per_device_train_batch_size", "batch_size"),
            ("per_device_eval_batch_size", "eval_batch_size"), ("lr_scheduler_type", "lr_schedule"), ("resume_from_checkpoint", "resume"),
            ("gradient_accumulation_steps", "batch_size"), ("warmup_step", "warmup_steps"), ("model_name", "model_name_or_path"),
        )
    },
    # names are whole
    "a short form": ("--step 3", r"--step is not known\. Did you mean --steps\?"),
    "of a part's": ("--adapter lora --adapter.ran 3", r"adapter 'lora' has no option 'ran'.*Did you mean rank\?"),
    "with its value": ("--adapter lora --adapter.ran=3", r"adapter 'lora' has no option 'ran'"),
    # what was chosen decides whose option it is
    "a rule's of its own": ("--optimizer zo-adam --beta1 .5", r"Did you mean --optimizer\.beta1\?"),
    "backpropagation's": ("--optimizer adamw --beta2 .5", r"Did you mean --optimizer\.beta2\?"),
    "a chosen rule's": ("--optimizer mezo --update_rule amsgrad --beta1 .5", r"Did you mean --update_rule\.beta1\?"),
    "of two parts": ("--adapter lora --alpha 3", r"Did you mean --adapter\.alpha or --schedule\.alpha\?"),
    # values
    "a word for a number": ("--steps many", "steps='many' is not possible; give a whole number of at least 1"),
    "a fraction": ("--steps 2.5", r"steps=2\.5 is not possible; give a whole number"),
    "none of a few": ("--head lmm", "head='lmm' is not possible; give lm or classification"),
    "a negative rate": ("--lr=-1", "lr=-1 is not possible; give a number of at least 0, such as 0, 0.001 or 0.1"),
    "nan": ("--adapter lora --adapter.alpha nan", "adapter.alpha=nan is not possible; give a number"),
    "a rank of none": ("--adapter.rank 0", "rank=0 is not possible; give a whole number from 1"),
    "a name that is none": ("--optimizer mezoo", r"optimizer='mezoo' is not known.*Did you mean mezo\?"),
    "code that is not there": ("--directions nowhere:Uniform", "directions='nowhere:Uniform' cannot be imported"),
    "no value": ("--steps", "steps"),
    "a list for one": ("--steps [1,2]", "steps=.*is not possible; give a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_mistyped_is_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, sentence = WRONG[case]
    assert run_main(["train", *line.split()]) == 2
    said = capsys.readouterr()
    [error] = said.err.splitlines()
    assert error.startswith("zo-opt: error: ")
    assert error[-1] in ".?"
    assert re.search(sentence, error), error
    assert said.out == ""


@pytest.mark.parametrize(
    "line", ["eval runs --zero_sho", "status runs --follo", "merge runs --t x", "plan --mem 1", "predict runs --fil=x"]
)
def test_names_of_options_are_whole(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(line.split()) == 2
    short = line.split()[2 if "runs" in line else 1].partition("=")[0]
    assert f"error: {short} is not known." in capsys.readouterr().err


# --- files ---

LINES = [
    "--steps 7 --lr 1e-6 --eval_file e.csv",
    "--adapter lora --adapter.rank 2 --adapter.layers [0,2] --optimizer mezo --directions sphere --resume",
    "--query_schedule stepwise --schedule.milestones 0:1,5:3 --step_control none --update_rule adam --update_rule.beta1 .5",
    "--optimizer zo-adam --optimizer.beta1 .5 --line_search [0,1] --adapter.rank 3",
]


@pytest.mark.parametrize("line", LINES)
def test_print_config_gives_a_file_that_says_the_same(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["train", *line.split(), "--print_config"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "options.yaml"
    path.write_text(printed)
    assert run_main(["train", "--config", str(path), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    given, read = (parse_arguments(words, _train_parser) for words in (line.split(), ["--config", str(path)]))
    assert given == read
    config = TrainConfig(**given)
    assert TrainConfig(**read) == config
    assert TrainConfig.from_dict(config.given()) == config


def test_what_is_typed_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("steps: 5\nadapter: {name: lora, rank: 3, alpha: 2.0}\nschedule: linear\n")
    read = parse_arguments(["--config", str(path), "--adapter.rank", "4", "--schedule", "constant"], _train_parser)
    assert read == {"steps": 5, "adapter": {"name": "lora", "rank": 4, "alpha": 2.0}, "schedule": {"name": "constant"}}
    named_anew = parse_arguments(["--config", str(path), "--adapter", "vera"], _train_parser)
    assert named_anew["adapter"] == {"name": "vera"}
    path.write_text("query_schedule: linear\nschedule: {end: 4}\n")
    with pytest.raises(ZOError, match="query_schedule and schedule are one option and were both given"):
        parse_arguments(["--config", str(path)], _train_parser)


def _train_parser() -> Parser:
    parser = Parser(prog="zo-opt train")
    COMMANDS["train"].add(parser)
    return parser


# --- quickly ---


@pytest.mark.parametrize(
    "line", [["--help"], [], ["trian"], ["train", "--stpes", "3"], ["train", "--steps", "many"], ["train", "--rank", "3"]]
)  # fmt: skip
def test_help_and_mistakes_of_plain_options_import_no_torch(line: list[str]) -> None:
    code = (
        "import sys; from zo_opt.cli.main import main\n"
        f"try: main({line!r})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_shows_the_options_of_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["train", "--adapter", "lora", "--optimizer", "lozo", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name} " in said for name in ("adapter.alpha", "optimizer.interval", "steps", "schedule.queries"))
    assert "--directions" not in said and "--adapter.bottleneck" not in said
    assert all(f"--{f.name} " in said for group in GROUPS for f in fields(group) if f.name not in PARTS)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "--optimizer adazeta",
            {"schedule.min_queries": "8", "schedule.max_queries": "15", "update_rule.beta2": "0.99"},
        ),
        (
            "--optimizer adazeta",
            {"adapter.rank": "8", "adapter.positions": "answer", "adapter.layers": "from two fifths of the depth on"},
        ),
        ("--adapter tt", {"adapter.rank": "5", "adapter.positions": "all", "adapter.layers": "the last quarter"}),
        ("--optimizer mezo", {"adapter.positions": "all", "adapter.layers": "the last quarter"}),
        ("--adapter lora", {"adapter.rank": "8", "adapter.seed": "the run's"}),
        ("--update_rule amsgrad", {"update_rule.beta2": "0.999"}),
        ("--optimizer adamw", {"optimizer.max_grad_norm": "1.0", "optimizer.beta2": "0.99"}),
        ("--optimizer fzoo", {"schedule.queries": "8"}),
        ("--optimizer fzoo --schedule constant", {"schedule.queries": "1"}),
    ],
)
def test_help_shows_what_a_run_would_take(line: str, shown: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["train", *line.split(), "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, value in shown.items():
        assert re.search(rf"--{name}\+? (?:(?! --).)*?default: {re.escape(value)}\)", said), name
