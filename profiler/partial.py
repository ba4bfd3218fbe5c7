"""Results kept while a measurement runs, so that an interrupted one goes on where it stopped.

They lie in ``partial.json`` in the output folder, with what they were measured with; the finished profile replaces it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synerdiff.core import InputError
from synerdiff.files import claim_folder, read_text, write_text

FILE = "partial.json"


class Partial:
    """Tables by name, each filled cell by cell; ``save`` writes all of it in one step.

    ``conditions``: what must be the same for the results to go together, as JSON values by name.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any]) -> None:
        self._path = folder / FILE
        self._conditions = dict(conditions)
        self._since_s = time.monotonic()
        stored = _stored(self._path)
        before = stored.get("conditions", self._conditions)
        for name in {**before, **self._conditions}:
            if before.get(name) != self._conditions.get(name):
                raise InputError(
                    f"{folder}: this folder holds an interrupted measurement with {name} "
                    f"{_shown(before.get(name))}; now it is {_shown(self._conditions.get(name))}. Repeat the same "
                    f"command to continue it, or choose another folder."
                )
        self._spent_s = float(stored.get("spent_s", 0.0))
        self.tables: dict[str, dict[str, Any]] = stored.get("tables", {})

    @property
    def spent_s(self) -> float:
        """Seconds of measuring, earlier sessions included."""
        return self._spent_s + time.monotonic() - self._since_s

    def table(self, name: str) -> dict[str, Any]:
        """What was measured of one kind so far, to be filled in."""
        return self.tables.setdefault(name, {})

    def save(self) -> None:
        """Write what was measured, atomically."""
        content = {"conditions": self._conditions, "spent_s": round(self.spent_s, 3), "tables": self.tables}
        write_text(self._path, json.dumps(content, indent=1))

    def remove(self) -> None:
        """Delete the file: the profile is complete."""
        self._path.unlink(missing_ok=True)


def require_profile_folder(folder: Path) -> None:
    """Make the output folder; InputError when it cannot be written or holds something that must not be lost."""
    if (folder / "profile.yaml").exists() and not (folder / FILE).exists():
        raise InputError(f"{folder}: this folder already holds a profile; choose another folder, or remove it.")
    claim_folder(folder, "profile")


def _stored(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(read_text(path, "interrupted measurement"))
        if isinstance(content["tables"], dict) and isinstance(content["conditions"], dict):
            return dict(content)
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: this is not what an interrupted measurement leaves; remove it to start again.")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "not given" if value is None else str(value)
