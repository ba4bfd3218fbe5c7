"""``synerdiff report``: one self-contained page of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="Folder of a result: of a run, a sweep, a study.")]) -> None:
    """Write report.html into a result's folder: question, answer, setting, figures, tables, and what was not covered.

    sweep, capacity, validate and scorecard write it by themselves.
    """
    from synerdiff.experiments.page import report_folder

    typer.echo(f"{report_folder(folder)}")
