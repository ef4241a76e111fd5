"""The parser of options, whose mistakes are sentences. jsonargparse says what is wrong in its own words, which are read here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from zo_opt.choices import did_you_mean
from zo_opt.errors import ZOError
from zo_opt.training.options import PARTS

# What users of transformers, or of earlier versions, would type.
_ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "steps", "max_steps": "steps", "per_device_train_batch_size": "batch_size",
    "model": "model_name_or_path", "quantize": "quantise", "optim": "optimizer", "dataset": "train_file",
    "clip": "step_control.factor", "alpha": "schedule.alpha", "beta": "schedule.beta", "max_queries": "schedule.max_queries",
    "min_queries": "schedule.min_queries", "budget_forwards": "schedule.forwards", "lora_alpha": "adapter.alpha",
    "beta1": "update_rule.beta1", "beta2": "update_rule.beta2", "rank": "adapter.rank", "layers": "adapter.layers",
}  # fmt: skip
# What jsonargparse says of an option that there is not.
_UNKNOWN = (
    r"unrecognized arguments: -*([\w.\-]+)",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"Key '([\w.]+)' is not expected",
)


class Parser(ArgumentParser):
    """Mistakes in options are sentences; true-or-false options may stand alone.

    Attributes:
        names: of the parts whose options it has.
    """

    names: Mapping[str, str | None] = MappingProxyType({})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split()).rstrip(".")
        see = f"see {self.prog} --help."
        if (found := re.match(r'Parser key "([\w.]+)": (.*)', text)) is not None and found[1] in self.hints():
            raise ZOError(
                f"{found[1]}={_given(found[2])} is not possible; give {in_words(self.hints()[found[1]])}; {see}"
            )
        for pattern in _UNKNOWN:
            if (found := re.match(pattern, text)) is not None:
                raise ZOError(f"{self.unknown('.'.join(found.groups()))}; {see}")
        raise ZOError(f"{text}; {see}")

    def hints(self) -> dict[str, Any]:
        """Option -> its type."""
        return {a.dest: getattr(a, "_typehint", None) or a.type for a in self._actions if a.dest != "help"}

    def let_flags_stand_alone(self) -> None:
        """``--resume`` means ``--resume true``."""
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True

    def unknown(self, name: str) -> str:
        """What to say of an option that there is not."""
        known, (part, dot, option) = list(self.hints()), name.partition(".")
        optimizer = self.names.get("optimizer")
        if part in without_options(optimizer):
            return f"{part} is no option of optimizer {optimizer!r}; leave it out, or choose another optimizer"
        if part in PARTS and dot:
            has = [k.partition(".")[2] for k in known if k.startswith(f"{part}.") and not k.endswith(".name")]
            chosen = f"{part} {self.names[part]!r}" if self.names.get(part) else f"the {part}"
            meant = did_you_mean(option, has).removesuffix("?")
            return f"{chosen} has no option {option!r}; it has {', '.join(has) or 'none'}{'.' if meant else ''}{meant}"
        nested = [k for k in known if k.endswith(f".{name}")]
        meant = _ELSEWHERE.get(name) or (nested[0] if nested else "")
        hint = f" Did you mean --{meant}?" if meant else did_you_mean(name, known).replace("mean ", "mean --")
        return f"--{name} is not known.{hint or ' Check its name'}"


def without_options(optimizer: str | None) -> frozenset[str]:
    """Options that the optimizer does not have; what they are is heavy to import, and not asked for where none is named."""
    if optimizer is None:
        return frozenset()
    from zo_opt.training.parts import fixed_options

    return fixed_options(optimizer)


def in_words(hint: Any) -> str:
    """What an option of a type can be.

    >>> in_words(Literal["lm", "classification"]), in_words(int | None), in_words(list[int])
    ('lm or classification', 'a whole number or null', 'a list such as [a whole number]')
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return _or([in_words(one) for one in inner])
    if kind is Literal:
        return _or([str(one) for one in inner])
    if kind in (list, Sequence):
        return f"a list such as [{in_words(inner[0])}]"
    if kind in (dict, Mapping):
        return "a mapping such as {name: value}"
    return {
        "PositiveInt": "a whole number of at least 1, such as 1, 16 or 100",
        "NonNegativeInt": "a whole number of at least 0, such as 0, 1 or 100",
        "PositiveFloat": "a number above 0, such as 1e-3, 0.1 or 1",
        "NonNegativeFloat": "a number of at least 0, such as 0, 1e-3 or 0.1",
        "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "Path": "a path", "NoneType": "null",
    }.get(getattr(hint, "__name__", ""), str(hint))  # fmt: skip


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _given(problem: str) -> str:
    """The value within one of jsonargparse's messages."""
    found = re.search(
        r"(?:[Gg]iven value|Got value): (.*)$|: (\S+) does not conform|base 10: (\S+)|to float: (\S+)", problem
    )
    value = next((g for g in found.groups() if g is not None), "") if found is not None else ""
    return repr(value.strip("'"))
