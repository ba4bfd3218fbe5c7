"""Which cells predictions look up, and that each of them is measured in the session or named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from synerdiff.experiments.run import RunSpec
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.validation.errors import TOLERANCES
from synerdiff.validation.lookups import measured_cells, neighbours, sentence, watched
from synerdiff.validation.report import conclude
from synerdiff.validation.session import Validation, ValidationPlan, cells_of
from tests.builders import make_profile, requests_at
from tests.validation.recorded import contended, recorded_session, times_of
from tests.validation.test_errors import FACTS


def test_a_watched_profile_gives_the_same_times_and_remembers_the_measured_cells_behind_them() -> None:
    profile = make_profile(
        {1: 10, 4: 20, 8: 40}, {"whole": [9], "c2": [4, 5]}, {1: (1_100_000, 1_200_000), 8: (1_300_000, 1_400_000)}
    )
    one = watched(profile)
    assert one.slowdown_ppm(3, "c2", 1) == profile.slowdown_ppm(3, "c2", 1)
    assert one.lookups == {("corun", "c2", 1, 1), ("corun", "c2", 1, 8)}, "4 rows lie between what was measured"
    assert (one.step_ns(2), one.decode_ns("c2"), one.chunk_ns("whole", 0)) == (20, 9, 9)
    assert {("step", 4), ("chunk", "c2", 0), ("chunk", "c2", 1), ("chunk", "whole", 0)} < one.lookups
    assert one.on_worker(2_000_000).step_ns(8) == 20
    assert ("step", 8) in one.lookups, "a worker's profile is watched too"
    one.lookups.clear()
    lent = one.lent()
    assert lent.step_ns(4) == 20
    assert one.lookups == {("step", 4)}, "so is what a user's policy is given"
    assert neighbours(5, [1, 4, 8]) == (4, 8)
    assert neighbours(4, [1, 4, 8]) == (4,)
    assert sentence({("corun", "c4", 1, 8), ("step", 2)}) == "chunk 1 of c4 beside 8 rows, a step of 2 rows"


def test_what_a_policy_compares_before_it_chooses_is_measured() -> None:
    """auto looks at every chunking; the one that it takes depends on the cells."""
    profile = load_profile(find_profile("digits-cpu"))
    spec = RunSpec(profile=profile, source=tuple(requests_at(0, 5, 9, steps=3)), policy="auto")
    cells = cells_of(ValidationPlan(spec, ("auto",), (0.8,), 1), profile, 1)
    assert set(cells.chunkings) == {"whole", "c4", "c8"}
    serial = cells_of(ValidationPlan(spec, ("continuous-serial",), (0.8,), 1), profile, 1)
    assert serial.chunkings == ("whole",)


def without_chunking(session: Validation, name: str) -> None:
    for index, one in enumerate(session.passes):
        session.passes[index] = replace(
            one,
            chunks={known: columns for known, columns in one.chunks.items() if known != name},
            beside={key: both for key, both in one.beside.items() if key[0] != name},
        )


def test_a_cell_that_was_looked_up_and_not_measured_is_named_and_fails(tmp_path: Path) -> None:
    profile = contended()
    session = recorded_session(profile, profile, lambda repeat: times_of(profile), loads=(0.5,), requests=(20, 30, 3))
    assert session.lookups
    assert session.unmeasured == set()
    text, passed = conclude(tmp_path / "whole", session, TOLERANCES["strict"], FACTS)
    assert passed
    assert f"All {len(session.lookups)} cells that predictions looked up were measured here." in text
    session.lookups.add(("corun", "c4", 2, 32))
    assert session.unmeasured == set(), "it was measured"
    session.lookups.add(("step", 5))
    assert session.unmeasured == {("step", 5)}
    text, passed = conclude(tmp_path / "lacking", session, TOLERANCES["strict"], FACTS)
    assert not passed
    assert "looked up cells that were not measured here**: a step of 5 rows." in text
    without_chunking(session, "c4")
    assert ("corun", "c4", 2, 32) not in measured_cells(session.passes)
