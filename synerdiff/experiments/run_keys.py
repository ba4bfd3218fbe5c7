"""What tells one run from another: everything that its records depend on goes into its key."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from synerdiff.files import sha256_of_files

ROOT = Path(__file__).resolve().parent.parent.parent
ENGINE_FILES = (
    *(f"synerdiff/{path.name}" for path in sorted((ROOT / "synerdiff").glob("*.py"))),
    "synerdiff/diffusion/__init__.py",
    "synerdiff/experiments/one_run.py",
    "synerdiff/experiments/run.py",
    "synerdiff/experiments/sources.py",
)
ENGINE_FOLDERS = (
    "synerdiff/config",
    "synerdiff/engine",
    "synerdiff/profile",
    "synerdiff/results",
    "synerdiff/fidelity",
    "simulator",
    "policies",
    "traces",
)


def run_key(identity: Mapping[str, Any]) -> str:
    """A file name for the run: a hash over its identity, which holds JSON values only."""
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def engine_hash() -> str:
    """Hash over the source of everything that turns requests into records and metrics."""
    files = [ROOT / name for name in ENGINE_FILES]
    for folder in ENGINE_FOLDERS:
        files += sorted((ROOT / folder).rglob("*.py"))
    return sha256_of_files(files)


def policy_hash(name: str, base_folder: Path) -> str:
    """Hash over a user's policy module and the modules beside it that it imports; empty for a registered policy."""
    module, separator, _ = name.partition(":")
    if not separator:
        return ""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin).resolve()
    folders = {base_folder.resolve(), origin.parents[module.count(".") + (origin.name == "__init__.py")]}
    found: set[Path] = set()
    waiting = [origin]
    while waiting:
        path = waiting.pop()
        if path in found or "site-packages" in path.parts:
            continue
        found.add(path)
        for imported in _imported(path):
            for folder in folders:
                waiting += _files_of(folder, imported)
    return sha256_of_files(sorted(found))


def _imported(path: Path) -> set[str]:
    """The top-level names that a module imports; a relative import counts as its own package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0] if not node.level else path.parent.name)
    return {name for name in names if name and name not in sys.stdlib_module_names}


def _files_of(folder: Path, name: str) -> list[Path]:
    if name in ("synerdiff", "policies", "simulator", "traces", "profiler", "real_runner"):
        return []  # the engine's hash covers what a run uses of these
    if (folder / f"{name}.py").is_file():
        return [folder / f"{name}.py"]
    return sorted((folder / name).rglob("*.py")) if (folder / name / "__init__.py").is_file() else []
