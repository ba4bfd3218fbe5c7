"""A run with all that it needs inside, for a machine that has none of this one's files: profile, requests, policy.

The finished run's file comes back as its bytes, so nothing but the libraries has to be shared.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from synerdiff.core import InputError
from synerdiff.experiments.grid import Run
from synerdiff.experiments.run import profile_as_it_was
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.store import code_hash, library_versions, policy_files, run_file
from synerdiff.profile.tables import Profile

Files = Mapping[str, bytes]
"""Path below the folder in which a user's policy is looked up -> content."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A run, the files of its policy, and what must be alike on the machine that computes it."""

    run: Run
    files: Files
    code: str
    versions: Mapping[str, str]


def packed(runs: Iterable[Run]) -> list[Parcel]:
    """The runs as parcels; what several share is one object, so a task that takes them pickles it once.

    InputError for a policy that reads a file which no other machine could find.
    """
    files: dict[tuple[str, Path | None], Files] = {}
    profiles: dict[Path, Profile] = {}
    parcels = []
    for run in runs:
        spec = run.spec
        policy = (spec.policy, spec.base_folder)
        if policy not in files:
            files[policy] = _policy_files(*policy)
        if isinstance(spec.profile, Path) and spec.profile not in profiles:
            profiles[spec.profile] = profile_as_it_was(spec.profile, spec.profile_hash or "")
        profile = profiles[spec.profile] if isinstance(spec.profile, Path) else spec.profile
        own = replace(spec, profile=profile, source=arrivals(run.source))
        parcels.append(Parcel(replace(run, spec=own), files[policy], code_hash(), library_versions()))
    return parcels


def computed(parcel: Parcel, compute: Any) -> tuple[str, dict[str, Any], bytes]:
    """(key, row, content of the finished run's file) of ``compute(run)``; InputError where code or libraries differ."""
    own = {"synerdiff": code_hash()[:12], **library_versions()}
    wanted = {"synerdiff": parcel.code[:12], **parcel.versions}
    for name, version in wanted.items():
        if own[name] != version:
            raise InputError(
                f"The node {socket.gethostname()} has {name} {own[name]}, and this machine {version}; results would "
                "differ, so install the same."
            )
    with tempfile.TemporaryDirectory() as folder:
        spec = parcel.run.spec
        if parcel.files:
            spec = replace(spec, base_folder=_unpacked(tuple(sorted(parcel.files.items()))))
        run = replace(parcel.run, folder=Path(folder), spec=spec)
        key, row = compute(run)
        return key, row, run_file(run.folder, key).read_bytes()


def _policy_files(name: str, base_folder: Path | None) -> Files:
    """Each file by its place below every folder of the import path that holds it; libraries are not sent."""
    base = (base_folder or Path()).resolve()
    roots = [base, *(Path(entry).resolve() for entry in sys.path)]
    installed = [Path(sysconfig.get_paths()[kind]).resolve() for kind in ("purelib", "platlib")]
    files: dict[str, bytes] = {}
    for file in policy_files(name, base):
        if any(file.is_relative_to(place) for place in installed):
            continue
        places = [str(file.relative_to(root)) for root in roots if file.is_relative_to(root) and root != Path("/")]
        if not places:
            raise InputError(
                f"policy '{name}' reads {file}, which lies outside {base} and cannot be sent to other machines."
            )
        files |= dict.fromkeys(places, file.read_bytes())
    return files


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Of unpacked policies, as long as this process lives."""


@cache
def _unpacked(files: tuple[tuple[str, bytes], ...]) -> Path:
    name = hashlib.sha256(repr(files).encode()).hexdigest()[:8]
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix=f"synerdiff-policy-{name}-"))
    folder = Path(_FOLDERS[-1].name)
    for place, content in files:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    return folder
