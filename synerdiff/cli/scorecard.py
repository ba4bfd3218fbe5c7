"""``synerdiff scorecard``: predictions beside what others measured on machines of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli.progress import print_parts, progress
from synerdiff.core import InputError
from synerdiff.files import claim_folder


def scorecard(
    only: Annotated[list[str] | None, typer.Option(help="Only this study (repeatable): katz, times, mlperf.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="SYNERDIFF_DATA",
            help="Folder of the published tables (katz_h800_sdxl.csv), or with --only mlperf a table of other runs.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tables and for the profiles that were predicted with.")
    ] = None,
    controlnets: Annotated[int, typer.Option(min=0, max=64, help="ControlNets of the request taken apart.")] = 3,
    loras: Annotated[int, typer.Option(min=0, max=64, help="LoRAs of the request taken apart.")] = 2,
) -> None:
    """Predict what others published and compare: latencies of Katz and diffusers on H800 from component times, the
    estimator's steps, decodes and images on 17 cards, and MLPerf's SDXL server runs from their exact arrivals.

    Example: synerdiff scorecard --only times --out results/scorecard
    """
    from synerdiff.validation import scorecard as card

    studies = card.studies(only or ())
    runs = card.runs_in(data)
    if runs == data and runs is not None and studies != ["mlperf"]:
        raise InputError(f"--data {data} is a file, which only --only mlperf takes; give a folder.")
    if out is not None:
        claim_folder(out, "scorecard")
    told: dict[str, list[card.Printed]] = {}
    if "katz" in studies:
        scores = [] if data is None else card.katz_scores(data)
        cases = card.ablation(controlnets, loras)
        told["katz"] = card.katz_lines(scores, cases, controlnets, loras)
        if out is not None:
            card.write(out, scores, cases)
    if "times" in studies:
        with progress("published times") as update:
            told["times"] = card.score_times(out, update)
    if "mlperf" in studies:
        with progress("MLPerf runs") as update:
            told["mlperf"] = card.score_mlperf(out, runs, update)
    for lines in told.values():
        print_parts(lines)
    if out is not None:
        typer.echo(f"{card.publish(out, told)}: the page; {', '.join(studies)} written")
