"""Fetches published traces from their public address and checks what arrives."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from synerdiff.core import InputError
from synerdiff.files import atomic, require_writable_folder

_BYTES_PER_READ = 1 << 16
_TIMEOUT_S = 30


class PublishedFile(NamedTuple):
    """One file of a published trace and the SHA-256 (hex) that it must have."""

    name: str
    sha256: str


class PublishedTrace(NamedTuple):
    """Where a published trace lies, its files, and what to cite."""

    base_url: str
    files: tuple[PublishedFile, ...]
    citation: str


PUBLISHED = {
    "gentd26": PublishedTrace(
        base_url=(
            "https://raw.githubusercontent.com/alibaba/clusterdata/7a6c496e4f4b6ce6150be8f881cb051bf2abff42/"
            "cluster-trace-v2026-GenAI/"
        ),
        files=(
            PublishedFile("lora_request_trace.csv", "263fb88f1095f62d360cf89ded8cfc24fa2c5d111c1b16e7aaa9ccbfc4b37d78"),
            PublishedFile(
                "data_trace_processed.tar.gz", "6ae9212039410957a301574d419a5744d5285057805ab5094536198bef9d43fb"
            ),
        ),
        citation=(
            "Yanying Lin et al., Understanding Diffusion Model Serving in Production: A Top-Down Analysis of Workload, "
            "Scheduling, and Resource Efficiency, ACM SoCC 2025"
        ),
    )
}

FileProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all; 0 when unknown)."""


def published_trace(name: str) -> PublishedTrace:
    """The trace of that name; InputError lists the known ones."""
    if name not in PUBLISHED:
        raise InputError(f"{name!r} is not a trace that can be fetched; known is {', '.join(PUBLISHED)}.")
    return PUBLISHED[name]


def fetch(
    name: str, folder: Path, base_url: str | None = None, progress: FileProgress | None = None
) -> list[tuple[Path, bool]]:
    """Fetch the files of a published trace into ``folder``: (path, whether it was fetched now) of each.

    A file that is already there and has the right SHA-256 stays. Each one appears only when it is complete and its
    hash is right; an interrupted or wrong one leaves nothing. Raises InputError with what went wrong.
    """
    published = published_trace(name)
    require_writable_folder(folder)
    files = []
    for file in published.files:
        path = folder / file.name
        missing = not path.exists()
        if missing:
            _fetch_file(f"{(base_url or published.base_url).rstrip('/')}/{file.name}", path, file, progress)
        else:
            _check_present(path, file)
        files.append((path, missing))
    return files


def _check_present(path: Path, file: PublishedFile) -> None:
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: the file that is already there cannot be read ({error.strerror}).") from None
    if digest != file.sha256:
        raise InputError(
            f"{path}: a file of this name is already there and is not the published one "
            f"(SHA-256 {digest}, published {file.sha256}); move it away or choose another --out."
        )


def _fetch_file(url: str, path: Path, file: PublishedFile, progress: FileProgress | None) -> None:
    digest = hashlib.sha256()
    done = 0
    with atomic(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, temporary.open("wb") as target:
                total = int(response.headers.get("Content-Length") or 0)
                while block := response.read(_BYTES_PER_READ):
                    target.write(block)
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(file.name, done, total)
        except urllib.error.HTTPError as error:
            raise InputError(f"{url}: the server answered {error.code} ({error.reason}).") from None
        except urllib.error.URLError as error:
            raise InputError(f"{url}: it cannot be fetched ({error.reason}).") from None
        except (TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
            raise InputError(f"{url}: it cannot be fetched ({error or type(error).__name__}).") from None
        if done < total:
            raise InputError(f"{url}: the connection ended after {done} of {total} bytes; try again.")
        if digest.hexdigest() != file.sha256:
            raise InputError(
                f"{url}: what arrived is not the published file (SHA-256 {digest.hexdigest()}, "
                f"published {file.sha256}), so it was not kept."
            )
