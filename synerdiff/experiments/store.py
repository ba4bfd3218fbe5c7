"""Finished runs on disk: their keys, one file each, and the tables made of them.

``runs/KEY.parquet`` holds the requests of one run and, in its metadata, its row of ``runs.parquet``. Everything that a
row depends on goes into the key, so that nothing stale is used again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.registry import policy_class
from synerdiff import __version__
from synerdiff.core import InputError
from synerdiff.files import atomic, sha256_of_files
from synerdiff.results.records import REQUEST_COLUMNS, RUN_KEY, read_table, write_table

if TYPE_CHECKING:
    import pyarrow

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = (
    "policies",
    "simulator",
    "traces",
    "synerdiff/config",
    "synerdiff/engine",
    "synerdiff/experiments",
    "synerdiff/fidelity",
    "synerdiff/profile",
    "synerdiff/results",
    "synerdiff/diffusion/__init__.py",
    "synerdiff/diffusion/schedulers.py",
)
"""Besides ``synerdiff/*.py``: folders and files with every module of ours that a run loads."""
NOT_CODE = tuple(
    f"synerdiff/experiments/{name}.py"
    for name in (
        "backends",
        "capacity",
        "capacity_report",
        "compare",
        "emit",
        "pairs",
        "parcel",
        "report",
        "tune",
        "tune_report",
    )
)
"""What only works on rows that are there."""
LIBRARIES = ("numpy", "pandas", "pyarrow", "simpy")
_UNSTABLE = ("/proc/", "/dev/", "/sys/")


def run_key(identity: Mapping[str, Any]) -> str:
    """A file name for the run: a hash over its identity (JSON values only), our code and the libraries' versions."""
    text = json.dumps([identity, code_hash(), library_versions()], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def library_versions() -> dict[str, str]:
    """Library -> version, of those that turn requests into records and records into rows."""
    return {name: metadata.version(name) for name in LIBRARIES}


def versions() -> dict[str, str]:
    """Of synerdiff, Python and those libraries."""
    return {"synerdiff": __version__, "python": platform.python_version(), **library_versions()}


def code_files() -> list[Path]:
    """The source of everything that turns an experiment into rows."""
    files = set((ROOT / "synerdiff").glob("*.py"))
    for name in CODE:
        files |= {ROOT / name} if name.endswith(".py") else set((ROOT / name).rglob("*.py"))
    return sorted(files - {ROOT / name for name in NOT_CODE})


@cache
def code_hash() -> str:
    """SHA-256 of all first-party code that a run depends on."""
    return sha256_of_files(code_files())


def policy_hash(name: str, base_folder: Path) -> str:
    """Hash over what a user's policy is made of (``policy_files``); empty for a registered one."""
    return sha256_of_files(policy_files(name, base_folder)) if ":" in name else ""


def policy_files(name: str, base_folder: Path) -> list[Path]:
    """What a user's policy is made of; nothing for a registered one.

    These are the modules outside the standard library that importing it adds to ours, the files that it reads
    meanwhile, and those that its class lists in ``DATA_FILES`` (relative to the module). They are found by importing it
    in a fresh process, so it does not matter how they are imported and from where. InputError when that fails.
    """
    if ":" not in name:
        return []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "files.json"
        paths = [str(Path(entry).resolve()) for entry in sys.path]
        # What every run loads anyway is no part of the policy: it is imported before.
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import synerdiff.experiments.sweep; " + (
            "from synerdiff.experiments import store; store.report_files(*sys.argv[2:])"
        )
        arguments = [json.dumps(paths), name, str(base_folder), str(report)]
        # Isolated: the path is this process's, to the letter.
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        if not report.is_file():
            said = done.stderr.strip().splitlines() or ["it ended without a word"]
            raise InputError(f"policy '{name}' cannot be imported in a process of its own ({said[-1]}).")
        files: list[str] = json.loads(report.read_text(encoding="utf-8"))
    return [*map(Path, files), *data_files(name, base_folder)]


def report_files(name: str, base_folder: str, report: str) -> None:
    """Import the policy and write the files that this took, as a JSON list. Called in a process of its own."""
    before = set(sys.modules)
    opened: list[str] = []

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(hear)
    policy_class(name, Path(base_folder))
    reads = list(opened)
    added = [sys.modules[module] for module in set(sys.modules) - before]
    files = {source for module in added if (source := getattr(module, "__file__", None))} | {*map(_source, reads)}
    Path(report).write_text(json.dumps(sorted(filter(_counts, map(os.path.abspath, files)))), encoding="utf-8")


def _source(path: str) -> str:
    """The source of a compiled module; any other file itself."""
    try:
        return importlib.util.source_from_cache(path) if path.endswith(".pyc") else path
    except ValueError:
        return path


def _counts(path: str) -> bool:
    """Whether a file belongs to the policy: not to the standard library, and not to the system."""
    file = Path(path)
    if path.startswith(_UNSTABLE) or not file.is_file():
        return False
    places = sysconfig.get_paths()
    installed = any(file.is_relative_to(places[name]) for name in ("purelib", "platlib"))
    return installed or not any(file.is_relative_to(places[name]) for name in ("stdlib", "platstdlib"))


def data_files(name: str, base_folder: Path) -> list[Path]:
    """What the policy's class lists in ``DATA_FILES``; InputError for what is not there."""
    policy = policy_class(name, base_folder)
    listed = getattr(policy, "DATA_FILES", ())
    if isinstance(listed, str) or not all(isinstance(entry, str) for entry in listed):
        raise InputError(f"policy '{name}': DATA_FILES is {listed!r}; a list of file names is needed.")
    source = getattr(sys.modules[policy.__module__], "__file__", None) or "."
    files = [Path(source).resolve().parent / entry for entry in listed]
    for file in files:
        if not file.is_file():
            raise InputError(f"policy '{name}': there is no file {file}, which its DATA_FILES name.")
    return files


def keep_run(folder: Path, key: str, row: Mapping[str, Any], requests: pyarrow.Table | None) -> None:
    """Write a finished run, in one step; without its requests where nobody asks for them."""
    import pyarrow

    write_table(run_file(folder, key), pyarrow.table({}) if requests is None else requests, row)


def finished_row(folder: Path, key: str, with_requests: bool) -> dict[str, Any] | None:
    """The row of a finished run; a file that is not whole counts as missing."""
    import pyarrow
    from pyarrow import parquet

    try:
        head = parquet.read_metadata(run_file(folder, key))
        row: dict[str, Any] = json.loads((head.metadata or {}).get(RUN_KEY, b"{}"))
    except (OSError, ValueError, pyarrow.ArrowException):
        return None
    whole = row.get("key") == key and (head.num_rows > 0 or not with_requests)
    return row if whole else None


def keep_file(folder: Path, key: str, content: bytes) -> None:
    """Write a finished run as another machine wrote it."""
    with atomic(run_file(folder, key)) as temporary:
        temporary.write_bytes(content)


def run_file(folder: Path, key: str) -> Path:
    """Where a finished run lies."""
    return folder / "runs" / f"{key}.parquet"


def write_tables(
    folder: Path, grid: Sequence[Mapping[str, Any]], search: Sequence[Mapping[str, Any]], requests_of: Iterable[str]
) -> None:
    """``runs.parquet`` holds the grid and, with ``purpose`` search, the runs that only compared batch sizes;
    ``requests.parquet`` holds the requests of these runs, with the run's key in front."""
    rows = [{"purpose": "grid", **row} for row in grid] + [{"purpose": "search", **row} for row in search]
    write_table(folder / "runs.parquet", runs_table(rows))
    _write_requests(folder, requests_of)


def runs_table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """Rows with the union of their columns; a column without any value holds floating-point nulls."""
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        column = pyarrow.array([row.get(name) for row in rows])
        columns.append(column.cast("double") if pyarrow.types.is_null(column.type) else column)
    return pyarrow.table(columns, names=names)


def _write_requests(folder: Path, keys: Iterable[str]) -> None:
    """One run after the other, so that a large sweep is never in memory as a whole."""
    import pyarrow
    from pyarrow import parquet

    kinds = [pyarrow.field("run", pyarrow.string())]
    kinds += [pyarrow.field(name, pyarrow.type_for_alias(kind)) for name, kind in REQUEST_COLUMNS.items()]
    schema = pyarrow.schema(kinds)
    with (
        atomic(folder / "requests.parquet") as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for key in keys:
            table, _ = read_table(run_file(folder, key), REQUEST_COLUMNS)
            run = pyarrow.array([key] * table.num_rows)
            table = table.replace_schema_metadata(None).select(list(REQUEST_COLUMNS)).add_column(0, "run", run)
            writer.write_table(table)
