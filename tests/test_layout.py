"""The import rules of the design, read from the source files themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"zo_opt": ROOT / "zo_opt", "tt_kernels": ROOT / "kernels" / "tt_kernels"}


def module_name(path):
    package = next(p for p in PACKAGES.values() if path.is_relative_to(p))
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for folder in PACKAGES.values() for p in sorted(folder.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name):
    """Full names of all that a module imports, at any depth; relative imports resolved."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def modules(*packages):
    found = [m for m in FILES if within(m, *packages)]
    assert found, f"no module named {packages}"
    return found


def test_files_are_found():
    assert {"zo_opt", "zo_opt.directions", "zo_opt.optim.base", "tt_kernels.linear"} <= FILES.keys()
    assert "torch.Tensor" in set(imports("zo_opt.directions.base"))


@pytest.mark.parametrize("module", modules("tt_kernels"))
def test_kernels_import_torch_only(module):
    foreign = [i for i in imports(module) if not within(i, "torch", "tt_kernels", *sys.stdlib_module_names)]
    assert foreign == []


FORBIDDEN = {  # package -> what it must not import
    "zo_opt.errors": ["zo_opt"],
    "zo_opt.directions": [f"zo_opt.{m}" for m in ("schedules", "estimators", "query_modes", "optim", "adapters")],
    "zo_opt.schedules": [f"zo_opt.{m}" for m in ("estimators", "query_modes", "optim", "adapters")],
    "zo_opt.queries.modes": [f"zo_opt.{m}" for m in ("estimators", "optim", "adapters")],
    "zo_opt.estimators": [f"zo_opt.{m}" for m in ("optim", "adapters")],
    "zo_opt.optim": ["zo_opt.adapters", "tt_kernels"],
    "zo_opt.adapters": [f"zo_opt.{m}" for m in ("optim", "estimators", "query_modes", "directions", "schedules")],
    "zo_opt.tensor_train": [f"zo_opt.{m}" for m in ("optim", "adapters", "estimators", "query_modes")],
    "zo_opt.journal": ["zo_opt.adapters"],
    "zo_opt.journal.format": ["zo_opt.adapters"],
    "zo_opt.journal.replaying": ["zo_opt.adapters"],
    "zo_opt.journal.provenance": ["zo_opt.adapters"],
    "zo_opt.distributed": [f"zo_opt.{m}" for m in ("optim", "adapters", "estimators", "query_modes")],
    "zo_opt.distributed.ranks": [f"zo_opt.{m}" for m in ("optim", "adapters", "estimators", "query_modes")],
    "zo_opt.privacy": [f"zo_opt.{m}" for m in ("optim", "adapters", "estimators", "query_modes")],
    "zo_opt.training": ["zo_opt.cli", "zo_opt.comparison"],
    "zo_opt.comparison": ["zo_opt.cli"],
}
LOWER = [p for p in FORBIDDEN if p not in ("zo_opt.training", "zo_opt.comparison")]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    forbidden = FORBIDDEN[package] + (["zo_opt.training", "zo_opt.cli", "transformers"] if package in LOWER else [])
    wrong = [(m, i) for m in modules(package) for i in imports(m) if within(i, *forbidden) and not within(i, package)]
    assert wrong == []


@pytest.mark.parametrize("module", modules("zo_opt"))
def test_nothing_is_unpickled(module):
    names = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(TREES[module])
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert not names & {"torch.load", "torch.save", "pickle.load", "pickle.loads", "joblib.load"}
    assert [
        i for i in imports(module) if within(i, "pickle", "dill", "cloudpickle", "joblib", "torch.load", "torch.save")
    ] == []


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
DRAWS_IN_PLACE = {
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
}
GLOBAL = {
    "random.seed",
    "random.shuffle",
    "random.random",
    "random.choice",
    "random.sample",
    "random.randint",
    "torch.manual_seed",
    "torch.seed",
}


@pytest.mark.parametrize("module", modules("zo_opt", "tt_kernels"))
def test_no_draw_from_the_global_random_state(module):
    """Every torch draw names its generator; the global generators are neither seeded nor used."""
    for call in (n for n in ast.walk(TREES[module]) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        own = any(k.arg == "generator" for k in call.keywords)
        if (within(name, "torch") and name.split(".")[-1] in DRAWS) or name.split(".")[-1] in DRAWS_IN_PLACE:
            assert own, f"{module}:{call.lineno} {name} draws from the global state"
        assert name not in GLOBAL, f"{module}:{call.lineno} {name}"
        assert not (
            within(name, "np.random", "numpy.random") and name.split(".")[-1] not in {"default_rng", "Philox"}
        ), f"{module}:{call.lineno}"


def test_no_package_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "tt_kernels" / "__init__.py").exists()


@pytest.mark.parametrize(("statement", "absent"), [
    ("import zo_opt", ["transformers", "tensorly", "zo_opt.training", "zo_opt.cli"]),
    ("import tt_kernels", ["transformers", "zo_opt"]),
])  # fmt: skip
def test_importing_stays_light(statement, absent):
    """In a fresh interpreter, as a user would."""
    script = f"{statement}, sys; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names():
    """The names under contract in the design."""
    script = (
        "from zo_opt import AdaZeta, MeZO, TTConfig, ZOError, NonFiniteLossError;"
        "from zo_opt import get_adapter_model, load_adapter_model, trainable_parameters;"
        "from zo_opt.schedules import adazeta_queries; from tt_kernels import tt_linear; import zo_opt;"
        "assert all(hasattr(zo_opt, n) for n in zo_opt.__all__)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT)
