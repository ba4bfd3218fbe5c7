"""Where the runs of a study are computed: ``run_unordered(function, items) -> Iterator[result]``.

Results come as they end. Work that was lost because a worker process died is given out again, and an exception that
``function`` raises ends the iteration; what has been yielded until then stays with the caller.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

from synerdiff.core import ContractError, InputError
from synerdiff.files import install_hint

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3
"""How often in a row workers may die without finishing anything."""


class Backend(Protocol):
    """Runs a function on every item, in any order, and yields results as they come."""

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]: ...


class _Numbered:
    """Keeps a result's place in the work list, so that lost work can be told from done work."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, number: int, item: Any) -> tuple[int, Any]:
        return number, self.function(item)


def _leave_interrupts_to_the_command() -> None:
    """A terminal sends Ctrl-C to workers too. The command ends them; one hit by itself would print where it was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start_quiet_tracker() -> None:
    """joblib's process for leftovers warns below the command's last sentence when what it would remove is gone."""
    from joblib.externals.loky.backend import resource_tracker

    told = os.environ.get("PYTHONWARNINGS")
    quiet = f"ignore:::{resource_tracker.__name__}"
    os.environ["PYTHONWARNINGS"] = f"{told},{quiet}" if told else quiet
    try:
        resource_tracker.ensure_running()
    finally:
        if told is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = told


class LokyBackend:
    """Processes on this machine; ``jobs`` of them, one per core when it is None."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results as they come. Work of workers that died is given out again; InputError when that brings nothing."""
        from joblib import Parallel, cpu_count, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        _start_quiet_tracker()
        jobs = min(self.jobs or cpu_count(), max(1, len(items)))
        numbered = delayed(_Numbered(function))
        left = dict(enumerate(items))
        attempts = ATTEMPTS
        while left:
            before = len(left)
            try:
                with parallel_config(backend="loky", initializer=_leave_interrupts_to_the_command):
                    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
                # Closed by name: left to the garbage collector, an interrupted one would end its workers at exit.
                with closing(parallel([numbered(number, item) for number, item in left.items()])) as results:
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


def _telling(function: Callable[[Item], Result]) -> Callable[[Item], tuple[Result | None, Exception | None]]:
    """Gives errors back as values: Ray would wrap them into a page about the machine on which they were raised."""

    def task(item: Item) -> tuple[Result | None, Exception | None]:
        try:
            return function(item), None
        except (InputError, ContractError) as error:
            return None, error

    return task


class RayBackend:
    """Tasks on a Ray cluster, retried by Ray when a machine is lost; at most ``jobs`` at a time when it is given."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs
        self.ray = _ray(jobs)

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        ray, waiting = self.ray, list(reversed(items))
        task = ray.remote(max_retries=ATTEMPTS)(_telling(function))
        pending: list[Any] = []
        try:
            while pending or waiting:
                while waiting and (self.jobs is None or len(pending) < self.jobs):
                    pending.append(task.remote(waiting.pop()))
                done, pending = ray.wait(pending, num_returns=1)
                for reference in done:
                    result, error = ray.get(reference)
                    if error is not None:
                        raise error
                    yield result
        finally:
            for reference in pending:
                ray.cancel(reference)


def _ray(jobs: int | None) -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError(f"The backend ray needs the library ray; install it with: {install_hint('cluster')}") from None
    if not ray.is_initialized():
        ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else jobs, log_to_driver=False)
    return ray


BACKENDS: dict[str, Callable[[int | None], Backend]] = {"loky": LokyBackend, "ray": RayBackend}


def make_backend(name: str, jobs: int | None) -> Backend:
    """A backend by name; InputError lists the known ones, and says so when its library is missing."""
    if jobs is not None and not 1 <= jobs <= 4096:
        raise InputError(f"--jobs is {jobs}; a whole number from 1 to 4096 is needed.")
    if name not in BACKENDS:
        raise InputError(f"There is no backend '{name}'; known are {', '.join(BACKENDS)}.")
    return BACKENDS[name](jobs)
