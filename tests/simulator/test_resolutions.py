"""Several resolutions (contract, rules 14 and 15): files, tables by request, slowdowns across, hand-computed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.continuous import ContinuousSerial
from policies.registry import build_policy
from profiler.assemble import across_error
from simulator import simulate, simulate_cluster
from synerdiff import cli
from synerdiff.core import (
    CONDITIONAL,
    ContractError,
    Decision,
    InputError,
    Request,
    SkipBudget,
    controlnets_from,
    loras_from,
)
from synerdiff.experiments.offer import fitted
from synerdiff.experiments.run import RunSpec, prepare
from synerdiff.fidelity.floor import floor_for_requests
from synerdiff.profile.capacity import (
    by_resolution,
    least_lane_s,
    offered_load,
    serial_capacity_samples_per_s,
    solo_latency_ns,
)
from synerdiff.profile.folder import load_profile, write_profile
from synerdiff.profile.tables import Corun, Head, Profile
from synerdiff.results.records import read_requests
from synerdiff.validation.session import ValidationPlan, require
from tests.builders import Script, affine_profile, exact, make_profile
from tests.reference_engine import reference_slowdowns
from tests.simulator.test_reference import assert_engines_agree
from tests.strategies import Whim, budgets, profiles
from tests.swift_builders import cluster, toy_adapters, toy_profile

SMALL, LARGE = (512, 512), (768, 1024)
EASY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sized(small: Profile, large: Profile, across: Any = None) -> Profile:
    """A profile of both resolutions, the small one first."""
    head = Head(resolutions=(LARGE,))
    large = replace(large, head=head, overheads=small.overheads, step_launch=small.step_launch)
    return replace(small, head=Head(resolutions=(SMALL, LARGE)), others={LARGE: large}, across=across or {})


def two(across: Any = None) -> Profile:
    """Steps of 2 and 4 rows take 100 and 200, of 2 rows at the larger resolution 160; decodes 50 and 90."""
    small = make_profile({2: 100, 4: 200}, {"whole": [50]}, {2: (1_200_000, 1_400_000), 4: (1_300_000, 1_800_000)})
    large = make_profile({2: 160}, {"whole": [90]}, {2: (1_500_000, 2_000_000)})
    return sized(small, large, across)


def at(request_id: int, arrival_ns: int, size: tuple[int, int], steps: int = 1, **fields: Any) -> Request:
    return Request(request_id, arrival_ns, steps, height=size[0], width=size[1], **fields)


def ends(result: Any) -> list[int]:
    return [record.finished_ns for record in result.requests]


def test_each_request_takes_the_times_of_its_resolution() -> None:
    requests = [at(0, 0, SMALL), at(1, 0, LARGE), at(2, 0, SMALL)]
    result = simulate(requests, build_policy("continuous-serial"), two())
    # Nobody overtakes: small 100 + 50, large 160 + 90, small 100 + 50.
    assert ends(result) == [150, 400, 550]


def test_the_rows_of_a_step_are_bounded_by_its_own_resolution() -> None:
    requests = [at(index, 0, LARGE) for index in range(2)]
    result = simulate(requests, build_policy("dynamic"), two())
    assert [work.rows for work in result.work if work.kind == "step"] == [2, 2]
    eager = Script(lambda view: Decision(admit=(0, 1), step=tuple(sample.full for sample in view.waiting)))
    with pytest.raises(ContractError, match="the step has 4 rows; at most 2 are possible"):
        simulate(requests, eager, two())


def test_beside_a_step_of_another_resolution_the_steps_solo_time_counts() -> None:
    # Chunk of the small resolution beside a large step of 160: between its own rows, at 100 and 200, so 6 tenths of the
    # way: step 1.26, chunk 1.64. Chunk of the large one beside a small step of 100: clamped to 160, its only point.
    profile = two()
    assert profile.slowdowns_beside(LARGE, 2, "whole", 0, SMALL) == (1_260_000, 1_640_000, 1)
    assert profile.slowdowns_beside(SMALL, 2, "whole", 0, LARGE) == (1_500_000, 2_000_000, 2)
    assert profile.slowdowns_beside(SMALL, 2, "whole", 0, SMALL) == (1_200_000, 1_400_000, 0)
    requests = [at(0, 0, SMALL), at(1, 0, LARGE)]
    result = simulate(requests, build_policy("continuous-parallel"), profile)
    # Small step to 100. Its decode of 50 at 1.64 takes 82, to 182; meanwhile the large step does floor(82/1.26) = 65 of
    # its 160, the other 95 alone: to 277. Then its decode of 90.
    assert ends(result) == [182, 367]
    assert (result.slowdowns_by_solo_time, result.slowdowns_clamped) == (1, 0)


def test_a_pair_that_was_measured_is_taken_as_measured() -> None:
    cells = {("whole", 0): {2: Corun(exact(2_000_000), exact(3_000_000), False)}}
    profile = two({(LARGE, SMALL): cells})
    assert profile.slowdowns_beside(LARGE, 2, "whole", 0, SMALL) == (2_000_000, 3_000_000, 0)
    held_out = {("whole", 0): {2: replace(cells["whole", 0][2], held_out=True)}}
    assert two({(LARGE, SMALL): held_out}).slowdowns_beside(LARGE, 2, "whole", 0, SMALL)[2] == 1


def test_the_rules_error_is_its_distance_from_what_was_measured() -> None:
    # Small chunk beside a large step: the rule says 1.26 and 1.64 (above). Large chunk beside a small step: clamped.
    beside_large = {("whole", 0): {2: Corun(exact(1_200_000), exact(2_050_000), False)}}
    beside_small = {("whole", 0): {2: Corun(exact(1_500_000), exact(1_600_000), False)}}
    found = across_error(two({(LARGE, SMALL): beside_large, (SMALL, LARGE): beside_small}))
    assert found == {
        "step_slowdown": {"cells": 2, "mean": 0.025, "worst": 0.05},
        "chunk_slowdown": {"cells": 2, "mean": 0.225, "worst": 0.25},
        "clamped": 1,
    }


@st.composite
def sized_profiles(draw: Any) -> Profile:
    return sized(draw(profiles()), draw(profiles()))


@EASY
@given(sized_profiles(), st.integers(1, 12), st.booleans(), st.booleans())
def test_look_ups_are_those_of_the_plain_rule(profile: Profile, rows: int, step: bool, chunk: bool) -> None:
    sizes = (LARGE if step else SMALL, LARGE if chunk else SMALL)
    plain = reference_slowdowns(profile, *sizes, rows, "whole", 0)
    assert profile.slowdowns_beside(sizes[0], rows, "whole", 0, sizes[1])[:2] == plain


@EASY
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4), st.booleans()), min_size=1, max_size=8),
    sized_profiles(),
    st.integers(0, 10**6),
    st.sampled_from(((0,), (0, 0))),
    budgets,
)
def test_engines_agree_on_mixed_resolutions(
    drawn: Any, profile: Profile, seed: int, gpus: Any, budget: SkipBudget
) -> None:
    requests, now_ns = [], 0
    for index, (gap_ns, steps, large) in enumerate(drawn):
        now_ns += gap_ns
        requests.append(at(index, now_ns, LARGE if large else SMALL, steps))
    assert_engines_agree(requests, Whim(seed, "whole"), profile, gpus, budget)
    assert_engines_agree(requests, build_policy("continuous-parallel"), profile, gpus, budget)


# Files


def big(tmp_path: Path) -> Profile:
    small, large = affine_profile(decode_ms=30), affine_profile(30, 6, 90)
    cells = {("whole", 0): {2: Corun(exact(1_100_000), exact(1_200_000), False)}}
    profile = sized(small, replace(large, row_buckets=(1, 2, 4)), {(SMALL, LARGE): cells})
    write_profile(tmp_path / "p", profile)
    return profile


def test_a_profile_of_two_resolutions_comes_back_as_it_was(tmp_path: Path) -> None:
    profile = big(tmp_path)
    back = load_profile(tmp_path / "p")
    assert back.head.resolutions == (SMALL, LARGE)
    assert (back.steps, back.chunks, back.corun) == (profile.steps, profile.chunks, profile.corun)
    assert back.others[LARGE].steps == profile.others[LARGE].steps
    assert back.others[LARGE].row_buckets == (1, 2, 4)
    assert back.across == profile.across
    text = (tmp_path / "p" / "profile.yaml").read_text()
    assert "schema_version: 2" in text
    assert "768x1024" in text
    with (tmp_path / "p" / "corun.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["step_resolution"], row["chunk_resolution"]) for row in rows} == {
        ("512x512", "512x512"), ("768x1024", "768x1024"), ("512x512", "768x1024"),
    }  # fmt: skip
    assert {row["tokens"] for row in rows} == {""}


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("steps.csv", "768x1024,,1,", "768*1024,,1,", "steps.csv, line 12: resolution is '768*1024'; HEIGHTxWIDTH"),
        (
            "corun.csv",
            "512x512,768x1024",
            "512x512,64x64",
            "chunk_resolution 64x64 is not in steps.csv, which has 512x512",
        ),
        ("chunks.csv", "768x1024,c4,3", "768x1024,c4,4", "the chunks of 'c4' must count from 0 without gaps"),
        (
            "profile.yaml",
            "768x1024",
            "64x64",
            "row_buckets must map each resolution (HEIGHTxWIDTH) to its rows; it lacks",
        ),
        (
            "profile.yaml",
            "schema_version: 2",
            "schema_version: 3",
            "schema_version is 3; this version of synerdiff reads 1",
        ),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path: Path, file: str, old: str, new: str, sentence: str) -> None:
    big(tmp_path)
    path = tmp_path / "p" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError) as raised:
        load_profile(tmp_path / "p")
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"height": 64, "width": 64},
            "request 0 asks for 64x64 pixels; profile 'test' was made for 512x512, 768x1024.",
        ),
        ({"height": 512}, "request 0 asks for a height alone; profile 'test' was made for 512x512, 768x1024."),
        ({"width": 1024}, "request 0 asks for a width alone;"),
    ],
)
def test_a_resolution_that_there_is_not_is_refused(fields: Any, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        fitted([Request(0, 0, 1, **fields)], two())
    assert sentence in str(raised.value)


def test_without_a_resolution_a_request_has_the_first() -> None:
    assert fitted([Request(0, 0, 1)], two())[0].size == SMALL


def test_load_counts_each_resolution_at_its_own_capacity() -> None:
    profile = sized(affine_profile(decode_ms=30), affine_profile(30, 6, 90))
    requests = [at(index, 0, LARGE if index % 2 else SMALL, 10) for index in range(40)]
    busy_s = sum(20 / serial_capacity_samples_per_s(one, 10, 8) for one in profile.sizes.values())
    assert offered_load(requests, profile, 50) == pytest.approx(busy_s / 50)
    assert solo_latency_ns(requests[1], profile) == 10 * (30 + 6 * 2) * 1_000_000 + 90_000_000


def test_the_least_work_is_that_of_each_resolution() -> None:
    requests = [at(0, 0, SMALL, 4), at(1, 0, LARGE, 2, images=3), at(2, 0, SMALL, 4, guidance_scale=1.0)]
    # Rows: 8 + 4 small ones at 50, 12 large ones at 80; decodes 2 of 50 and 3 of 90.
    assert least_lane_s(requests, two()) == pytest.approx((12 * 50 + 12 * 80) / 1e9)
    decodes = replace(two(), steps={2: exact(2), 4: exact(4)})
    decodes.others[LARGE].steps[2] = exact(2)  # type: ignore[index]
    assert least_lane_s(requests, decodes) == pytest.approx((2 * 50 + 3 * 90) / 1e9)
    assert [len(part) for part, _ in by_resolution(requests, two())] == [2, 1]
    assert by_resolution(requests, affine_profile())[0][0] == requests


def test_studies_of_one_resolution_refuse_several(tmp_path: Path) -> None:
    requests = (at(0, 0, SMALL), at(1, 10, LARGE))
    profile = replace(big(tmp_path), head=Head(model="digits", resolutions=(SMALL, LARGE)))
    with pytest.raises(InputError, match="a fidelity table is of one resolution"):
        floor_for_requests(0.9, requests, profile, tmp_path / "p")
    spec = RunSpec(profile=profile, source=requests, policy="continuous-serial", time_scale=1.0)
    plan = ValidationPlan(spec, ("continuous-serial",), (0.5,), 3)
    with pytest.raises(InputError, match="done for one resolution: give a trace of one"):
        require(plan, None)


def test_load_skip_weighs_each_decode_beside_the_step_that_comes() -> None:
    # Beside the large step of 160 the small decode of 50 takes 82 and costs 82 - 65 = 17, less than alone. Beside a
    # small step of 100 the large one of 90 takes 180 and costs 180 * (1 - 1/1.5) = 60: beside too.
    requests = [at(0, 0, SMALL), at(1, 0, LARGE), at(2, 0, SMALL)]
    result = simulate(requests, build_policy("load-skip"), two())
    # 82 beside 65 of 160, the rest to 277. 180 beside the small step: 100 * 1.5 = 150, to 427; the decode goes on alone
    # for (90 - floor(150 / 2)) = 15, to 442. The last decode at 427 has to wait for the one lane: 442 to 492.
    assert ends(result) == [182, 442, 492]
    costly = two({(LARGE, SMALL): {("whole", 0): {2: Corun(exact(3_000_000), exact(4_000_000), False)}}})
    # 200 * (1 - 1/3) = 133 lost, more than 50: so the small decode goes first, alone.
    assert ends(simulate(requests[:2], build_policy("load-skip"), costly)) == [150, 400]


def test_edf_counts_a_waiting_sample_at_its_own_resolution() -> None:
    # At 0 the small one has 1 step of 100; then the large one takes 160 and its decode 90: 350 in all.
    budget = SkipBudget(1_000_000, 0, 1, CONDITIONAL)
    for slo_ns, modes in ((350, "g"), (349, "c")):
        requests = [at(0, 0, SMALL, 1), at(1, 0, LARGE, 1, slo_ns=slo_ns)]
        requests[0] = replace(requests[0], slo_ns=200)
        policy = build_policy("edf")
        result = simulate(requests, policy, two_with_one_row(), budget=budget)
        assert result.requests[0].modes == (modes,)


def two_with_one_row() -> Profile:
    profile = two()
    large = replace(profile.others[LARGE], steps={1: exact(150), 2: exact(160)}, row_buckets=(1, 2))
    return replace(profile, steps={1: exact(90), **profile.steps}, row_buckets=(1, 2, 4), others={LARGE: large})


@settings(EASY, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4), st.booleans()), min_size=1, max_size=8),
    sized_profiles(),
    st.sampled_from(("synerdiff", "synerdiff-feedback", "load-skip", "edf")),
    st.sampled_from(((0,), (0, 0), (1,))),
    budgets,
)
def test_planning_policies_serve_several_resolutions(
    drawn: Any, profile: Profile, policy: str, gpus: Any, budget: SkipBudget
) -> None:
    requests, now_ns = [], 0
    for index, (gap_ns, steps, large) in enumerate(drawn):
        now_ns += gap_ns
        requests.append(at(index, now_ns, LARGE if large else SMALL, steps, slo_ns=500 * steps))
    assert_engines_agree(requests, build_policy(policy), profile, gpus, budget)


def test_loras_are_merged_at_every_resolution_and_controlnets_refused() -> None:
    profile, lora = (
        sized(toy_profile(), replace(toy_profile(), steps={1: exact(90), 2: exact(200)})),
        loras_from(("a",)),
    )
    asked = [at(0, 0, SMALL, 2, loras=lora), at(1, 0, LARGE, 2, loras=lora)]

    def ended(requests: Any, **strategies: Any) -> list[int]:
        place = cluster(**strategies)
        return ends(simulate_cluster(requests, ContinuousSerial, profile, place, adapters=toy_adapters()).run)

    # Read 200, copied 50, merged 20; then two steps of 100 and a decode of 40; the same weights for the large one.
    assert ended(asked) == [510, 510 + 2 * 200 + 40]
    controlled = [asked[0], at(1, 0, LARGE, 2, controlnets=controlnets_from(("edges",)))]
    for strategies, requests, what in (
        ({}, controlled, "request 1 asks for ControlNets, and what that costs"),
        ({"guidance": "two-gpus"}, asked, "guidance runs on two GPUs, and what that costs"),
    ):
        with pytest.raises(InputError, match=what):
            ended(requests, **strategies)


def test_requests_of_one_resolution_leave_the_others_out() -> None:
    alone = prepare(RunSpec(profile=two(), source=(at(0, 10, LARGE),), policy="synerdiff", time_scale=1.0))
    assert alone.profile.max_rows == 2
    assert not alone.profile.others


def test_the_command_reads_both_and_counts_what_was_not_measured(tmp_path: Path) -> None:
    big(tmp_path)
    trace = tmp_path / "t.csv"
    lines = [f"{0.05 * i},4,{512 if i % 2 else 768},{512 if i % 2 else 1024}" for i in range(60)]
    trace.write_text("\n".join(["arrival_s,steps,height,width", *lines]) + "\n")
    out = tmp_path / "out"
    common = ["--profile", str(tmp_path / "p"), "--trace", str(trace), "--policy", "continuous-parallel"]
    assert cli.main(["simulate", *common, "--out", str(out)]) == 0
    run = json.loads((out / "summary.json").read_text())["run"]
    assert run["resolutions"] == ["512x512", "768x1024"]
    assert run["slowdowns_by_solo_time"] > 0
    assert set(read_requests(out)["height"]) == {512, 768}


def test_profiles_of_one_resolution_each_are_combined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("p", SMALL), ("q", LARGE)):
        write_profile(tmp_path / name, replace(affine_profile(), head=Head(resolutions=(size,))))
    folders = [str(tmp_path / "p"), str(tmp_path / "q")]
    assert cli.main(["profile", "combine", *folders, "--out", str(tmp_path / "both")]) == 0
    both = load_profile(tmp_path / "both")
    assert both.name == "both"
    assert list(both.sizes) == [SMALL, LARGE]
    assert "both, measured, resolutions 512x512, 768x1024" in capsys.readouterr().out
    for name, size, cut in (("r", SMALL, 2), ("s", LARGE, 3)):
        head = Head(resolutions=(size,), cuts={"c4": (cut, 5, 7)})
        write_profile(tmp_path / name, replace(affine_profile(), head=head))
    for wrong, sentence in (
        ([folders[0], folders[0]], "are both of 512x512."),
        ([folders[0], str(tmp_path / "both")], "profile 'both' has several resolutions already"),
        (folders[:1], "at least two profiles are needed."),
        ([str(tmp_path / "r"), str(tmp_path / "s")], "cut decodes at other layers (c4)"),
    ):
        assert cli.main(["profile", "combine", *wrong, "--out", str(tmp_path / "none")]) == 2
        assert sentence in capsys.readouterr().err
