"""Lanes whose device or thread fails outside of a piece, and the clock of events, with stand-ins for CUDA."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from synerdiff.device import cuda
from synerdiff.device.cuda import CudaLane, EventClock
from synerdiff.device.lanes import CpuLane, LaneLost

DRIFT = 1.001
"""The stand-in's clock runs so much faster than the host's."""


class Gpu:
    """Events on a clock of its own, whatever is queued; ``broken`` is what every call then raises."""

    def __init__(self) -> None:
        self.broken: str | None = None
        self.host_ns = 1_000_000_000

    def check(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)

    def event(self) -> Any:
        made = SimpleNamespace(at_ms=0.0)

        def record(stream: Any) -> None:
            self.check()
            made.at_ms = self.host_ns * DRIFT / 1e6

        def query() -> bool:
            self.check()
            return True

        made.record, made.query, made.synchronize = record, query, self.check
        made.elapsed_time = lambda other: other.at_ms - made.at_ms
        return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    def stream(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(wait_event=lambda event: device.check(), synchronize=device.check)

    def current_stream(*_: Any) -> Any:
        return SimpleNamespace(record_event=device.check)

    monkeypatch.setattr(cuda, "timing_event", device.event)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: ())
    return device


@pytest.mark.parametrize("launch_thread", [False, True])
def test_a_launch_that_raises_is_told_to_whoever_waits_and_the_thread_goes_on(gpu: Gpu, launch_thread: bool) -> None:
    place = torch.device("cpu")
    lane = CudaLane("denoise", place, EventClock(place), True, launch_thread)
    assert lane.submit(lambda: 7).result() == 7

    def breaks() -> None:
        gpu.broken = "CUDA error: device lost"

    for work in (lane.submit(breaks),):
        with pytest.raises(LaneLost, match=r"lane denoise was lost: CUDA error: device lost$"):
            work.result()
        assert work.done()
        with pytest.raises(LaneLost):
            _ = work.end_ns
    with pytest.raises(LaneLost, match="lane denoise was lost"):
        lane.submit(lambda: 1)
    gpu.broken = None
    assert lane.submit(lambda: 8).result() == 8, "the launching thread lives"
    lane.close()


def test_a_fault_of_a_kernel_shows_when_its_event_is_asked(gpu: Gpu) -> None:
    place = torch.device("cpu")
    lane = CudaLane("decode0", place, EventClock(place), False, False)
    work = lane.submit(lambda: 1)
    gpu.broken = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"
    assert work.done(), "waiting for it would never end"
    with pytest.raises(LaneLost, match=r"lane decode0 was lost: CUDA error: an illegal memory access was encountered$"):
        work.result()


def test_clocks_are_set_by_each_other_again_every_two_seconds(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a minute a clock that runs 0.1% fast would be 60 ms off; it stays within 0.1% of two seconds."""
    monkeypatch.setattr(time, "monotonic_ns", lambda: gpu.host_ns)
    clock = EventClock(torch.device("cpu"))
    assert clock.alignments == 1
    worst_ns = 0
    for _ in range(600):
        gpu.host_ns += 100_000_000
        event = gpu.event()
        event.record(None)
        worst_ns = max(worst_ns, abs(clock.host_ns(event) - gpu.host_ns))
    assert 20 <= clock.alignments <= 32
    assert worst_ns <= 2_100_000


def test_a_core_that_was_taken_away_is_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refused, raising=False)
    lane = CpuLane("denoise", 0, threading.Condition())
    work = lane.submit(lambda: 1)
    with pytest.raises(LaneLost, match=r"lane denoise was lost: .*Invalid argument"):
        work.result()
    with pytest.raises(LaneLost):
        _ = work.start_ns
    lane.close()
