"""``zo-opt``: one subcommand a module."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from zo_opt import __version__
from zo_opt.choices import did_you_mean
from zo_opt.errors import NonFiniteLossError, RankError, ZOError
from zo_opt.training.options import COMPARISONS_OWN, GROUPS, PARTS, NonNegativeInt, PositiveFloat, PositiveInt
from zo_opt.training.parsing import parse_arguments
from zo_opt.training.sentences import Parser
from zo_opt.training.stop import InterruptedRunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (training failed, or status of a run that did), 2 (a mistake in what was given), 128 + signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    rank = int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
    who = f"zo-opt (rank {rank})" if rank else "zo-opt"
    try:
        return _run(arguments)
    except ZOError as error:
        errors.print(f"{who}: error: {error}", markup=False)
        return 2
    except (NonFiniteLossError, RankError) as error:
        if not rank or isinstance(error, RankError):  # the same on all ranks
            errors.print(f"{who}: training failed: {error}", markup=False)
        return 1
    except InterruptedRunError as stop:
        if not rank:
            errors.print(f"zo-opt: {stop}", markup=False)
        return stop.exit_code
    except KeyboardInterrupt:
        errors.print("zo-opt: interrupted")
        return 130


@dataclass(frozen=True)
class Command:
    """One subcommand; its module in this folder has ``run(options, command_line)``.

    Attributes:
        summary: what ``zo-opt --help`` says.
        description: what its own help says.
        add: adds its own options.
        groups: dataclasses of options that it has besides; it is told those that were given, and has defaults of its own.
        several: the methods whose options it takes, from what was given; None where one adapter and optimizer are chosen by name.
        skip: options of the groups that it does not have.
        parts: those chosen by name; all where there are groups.
    """

    summary: str
    description: str
    add: Callable[[Parser], None]
    groups: tuple[type, ...] = ()
    several: Callable[[Mapping[str, Any]], Mapping[str, list[Any]]] | None = None
    skip: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()


def _run(arguments: Sequence[str]) -> int:
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    if chosen is None:
        _overview().parse_args(list(arguments) or ["--help"])
    if chosen is None or chosen not in COMMANDS:
        raise ZOError(
            f"{chosen!r} is no command; choose one of {', '.join(COMMANDS)}.{did_you_mean(str(chosen), COMMANDS)}"
        )
    command, rest = COMMANDS[chosen], list(arguments)
    rest.remove(chosen)

    def parser() -> Parser:
        made = Parser(prog=f"zo-opt {chosen}", description=command.description)
        command.add(made)
        return made

    print_config = "--print_config" in rest
    rest = [a for a in rest if a != "--print_config"]
    parts = PARTS if command.groups else command.parts
    values = parse_arguments(rest, parser, command.groups, skip=command.skip, parts=parts, several=command.several)
    if print_config:
        return _print_config(values)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and chosen != "train":
        raise ZOError(f"zo-opt {chosen} is one process; start it without torchrun.")
    run: Any = importlib.import_module(f"zo_opt.cli.{chosen}").run
    code = run(Namespace(**values), shlex.join(["zo-opt", *arguments]))
    return code if isinstance(code, int) else 0


def _print_config(values: dict[str, Any]) -> int:
    """The options given, as a file for ``--config``."""
    import yaml

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    sys.stdout.write(yaml.safe_dump(plain, sort_keys=False))
    return 0


def _overview() -> Parser:
    """What there is."""
    parser = Parser(
        prog="zo-opt", description="Fine-tune language models with forward passes alone.", version=__version__
    )
    commands = parser.add_subcommands(dest="command", required=False)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, Parser(description=command.description), help=command.summary)
    return parser


def _add_train(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file of options; --print_config prints those given as one")


def _add_compare(parser: Parser) -> None:
    from zo_opt.comparison.options import CompareConfig

    _add_train(parser)
    parser.add_class_arguments(CompareConfig, None)


def _compared(values: Mapping[str, Any]) -> Mapping[str, list[Any]]:
    """Adapters and optimizers of the methods compared."""
    from zo_opt.comparison.options import CompareConfig, unions

    return unions(CompareConfig(methods=values.get("methods", CompareConfig.methods)).check_methods())


def _add_eval(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--eval_file", type=Path | None, help="other rows, with the columns of the run's own")
    parser.add_argument("--zero_shot", type=bool, default=False, help="leave the adapter out")
    parser.add_argument(
        "--precision", type=str | None, help="of the base: mixed, fp32 or auto; the run's own if left out"
    )
    _add_device(parser)
    _add_trust(parser)


def _add_predict(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument(
        "--file", type=Path | None, help="rows with the columns of the run's prompt; labels are not needed"
    )
    parser.add_argument("--out", type=Path | None, help="a new .jsonl file; else to the terminal")
    parser.add_argument(
        "--batch_size", type=PositiveInt | None, help="rows in a batch; the run's eval_batch_size if not given"
    )
    _add_device(parser)
    _add_trust(parser)


def _add_generate(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--prompt", type=str | None, help="a text")
    parser.add_argument(
        "--file",
        type=Path | None,
        help="rows with the columns of the run's prompt, or a .txt file of texts, a line each",
    )
    parser.add_argument(
        "--chat", type=bool, default=False, help="a conversation: lines from the terminal, each answered"
    )
    parser.add_argument(
        "--form", type=Literal["run", "chat", "plain"], default="run",
        help="run: in the run's own prompt; chat: as what a user says, in the tokenizer's chat template; plain: as it is",
    )  # fmt: skip
    parser.add_argument("--out", type=Path | None, help="a new .jsonl file; else to the terminal, while it is written")
    parser.add_argument(
        "--max_new_tokens", type=PositiveInt | None, help="the most tokens written; the task's own, else 64"
    )
    parser.add_argument(
        "--do_sample", type=bool | None, help="draw tokens; else the checkpoint's own way, mostly the likeliest token"
    )
    parser.add_argument("--temperature", type=PositiveFloat | None, help="of sampling")
    parser.add_argument(
        "--top_p", type=PositiveFloat | None, help="of sampling: from the likeliest tokens of this share"
    )
    parser.add_argument("--top_k", type=PositiveInt | None, help="of sampling: from so many of the likeliest tokens")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of sampling")
    _add_device(parser)
    _add_trust(parser)


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", type=str | None, help="cpu, cuda or auto; the run's if not given")


def _add_diagnose(parser: Parser) -> None:
    from zo_opt.cli.diagnose import DiagnoseConfig

    _add_train(parser)
    parser.add_class_arguments(DiagnoseConfig, None)


def _add_schedule(parser: Parser) -> None:
    from zo_opt.cli.schedule import ScheduleConfig
    from zo_opt.schedules import SCHEDULES

    parser.epilog = f"Schedules: {', '.join(SCHEDULES)}; or module:function, your own."
    _add_train(parser)
    parser.add_class_arguments(ScheduleConfig, None, skip={"schedule"})


def _scheduled(values: Mapping[str, Any]) -> Mapping[str, list[Any]]:
    from zo_opt.cli.schedule import kinds

    return kinds(values)


def _add_plan(parser: Parser) -> None:
    from zo_opt.cli.plan import PlanConfig

    parser.add_class_arguments(PlanConfig, None)


def _add_status(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the output_dir of a run or of a comparison")
    parser.add_argument("--follow", type=bool, default=False, help="go on showing it until it ends")


def _add_replay(parser: Parser) -> None:
    parser.add_argument("journal", type=Path, help="the run's output_dir, or the journal in it")
    parser.add_argument("--to", type=Path | None, help="a new directory for the adapter")
    parser.add_argument("--steps", type=int | None, help="the adapter after so many steps; after all if not given")
    parser.add_argument("--device", type=str | None, help="cpu, cuda or auto; the run's if not given")
    parser.add_argument("--inexact", type=bool, default=False, help="accept weights that differ from training's bits")
    _add_trust(parser)


def _add_merge(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--to", type=Path | None, help="a new directory for the model and its tokenizer")
    parser.add_argument("--as", type=str, default="model", help="model, or lora: the adapter alone in PEFT's format")
    _add_trust(parser)


def _add_trust(parser: Parser) -> None:
    """What was allowed when the run was made is not taken from its directory, which may be a stranger's."""
    parser.add_argument(
        "--trust_remote_code", type=bool, default=False, help="let the base model's own Python code run, as in training"
    )


COMMANDS = {
    "train": Command(
        "tune a model on labelled rows",
        "Tune a model, evaluate it before and after, and write a report. Without options: the built-in model and task.",
        _add_train,
        GROUPS,
    ),
    "compare": Command(
        "compare methods on the same data, budget and memory",
        "Run several methods at one budget, each in a process of its own, and show what they cost and give.",
        _add_compare,
        GROUPS,
        _compared,
        COMPARISONS_OWN,
    ),
    "eval": Command(
        "evaluate a run again, or on other rows", "Evaluate the model that a run of zo-opt train made.", _add_eval
    ),
    "predict": Command(
        "label new rows with a run's model",
        "The label of each row of a file, with probabilities, by the model that a run of zo-opt train made.",
        _add_predict,
    ),
    "generate": Command(
        "write with a run's model",
        "What the model that a run of zo-opt train made writes after a prompt.",
        _add_generate,
    ),
    "diagnose": Command(
        "find zo_eps, lr and precision before training",
        "Measure which zo_eps, lr and precision a model and task can bear, without training.",
        _add_diagnose,
        GROUPS,
    ),
    "schedule": Command(
        "show query schedules as a table and a picture",
        "Show how many queries each step takes, and what that costs, before training.",
        _add_schedule,
        parts=("schedule",),
        several=_scheduled,
    ),
    "plan": Command(
        "which methods fit in memory, before downloading anything",
        "What each method needs in memory, from the model's config alone, before anything is loaded.",
        _add_plan,
    ),
    "status": Command(
        "follow a run from another terminal",
        "Where a run stands, seen from another terminal: progress, losses, checkpoint, journal.",
        _add_status,
    ),
    "replay": Command(
        "rebuild a tuned adapter from its journal",
        "Rebuild the adapter that a run tuned, to the bit, from its base model and its journal.",
        _add_replay,
    ),
    "merge": Command(
        "save the tuned model as a plain one, or the adapter as a LoRA",
        "Fold the adapter that a run tuned into its base model, and save a plain model.",
        _add_merge,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
