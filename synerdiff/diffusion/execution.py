"""How a model's kernels are launched and which of them are replaced: names, defaults, and what a machine refuses.

Light to import: commands and profiles name executions where nothing is loaded. `kernels` carries them out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass

from synerdiff.core import InputError
from synerdiff.files import shown
from synerdiff.profile.tables import Profile

EXECUTIONS = ("eager", "graphs", "compiled")
"""`eager`: every kernel is launched by the host; `graphs`: a CUDA graph per row bucket and per chunk; `compiled`: all
levers but `float8`, and on a GPU graphs of what they make."""
LEVERS = ("channels-last", "group-norm", "compile", "attention", "qkv", "cudnn-benchmark", "float8")
"""In the order in which they are applied."""
_GPU_LEVERS = ("cudnn-benchmark",)
_AS_WRITTEN = {"CUDA graphs": "graphs", "eager, rows padded to a bucket": "eager"}
"""What older profiles say."""


@dataclass(frozen=True, slots=True)
class ModelExecution:
    """`kind`: one of EXECUTIONS; `levers`: those that are on, in the order of LEVERS."""

    kind: str = "eager"
    levers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(self.levers)})" if self.levers else self.kind

    @property
    def options(self) -> tuple[str, ...]:
        """Of a command that asks for this."""
        return f"--execution {self.kind}", f"--levers {','.join(self.levers) or ','}"


def measured_execution(profile: Profile, on_gpu: bool) -> ModelExecution | None:
    """How the profile was measured; None where nobody measured it on this kind of device, or it does not say.

    InputError for levers that there are not.
    """
    head = profile.head
    kind = _AS_WRITTEN.get(head.execution, head.execution)
    if profile.provenance != "measured" or bool(head.driver) != on_gpu or kind not in EXECUTIONS:
        return None
    for name in head.levers:
        if name not in LEVERS:
            raise InputError(f"profile '{profile.name}': levers has {shown(name)}; there are {', '.join(LEVERS)}.")
    return ModelExecution(kind, tuple(name for name in LEVERS if name in head.levers))


def execution_of(profile: Profile, kind: str | None, on_gpu: bool) -> ModelExecution:
    """What a run with this profile takes: the profile's own execution unless `kind` is another one, else the device's.

    InputError as for `choose_execution`.
    """
    measured = measured_execution(profile, on_gpu)
    if measured is None or kind not in (None, measured.kind):
        return choose_execution(kind, None, on_gpu)
    require_compiler(measured, on_gpu)
    return measured


def other_execution(profile: Profile, execution: ModelExecution, on_gpu: bool) -> str | None:
    """A sentence where the profile was measured under another execution, so that its times are not what runs."""
    measured = measured_execution(profile, on_gpu)
    if measured is None or measured == execution:
        return None
    return f"profile '{profile.name}' was measured {measured}, this runs {execution}: its times are not what runs here"


def choose_execution(kind: str | None, levers: str | None, on_gpu: bool) -> ModelExecution:
    """From the texts of `--execution` (default: graphs on a GPU, else eager) and `--levers` (default: the execution's).

    `levers`: names separated by commas, empty for none, `+name` to add to the execution's own. Raises InputError, one
    sentence, for unknown names and for what this machine cannot do.
    """
    kind = kind or ("graphs" if on_gpu else "eager")
    if kind not in EXECUTIONS:
        raise InputError(f"--execution is '{kind}'; allowed are {', '.join(EXECUTIONS)}.")
    if kind == "graphs" and not on_gpu:
        raise InputError(
            "--execution graphs needs a GPU: CUDA graphs record its launches; a CPU has eager and compiled."
        )
    chosen = set(_own_levers(kind, on_gpu))
    if levers is not None:
        chosen = chosen if levers.startswith("+") else set()
        for name in filter(None, (part.strip() for part in levers.removeprefix("+").split(","))):
            if name not in LEVERS:
                raise InputError(f"--levers: there is no lever '{name}'; there are {', '.join(LEVERS)}.")
            if name in _GPU_LEVERS and not on_gpu:
                raise InputError(f"--levers: {name} needs a GPU.")
            chosen.add(name)
    execution = ModelExecution(kind, tuple(name for name in LEVERS if name in chosen))
    require_compiler(execution, on_gpu)
    return execution


def require_compiler(execution: ModelExecution, on_gpu: bool) -> None:
    """InputError, one sentence, where a lever needs a compiler that is not there."""
    needing = [name for name in ("group-norm", "compile") if name in execution.levers and (on_gpu or name == "compile")]
    if not needing:
        return
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise InputError(f"the lever {needing[0]} compiles with triton, which is not installed here.")
    if not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError("the lever compile needs a C++ compiler on a CPU (g++, or the one that CXX names).")


def _own_levers(kind: str, on_gpu: bool) -> tuple[str, ...]:
    if kind != "compiled":
        return ()
    return tuple(name for name in LEVERS if name != "float8" and (on_gpu or name not in _GPU_LEVERS))
