"""The rules of the design's layout, read from the source files themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"zo_opt": ROOT / "zo_opt", "tt_kernels": ROOT / "kernels" / "tt_kernels"}
LONGEST = 350  # lines of a module


def module_name(path):
    package = next(p for p in PACKAGES.values() if path.is_relative_to(p))
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for folder in PACKAGES.values() for p in sorted(folder.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def is_package(module):
    return FILES[module].name == "__init__.py"


def nodes(module):
    """All of a module's syntax but what is there for type checkers alone."""
    for top in TREES[module].body:
        if not (isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING"):
            yield from ast.walk(top)


def imports(module):
    """Full names of all that a module imports, also within functions."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def modules(*packages):
    found = [m for m in FILES if within(m, *packages)]
    assert found, f"no module named {packages}"
    return found


def test_files_are_found():
    assert {"zo_opt", "zo_opt.directions", "zo_opt.optim.machine", "tt_kernels.linear"} <= FILES.keys()
    assert "torch.Tensor" in set(imports("zo_opt.directions.base"))


# --- which way imports run ---

FORBIDDEN = {  # package -> what it must not import, besides what stands above all of these
    "tt_kernels": ["zo_opt"],
    "zo_opt.errors": ["zo_opt"],
    "zo_opt.choices": ["torch", "zo_opt.directions"],
    "zo_opt.system": ["zo_opt.directions", "zo_opt.schedules", "zo_opt.queries", "zo_opt.adapters"],
    "zo_opt.directions": ["zo_opt.schedules", "zo_opt.queries", "zo_opt.estimators", "zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.schedules": ["zo_opt.directions", "zo_opt.queries", "zo_opt.estimators", "zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.queries": ["zo_opt.estimators", "zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.distributed": ["zo_opt.estimators", "zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.estimators": ["zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.privacy": ["zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.optim": ["zo_opt.adapters", "tt_kernels"],
    "zo_opt.journal": ["zo_opt.adapters"],
    "zo_opt.tensor_train": ["zo_opt.queries", "zo_opt.estimators", "zo_opt.optim", "zo_opt.adapters"],
    "zo_opt.adapters": ["zo_opt.directions", "zo_opt.schedules", "zo_opt.queries", "zo_opt.estimators", "zo_opt.optim"],
}
ABOVE = ["zo_opt.training", "zo_opt.trainer", "zo_opt.tasks", "zo_opt.comparison", "zo_opt.cli", "transformers"]
FORBIDDEN = {package: [*names, *ABOVE] for package, names in FORBIDDEN.items()} | {
    "zo_opt.training": ["zo_opt.comparison", "zo_opt.cli"],
    "zo_opt.trainer": ["zo_opt.comparison", "zo_opt.cli"],
    "zo_opt.comparison": ["zo_opt.cli"],
}


# What acts on answers speaks to models of transformers: to their caches, outputs and names of architectures, within functions.
SPEAKS_TRANSFORMERS = ("zo_opt.adapters.answers", "zo_opt.adapters.encoded", "zo_opt.adapters.positions")


def at_once(module):
    """Full names of what a module imports as it is imported."""
    nodes = [node for node in TREES[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package):
    wrong = [(m, i) for m in modules(package) for i in imports(m) if within(i, *FORBIDDEN[package])]
    wrong = [(m, i) for m, i in wrong if m not in SPEAKS_TRANSFORMERS or not within(i, "transformers")]
    assert [pair for pair in wrong if not within(pair[1], package)] == []


@pytest.mark.parametrize("module", SPEAKS_TRANSFORMERS)
def test_what_speaks_to_transformers_imports_it_within_functions(module):
    assert any(within(name, "transformers") for name in imports(module))
    assert not any(within(name, "transformers") for name in at_once(module))


def test_no_circle_of_imports():
    """Also none that an import within a function hides."""

    def imported(name):
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        return name

    graph = {m: {found for i in imports(m) if (found := imported(i)) and found not in ("zo_opt", m)} for m in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_kernels_import_torch_only():
    found = {i for module in modules("tt_kernels") for i in imports(module)}
    assert [i for i in found if not within(i, "torch", "tt_kernels", *sys.stdlib_module_names)] == []


@pytest.mark.parametrize(("statement", "absent"), [
    ("import zo_opt", ["torch", "transformers", "tensorly", "numpy", "fcntl", "resource", "zo_opt.training", "zo_opt.cli"]),
    ("import tt_kernels", ["transformers", "zo_opt"]),
    ("import zo_opt.cli.main", ["torch", "transformers"]),
])  # fmt: skip
def test_importing_stays_light(statement, absent):
    """In a fresh interpreter, as a user would."""
    script = f"{statement}, sys; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# --- what holds in every module ---


UNSAFE = ("unittest", "pickle", "dill", "cloudpickle", "joblib")
OF_ONE_SYSTEM = {"fcntl", "resource", "termios", "pwd", "grp"}
# Of torch, transformers and the standard library, where they have no public name for it.
OF_OTHERS = {
    *("_C", "_functorch", "_is_fwd_grad_enabled", "_add_batch_dim", "_storage_Use_Count", "_cdata", "_current_level"),
    *(
        "_parameters",
        "_modules",
        "_version",
        "_disable_dynamo",
        "_NormBase",
        "_apply",
        "_compiled_call_impl",
        "_opt_called",
    ),
    *("_attn_implementation", "_name_or_path", "_save", "_prepare_inputs", "_load_best_model", "_load_from_checkpoint"),
    *("_set_signature_columns_if_needed", "_actions", "_typehint", "_fields"),
}
DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "rand_like",
    "randn_like",
    "randint_like",
}
DRAWS_IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_"}  # fmt: skip
GLOBAL = {
    *(f"random.{name}" for name in ("seed", "shuffle", "random", "choice", "sample", "randint")),
    *("torch.manual_seed", "torch.seed"),
}


def is_short(module):
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    if lines > LONGEST:
        yield f"{lines} lines"


def says_what_it_is_for(module):
    said = (ast.get_docstring(TREES[module]) or "").split("\n\n")[0]
    if not said or (is_package(module) and not said.endswith(".")):
        yield f"no sentence on what it is for: {said!r}"


def neither_unpickles_nor_mocks(module):
    yield from (i for i in imports(module) if within(i, *UNSAFE))
    attributes = {ast.unparse(n) for n in nodes(module) if isinstance(n, ast.Attribute)}
    yield from attributes & {"torch.load", "torch.save"}


def can_be_imported_on_every_system(module):
    for node in TREES[module].body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        yield from OF_ONE_SYSTEM.intersection(names)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(module):
    """The private names that a module itself gives to something."""
    for node in nodes(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def takes_no_private_name_of_another(module):
    """Whatever object it is asked of: a private name that a module uses is one that it gives."""
    yield from (i for i in imports(module) if is_private(i.rpartition(".")[2]))
    known = {*own_names(module), *OF_OTHERS}
    used = [n for n in nodes(module) if isinstance(n, ast.Attribute) and is_private(n.attr)]
    yield from (f"line {n.lineno}: {ast.unparse(n)}" for n in used if n.attr not in known)


def draws_nothing_from_the_global_random_state(module):
    """Every torch draw names its generator; the global generators are neither seeded nor used."""
    for call in (n for n in nodes(module) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        draws = (within(name, "torch") and last in DRAWS) or last in DRAWS_IN_PLACE
        numpys = within(name, "np.random", "numpy.random") and last not in {
            "default_rng",
            "Philox",
            "get_state",
            "set_state",
        }
        if (draws and all(k.arg != "generator" for k in call.keywords)) or name in GLOBAL or numpys:
            yield f"line {call.lineno}: {name}"


@pytest.mark.parametrize("rule", [
    is_short, says_what_it_is_for, neither_unpickles_nor_mocks, can_be_imported_on_every_system,
    takes_no_private_name_of_another, draws_nothing_from_the_global_random_state,
], ids=lambda rule: rule.__name__)  # fmt: skip
def test_every_module(rule):
    assert {module: found for module in FILES if (found := list(rule(module)))} == {}


# --- what the layout promises users ---


def test_the_top_level_holds_folders():
    assert {p.name for p in (ROOT / "zo_opt").glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "choices.py"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names():
    """The names under contract in the design."""
    script = (
        "from zo_opt import AdaZeta, MeZO, TTConfig, ZOError, NonFiniteLossError;"
        "from zo_opt import get_adapter_model, load_adapter_model, trainable_parameters;"
        "from zo_opt.training import ZOTrainer, ZOTrainingArguments;"
        "from zo_opt.schedules import adazeta_queries; from tt_kernels import tt_linear; import zo_opt;"
        "assert all(hasattr(zo_opt, n) for n in zo_opt.__all__)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT)
