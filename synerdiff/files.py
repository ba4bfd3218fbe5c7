"""The only YAML reader and writer; atomic writes; hashes."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from synerdiff.core import InputError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice: YAML itself would silently keep the last one."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise InputError(f"line {key_node.start_mark.line + 1}: the key '{key}' is given twice.")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_text(path: Path, what: str) -> str:
    """The file as UTF-8 text, or one sentence that names it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what}.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; a {what} is needed.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is not text, so it cannot be a {what}.") from None
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror}).") from None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file whose top level is a mapping with text keys."""
    text = read_text(path, what)
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a subclass of SafeLoader
    except InputError as error:
        raise InputError(f"{path}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"{path}{where}: this is not valid YAML ({problem}).") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise InputError(f"{path}: a {what} holds named fields at its top level; found {found}.")
    for key in data:
        if not isinstance(key, str):
            raise InputError(f"{path}: field names are text; found {key!r}.")
    return data


def write_yaml(path: Path, data: dict[str, Any]) -> None:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded path; it replaces ``path`` in one step when the block ends well, else nothing changes.

    Raises InputError, naming the path, when it cannot be written (a full disk too).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None
    temporary = Path(name)
    try:
        yield temporary
        mode = 0o666 & ~_umask()
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_writable_folder(path: Path) -> None:
    """Create the folder if needed and prove that it can be written, before long work starts."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: the output must be a folder; this is a file.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: the output folder cannot be written ({error.strerror}).") from None


def sha256_of_files(paths: list[Path]) -> str:
    """One hash over names and contents, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def finite(value: Any, check: Callable[[float], bool]) -> bool:
    """Whether ``value`` is a real number (no bool, NaN or infinity) that passes the check."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and check(value)
