"""Lanes on a device: places where one piece of work runs at a time, in order, timed on the host's monotonic clock.

This file holds the interface and the CPU twin (one pinned thread per lane); `cuda` holds streams. An engine
submits to lanes, waits for the first end and asks each `Work` for its times; it never names a thread or a stream.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from synerdiff.core import InputError
from synerdiff.files import free_memory_bytes

T = TypeVar("T")


class LaneLost(RuntimeError):
    """A lane whose device or thread failed outside of a piece: what it is given never ends. The message names it."""


def lane_lost(lane: str, error: BaseException) -> LaneLost:
    """From what torch or the system raised; its first line says why."""
    why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return LaneLost(f"lane {lane} was lost: {why.rstrip('.')}")


class Work(ABC, Generic[T]):
    """One submitted piece. It keeps what its function refers to alive until it has ended."""

    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended (or failed); never blocks."""

    @abstractmethod
    def result(self) -> T:
        """Wait for the end and return what the function returned, or raise what it raised; LaneLost if none comes."""

    @property
    @abstractmethod
    def start_ns(self) -> int:
        """When it began, on `time.monotonic_ns`; valid once done."""

    @property
    @abstractmethod
    def end_ns(self) -> int:
        """When it ended, on `time.monotonic_ns`; valid once done."""


class Lane(ABC):
    """Runs submitted functions one after another."""

    name: str

    @abstractmethod
    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Queue `function` behind what was submitted before; returns at once."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what was submitted and free the lane."""


class Device(ABC):
    """A place with lanes. Use as a context manager: leaving closes the lanes."""

    torch_device: torch.device

    def __init__(self) -> None:
        self._lanes: list[Lane] = []

    @abstractmethod
    def lane(
        self, name: str, *, high_priority: bool = False, core: int | None = None, launch_thread: bool = False
    ) -> Lane:
        """Open a lane. `high_priority` is a hint for streams, `core` the processor that a CPU lane is pinned to;
        `launch_thread`: a stream's launches get a thread of their own, as a CPU lane's always have."""

    @abstractmethod
    def wait_any(self, works: Sequence[Work[object]], until_ns: int | None = None) -> None:
        """Return when one of the works is done or `time.monotonic_ns` reaches `until_ns`, whichever is first."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything submitted to the device has ended."""

    def align_clocks(self) -> None:  # noqa: B027 - a device whose lanes read the host's own clock has nothing to do
        """Wait until the device is idle and set its clock by the host's: before a run, because the two drift apart."""

    def close(self) -> None:
        """Wait for what was submitted and close all lanes."""
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_device(name: str | torch.device) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as torch names it. Raises InputError, one sentence, when there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"There is no device {name}; use cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"There is no support for device {name}; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"Device {name} was asked for, but this machine has no usable CUDA GPU.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"Device {name} was asked for, but this machine has {torch.cuda.device_count()} CUDA GPUs.")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory_bytes()


class CpuWork(Work[T]):
    """Work of a thread."""

    def __init__(self, function: Callable[[], T], ended: threading.Condition) -> None:
        self._function: Callable[[], T] | None = function
        self._ended = ended
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._done = False
        self._start_ns = self._end_ns = 0

    def run(self, lost: LaneLost | None = None) -> None:
        """Call the function on this thread, unless its lane is ``lost``, and wake who waits."""
        function = self._function
        assert function is not None
        self._start_ns = time.monotonic_ns()
        try:
            if lost is not None:
                raise lost
            self._value.append(function())
        except BaseException as error:  # what a function raises belongs to whoever asks for the result
            self._error = error
        self._end_ns = time.monotonic_ns()
        self._function = None
        with self._ended:
            self._done = True
            self._ended.notify_all()

    def done(self) -> bool:
        return self._done

    def result(self) -> T:
        with self._ended:
            self._ended.wait_for(self.done)
        if self._error is not None:
            raise self._error
        return self._value[0]

    @property
    def start_ns(self) -> int:
        return self._known(self._start_ns)

    @property
    def end_ns(self) -> int:
        return self._known(self._end_ns)

    def _known(self, at_ns: int) -> int:
        if isinstance(self._error, LaneLost):
            raise self._error
        return at_ns


class CpuLane(Lane):
    """One thread with one intra-op thread, pinned to `core` where the system allows it."""

    def __init__(self, name: str, core: int | None, ended: threading.Condition) -> None:
        self.name = name
        self._core, self._ended = core, ended
        self._queue: queue.SimpleQueue[CpuWork[object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"lane {name}", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Work[T]:
        work = CpuWork(function, self._ended)
        self._queue.put(work)  # type: ignore[arg-type]
        return work

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        lost = None
        try:
            # With OpenMP the number of intra-op threads belongs to the calling thread, so each lane sets its own.
            torch.set_num_threads(1)
            if self._core is not None and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {self._core})
        except (OSError, RuntimeError) as error:  # a core that was taken away since: who waits must learn of it
            lost = lane_lost(self.name, error)
        while (work := self._queue.get()) is not None:
            work.run(lost)


class CpuDevice(Device):
    """The CPU twin of a GPU: lanes are threads that compete for memory bandwidth and caches, as streams do."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = torch.device("cpu")
        self._ended = threading.Condition()

    def lane(
        self, name: str, *, high_priority: bool = False, core: int | None = None, launch_thread: bool = False
    ) -> CpuLane:
        """Raises InputError when this process may not use `core`."""
        if core is not None and core not in available_cores():
            raise InputError(f"Lane {name} cannot be pinned to core {core}; usable cores: {available_cores()}.")
        lane = CpuLane(name, core, self._ended)
        self._lanes.append(lane)
        return lane

    def wait_any(self, works: Sequence[Work[object]], until_ns: int | None = None) -> None:
        timeout_s = None if until_ns is None else max(0.0, (until_ns - time.monotonic_ns()) / 1e9)
        with self._ended:
            self._ended.wait_for(lambda: any(work.done() for work in works), timeout_s)

    def synchronize(self) -> None:
        for work in [lane.submit(lambda: None) for lane in self._lanes]:
            work.result()


def available_cores() -> list[int]:
    """Processors that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
