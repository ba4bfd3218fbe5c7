"""Where the runs of a study are computed: ``run_unordered(function, items) -> Iterator[result]``.

Results come as they end. Work that was lost because a worker process died is given out again, and an exception that
``function`` raises ends the iteration; what has been yielded until then stays with the caller.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

from synerdiff.core import InputError
from synerdiff.files import install_hint

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3
"""How often in a row workers may die without finishing anything."""


class Backend(Protocol):
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


class LokyBackend:
    """Processes on this machine; ``jobs`` of them, one per core when it is None."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        from joblib import Parallel, cpu_count, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

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


class RayBackend:
    """Tasks on a Ray cluster, retried by Ray when a machine is lost."""

    def run_unordered(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        ray = _ray()
        task = ray.remote(max_retries=ATTEMPTS)(function)
        pending = [task.remote(item) for item in items]
        try:
            while pending:
                done, pending = ray.wait(pending, num_returns=1)
                for reference in done:
                    yield ray.get(reference)
        finally:
            for reference in pending:
                ray.cancel(reference)


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError(f"The backend ray needs the library ray; install it with: {install_hint('cluster')}") from None
    if not ray.is_initialized():
        ray.init()
    return ray


BACKENDS = ("loky", "ray")


def make_backend(name: str, jobs: int | None) -> Backend:
    """A backend by name; InputError lists the known ones, and says so when its library is missing."""
    if name == "loky":
        return LokyBackend(jobs)
    if name == "ray":
        _ray()
        return RayBackend()
    raise InputError(f"There is no backend '{name}'; known are {', '.join(BACKENDS)}.")
