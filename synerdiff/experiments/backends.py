"""Where the runs of a study are computed: ``run_unordered(function, items) -> Iterator[result]``.

Results come as they end. Work that was lost because a worker process died is given out again, and an exception that
``function`` raises ends the iteration; what has been yielded until then stays with the caller.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from synerdiff.core import ContractError, InputError
from synerdiff.experiments.store import ROOT
from synerdiff.files import PACKAGES, install_hint, shown, whole_number

Item = TypeVar("Item")
Result = TypeVar("Result")
Told = tuple[list[Any], InputError | ContractError | None, float]
"""What a task has done, the error that ended it, and how many seconds it took."""

LOOK_EVERY_S = 1.0
"""How often a worker looks whether its command is still there."""
ATTEMPTS = 3
"""How often in a row workers may die without finishing anything."""
CONNECT_S = 10.0
"""How long a cluster's address may take to answer."""
TASK_S = 2.0
"""Work of a Ray task: long beside what giving it out costs (milliseconds), short beside what a lost machine loses."""


class Backend(Protocol):
    """Runs a function on every item, in any order, and yields results as they come."""

    elsewhere: bool
    """Whether items are computed where this machine's files may not be."""

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]: ...


def _numbered(function: Callable[[Any], Any], number: int, item: Any) -> tuple[int, Any]:
    """A result with its place in the work list, so that lost work can be told from done work."""
    return number, function(item)


def _follow_the_command() -> None:
    """In a worker: Ctrl-C, which a terminal sends to workers too, is the command's affair; its death is the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    command = os.getppid() if parent is None else parent.pid  # which may have gone already

    def watch() -> None:
        while os.getppid() == command:
            time.sleep(LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ended(results: Iterator[Result]) -> Iterator[Iterator[Result]]:
    """Ends the workers by name: left to the garbage collector, interrupted ones would end when the command does.

    Ended while it hands out work, joblib's thread dies with an error and leaves the workers, for which the command
    would wait.
    """
    try:
        yield results
    finally:
        hook = threading.excepthook
        died: list[object] = []
        threading.excepthook = died.append
        try:
            cast(Generator[Result, None, None], results).close()
            for worker in multiprocessing.active_children() if died else ():
                worker.kill()
        finally:
            threading.excepthook = hook


@contextmanager
def _interrupts_later() -> Iterator[list[int]]:
    """Ctrl-C waits until the workers have been started: hit meanwhile, they would print where they were, and joblib
    would not end them. What came is in the list."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which workers inherit until they follow
    try:
        yield came
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)


def _start_quiet_tracker() -> None:
    """joblib's process for leftovers warns below the command's last sentence when what it would remove is gone."""
    from joblib.externals.loky.backend import resource_tracker

    told = os.environ.pop("PYTHONWARNINGS", None)
    quiet = f"ignore:::{resource_tracker.__name__}"
    os.environ["PYTHONWARNINGS"] = f"{told},{quiet}" if told else quiet
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        os.environ |= {} if told is None else {"PYTHONWARNINGS": told}


class LokyBackend:
    """Processes on this machine; ``jobs`` of them, one per core when it is None."""

    elsewhere = False

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results as they come. Work of workers that died is given out again; InputError when that brings nothing."""
        from joblib import Parallel, cpu_count, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        warnings.filterwarnings("ignore", ".*tasks which were still being processed by the workers", UserWarning)
        jobs = min(self.jobs or cpu_count(), max(1, len(items)))
        numbered = delayed(partial(_numbered, function))
        left = dict(enumerate(items))
        attempts = ATTEMPTS
        while left:
            before = len(left)
            try:
                with parallel_config(backend="loky", initializer=_follow_the_command):
                    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
                with _interrupts_later() as came:
                    _start_quiet_tracker()
                    working = parallel([numbered(number, item) for number, item in left.items()])
                with _ended(working) as results:
                    if came:
                        raise KeyboardInterrupt
                    for number, result in results:
                        del left[number]
                        yield result
            except TerminatedWorkerError:
                attempts = ATTEMPTS if len(left) < before else attempts - 1
                if attempts == 0:
                    raise InputError(
                        f"Worker processes died {ATTEMPTS} times in a row, most likely for lack of memory; "
                        "give fewer jobs."
                    ) from None


def _telling(function: Callable[[Item], Result]) -> Callable[[Sequence[Item]], Told]:
    """Works on several items; an error comes back as a value, after what was done before it: Ray would wrap it into a
    page about the machine on which it was raised."""

    def task(items: Sequence[Item]) -> Told:
        began, done = time.perf_counter(), list[Any]()
        for item in items:
            try:
                done.append(function(item))
            except (InputError, ContractError) as error:
                return done, error, time.perf_counter() - began
        return done, None, time.perf_counter() - began

    return task


class RayBackend:
    """Tasks on a Ray cluster, retried by Ray when a machine is lost; at most ``jobs`` at a time when it is given.

    A task takes several items, about ``TASK_S`` long together. ``address``: of a running cluster, which is sent this
    machine's modules of ours; without one Ray is started here (or found by RAY_ADDRESS).
    """

    elsewhere = True

    def __init__(self, jobs: int | None = None, address: str | None = None) -> None:
        self.jobs = jobs
        self.ray = _ray(jobs, address)

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        ray, left = self.ray, list(items)
        task = ray.remote(max_retries=ATTEMPTS)(_telling(function))
        pending: list[Any] = []
        ended, spent_s = 0, 0.0
        try:
            while pending or left:
                places = self.jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
                while left and len(pending) < (self.jobs or 2 * places):
                    size = task_size(len(left), places, spent_s / ended if ended else TASK_S)
                    pending.append(task.remote(left[:size]))
                    del left[:size]
                done, pending = ray.wait(pending, num_returns=1)
                for reference in done:
                    results, error, seconds = ray.get(reference)
                    ended, spent_s = ended + len(results), spent_s + seconds
                    yield from results
                    if error is not None:
                        raise error
        except ray.exceptions.RayError as error:
            raised = isinstance(error, ray.exceptions.RayTaskError)  # by a task: its own error ends the page
            said = str(error).strip().splitlines()[-1 if raised else 0]
            raise InputError(
                f"The Ray cluster gave up ({said.rstrip('.')}); what was finished is kept, so run it again."
            ) from None
        finally:
            for reference in pending:
                ray.cancel(reference)


def task_size(left: int, places: int, item_s: float) -> int:
    """How many items the next task takes: ``TASK_S`` of work, and towards the end less, so that no place is idle long.

    The share of what is left is that of guided self-scheduling (Polychronopoulos and Kuck, 1987), halved.
    """
    return max(1, min(left // (2 * places), int(TASK_S / max(item_s, 1e-9))))


def _ray(jobs: int | None, address: str | None) -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError(f"The backend ray needs the library ray; install it with: {install_hint('cluster')}") from None
    if address is not None:
        _require_answer(address)
    if ray.is_initialized():
        return ray
    if address is None:
        # A cluster that happens to run here is not meant: it is named by its address.
        here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": jobs}
        try:
            ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises plain ones, as for a node that does not start within 30 s
            raise InputError(f"Ray does not start on this machine ({str(error).rstrip('.')}).") from None
        return ray
    with tempfile.TemporaryDirectory() as folder:
        for package in ("synerdiff", *PACKAGES):
            shutil.copytree(ROOT / package, Path(folder) / package, ignore=_all_but_modules)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"working_dir": folder})
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"--address {address}: no Ray cluster answers there ({why.rstrip('.')}).") from None
    return ray


def _require_answer(address: str) -> None:
    """InputError where nobody listens: Ray would try for minutes, and fill the terminal meanwhile."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        with socket.create_connection((host, whole_number(port, 1, 65_535)), CONNECT_S):
            return
    except ValueError:
        raise InputError(f"--address is {shown(address)}; HOST:PORT or auto is needed.") from None
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"--address {shown(address)}: no Ray cluster answers there ({why}).") from None


def _all_but_modules(folder: str, names: list[str]) -> list[str]:
    return [
        name for name in names if not (name.endswith(".py") or Path(folder, name).is_dir()) or name == "__pycache__"
    ]


BACKENDS = ("loky", "ray")


def make_backend(name: str, jobs: int | None, address: str | None = None) -> Backend:
    """A backend by name; InputError lists the known ones, and says so when its library is missing."""
    if jobs is not None and not 1 <= jobs <= 4096:
        raise InputError(f"--jobs is {jobs}; a whole number from 1 to 4096 is needed.")
    if name not in BACKENDS:
        raise InputError(f"There is no backend '{name}'; known are {', '.join(BACKENDS)}.")
    if name == "ray":
        return RayBackend(jobs, address)
    if address is not None:
        raise InputError(f"--address is that of a Ray cluster; the backend is {name}, so give --backend ray too.")
    return LokyBackend(jobs)
