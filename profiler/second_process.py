"""A second process, on another core or GPU: the other end of the link, and a ControlNet service to be timed.

It answers as the runner's services do, at once and one message after another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from profiler.settings import Settings
from synerdiff.core import InputError
from synerdiff.device.lanes import available_cores
from synerdiff.device.link import Link, LinkLost, Message, Op
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.controlnet import example_call, load_controlnet
from synerdiff.diffusion.denoisers.controlnet import ControlCall, ControlNet
from synerdiff.diffusion.denoisers.unet import Residuals
from synerdiff.diffusion.rows import RowInputs

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
WAIT_S = 60.0
"""How long an answer may take."""


class SecondProcess:
    """What can be asked of it; raises LinkLost when it is gone."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def data(self, size: int) -> None:
        """Have it send so many bytes."""
        self._link.ask(Op.READ, {"bytes": size}, timeout_s=WAIT_S)

    def call(self, inputs: RowInputs) -> None:
        """Have it run its ControlNet on these rows, of which its example call has as many."""
        self._link.send(Op.CONTROL, {"rows": len(inputs.latents)}, inputs.named())

    def step(self, inputs: RowInputs) -> None:
        """Have it run the denoiser on these rows."""
        self._link.send(Op.STEP, {}, inputs.named())

    def prediction_ns(self) -> int:
        """How long that took, once the prediction is here."""
        return int(self._link.receive(WAIT_S).fields["ns"])

    def residuals(self) -> tuple[Residuals, int]:
        """The residuals of the call, and how long its forward took in ns."""
        answer = self._link.receive(WAIT_S)
        return Residuals.from_named(answer.tensors), int(answer.fields["ns"])


@contextmanager
def open_second_process(settings: Settings, controlnet: Path, device: torch.device) -> Iterator[SecondProcess]:
    """On the last core, or on the next GPU, with that ControlNet. Raises InputError when it does not come up."""
    folder = tempfile.mkdtemp(prefix="synerdiff-")
    meeting = str(Path(folder) / "meeting")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    described = json.dumps(asdict(settings) | {"device": device.type})
    command = [sys.executable, "-m", "profiler.second_process", meeting, described, str(controlnet)]
    process = subprocess.Popen(command, env=environment)
    link = None
    try:
        store = _store(meeting)
        _wait_for(store, "up", process)
        link = Link(store, "link", "the second process", 0, device, one_machine=True, timeout_s=START_S)
        _wait_for(store, "ready", process)
        yield SecondProcess(link)
    finally:
        if link is not None:
            with suppress(LinkLost):
                link.send(Op.STOP)
        else:
            process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(store: Any, key: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while not store.check([key]):
        if process.poll() is not None or time.monotonic() > until:
            raise InputError("the second process, to which the link is timed, did not come up.")
        time.sleep(0.02)


def _store(meeting: str) -> Any:
    distributed: Any = torch.distributed
    return distributed.FileStore(meeting, -1)


class _Service:
    def __init__(self, settings: Settings, controlnet: Path, device: torch.device) -> None:
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        self._model = load_model(settings.model, device, dtype, settings.resolution)
        self._net: ControlNet = load_controlnet(controlnet, self._model)
        self._calls: dict[int, ControlCall] = {}

    def answer(self, message: Message) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        if message.op is Op.READ:
            size = int(message.fields["bytes"])
            return {}, {"data": torch.zeros(size, dtype=torch.uint8, device=self._model.device)} if size else {}
        inputs = RowInputs.from_named(message.tensors)
        if message.op is Op.STEP:
            since_ns = time.monotonic_ns()
            noise = self._model.denoise(inputs)
            return {"ns": self._spent_ns(since_ns)}, {"noise": noise}
        rows = int(message.fields["rows"])
        if rows not in self._calls:
            self._calls[rows] = example_call(self._net, self._model, rows)
        call = replace(self._calls[rows], inputs=inputs)
        since_ns = time.monotonic_ns()
        residuals = self._net.residuals(call)
        return {"ns": self._spent_ns(since_ns)}, residuals.named()

    def _spent_ns(self, since_ns: int) -> int:
        if self._model.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.monotonic_ns() - since_ns


def main(meeting: str, described: str, controlnet: str) -> None:
    """MEETING SETTINGS CONTROLNET: the file where the processes meet, the settings as JSON, a ControlNet's folder."""
    torch.set_num_threads(1)
    fields = json.loads(described)
    fields["rows"] = tuple(fields["rows"])
    fields["resolution"] = None if fields["resolution"] is None else tuple(fields["resolution"])
    settings = Settings(**fields)
    device = torch.device("cpu")
    if settings.device == "cuda":
        device = torch.device("cuda", 1)
        torch.cuda.set_device(device)
    store = _store(meeting)
    store.set("up", "1")
    with suppress(LinkLost):
        link = Link(store, "link", "the profiler", 1, device, one_machine=True, timeout_s=START_S)
        service = _Service(settings, Path(controlnet), device)
        store.set("ready", "1")
        # Only this thread, as in the runner's services: gloo's own threads take whatever core is free.
        if device.type == "cpu" and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {available_cores()[-1]})
        while (message := link.receive()).op is not Op.STOP:
            link.send(Op.DONE, *service.answer(message))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
