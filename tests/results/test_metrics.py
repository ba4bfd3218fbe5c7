"""Metrics of tiny hand-made runs, with exact expected values."""

from __future__ import annotations

from typing import Any

import json

import pandas as pd
import pytest

from synerdiff.core import InputError, Request, RequestRecord
from synerdiff.results.metrics import (
    backlog,
    lane_utilisation,
    latencies_s,
    measured,
    saturation_throughput,
    skip_fraction,
    slo_s,
    stages,
    summarize,
)

S = 1_000_000_000


def request_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    defaults = {
        "admitted_s": None, "denoised_s": None, "decode_started_s": None, "finished_s": None, "status": "done",
        "images": 1, "steps": 10, "skipped_steps": 0, "guidance_scale": 7.5, "slo_s": None,
    }  # fmt: skip
    table = pd.DataFrame([{"request_id": i, **defaults, **row} for i, row in enumerate(rows)])
    for column in table.columns:
        if column.endswith("_s"):
            table[column] = table[column].astype(float)
    return table.assign(request_latency_s=table["finished_s"] - table["arrival_s"])


def work_table(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    columns = ["gpu", "lane", "kind", "start_ns", "end_ns", "sample_ids", "chunk"]
    return pd.DataFrame(rows, columns=columns)


def twenty() -> pd.DataFrame:
    """Twenty requests a second apart; each waits 1, denoises 2, waits 0.5 and decodes 0.5 s. 2 and 1 are trimmed."""
    return request_table(
        [
            {"arrival_s": i, "admitted_s": i + 1, "denoised_s": i + 3, "decode_started_s": i + 3.5, "finished_s": i + 4}
            for i in range(20)
        ]
    )


def no_work() -> pd.DataFrame:
    return work_table([])


def test_trimming_is_by_arrival() -> None:
    shuffled = twenty().sample(frac=1, random_state=3)
    assert measured(shuffled)["request_id"].tolist() == list(range(2, 19))
    assert len(measured(twenty().head(9))) == 9


def test_summary_of_a_steady_run() -> None:
    work = work_table(
        [
            (0, "denoise", "step", 0, 12 * S, "0.0", -1),
            (0, "decode0", "chunk", 20 * S, 25 * S, "0.0", 0),
        ]
    )
    found = summarize(twenty(), work, [2.0] * 20)
    expected = {
        "trace_request_count": 20, "warmup_request_count": 2, "tail_request_count": 1, "measured_request_count": 17,
        "request_count": 17, "error_request_count": 0, "unfinished_count": 0,
        "request_latency_mean_s": 4.0, "request_latency_p50_s": 4.0, "request_latency_p99_s": 4.0,
        "p99_claimable": False, "request_latency_p99_upper_s": None, "slo_p99_claimable": False,
        # From arrival 2 to finish 18 + 4; requests 0 (at 4 s) to 18 finish inside.
        "benchmark_duration_s": 20.0, "request_throughput": 19 / 20, "image_throughput": 19 / 20, "goodput": 19 / 20,
        "offered_request_rate": 1.0, "offered_image_rate": 1.0, "good_request_count": 17, "good_fraction": 1.0,
        "skip_fraction": 0.0,
        "queue_mean_s": 1.0, "denoise_mean_s": 2.0, "decode_wait_mean_s": 0.5, "decode_mean_s": 0.5,
        "lane_utilisation_gpu0_denoise": 10 / 20, "lane_utilisation_gpu0_decode0": 2 / 20,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_requests_that_did_not_finish_are_counted_never_dropped() -> None:
    table = twenty()
    for request, status in ((0, "rejected"), (5, "unfinished"), (6, "failed"), (19, "unfinished")):
        table.loc[request, "status"] = status
        table.loc[request, ["admitted_s", "denoised_s", "decode_started_s", "finished_s", "request_latency_s"]] = None
    found = summarize(table, no_work(), [2.0] * 20)
    expected = {
        "rejected_count": 1, "unfinished_count": 2, "failed_count": 1, "error_request_count": 4,
        "measured_request_count": 17, "request_count": 15, "good_request_count": 15, "good_fraction": 15 / 17,
        "request_throughput": 16 / 20, "p99_claimable": False,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_nothing_finished() -> None:
    table = twenty().assign(status="unfinished", finished_s=float("nan"), request_latency_s=float("nan"))
    found = summarize(table, no_work(), [2.0] * 20)
    assert found["request_count"] == 0
    assert found["request_latency_mean_s"] is None
    assert found["queue_p99_s"] is None
    assert found["request_throughput"] == 0.0
    assert json.dumps(found, allow_nan=False)


def test_goodput_uses_the_requests_own_limit_before_three_times_solo() -> None:
    table = twenty().assign(slo_s=[3.9] * 10 + [None] * 10)  # type: ignore[list-item]
    assert slo_s(table, [1.0] * 20).tolist() == [3.9] * 10 + [3.0] * 10
    found = summarize(table, no_work(), [1.4] * 20)
    assert found["good_request_count"] == 9
    assert found["goodput"] == 9 / 20


def test_skips_are_counted_over_guided_sample_steps() -> None:
    table = twenty().assign(images=2, skipped_steps=5)
    table.loc[10:, ["guidance_scale", "skipped_steps"]] = [1.0, 0]
    found = summarize(table, no_work(), [2.0] * 20)
    assert found["skip_fraction"] == 5 / 20
    assert found["image_throughput"] == 38 / 20


def test_p99_claims_need_459_complete_requests() -> None:
    count = 540
    rows = [{"arrival_s": i, "admitted_s": i, "denoised_s": i, "decode_started_s": i, "finished_s": i + 1 + i / 1000}
            for i in range(count)]  # fmt: skip
    found = summarize(request_table(rows), no_work(), [1.0] * count)
    assert found["measured_request_count"] == 459
    assert found["p99_claimable"] is True
    assert found["slo_p99_claimable"] is True
    assert found["request_latency_p99_upper_s"] == pytest.approx(1 + 512 / 1000)
    assert found["request_latency_mean_ci_low_s"] is None  # the load is not known
    one_late = summarize(request_table(rows).assign(slo_s=[1.5115] * count), no_work(), [1.0] * count)
    assert one_late["good_request_count"] == 458
    assert one_late["slo_p99_claimable"] is False


def test_one_run_has_an_interval_of_its_mean_where_its_load_allows_enough_blocks() -> None:
    table = request_table([{"arrival_s": i, "finished_s": i + 1 + i % 7} for i in range(600)])
    found = {load: summarize(table, no_work(), [1.0] * 600, load) for load in (0.4, 0.7, 1.0)}
    low, mean, high = (found[0.4][f"request_latency_mean_{name}"] for name in ("ci_low_s", "s", "ci_high_s"))
    assert low < mean < high
    for load in (0.7, 1.0):
        assert found[load]["request_latency_mean_ci_low_s"] is found[load]["request_latency_mean_ci_high_s"] is None
    assert not [name for name in found[0.4] if "_p9" in name and "_ci_" in name]


def test_only_requests_that_are_done_have_a_latency() -> None:
    done = RequestRecord(Request(0, 2 * S, 4), finished_ns=5 * S, status="done")
    lost = [RequestRecord(Request(i, 2 * S, 4), status=status) for i, status in ((1, "rejected"), (2, "unfinished"))]
    assert latencies_s([done, *lost]) == [3.0]
    assert latencies_s(lost) == []


def test_steps_of_requests_that_are_not_done_are_no_skips() -> None:
    table = twenty().assign(skipped_steps=5)
    table.loc[10:, "status"] = "unfinished"
    table.loc[10:, "skipped_steps"] = 9
    assert skip_fraction(table) == 5 / table["steps"].iloc[0]


def test_stages_add_up() -> None:
    table = twenty()
    assert stages(table).sum(axis=1).tolist() == table["request_latency_s"].tolist()


def test_an_empty_run_is_refused() -> None:
    with pytest.raises(InputError, match="the run has no requests"):
        summarize(twenty().head(0), no_work(), [])


def test_utilisation_clips_to_the_window() -> None:
    work = work_table(
        [
            (0, "denoise", "step", 0, 4 * S, "0.0", -1),
            (0, "denoise", "step", 9 * S, 14 * S, "0.0", -1),
            (1, "decode0", "chunk", 20 * S, 21 * S, "0.0", 0),
        ]
    )
    assert lane_utilisation(work, 2.0, 12.0) == {"gpu0_denoise": 0.5, "gpu1_decode0": 0.0}
    assert lane_utilisation(work, 2.0, 2.0) == {}


def batches(count: int) -> pd.DataFrame:
    """Full batches of two: a step of 3 s, then two decodes (two chunks each) of 1 s: 2 samples in 5 s."""
    rows: list[tuple[Any, ...]] = []
    for i in range(count):
        start = 5 * i * S
        ids = [f"{2 * i}.0", f"{2 * i + 1}.0"]
        rows.append((0, "denoise", "step", start, start + 3 * S, ";".join(ids), -1))
        for k, name in enumerate(ids):
            begin = start + 3 * S + k * S
            rows.append((0, "decode0", "chunk", begin, begin + S // 2, name, 0))
            rows.append((0, "decode0", "chunk", begin + S // 2, begin + S, name, 1))
    return work_table(rows)


def test_saturation_throughput_by_hand() -> None:
    assert saturation_throughput(batches(10)) == 2 / 5


def test_the_drain_does_not_count() -> None:
    """A last half-empty batch that takes very long changes nothing."""
    tail = [(0, "denoise", "step", 50 * S, 950 * S, "20.0", -1), (0, "decode0", "chunk", 950 * S, 951 * S, "20.0", 1)]
    assert saturation_throughput(pd.concat([batches(10), work_table(tail)], ignore_index=True)) == 2 / 5


@pytest.mark.parametrize("work", [no_work(), batches(2)])
def test_too_short_for_saturation(work: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="fewer than two full batches"):
        saturation_throughput(work)


def test_backlog_by_hand() -> None:
    table = request_table(
        [
            {"arrival_s": 0, "finished_s": 5},
            {"arrival_s": 1, "finished_s": 3},
            {"arrival_s": 3, "status": "rejected"},
            {"arrival_s": 5, "status": "unfinished"},
        ]
    )
    found = backlog(table)
    assert found["time_s"].tolist() == [0.0, 1.0, 3.0, 5.0]
    assert found["in_system"].tolist() == [1, 2, 1, 1]
