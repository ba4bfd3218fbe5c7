"""A lower layer never imports a higher one, and heavy libraries stay inside the functions that use them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("synerdiff", "policies", "simulator", "traces", "profiler", "real_runner")

LAYERS: tuple[tuple[str, ...], ...] = (
    ("synerdiff.core", "synerdiff.files", "synerdiff.schema"),
    ("synerdiff.profile", "synerdiff.results", "synerdiff.config", "synerdiff.device"),
    ("policies",),
    ("synerdiff.engine", "traces", "synerdiff.diffusion"),
    ("synerdiff.figures", "synerdiff.fidelity"),
    ("profiler", "simulator", "real_runner"),
    ("synerdiff.experiments",),
    ("synerdiff.validation",),
    ("synerdiff.cli",),
)
"""Bottom up: a folder imports only earlier ones (or its own layer), and the engines' packages never each other."""
ENGINES = LAYERS[5]
HEAVY = {"numpy", "pandas", "pyarrow", "matplotlib", "simpy", "joblib", "torch", "diffusers", "ray", "optuna"}
LIGHT = (
    "synerdiff.core",
    "synerdiff.files",
    "synerdiff.schema",
    "synerdiff.profile",
    "synerdiff.config",
    "synerdiff.engine",
    "synerdiff.fidelity.table",
    "synerdiff.fidelity.floor",
    "synerdiff.results.records",
    "synerdiff.results.folder",
    "synerdiff.results.intervals",
    "synerdiff.experiments",
    "synerdiff.validation",
    "synerdiff.cli",
    "policies",
)
"""What every command imports at once: nothing heavy at the top of these modules."""

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int | None:
    return next((rank for rank, names in enumerate(LAYERS) for name in names if inside(module, name)), None)


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Every module that the code names in an import, wherever it stands; ``from a import b`` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + int(is_package)]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    own = layer(module)
    if own is None:
        return []
    broken = []
    for other in sorted(imports(ast.parse(source), module, is_package)):
        rank = layer(other)
        if rank is None or other.partition(".")[0] not in PACKAGES:
            continue
        engines = {name for name in ENGINES if inside(other, name) or inside(module, name)}
        if rank > own or (rank == own == LAYERS.index(ENGINES) and len(engines) > 1):
            broken.append(f"{module} imports {other}")
    return broken


def top_level_heavy(source: str) -> set[str]:
    """Heavy libraries that importing the module loads: imports outside functions and TYPE_CHECKING blocks."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(ast.parse(source).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.partition(".")[0] for name in imports(node, "", False)}
        waiting.extend(ast.iter_child_nodes(node))
    return found & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_layer_imports_only_lower_ones(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_light_modules_import_heavy_libraries_where_they_are_used() -> None:
    for path in MODULES:
        if any(inside(module_name(path), package) for package in LIGHT):
            assert top_level_heavy(path.read_text(encoding="utf-8")) == set(), path


def test_policies_import_only_core_and_profile() -> None:
    allowed = ("policies", "synerdiff.core", "synerdiff.profile.tables")
    for path in (ROOT / "policies").glob("*.py"):
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), module_name(path), path.name == "__init__.py"):
            if name.partition(".")[0] in PACKAGES:
                # ``from synerdiff.profile.folder`` starts with an allowed name but is not one.
                assert any(inside(name, package) for package in allowed), f"{path.name} imports {name}"
            else:
                assert name.partition(".")[0] not in HEAVY | {"random", "time", "datetime"}, f"{path.name}: {name}"


def test_only_figures_imports_matplotlib() -> None:
    for path in MODULES:
        names = imports(ast.parse(path.read_text(encoding="utf-8")), module_name(path), path.name == "__init__.py")
        if any(inside(name, "matplotlib") for name in names):
            assert inside(module_name(path), "synerdiff.figures"), path


def test_the_check_finds_what_it_looks_for() -> None:
    assert violations("policies.x", "from synerdiff.experiments import sweep") != []
    assert violations("simulator.x", "def f():\n    import real_runner.lanes") == [
        "simulator.x imports real_runner.lanes"
    ]
    assert violations("simulator.x", "from simulator.pieces import Piece\nfrom policies.base import Policy") == []
    assert violations("synerdiff.core", "from .profile.tables import Profile") != []
    assert top_level_heavy("try:\n    import torch\nexcept ImportError:\n    pass") == {"torch"}
    assert top_level_heavy("if TYPE_CHECKING:\n    import pandas\ndef f():\n    import numpy") == set()
