"""The policy that visits a profile's cells: which ones, and that its records tell the times that lanes really have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from synerdiff.core import WorkRecord
from synerdiff.profile.tables import Head, Profile
from synerdiff.validation.calibration import STEPS_BESIDE, CellVisitor, cell_times, joined, refreshed
from tests.builders import make_profile
from tests.exact_lanes import rehearse

STEPS = {1: 100_000, 2: 130_000, 3: 170_000, 4: 200_000, 8: 350_000}


def small(chunks: Any, overheads: Any = None) -> Any:
    profile = make_profile(STEPS, chunks, overheads=overheads)
    profile.head = Head(cuts={"c3": (1, 2)})
    return profile


def visited(profile: Profile, chunking: str, rows: int, rounds: int = 1) -> Any:
    """All visits on lanes that keep exactly to the profile's times."""
    visitor = CellVisitor(chunking, rows, rounds)  # type: ignore[arg-type]
    run = rehearse(visitor.requests, visitor, profile, stop=visitor.over)
    assert run.error is None
    return run


@pytest.mark.parametrize("lead_ns", [0, 40_000])
@pytest.mark.parametrize("chunking", ["whole", "c3"])
def test_every_cell_is_visited_and_gives_back_its_time(chunking: str, lead_ns: int) -> None:
    profile = small({"whole": [170_000], "c3": [50_000, 70_000, 50_000]}, {"decision_lead": lead_ns})
    rows = (1, 2, 3, 4, 8)
    run = visited(profile, chunking, rows, rounds=2)  # type: ignore[arg-type]
    times = cell_times(chunking, run)
    assert tuple(times.steps) == rows
    for count, samples in times.steps.items():
        assert set(samples) == {STEPS[count]}
        assert len(samples) + len(times.launched.get(count, ())) >= 2 * 3
    solo = [cell.median for cell in profile.chunks[chunking]]
    assert [set(column) for column in times.chunks[chunking]] == [{ns} for ns in solo]
    assert {len(column) for column in times.chunks[chunking]} == {2 * len(rows)}
    assert set(times.beside) == {(chunking, chunk, count) for chunk in range(len(solo)) for count in rows}
    for step, chunk in times.beside.values():
        assert step.pieces
        assert chunk.pieces
        assert step.progress_ns == pytest.approx(step.overlap_ns), "these lanes do not slow each other down"
        assert chunk.progress_ns == pytest.approx(chunk.overlap_ns)
    new = refreshed(profile, [times], [times])
    assert new.slowdown_ppm(8, chunking, 0) == (1_000_000, 1_000_000)
    assert new.step_ns(3) == STEPS[3]


def test_a_decode_longer_than_many_steps_ends_alone() -> None:
    profile = small({"whole": [STEPS_BESIDE * 100_000 + 5_000_000]})
    run = visited(profile, "whole", (1, 2))  # type: ignore[arg-type]
    times = cell_times("whole", run)
    step, chunk = times.beside["whole", 0, 1]
    assert (step.pieces, chunk.pieces) == (STEPS_BESIDE, 1)
    assert chunk.overlap_ns == STEPS_BESIDE * 100_000
    assert chunk.progress_ns == pytest.approx(chunk.overlap_ns), "what it did alone is not counted"


def piece(kind: str, start_ns: Any, end_ns: Any, chunk: int = -1, exclusive: bool = False) -> Any:
    lane = "denoise" if kind == "step" else "decode0"
    return WorkRecord(0, lane, kind, start_ns, end_ns, 2 if kind == "step" else 0, 0, (), "", chunk, exclusive, False)


def test_what_each_side_loses_is_found_from_pieces_that_overlap_in_part() -> None:
    """Steps of 100 and a chunk of 60 alone; the chunk runs beside two steps and the gap of 10 between them."""
    work = [
        piece("step", 0, 100),
        piece("chunk", 100, 160, 0, exclusive=True),
        piece("step", 160, 260),
        piece("step", 260, 360),
        piece("chunk", 300, 388, 0),
        piece("step", 370, 479),
    ]
    dispatch = SimpleNamespace(step_ns=[0] * 4, step_queued=[False] * 4, chunk_ns=[0] * 2, prepare_ns=[], copy_ns=[5])
    times = cell_times("whole", SimpleNamespace(result=SimpleNamespace(work=work), dispatch=dispatch))  # type: ignore[arg-type]
    assert times.launched == {}, "no step was queued behind another, so every step is launched as in the run"
    assert times.steps == {2: [100, 100]}
    assert times.chunks == {"whole": [[60]]}
    assert times.overheads["result_copy"] == [5]
    step, chunk = times.beside["whole", 0, 2]
    assert (step.overlap_ns, step.pieces) == (60 + 18, 2)
    assert step.progress_ns == pytest.approx((100 - 40) + (100 - 91)), (
        "what the steps did outside of the overlap is known"
    )
    assert (chunk.overlap_ns, chunk.pieces) == (78, 1)
    assert chunk.progress_ns == pytest.approx(60 - 10), "in the gap between the steps the chunk ran at full speed"


def test_steps_on_an_idle_lane_are_told_from_those_that_were_queued() -> None:
    """130 and 120 on an idle lane, 100 behind another step: 25 more in the mean."""
    work = [
        piece("step", 0, 130),
        piece("step", 130, 230),
        piece("chunk", 230, 290, 0, exclusive=True),
        piece("step", 290, 410),
    ]
    dispatch = SimpleNamespace(
        step_ns=[0] * 3, step_queued=[False, True, False], chunk_ns=[0], prepare_ns=[7], copy_ns=[5]
    )
    times = cell_times("whole", SimpleNamespace(result=SimpleNamespace(work=work), dispatch=dispatch))  # type: ignore[arg-type]
    assert (times.steps, times.launched) == ({2: [100]}, {2: [130, 120]})
    profile = refreshed(small({"whole": [60]}), [times], [times])
    assert (profile.step_ns(2), profile.launch_ns(2)) == (100, 25)


def test_passes_with_several_chunkings_are_joined() -> None:
    profile = small({"whole": [170_000], "c3": [50_000, 70_000, 50_000]})
    parts = [cell_times(name, visited(profile, name, (2, 4))) for name in ("whole", "c3")]  # type: ignore[arg-type]
    times = joined(parts)
    assert set(times.chunks) == {"whole", "c3"}
    assert len(times.steps[4]) == sum(len(part.steps[4]) for part in parts)
    assert len(times.overheads["chunk_dispatch"]) == 2 * 2 * (1 + 3)
    assert len(times.beside) == 2 * (1 + 3)
