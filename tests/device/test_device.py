"""Lanes: order, overlap, errors and clocks on a CPU; streams and graphs where there is a GPU."""

import os
import threading
import time
from itertools import pairwise

import pytest
import torch

from synerdiff.core import GUIDED, REUSE, InputError
from synerdiff.device import open_device
from synerdiff.device.lanes import available_cores, free_bytes
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.decoder import Chunking

torch.set_num_threads(1)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


def test_a_lane_runs_in_order_and_its_times_do_not_overlap() -> None:
    seen = []
    with open_device("cpu") as device:
        lane = device.lane("denoise", high_priority=True, core=available_cores()[0])
        before_ns = time.monotonic_ns()
        works = [lane.submit(lambda i=i: (seen.append(i), time.sleep(0.002), i)[-1]) for i in range(5)]  # type: ignore[func-returns-value, misc]
        assert [work.result() for work in works] == list(range(5))
    assert seen == list(range(5))
    assert before_ns <= works[0].start_ns
    for one, following in pairwise(works):
        assert one.end_ns - one.start_ns >= 2_000_000
        assert one.end_ns <= following.start_ns


def test_two_lanes_run_at_the_same_time() -> None:
    with open_device("cpu") as device:
        meeting = threading.Barrier(2)
        works = [device.lane(name).submit(lambda: meeting.wait(timeout=20)) for name in ("denoise", "decode0")]
        assert sorted(work.result() for work in works) == [0, 1]


def test_waiting_ends_with_the_first_piece_or_the_time() -> None:
    with open_device("cpu") as device:
        release = threading.Event()
        slow, quick = device.lane("denoise").submit(release.wait), device.lane("decode0").submit(lambda: 7)
        device.wait_any([slow, quick])  # type: ignore[list-item]
        assert quick.done()
        assert not slow.done()
        until_ns = time.monotonic_ns() + 5_000_000
        device.wait_any([slow], until_ns)  # type: ignore[list-item]
        assert time.monotonic_ns() >= until_ns
        assert not slow.done()
        release.set()
        device.synchronize()
        assert slow.done()


def test_an_error_reaches_whoever_asks_and_the_lane_goes_on() -> None:
    def fail() -> None:
        raise MemoryError("full")

    with open_device("cpu") as device:
        lane = device.lane("denoise")
        broken, fine = lane.submit(fail), lane.submit(lambda: 1)
        assert fine.result() == 1
        assert broken.done()
        with pytest.raises(MemoryError, match="full"):
            broken.result()


def test_each_lane_has_one_thread_and_its_core() -> None:
    import os

    with open_device("cpu") as device:
        core = available_cores()[-1]
        lane = device.lane("decode0", core=core)
        assert lane.submit(torch.get_num_threads).result() == 1
        if hasattr(os, "sched_getaffinity"):
            assert lane.submit(lambda: os.sched_getaffinity(0)).result() == {core}
            assert set(available_cores()) >= {core}


def test_devices_and_cores_that_are_not_there() -> None:
    with pytest.raises(InputError, match="no device nonsense"):
        open_device("nonsense")
    with pytest.raises(InputError, match="no support for device meta"):
        open_device("meta")
    with open_device("cpu") as device, pytest.raises(InputError, match="cannot be pinned to core 99999"):
        device.lane("denoise", core=99_999)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no usable CUDA GPU"):
            open_device("cuda")


def test_steps_and_chunks_on_two_lanes_give_the_results_of_one() -> None:
    model = load_model("digits")
    finished = model.start(1, 2, 4.0)
    expected_image = model.decode(finished.latent)
    alone = [model.start(seed, 6, 4.0) for seed in (2, 3)]
    while not alone[0].done:
        model.step(alone)
    together = [model.start(seed, 6, 4.0) for seed in (2, 3)]
    with open_device("cpu") as device:
        denoise, decode = device.lane("denoise"), device.lane("decode0")
        hidden = finished.latent
        for chunk in model.chunks(Chunking("c6", (2, 4, 6, 8, 10))):
            step = denoise.submit(lambda: model.step(together))
            piece = decode.submit(lambda chunk=chunk, hidden=hidden: chunk(hidden))  # type: ignore[misc]
            hidden = piece.result()
            assert step.result() == 4
    assert torch.equal(hidden, expected_image)
    for one, other in zip(alone, together, strict=True):
        assert float((one.latent - other.latent).abs().max()) < 1e-5


@pytest.mark.gpu
@needs_gpu
def test_graphs_equal_eager_steps_and_chunks() -> None:
    from synerdiff.diffusion.stages import capture_chunks, capture_denoiser

    eager, graphed = (load_model("digits", "cuda", torch.float32) for _ in range(2))
    with open_device("cuda") as device:
        denoise, decode = device.lane("denoise", high_priority=True), device.lane("decode0")
        capture_denoiser(graphed, (1, 2, 4, 8), denoise.stream)  # type: ignore[attr-defined]
        cut = Chunking("c3", (4, 9))
        chunks = capture_chunks(graphed, cut, decode.stream)  # type: ignore[attr-defined]
        ends = []
        for model in (eager, graphed):
            states = [model.start(seed, 6, 4.0) for seed in (1, 2, 3)]
            denoise.submit(lambda model=model, states=states: model.step(states)).result()  # type: ignore[misc]
            modes = [GUIDED, REUSE, GUIDED]
            while not states[0].done:
                denoise.submit(lambda model=model, states=states, modes=modes: model.step(states, modes)).result()  # type: ignore[misc]
            ends.append(states)
        for one, other in zip(*ends, strict=True):
            assert float((one.latent - other.latent).abs().max()) < 1e-3
        hidden = ends[0][0].latent
        for chunk in chunks:
            hidden = decode.submit(lambda chunk=chunk, hidden=hidden: chunk(hidden)).result()  # type: ignore[misc]
        assert float((hidden - eager.decode(ends[0][0].latent)).abs().max()) < 1e-3


@pytest.mark.gpu
@needs_gpu
def test_stream_times_are_ordered_and_on_the_host_clock() -> None:
    with open_device("cuda") as device:
        lane = device.lane("denoise", high_priority=True)
        data = torch.randn(2048, 2048, device="cuda")
        before_ns = time.monotonic_ns()
        works = [lane.submit(lambda: data @ data) for _ in range(4)]
        device.wait_any([works[-1]])  # type: ignore[list-item]
        device.synchronize()
        after_ns = time.monotonic_ns()
        for one, following in pairwise(works):
            assert one.done()
            assert one.start_ns <= one.end_ns <= following.start_ns + 1000
        assert before_ns - 100_000 <= works[0].start_ns
        assert works[-1].end_ns <= after_ns + 100_000


@pytest.mark.gpu
@needs_gpu
def test_out_of_memory_is_the_works_error_and_not_the_lanes() -> None:
    with open_device("cuda") as device:
        lane = device.lane("denoise")
        broken = lane.submit(lambda: torch.empty(1 << 50, device="cuda"))
        assert lane.submit(lambda: 1).result() == 1
        with pytest.raises(torch.cuda.OutOfMemoryError):
            broken.result()


def test_free_memory_of_a_cpu_is_part_of_all_of_it() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
