"""``synerdiff scorecard``: predictions beside what others measured on machines of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli.progress import print_table
from synerdiff.files import claim_folder


def scorecard(
    only: Annotated[list[str] | None, typer.Option(help="Only this study (repeatable): katz.")] = None,
    data: Annotated[
        Path | None, typer.Option(envvar="SYNERDIFF_DATA", help="Folder of the published tables (katz_h800_sdxl.csv).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tables and for the profiles that were predicted with.")
    ] = None,
    controlnets: Annotated[int, typer.Option(min=0, max=64, help="ControlNets of the request taken apart.")] = 3,
    loras: Annotated[int, typer.Option(min=0, max=64, help="LoRAs of the request taken apart.")] = 2,
) -> None:
    """Predict latencies that others published (Katz and diffusers on H800) from component times, and compare.

    Example: synerdiff scorecard --only katz --data FOLDER --out results/scorecard
    """
    from synerdiff.validation import scorecard as card

    studies = card.studies(only or ())
    if out is not None:
        claim_folder(out, "scorecard")
    scores = []
    if data is None:
        typer.echo("No published tables (--data or SYNERDIFF_DATA): predictions only.")
    else:
        scores = card.scores_of(studies, data)
        typer.echo(card.NOTE)
        print_table(*card.score_table(scores))
        for line in card.worst_lines(scores):
            typer.echo(line)
    typer.echo(f"One request with {controlnets} ControlNets and {loras} LoRAs alone, strategy by strategy:")
    cases = card.strategies(controlnets, loras)
    print_table(*card.strategy_table(cases))
    if out is not None:
        card.write(out, scores, cases)
        typer.echo(f"{out}: tables and profiles written")
