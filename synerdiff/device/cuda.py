"""Lanes as CUDA streams: launches return at once, ends are seen by polling events, times come from the events.

Not yet run on a GPU; written to torch's documentation of streams, events and the caching allocator.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from synerdiff.device.lanes import Device, Lane, LaneLost, Work, lane_lost

T = TypeVar("T")

ANCHOR_AGE_NS = 2_000_000_000
POLL_S = 20e-6
CLOSE_NS = 50_000
"""An alignment of the clocks is good when the host's clock was read so shortly before and after the event."""
ALIGNMENTS = 3


def timing_event() -> torch.cuda.Event:
    """An event whose time can be asked for."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class EventClock:
    """Turns CUDA events into host nanoseconds.

    elapsed_time is a float32 of milliseconds, so its resolution fades with distance (4 us after a minute), and a GPU's
    clock drifts against the host's by some parts per million. So every two seconds of a run the anchor moves to a new
    event on a stream of its own, which waits for nothing that runs, between two looks at the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self.alignments = 0
        """How often the clocks have been set by each other."""
        self.anchor()

    def anchor(self) -> None:
        """Wait for the device and start again from the host's clock."""
        torch.cuda.synchronize(self._device)
        with self._lock:
            self._align()

    def host_ns(self, event: torch.cuda.Event) -> int:
        """When a completed event happened, on `time.monotonic_ns`."""
        with self._lock:
            at_ns = self._anchor_ns + int(float(self._anchor.elapsed_time(event)) * 1e6)
            if at_ns - self._anchor_ns > ANCHOR_AGE_NS:
                self._align()
                return self._anchor_ns + int(float(self._anchor.elapsed_time(event)) * 1e6)
            return at_ns

    def _align(self) -> None:
        """A new anchor: of a few tries the one that the host's clock brackets most closely, in the middle of that."""
        closest_ns = None
        for _ in range(ALIGNMENTS):
            event = timing_event()
            before_ns = time.monotonic_ns()
            event.record(self._stream)
            event.synchronize()
            after_ns = time.monotonic_ns()
            if closest_ns is None or after_ns - before_ns < closest_ns:
                closest_ns = after_ns - before_ns
                self._anchor, self._anchor_ns = event, (before_ns + after_ns) // 2
            if closest_ns <= CLOSE_NS:
                break
        self.alignments += 1


class CudaWork(Work[T]):
    """Work between two events of a stream. Once its lane is lost it counts as done, and whoever asks learns of it."""

    def __init__(self, function: Callable[[], T], device: torch.device, clock: EventClock, lane: str) -> None:
        self._function: Callable[[], T] | None = function
        self._lane, self._lost = lane, False
        self._clock = clock
        # Streams do not wait for the stream on which a sample's noise or prompt was prepared; this event does.
        self._ready = torch.cuda.current_stream(device).record_event()
        self._start = timing_event()
        self._end = timing_event()
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._launched = threading.Event()

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Enqueue on `stream`; called by one thread only."""
        assert self._function is not None
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(self._ready)
                self._start.record(stream)
                try:
                    self._value.append(self._function())
                except BaseException as error:  # out of memory, for one, belongs to whoever asks for the result
                    self._error = error
                self._end.record(stream)
        except BaseException as error:  # of the device: whoever waits would otherwise never learn of it
            self.lose(error)
        finally:
            self._launched.set()

    def lose(self, error: BaseException) -> LaneLost:
        """Its device or its launching thread failed."""
        lost = error if isinstance(error, LaneLost) else lane_lost(self._lane, error)
        self._error, self._lost = lost, True
        self._launched.set()
        return lost

    def done(self) -> bool:
        if not self._launched.is_set() or self._lost:
            return self._lost
        try:
            return bool(self._end.query())  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self.lose(error)
            return True

    def release(self) -> None:
        """Let go of the function's tensors; safe only once done, since another stream allocated some of them."""
        self._function = None

    def result(self) -> T:
        self._launched.wait()
        if not self._lost:
            try:
                self._end.synchronize()
            except RuntimeError as error:
                self.lose(error)
        if self._error is not None:
            raise self._error
        return self._value[0]

    @property
    def start_ns(self) -> int:
        return self._host_ns(self._start)

    @property
    def end_ns(self) -> int:
        return self._host_ns(self._end)

    def _host_ns(self, event: torch.cuda.Event) -> int:
        if self._lost:
            assert self._error is not None
            raise self._error
        try:
            return self._clock.host_ns(event)
        except RuntimeError as error:
            raise self.lose(error) from error


class CudaLane(Lane):
    """One stream. With `launch_thread` a thread of its own launches, so that eager work of one lane does not delay
    another's launches; captured graphs launch in microseconds and need none.
    """

    def __init__(
        self, name: str, device: torch.device, clock: EventClock, high_priority: bool, launch_thread: bool
    ) -> None:
        self.name = name
        # A lower number is a higher priority; the driver takes it as a hint and never preempts a running kernel.
        self.stream = torch.cuda.Stream(device, priority=-1 if high_priority else 0)  # type: ignore[no-untyped-call]
        self._device, self._clock = device, clock
        # Graphs of one lane never replay at the same time, so they can share their memory; those of two lanes could.
        self.graph_pool: Any = torch.cuda.graph_pool_handle()
        # Tensors made on another stream must outlive this stream's reads of them: the allocator knows only the
        # stream that made them. Each piece therefore keeps its function until its end event has been seen.
        self._unfinished: deque[CudaWork[object]] = deque()
        self._queue: queue.SimpleQueue[CudaWork[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if launch_thread:
            self._thread = threading.Thread(target=self._run, name=f"lane {name}", daemon=True)
            self._thread.start()

    def submit(self, function: Callable[[], T]) -> Work[T]:
        while self._unfinished and self._unfinished[0].done():
            self._unfinished.popleft().release()
        try:
            work = CudaWork(function, self._device, self._clock, self.name)
        except RuntimeError as error:
            raise lane_lost(self.name, error) from error
        self._unfinished.append(work)  # type: ignore[arg-type]
        if self._thread is None:
            work.launch(self.stream)
        else:
            self._queue.put(work)  # type: ignore[arg-type]
        return work

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self.stream.synchronize()
        self._unfinished.clear()

    def _run(self) -> None:
        lost = None
        try:
            torch.cuda.set_device(self._device)
        except RuntimeError as error:
            lost = lane_lost(self.name, error)
        while (work := self._queue.get()) is not None:
            if lost is None:
                work.launch(self.stream)
            else:
                work.lose(lost)


class CudaDevice(Device):
    """One GPU; made by `open_device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.torch_device = device
        torch.cuda.set_device(self.torch_device)
        self._clock = EventClock(self.torch_device)

    def lane(
        self, name: str, *, high_priority: bool = False, core: int | None = None, launch_thread: bool = False
    ) -> CudaLane:
        lane = CudaLane(name, self.torch_device, self._clock, high_priority, launch_thread)
        self._lanes.append(lane)
        return lane

    def wait_any(self, works: Sequence[Work[object]], until_ns: int | None = None) -> None:
        # Events offer no wait for the first of several; a short sleep keeps the interpreter free for launches.
        while not any(work.done() for work in works):
            if until_ns is not None and time.monotonic_ns() >= until_ns:
                return
            time.sleep(POLL_S)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def align_clocks(self) -> None:
        self._clock.anchor()
