"""Messages between two processes over torch.distributed: a header of fixed size, then tensors. Nothing is unpickled.

Each link is a process group of its own with two members, so that a process that dies breaks its own links and no
other. Headers go over gloo; tensors too between CPUs, over NCCL between GPUs.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_distributed

dist: Any = torch_distributed
"""Its parts for single process groups are not typed."""

HEADER_BYTES = 4096
_MAGIC = 0x53594E45
_FOREVER = timedelta(days=3650)
_ALIGN = 64
"""As torch aligns its own memory: the same numbers at another alignment may be rounded differently."""
_TAG_HEADER, _TAG_TEXT, _TAG_DATA = 1, 2, 3
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

    Messages that arrive are taken in by a thread of the link's own, so that a transfer goes on while its receiver
    computes. Each of `send` and `receive` belongs to one thread.
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
        send_timeout_s: float,
    ) -> None:
        self.peer = peer
        self.send_timeout_s = send_timeout_s
        """How long a message may take to be taken in by the other end."""
        self._device = device
        self._other = 1 - side
        self._lost = ""
        self._arrived: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        timeout = timedelta(seconds=timeout_s)
        try:
            self._headers = _gloo(dist.PrefixStore(f"{name}/headers", store), side, timeout, one_machine)
            self._out = self._in = self._headers
            if device.type == "cuda":
                # One group per direction, so that a send never waits for a receive that was posted before it.
                groups = [_nccl(dist.PrefixStore(f"{name}/{way}", store), side, timeout) for way in (0, 1)]
                self._out, self._in = groups[side], groups[self._other]
        except RuntimeError as error:
            raise LinkLost(f"{peer} did not come up within {timeout_s:g} s ({_first(error)})") from None
        self._thread = threading.Thread(target=self._take_in, name=f"from {peer}", daemon=True)
        self._thread.start()

    def send(
        self, op: Op, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Send one message; returns when its tensors may be overwritten. Raises LinkLost."""
        if self._lost:
            raise LinkLost(f"{self.peer} is gone ({self._lost})")
        data = _flat(tensors or {}, self._device)
        shapes = [[name, _name(t.dtype), list(t.shape)] for name, t in (tensors or {}).items()]
        text = json.dumps([fields or {}, shapes], separators=(",", ":")).encode()
        header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        header[:32] = torch.tensor([_MAGIC, int(op), len(text), len(data)], dtype=torch.int64).view(torch.uint8)
        fits = len(text) <= HEADER_BYTES - 32
        if fits:
            header[32 : 32 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        try:
            works = [self._headers.send([header], self._other, _TAG_HEADER)]
            if not fits:
                long_text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
                works.append(self._headers.send([long_text], self._other, _TAG_TEXT))
            if len(data):
                works.append(self._out.send([data], self._other, _TAG_DATA))
            for work in works:
                work.wait(timedelta(seconds=self.send_timeout_s))
        except RuntimeError as error:
            self._lost = _first(error)
            raise LinkLost(f"{self.peer} is gone ({self._lost})") from None

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. Raises LinkLost when the other end is gone, or nothing came for ``timeout_s``."""
        try:
            message = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            self._lost = f"no answer for {timeout_s:g} s"
            raise LinkLost(f"{self.peer} does not answer: {self._lost}") from None
        if message is None:
            self._arrived.put(None)
            raise LinkLost(f"{self.peer} is gone ({self._lost})")
        if self._device.type == "cuda":
            for tensor in message.tensors.values():
                tensor.record_stream(torch.cuda.current_stream())
        return message

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

    def join(self, timeout_s: float) -> None:
        """Wait until the other end is gone: a thread that is still inside torch would abort this process's end."""
        self._thread.join(timeout_s)

    def _take_in(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while True:
                self._arrived.put(self._next())
        except Exception as error:  # whatever it is, nothing can be received any more
            self._lost = self._lost or _first(error)
            self._arrived.put(None)

    def _next(self) -> Message:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._headers.recv([header], self._other, _TAG_HEADER).wait(_FOREVER)
        magic, op, text_bytes, data_bytes = header[:32].view(torch.int64).tolist()
        if magic != _MAGIC or text_bytes < 0 or data_bytes < 0:
            raise RuntimeError("a message that is none of ours")
        if text_bytes <= HEADER_BYTES - 32:
            text = header[32 : 32 + text_bytes]
        else:
            text = torch.empty(text_bytes, dtype=torch.uint8)
            self._headers.recv([text], self._other, _TAG_TEXT).wait(_FOREVER)
        data = torch.empty(data_bytes, dtype=torch.uint8, device=self._device)
        if data_bytes:
            self._in.recv([data], self._other, _TAG_DATA).wait(_FOREVER)
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        fields, shapes = json.loads(text.numpy().tobytes())
        return Message(Op(op), fields, _unflat(data, shapes))


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


def _flat(tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """All bytes in one tensor, each tensor's at a multiple of _ALIGN bytes."""
    parts = []
    for tensor in tensors.values():
        data = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
        parts.append(data)
        if pad := -len(data) % _ALIGN:
            parts.append(torch.zeros(pad, dtype=torch.uint8, device=device))
    if not parts:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unflat(data: torch.Tensor, shapes: list[list[Any]]) -> dict[str, torch.Tensor]:
    tensors, place = {}, 0
    for name, kind, shape in shapes:
        dtype = _DTYPES[kind]
        size = dtype.itemsize
        for side in shape:
            size *= int(side)
        tensors[str(name)] = data[place : place + size].view(dtype).view(shape)
        place += size + -size % _ALIGN
    return tensors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(error: BaseException) -> str:
    """The reason in an error of torch's, without the place in its source."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.rpartition("] ")[2][:200].rstrip(". ") if text.startswith("[") else text[:200].rstrip(". ")
