"""What goes wrong on hardware: a sample fails alone, a step without memory is retried, a lane that hangs is named."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from policies.registry import POLICIES, build_policy
from real_runner.account import LOST, LaneHung, is_out_of_memory
from real_runner.engine import run_real
from real_runner.hardware import chunking_of, open_hardware
from synerdiff.core import REUSE, InputError, SkipBudget, loras_from
from synerdiff.device.lanes import CpuWork, lane_lost
from synerdiff.diffusion.model import SampleState
from synerdiff.profile.tables import Profile
from tests.builders import requests_at
from tests.faulty import Faults, faulty, watched_chunks
from tests.hardware import digits_hardware, digits_profile

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def hardware() -> Iterator[Any]:
    profile = digits_profile()
    with digits_hardware(profile) as opened:
        for name in profile.chunkings:
            opened.warm_up(profile.row_buckets, chunking_of(profile, name))  # type: ignore[arg-type]
        yield opened


def burst(count: int, steps: int = 3, **more: Any) -> Any:
    """Requests with seeds 0, 1, ... that arrive 2 ms apart."""
    return requests_at(*(2 * i for i in range(count)), steps=steps, guidance_scale=4.0, **more)


def run_with(
    hardware: Any,
    faults: Any,
    requests: Any,
    policy: str = "continuous-parallel",
    profile: Profile | None = None,
    parameters: Any = None,
    **more: Any,
) -> Any:
    with faulty(hardware, faults), watched_chunks():
        return run_real(requests, build_policy(policy, parameters or {}), profile or digits_profile(), hardware, **more)


def statuses(run: Any) -> dict[Any, Any]:
    return {record.request.request_id: record.status for record in run.result.requests}


class LosingLane:
    """Hands on the first pieces; then its lane is lost."""

    def __init__(self, lane: Any, pieces: int) -> None:
        self.lane, self.left = lane, pieces

    def submit(self, function: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            return self.lane.submit(function)
        work: CpuWork[Any] = CpuWork(function, threading.Condition())
        work.run(lane_lost("denoise", RuntimeError("CUDA error: device lost")))
        return work


@pytest.mark.parametrize("lane", ["denoise", "results"])
def test_a_lost_lane_ends_the_run_in_a_sentence_and_what_was_finished_is_kept(lane: str) -> None:
    with digits_hardware() as opened:
        setattr(opened, lane, LosingLane(getattr(opened, lane), 40 if lane == "denoise" else 3))
        opened.warm_up(digits_profile().row_buckets or (), chunking_of(digits_profile(), "whole"))
        getattr(opened, lane).left = 4 if lane == "denoise" else 1
        run = run_real(burst(5), build_policy("continuous-serial", {"batch": 1}), digits_profile(), opened)
        assert opened.hung, "closing would wait for it"
        opened.hung = False
    assert isinstance(run.error, LaneHung)
    assert str(run.error).startswith("lane denoise was lost: CUDA error: device lost; the run was given up")
    assert [fault.kind for fault in run.faults] == [LOST]
    assert statuses(run)[0] == "done"
    assert statuses(run)[4] == "unfinished"


def test_a_step_without_memory_is_retried_in_halves_and_later_steps_are_smaller(hardware: Any) -> None:
    faults, made = Faults(), {}
    faults.largest_rows = 9
    requests = requests_at(*[0] * 10, steps=3, guidance_scale=4.0)
    run = run_with(
        hardware,
        faults,
        requests,
        "static",
        on_image=lambda sample, state, image: made.update({sample.id: state.latent}),
    )
    assert run.error is None
    assert set(statuses(run).values()) == {"done"}
    assert [fault.kind for fault in run.faults] == ["out of memory"]
    assert "a step of 16 rows; at most 8 from now on (CUDA out of memory at 16 rows)" in run.faults[0].detail
    assert len(run.faults[0].samples) == 8
    assert run.max_rows == 8
    steps = [record for record in run.result.work if record.kind == "step"]
    assert steps[0].rows == 16
    assert max(record.rows for record in steps[1:]) == 8
    for sample_id, latent in made.items():
        alone = hardware.model.start(sample_id, 3, 4.0)
        while not alone.done:
            hardware.model.step([alone])
        assert float((latent - alone.latent).abs().max()) < 1e-4


@pytest.mark.parametrize(("largest_rows", "learned"), [(7, 4), (2, 2)])
def test_halves_without_memory_are_halved_again_down_to_one_sample(
    hardware: Any, largest_rows: int, learned: int
) -> None:
    """16 rows, then 8, then 4 (then 2): nothing fails, and later steps have what fitted."""
    faults = Faults()
    faults.largest_rows = largest_rows
    run = run_with(hardware, faults, requests_at(*[0] * 8, steps=2, guidance_scale=4.0), "static")
    assert set(statuses(run).values()) == {"done"}
    assert [fault.kind for fault in run.faults] == ["out of memory"]
    assert f"a step of 16 rows; at most {learned} from now on (CUDA out of memory at 16 rows)" in run.faults[0].detail
    assert run.max_rows == learned
    steps = [record for record in run.result.work if record.kind == "step"]
    assert [record.rows for record in steps[1:]] == [learned] * (16 // learned)


def test_a_sample_that_never_finds_memory_fails_after_one_retry(hardware: Any) -> None:
    faults = Faults()
    faults.never_enough_memory = {1}
    # One sample a step: which samples would share a step that finds no memory is a matter of time.
    run = run_with(hardware, faults, requests_at(0, 1, 2, steps=2, guidance_scale=4.0), parameters={"batch": 1})
    assert statuses(run) == {0: "done", 1: "failed", 2: "done"}
    assert [fault.kind for fault in run.faults] == ["out of memory", "failed"]
    assert run.max_rows == 2, "never below what one sample needs"


@pytest.mark.parametrize("lead_ms", [0, 3])
def test_samples_that_break_fail_alone(hardware: Any, lead_ms: int) -> None:
    faults, made = Faults(), set()
    faults.raises, faults.not_a_number, faults.unprepared = {2}, {4}, {6}
    faults.bad_decode, faults.nan_decode, faults.short_of_memory_once = {8}, {9}, {10}
    run = run_with(
        hardware,
        faults,
        burst(14),
        profile=digits_profile(overheads={"decision_lead": lead_ms * 1_000_000}),
        on_image=lambda sample, state, image: made.add(sample.request.request_id),
    )
    assert run.error is None
    failed = {2, 4, 6, 8, 9}
    assert statuses(run) == {i: "failed" if i in failed else "done" for i in range(14)}
    assert made == set(range(14)) - failed
    reasons = {fault.samples[0]: fault.detail for fault in run.faults if fault.kind == "failed"}
    assert reasons == {
        "2.0": "an adapter of other shapes",
        "4.0": "its latent is not finite",
        "6.0": "the adapter's file is broken",
        "8.0": "a decode that cannot be",
        "9.0": "its decoded image is not finite",
    }
    assert [fault.samples for fault in run.faults if fault.kind == "out of memory"] == [("10.0",)]


def test_one_failed_image_fails_its_request_and_spares_the_others(hardware: Any) -> None:
    faults = Faults()
    faults.bad_decode = {0}
    run = run_with(hardware, faults, burst(2, images=2))
    assert statuses(run) == {0: "failed", 1: "done"}
    assert [fault.samples for fault in run.faults] == [("0.0",)], "its second image has a seed of its own and is made"


@pytest.mark.parametrize("lead_ms", [0, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_no_request_is_lost_under_any_policy(hardware: Any, name: str, lead_ms: int) -> None:
    faults = Faults()
    faults.largest_rows = 11
    faults.raises, faults.not_a_number, faults.unprepared = {3}, {5, 11}, {7}
    faults.bad_decode, faults.nan_decode, faults.short_of_memory_once = {13}, {14}, {15}
    run = run_with(
        hardware,
        faults,
        burst(24, steps=2),
        name,
        digits_profile(overheads={"decision_lead": lead_ms * 1_000_000}),
        budget=SkipBudget(500_000, 1, 1, REUSE),
    )
    assert run.error is None
    failed = {3, 5, 7, 11, 13, 14}
    assert statuses(run) == {i: "failed" if i in failed else "done" for i in range(24)}


def test_nothing_stays_in_memory(hardware: Any) -> None:
    def alive() -> Any:
        gc.collect()
        return sum(type(found) is SampleState for found in gc.get_objects())

    before = alive()
    faults = Faults()
    faults.raises, faults.not_a_number, faults.bad_decode = {20, 21}, {50}, {80, 81}
    during, left = [], []

    def on_image(sample: Any, state: Any, image: Any) -> None:
        left.append(sample.id)
        if sample.id % 20 == 0:
            during.append((alive(), len(left)))

    run = run_with(hardware, faults, burst(120, steps=1), on_image=on_image)
    assert sum(status == "done" for status in statuses(run).values()) == 116
    assert alive() <= before + 2, "the last pieces on the lanes may still hold their samples"
    # How far the intake has got is a matter of time. What has left is gone, but for this one and the last pieces.
    assert len(during) == 4
    assert all(found <= before + 120 - gone + 3 for found, gone in during)
    assert during[-1][0] <= before + 40


def test_a_lane_that_hangs_is_named_and_what_was_finished_is_kept() -> None:
    profile = digits_profile()
    opened = digits_hardware(profile)
    faults = Faults()
    faults.hangs = {2}
    # The predicted chunk time is far below the watchdog's patience here, so that counts.
    with faulty(opened, faults), watched_chunks():
        run = run_real(
            requests_at(0, 1, 400, 401, steps=1, guidance_scale=4.0),
            build_policy("continuous-serial"),
            profile,
            opened,
            watchdog_s=0.05,
        )
        assert isinstance(run.error, LaneHung)
        assert "lane decode0 has been running chunk 0 of a decode for" in str(run.error)
        assert "(samples 2.0)" in str(run.error)
        assert statuses(run) == {0: "done", 1: "done", 2: "unfinished", 3: "unfinished"}
        assert run.faults[-1].kind == "hung lane"
        assert opened.hung
    opened.hung = False  # released by now
    opened.close()


def test_what_cannot_be_run_is_refused_before_the_start(hardware: Any) -> None:
    def refused(match: Any, requests: Any, **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            run_real(requests, build_policy("static"), more.get("profile", digits_profile()), hardware)

    refused("request 0 asks for LoRAs or ControlNets; say where they are", requests_at(0, loras=loras_from(("a",))))
    refused("asks for 2 base models", [*requests_at(0), *requests_at(0, base_model="b")])


def test_the_scheduler_must_make_one_call_a_step() -> None:
    with (
        open_hardware("digits", "cpu", digits_profile(), scheduler="HeunDiscreteScheduler") as heun,
        pytest.raises(InputError, match="makes 3 denoiser calls for 2 steps"),
    ):
        run_real(requests_at(0, steps=2), build_policy("static"), digits_profile(), heun)


def test_a_profile_with_steps_too_large_for_the_device_is_refused() -> None:
    faults = Faults()
    faults.largest_rows = 20
    with (
        digits_hardware() as opened,
        faulty(opened, faults),
        pytest.raises(InputError, match="a step of 24 rows at 32x32, which the profile allows, does not fit"),
    ):
        run_real(requests_at(0), build_policy("static"), digits_profile(), opened)


def test_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert is_out_of_memory(found.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
