"""How the code hangs together, read from its source: layers, no circles, imports where they belong, a name once, and
a docstring wherever somebody may look something up.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
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
HEAVY = {
    *("torch", "diffusers", "transformers", "peft", "safetensors", "sklearn", "torchmetrics", "PIL", "pynvml"),
    *("huggingface_hub", "triton", "matplotlib", "pandas", "pyarrow", "simpy", "joblib", "ray", "optuna"),
}
"""Light modules import these inside functions; whatever else is imported inside a function is late."""
LIGHT = (
    "synerdiff.core",
    "synerdiff.files",
    "synerdiff.schema",
    "synerdiff.profile",
    "synerdiff.results.records",
    "synerdiff.results.intervals",
    "synerdiff.config",
    "synerdiff.engine",
    "synerdiff.fidelity.table",
    "synerdiff.fidelity.floor",
    "synerdiff.experiments",
    "synerdiff.validation",
    "synerdiff.cli",
    "policies",
)
"""What many commands import: no heavy library at the top of these modules."""
WITHOUT_NUMPY = (*LIGHT[:4], "synerdiff.config", "synerdiff.engine", "synerdiff.cli", "policies")

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


PACKAGE_NAMES = {module_name(path) for path in MODULES if path.name == "__init__.py"}
TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


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


def top_level(source: str) -> set[str]:
    """Packages that importing the module loads: imports outside functions and TYPE_CHECKING blocks."""
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
    return found


def late_imports(module: str, tree: ast.Module) -> set[str]:
    """What a module below the commands imports inside functions, heavy libraries left out."""
    if inside(module, "synerdiff.cli"):
        return set()
    return {name for node in function_imports(tree) for name in named(node) if name.partition(".")[0] not in HEAVY}


def most_imports(tree: ast.Module) -> int:
    """The most statements in one function that import modules of ours."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    ours = ([n for n in function_imports(f) if named(n)[0].partition(".")[0] in PACKAGES] for f in functions)
    return max((len(found) for found in ours), default=0)


def function_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes = {id(node): node for function in functions for node in ast.walk(function)}
    return [node for node in nodes.values() if isinstance(node, ast.Import | ast.ImportFrom)]


def named(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def classes_twice(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Class name -> the modules that define it, where these are several."""
    places: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def circles(trees: Mapping[str, ast.Module]) -> set[str]:
    """Modules and folders that import each other, over however many steps, as ``a, b``."""
    modules = {
        name: {other for other in imports(tree, name, name in PACKAGE_NAMES) if other in trees and other != name}
        for name, tree in trees.items()
    }
    folders: dict[str, set[str]] = {}
    for name, others in modules.items():
        folders.setdefault(folder(name), set()).update({folder(other) for other in others} - {folder(name)})
    return {*_connected(modules), *_connected(folders)}


def folder(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "synerdiff" else 1])


def _connected(edges: Mapping[str, set[str]]) -> set[str]:
    """The strongly connected components of more than one node."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in edges}
    groups = {tuple(sorted(other for other in reach[name] if name in reach.get(other, ()))) for name in edges}
    return {", ".join(group) for group in groups if len(group) > 1}


def without_docstring(trees: Mapping[str, ast.Module]) -> list[str]:
    """Public functions, classes and methods without one; of methods of one name it is enough that one class has it."""
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    told = {node.name for owner in classes for node in _public(owner) if ast.get_docstring(node) is not None}
    bare = []
    for name, tree in trees.items():
        for node in _public(tree):
            methods = _public(node) if isinstance(node, ast.ClassDef) else []
            silent = [node] if ast.get_docstring(node) is None else []
            silent += [method for method in methods if ast.get_docstring(method) is None and method.name not in told]
            bare += [f"{name}: {one.name}" for one in silent]
    return bare


def _public(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_")]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_layer_imports_only_lower_ones(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_light_modules_import_heavy_libraries_where_they_are_used() -> None:
    for path in MODULES:
        top = top_level(path.read_text(encoding="utf-8"))
        name = module_name(path)
        if any(inside(name, package) for package in LIGHT):
            assert not top & HEAVY, f"{name} imports {', '.join(top & HEAVY)} at the top"
        if any(inside(name, package) for package in WITHOUT_NUMPY):
            assert "numpy" not in top, f"{name} imports numpy at the top"


def test_below_the_commands_imports_stand_at_the_top() -> None:
    assert {name: late for name, tree in TREES.items() if (late := late_imports(name, tree))} == {}


def test_a_command_imports_one_module_inside_its_function() -> None:
    assert [name for name, tree in TREES.items() if inside(name, "synerdiff.cli") and most_imports(tree) > 1] == []


def test_no_class_name_stands_twice() -> None:
    assert classes_twice(TREES) == {}


def test_no_imports_go_in_circles() -> None:
    assert circles(TREES) == set()


def test_what_is_public_says_what_it_is() -> None:
    assert without_docstring(TREES) == []


def test_policies_import_only_core_and_profile() -> None:
    allowed = ("policies", "synerdiff.core", "synerdiff.profile.capacity", "synerdiff.profile.tables")
    for path in (ROOT / "policies").glob("*.py"):
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), module_name(path), path.name == "__init__.py"):
            if name.partition(".")[0] in PACKAGES:
                # ``from synerdiff.profile.folder`` starts with an allowed name but is not one.
                assert any(inside(name, package) for package in allowed), f"{path.name} imports {name}"
            else:
                assert name.partition(".")[0] not in HEAVY | {"numpy", "random", "time", "datetime"}, (
                    f"{path.name}: {name}"
                )


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
    assert top_level("try:\n    import torch\nexcept ImportError:\n    pass") == {"torch"}
    assert top_level("if TYPE_CHECKING:\n    import pandas\ndef f():\n    import numpy") == set()
    late = ast.parse("import os\ndef f():\n    import torch\n    from synerdiff.files import atomic\n    import json")
    assert late_imports("simulator.x", late) == {"synerdiff.files", "json"}
    assert (late_imports("synerdiff.cli.x", late), most_imports(late)) == (set(), 1)
    trees = {"traces.a": ast.parse("import traces.b\nclass X: ..."), "traces.b": ast.parse("from traces import c")}
    trees["traces.c"] = ast.parse("def f():\n    import traces.a, policies.d\nclass X: ...")
    trees["policies.d"] = ast.parse("from traces.b import y")
    assert circles(trees) == {"policies.d, traces.a, traces.b, traces.c", "policies, traces"}
    assert classes_twice(trees) == {"X": ["traces.a", "traces.c"]}
    trees = {"a": ast.parse('class X:\n    def f(self): "told"\nclass Y:\n    "told"\n    def f(self): ...')}
    trees["b"] = ast.parse("def g(): ...\ndef _h(): ...\nclass _Z:\n    def k(self): ...")
    assert without_docstring(trees) == ["a: X", "b: g"]
