"""What documents name exists: commands and options of the package, files, modules, rows of tables. Their blocks run in test_blocks.py."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from zo_opt import MeZO, optim
from zo_opt.adapters import ADAPTERS
from zo_opt.cli.main import COMMANDS, main
from zo_opt.comparison.config import CompareConfig
from zo_opt.comparison.options import check
from zo_opt.optim import OPTIMIZERS
from zo_opt.tasks.builtin import TASKS
from zo_opt.training.config import TrainConfig
from zo_opt.training.parts import TABLES, own_options
from zo_opt.training.sentences import Parser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import method_pages  # noqa: E402

NAMES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
SCRIPTS = {p.name: p.read_text() for folder in ("benchmarks", "examples") for p in (ROOT / folder).glob("*.py")}
MADE = method_pages.pages()  # of the site, from the code
SHELL = PAGES | {".ci/run": (ROOT / ".ci" / "run").read_text()}


def commands(text: str) -> list[str]:
    """Every line of zo-opt in blocks, in scripts and between backticks; comments and what torchrun is told are left out."""
    lines = text.replace("\\\n", " ")
    found = [m[1] for m in re.finditer(r"^[^`#\n|]*?(?:zo-opt|zo_opt\.cli\.main) +([^`\n]*?)( +#.*)?$", lines, re.M)]
    found += re.findall(r"`zo-opt (\w+ [^`]+)`", re.sub(r"^```.*?^```", "", lines, flags=re.DOTALL | re.M))
    return [" ".join(c.split()) for c in found if c.split() and c.split()[0] in COMMANDS]


# test_blocks.py runs the lines that begin with zo-opt; torchrun's, those in prose, in scripts and on pages made from the code are parsed.
PARSED = [re.sub(r"^(?:\.venv/bin/)?zo-opt .*$", "", text, flags=re.M) for text in SHELL.values()]
COMMAND_LINES = sorted({c for text in [*PARSED, *SCRIPTS.values(), *MADE.values()] for c in commands(text)})


def arguments(command: str) -> list[str]:
    """As the shell would give them; placeholders stand for values."""
    command = (
        command.removesuffix(")")
        .replace("$'", "'")
        .replace("$methods", "lora,lora+")
        .replace('"$scratch/', '"')
        .split(" >")[0]
    )
    return [a for a in shlex.split(command) if a not in ("...", "&&")]


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_the_documents_have_commands() -> None:
    assert len(COMMAND_LINES) > 40
    assert {c.split()[0] for text in SHELL.values() for c in commands(text)} == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_a_command_is_taken_by_the_parser(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names and values of options; what is run instead is a look at what was parsed."""
    parsed: list[SimpleNamespace] = []
    name, *rest = arguments(command)
    module = importlib.import_module(f"zo_opt.cli.{name}")
    monkeypatch.setattr(module, "run", lambda options, line: parsed.append(options))
    monkeypatch.chdir(tmp_path)
    Path("my_module.py").write_text(
        "from dataclasses import dataclass\nfrom zo_opt import LoRAConfig\n"
        "def reward(predictions, references):\n    return []\n\n\n@dataclass(frozen=True)\nclass MyConfig(LoRAConfig):\n    pass\n"
    )
    if "--help" in rest:
        with pytest.raises(SystemExit, match="0"):
            main([name, *rest])
        return
    assert main([name, *rest]) == 0
    values = vars(parsed[0])
    if (
        name == "train" and "resume" not in values and "quantise" not in values
    ):  # which needs packages that are optional
        TrainConfig(**values).check()
    if name == "compare":
        check(CompareConfig(**{f.name: values[f.name] for f in fields(CompareConfig) if f.name in values}))


def known_options() -> set[str]:
    """Every option of every command."""
    from zo_opt.cli.diagnose import DiagnoseConfig
    from zo_opt.cli.plan import PlanConfig
    from zo_opt.cli.schedule import ScheduleConfig

    groups = (TrainConfig, CompareConfig, PlanConfig, ScheduleConfig, DiagnoseConfig)
    plain = {f.name for group in groups for f in fields(group)}
    nested = {
        f"{part}.{o}" for part, table in TABLES.items() for kind in table.values() for o in own_options(part, kind)
    }
    own = set()
    for command in COMMANDS.values():
        parser = Parser()
        command.add(parser)
        own |= parser.hints().keys()
    return plain | nested | own | {"help", "print_config"}


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ("CONTRIBUTING.md", "CHANGELOG.md")])
def test_options_named_in_prose_exist(page: str) -> None:
    foreign = {"nproc_per_node", "nnodes", "max_restarts"} | {
        o for text in SCRIPTS.values() for o in re.findall(r'"--(\w+)"', text)
    }
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.M)
    named = {o.rstrip(".") for code in re.findall(r"`([^`\n]+)`", prose) for o in re.findall(r"--([a-z][\w.]*)", code)}
    assert named - known_options() - foreign == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_of_scripts_in_documents_exist(script: str) -> None:
    for text in [*PAGES.values(), *SCRIPTS.values()]:
        for line in re.findall(rf"(?:benchmarks|examples)/{script}([^`\n]*)", text.replace("\\\n", " ")):
            for option in re.findall(r"--(\w+)", line.split("#")[0]):
                assert script == "zo_trainer.py" or f'"--{option}"' in SCRIPTS[script], (script, option)


@pytest.mark.parametrize("page", [*SHELL, *SCRIPTS])
def test_files_named_exist(page: str) -> None:
    text = SHELL.get(page, SCRIPTS.get(page, ""))
    named = set(re.findall(r"\b((?:zo_opt|kernels|tests|benchmarks|examples|docs)/[\w/.-]*\w)", text))
    links = re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", text)
    named |= {os.path.normpath(Path(page).parent / link) for link in links}
    written = {"benchmarks/results/gpu.json", *(f"docs/{made}" for made in MADE)}  # on a GPU; with the site
    assert {n for n in named - written if not (ROOT / n).exists() and not list(ROOT.glob(f"{n}*"))} == set()


@pytest.mark.parametrize("page", [p for p in (*PAGES, *SCRIPTS) if p != "CHANGELOG.md"])  # which has the old ones
def test_names_of_modules_exist(page: str) -> None:
    for name in set(re.findall(r"\b(?:zo_opt|tt_kernels)(?:\.\w+)+", PAGES.get(page, SCRIPTS.get(page, "")))):
        found: Any = importlib.import_module(name.split(".")[0])
        for i, part in enumerate(name.split(".")[1:], start=2):
            try:
                found = importlib.import_module(".".join(name.split(".")[:i]))
            except ModuleNotFoundError:
                found = getattr(found, part)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_scripts_import_of_the_package_exists(script: str) -> None:
    for node in ast.walk(ast.parse(SCRIPTS[script])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("zo_opt", "tt_kernels"):
            found = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(found, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


# --- tables ---


def rows_of(page: str, header: str) -> dict[str, list[str]]:
    """A table's rows by what stands first in them, without backticks."""
    text = PAGES[page]
    table = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {row[0].strip("` ").split("`")[0]: row for row in cells}


def test_the_table_of_optimizers() -> None:
    """Of each method its class, what a step costs and what cannot be given to it."""
    table = rows_of("docs/methods/optimizers.md", "| name | class |")
    for name, (_, kind, _, cost, _, _, fixed) in table.items():
        assert getattr(optim, kind.strip("`")) is OPTIMIZERS[name]
        assert fixed == ", ".join(f"`{f}`" for f in sorted(OPTIMIZERS[name].method.fixes)), name
        module = torch.nn.Linear(2, 2)  # GRZO splits, which needs one
        optimizer = OPTIMIZERS[name](module.parameters(), module=module)
        times, plus = re.findall(r"(?:(\d*)Q)?(?:(?: \+ |^)(\d+)$)?", cost.split(" (")[0].removeprefix("counted as "))[
            0
        ]
        per_query = int(times or 1) if "Q" in cost else 0
        assert optimizer.forwards(1, 3) == 3 * per_query + int(plus or 0), name


def test_the_table_of_adapters() -> None:
    for name, row in rows_of("docs/methods/adapters.md", "| `--adapter`, class |").items():
        assert row[0] == f"`{name}`, `{ADAPTERS[name].__name__}`"


def test_tasks_that_documents_name_exist() -> None:
    named = {
        t
        for row in rows_of("docs/how-to/data.md", "| task | kind | rows |").values()
        for t in re.findall(r"`(\w[\w-]*)`", row[0])
    }
    assert named <= TASKS.keys()


def test_arguments_of_the_trainer() -> None:
    from transformers import TrainingArguments

    from zo_opt.training import ZOArguments

    own = {f.name for f in fields(ZOArguments)} - {f.name for f in fields(TrainingArguments)}
    rows = rows_of("docs/how-to/trainer.md", "| argument | meaning")
    named = {a for row in rows.values() for a in re.findall(r"`(\w+)`", row[0])}
    assert named == own


def test_folders_that_documents_list() -> None:
    """The list has every folder, and says what its own first sentence says."""
    table = rows_of("docs/developing/design.md", "| folder | what |")
    packages = {p.parent.name for p in (ROOT / "zo_opt").glob("*/__init__.py")}
    assert table.keys() == {f"zo_opt/{name}/" for name in packages} | {"kernels/tt_kernels/"}
    for folder, (_, what) in table.items():
        said = importlib.import_module(folder.removeprefix("kernels/").strip("/").replace("/", ".")).__doc__ or ""
        sentence = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", " ".join(said.split("\n\n")[0].split()).replace("``", "`"))
        assert what == sentence.split(". ")[0].rstrip("."), folder


# --- what is promised ---

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_floors_are_the_versions_that_ci_runs() -> None:
    pinned = {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    }
    older = {"transformers": "transformers-4.57", "datasets": "transformers-4.57", "rich": "flower", "flwr": "flower"}
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for requirement in map(Requirement, group):
            version = pinned.get(requirement.name.lower().replace("_", "-"), "none")
            floor = next((s.version for s in requirement.specifier if s.operator == ">="), "")
            if requirement.name in older:  # whose floors are those of an older environment
                assert (
                    f"{requirement.name}=={floor}." in (ROOT / f"constraints-{older[requirement.name]}.txt").read_text()
                )
            elif floor:
                assert version.split(".")[:2] == floor.split("."), requirement


def test_what_is_imported_is_declared_and_used() -> None:
    """What the package imports of others is a dependency (or an extra), and no dependency is imported by nobody."""
    sources = [p.read_text() for folder in ("zo_opt", "kernels") for p in (ROOT / folder).rglob("*.py")]
    tops = {top for text in sources for top in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)}
    names = packages_distributions()
    imported = {d.lower().replace("_", "-") for top in tops - sys.stdlib_module_names for d in names.get(top, [])}
    required = {Requirement(r).name for r in PROJECT["dependencies"]}
    optional = {Requirement(r).name for group in PROJECT["optional-dependencies"].values() for r in group}
    assert imported - {"zo-opt"} <= required | optional
    assert required <= imported


# --- diagrams ---


def called(action: Callable[[], object]) -> list[str]:
    """The package's functions that an action calls, in order, as docs/developing/design.md writes them."""
    calls: list[str] = []
    package = str(ROOT / "zo_opt") + "/"

    def note(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append(f"{frame.f_code.co_filename.removeprefix(package)} · {frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def diagram(title: str) -> list[str]:
    text = PAGES["docs/developing/design.md"].split(f"## {title}\n")[1]
    return re.findall(r"[\w/]+\.py · [\w.]+", text.split("```text\n")[1].split("```")[0])


def assert_in_order(named: list[str], calls: list[str]) -> None:
    """Each is called, after the first call of the one before."""
    for at, name in enumerate(named):
        assert name in calls, f"{name} is not called after {named[at - 1]}"
        calls = calls[calls.index(name) + 1 :]


def test_the_diagram_of_a_step() -> None:
    theta = torch.nn.Parameter(torch.ones(3))
    optimizer = MeZO([theta], lr=0.1, step_control="clip")
    assert_in_order(diagram("One step"), called(lambda: optimizer.step(lambda: theta.square().sum())))


def test_the_diagrams_of_a_run(
    toy_options: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = toy_options(steps=1, output_dir="out")
    calls = called(lambda: main(line))
    assert Path("out/results.json").is_file()
    assert_in_order(diagram("From options to a run"), calls)
    assert_in_order(diagram("A row's way"), calls)


def test_short_names_of_benchmarks_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in the tables of the benchmarks make a run's options."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measure, optimizers, split, objectives = (
        importlib.import_module(name) for name in ("measure", "optimizers", "split", "objectives")
    )
    settings = [*split.SIDES.values(), objectives.ROWS, objectives.WRITING]
    for setting in [*settings, *(options | adapter for options, _, adapter in optimizers.METHODS.values())]:
        TrainConfig(**measure.nested(setting)).check()
