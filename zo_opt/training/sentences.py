"""The parser of options, whose mistakes are sentences. jsonargparse says what is wrong in its own words, which are read here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from types import MappingProxyType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from zo_opt.choices import did_you_mean
from zo_opt.errors import ZOError
from zo_opt.training.help import EXIT_CODES, HelpFormatter, advice
from zo_opt.training.options import PARTS

# What users of transformers, or of earlier versions, would type.
_ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps", "lr_scheduler_type": "lr_schedule",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size", "max_seq_length": "max_length", "resume_from_checkpoint": "resume",
    "model": "model_name_or_path", "quantize": "quantise", "load_in_8bit": "quantise", "load_in_4bit": "quantise", "eps": "zo_eps",
     "bf16": "precision", "fp16": "precision",
    "optim": "optimizer", "validation_file": "eval_file", "dataset_name": "dataset", "dataset_config_name": "dataset_config",
    "eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps", "load_best_model_at_end": "keep", "early_stopping_patience": "patience",
    "clip": "step_control.factor", "alpha": "schedule.alpha", "beta": "schedule.beta", "queries": "schedule.queries",
    "max_queries": "schedule.max_queries", "min_queries": "schedule.min_queries",
    "milestones": "schedule.milestones", "beta1": "update_rule.beta1", "beta2": "update_rule.beta2",
    "rank": "adapter.rank", "lora_r": "adapter.rank", "lora_alpha": "adapter.alpha", "tt_rank": "adapter.tt_rank",
    "layers": "adapter.layers", "target_modules": "adapter.target_modules", "bottleneck": "adapter.bottleneck",
    "max_grad_norm": "optimizer.max_grad_norm",
}  # fmt: skip


_NOT_HERE = {
    "lora_dropout": "two losses must differ by the perturbation alone, so that there is no dropout",
    "logging_steps": "every step is recorded in metrics.jsonl",
    "overwrite_output_dir": "no result is ever overwritten; give a new --output_dir",
    "save_total_limit": "one checkpoint is kept, and with --keep best the best weights",
    "gradient_checkpointing": "forward passes keep nothing for a way back",
}


class Parser(ArgumentParser):
    """Mistakes in options are sentences; true-or-false options may stand alone.

    Attributes:
        parts: those that its command has.
        names: of the parts whose options it has.
        asked: names given to parts; None where none was, so that nothing heavy is asked, or where there are several of a part.
        notes: what its help says besides, at the end.
    """

    parts: Sequence[str] = ()
    names: Mapping[str, str | None] = MappingProxyType({})
    asked: Mapping[str, str | None] | None = None
    notes: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What a short form means changes with every new option.
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        with self._heeding_size():
            return super().parse_args(*args, **kwargs)

    def parse_object(self, *args: Any, **kwargs: Any) -> Any:
        with self._heeding_size():
            return super().parse_object(*args, **kwargs)

    @contextmanager
    def _heeding_size(self) -> Iterator[None]:
        """An integer beyond every float, where a float is wanted, is no mistake that jsonargparse knows."""
        try:
            yield
        except OverflowError as error:
            raise ZOError(
                f"an option was given a number of more than 308 digits; give one that a float can hold. See {self.prog} --help."
            ) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split()).rstrip(".")
        sentence = f"{text}."
        if (found := re.match(r'Parser key "([\w.]+)": (.*)', text)) is not None and found[1] in self.hints():
            sentence = f"{found[1]}={_given(found[2])} is not possible; give {advice(self.hints()[found[1]])}."
        elif (found := re.match(r"argument --([\w.]+): expected (?:one|at least one) argument", text)) is not None:
            sentence = f"--{found[1]} was given without a value; give {advice(self.hints()[found[1]])}."
        elif (found := re.match(r"the following arguments are required: (\w+)", text)) is not None:
            said = next((a.help for a in self._actions if a.dest == found[1]), "")
            sentence = f"{self.prog} needs {found[1]}: {said}."
        elif (found := re.match(r"unrecognized arguments: ([^-\s]\S*)", text)) is not None:
            sentence = f"{found[1]!r} stands alone; options are given with their names, such as --{self._first_option()} {found[1]}."
        elif (
            found := re.match(r"unrecognized arguments: -*([\w.\-]+)|(?:Key|Option) '([\w.]+)' is not", text)
        ) is not None:
            sentence = self.unknown(found[1] or found[2])
        elif (found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)) is not None:
            sentence = self.unknown(f"{found[1]}.{found[2]}")
        raise ZOError(f"{sentence} See {self.prog} --help.")

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help; of a hundred options the usage names none."""
        text = super().format_help(*args, **kwargs).rstrip("\n").replace(",null}", "}") + "\n"
        if self.parts:
            text = re.sub(r"\Ausage: .*?\n\n", f"usage: {self.prog} [options]\n\n", text, flags=re.S)
        return text + "".join(f"\n{fill(note, 79)}\n" for note in (*self.notes, EXIT_CODES))

    def hints(self) -> dict[str, Any]:
        """Option -> its type."""
        return {a.dest: getattr(a, "_typehint", None) or a.type for a in self._actions if a.dest != "help"}

    def _first_option(self) -> str:
        """An option to name as an example."""
        return next(name for name in ("output_dir", "out", "to", "device", *self.hints()) if name in self.hints())

    def let_flags_stand_alone(self) -> None:
        """``--resume`` means ``--resume true``."""
        for action in self._actions:
            if getattr(action, "_typehint", None) in (bool, bool | None):
                action.nargs, action.const = "?", True

    def unknown(self, name: str) -> str:
        """What to say of an option that there is not."""
        known, (part, dot, option) = list(self.hints()), name.partition(".")
        optimizer = self.names.get("optimizer")
        if part in without_options(optimizer):
            return f"{part} is no option of optimizer {optimizer!r}; leave it out, or choose another optimizer."
        if part in PARTS and option == "name":
            there = next((name for name in ("methods", "query_schedule") if name in known), None)
            return f"--{part} is not known." + (f" Did you mean --{there}?" if there is not None else "")
        if name in _NOT_HERE:
            return f"--{name} is not known: {_NOT_HERE[name]}."
        if part in PARTS and dot:
            has = [k.partition(".")[2] for k in known if k.startswith(f"{part}.") and not k.endswith(".name")]
            chosen = f"{part} {self.names[part]!r}" if self.names.get(part) else f"the {part}"
            return f"{chosen} has no option {option!r}; it has {', '.join(has) or 'none'}.{did_you_mean(option, has)}"
        meant = _ELSEWHERE.get(name, "")
        owner, dot, option = meant.partition(".")
        if dot and owner in self.parts and self.asked is not None and not name.startswith("lora_"):
            meant = " or --".join(f"{part}.{option}" for part in having(option, self.asked)) or meant
        if meant in known or owner in self.parts:
            return f"--{name} is not known. Did you mean --{meant}?"
        return f"--{name} is not known.{did_you_mean(name, known).replace('mean ', 'mean --')}"


def without_options(optimizer: str | None) -> frozenset[str]:
    """Options that the optimizer does not have; what they are is heavy to import, and not asked for where none is named."""
    if optimizer is None:
        return frozenset()
    from zo_opt.training.parts import fixed_options

    return fixed_options(optimizer)


def having(option: str, names: Mapping[str, str | None]) -> list[str]:
    """The parts, as they are named, that have an option: the optimizer alone, where it has."""
    from zo_opt.training.parts import TABLES, default_name, own_options

    fixed, found = without_options(names["optimizer"]), []
    for part in PARTS:
        chosen = names[part] or default_name(part, names) or "none"
        if part not in fixed and chosen in TABLES[part] and option in own_options(part, TABLES[part].find(chosen)):
            found.append(part)
    return ["optimizer"] if "optimizer" in found else found


def _given(problem: str) -> str:
    """The value within one of jsonargparse's messages."""
    found = re.search(
        r"(?:[Gg]iven value|Got value): (.*)$|: (\S+) does not conform|base 10: (\S+)|to float: (\S+)", problem
    )
    value = next((g for g in found.groups() if g is not None), "") if found is not None else ""
    value = value.strip("'")
    return value if re.fullmatch(r"[-+\d.e]+|-?(nan|inf)", value) else repr(value)
