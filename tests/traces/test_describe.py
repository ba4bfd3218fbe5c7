"""What `trace describe` computes and draws."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from synerdiff.core import Request, controlnets_from, loras_from
from synerdiff.figures.style import save
from synerdiff.figures.workload import trace_picture
from traces.describe import describe, window_counts
from traces.gentd26 import read_gentd26
from traces.scaling import cut_window

S = 10**9


def test_a_small_trace_by_hand() -> None:
    requests = [
        Request(0, 0, 30, images=2, loras=loras_from(("a@0.5", "b"))),
        Request(1, 1 * S, 30, guidance_scale=1.0, loras=loras_from(("a",))),
        Request(2, 1 * S, 10, controlnets=controlnets_from(("canny",))),
        Request(3, 10 * S, 30, base_model="sdxl"),
    ]
    summary = describe(requests)
    assert summary.requests == 4
    assert summary.resolutions == {"the profile's": 1.0}
    assert (summary.duplicates, summary.prompts, summary.replay) == (0, 0, ())
    assert summary.gaps_s == ((9, 1), (1, 0))
    assert summary.span_s == 10
    assert summary.rate_per_s == pytest.approx(0.3)
    assert (summary.samples, summary.sample_steps) == (5, 60 + 30 + 10 + 30)
    assert summary.steps == {30: 0.75, 10: 0.25}
    assert summary.images == {1: 0.75, 2: 0.25}
    assert summary.guided_share == 0.75
    assert summary.loras_per_request == {0: 0.5, 1: 0.25, 2: 0.25}
    assert summary.lora_share == 0.5
    assert (summary.loras.draws, summary.loras.distinct) == (3, 2)
    assert summary.loras.top_share == {1: pytest.approx(2 / 3)}
    assert (summary.controlnets.distinct, summary.base_models.distinct) == (1, 2)
    assert summary.gap_cv == pytest.approx(np.std([1, 0, 9]) / np.mean([1, 0, 9]))
    (second,) = summary.windows  # ten windows of 1 s hold 1, 2, 0, ... requests; the last request ends the last one
    assert (second.window_s, second.windows, second.mean, second.largest) == (1, 10, pytest.approx(0.3), 2)  # type: ignore[comparison-overlap]
    assert second.index_of_dispersion == pytest.approx(np.var([1, 2] + [0] * 8) / 0.3)
    assert second.peak_to_mean == pytest.approx(2 / 0.3)


def test_windows_worth_replaying_are_whole_and_can_be_pasted() -> None:
    counts = [40, 20, 90, 0, 30]  # requests in windows of 10 s from second 5 on
    times = [5 + 10 * i + 10 * j / n for i, n in enumerate(counts) for j in range(n)] + [55]
    requests = [Request(i, round(at * S), 30, height=64, width=32, prompt="a") for i, at in enumerate(times)]
    summary = describe([*requests, replace(requests[-1], request_id=len(times))])
    assert [(window.why, window.start_s, window.end_s, window.requests) for window in summary.replay] == [
        ("busiest", 25, 35, 90),
        ("median", 45, 55, 30),
        ("calmest", 15, 25, 20),
    ]
    assert all(
        len(cut_window(tuple(requests), (window.start_s, window.end_s), "t")) == window.requests
        for window in summary.replay
    )
    assert (summary.resolutions, summary.duplicates, summary.prompts) == ({"64x32": 1.0}, 1, 182)
    assert list(summary.gaps_s[0]) == pytest.approx([10 + 1 / 9, 34 + 8 / 9])


def test_what_is_undefined_is_none() -> None:
    single = describe([Request(0, 5, 30)])
    assert (single.rate_per_s, single.gap_cv, single.windows, single.span_s) == (None, None, (), 0)
    assert single.loras.top_share == {}
    together = describe([Request(i, 0, 30) for i in range(5)])
    assert (together.rate_per_s, together.gap_cv) == (None, None)


def test_windows_agree_with_plain_counting() -> None:
    times = np.sort(np.random.default_rng(0).integers(5 * S, 1000 * S, 3000))
    for window_s in (1, 10, 60):
        counts = np.histogram(times - times[0], np.arange((times[-1] - times[0]) // S // window_s + 1) * window_s * S)[
            0
        ]
        found = window_counts(times, window_s)
        assert found.windows == len(counts)
        assert found.index_of_dispersion == pytest.approx(counts.var() / counts.mean(), rel=1e-3)
        assert found.largest == counts.max()


def test_pictures_are_drawn_also_for_tiny_traces(tmp_path: Path) -> None:
    for name, requests in (
        ("one", [Request(0, 3 * S, 30)]),
        ("few", [Request(i, i * 100 * S, 20 + i % 12, 1 + i % 3) for i in range(200)]),
    ):
        path, *_ = save(trace_picture(requests, describe(requests), title=name), tmp_path, name)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["few.png", "one.png"]


def test_gentd26_looks_as_published(tmp_path: Path) -> None:
    folder = os.environ.get("SYNERDIFF_DATA")
    if not folder:
        pytest.skip("SYNERDIFF_DATA names no folder with GenTD26")
    conversion = read_gentd26(Path(folder) / "gentd26_requests.csv.gz", all_types=True)
    summary = describe(conversion.requests)
    # The facts count all 26,823 rows, 25 more than can be replayed.
    dispersion = {counts.window_s: counts.index_of_dispersion for counts in summary.windows}
    for window_s, expected in ((1, 1.065), (60, 3.753), (600, 27.383), (3600, 139.523), (10_800, 318.188)):
        assert dispersion[window_s] == pytest.approx(expected, rel=0.01)
    assert summary.gap_cv == pytest.approx(12.0, rel=0.01)
    assert summary.steps[30] == pytest.approx(0.906971, abs=1e-6)
    assert summary.images[8] == pytest.approx(0.148071, abs=1e-6)
    assert (summary.loras.draws, summary.loras.distinct) == (4858, 389)
    assert summary.loras.top_share[5] == pytest.approx(0.203, abs=1e-4)
    eight_images = sum(r.steps * 8 for r in conversion.requests if r.images == 8)
    assert eight_images / summary.sample_steps == pytest.approx(0.45, abs=0.01)
