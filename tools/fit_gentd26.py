"""Fits ``traces/data/gentd26.yaml`` to the published files: ``python -m tools.fit_gentd26 FOLDER``.

A session is a run of one user's requests with gaps of at most 30 minutes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synerdiff.files import write_yaml
from traces.gentd26 import Gentd26Row, gentd26_rows
from traces.gentd26_parameters import PARAMETER_FILE

SESSION_GAP_S = 1800
_SOURCE = {
    "trace": "GenTD26, requests of a text-to-image service, 15 November to 8 December 2024",
    "repository": "https://github.com/alibaba/clusterdata, folder cluster-trace-v2026-GenAI",
    "commit": "7a6c496e4f4b6ce6150be8f881cb051bf2abff42",
    "citation": (
        "Yanying Lin et al., Understanding Diffusion Model Serving in Production: A Top-Down Analysis of Workload, "
        "Scheduling, and Resource Efficiency, ACM SoCC 2025"
    ),
    "note": "fitted by tools/fit_gentd26.py to all rows (25 of them have times only); the data itself is not here",
}


def fit(folder: Path) -> dict[str, Any]:
    """The content of the parameter file, from the two published files in ``folder``."""
    rows = list(gentd26_rows(folder, with_loras=True))
    first = datetime.fromisoformat(rows[0].cells[0])
    midnight_s = -((first.hour * 60 + first.minute) * 60 + first.second)
    sessions = sessions_of(rows)
    starts_s = np.array([session[0].arrival_s for session in sessions]) - midnight_s
    known = [row for row in rows if row.steps is not None]
    return {
        "source": _SOURCE,
        "rows": len(rows),
        "rate_per_s": round(len(rows) / rows[-1].arrival_s, 6),
        **_rate_profile(starts_s),
        "sessions": _session_parameters(sessions),
        "mix": {
            "repeat": _repeat(sessions, lambda row: (row.steps, row.images)),
            "steps_images": _shares(Counter(f"{row.steps}x{row.images}" for row in known)),
        },
        "loras": _lora_parameters(known, sessions),
    }


def sessions_of(rows: Sequence[Gentd26Row]) -> list[list[Gentd26Row]]:
    """Rows grouped into sessions, in the order of each session's first row."""
    sessions: list[list[Gentd26Row]] = []
    latest: dict[str, list[Gentd26Row]] = {}
    for row in rows:
        session = latest.get(row.user)
        if session is None or row.arrival_s - session[-1].arrival_s > SESSION_GAP_S:
            session = latest[row.user] = []
            sessions.append(session)
        session.append(row)
    return sessions


def _rate_profile(starts_s: NDArray[Any]) -> dict[str, Any]:
    hours = starts_s // 3600
    profile = np.bincount(hours % 24, minlength=24)
    days = int(hours.max()) // 24
    # Only whole days: the first and the last one were cut off.
    whole = np.bincount(hours[(hours >= 24) & (hours < days * 24)] - 24, minlength=(days - 1) * 24).reshape(-1, 24)
    levels = whole.sum(axis=1)
    expected = np.outer(levels, whole.sum(axis=0)) / whole.sum()
    # Counts scatter around a noisy mean by mean + cv2 * mean^2; solve the sum over all hours for cv2.
    noise = ((whole - expected) ** 2 - expected).sum() / (expected**2).sum()
    return {
        "hour_profile": _rounded(profile / profile.mean(), 4),
        "day_levels": _rounded(levels / levels.mean(), 4),
        "hour_noise_cv2": round(float(noise), 4),
    }


def _session_parameters(sessions: Sequence[Sequence[Gentd26Row]]) -> dict[str, Any]:
    gaps = [b.arrival_s - a.arrival_s for session in sessions for a, b in pairwise(session)]
    log_gaps = np.log(np.maximum(gaps, 1))  # the clock ticks once a second, and 0 has no logarithm
    sizes = Counter(len(session) for session in sessions)
    return {
        "gap_log_mean": round(float(log_gaps.mean()), 4),
        "gap_log_sd": round(float(log_gaps.std()), 4),
        "gap_cap_s": SESSION_GAP_S,
        "requests": {int(size): round(count / len(sessions), 6) for size, count in sorted(sizes.items())},
    }


def _repeat(sessions: Sequence[Sequence[Gentd26Row]], feature: Any) -> float:
    """r of a chain that repeats its last value with probability r and else draws afresh.

    P(same as before) = r + (1 - r) * sum(p^2), solved for r.
    """
    counts: Counter[Hashable] = Counter()
    same = pairs = 0
    for session in sessions:
        values = [feature(row) for row in session if row.steps is not None]
        counts.update(values)
        pairs += max(0, len(values) - 1)
        same += sum(a == b for a, b in pairwise(values))
    total = sum(counts.values())
    by_chance = sum((count / total) ** 2 for count in counts.values())
    return round((same / pairs - by_chance) / (1 - by_chance), 4)


def _lora_parameters(rows: Sequence[Gentd26Row], sessions: Sequence[Sequence[Gentd26Row]]) -> dict[str, Any]:
    used = [lora for row in rows for lora in row.loras]
    counts = np.array(sorted(Counter(lora.file for lora in used).values(), reverse=True))
    s, q = fit_zipf_mandelbrot(counts / counts.sum())
    scales = Counter(lora.scale for lora in used)
    return {
        "repeat": _repeat(sessions, lambda row: row.loras),
        "per_request": _shares(Counter(len(row.loras) for row in rows)),
        "ids": len(counts),
        "zipf_s": s,
        "zipf_q": q,
        "scales": _shares(scales),
    }


def fit_zipf_mandelbrot(shares: NDArray[np.float64]) -> tuple[float, float]:
    """(s, q) of 1 / (k + q)^s over the ranks k = 1..n, by grid search.

    Least squares between the cumulative shares at ranks spaced by a constant factor, so that the few most popular
    count as much as the many others.
    """
    ranks, target = np.arange(1, len(shares) + 1), np.cumsum(shares)
    at = np.unique(np.rint(np.geomspace(1, len(shares), 40)).astype(int)) - 1
    best = (np.inf, 0.0, 0.0)
    for s in np.arange(0.5, 2.001, 0.01):
        for q in np.arange(0.0, 20.001, 0.1):
            weights = (ranks + q) ** -s
            error = float(((np.cumsum(weights) / weights.sum() - target)[at] ** 2).sum())
            best = min(best, (error, round(float(s), 2), round(float(q), 1)))
    return best[1], best[2]


def _shares(counts: Mapping[Any, int]) -> dict[Any, float]:
    """Largest first, then by key."""
    total = sum(counts.values())
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {key: round(count / total, 6) for key, count in order}


def _rounded(values: NDArray[np.float64], digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


if __name__ == "__main__":
    write_yaml(PARAMETER_FILE, fit(Path(sys.argv[1])))
