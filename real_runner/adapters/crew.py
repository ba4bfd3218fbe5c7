"""The processes beside a worker: started on this machine by the worker, or by torchrun on one or many."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from real_runner.adapters.layout import Role
from real_runner.adapters.process import START_S, Spec, open_links, ready_key, serve, spec_from
from synerdiff.core import InputError
from synerdiff.device.link import Link, LinkLost, Op

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_S = 5.0
_LOOK_EVERY_S = 0.02


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def own_rank() -> int:
    """This process's rank under torchrun; 0, the worker's, without it."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


class Crew:
    """The worker's links, by rank, and the processes that it has started. Close it in any case: that ends them."""

    def __init__(self, roles: list[Role], spec: Spec) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.links: dict[int, Link] = {}
        self._roles = roles
        self._folder = Path(tempfile.mkdtemp(prefix="synerdiff-"))
        try:
            store = _publish(spec) if started_by_torchrun() else self._start(spec)
            self._wait_for(store, [f"up{role.rank}" for role in roles[1:]])
            self.links = open_links(roles[0], roles, spec, store)
            self._wait_for(store, [ready_key(role.rank) for role in roles[1:]])
            for role in roles[1:]:
                answer = store.get(ready_key(role.rank)).decode()
                if answer.startswith("failed: "):
                    raise InputError(f"{role.name} cannot start: {answer.removeprefix('failed: ').rstrip('.')}.")
        except LinkLost as error:
            self.close()
            raise InputError(f"a process beside the worker cannot start: {error}.") from None
        except BaseException:
            self.close()
            raise

    def _start(self, spec: Spec) -> Any:
        meeting = self._folder / "meeting"
        environment = dict(os.environ)
        places = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        text = json.dumps(asdict(spec))
        for role in self._roles[1:]:
            command = [sys.executable, "-m", "real_runner.adapters.process", str(role.rank), str(meeting), text]
            self.processes[role.rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        return _distributed().FileStore(str(meeting), -1)

    def _wait_for(self, store: Any, keys: list[str]) -> None:
        """Wait until each process beside the worker has set its key."""
        until = time.monotonic() + START_S
        for role, key in zip(self._roles[1:], keys, strict=True):
            while not store.check([key]):
                process = self.processes.get(role.rank)
                if process is not None and process.poll() is not None:
                    raise InputError(f"{role.name} ended with exit code {process.returncode} before it was up.")
                if time.monotonic() > until:
                    raise InputError(f"{role.name} did not come up within {START_S:g} s.")
                time.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        """Tell all to stop, and end those that do not."""
        for link in self.links.values():
            with suppress(LinkLost):
                link.send(Op.STOP)
        until = time.monotonic() + STOP_S
        for process in self.processes.values():
            if not self.links:
                process.terminate()
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def require_processes(roles: list[Role]) -> None:
    """InputError unless torchrun, if it started this process, has started one for each role."""
    if not started_by_torchrun():
        return
    world = int(os.environ["WORLD_SIZE"])
    if world != len(roles):
        names = ", ".join(role.name for role in roles)
        raise InputError(f"torchrun started {world} processes; this run needs {len(roles)}: {names}.")


def serve_under_torchrun() -> None:
    """Be the process of this rank, once the worker has said what it needs; this process then ends."""
    store = _torchrun_store()
    with suppress(LinkLost):
        serve(own_rank(), spec_from(store.get("spec").decode()), store)
    os._exit(0)


def _publish(spec: Spec) -> Any:
    store = _torchrun_store()
    store.set("spec", json.dumps(asdict(spec)))
    return store


def _torchrun_store() -> Any:
    """Where the processes that torchrun has started meet."""
    distributed = _distributed()
    store, _, _ = next(distributed.rendezvous("env://"))
    store.set_timeout(timedelta(seconds=START_S))
    return distributed.PrefixStore("synerdiff", store)


def _distributed() -> Any:
    """Parts of it are not typed."""
    return torch.distributed
