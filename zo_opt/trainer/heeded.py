"""Arguments of the Trainer that another one leaves nothing to do: they are refused, so that nobody believes in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from zo_opt.choices import option_names, split
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES, Backpropagation, method_of
from zo_opt.schedules import SCHEDULES

# The Trainer's numbers for Adam, and what ours are called.
_ADAM = {"adam_beta1": ("beta1",), "adam_beta2": ("beta2",), "adam_epsilon": ("eps", "adam_eps")}
_ONLY_ZEROTH_ORDER = (
    "zo_eps", "zo_seed", "estimator", "directions", "query_schedule", "max_queries", "query_mode", "update_rule", "step_control",
    "max_failed_steps",
)  # fmt: skip
_QUERIES = ("queries", "max_queries", "end")  # what max_queries is in a schedule


def adams_own(arguments: Any) -> dict[str, float]:
    """The Trainer's numbers for Adam under the names that update rules and optimizers have for them."""
    return {ours: getattr(arguments, name) for name, names in _ADAM.items() for ours in names}


def check_heeded(arguments: Any) -> None:
    """Whether something looks at every argument that differs from its default.

    Raises:
        ZOError: beside another argument, nothing does; or two give one number.
    """
    given = dict(_given(arguments))
    if "loraplus_lr_embedding" in given and arguments.loraplus_lr_ratio is None:
        raise ZOError("loraplus_lr_embedding was given without loraplus_lr_ratio; give both, or leave it out.")
    if not arguments.zeroth_order:
        for name in _ONLY_ZEROTH_ORDER:
            if name in given:
                raise ZOError(
                    f"{name} was given with zo_optimizer={arguments.zo_optimizer!r}, which is backpropagation; leave it out, or choose a "
                    "zeroth-order optimizer."
                )
        return
    for name in ("optim", "optim_args", "optim_target_modules"):
        if name in given:
            raise ZOError(
                f"{name}={given[name]!r} is of backpropagation; leave it out, or give zo_optimizer='none' with it."
            )
    name, options = split("zo_optimizer", arguments.zo_optimizer)
    if OPTIMIZERS.find(name) is Backpropagation:
        return  # which is refused where the optimizer is looked at
    takers: dict[str, tuple[Sequence[str], Mapping[str, Any]]] = {
        f"zo_optimizer={name!r}": (method_of(name).own, options)
    }
    if arguments.update_rule is not None:
        rule, options = split("update_rule", arguments.update_rule)
        takers[f"update_rule={rule!r}"] = (option_names(UPDATE_RULES.find(rule)), options)
    for argument, names in _ADAM.items():
        if argument in given:
            _check_taken(argument, given[argument], names, takers)
    if "max_queries" in given and arguments.query_schedule is not None:
        schedule, options = split("query_schedule", arguments.query_schedule)
        kind = SCHEDULES.find(schedule)
        has = option_names(kind) if isinstance(kind, type) else []
        _check_taken("max_queries", given["max_queries"], _QUERIES, {f"query_schedule={schedule!r}": (has, options)})


def _check_taken(
    argument: str, value: Any, names: Any, takers: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]]
) -> None:
    """Whether one of those that take options has this one, and was not told otherwise itself."""
    taken = [(who, own, options) for who, (has, options) in takers.items() for own in names if own in has]
    if not taken:
        raise ZOError(f"{argument}={value} is of no use to {' and '.join(takers)}; leave it out.")
    for who, own, options in taken:
        if options.get(own, value) != value:
            raise ZOError(f"{argument}={value} and {own}={options[own]} of {who} are one number; leave one out.")


def _given(arguments: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that are not their defaults."""
    for f in fields(arguments):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = getattr(arguments, f.name)
        if f.init and value != default:
            yield f.name, value
