"""A second process that answers at once, so that the link between two processes can be timed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.device import available_cores
from synerdiff.diffusion.link import Link, LinkLost, Op

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0


@contextmanager
def open_echo(device: torch.device) -> Iterator[Link]:
    """A link to a process on the last core, or on the next GPU. Raises InputError when that does not come up."""
    folder = tempfile.mkdtemp(prefix="synerdiff-")
    meeting = str(Path(folder) / "meeting")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", "profiler.echo", meeting, device.type], env=environment)
    link = None
    try:
        store = _store(meeting)
        until = time.monotonic() + START_S
        while not store.check(["up"]):
            if process.poll() is not None or time.monotonic() > until:
                raise InputError("the second process, to which the link is timed, did not come up.")
            time.sleep(0.02)
        link = Link(
            store, "echo", "the second process", 0, device, one_machine=True, timeout_s=START_S, send_timeout_s=START_S
        )
        yield link
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


def _store(meeting: str) -> Any:
    distributed: Any = torch.distributed
    return distributed.FileStore(meeting, -1)


def main(meeting: str, device_type: str) -> None:
    """Answer every message: with nothing, or with as many bytes as ``bytes`` asks for."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", 1)
        torch.cuda.set_device(device)
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {available_cores()[-1]})
    store = _store(meeting)
    store.set("up", "1")
    with suppress(LinkLost):
        link = Link(
            store, "echo", "the profiler", 1, device, one_machine=True, timeout_s=START_S, send_timeout_s=START_S
        )
        while (message := link.receive()).op is not Op.STOP:
            wanted = int(message.fields.get("bytes", 0))
            data = {"data": torch.zeros(wanted, dtype=torch.uint8, device=device)} if wanted else {}
            link.send(Op.DONE, {}, data)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
