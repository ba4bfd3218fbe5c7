"""Requests in the system over the whole replay of a trace, per policy, under the rate at which they arrive."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from synerdiff.figures.style import finish, new_figure, policy_legend, policy_styles, styled
from synerdiff.results.metrics import backlog

_UNITS = ((2 * 86_400.0, 86_400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "s"))
_BINS_S = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 86_400)
_MOST_BINS = 300
_LINEAR_TO = 10


@styled
def backlog_over_time(
    requests: Mapping[str, pd.DataFrame],
    *,
    estimated: bool,
    title: str = "Requests in the system over the whole trace",
    caption: str = "",
) -> Figure:
    """Two panels over one time axis: arrivals per second, and requests that have arrived and not finished.

    ``requests``: policy -> its request table (columns of requests.parquet); all from the same trace. The backlog is
    linear up to 10 and logarithmic above.
    """
    styles = policy_styles(requests)
    any_table = next(iter(requests.values()))
    end_s = max(float(table[["arrival_s", "finished_s"]].max().max()) for table in requests.values())
    _, unit_s, unit = next(entry for entry in _UNITS if end_s >= entry[0])
    figure = new_figure(10.5, 5.4)
    rate, level = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.2])
    bin_s = next((length for length in _BINS_S if end_s / length <= _MOST_BINS), _BINS_S[-1])
    edges = np.arange(int(end_s // bin_s) + 2) * float(bin_s)
    counts = np.histogram(any_table["arrival_s"].to_numpy(float), edges)[0]
    rate.stairs(counts / bin_s, edges / unit_s, fill=True, color="#9a9a9a")
    rate.set(ylabel="arrivals/s")
    rate.set_title(f"arrivals per second, in bins of {_duration(bin_s)}", loc="left")
    for name, style in styles.items():
        changes = backlog(requests[name])
        level.plot(
            changes["time_s"] / unit_s,
            changes["in_system"],
            drawstyle="steps-post",
            color=style.color,
            linestyle=style.linestyle,
            linewidth=1.1,
        )
    level.set_yscale("symlog", linthresh=_LINEAR_TO)
    level.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    level.set_ylim(bottom=0)
    level.set_xlim(0, end_s / unit_s)
    level.set(xlabel=f"time ({unit})", ylabel="requests in the system")
    policy_legend(figure, styles, markers=False)
    peaks = ", ".join(f"{name} {int(backlog(requests[name])['in_system'].max())}" for name in styles)
    note = f"Backlog: linear up to {_LINEAR_TO}, logarithmic above. Peaks: {peaks}. {caption}"
    return finish(figure, title, note, estimated)


def _duration(seconds: int) -> str:
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"
