"""Messages between two processes over torch.distributed: numbers, text and tensors. Nothing is unpickled.

Each link is a process group of its own with two members, so that a process that dies breaks its own links and no
other. Between CPUs a message is one buffer over gloo; between GPUs its tensors go over NCCL.

Each end always has a receive posted, so gloo writes a message at once, in the thread that sends it. A receive that is
posted only when its message has been announced costs a round trip through gloo's own threads, which on a busy machine
have to wait for a core, and which spin for a scheduler's tick when the thread that holds their lock has lost its own.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_distributed

from synerdiff.core import NS_PER_S

dist: Any = torch_distributed
"""Its parts for single process groups are not typed."""

FIRST_BYTES = 1 << 20
"""What the posted receive takes; the rest of a longer message follows as a second one."""
_HEADER_BYTES = 64
_MAGIC = 0x53594E46
_FOREVER = timedelta(days=3650)
_ALIGN = 64
"""As torch aligns its own memory: the same numbers at another alignment may be rounded differently."""
_TAG_FIRST, _TAG_REST, _TAG_DATA = 1, 2, 3
_POLL_S = 20e-6
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)
}


class Op(IntEnum):
    """What a message asks for, or answers."""

    DONE = 1
    FAILED = 2
    """With ``reason``: what was asked for cannot be done; the process lives on."""
    STOP = 3
    READ = 10
    MERGE = 20
    RESTORE = 21
    STEP = 22
    CONTROL = 30


class Message(NamedTuple):
    """``fields``: what JSON can say; ``tensors`` are views into one buffer, on the link's device."""

    op: Op
    fields: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class LinkLost(RuntimeError):
    """The process at the other end is gone, or did not answer in time."""


class Link:
    """One end of a link; ``side`` is 0 at one end and 1 at the other. Opening waits until both ends are there.

    Each of `send` and `receive` belongs to one thread.
    """

    def __init__(
        self,
        store: Any,
        name: str,
        peer: str,
        side: int,
        device: torch.device,
        *,
        one_machine: bool,
        timeout_s: float,
    ) -> None:
        self.peer = peer
        self._device = device
        self._other = 1 - side
        self._lost = ""
        timeout = timedelta(seconds=timeout_s)
        try:
            self._group = _gloo(dist.PrefixStore(f"{name}/gloo", store), side, timeout, one_machine)
            self._gpu = None
            if device.type == "cuda":
                self._gpu = _GpuData(store, name, side, timeout, device)
        except RuntimeError as error:
            raise LinkLost(f"{peer} did not come up within {timeout_s:g} s ({_first(error)})") from None
        self._received = self._dropped = 0
        """Messages received, and sent ones that are no longer in ``_on_the_way``."""
        self._on_the_way: deque[list[tuple[Any, torch.Tensor]]] = deque()
        """What gloo may still be sending: per message its parts, until the other end says that it has it."""
        self._first = torch.empty(FIRST_BYTES, dtype=torch.uint8)
        self._posted = self._post()

    def send(
        self, op: Op, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Send one message, without waiting until it has arrived; its tensors may be overwritten. Raises LinkLost."""
        if self._lost:
            raise LinkLost(f"{self.peer} is gone ({self._lost})")
        tensors = tensors or {}
        shapes = [[name, _name(t.dtype), list(t.shape)] for name, t in tensors.items()]
        text = json.dumps([fields or {}, shapes], separators=(",", ":")).encode()
        places, data_bytes = _places(shapes)
        start = _aligned(_HEADER_BYTES + len(text))
        message = torch.empty(start + (0 if self._gpu else data_bytes), dtype=torch.uint8)
        header = [_MAGIC, int(op), len(text), data_bytes, self._received]
        message[: 8 * len(header)] = torch.tensor(header, dtype=torch.int64).view(torch.uint8)
        message[_HEADER_BYTES : _HEADER_BYTES + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts = [(message[:FIRST_BYTES], _TAG_FIRST)]
        if len(message) > FIRST_BYTES:
            parts.append((message[FIRST_BYTES:], _TAG_REST))
        data = message[start:]
        if self._gpu is not None:
            data = torch.empty(data_bytes, dtype=torch.uint8, device=self._device)
        _pack(data, places, tensors)
        try:
            self._on_the_way.append([(self._group.send([part], self._other, tag), part) for part, tag in parts])
            if self._gpu is not None and data_bytes:
                self._gpu.send(data)
        except RuntimeError as error:
            raise self._gone(error) from None

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. Raises LinkLost when the other end is gone, or nothing came for ``timeout_s``."""
        if self._lost:
            raise LinkLost(f"{self.peer} is gone ({self._lost})")
        until_ns = None if timeout_s is None else time.monotonic_ns() + round(timeout_s * NS_PER_S)
        try:
            _wait(self._posted, until_ns)
            magic, op, text_bytes, data_bytes, arrived = self._first[:40].view(torch.int64).tolist()
            if magic != _MAGIC or text_bytes < 0 or data_bytes < 0:
                raise RuntimeError("a message that is none of ours")
            start = _aligned(_HEADER_BYTES + text_bytes)
            message = torch.empty(start + (0 if self._gpu else data_bytes), dtype=torch.uint8)
            message[:FIRST_BYTES] = self._first[: len(message)]
            if len(message) > FIRST_BYTES:
                _wait(self._group.recv([message[FIRST_BYTES:]], self._other, _TAG_REST), until_ns)
            self._posted = self._post()
            data = message[start:] if self._gpu is None else self._gpu.receive(data_bytes, until_ns)
        except TimeoutError:
            self._lost = f"no answer for {timeout_s:g} s"
            raise LinkLost(f"{self.peer} does not answer: {self._lost}") from None
        except RuntimeError as error:
            raise self._gone(error) from None
        self._received += 1
        self._drop(arrived)
        fields, shapes = json.loads(message[_HEADER_BYTES : _HEADER_BYTES + text_bytes].numpy().tobytes())
        return Message(Op(op), fields, _unpack(data, shapes))

    def ask(
        self,
        op: Op,
        fields: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        timeout_s: float,
    ) -> Message:
        """Send and wait for the answer."""
        self.send(op, fields, tensors)
        return self.receive(timeout_s)

    def _post(self) -> Any:
        return self._group.recv([self._first], self._other, _TAG_FIRST)

    def _drop(self, arrived: int) -> None:
        """Let go of the first ``arrived`` messages, which the other end has."""
        while self._dropped < arrived:
            for work, _ in self._on_the_way.popleft():
                with suppress(RuntimeError):  # it has arrived; what has happened since is for the next message to say
                    work.wait(_FOREVER)
            self._dropped += 1

    def _gone(self, error: RuntimeError) -> LinkLost:
        self._lost = _first(error)
        return LinkLost(f"{self.peer} is gone ({self._lost})")


class _GpuData:
    """Tensors between two GPUs, on streams of their own: no forward waits until a message has been taken in.

    One group per direction, so that a send never waits for a receive that was posted before it.
    """

    def __init__(self, store: Any, name: str, side: int, timeout: timedelta, device: torch.device) -> None:
        self._device, self._other = device, 1 - side
        groups = [_nccl(dist.PrefixStore(f"{name}/{way}", store), side, timeout) for way in (0, 1)]
        self._out, self._in = groups[side], groups[self._other]
        self._sending, self._receiving = _stream(device), _stream(device)

    def send(self, data: torch.Tensor) -> None:
        """Once the current stream has made it."""
        self._sending.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._sending):
            self._out.send([data], self._other, _TAG_DATA).wait()
        data.record_stream(self._sending)

    def receive(self, size: int, until_ns: int | None) -> torch.Tensor:
        """So many bytes, when they are there."""
        if not size:
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        with torch.cuda.stream(self._receiving):
            data = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._in.recv([data], self._other, _TAG_DATA).wait()
            arrived = self._receiving.record_event()
        while not arrived.query():
            if until_ns is not None and time.monotonic_ns() > until_ns:
                raise TimeoutError
            time.sleep(_POLL_S)
        data.record_stream(torch.cuda.current_stream(self._device))
        return data


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _wait(work: Any, until_ns: int | None) -> None:
    """Raises TimeoutError, or torch's RuntimeError when the other end is gone."""
    left_s = None if until_ns is None else max(0.001, (until_ns - time.monotonic_ns()) / NS_PER_S)
    try:
        work.wait(_FOREVER if left_s is None else timedelta(seconds=left_s))
    except RuntimeError:
        if until_ns is not None and time.monotonic_ns() >= until_ns:
            raise TimeoutError from None
        raise


def _gloo(store: Any, side: int, timeout: timedelta, one_machine: bool) -> Any:
    """On one machine only its own processes can connect."""
    make = dist.ProcessGroupGloo
    options = make._Options()
    device = make.create_device(hostname="127.0.0.1") if one_machine else make.create_default_device()
    options._devices = [device]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, side, 2, options)


def _nccl(store: Any, side: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, side, 2, options)


Place = tuple[str, torch.dtype, list[int], int, int]
"""A tensor's name, dtype and shape, and where its bytes begin and end."""


def _places(shapes: Sequence[Sequence[Any]]) -> tuple[list[Place], int]:
    """Where tensors lie in one buffer, each at a multiple of _ALIGN bytes, and how many bytes they take."""
    places: list[Place] = []
    start = end = 0
    for name, kind, shape in shapes:
        dtype = _DTYPES[kind]
        end = start + dtype.itemsize * prod(shape)
        places.append((str(name), dtype, shape, start, end))
        start = _aligned(end)
    return places, end


def _pack(data: torch.Tensor, places: Sequence[Place], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, dtype, shape, start, end in places:
        data[start:end].view(dtype).view(shape).copy_(tensors[name].detach())


def _unpack(data: torch.Tensor, shapes: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """The tensors, as views."""
    return {name: data[start:end].view(dtype).view(shape) for name, dtype, shape, start, end in _places(shapes)[0]}


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(error: BaseException) -> str:
    """The first sentence of an error of torch's, without the place in its source."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if text.startswith("["):
        text = text.partition("] ")[2]
    return text.partition(". ")[0][:200].rstrip(". ")
