"""Commands load what they need and no more: asked of ``sys.modules`` in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    *("numpy", "pandas", "pyarrow", "matplotlib", "simpy", "joblib", "pydantic_settings", "scipy"),
    *("torch", "diffusers", "transformers", "ray", "optuna", "sklearn", "PIL"),
}
PROBE = """
import json, sys
from synerdiff.cli import main
code = main(sys.argv[1:])
print("MODULES " + json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def loaded(folder: Path, *arguments: str) -> set[str]:
    found = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((line for line in found.stdout.splitlines() if line.startswith("MODULES ")), None)
    assert line is not None, found.stderr
    code, modules = json.loads(line.removeprefix("MODULES "))
    assert code == 0, found.stderr
    return set(modules)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["policies"], ["sweep", "--help"], ["trace", "--help"]]
)
def test_the_light_commands_load_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    assert loaded(tmp_path, *arguments) & HEAVY == set()


def test_simulate_loads_no_matplotlib_and_no_torch(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,steps\n" + "".join(f"{i},4\n" for i in range(20)))
    modules = loaded(
        tmp_path,
        *("simulate", "--profile", "h200-sd15-estimated", "--trace", "t.csv"),
        *("--policy", "continuous-parallel", "--out", "out"),
    )
    assert modules & HEAVY <= {"numpy", "pandas", "pyarrow", "simpy"}
    assert {"simpy", "pyarrow"} <= modules
