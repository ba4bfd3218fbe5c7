"""The profiler's parts: sampling rule, what counts as co-run, settings, kept results, findings."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiler.assemble import MeasuringPlan, decode_slowdowns, findings, with_deciding
from profiler.deciding import decision_times
from profiler.machine import throttle_counts
from profiler.partial import FILE, Partial, require_profile_folder
from profiler.sampling import Rule, median_width, spread_of, warm_up
from profiler.settings import command_line, make_settings
from profiler.timing import Side, _inside, active_times, alone, in_turn, together, visit_s
from synerdiff.core import InputError
from synerdiff.device import open_device
from synerdiff.device.cuda import POLL_S
from synerdiff.profile.tables import Corun, Profile, Spread
from tests.builders import affine_profile, make_profile


def spread(value: Any, n: int = 10) -> Any:
    return Spread(value, value, value, n)


def test_a_point_is_done_when_its_median_is_known_well_enough() -> None:
    rule = Rule(least=10, most=50, width=0.01, cap_s=4.0)
    assert not rule.enough([100] * 9, 1.0)
    assert rule.enough([100] * 10, 0.0)
    wide = [90, 110] * 10
    assert median_width(wide) == pytest.approx(0.2)
    assert not rule.enough(wide, 3.9)
    assert rule.enough(wide, 4.1), "the time is over"
    assert rule.enough([90, 110] * 25, 0.0), "50 samples are the most"
    assert not rule.enough([90, 110, 100], 19.0)
    assert rule.enough([90, 110, 100], 21.0), "very slow pieces"
    assert not rule.enough([90, 110], 1000.0)


def test_spread_is_the_median_with_the_tenth_and_ninetieth_percentile() -> None:
    assert spread_of(range(100, 0, -1)) == Spread(50, 11, 90, 100)
    assert spread_of([7]) == Spread(7, 7, 7, 1)


def test_warming_up_ends_when_two_medians_agree() -> None:
    times = iter([100, 100, 100, 50, 50, 50, 49, 50, 51, 1, 1, 1])
    warm_up(lambda count: [next(times) for _ in range(count)], cap_s=60)
    assert next(times) == 1, "9 runs were needed"
    calls = []
    warm_up(lambda count: calls.append(count) or [2 ** len(calls)] * count, cap_s=60)  # type: ignore[func-returns-value]
    assert len(calls) == 11, "it gives up on what never settles"


def test_only_pieces_wholly_inside_the_partners_active_time_count() -> None:
    partner = [(100, 200), (210, 300), (5_000_000, 6_000_000)]
    assert active_times(partner) == [(100, 300), (5_000_000, 6_000_000)]
    before, inside, across_the_gap, second = (90, 150), (100, 300), (250, 5_500_000), (5_000_001, 5_900_000)
    assert _inside([before, inside, across_the_gap, second], partner) == [200, 899_999]


class Sleep:
    def __init__(self, seconds: Any) -> None:
        self.seconds, self.runs = seconds, 0

    def again(self) -> Any:
        self.runs += 1
        return lambda: time.sleep(self.seconds)


def test_two_sides_replay_at_the_same_time_and_alone() -> None:
    slow, quick = Sleep(0.02), Sleep(0.001)
    with open_device("cpu") as device:
        denoise, decode = Side(device.lane("denoise"), slow.again), Side(device.lane("decode0"), quick.again)
        assert len(alone(denoise, 2)) == 2
        assert slow.runs == 3, "one run before those that count"
        slow_ns, quick_ns = together(denoise, decode, 3, 1_000_000)
    assert slow.runs == 7
    assert all(ns >= 20_000_000 for ns in slow_ns)
    assert quick_ns
    assert all(ns >= 1_000_000 for ns in quick_ns)
    assert quick.runs >= 20, "the queue of the quick side is never empty"


def test_pieces_in_turn_are_told_apart() -> None:
    with open_device("cpu") as device:
        lane = device.lane("decode0")
        short, long = in_turn([Side(lane, Sleep(0.0001).again), Side(lane, Sleep(0.01).again)], 2)
    assert len(short) == len(long) == 2
    assert max(short) < min(long)


def test_what_a_piece_raises_reaches_the_caller() -> None:
    class Broken:
        def again(self) -> Any:
            return lambda: 1 / 0

    with open_device("cpu") as device, pytest.raises(ZeroDivisionError):
        alone(Side(device.lane("denoise"), Broken().again), 1)


def test_points_follow_from_the_rows() -> None:
    full = make_settings("digits", "cpu")
    assert full.corun_rows == (1, 2, 4, 8, 16, 32)
    assert full.held_out_step_rows == (5, 10, 20)
    own = make_settings("digits", "cpu", rows="3,5,16,20")
    assert own.corun_rows == (3, 16, 20), "lookups never leave the range: both ends are measured"
    assert own.held_out_step_rows == (10,)
    assert make_settings("digits", "cpu", rows="1,2,3").held_out_step_rows == (), "nothing lies between"
    assert make_settings("digits", "cpu", rows="1,2,4").held_out_step_rows == (3,)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"rows": "0,1"}, "whole numbers from 1 to 1024"),
        ({"rows": "1,,2"}, "whole numbers"),
        ({"rows": "1,two"}, "whole numbers"),
        ({"rows": "-1"}, "whole numbers"),
        ({"rows": "1,5000"}, "whole numbers"),
        ({"rows": "4,2"}, "must rise"),
        ({"rows": "2,2"}, "must rise"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"resolution": "big"}, "HEIGHTxWIDTH"),
        ({"resolution": "1x2x3"}, "HEIGHTxWIDTH"),
        ({"resolution": "0"}, "HEIGHTxWIDTH"),
        ({"resolution": "512,"}, "HEIGHTxWIDTH"),
        ({"resolution": "512,512x512"}, "given twice"),
        ({"resolution": "512", "across": True}, "give several"),
    ],
)
def test_options_that_make_no_sense(option: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        make_settings("digits", "cpu", **option)


def test_the_command_line_gives_the_same_settings() -> None:
    settings = make_settings("sdxl", "cuda:1", "float16", "768x512,1024", "1,2,4", True, across=True)
    assert command_line(settings, "x") == (
        "synerdiff profile --model sdxl --device cuda:1 --dtype float16 --resolution 768x512,1024x1024 --rows 1,2,4 "
        "--across --quick --out x"
    )
    assert command_line(make_settings("digits", "cpu"), "x") == "synerdiff profile --model digits --device cpu --out x"


def test_results_are_kept_and_only_continued_under_the_same_conditions(tmp_path: Path) -> None:
    first = Partial(tmp_path, {"model": "digits", "rows": [1, 2]})
    assert first.tables == {}
    first.table("steps")["1"] = [5, 4, 6, 10]
    first.save()
    again = Partial(tmp_path, {"model": "digits", "rows": [1, 2]})
    assert again.tables == {"steps": {"1": [5, 4, 6, 10]}}
    assert again.spent_s >= json.loads((tmp_path / FILE).read_text())["spent_s"]
    with pytest.raises(InputError, match=r"with rows 1, 2; now it is 1, 4\. Repeat the same command"):
        Partial(tmp_path, {"model": "digits", "rows": [1, 4]})
    with pytest.raises(InputError, match="with dtype not given; now it is float16"):
        Partial(tmp_path, {"model": "digits", "rows": [1, 2], "dtype": "float16"})
    (tmp_path / FILE).write_text('{"tables": 3}')
    with pytest.raises(InputError, match="remove it to start again"):
        Partial(tmp_path, {})


def test_folders_that_must_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="holds a\\.txt, which 'profile' did not write"):
        require_profile_folder(tmp_path / "notes")
    (tmp_path / "notes" / "profile.yaml").write_text("schema_version: 1")
    with pytest.raises(InputError, match="already holds a profile"):
        require_profile_folder(tmp_path / "notes")
    with pytest.raises(InputError, match="this is a file"):
        require_profile_folder(tmp_path / "notes" / "a.txt")
    with pytest.raises(InputError, match="cannot be written"):
        require_profile_folder(tmp_path / "notes" / "a.txt" / "deeper")
    require_profile_folder(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_the_plan_follows_from_settings_and_atoms() -> None:
    plan = MeasuringPlan(make_settings("digits", "cpu"), [5, 1, 1, 1, 1, 1, 1, 9])
    assert {cut.name: len(cut) for cut in plan.chunkings} == {"whole": 1, "c4": 4, "c8": 8}
    assert plan.longest == {"whole": 0, "c4": 3, "c8": 7}
    held_out = [cell for cell in plan.cells if plan.held_out(cell)]
    assert {(cell.chunking, cell.chunk) for cell in held_out} == {("whole", 0), ("c4", 3), ("c8", 7)}
    assert {cell.rows for cell in held_out} == {3, 6, 12, 24}
    assert len(plan.cells) == len(set(plan.cells)) == 13 * 6 + 3 * 4
    order = [cell.key for cell in plan.cells]
    assert order[:6] == ["whole 0 2", "whole 0 8", "c4 3 2", "c4 3 8", "c8 7 2", "c8 7 8"], "the most valuable first"
    assert order[6:10] == ["whole 0 1", "whole 0 32", "whole 0 4", "whole 0 16"]
    assert order[10:18] == [f"c4 {chunk} {rows}" for chunk in range(4) for rows in (1, 32)], "the ends of the range"
    assert all(plan.held_out(cell) for cell in plan.cells[-12:])
    due = [plan.round_due(done, 10) for done in range(2 * len(plan.cells))]
    assert due == sorted(due)
    assert (due[0], due[-1]) == (1, 10)
    assert [due.count(k) for k in range(1, 11)] == [18] * 10, "evenly spread"
    few = MeasuringPlan(make_settings("digits", "cpu", rows="1"), [3, 1, 1, 1, 1])
    assert [cut.name for cut in few.chunkings] == ["whole", "c4"], "eight chunks need eight atoms"
    assert [few.round_due(done, 10) for done in range(10)] == list(range(1, 11))


def test_a_profile_can_be_made_of_chunkings_that_reach_over_the_whole_decodes_range() -> None:
    plan = MeasuringPlan(make_settings("digits", "cpu", rows="1,2,8,32"), [1] * 8)
    corun: dict[str, Any] = {}
    with pytest.raises(InputError, match="no step was measured beside a decode"):
        plan.complete(corun)
    samples = ([1_000_000], [1_000_000])
    for cell in plan.cells[:2]:
        corun[cell.key] = samples
    corun |= {f"c4 {chunk} {rows}": samples for chunk in range(4) for rows in (2, 8)}
    ends, chunkings = plan.complete(corun)
    assert (ends, [cut.name for cut in chunkings]) == ({"": (2, 8)}, ["whole", "c4"])
    corun["whole 0 32"] = samples
    ends, chunkings = plan.complete(corun)
    assert (ends, [cut.name for cut in chunkings]) == ({"": (2, 32)}, ["whole"])
    missing = plan.missing({"corun": corun, "skipped": {"c4 0 32": "too busy"}, "visit 2": {"whole 0 2": 1}})
    assert missing["not_settled"] == {"c4 0 32": "too busy"}
    assert missing["chunkings_left_out"] == ["c4", "c8"]
    assert missing["pairs_visited_less_than_twice"] == len(corun) - 1
    assert len(missing["not_measured"]) == len(plan.cells) - len(corun) - 1


def test_several_resolutions_are_measured_in_the_order_of_value_and_pairs_across_them_last() -> None:
    settings = make_settings("digits", "cpu", rows="2,8", resolution="32x32, 48x32", across=True)
    assert (settings.resolution, settings.others) == ((32, 32), ((48, 32),))
    plan = MeasuringPlan(settings, [1] * 3, ["32x32", "48x32"])
    assert [cell.key for cell in plan.cells] == [
        f"whole 0 {rows} step {step} chunk {chunk}"
        for pairs in ((("32x32", "32x32"), ("48x32", "48x32")), (("32x32", "48x32"), ("48x32", "32x32")))
        for step, chunk in pairs
        for rows in (2, 8)
    ]
    samples = ([1_000_000], [1_000_000])
    corun = {cell.key: samples for cell in plan.cells[:2]}
    assert plan.complete(corun)[0] == {"32x32": (2, 8)}
    assert plan.missing({"corun": corun})["resolutions_left_out"] == ["48x32"]
    with pytest.raises(InputError, match="no step was measured beside a decode"):
        plan.complete({cell.key: samples for cell in plan.cells[2:]})
    assert MeasuringPlan(replace(settings, across=False), [1] * 3, ["32x32", "48x32"]).cells == plan.cells[:4]


def test_how_long_a_visit_takes() -> None:
    # 30 and 10 ms: 2 * 40 of warming up, 3 * 40 before, 3 * 30 + 3 * 10 after, 1.5 * 5 * 30 together: 545 ms.
    assert visit_s(Rule(5, 10, 0.1, 0.5), 30e6, 10e6) == pytest.approx(0.545)
    assert visit_s(Rule(5, 10, 0.1, 4.0), 30e6, 10e6) == 2.0


def made_profile() -> Any:
    """Two chunks of 1 and 3 that slow the step by 2 and 1.25 and are slowed by 1.5 and 2; whole: 2 and 2."""
    cells = {("whole", 0): (2.0, 2.0), ("c2", 0): (2.0, 1.5), ("c2", 1): (1.25, 2.0)}
    corun = {
        key: {rows: Corun(spread(round(s_u * 1e6)), spread(round(s_v * 1e6)), False) for rows in (1, 4)}
        for key, (s_u, s_v) in cells.items()
    }
    corun["whole", 0][2] = Corun(spread(1_600_000), spread(2_500_000), True)
    return Profile(
        name="made",
        provenance="measured",
        row_buckets=(1, 2, 4),
        steps={1: spread(100), 2: spread(120), 4: Spread(200, 180, 220, 10)},
        held_out_steps={3: spread(250)},
        chunks={"whole": (spread(4000),), "c2": (spread(1000), spread(3000))},
        corun=corun,
        overheads={},
    )


def test_a_decode_in_chunks_slows_by_what_its_chunks_do() -> None:
    profile = made_profile()
    # 1.5 + 6 of time for 4 of work; the step progresses by 0.75 + 4.8 meanwhile.
    assert decode_slowdowns(profile, "c2", 1) == pytest.approx((7.5 / 5.55, 7.5 / 4))
    assert decode_slowdowns(profile, "whole", 4) == pytest.approx((2, 2))


def test_findings_state_overlap_kappa_and_the_lookups_error() -> None:
    found = findings(made_profile(), (1, 4))
    assert found["overlap"]["whole"] == {1: 1.0, 4: 1.0}
    assert found["overlap"]["c2"][1] == pytest.approx(5.55 / 7.5 + 4 / 7.5, abs=1e-4)
    assert found["kappa"] == {"c2": {rows: {"step": 0.6757, "chunk": 0.9375} for rows in (1, 4)}}
    error = found["held_out_error"]
    assert error["step_time"] == {"cells": 1, "mean": 0.2, "worst": 0.2}, "3 rows are looked up as 4: 200, not 250"
    assert error["step_slowdown"] == {"cells": 1, "mean": 0.25, "worst": 0.25}, "interpolated 2, measured 1.6"
    assert error["chunk_slowdown"] == {"cells": 1, "mean": 0.2, "worst": 0.2}
    assert found["dispersion"]["step_time"] == 0
    assert found["dispersion"]["chunk_slowdown"] == 0


def test_throttle_reasons_are_named_and_counted() -> None:
    assert throttle_counts([0, 0x1, 0x4, 0x4 | 0x40]) == {"software power cap": 2, "hardware thermal slowdown": 1}


def test_the_decision_lead_is_the_launchs_and_the_decisions_90th_percentile_together() -> None:
    overheads = {"decision_lead": Spread(900, 500, 900, 40), "step_dispatch": spread(7)}
    # Of ten samples the 90th percentile lies a tenth of the way from the ninth to the last.
    both = with_deciding(overheads, [30] * 8 + [60, 100])
    assert both == {"decision_lead": Spread(964, 530, 964, 40), "step_dispatch": spread(7)}


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_deciding_is_measured_at_a_full_batch_with_the_sleep_between_two_looks(rows: int) -> None:
    slowdowns = {rows: (1_200_000, 1_100_000)}
    profile = make_profile({rows: 10_000_000}, {"whole": [4_000_000]}, slowdowns) if rows < 16 else affine_profile()
    times = decision_times(profile, 5)
    assert len(times) == 5
    assert min(times) >= POLL_S * 1e9
