"""Options from a command line, a file or a mapping: one way for all of them to become plain, typed values.

jsonargparse knows the types. Parts that are chosen by name have options of their own, which are those of the class or function of that
name: the parser is built for the names that were given, so that an option that a method does not have is no option at all. Plain options
are looked at first, before anything heavy is imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import docstring_parser
import yaml

from zo_opt import presets
from zo_opt.errors import ZOError
from zo_opt.training.help import part_names
from zo_opt.training.options import GROUPS, PARTS, LearningOptions
from zo_opt.training.sentences import Parser, without_options

_DEEPEST = 20  # lists and mappings within each other in a file of options
_ALIASES = {"query_schedule": "schedule"}  # the schedule's name in Python


def parse_arguments(
    arguments: Sequence[str],
    parser: Callable[[], Parser],
    groups: Sequence[type] = GROUPS,
    *,
    skip: frozenset[str] = frozenset(),
    parts: Sequence[str] = PARTS,
    several: Callable[[Mapping[str, Any]], Mapping[str, list[Any]]] | None = None,
) -> dict[str, Any]:
    """The options given on a command line, typed; ``--config FILE`` brings those of a YAML file, which come first.

    Args:
        arguments: without the command's name.
        parser: makes a parser with the command's own arguments.
        groups: dataclasses of options that it has besides; with them, only what was given is returned.
        skip: options of the groups that it does not have.
        parts: those that it has.
        several: from the plain options given, the classes of parts of which there are several, so that all their options are taken.

    Raises:
        ZOError: on the first mistake.
    """
    if not groups and not parts:
        alone = parser()
        alone.let_flags_stand_alone()
        return _plain(alone.parse_args(list(arguments)))
    files, line = _without_config(arguments)
    if parts is PARTS:
        line = [re.sub(rf"^--({'|'.join(_ALIASES)})(?=[=.]|$)", lambda m: f"--{_ALIASES[m[1]]}", a) for a in line]
    line = [re.sub(rf"^--({'|'.join(parts)})(?==|$)", r"--\1.name", a) for a in line]
    values: dict[str, Any] = {}
    for path in files:
        values = _merged(values, normalised(read_options_file(path), parts))
    names = {part: _named(line, part) or _name_of(values.get(part)) for part in PARTS}
    first, plain, helping = add_plain_options(parser(), groups, skip), {}, bool({"--help", "-h"}.intersection(line))
    first.asked = names if several is None and any(names.values()) else None
    with suppress(ZOError) if helping else nullcontext():  # help is given whatever stands beside it
        plain = _parse_plain([a for a in line if a not in ("--help", "-h")], first, parts)
    if helping and not any(names.values()) and (several is None or not plain):
        _add_names(first, [part for part in parts if part not in skip])
        first.parse_args(["--help"])
    kinds = several(values | plain) if several is not None else {}
    values = {k: v for k, v in values.items() if k not in PARTS or _name_of(v) in (None, names[k])}  # not named anew
    full = parser()
    add_plain_options(full, groups, skip | without_options(names["optimizer"]))
    add_parts(full, names, kinds, parts)
    full.let_flags_stand_alone()
    given = _merged(_of_object(full, values), _plain(full.parse_args(line, defaults=False)))
    return given if several is not None else _with_names(given, names)


def typed(values: Mapping[str, Any], groups: Sequence[type] = GROUPS, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Plain values, such as a record's, as typed options.

    Raises:
        ZOError: an option that there is not, or a value that is not possible.
    """
    values = normalised(values, parts)
    parser, names = Parser(prog="zo-opt train"), {part: _name_of(values.get(part)) for part in PARTS}
    add_plain_options(parser, groups, without_options(names["optimizer"]))
    add_parts(parser, names, parts=parts)
    return _with_names(_of_object(parser, values), names)


def own_code(values: Mapping[str, Any]) -> set[str]:
    """The user's own code that options name: ``module:name`` of parts, tasks and objectives.

    >>> own_code({"optimizer": {"name": "research:MyZO"}, "objective": "loss"})
    {'research:MyZO'}
    """
    named = [values.get(key) for key in (*PARTS, "query_schedule", "task", "objective")]
    flat = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return {name for one in flat if (name := _name_of(one)) is not None and ":" in name}


def normalised(values: Mapping[str, Any], parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Every part that is chosen by name as ``{"name": ...}``, under its own key; what is null is left out.

    Raises:
        ZOError: one part under two keys.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if parts is not PARTS:
        return given
    for alias, part in _ALIASES.items():
        if alias in given and part in given:
            raise ZOError(
                f"{alias} and {part} are one option and were both given; give {part} with a name and its options."
            )
    named = {_ALIASES.get(key, key): value for key, value in given.items()}
    return {k: {"name": v} if k in PARTS and isinstance(v, str) else v for k, v in named.items()}


def add_plain_options(parser: Parser, groups: Sequence[type], skip: Set[str] = frozenset()) -> Parser:
    """The options of groups that are no parts, but for those in ``skip``."""
    for group in groups:
        parser.add_class_arguments(group, None, skip=set(PARTS) | skip)
    return parser


def add_parts(
    parser: Parser,
    names: Mapping[str, str | None],
    several: Mapping[str, list[Any]] | None = None,
    parts: Sequence[str] = PARTS,
) -> None:
    """Parts by name, each with the options of what it is; ``several``: parts of which there are several, and no name.

    Raises:
        ZOError: a name is not known.
    """
    from zo_opt.training.parts import TABLES, default_name, own_options, shown_defaults  # what they are is heavy

    fixed = without_options(names["optimizer"])
    parser.parts = parts
    parser.names = {part: names[part] or default_name(part, names) for part in parts if part not in (several or {})}
    for part in parts:
        if part in fixed:
            continue
        kinds = (several or {}).get(part, [])
        chosen = parser.names.get(part)
        group = parser.add_argument_group(f"{part} ({chosen})" if chosen and not kinds else part)
        if not kinds:
            group.add_argument(f"--{part}.name", type=str, help=_said_of(part, TABLES[part]))
            kinds = [TABLES[part].find(chosen)] if chosen and chosen != "none" else []
        added: set[str] = set()
        for kind in kinds:
            hints, helps = option_types(kind), _helps(kind)
            defaults = shown_defaults(part, kind, names) if parts is PARTS else own_options(part, kind)
            for name, default in defaults.items():
                if name not in added:
                    added.add(name)
                    group.add_argument(
                        f"--{part}.{name}", type=hints.get(name, Any), default=default, help=helps.get(name)
                    )


def _add_names(parser: Parser, parts: Sequence[str]) -> None:
    """Parts with the names that there are, and nothing of what they are, which takes torch to say."""
    parser.parts = parser.parts or parts
    group = parser.add_argument_group("What is chosen by name") if parts else None
    for part in parts:
        assert group is not None
        default = getattr(LearningOptions, part)
        group.add_argument(f"--{part}.name", type=str, default=default, help=_said_of(part, part_names(part)))


def _said_of(part: str, names: Iterable[str]) -> str:
    """The help of a part's name."""
    said = next(
        p.description for p in docstring_parser.parse(LearningOptions.__doc__ or "").params if p.arg_name == part
    )
    return f"{said} Known: {', '.join(names)}."


def read_options_file(path: Path) -> dict[str, Any]:
    """A YAML file of options: without references, nine lines of which would be read as billions, and of bounded depth.

    Raises:
        ZOError: it cannot be read, or holds something else.
    """
    try:
        content, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ZOError(f"{path} has YAML references (*name); write the values out.")
            if depth > _DEEPEST:
                raise ZOError(f"{path} is nested more than {_DEEPEST} deep; options are not.")
        values = yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError, RecursionError, MemoryError, OverflowError) as error:
        said = (
            error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
        raise ZOError(
            f"the file of options {path} cannot be read ({said}); give the path of a YAML file of options."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ZOError(f"{path} is no file of options; give lines such as 'steps: 200'.")
    return values


def _without_config(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    files, line, rest = [], [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--preset":
            files.append(presets.file_of(value if equals else next(rest, "")))
        elif name != "--config":
            line.append(argument)
        elif (path := value if equals else next(rest, "")) and not path.startswith("--"):
            files.append(Path(path))
        else:
            raise ZOError("--config was given without a file; give the path of a YAML file of options.")
    return files, line


def _parse_plain(line: Sequence[str], parser: Parser, parts: Sequence[str]) -> dict[str, Any]:
    """The plain options; a mistake in them is found without importing what the parts are."""
    parser.parts = parts
    known, taken, mine = set(parser.hints()), [], True
    for argument in line:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            mine = name in known
            if not mine and name.partition(".")[0] not in PARTS:
                parser.error(f"unrecognized arguments: --{name}")
        if mine:
            taken.append(argument)
    parser.let_flags_stand_alone()
    return _plain(parser.parse_args(taken, defaults=False))


def _named(line: Sequence[str], part: str) -> str | None:
    """The name given to a part on a command line, the last one."""
    found = None
    for i, argument in enumerate(line):
        name, equals, value = argument.partition("=")
        if name == f"--{part}.name":
            found = value if equals else (line[i + 1] if i + 1 < len(line) else None)
    return found


def _name_of(choice: Any) -> str | None:
    name = choice.get("name") if isinstance(choice, Mapping) else choice
    return name if isinstance(name, str) else None


def _of_object(parser: Parser, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are no text, typed; a list of choices is checked where it is made."""
    lists = {k: v for k, v in values.items() if k in PARTS and isinstance(v, list)}
    plain = {k: v for k, v in values.items() if k not in lists}
    for name in plain:
        if name not in parser.hints() and name not in PARTS:
            parser.error(f"unrecognized arguments: --{name}")
    return _plain(parser.parse_object(plain, defaults=False)) | lists


def _plain(namespace: Any) -> dict[str, Any]:
    return {k: _unrestricted(v) for k, v in namespace.as_dict().items() if k not in ("config", "help")}


def _unrestricted(value: Any) -> Any:
    """Numbers as Python's own: jsonargparse's are of the types that check their range."""
    if isinstance(value, dict):
        return {name: _unrestricted(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_unrestricted(one) for one in value]
    own = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if own is None else own(value)


def _with_names(given: dict[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    """A part whose options were given without its name has its default's."""
    from zo_opt.training.parts import default_name

    nameless = [k for k, v in given.items() if k in PARTS and isinstance(v, dict) and "name" not in v]
    return given | {part: {"name": default_name(part, names)} | given[part] for part in nameless}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The second over the first; options of a part that is named anew are its own alone."""
    merged = dict(first)
    for name, value in second.items():
        earlier = first.get(name)
        if (
            isinstance(value, dict)
            and isinstance(earlier, dict)
            and value.get("name", earlier.get("name")) == earlier.get("name")
        ):
            merged[name] = earlier | value
        else:
            merged[name] = value
    return merged


def option_types(kind: Any) -> dict[str, Any]:
    """Option -> type, of a dataclass, a class or a function."""
    target = kind if is_dataclass(kind) else kind.__init__ if inspect.isclass(kind) else getattr(kind, "choose", kind)
    hints: dict[str, Any] = {}
    with suppress(NameError, TypeError):  # names that exist for type checkers alone
        hints = get_type_hints(target)
    return {name: hint for name, hint in hints.items() if hint is not NoneType}


def _helps(kind: Any) -> dict[str, str]:
    """Option -> help, from a dataclass's metadata or a docstring's Args."""
    helps = {f.name: f.metadata["help"] for f in fields(kind) if "help" in f.metadata} if is_dataclass(kind) else {}
    for parameter in docstring_parser.parse(kind.__doc__ or "").params:
        for name in parameter.arg_name.split(","):
            helps.setdefault(name.strip(), parameter.description or "")
    return helps
