"""``synerdiff compare``: two runs or two sweeps side by side, paired."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli.progress import print_parts


def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run (simulate, run) or of a sweep.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same requests, or of the same cells.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the figure.")] = None,
) -> None:
    """Set two results side by side: two runs request by request (simulated and real too), two sweeps seed by seed."""
    from synerdiff.experiments.pairs import compare_results

    print_parts(compare_results(a, b, out))
