"""The production trace at ten times its pace: GPUs against SLO for three policies and three cards, with prices, and how
much of the fleet batching, placement, order and levers save.

    SYNERDIFF_DATA=data python -m benchmarks.production_fleet experiments/production.yaml --out results/production

Fleets grow from work / speed until P99 (geometric mean over the windows) is inside the strictest SLO, or more GPUs
bring nothing; every SLO then reads its fleet off the same runs.
"""

from __future__ import annotations

import argparse
from math import ceil
from pathlib import Path
from typing import Any

import pandas

from synerdiff.config.capacity import load_question, target_of
from synerdiff.experiments.backends import make_backend
from synerdiff.experiments.capacity import Ask, Inquiry, Level
from synerdiff.experiments.sweep import rows_of
from synerdiff.figures.capacity import capacity_figure
from synerdiff.figures.style import save
from synerdiff.files import write_rows

PACE = 10.0
STRICTEST_S = 15.0
MOST = 64
CARDS = ("one at a time", "batching", "auto")
"""Policies that run on every card; the others on the first only."""
FIELDS = ("profile", "policy", "gpus", "p99_s", "low_s", "high_s")


def draw(table: Path, folder: Path, slo: str) -> None:
    """P99 against GPUs for every card and the policies that all cards have."""
    frame = pandas.read_csv(table)
    frame = frame[frame["policy"].isin(CARDS)]
    target = target_of(slo)
    named = {"p99_s": "value", "low_s": "low", "high_s": "high"}
    points = frame.rename(columns=named).assign(rate_per_s=None, estimated=True, answer=False)
    rows: list[dict[str, Any]] = [
        {**{str(name): value for name, value in row.items()}, "keeps": target.holds(row["value"])}
        for row in points.to_dict("records")
    ]
    for line in {(row["profile"], row["policy"]): row for row in reversed(rows) if row["keeps"]}.values():
        line["answer"] = True
    caption = (
        f"GenTD26's three busiest four-hour windows at {PACE:g} times their pace, 3,140 requests; geometric means over "
        "them."
    )
    filled = "the mean is inside (bar: its 95% interval)"
    save(capacity_figure(rows, target, "gpus", "P99 on the production trace", caption, filled), folder, "production")


def main() -> None:
    """Write ``p99.csv``: the P99 of every fleet that was tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/production"))
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    question = load_question(arguments.file)
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = Inquiry(question, arguments.file.parent, arguments.out)
    backend = make_backend("loky", arguments.jobs)
    table: list[tuple[object, ...]] = []
    for place, name in enumerate(question.profiles):
        for entry in study.entries:
            if place and entry.name not in CARDS:
                continue
            gpus = max(1, ceil(PACE * study.bound(name, entry)))
            last = 0.0
            while gpus <= MOST:
                ask = Ask(Level(gpus, round(PACE * study.rate_per_s, 6)), judging=False, few=False)
                runs = study.runs(name, entry, ask)
                rows_of({run.key: run for run in runs}, backend, study.results, lambda: None)
                verdict = study.verdict(name, ask, runs)
                table.append(
                    (name, entry.name, gpus, *(round(v or 0, 3) for v in (verdict.value, verdict.low, verdict.high)))
                )
                print(*table[-1], flush=True)
                if verdict.value <= STRICTEST_S or verdict.value == last:
                    break
                last = verdict.value
                gpus += max(1, gpus // 4)
    file = arguments.out / "p99.csv"
    write_rows(file, FIELDS, table)
    draw(file, arguments.out / "figures", question.slo)


if __name__ == "__main__":
    main()
