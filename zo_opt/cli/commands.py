"""The commands and their options; what needs heavy imports is imported when its options are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zo_opt import presets
from zo_opt.cli.options import DiagnoseConfig, PlanConfig
from zo_opt.federated.options import SKIPPED, FederatedConfig
from zo_opt.training.options import COMPARISONS_OWN, GROUPS, NonNegativeInt, PositiveFloat, PositiveInt
from zo_opt.training.sentences import Parser


@dataclass(frozen=True)
class Command:
    """One subcommand; its module in this folder has ``run(options, command_line)``.

    Attributes:
        summary: what ``zo-opt --help`` says.
        description: what its own help says.
        add: adds its own options.
        groups: dataclasses of options that it has besides; it is told those that were given, and has defaults of its own.
        several: the methods whose options it takes, from what was given; None where one adapter and optimizer are chosen by name.
        skip: options and parts that it does not have, or that are not chosen by one name.
        parts: those chosen by name; all where there are groups.
        naming: what to type for help on the options of a part.
    """

    summary: str
    description: str
    add: Callable[[Parser], None]
    groups: tuple[type, ...] = ()
    several: Callable[[Mapping[str, Any]], Mapping[str, list[Any]]] | None = None
    skip: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    naming: str = "--adapter lora"


def _add_train(parser: Parser) -> None:
    _add_config(parser)
    _add_saying(parser)


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file of options; --print_config prints those given as one")
    parser.add_argument(
        "--preset", type=str, help=f"a set of options by name: {', '.join(presets.names())}; what is given besides wins"
    )


def _add_quiet(parser: Parser) -> None:
    parser.add_argument("--quiet", type=bool, default=False, help="say nothing but errors")


def _add_federated(parser: Parser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        type=Literal["prepare", "report"] | None,
        help="write a training's directory; or say how far it is",
    )
    parser.add_argument("--config", type=Path, help="a YAML file of options")
    _add_saying(parser)
    parser.add_class_arguments(FederatedConfig, None)


def _add_saying(parser: Parser) -> None:
    _add_quiet(parser)
    parser.add_argument(
        "--json", type=bool, default=False, help="the result as JSON on standard output, all else on standard error"
    )


def _add_completion(parser: Parser) -> None:
    parser.add_argument("shell", type=Literal["bash", "zsh"], help='eval "$(zo-opt completion bash)" in its start file')


def _add_compare(parser: Parser) -> None:
    from zo_opt.comparison.config import CompareConfig

    _add_config(parser)
    parser.add_class_arguments(CompareConfig, None)
    _add_saying(parser)


def _compared(values: Mapping[str, Any]) -> Mapping[str, list[Any]]:
    """Adapters and optimizers of the methods compared."""
    from zo_opt.comparison.config import CompareConfig
    from zo_opt.comparison.options import methods_of, unions

    return unions(methods_of(CompareConfig(methods=values.get("methods", CompareConfig.methods))))


def _add_eval(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument("--eval_file", type=Path | None, help="other rows, with the columns of the run's own")
    parser.add_argument("--zero_shot", type=bool, default=False, help="leave the adapter out")
    parser.add_argument(
        "--precision", type=str | None, help="of the base: mixed, fp32 or auto; the run's own if left out"
    )
    parser.add_argument(
        "--out",
        type=Path | None,
        help="a .jsonl file to which the result is added; evaluations.jsonl of the run if not given",
    )
    _add_saying(parser)


def _add_predict(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--file", type=Path | None, help="rows with the columns of the run's prompt; labels are not needed"
    )
    parser.add_argument("--out", type=Path | None, help="a new .jsonl file; else to the terminal")
    parser.add_argument(
        "--batch_size", type=PositiveInt | None, help="rows in a batch; the run's eval_batch_size if not given"
    )
    _add_quiet(parser)


def _add_generate(parser: Parser) -> None:
    _add_run(parser)
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
    parser.add_argument(
        "--batch_size", type=PositiveInt | None,
        help="with --out or --json: prompts at once; the run's eval_batch_size if not given, one at a time with --do_sample",
    )  # fmt: skip
    _add_saying(parser)


def _add_run(parser: Parser) -> None:
    """The run, and how it is loaded."""
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    _add_device(parser)
    _add_trust(parser)


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", type=str | None, help="cpu, cuda or auto; the run's if not given")


def _add_diagnose(parser: Parser) -> None:
    _add_config(parser)
    parser.add_class_arguments(DiagnoseConfig, None)
    _add_saying(parser)


def _add_schedule(parser: Parser) -> None:
    from zo_opt.cli.schedule import ScheduleConfig

    parser.add_argument("--config", type=Path, help="a YAML file of options")
    parser.add_class_arguments(ScheduleConfig, None, skip={"schedule"})
    _add_saying(parser)


def _scheduled(values: Mapping[str, Any]) -> Mapping[str, list[Any]]:
    from zo_opt.cli.schedule import kinds

    return kinds(values)


def _add_plan(parser: Parser) -> None:
    parser.add_class_arguments(PlanConfig, None)
    _add_saying(parser)


def _add_status(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the output_dir of a run or of a comparison")
    parser.add_argument("--follow", type=bool, default=False, help="go on showing it until it ends")
    parser.add_argument("--json", type=bool, default=False, help="as JSON")


def _add_replay(parser: Parser) -> None:
    parser.add_argument("journal", type=Path, help="the run's output_dir, or the journal in it")
    parser.add_argument("--to", type=Path | None, help="a new directory for the adapter")
    parser.add_argument("--steps", type=int | None, help="the adapter after so many steps; after all if not given")
    _add_device(parser)
    parser.add_argument("--inexact", type=bool, default=False, help="accept weights that differ from training's bits")
    _add_trust(parser)
    _add_saying(parser)


def _add_merge(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--to", type=Path | None, help="a new directory for the model and its tokenizer")
    parser.add_argument("--as", type=str, default="model", help="model, or lora: the adapter alone in PEFT's format")
    _add_trust(parser)
    _add_saying(parser)


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
        COMPARISONS_OWN | {"adapter", "optimizer"},
        naming="--methods adazeta,lora",
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
        skip=frozenset({"schedule"}),
        naming="--query_schedule adazeta,linear",
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
    "federated": Command(
        "prepare a training on clients' own rows, which Flower runs",
        "Prepare a federated training, in which clients exchange seeds and scalars alone; flwr runs it, and report says how far it is.",
        _add_federated,
        GROUPS,
        skip=SKIPPED,
        parts=("adapter",),
    ),
    "completion": Command(
        "commands and options completed by the shell",
        "Print a script with which a shell completes commands and options.",
        _add_completion,
    ),
}
