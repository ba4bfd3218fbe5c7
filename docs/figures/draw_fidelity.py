"""Draws latency, throughput and fidelity of docs/fidelity.md: the shipped table of `digits` on two profiles.

What was simulated is kept in fidelity-latency-PROFILE.csv; a file that is there is drawn and not computed again.

python docs/figures/draw_fidelity.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas

from synerdiff.diffusion import MODELS
from synerdiff.experiments.fidelity_tradeoff import trade_off
from synerdiff.fidelity.table import read_fidelity
from synerdiff.figures.fidelity import latency_against_fidelity
from synerdiff.figures.style import save
from synerdiff.profile.folder import find_profile, load_profile

FOLDER = Path(__file__).resolve().parent
STEPS, GUIDANCE, LOADS = 25, 4.0, (0.7, 0.9, 1.1)
METRICS = ["request_latency_mean_s", "request_latency_p99_s", "request_throughput"]
COLUMNS = ["policy", "variant", "load", "seed", "ssim", *METRICS]


def main() -> None:
    table = read_fidelity(MODELS / "digits")
    for name in ("digits-cpu", "h200-sdxl-estimated"):
        profile = load_profile(find_profile(name))
        model, caption = str(profile.info["model"]), ""
        if model != table.model:
            # Only here, where the picture says so: budgets and studies refuse the table of another model.
            caption = (
                f"LATENCY OF {model.upper()}, FIDELITY OF DIGITS: how far {model}'s own images change is not known. "
            )
        used = replace(table, head={**table.head, "model": model, "resolution": profile.info["resolution"]})
        kept = FOLDER / f"fidelity-latency-{name}.csv"
        if not kept.is_file():
            trade_off(profile, used, STEPS, GUIDANCE, LOADS)[COLUMNS].round(5).to_csv(kept, index=False)
        frame = pandas.read_csv(kept).assign(profile=name, estimated=profile.estimated)
        caption += (
            f"DDIM, {STEPS} steps, guidance {GUIDANCE:g} on {name}. Poisson arrivals, means over 3 seeds of 600 "
            "requests; load 1: full guidance in all steps with serial decodes. All run load-skip's placement at its "
            "default batch."
        )
        save(latency_against_fidelity(frame, caption=caption), FOLDER, f"fidelity-latency-{name}")
        (FOLDER / f"fidelity-latency-{name}.svg").unlink()


if __name__ == "__main__":
    main()
